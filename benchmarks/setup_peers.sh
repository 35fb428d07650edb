#!/usr/bin/env bash
# Build the environments of the systems that Pagoda is measured against, each beside the others in DIR.
# usage: setup_peers.sh DIR        (llama.cpp is compiled for this CPU: about ten minutes on two cores)
set -euo pipefail
mkdir -p "$1"
cd "$1"
python3 -m venv transformers
transformers/bin/pip install -q torch==2.13.0 transformers==5.23.0 safetensors
python3 -m venv llamacpp
# without AMX: with it this version crashes on quantized models of this shape
export CFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" CXXFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
[ "$(uname -m)" = x86_64 ] || unset CFLAGS CXXFLAGS
CMAKE_ARGS="-DGGML_NATIVE=ON" llamacpp/bin/pip install -q llama-cpp-python==0.3.36 numpy
transformers/bin/pip install -q peft==0.21.2 bitsandbytes==0.50.2 accelerate
python3 -m venv litgpt
litgpt/bin/pip install -q torch==2.13.0 litgpt==0.5.13
