#!/usr/bin/env bash
# Makes an environment for each engine that benchmarks.throughput holds ours against: what they
# need clashes.
#
#     bash benchmarks/peers/setup.sh FOLDER
#
# One that is complete stays as it is. llama.cpp is compiled, for this processor: that takes a C++
# compiler and some minutes. transformers is compared in our own environment.
set -uo pipefail

folder=${1:?usage: setup.sh FOLDER}
failed=()

# NAME CHECK REQUIREMENT...: CHECK is Python that fails unless the environment is complete.
environment() {
    local name=$1 check=$2 python=$folder/$1/bin/python
    shift 2
    if "$python" -c "$check" 2>/dev/null; then
        echo "$name: is there"
        return
    fi
    echo "$name: installing $*"
    python3 -m venv "$folder/$name" &&
        "$python" -m pip install --quiet "$@" &&
        # optimum-intel brings it, built for another torch, and then cannot be imported itself.
        "$python" -m pip uninstall --quiet --yes torchvision &&
        "$python" -c "$check" ||
        failed+=("$name")
}

mkdir -p "$folder"
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc)
export CMAKE_BUILD_PARALLEL_LEVEL

environment llamacpp "import gguf, llama_cpp" llama-cpp-python==0.3.36 gguf==0.19.0
environment ct2 "import ctranslate2, torch, transformers" \
    torch==2.13.0 ctranslate2==4.8.5 transformers==4.57.6
environment ortgenai "import onnxruntime_genai, onnx_ir, torch" \
    torch==2.13.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 \
    'transformers>=5,<6'
environment openvino "import openvino_genai; from optimum.intel import OVModelForCausalLM" \
    torch==2.13.0 openvino-genai==2026.4.1.0 'optimum-intel[openvino]==2.2.0'

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
