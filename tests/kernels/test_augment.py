"""The augmentation kernels: the cases of `augment_cases.py` in Triton's interpreter, which needs a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("augment_cases.py")


def test_cases_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    answer = subprocess.run(
        command, cwd=CASES.parents[2], env=environment, capture_output=True, text=True, check=False, timeout=230
    )
    assert answer.returncode == 0, answer.stdout
    assert "skipped" not in answer.stdout


def test_without_a_gpu_triton_is_not_imported():
    code = (
        "import sys, numpy as np, torch, nnclr\n"
        "from nnclr.data.augment import augment, policy\n"
        "before = 'triton' in sys.modules\n"  # torch's own business
        "augment(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), np.arange(2), policy('byol', 16), 0, 0)\n"
        "print(('triton' in sys.modules) == before, 'nnclr.kernels.augment_triton' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True", "False"]
