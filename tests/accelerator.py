"""A second device of pretence, which computes on the CPU, keeps its tensors apart from the host's and notes waits.

What runs on it is tested for mistakes that only a GPU would show: operands on two devices, memory read in another
layout, numbers that the host waits for. It calls itself `meta`, the one device besides the CPU whose gradients torch
computes on any machine; autocast does not know it.
"""

import sys
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import nnclr.device
from nnclr.data import loader

NAME = "meta"
# What CUDA has to ask the host about: a number, or a shape that depends on numbers.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique_", "bincount")
_COPIES = ("_to_copy", "copy_", "_foreach_copy_")


class OnDevice(torch.Tensor):
    """A tensor of the pretended device around the one that is computed with."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False  # it holds numbers

    @staticmethod
    def __new__(cls, near):
        made = torch.Tensor._make_wrapper_subclass(
            *(cls, near.size()),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=NAME,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {}, Counter())

    def tolist(self):
        return [row.tolist() for row in self] if self.ndim > 1 else [number.item() for number in self.flatten()]


class Accelerator(TorchDispatchMode):
    """The device exists inside this context; `waits` counts what the host waited for."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {}, self.waits, self)


def _near(x):
    return x.near if isinstance(x, OnDevice) else x


def _on_device(x):
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def _call(function, args, kwargs, waits, mode=None):
    name = function.__name__.split(".")[0]
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, OnDevice) for t in given)
    if there and name not in _COPIES and any(not isinstance(t, OnDevice) and t.ndim for t in given):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some of the host")
    target = there
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"]).type == NAME
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": torch.device("cpu")}
    if name == "copy_":
        target = isinstance(args[0], OnDevice)
    if there and (name.startswith(_WAITING) or (name.startswith("index") and _has_mask(args))):
        waits[name] += 1
    if name in _COPIES and (there or target) and (not target or not all(isinstance(t, OnDevice) for t in given)):
        if any(frame.f_code.co_name == "upload" for frame, _ in traceback.walk_stack(None)):  # from pinned memory
            if mode is not None:
                mode.uploads += 1
        else:
            waits[f"{name} between host and device"] += 1
    near = function(*tree_map(_near, args), **tree_map(_near, kwargs))
    if not target or near is None:
        return near
    for tensor in given:
        if near is _near(tensor):  # changed in place
            return tensor
    made = tree_map(_on_device, near)
    return return_and_correct_aliasing(function, args, kwargs, made) if there else made


def _has_mask(args):
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))


@contextmanager
def accelerator(monkeypatch):
    """An `Accelerator` that `nnclr` takes for a device called `NAME`."""
    fused = torch_optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused, NAME])
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "autocast", lambda on, *rest, **k: nullcontext() if on == NAME else autocast(on, *rest, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *on: on != (NAME,) and is_enabled(*on))
    tensor = torch.tensor  # which asks no mode
    monkeypatch.setattr(
        torch, "tensor", lambda *a, device=None, **k: tensor(*a, **k).to(device or torch.get_default_device())
    )
    choose = nnclr.device.choose_device
    for module in [m for name, m in sys.modules.items() if name.startswith("nnclr.") and hasattr(m, "choose_device")]:
        monkeypatch.setattr(module, "choose_device", lambda name: name if name == NAME else choose(name))
    monkeypatch.setitem(loader._RESIDENT_BYTES, NAME, loader._RESIDENT_BYTES["cuda"])
    monkeypatch.setitem(loader._AHEAD, NAME, loader._AHEAD["cuda"])
    # Parameters are replaced when a module is moved: those given other data would keep the tensor inside.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Accelerator() as mode:
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
