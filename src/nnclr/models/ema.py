"""Exponential moving averages of weights: the momentum encoder of MoCo, BYOL and their kin."""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnclr.distributed import local

M = TypeVar("M", bound=nn.Module)


def average_of(module: M) -> M:
    """A copy that starts from the module's weights and never takes a gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move the average's parameters: average = momentum * average + (1 - momentum) * module.

    Buffers stay the average's own: its batch norms see their own batches (BYOL, section 3). Where both are shared out
    over ranks, each moves its own parts.
    """
    own, new = ([local(p.detach()) for p in of.parameters()] for of in (average, module))
    if own:
        torch._foreach_lerp_(own, new, 1.0 - momentum)


@torch.no_grad()
def averaged_features(average: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """Features of the two large views, without gradient."""
    return [average(view) for view in views[:2]]


def momentum_at(step: int, *, base: float, to_one: bool, total_steps: int) -> float:
    """Momentum of the update after a step; a pure function of it.

    Args:
        step: 0-based number of the optimiser step that was taken.
        base: momentum at the start.
        to_one: rise to 1 along half a cosine (BYOL, section 3.2; MoCo v3), instead of staying.
        total_steps: length of the whole run.
    """
    if not to_one:
        return base
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * min(step / total_steps, 1.0)))
