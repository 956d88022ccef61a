"""`nnclr pretrain --dry-run`: what a run would be, and two real steps of it, before days are spent on it."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnclr.checkpoint import TrainState
from nnclr.data.images import Source
from nnclr.progress import duration
from nnclr.run_folder import Run


def dry_run(config: Any, source: Source, state: TrainState, sizes: list[int], train: Callable[..., Run]) -> str:
    """Describe a run and try two steps of it in a temporary folder.

    Args:
        config: resolved.
        source: the images.
        state: at step 0, on the device.
        sizes: pixels of each view.
        train: the training loop.

    Returns:
        The description, some lines of text.
    """
    batch, steps = config.batch_size, len(source) // config.batch_size
    total = round(config.epochs * steps)
    flops, activations, width, dim = measure(state, sizes)
    fixed = 4 * sum(t.nbytes for t in state.backbone.parameters()) + 4 * sum(
        t.nbytes for t in state.objective.parameters()
    )  # weights, gradients and at most two moments of the optimiser
    fixed += sum(t.nbytes for t in state.objective.state_dict().values())
    needed, free = fixed + batch * activations, free_memory(torch.device(config.device))
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
    if needed > 0.9 * free:
        lines.append("two steps were not tried: they may not fit; use a smaller --batch-size or another --device")
        return "\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        short = {"out": str(Path(folder) / "run"), "epochs": 2 / steps, "extend_epochs": 0.0, "log_every_steps": 1}
        run = train(dataclasses.replace(config, **short, evaluate_every_epochs=0.0), source, quiet=True)
        losses = [line["loss"] for line in run.metrics]
        rate = run.metrics[-1]["images_per_second"]  # the first step also starts things up
    lines.append(f"two steps losses {losses[0]:.3f} and {losses[1]:.3f}, {rate:.0f} images/s")
    lines.append(f"time      about {duration(total * batch / rate)} for {config.epochs:g} epochs, without evaluations")
    return "\n".join(lines)


def measure(state: TrainState, sizes: list[int], images: int = 4) -> tuple[float, float, int, int]:
    """FLOPs of a training step and bytes kept for its backward pass, both an image, in float32; widths.

    The backward pass is counted as twice the forward (a product for each of the two gradients).

    Returns:
        FLOPs, bytes, width of the features, width of the embeddings.
    """
    device = next(state.backbone.parameters()).device
    buffers = {name: value.clone() for name, value in state.backbone.state_dict().items()}
    heads = {name: value.clone() for name, value in state.objective.state_dict().items()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {
        p.untyped_storage().data_ptr() for module in (state.backbone, state.objective) for p in module.parameters()
    }
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        views = [torch.rand(images, 3, size, size, device=device) for size in sizes]
        features = [state.backbone(view) for view in views]
        targets = None if state.average is None else [feature.detach() for feature in features[:2]]
        out = state.objective(features, targets, torch.zeros(images, dtype=torch.int64, device=device))
    flops = 3 * counter.get_total_flops() / images
    width, dim = features[0].shape[1], out.embeddings[0].shape[1]
    state.backbone.load_state_dict(buffers)  # the batch norms have seen this noise
    state.objective.load_state_dict(heads)
    activations = sum(size for pointer, size in kept.items() if pointer not in weights) / images
    return flops, activations, width, dim


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
