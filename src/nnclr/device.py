"""Which device a run uses, and whether it computes in bf16."""

from typing import Literal

import torch

from nnclr.errors import InputError
from nnclr.kernels.lookup import bfloat16_is_native

Precision = Literal["auto", "bf16", "fp32"]


def choose_device(name: str) -> str:
    """The device of a name; `auto` is CUDA where there is one.

    Raises:
        InputError: if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name} is not supported; choose auto, cpu, cuda or cuda:N")
    return name


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """`bf16` or `fp32`; `auto` is bf16 where the device computes in it: natively, or by AVX-512 or AMX on a CPU."""
    if name != "auto":
        return name
    return "bf16" if bfloat16_is_native(device) else "fp32"
