"""`nnclr pretrain --dry-run`: what a run would be, and two real steps of it, before days are spent on it."""

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnclr.data.images import Source
from nnclr.models.blocks import repeated_blocks
from nnclr.models.ema import averaged_features
from nnclr.progress import duration
from nnclr.run_folder import Run
from nnclr.train_state import TrainState

_CPU_FLOPS = 50e9  # a second; what a few cores reach, to guess how long two steps take
_LONGEST = 60.0  # seconds that two steps of a smaller batch may take by that guess
_MEMINFO = Path("/proc/meminfo")


def dry_run(
    config: Any, source: Source, test: Source | None, state: TrainState, sizes: list[int], train: Callable[..., Run]
) -> Iterator[str]:
    """Describe a run, then try two steps of it in a temporary folder.

    Args:
        config: resolved.
        source: the images.
        test: images of the online kNN, only to find mistakes in them.
        state: at step 0, on the device.
        sizes: pixels of each view.
        train: the training loop.

    Yields:
        The description, some lines of text; then what the two steps gave.
    """
    batch, steps = config.batch_size, len(source) // config.batch_size
    epochs = config.epochs + config.extend_epochs
    total = round(epochs * steps)
    flops, plain, recomputed, width, dim = measure(state, sizes)
    activations = recomputed if config.recompute and recomputed is not None else plain
    fixed = fixed_memory(state)
    views = batch * sum(12 * size**2 for size in sizes)  # bytes of the pixels, which stay where activations do not
    kept = min(batch, config.grad_cache or batch)  # images whose activations are held at a time
    fixed += 0 if kept == batch else views
    needed, free = fixed + kept * activations, free_memory(torch.device(config.device))
    heads = sum(p.numel() for p in state.objective.parameters())
    lines = [
        f"{source.name}: {len(source)} images, {steps} steps an epoch, {total} steps",
        f"views     {' + '.join(f'({batch}, 3, {size}, {size})' for size in sizes)}",
        f"features  ({batch}, {width}) a view, embeddings ({batch}, {dim})",
        f"model     {config.backbone} {sum(p.numel() for p in state.backbone.parameters()) / 1e6:.1f} M parameters, "
        f"{config.objective} heads {heads / 1e6:.1f} M",
        f"compute   {flops / 1e9:.2f} GFLOP an image and step, {flops * batch * total / 1e18:.3g} EFLOP in all",
        f"memory    about {needed / 2**30:.1f} GiB ({fixed / 2**30:.1f} fixed, "
        f"{activations / 2**20:.1f} MiB an image), {free / 2**30:.1f} GiB free",
    ]
    if config.fsdp:
        divided = fixed_memory(state, heads=False)
        lines[-1] += f"; under torchrun --fsdp divides {divided / 2**30:.1f} of the fixed among the processes"
    yield "\n".join(lines)
    tried = batch
    if needed > 0.9 * free:
        speed = _CPU_FLOPS if config.device == "cpu" else float("inf")
        tried = smaller_batch(batch, 0.5 * free - fixed, activations, _LONGEST * speed / (2 * flops))
        if tried == 0:
            yield "two steps were not tried: not even 2 images may fit; use another --device or a smaller network"
            return
    try:
        losses, rate = two_steps(dataclasses.replace(config, batch_size=tried), source, test, train)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        yield f"two steps failed: memory ran out at batch {tried}; use a smaller --batch-size or another --device"
        return
    at, estimate = ("", "") if tried == batch else (f" at batch {tried}", f"; an estimate from batch {tried}")
    if tried < batch:
        with_recompute = float("inf") if recomputed is None or config.recompute else fixed + kept * recomputed
        recompute = with_recompute <= 0.9 * free and f"--recompute ({with_recompute / 2**30:.1f} GiB)"
        parts = fitting_parts(batch, 0.9 * free - fixed - views, activations)
        parts = 0 if config.grad_cache or config.fsdp else parts
        ways = [way for way in (recompute, parts and f"--grad-cache {parts}") if way]
        same = f"{' or '.join(ways)} for the same loss in less memory, " if ways else ""
        yield f"batch {batch} may not fit into this memory; use {same}a smaller --batch-size or another --device"
    yield f"two steps losses {losses[0]:.3f} and {losses[1]:.3f}, {rate:.0f} images/s{at}"
    yield f"time      about {duration(total * batch / rate)} for {epochs:g} epochs, without evaluations{estimate}"


def two_steps(config: Any, source: Source, test: Source | None, train: Callable[..., Run]) -> tuple[list[float], float]:
    """Losses of two steps, and images a second of the second one (the first also starts things up)."""
    with tempfile.TemporaryDirectory() as folder:
        short = {
            "log_to": (),
            "out": str(Path(folder) / "run"),
            "epochs": 2 / (len(source) // config.batch_size),
            "extend_epochs": 0.0,
            "log_every_steps": 1,
            "evaluate_every_epochs": 0.0,
        }
        run = train(dataclasses.replace(config, **short), source, test, quiet=True)
        return [line["loss"] for line in run.metrics], run.metrics[-1]["images_per_second"]


def smaller_batch(batch: int, budget: float, activations: float, most: float) -> int:
    """The largest power of two below the batch whose activations fit the budget; 0 where 2 images do not.

    Args:
        batch: images of a step of the run.
        budget: bytes.
        activations: bytes an image.
        most: images that a step may have for its time; 2 are always tried.
    """
    if batch <= 2 or 2 * activations > budget:
        return 0
    tried = 2
    while 2 * tried < batch and 2 * tried * activations <= budget and 2 * tried <= most:
        tried *= 2
    return tried


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


class Measured(NamedTuple):
    """What an image costs in a training step, and the widths on the way."""

    flops: float
    activations: float  # bytes kept for the backward, in float32
    recomputed: float | None  # the same with `recompute`; None where the backbone has no repeated blocks
    width: int  # of the features
    dim: int  # of the embeddings


def measure(state: TrainState, sizes: list[int], images: int = 4) -> Measured:
    """Count a training step of some images of noise.

    The backward pass is run and counted, so that work without gradient (averaged networks, the look-up) counts once.
    """
    device = next(state.backbone.parameters()).device
    modules = [module for module in (state.backbone, state.objective, state.average) if module is not None]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    kept = _Kept({p.untyped_storage().data_ptr() for module in modules for p in module.parameters()})
    with FlopCounterMode(display=False) as counter, kept.by_blocks(repeated_blocks(state.backbone)):
        views = [torch.rand(images, 3, size, size, device=device) for size in sizes]
        features = [state.backbone(view) for view in views]
        targets = None if state.average is None else averaged_features(state.average, views)
        out = state.objective(features, targets, torch.zeros(images, dtype=torch.int64, device=device))
        out.loss.backward()
    for module, values in zip(modules, before, strict=True):  # the batch norms have seen this noise
        module.load_state_dict(values)
        module.zero_grad()
    recomputed = kept.with_inputs_alone()
    return Measured(
        counter.get_total_flops() / images,
        kept.all() / images,
        None if recomputed is None else recomputed / images,
        features[0].shape[1],
        out.embeddings[0].shape[1],
    )


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
    """Bytes that are free on the device; on Linux with what the kernel would give back from its caches."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
        if available is not None:
            return float(available[1]) * 1024
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)
