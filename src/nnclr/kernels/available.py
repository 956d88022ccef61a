"""Whether Triton kernels can be had on a device."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch

from nnclr.errors import first_line


@cache
def triton_works(device: torch.device) -> bool:
    """Whether a kernel runs: on NVIDIA devices from Ampere on, where Triton is installed and can build one.

    It builds with a C compiler and Python's headers, which images for containers often leave out. A warning says so
    once; PyTorch's own operations then take the place of kernels.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from nnclr.kernels.smallest_triton import run_smallest

        run_smallest(device)
    except Exception as error:  # noqa: BLE001  (compilers, drivers and caches on disk fail in many ways)
        warnings.warn(
            f"Triton cannot build kernels here ({first_line(error)}): views and neighbours are computed by PyTorch's "
            "own operations, which is slower; often a C compiler or Python's headers are missing",
            stacklevel=2,
        )
        return False
    return True
