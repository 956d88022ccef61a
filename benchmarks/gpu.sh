#!/usr/bin/env bash
# Speed and tests on one GPU, in less than ten minutes: benchmarks/gpu.sh [OUT_FOLDER]
#
# Needs a CUDA build of torch >= 2.10 with Triton and timm on the PATH's python3 (or PYTHON=...); everything else that is
# missing is looked for in VENDOR, a folder of wheels, so that a machine without network can run it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-docs/results}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${VENDOR:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --find-links "$VENDOR" tyro simplejpeg kornia lightly pytest pytest-timeout
fi
"$PYTHON" -m benchmarks.gpu --out "$OUT/gpu.json"
"$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests
