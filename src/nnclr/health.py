"""Measures of collapse and of neighbour health, no labels needed, and the alarms that say in words what they mean."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


@dataclass
class JumpMonitor:
    """Says in words that a measure has risen far above what was usual, once for each time it does.

    Usual is the median of the last `window` values that were not themselves so high.

    Args:
        what: the measure, for the message.
        factor: times the median that is too high.
        steps: for how many it has to stay there; 0 warns of the first such value.
    """

    what: str
    factor: float
    steps: int
    window: int = 50
    warmup: int = 5
    usual: list[float] = field(default_factory=list)
    since: int | None = None  # the step from which on it is too high
    said: bool = False

    def observe(self, step: int, value: float) -> str | None:
        """Feed one finite value.

        Returns:
            A warning, or None.
        """
        middle = median(self.usual) if len(self.usual) >= self.warmup else math.inf
        if not value > self.factor * middle > 0:
            self.usual = [*self.usual, value][-self.window :]
            self.since, self.said = None, False
            return None
        self.since = step if self.since is None else self.since
        if self.said or step - self.since < self.steps:
            return None
        self.said = True
        stays = f" for {step - self.since} steps" if self.steps else ""
        return (
            f"at step {step} the {self.what} is {value:.3g}, and was more than {self.factor:.0f} times its median of "
            f"{middle:.3g}{stays}; lower the learning rate or warm up longer"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from."""
        return {name: value for name, value in asdict(self).items() if name in ("usual", "since", "said")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.usual, self.since = list(state.get("usual", [])), state.get("since")
        self.said = state.get("said", False)


def jump_monitors() -> dict[str, JumpMonitor]:
    """The alarms for what a learning rate that is too high does, by the measure of metrics.jsonl that they watch."""
    return {"loss": JumpMonitor("loss", 3.0, 200), "grad_norm": JumpMonitor("gradient norm", 100.0, 0)}
