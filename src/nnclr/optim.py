"""Optimisers, parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from nnclr.distributed import is_shared_out, local

OPTIMIZERS = ("lars", "sgd", "adamw")


def learning_rate(step: int, *, peak: float, warmup_steps: float, total_steps: int) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine to 0; a pure function of the step.

    Args:
        step: 0-based number of the optimiser step that is about to be taken.
        peak: learning rate at the end of the warm-up.
        warmup_steps: length of the warm-up; step s of it uses (s + 1) / warmup_steps of the peak.
        total_steps: length of the whole run.
    """
    if step < warmup_steps:
        return peak * min((step + 1) / warmup_steps, 1.0)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * peak * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and filters, and the rest.

    Biases and the parameters of normalisation layers (everything of fewer than two dimensions) take
    neither weight decay nor LARS scaling (NNCLR, section 4.1; BYOL, appendix C). What is shared out over ranks is in
    groups of its own, since one launch cannot take both; it must come first, so that the order stays the same.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "trust_coefficient": None},
    ]
    if not any(map(is_shared_out, parameters)):
        return groups
    return [
        group | {"params": [p for p in group["params"] if is_shared_out(p) == shared]}
        for group in groups
        for shared in (True, False)
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling in the form of BYOL and NNCLR (You et al., 2017).

    For each parameter w with gradient g, u = g + weight_decay * w, scaled by
    trust_coefficient * ||w|| / ||u|| (by 1 where either norm is 0); then the momentum buffer becomes
    momentum * buffer + u and w moves by -lr * buffer. The learning rate is not inside the buffer. timm's
    `Lars` divides by ||g|| + weight_decay * ||w|| instead, which is another optimiser.

    A group with `trust_coefficient=None` is plain SGD with momentum; `parameter_groups` makes such a one
    for biases and normalisation layers.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: L2 coefficient.
        trust_coefficient: eta.

    Attributes:
        found_inf: None, or a 0-dim float tensor on the device, as torch's fused optimisers know it: where it is
            not 0, a step leaves weights and momentum as they are, to the bit.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float | None = 1e-3,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr={lr} and weight_decay={weight_decay} must be >= 0, momentum={momentum} in [0, 1)")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient; never waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for device in {parameter.device for parameter in group["params"]}:
                parameters = [p for p in group["params"] if p.grad is not None and p.device == device]
                if parameters:
                    self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        buffers = [_momentum_buffer(self.state[parameter], parameter) for parameter in parameters]
        gradients = [_laid_out_as(b, p.grad) for b, p in zip(buffers, parameters, strict=True) if p.grad is not None]
        weights = [_laid_out_as(b, p) for b, p in zip(buffers, parameters, strict=True)]
        own, on_cpu = parameters + buffers, parameters[0].device.type == "cpu"
        if on_cpu and any(p.dtype.itemsize < 4 for p in parameters):  # torch 2.10 would move their buffers alone
            weights, gradients, buffers = (
                [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in of]
                for of in (weights, gradients, buffers)
            )
        # The kernels skip where it is 1 and nowhere else.
        found_inf = None if self.found_inf is None else (self.found_inf != 0).float()
        move = partial(_move, found_inf=found_inf, momentum=group["momentum"], lr=group["lr"])
        decay, trust = group["weight_decay"], group["trust_coefficient"]
        if trust is None:
            move(weights, gradients, buffers, weight_decay=decay)
        elif on_cpu:
            _move_one_by_one(move, weights, gradients, buffers, decay, trust)
        else:
            _move_together(move, weights, gradients, buffers, decay, trust)
        for tensor, moved in zip(own, weights + buffers, strict=True):
            if moved is not tensor:
                tensor.copy_(moved)


def _momentum_buffer(state: dict[str, Any], parameter: Tensor) -> Tensor:
    """The buffer in the state of a parameter, with the parameter's strides if those have no gaps."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    elif state["momentum_buffer"].stride() != parameter.stride():  # loaded, or the model was made channels-last since
        state["momentum_buffer"] = _laid_out_as(torch.empty_like(parameter), state["momentum_buffer"])
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _laid_out_as(other: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself or a copy with the strides of the other one.

    Fused kernels go through memory and not through indices: on a CPU they pair the wrong elements of tensors with
    different strides without a word, on CUDA they refuse them.
    """
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other).copy_(tensor)


