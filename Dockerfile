# One file, three images: docker build --target cpu .   or cuda, or sagemaker.
#
# Run as TGI's image is run:
#   docker run --shm-size 1g -p 8080:80 -v $PWD/data:/data IMAGE --model-id HuggingFaceTB/SmolLM2-135M-Instruct
#
# `make image-check` executes these steps in clean Debian roots.

FROM rust:1-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/maturin && /opt/maturin/bin/pip install --no-cache-dir 'maturin>=1.16,<2'
WORKDIR /src
COPY . .
RUN /opt/maturin/bin/maturin build --release --locked --out /wheels

FROM debian:bookworm-slim AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
# A volume that any user may write: the image runs under `--user` as well.
RUN mkdir -m 1777 /data && python3 -m venv /opt/headrace
# Without compiled bytecode every new container compiles thousands of modules before it starts.
ENV PATH=/opt/headrace/bin:$PATH VIRTUAL_ENV=/opt/headrace HF_HOME=/data PORT=80 UV_COMPILE_BYTECODE=1
RUN pip install --no-cache-dir uv
WORKDIR /usr/src
ENTRYPOINT ["headrace"]

FROM base AS cpu
# Where PyTorch comes from: its builds for CPUs alone are a twentieth of those with CUDA.
ARG TORCH_FROM=--torch-backend=cpu
RUN uv pip install --no-cache $TORCH_FROM 'torch>=2.11'
COPY --from=build /wheels /wheels
RUN uv pip install --no-cache $TORCH_FROM "$(echo /wheels/*.whl)[trace]" && rm -rf /wheels

FROM base AS cuda
# Triton compiles what starts its kernels, against Python's headers.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
# On the volume, so that a new container finds what an earlier one compiled; before that it looks
# for what the image brings.
ENV TRITON_CACHE_DIR=/data/triton HUMMING_CACHE_DIR=/data/humming HUMMING_TMP_DIR=/tmp/humming
RUN uv pip install --no-cache 'torch>=2.11'
COPY --from=build /wheels /wheels
RUN uv pip install --no-cache "$(echo /wheels/*.whl)[cuda,trace]" && rm -rf /wheels
# Compute capability of the GPUs that the image brings the kernels of published models for; their
# compilation needs no GPU.
ARG CAPABILITY=9.0
RUN headrace compile --ship --capability "$CAPABILITY"

# As SageMaker runs it: a model in HF_MODEL_ID, port 8080, /ping and /invocations.
FROM cuda AS sagemaker
COPY tools/sagemaker.sh /usr/local/bin/sagemaker
ENTRYPOINT ["sagemaker"]
