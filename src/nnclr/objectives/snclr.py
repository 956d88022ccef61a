"""SNCLR (Ge et al., ICLR 2023): soft neighbours as further positives, each weighted by its similarity.

As built, after the paper's description: the averaged embedding of the other view counts in full, and its k nearest
entries of the support set by a softmax over their similarities, which stands for the paper's attention; all of them
are contrasted with the predictions of the global batch, as in NNCLR.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.distributed import gather, rank, world_size
from nnclr.objectives.byol import BYOL
from nnclr.objectives.nnclr import neighbour_metrics, per_view
from nnclr.objectives.objective import Output, targets_of, two_views
from nnclr.support_set import Neighbours, SupportSet


def snclr_loss(targets: Tensor, neighbours: Neighbours, predictions: Tensor, temperature: float) -> Tensor:
    """Weighted mean over the positives of each row of -log softmax over the global batch's predictions.

    Args:
        targets: (n, d), of weight 1; normalised here.
        neighbours: fields (n, k, d) and (n, k); their weights softmax(similarity / temperature) sum to 1.
        predictions: (n, d) of the other view; normalised here, gathered across ranks with gradient.
        temperature: of both softmaxes.
    """
    found_NK = neighbours.similarities.isfinite()
    weights_NK = torch.softmax(neighbours.similarities / temperature, dim=1).where(found_NK, 0.0)
    weights_NK = F.pad(weights_NK, (1, 0), value=1.0)
    positives_NKD = torch.cat([F.normalize(targets, dim=1)[:, None], neighbours.embeddings], dim=1).detach()
    with torch.autocast(predictions.device.type, enabled=False):
        p_GD = gather(F.normalize(predictions, dim=1))
        log_p_NKG = F.log_softmax(positives_NKD @ p_GD.T / temperature, dim=2)
        own_N = torch.arange(len(targets), device=targets.device) + rank() * len(targets)
        log_p_NK = log_p_NKG.gather(2, own_N[:, None, None].expand(-1, log_p_NKG.shape[1], 1))[..., 0]
        return -((weights_NK * log_p_NK).sum(dim=1) / weights_NK.sum(dim=1)).mean()


class SNCLR(BYOL):
    """NNCLR with k soft neighbours beside the own view, looked up with averaged weights.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        ema_momentum: of the averaged weights at the start; it rises to 1 over the run.
        support_set_size: entries of the support set.
        neighbour_k: k.
        temperature: of the softmax.
        shard_support_set: keep a share of the support set on each rank instead of all of it; see `SupportSet`.
    """

    settings: ClassVar[tuple[str, ...]] = (
        *BYOL.settings,
        "support_set_size",
        "shard_support_set",
        "neighbour_k",
        "temperature",
    )

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        ema_momentum: float = 0.99,
        support_set_size: int = 98_304,
        neighbour_k: int = 30,
        temperature: float = 0.1,
        shard_support_set: bool = False,
    ) -> None:
        super().__init__(feature_dim, embedding_dim, projector_hidden_dim, predictor_hidden_dim, ema_momentum)
        if not 1 <= neighbour_k <= support_set_size:
            raise ValueError(f"neighbour_k={neighbour_k} is not between 1 and support_set_size={support_set_size}")
        self.support_set = SupportSet(support_set_size, embedding_dim, shard=shard_support_set)
        self.neighbour_k, self.temperature = neighbour_k, temperature

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "SNCLR")
        p1, p2 = (self.predictor(self.projector(view)).float() for view in features)
        with torch.no_grad():
            t1, t2 = (self.average_projector(view).float() for view in targets_of(targets, "SNCLR"))
        n1, n2 = per_view(self.support_set.nearest(torch.cat([t1, t2]), self.neighbour_k))
        loss = 0.5 * snclr_loss(t1, n1, p2, self.temperature) + 0.5 * snclr_loss(t2, n2, p1, self.temperature)
        first = [Neighbours(*(part[:, :1] for part in found)) for found in (n1, n2)]
        metrics = {
            **neighbour_metrics(first[0], first[1], ids),
            "support_set_fill": self.support_set.fill,
            "loss_chance": torch.full((), math.log(len(t1) * world_size()), device=loss.device),
        }
        return Output(loss, metrics, [t1, t2], ids, first)

    def update(self, out: Output) -> None:
        """Move the averaged projector; enqueue view 1 of the global batch."""
        super().update(out)
        self.support_set.enqueue(gather(out.embeddings[0]), None if out.ids is None else gather(out.ids))