_sgd: Callable[..., None] = partial(sgd, fused=True)
# The kernel below it, where it is to be had: for one tensor at a time the way there is 5 % of the whole step.
_sgd_of_one: Callable[..., None] = (
    partial(torch._fused_sgd_, is_first_step=False) if hasattr(torch, "_fused_sgd_") else _sgd
)


def _move(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    momentum: float,
    lr: float,
    found_inf: Tensor | None,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    kernel: Callable[..., None] = _sgd,
) -> None:
    """b = momentum * b + scale * (g + weight_decay * w); w -= lr * b: each number is read and written once."""
    kernel(
        weights,
        gradients,
        buffers if momentum else [],
        found_inf=found_inf,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr if momentum else lr * scale,  # without momentum there is no dampening either
        dampening=1 - scale,
        nesterov=False,
        maximize=False,
    )


def _move_one_by_one(
    move: Callable[..., None],
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    decay: float,
    trust: float,
) -> None:
    """LARS on a CPU: a tensor's norms and its update come next to each other, while it is in the cache."""
    for w, g, b in zip(weights, gradients, buffers, strict=True):
        move([w], [g], [b], weight_decay=decay, scale=_trust_ratio(w, g, decay, trust), kernel=_sgd_of_one)


def _trust_ratio(w: Tensor, g: Tensor, decay: float, trust: float) -> float:
    """trust * ||w|| / ||g + decay * w||, the latter from three products, so that the sum is not written to memory."""
    w, g = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in (w, g))
    ww, wg, gg = torch.dot(w, w).item(), torch.dot(w, g).item(), torch.dot(g, g).item()
    uu = gg + 2 * decay * wg + decay**2 * ww
    if uu < 0.25 * (math.sqrt(gg) + decay * math.sqrt(ww)) ** 2:  # they cancel, and with them the leading digits
        uu = torch.linalg.vector_norm(g.add(w, alpha=decay)).item() ** 2
    return trust * math.sqrt(ww / uu) if ww > 0 and uu > 0 else 1.0


def _move_together(
    move: Callable[..., None],
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    decay: float,
    trust: float,
) -> None:
    """LARS on a device: few launches for all tensors, and nothing is read back."""
    updates = torch._foreach_add(gradients, weights, alpha=decay)
    w, u = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
    torch._foreach_mul_(updates, torch.where((w > 0) & (u > 0), trust * w / u, 1.0).unbind())
    move(weights, updates, buffers)


def create_optimizer(
    name: str, modules: Iterable[nn.Module], *, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """The optimiser over all parameters of the modules; the loop sets the learning rate of every step.

    Args:
        name: `lars`, `sgd` (both with the given momentum) or `adamw`.
        modules: backbone and objective.
        weight_decay: for parameters of two and more dimensions.
        momentum: of LARS and SGD.

    Raises:
        ValueError: for another name.
    """
    groups = parameter_groups(modules, weight_decay)
    if name == "lars":
        return LARS(groups, lr=0.0, momentum=momentum)
    for group in groups:
        group.pop("trust_coefficient", None)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    raise ValueError(f"optimizer='{name}' is none of {', '.join(OPTIMIZERS)}")


@torch.no_grad()
def clip(parameters: list[Tensor], most: float, norm: Tensor) -> None:
    """Scale the gradients so that together they are no longer than `most`, without waiting for the device.

    Args:
        parameters: those without a gradient are left out; of those that are shared out over ranks each has its part.
        most: norm of the longest gradient.
        norm: () of the whole gradient, as it is.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()` where `finite` holds, and nothing at all where it does not, without waiting for the device.

    Where it does not hold, weights, momentum, moments and step counters keep their bits (those that do not exist yet
    are made, as zeros).

    Args:
        optimizer: one that `create_optimizer` made.
        finite: 0-dim bool on the device of the parameters: whether loss and gradient are finite.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = _laid_out_as(parameter, parameter.grad)
                if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                    # Its own first buffers are uninitialised memory until a step is taken.
                    _momentum_buffer(optimizer.state[parameter], parameter)
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # what torch's fused kernels look at
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]  # an attribute that torch declares nowhere
