"""NN-BYOL and NN-SimSiam: NNCLR's neighbour step in methods without negatives.

The target of a view is not its own embedding but the nearest entry of the support set to it.
"""

from typing import ClassVar

import torch
from torch import Tensor

from nnclr.distributed import gather
from nnclr.objectives.byol import BYOL, byol_loss
from nnclr.objectives.nnclr import neighbour_metrics, per_view, positives
from nnclr.objectives.objective import Output, targets_of, two_views
from nnclr.objectives.simsiam import SimSiam
from nnclr.support_set import Neighbours, SupportSet


class NNBYOL(BYOL):
    """BYOL whose targets are replaced by their nearest neighbours in a support set of averaged embeddings.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        ema_momentum: as in `BYOL`.
        support_set_size: entries of the support set.
        shard_support_set: keep a share of the support set on each rank instead of all of it; see `SupportSet`.
    """

    settings: ClassVar[tuple[str, ...]] = (*BYOL.settings, "support_set_size", "shard_support_set")

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        ema_momentum: float = 0.996,
        support_set_size: int = 98_304,
        shard_support_set: bool = False,
    ) -> None:
        super().__init__(feature_dim, embedding_dim, projector_hidden_dim, predictor_hidden_dim, ema_momentum)
        self.support_set = SupportSet(support_set_size, embedding_dim, shard=shard_support_set)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "NNBYOL")
        p1, p2 = (self.predictor(self.projector(view)).float() for view in features)
        with torch.no_grad():
            keys = [self.average_projector(view).float() for view in targets_of(targets, "NNBYOL")]
        return neighbour_output(self.support_set, (p1, p2), keys, ids)

    def update(self, out: Output) -> None:
        """Move the averaged projector; enqueue view 1 of the global batch."""
        super().update(out)
        self.support_set.enqueue(gather(out.embeddings[0]), None if out.ids is None else gather(out.ids))


class NNSimSiam(SimSiam):
    """SimSiam whose targets are replaced by their nearest neighbours in a support set.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        support_set_size: entries of the support set.
        shard_support_set: keep a share of the support set on each rank instead of all of it; see `SupportSet`.
    """

    settings: ClassVar[tuple[str, ...]] = (*SimSiam.settings, "support_set_size", "shard_support_set")

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        support_set_size: int = 98_304,
        shard_support_set: bool = False,
    ) -> None:
        super().__init__(feature_dim, embedding_dim, projector_hidden_dim, predictor_hidden_dim)
        self.support_set = SupportSet(support_set_size, embedding_dim, shard=shard_support_set)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "NNSimSiam")
        z1, z2 = (self.projector(view) for view in features)
        p1, p2 = self.predictor(z1).float(), self.predictor(z2).float()
        return neighbour_output(self.support_set, (p1, p2), [z1.detach().float(), z2.detach().float()], ids)

    def update(self, out: Output) -> None:
        """Enqueue view 1 of the global batch."""
        self.support_set.enqueue(gather(out.embeddings[0]), None if out.ids is None else gather(out.ids))


def neighbour_output(
    support_set: SupportSet, predictions: tuple[Tensor, Tensor], keys: list[Tensor], ids: Tensor | None
) -> Output:
    """The neighbour of each view's key against the prediction of the other view, without negatives."""
    neighbours: list[Neighbours] = per_view(support_set.nearest(torch.cat(keys)))
    n1, n2 = (positives(found, key) for found, key in zip(neighbours, keys, strict=True))
    loss = byol_loss(predictions[1], n1) + byol_loss(predictions[0], n2)
    metrics = {
        **neighbour_metrics(neighbours[0], neighbours[1], ids),
        "support_set_fill": support_set.fill,
        "loss_chance": torch.full((), 4.0, device=loss.device),
    }
    return Output(loss, metrics, keys, ids, neighbours)
