"""Forward and backward of a small network as two CUDA graphs, where launching its kernels takes longer than they do."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from torch import Tensor, nn

from nnclr.errors import first_line
from nnclr.models.recompute import buffers_as_now

_DEVICE = "cuda"
_FEW = 2  # images of a step whose kernels take no time to speak of, so that it takes as long as launching them
_LAUNCHING = 0.7  # share of a whole step's time from which launching it may be what takes long
_NOISE = 4.0  # times what two plain steps differ by, for kernels that add in no fixed order; else nothing may differ
_REPEATS = 5


class AllViews(nn.Module):
    """The backbone on every view of a step.

    Args:
        backbone: maps (n, 3, s, s) to (n, d).
        bf16: compute in bfloat16 where that is safe.
    """

    def __init__(self, backbone: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.backbone, self.bf16 = backbone, bf16

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Features (n, d) of each view (n, 3, s, s)."""
        # A context of its own: weights are cast once for all views, and the casts belong to the graph.
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.bf16):
            return tuple(self.backbone(view) for view in views)


class _Graphs(AllViews):
    """The same, captured: what it gives lies where the next step writes, so it is copied."""

    def __init__(self, network: AllViews, views: list[Tensor]) -> None:
        super().__init__(network.backbone, network.bf16)
        self.captured = AllViews(network.backbone, network.bf16)  # of its own, since its forward is replaced
        torch.cuda.make_graphed_callables(self.captured, tuple(views), allow_unused_input=True)
        # Weights belong to the capture's stream and the loop runs in another; each waits for the other, as torch warns.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        return tuple(features.clone() for features in self.captured(*views))


def in_few_launches(network: AllViews, sizes: list[int], images: int) -> tuple[AllViews, str]:
    """The same as CUDA graphs (`torch.cuda.make_graphed_callables`), where those are faster.

    Graphs replay the very kernels that were launched before, so that results stay the same bit for bit. Whether they
    do, and whether it is faster here, is tried on noise; afterwards weights, buffers, gradients and random numbers are
    as before. Nothing else may use the device meanwhile.

    Args:
        network: in training mode. What its forward does besides launching kernels, such as drawing random numbers
            in Python, a graph would not do again.
        sizes: pixels of each view.
        images: n, of every step.

    Returns:
        The network itself, or its graphs, which share its weights and buffers and take views of these shapes alone
        (float32, channels_last), one forward and one backward at a time; and what to say of it, if anything.
    """
    device = next(network.parameters()).device
    if device.type != _DEVICE:
        return network, ""
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), _current(devices), buffers_as_now(network):
            return _faster(network, *(_noise(sizes, images, seed, device) for seed in (0, 1)))
    except (RuntimeError, ValueError) as error:  # also where the memory does not hold both
        return network, f"launched kernel by kernel, since CUDA graphs cannot be had: {first_line(error)}"
    finally:
        torch.cuda.empty_cache()  # what was only tried makes room for the run


def _current(devices: list[torch.device]) -> AbstractContextManager[object]:
    """Captures are made on the current device, which need not be that of the network."""
    return torch.cuda.device(devices[0]) if devices else nullcontext()


def _noise(sizes: list[int], images: int, seed: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(seed)
    views = [torch.randn(images, 3, size, size, generator=draw, device=device) for size in sizes]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def _faster(network: AllViews, views: list[Tensor], others: list[Tensor]) -> tuple[AllViews, str]:
    plain = _seconds(lambda: _step(network, others))
    if _seconds(lambda: _step(network, [view[:_FEW] for view in others])) < _LAUNCHING * plain:
        return network, ""
    graphs = _Graphs(network, views)
    first, again, replayed = (_results(of, others) for of in (network, network, graphs))
    if not (gap := _difference(first, replayed)) <= _NOISE * _difference(first, again):
        return network, f"launched kernel by kernel, since CUDA graphs differ from it by {gap:.1e}"
    graphed = _seconds(lambda: _step(graphs, others))
    if graphed >= plain:
        return network, ""
    return graphs, f"CUDA graphs of the backbone: {1e3 * graphed:.2f} ms instead of {1e3 * plain:.2f} a step"


def _step(network: AllViews, views: list[Tensor]) -> tuple[Tensor, ...]:
    """The features of all views, and the gradient of each weight."""
    weights = [p for p in network.parameters() if p.requires_grad]
    features = network(*views)
    towards = [torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype) for out in features]
    return (*features, *torch.autograd.grad(features, weights, towards, materialize_grads=True))


def _results(network: AllViews, views: list[Tensor]) -> list[Tensor]:
    """What a step gives and what it moves, from the same buffers and random numbers every time."""
    with buffers_as_now(network):
        torch.manual_seed(0)
        given = _step(network, views)
        return [value.detach().clone() for value in (*given, *network.buffers())]


def _difference(these: list[Tensor], those: list[Tensor]) -> float:
    """The largest of the relative distances between tensors; NaN where there are numbers that are not finite."""
    apart = [
        (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30) for a, b in zip(these, those, strict=True)
    ]
    return torch.stack(apart).max().item()


def _seconds(call: Callable[[], object]) -> float:
    """Of a call until the device has done it: the median of some, after one that warms up."""
    call()
    taken = []
    for _ in range(_REPEATS):
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        taken.append(time.perf_counter() - began)
    return median(taken)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
