# One file, three images: docker build --target cpu .   or cuda, or sagemaker.
#
# Run as TGI's image is run:
#   docker run --shm-size 1g -p 8080:80 -v $PWD/data:/data IMAGE --model-id HuggingFaceTB/SmolLM2-135M-Instruct

FROM rust:1-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/maturin && /opt/maturin/bin/pip install --no-cache-dir 'maturin>=1.16,<2'
WORKDIR /src
COPY . .
RUN /opt/maturin/bin/maturin build --release --locked --out /wheels

FROM python:3.12-slim-bookworm AS base
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 g++ \
    && rm -rf /var/lib/apt/lists/* && pip install --no-cache-dir uv
# Without compiled bytecode every new container compiles thousands of modules before it starts.
ENV HF_HOME=/data PORT=80 UV_COMPILE_BYTECODE=1
WORKDIR /usr/src
ENTRYPOINT ["headrace"]

FROM base AS cpu
RUN uv pip install --system --no-cache --torch-backend=cpu 'torch>=2.11'
COPY --from=build /wheels /wheels
RUN uv pip install --system --no-cache --torch-backend=cpu /wheels/*.whl \
    && ln -s "$(command -v headrace)" /usr/local/bin/text-generation-launcher && rm -rf /wheels

FROM base AS cuda
# On the volume, so that a new container finds what an earlier one compiled; before that it looks
# for what the image brings.
ENV TRITON_CACHE_DIR=/data/triton
RUN uv pip install --system --no-cache 'torch>=2.11'
COPY --from=build /wheels /wheels
RUN uv pip install --system --no-cache "$(echo /wheels/*.whl)[cuda]" \
    && ln -s "$(command -v headrace)" /usr/local/bin/text-generation-launcher && rm -rf /wheels
# Compute capability of the GPUs that the image brings the kernels of published models for; their
# compilation needs no GPU.
ARG CAPABILITY=9.0
RUN headrace compile --ship --capability "$CAPABILITY"

# As SageMaker runs it: a model in HF_MODEL_ID, port 8080, /ping and /invocations.
FROM cuda AS sagemaker
COPY tools/sagemaker.sh /usr/local/bin/sagemaker
ENTRYPOINT ["sagemaker"]
