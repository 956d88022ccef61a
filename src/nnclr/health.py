"""Measures of collapse and of neighbour health, no labels needed, and the check that numbers are finite."""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr import distributed
from nnclr.checkpoint import write_atomically
from nnclr.data.loader import Batch
from nnclr.errors import NonFiniteError
from nnclr.objectives.objective import Output
from nnclr.support_set import Neighbours


@torch.no_grad()
def embedding_std(z: Tensor) -> Tensor:
    """Mean standard deviation of the normalised embeddings (n, d), times sqrt(d).

    Near 1 for embeddings spread over the sphere, 0 for a collapse to one point. It does not notice a collapse
    to a subspace; `rank_me` does.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * math.sqrt(z.shape[1])


@torch.no_grad()
def rank_me(z: Tensor) -> Tensor:
    """Effective rank: exp of the entropy of the normalised singular values of (n, d), uncentred.

    RankMe (Garrido et al., 2023, equation 1). Between 1 and min(n, d). It does not notice a collapse to a
    point with noise around it; `embedding_std` does.
    """
    values = torch.linalg.svdvals(z.float())
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(shares * shares.log()).sum())


@torch.no_grad()
def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """Mean squared distance of the normalised embeddings of two views (Wang and Isola, 2020)."""
    return (F.normalize(z1.float(), dim=1) - F.normalize(z2.float(), dim=1)).square().sum(dim=1).mean()


@torch.no_grad()
def uniformity(z: Tensor, block: int = 1024) -> Tensor:
    """log of the mean of exp(-2 ||x - y||^2) over distinct pairs of normalised rows (Wang and Isola, 2020)."""
    z = F.normalize(z.float(), dim=1)
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for rows in z.split(block):
        total += torch.exp(4 * (rows @ z.T).clamp(max=1) - 4).double().sum()
    n = len(z)
    return ((total - n) / (n * (n - 1))).log().float()


@torch.no_grad()
def neighbour_purity(neighbours: Sequence[Neighbours], ids: Tensor, labels: Tensor) -> float:
    """Share of found neighbours that have the query's label.

    Args:
        neighbours: of each view, fields (n, k).
        ids: (n,) image ids of the queries.
        labels: (images,) labels of all images; without labels there is no purity.

    Returns:
        In [0, 1]; NaN while no neighbour was found.
    """
    same = found = 0.0
    for view in neighbours:
        known = view.ids >= 0
        equal = labels[view.ids.clamp(min=0)] == labels[ids][:, None]
        same += float((equal & known).sum())
        found += float(known.sum())
    return same / found if found else float("nan")


class StepCheck:
    """Whether each step was finite and whether anybody asked to stop, decided alike on all ranks.

    On CUDA the answer to a step is read after the next one was queued, so that nothing waits for the device; the
    optimiser leaves the weights alone meanwhile (`optim.guarded_step`). On the CPU it is read at once.

    Args:
        run: where a step that is not finite is described.
        device: of the run.
    """

    def __init__(self, run: Path, device: torch.device) -> None:
        self.run, self.lag = run, int(device.type == "cuda")
        self.waiting: deque[_Posted] = deque()

    def post(self, batch: Batch, out: Output, parameters: list[Tensor], asked: bool) -> tuple[Tensor, Tensor]:
        """Take a step after its backward.

        Args:
            batch: of the step.
            out: its loss, () float32.
            parameters: whose gradients are looked at.
            asked: whether this process was asked to stop.

        Returns:
            Norm of the whole gradient, and whether the step may be taken: 0-dim tensors on the device.
        """
        norm: Tensor = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = out.loss.detach()
        bad = ~torch.isfinite(loss + norm)
        stop = torch.full((), float(asked), device=norm.device)
        flags = distributed.largest(torch.stack([bad.float(), stop]))
        self.waiting.append(_Posted.of(flags, batch.step, batch.ids, loss, norm))
        return norm, flags[0] == 0

    def read(self, settle: bool = False) -> bool:
        """Whether any rank was asked to stop.

        Args:
            settle: also read the last step, waiting for the device.

        Raises:
            NonFiniteError: on all ranks; the weights are those before the step, and the images of the batch are
                written to `nonfinite/`.
        """
        asked = False
        while len(self.waiting) > (0 if settle else self.lag):
            step = self.waiting.popleft()
            not_finite, stop = step.flags()
            if not_finite:
                raise distributed.told(self._failure(step))
            asked |= bool(stop)
        return asked

    def _failure(self, step: "_Posted") -> NonFiniteError:
        loss, norm = distributed.gather(step.loss[None]), step.norm.item()
        ids = distributed.gather(step.ids).tolist()
        value = next((x for x in loss.tolist() if not math.isfinite(x)), loss.mean().item())
        path = self.run / "nonfinite" / f"step-{step.number:08d}.json"
        record = {"step": step.number, "loss": repr(value), "grad_norm": repr(norm), "ids": ids}
        if distributed.rank() == 0:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, (json.dumps(record) + "\n").encode())
        return NonFiniteError(
            f"loss {value} and gradient norm {norm} at step {step.number} are not both finite; the "
            f"weights were not changed and the last checkpoint is good: see {path}, lower the learning rate or "
            "use --precision fp32"
        )


@dataclass
class _Posted:
    """A step whose answer is on its way to the host."""

    answer: Tensor  # (2,) float32 on the host: not finite, asked to stop
    arrived: torch.cuda.Event | None
    number: int
    ids: Tensor
    loss: Tensor
    norm: Tensor

    @classmethod
    def of(cls, flags: Tensor, number: int, ids: Tensor, loss: Tensor, norm: Tensor) -> Self:
        if flags.device.type != "cuda":
            return cls(flags, None, number, ids, loss, norm)
        answer = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(answer, arrived, number, ids, loss, norm)

    def flags(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        values: list[float] = self.answer.tolist()
        return values


@dataclass
class CollapseMonitor:
    """Says in words that training has collapsed, once for each time it does.

    A dip does not count: a measure has to be at the floor in `patience` observations in a row, after the first
    `warmup` ones.
    """

    warmup: int = 5
    patience: int = 3
    seen: int = 0
    low: int = 0

    def observe(
        self, *, step: int, std: float, rank: float, dim: int, samples: int, distinct: float | None = None
    ) -> str | None:
        """Feed one observation.

        Args:
            step: for the message.
            std: `embedding_std`.
            rank: `rank_me`.
            dim: embedding width.
            samples: rows that the rank was measured on.
            distinct: different entries among the neighbours of a batch, in (0, 1].

        Returns:
            A warning, or None.
        """
        self.seen += 1
        complaint = None
        if std < 0.1:
            complaint = f"embeddings have collapsed to a point (std {std:.3f} of 1)"
        elif rank < 0.1 * min(dim, samples):
            complaint = f"embeddings have collapsed to a subspace (effective rank {rank:.1f} of {dim})"
        elif distinct is not None and distinct < 0.05:
            complaint = f"all queries share a few hubs as neighbours ({100 * distinct:.1f} % distinct)"
        if complaint is None or self.seen <= self.warmup:
            self.low = 0
            return None
        self.low += 1
        if self.low != self.patience:
            return None
        return f"at step {step} {complaint}; lower the learning rate or use stronger augmentation"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from."""
        return {"seen": self.seen, "low": self.low}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.seen, self.low = state.get("seen", 0), state.get("low", 0)
