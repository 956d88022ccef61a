"""`nnclr pretrain --dry-run`: what a run would be, and two real steps of it, before days are spent on it."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nnclr import memory
from nnclr.data.images import Source
from nnclr.progress import duration
from nnclr.run_folder import Run
from nnclr.train_state import TrainState

_CPU_FLOPS = 50e9  # a second; what a few cores reach, to guess how long two steps take
_LONGEST = 60.0  # seconds that two steps of a smaller batch may take by that guess


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
    measured = memory.measure(state, sizes)
    need, flops = memory.need_of(config, state, sizes, measured), measured.flops
    heads = sum(p.numel() for p in state.objective.parameters())
    lines = [
        f"{source.name}: {len(source)} images, {steps} steps an epoch, {total} steps",
        f"views     {' + '.join(f'({batch}, 3, {size}, {size})' for size in sizes)}",
        f"features  ({batch}, {measured.width}) a view, embeddings ({batch}, {measured.dim})",
        f"model     {config.backbone} {sum(p.numel() for p in state.backbone.parameters()) / 1e6:.1f} M parameters, "
        f"{config.objective} heads {heads / 1e6:.1f} M",
        f"compute   {flops / 1e9:.2f} GFLOP an image and step, {flops * batch * total / 1e18:.3g} EFLOP in all",
        f"memory    about {need.total / 2**30:.1f} GiB ({need.fixed / 2**30:.1f} fixed, "
        f"{need.activations / 2**20:.1f} MiB an image), {need.free / 2**30:.1f} GiB free",
    ]
    if config.fsdp:
        divided = memory.fixed_memory(state, heads=False)
        lines[-1] += f"; under torchrun --fsdp divides {divided / 2**30:.1f} of the fixed among the processes"
    yield "\n".join(lines)
    tried = batch
    if not need.fits:
        speed = _CPU_FLOPS if config.device == "cpu" else float("inf")
        tried = smaller_batch(batch, 0.5 * need.free - need.fixed, need.activations, _LONGEST * speed / (2 * flops))
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
        yield f"batch {batch} may not fit into this memory; {need.advice}"
    yield f"two steps losses {losses[0]:.3f} and {losses[1]:.3f}, {rate:.0f} images/s{at}"
    passes = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    yield f"time      about {duration(total * batch / rate)} for {passes}, without evaluations{estimate}"


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


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)
