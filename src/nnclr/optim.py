"""Optimisers, parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

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
    neither weight decay nor LARS scaling (NNCLR, section 4.1; BYOL, appendix C).
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "trust_coefficient": None},
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
    """

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
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Multi-tensor operations: a few launches for the whole group instead of ten for each parameter.
        updates = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if group["trust_coefficient"] is not None:
            weight_norms = torch._foreach_norm(parameters)
            update_norms = torch._foreach_norm(updates)
            ratios = [
                torch.where((w > 0) & (u > 0), group["trust_coefficient"] * w / u, 1.0)
                for w, u in zip(weight_norms, update_norms, strict=True)
            ]
            torch._foreach_mul_(updates, ratios)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])


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
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    raise ValueError(f"optimizer='{name}' is none of {', '.join(OPTIMIZERS)}")
