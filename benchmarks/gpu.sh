#!/usr/bin/env bash
# Speed and tests on one GPU, made to end within nine minutes: benchmarks/gpu.sh [OUT_FOLDER]
#
# Needs a CUDA build of torch >= 2.10 with Triton, torchvision and timm in PYTHON (default python3). What else is missing there,
# on a machine without network, is looked for in VENDOR, a folder as `uv pip install --target` makes it: tyro, rich, simplejpeg,
# safetensors, pytest, pytest-timeout, and the peers of benchmarks/requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-docs/results}
export PYTHONPATH="$PWD/src:$PWD${VENDOR:+:$VENDOR}${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
failed=0
"$PYTHON" -m benchmarks.gpu limits augmentation lookup lars 'step-*' --out "$OUT/gpu.json" || failed=1
# By name, since other files import what need not be there; warnings of another torch are no failures.
"$PYTHON" -m pytest -q -p no:cacheprovider -W default -m gpu \
  tests/gpu tests/test_optim.py tests/kernels/test_available.py tests/kernels/test_lookup.py tests/data/test_augment.py || failed=1
# What takes longest comes last and is cut off at nine minutes; each case is written down when it is done.
{ ((SECONDS < 540)) && timeout $((540 - SECONDS)) "$PYTHON" -m benchmarks.gpu 'compiled-*' --out "$OUT/gpu.json"; } || failed=1
exit "$failed"
