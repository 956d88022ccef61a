#!/usr/bin/env bash
# Speed and tests on one GPU, in less than ten minutes: benchmarks/gpu.sh [OUT_FOLDER]
#
# Needs a CUDA build of torch >= 2.10 with Triton, torchvision and timm in PYTHON (default python3). What else is missing there,
# on a machine without network, is looked for in VENDOR, a folder as `uv pip install --target` makes it: tyro, rich, simplejpeg,
# safetensors, pytest, pytest-timeout, and the peers of benchmarks/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-docs/results}
export PYTHONPATH="$PWD/src:$PWD${VENDOR:+:$VENDOR}${PYTHONPATH:+:$PYTHONPATH}"
failed=0
# What may run out of time comes last; each case is written down when it is done.
"$PYTHON" -m benchmarks.gpu limits augmentation lookup lars 'step-*' --out "$OUT/gpu.json" || failed=1
"$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests || failed=1
"$PYTHON" -m benchmarks.gpu 'compiled-*' --out "$OUT/gpu.json" || failed=1
exit "$failed"
