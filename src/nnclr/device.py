"""Which device a run uses, whether it computes in bf16, and what its views are."""

import re
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
        if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name, re.ASCII):
            raise RuntimeError("torch knows more names, such as meta and mps, which are not tested here")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used; choose {_choices()}") from error
    return name


def _choices() -> str:
    """The devices of this machine in words."""
    if not torch.cuda.is_available():
        return "auto or cpu: PyTorch finds no CUDA device here, or was installed without CUDA"
    last = torch.cuda.device_count() - 1
    return f"auto, cpu, cuda or cuda:0{f' to cuda:{last}' if last else ''}"


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """`bf16` or `fp32`; `auto` is bf16 where the device computes in it: natively, or by AVX-512 or AMX on a CPU."""
    if name != "auto":
        return name
    return "bf16" if bfloat16_is_native(device) else "fp32"


def view_dtype(precision: Precision, device: torch.device, named: bool) -> torch.dtype:
    """Of the views a run trains on: bfloat16 where the backbone's first layer would round them to it anyway.

    That is so for nearly all backbones by name (a few of timm's resize or scale views first, and round once more); what
    another module does before its first product is its own affair. On a CPU the rounding is left to autocast.
    """
    return torch.bfloat16 if precision == "bf16" and device.type != "cpu" and named else torch.float32
