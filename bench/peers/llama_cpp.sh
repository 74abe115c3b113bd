#!/usr/bin/env bash
# Builds llama.cpp's server out of the sdist of llama-cpp-python and converts a Hub folder for it.
#
#   bench/peers/llama_cpp.sh MODEL_DIR OUT_DIR PYTHON
#
# PYTHON has torch, transformers, gguf and sentencepiece. Needs cmake and ninja; a quarter of an hour
# on two cores. Leaves OUT_DIR/llama-server and OUT_DIR/{bf16,f32}.gguf.
set -euo pipefail
model=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
python=$3
version=0.3.36
source=$out/llama_cpp_python-$version/vendor/llama.cpp

if [ ! -x "$out/llama-server" ]; then
    cd "$out"
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: "llama-cpp-python==$version" ||
        [ -f "llama_cpp_python-$version.tar.gz" ]
    tar xzf "llama_cpp_python-$version.tar.gz"
    cmake -S "$source" -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF >cmake.log
    cmake --build "$source/build" --target llama-server llama-bench -j"$(nproc)" >build.log
    cp "$source/build/bin/llama-server" "$source/build/bin/llama-bench" "$out/"
fi
for type in bf16 f32; do
    [ -f "$out/$type.gguf" ] ||
        "$python" "$source/convert_hf_to_gguf.py" "$model" --outtype "$type" --outfile "$out/$type.gguf"
done
