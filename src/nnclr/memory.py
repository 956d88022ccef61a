"""What a training step needs of the memory, counted on a few images of noise, and what is free."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnclr.models.blocks import repeated_blocks
from nnclr.models.ema import averaged_features
from nnclr.train_state import TrainState

_MEMINFO, _GROUPS, _LIMITS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FULL = 0.9  # share of the free memory that a step may take, as estimates are rough
_GREEDY = 64 << 10  # bytes of activations that a pixel of a view costs in no usual network
_MORE = 2  # images by which a step is made larger, to see by what it grows
_BATCHES = 3  # of views that a CPU's loader holds at once: the one in use, a made one, and the one in the making


class Need(NamedTuple):
    """What a step needs, in bytes, and what there is."""

    fixed: float  # whatever the batch
    activations: float  # of an image, counted in float32
    total: float
    free: float
    advice: str  # what to do where it does not fit

    @property
    def fits(self) -> bool:
        """Whether it may be tried."""
        return self.total <= _FULL * self.free


def shortage(config: Any, state: TrainState, sizes: list[int]) -> str | None:
    """What to say before a run that may not fit into the memory of this machine; None where it fits.

    On a CPU the system ends such a process without a word, while a GPU's allocator says what is missing. The step
    that is tried for it takes some images of the batch, and none where the least frugal network would fit. A network or
    an objective that cannot be tried so is left alone: the run itself says what is wrong with it, if anything is.

    Args:
        config: resolved.
        state: on the CPU; afterwards as before.
        sizes: pixels of each view.
    """
    device = torch.device(config.device)
    if device.type != "cpu":
        return None
    most = fixed_memory(state) + config.batch_size * sum(size**2 for size in sizes) * _GREEDY
    if most < _FULL * free_memory(device):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            measured = measure(state, sizes)
    except Exception:  # noqa: BLE001  (objectives of others may need more images, networks may do anything)
        return None
    need = need_of(config, state, sizes, measured, held=held_memory(state))
    if need.fits:
        return None
    return (
        f"a step of {config.batch_size} images may need {need.total / 2**30:.1f} GiB of memory and "
        f"{need.free / 2**30:.1f} GiB are free: the system may end this process without a word; {need.advice}"
    )


def need_of(config: Any, state: TrainState, sizes: list[int], measured: "Measured", held: float = 0.0) -> Need:
    """What a step of the batch needs, from what was measured on some images.

    Args:
        config: resolved.
        state: whose networks and moments count.
        sizes: pixels of each view.
        measured: of the same state and sizes.
        held: bytes of what is needed that are no longer free, because the state that is to be trained has them.
    """
    device = torch.device(config.device)
    batch, free = config.batch_size, free_memory(device) + held
    plain, recomputed = measured.activations, measured.recomputed
    activations = recomputed if config.recompute and recomputed is not None else plain
    views = batch * sum(12 * size**2 for size in sizes)  # bytes of the pixels, which stay where activations do not
    kept = min(batch, config.grad_cache or batch)  # images whose activations are held at a time
    fixed = fixed_memory(state) + (0 if kept == batch else views) + (_BATCHES * views if device.type == "cpu" else 0)
    with_recompute = float("inf") if recomputed is None or config.recompute else fixed + kept * recomputed
    recompute = with_recompute <= _FULL * free and f"--recompute ({with_recompute / 2**30:.1f} GiB)"
    parts = 0 if config.grad_cache or config.fsdp else fitting_parts(batch, _FULL * free - fixed - views, activations)
    ways = [way for way in (recompute, parts and f"--grad-cache {parts}") if way]
    same = f"{' or '.join(ways)} for the same loss in less memory, " if ways else ""
    advice = f"use {same}a smaller --batch-size or another --device"
    return Need(fixed, activations, fixed + kept * activations, free, advice)


def fitting_parts(batch: int, budget: float, activations: float) -> int:
    """The largest power of two below the batch that `grad_cache` may be within a budget of bytes; 0 for none."""
    parts = 1
    while 2 * parts < batch and 2 * parts * activations <= budget:
        parts *= 2
    return parts if activations <= budget else 0


def fixed_memory(state: TrainState, heads: bool = True) -> int:
    """Bytes of weights, buffers and averages, and of gradients and at most two moments of the optimiser."""
    networks = (state.backbone, state.objective if heads else None, state.average)
    modules = [module for module in networks if module is not None]
    held: int = sum(t.nbytes for module in modules for t in module.state_dict().values())
    trained: int = sum(p.nbytes for module in modules for p in module.parameters() if p.requires_grad)
    return held + 3 * trained


def held_memory(state: TrainState) -> int:
    """Bytes of `fixed_memory` that exist by now: after a step, or in a run that goes on, also the moments."""
    modules = [module for module in (state.backbone, state.objective, state.average) if module is not None]
    held: int = sum(t.nbytes for module in modules for t in module.state_dict().values())
    return held + sum(t.nbytes for moments in state.optimizer.state.values() for t in moments.values() if is_tensor(t))


class Measured(NamedTuple):
    """What an image costs in a training step, and the widths on the way."""

    flops: float
    activations: float  # bytes kept for the backward, in float32, by which a step grows with an image more
    recomputed: float | None  # the same with `recompute`; None where the backbone has no repeated blocks
    width: int  # of the features
    dim: int  # of the embeddings


def measure(state: TrainState, sizes: list[int], images: int = 4) -> Measured:
    """Count a training step of some images of noise, and what one of a few more keeps; the state is then as before.

    The backward pass is run and counted, so that work without gradient (averaged networks, the look-up) counts once.
    """
    modules = [module for module in (state.backbone, state.objective, state.average) if module is not None]
    # All buffers, also those that no checkpoint holds: the batch norms see this noise.
    before = [(module, name, value.clone()) for module in modules for name, value in module.named_buffers()]
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    try:
        fewer, flops, width, dim = _step(state, sizes, images, weights)
        more, *_ = _step(state, sizes, images + _MORE, weights, backward=False)
    finally:
        with torch.no_grad():
            for module, name, value in before:
                module.get_buffer(name).copy_(value)
        for module in modules:
            module.zero_grad()
    # What a step keeps whatever the batch, such as a queue, is none of an image's.
    few, many = fewer.with_inputs_alone(), more.with_inputs_alone()
    return Measured(
        flops / images,
        (more.all() - fewer.all()) / _MORE,
        None if few is None or many is None else (many - few) / _MORE,
        width,
        dim,
    )


def _step(
    state: TrainState, sizes: list[int], images: int, weights: set[int], backward: bool = True
) -> tuple["_Kept", float, int, int]:
    """What a step of some images keeps, its operations, and the widths on the way."""
    device = next((p.device for p in state.backbone.parameters()), torch.device("cpu"))
    kept = _Kept(weights)
    with FlopCounterMode(display=False) as counter, kept.by_blocks(repeated_blocks(state.backbone)):
        views = [torch.rand(images, 3, size, size, device=device) for size in sizes]
        features = [state.backbone(view) for view in views]
        targets = None if state.average is None else averaged_features(state.average, views)
        out = state.objective(features, targets, torch.zeros(images, dtype=torch.int64, device=device))
        if backward:
            out.loss.backward()
    return kept, counter.get_total_flops(), features[0].shape[1], out.embeddings[0].shape[1]


class _Kept:
    """Sizes of the storages that autograd keeps for the backward, by the block in whose forward it keeps them.

    Args:
        weights: addresses of storages that do not count.
    """

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.outside = weights, dict[int, int]()
        self.inputs, self.calls = dict[int, int](), list[dict[int, int]]()  # a block is called for every view

    @contextmanager
    def by_blocks(self, blocks: list[nn.Module]) -> Iterator[None]:
        now = [self.outside]

        def note(found: dict[int, int], tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        def enter(_: nn.Module, inputs: Any) -> None:
            for value in inputs:
                if isinstance(value, Tensor):
                    note(self.inputs, value)
            now.append({})
            self.calls.append(now[-1])

        def leave(*_: Any) -> None:
            now.pop()

        hooks = [block.register_forward_pre_hook(enter) for block in blocks]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: note(now[-1], tensor), lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def all(self) -> int:
        """Bytes of a step that keeps everything."""
        together = dict(self.outside)
        for call in self.calls:
            together |= call
        return sum(together.values())

    def with_inputs_alone(self) -> int | None:
        """Bytes of one that keeps the inputs of blocks, and in the backward what one of them needs at a time."""
        if not self.calls:
            return None
        always = self.outside | self.inputs
        return sum(always.values()) + max(
            sum(size for pointer, size in call.items() if pointer not in always) for call in self.calls
        )


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device; on Linux with what the kernel would give back from its caches.

    Limits on the process's control groups count, since a process that grows beyond one is killed. Infinity where the
    system does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
        if available is not None:
            return min(float(available[1]) * 1024, _left_by_limits())
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # macOS knows the second alone
        if pages in getattr(os, "sysconf_names", ()):
            return float(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def _left_by_limits() -> float:
    """What the limits on this process's control groups leave: those of a container or of a batch system."""
    left = float("inf")
    for line in _GROUPS.read_text().splitlines() if _GROUPS.exists() else ():
        if line.count(":") < 2:
            continue
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            root, *files = _LIMITS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, *files = _LIMITS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inner = Path(group.lstrip("/"))  # in a container this may be the path outside it, and only the root is there
        for folder in {root / inner, *(root / parent for parent in inner.parents)}:
            with suppress(OSError, ValueError):  # not there, without a limit, for others' eyes
                left = min(left, _left_in(folder, *files))
    return max(left, 0.0)


def _left_in(folder: Path, most: str, used: str, cache: str) -> float:
    left = float((folder / most).read_text()) - float((folder / used).read_text())  # "max" is no number
    stat = folder / "memory.stat"
    cached = re.search(rf"^{cache} (\d+)", stat.read_text(), re.MULTILINE) if stat.exists() else None
    return left + (0.0 if cached is None else float(cached[1]))
