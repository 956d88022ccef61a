"""All4One (Estepa et al., ICCV 2023): nearest neighbour, centroid of neighbours, and decorrelated features.

As built, with the paper's three losses on NNCLR's heads, and simpler than its authors' code. One transformer layer
without dropout and positions (theirs: three with both) turns the k neighbours of an averaged embedding into a
centroid, which is contrasted with a second prediction of the other view (theirs: with the transformed sequence of that
prediction and further neighbours). The feature loss is Barlow Twins' on predictions, divided by their width (theirs: on
embeddings, by root mean squares). Gradient flows through the centroid. The weights 0.5, 0.5 and 5 are theirs, so the
balance differs.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr.distributed import gather, rank, world_size
from nnclr.models.heads import PredictionHead
from nnclr.objectives.barlow_twins import barlow_twins_loss
from nnclr.objectives.byol import BYOL
from nnclr.objectives.nnclr import neighbour_metrics, nnclr_loss, per_view, positives
from nnclr.objectives.objective import Output, targets_of, two_views
from nnclr.support_set import Neighbours, SupportSet

NEIGHBOUR, CENTROID, FEATURE = 0.5, 0.5, 5.0  # weights of the losses


def centroid_loss(centroids: Tensor, predictions: Tensor, temperature: float) -> Tensor:
    """InfoNCE of centroids (n, d) against the global batch's predictions; gradient reaches both."""
    with torch.autocast(predictions.device.type, enabled=False):
        logits = F.normalize(centroids.float(), dim=1) @ gather(F.normalize(predictions, dim=1)).T / temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) + rank() * len(logits))


class All4One(BYOL):
    """NNCLR's loss, the same against a learned centroid of k neighbours, and Barlow Twins' on the features.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d; a multiple of 8, the heads of the transformer layer.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of both predictors.
        ema_momentum: of the averaged weights at the start; it rises to 1 over the run.
        support_set_size: entries of the support set.
        neighbour_k: neighbours of a centroid.
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
        neighbour_k: int = 5,
        temperature: float = 0.2,
        shard_support_set: bool = False,
    ) -> None:
        super().__init__(feature_dim, embedding_dim, projector_hidden_dim, predictor_hidden_dim, ema_momentum)
        if embedding_dim % 8:
            raise ValueError(f"embedding_dim={embedding_dim} must be a multiple of 8 for all4one")
        if not 1 <= neighbour_k <= support_set_size:
            raise ValueError(f"neighbour_k={neighbour_k} is not between 1 and support_set_size={support_set_size}")
        self.centroid_predictor = PredictionHead(embedding_dim, predictor_hidden_dim)
        self.mixer = nn.TransformerEncoderLayer(
            embedding_dim, nhead=8, dim_feedforward=2 * embedding_dim, dropout=0.0, batch_first=True
        )
        self.support_set = SupportSet(support_set_size, embedding_dim, shard=shard_support_set)
        self.neighbour_k, self.temperature = neighbour_k, temperature

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "All4One")
        z = [self.projector(view) for view in features]
        p = [self.predictor(view).float() for view in z]
        c = [self.centroid_predictor(view).float() for view in z]
        with torch.no_grad():
            keys = [self.average_projector(view).float() for view in targets_of(targets, "All4One")]
        found = per_view(self.support_set.nearest(torch.cat(keys), self.neighbour_k))
        first = [Neighbours(*(part[:, :1] for part in view)) for view in found]
        losses = [self._one_way(found[a], first[a], keys[a], p[1 - a], c[1 - a]) for a in range(2)]
        metrics = {
            **neighbour_metrics(first[0], first[1], ids),
            "support_set_fill": self.support_set.fill,
            "loss_chance": torch.full((), self._chance(len(keys[0]) * world_size()), device=p[0].device),
        }
        return Output(torch.stack(losses).mean(), metrics, keys, ids, first)

    @staticmethod
    def _chance(images: int) -> float:
        """Loss of predictions that say nothing: uncorrelated features miss the whole diagonal."""
        return (NEIGHBOUR + CENTROID) * math.log(images) + FEATURE

    def _one_way(self, found: Neighbours, first: Neighbours, key: Tensor, p: Tensor, c: Tensor) -> Tensor:
        own = F.normalize(key, dim=1)[:, None]
        sequence = torch.where(found.similarities.isfinite()[..., None], found.embeddings, own)
        centroid = self.mixer(sequence)[:, 0]
        return (
            NEIGHBOUR * nnclr_loss(positives(first, key), p, self.temperature)
            + CENTROID * centroid_loss(centroid, c, self.temperature)
            + FEATURE * barlow_twins_loss(key, p) / p.shape[1]
        )

    def update(self, out: Output) -> None:
        """Move the averaged projector; enqueue view 1 of the global batch."""
        super().update(out)
        self.support_set.enqueue(gather(out.embeddings[0]), None if out.ids is None else gather(out.ids))
