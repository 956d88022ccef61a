"""The smallest Triton kernel, to see whether one can be built and run."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl


@triton.jit
def _write_one(out):
    tl.store(out, 1.0)


def run_smallest(device: torch.device) -> None:
    """Build and run it, and wait for it.

    Raises:
        RuntimeError: if it does not do what it should; and what Triton raises.
    """
    out = torch.zeros((), device=device)
    with torch.cuda.device(device) if out.is_cuda else nullcontext():  # Triton launches on the current one
        _write_one[(1,)](out)
    if out.item() != 1.0:
        raise RuntimeError("a kernel ran without effect")
