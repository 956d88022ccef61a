"""What PyTorch computes faster than asked for, switched off where results have to be exact or the same every time.

The switches belong to the process: the first of several threads turns them, and the last one turns them back.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Switch:
    """Something of the process that is turned while anybody is inside.

    Args:
        turn: turns it, and returns what turns it back.
    """

    def __init__(self, turn: Callable[[], Callable[[], None]]) -> None:
        self._turn, self._lock, self._inside = turn, threading.Lock(), 0
        self._back: Callable[[], None] = lambda: None

    @contextmanager
    def turned(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._back = self._turn()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._back()


def _to_float32() -> Callable[[], None]:
    backends: Any = torch.backends  # whose annotations leave the newer switches out
    cudnn = backends.cudnn
    try:
        products, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # a program has set the parts to different values by the newer switches
        parts = (backends.cuda.matmul, backends.mkldnn.matmul, cudnn.conv)
        before = [part.fp32_precision for part in parts]

        def each_back() -> None:
            for part, precision in zip(parts, before, strict=True):
                part.fp32_precision = precision

        for part in parts:
            part.fp32_precision = "ieee"
        return each_back

    def back() -> None:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions

    # The older switches leave both kinds readable, which others do meanwhile.
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    return back


def _to_a_fixed_order() -> Callable[[], None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark

    def back() -> None:
        cudnn.deterministic, cudnn.benchmark = before

    cudnn.deterministic, cudnn.benchmark = True, False
    return back


_FLOAT32, _FIXED_ORDER = _Switch(_to_float32), _Switch(_to_a_fixed_order)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bfloat16 inside products and convolutions of float32 numbers.

    PyTorch's convolutions on CUDA compute in TF32 by default, its products where a program asks for it.
    """
    with _FLOAT32.turned(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Convolutions on CUDA by algorithms that add up in a fixed order, chosen without measuring: same input, same bits.

    By default cuDNN may take others for gradients. Attention and the resizing of position embeddings have PyTorch's
    own kernels, some of which add up their gradients in any order; this does not change them.
    """
    with _FIXED_ORDER.turned():
        yield
