"""Everything that knows there is more than one process; each function is the identity when there is one."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the backward sums every rank's gradient for the rows that came from here.

    A gather that only returns its own slice of the gradient trains another algorithm: this rank's rows are
    negatives in all the other ranks' losses too.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad = grad_outputs[0].clone()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with gradient.

    Args:
        rows: (n, ...) tensor; n is the same on every rank.

    Returns:
        (world_size * n, ...) tensor of the same dtype. The gradient of a row is the sum of the gradients
        it receives on all ranks.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered
