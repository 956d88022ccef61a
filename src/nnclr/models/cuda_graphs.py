"""Forward and backward of a small network as two CUDA graphs, where launching its kernels takes longer than they do."""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import torch
from torch import Tensor, nn

from nnclr.errors import NNCLRError, first_line
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


def in_few_launches(
    network: AllViews, sizes: list[int], images: int, dtype: torch.dtype = torch.float32
) -> tuple[AllViews, str]:
    """The same as CUDA graphs (`torch.cuda.make_graphed_callables`), where those are faster.

    Graphs replay the very kernels that were launched before, so that results stay the same bit for bit. Whether they
    do, and whether it is faster here, is tried on noise; afterwards weights, buffers, gradients and random numbers are
    as before. Nothing else may use the device meanwhile. With NNCLR_CUDA_GRAPHS=0 in the environment nothing is tried.

    Args:
        network: in training mode. What its forward does besides launching kernels, such as drawing random numbers
            in Python, a graph would not do again.
        sizes: pixels of each view.
        images: n, of every step.
        dtype: of the views.

    Returns:
        The network itself, or its graphs, which share its weights and buffers and take views of these shapes alone
        (channels_last), one forward and one backward at a time; and what to say of it, if anything.

    Raises:
        NNCLRError: if a capture failed and left the device in a state in which no run can go on.
    """
    device = next(network.parameters()).device
    if device.type != _DEVICE or os.environ.get("NNCLR_CUDA_GRAPHS") == "0":
        return network, ""
    try:
        with _as_now(device):
            return _faster(network, *(_noise(sizes, images, dtype, seed, device) for seed in (0, 1)))
    except Exception as error:  # noqa: BLE001  (what is only tried ends no run)
        _require_usable(device, error)
        return network, f"launched kernel by kernel, since CUDA graphs cannot be had: {first_line(error)}"
    finally:
        _drop_what_is_unused()  # what was only tried makes room for the run


@contextmanager
def _as_now(device: torch.device) -> Iterator[None]:
    """Random numbers go on as if nothing had been drawn, and kernels on the current stream, on the network's device."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if device.type == "cuda":  # a failed capture may leave its own stream behind
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.current_stream(device)))
        yield


def _require_usable(device: torch.device, error: Exception) -> None:
    """What torch up to 2.11 does not always put back: the generator of a capture that failed."""
    try:
        with _as_now(device):
            torch.rand(1, device=device)
    except RuntimeError:
        raise NNCLRError(
            f"a CUDA graph could not be captured ({first_line(error)}), and the device cannot be used after that: run "
            "the same command again with NNCLR_CUDA_GRAPHS=0 in the environment"
        ) from error


def _drop_what_is_unused() -> None:
    """Graphs lie in cycles of references: one that is collected during a later capture would end that one."""
    gc.collect()
    torch.cuda.empty_cache()


def _noise(sizes: list[int], images: int, dtype: torch.dtype, seed: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator(device).manual_seed(seed)
    views = [torch.randn(images, 3, size, size, generator=draw, device=device) for size in sizes]
    return [view.to(dtype, memory_format=torch.channels_last) for view in views]


def _faster(network: AllViews, views: list[Tensor], others: list[Tensor]) -> tuple[AllViews, str]:
    with buffers_as_now(network):
        plain = _seconds(lambda: _step(network, others))
        if _seconds(lambda: _step(network, [view[:_FEW] for view in others])) < _LAUNCHING * plain:
            return network, ""
        with _refusing_to_wait():  # a forward that waits cannot be captured, and trying would leave things behind
            _step(network, others)
        _drop_what_is_unused()
        graphs = _Graphs(network, views)
    with _other_weights(network):  # a graph must not keep anything that was computed from the ones it was captured with
        first, *more = (_results(of, others) for of in (network, network, network, graphs))
    *again, gap = (_differences(first, those) for those in more)
    if not (gap <= _NOISE * torch.stack(again).amax(dim=0)).all():
        return network, f"launched kernel by kernel, since CUDA graphs differ from it by {gap.max().item():.1e}"
    with buffers_as_now(network):
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


@contextmanager
def _other_weights(network: AllViews) -> Iterator[None]:
    weights = [p.detach() for p in network.parameters()]
    kept = [weight.clone() for weight in weights]
    torch._foreach_mul_(weights, 1 + 2**-4)
    try:
        yield
    finally:
        torch._foreach_copy_(weights, kept)


def _differences(these: list[Tensor], those: list[Tensor]) -> Tensor:
    """The relative distance of each two tensors, float64; NaN where there are numbers that are not finite."""
    pairs = ((a.double(), b.double()) for a, b in zip(these, those, strict=True))
    return torch.stack([(a - b).norm() / a.norm().clamp(min=1e-30) for a, b in pairs])


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raises a RuntimeError where something waits for the device."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


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
