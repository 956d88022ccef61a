"""What PyTorch computes faster than asked for, switched off where results have to be exact or the same every time.

The switches belong to the process, not to the thread that turns them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 inside products and convolutions of float32 numbers.

    PyTorch's convolutions on CUDA compute in TF32 by default, its products where a program asks for it.
    """
    backends: Any = torch.backends  # whose annotations leave these parts out
    # Each part by itself: `torch.get_float32_matmul_precision` is an error where a program has set them apart.
    parts = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv)
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Convolutions on CUDA by algorithms that add up in a fixed order, chosen without measuring: same input, same bits.

    By default cuDNN may take others for gradients. Attention and the resizing of position embeddings have PyTorch's
    own kernels, some of which add up their gradients in any order; this does not change them.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
