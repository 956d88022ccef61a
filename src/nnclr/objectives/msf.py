"""MSF, mean shift for self-supervised learning (Koohpayegani et al., ICCV 2021): BYOL towards k neighbours.

As built: symmetric like BYOL here, while the paper's is one-way; the averaged embedding itself is the first of the k
neighbours, because the paper enqueues it before the look-up, and the rest come from the support set.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.distributed import gather
from nnclr.objectives.byol import BYOL
from nnclr.objectives.nnclr import neighbour_metrics, per_view
from nnclr.objectives.objective import Output, targets_of, two_views
from nnclr.support_set import Neighbours, SupportSet


def msf_loss(predictions: Tensor, targets: Tensor, neighbours: Neighbours) -> Tensor:
    """Mean over rows of the mean squared distance to the target and to each neighbour that was found.

    Args:
        predictions: (n, d); normalised here.
        targets: (n, d); normalised here.
        neighbours: fields (n, k - 1, d) and (n, k - 1).
    """
    p_N1D = F.normalize(predictions, dim=1)[:, None]
    all_NKD = torch.cat([F.normalize(targets, dim=1)[:, None], neighbours.embeddings], dim=1).detach()
    found_NK = F.pad(neighbours.similarities.isfinite(), (1, 0), value=True)
    distances_NK = 2 - 2 * (p_N1D * all_NKD).sum(dim=2)
    return ((distances_NK * found_NK).sum(dim=1) / found_NK.sum(dim=1)).mean()


class MSF(BYOL):
    """BYOL whose target is the mean over an averaged embedding and its nearest neighbours; k = 1 is BYOL.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        ema_momentum: of the averaged weights; constant.
        support_set_size: entries of the support set.
        neighbour_k: k, the embedding itself included.
        shard_support_set: keep a share of the support set on each rank instead of all of it; see `SupportSet`.
    """

    settings: ClassVar[tuple[str, ...]] = (*BYOL.settings, "support_set_size", "shard_support_set", "neighbour_k")
    momentum_to_one = False

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        ema_momentum: float = 0.99,
        support_set_size: int = 98_304,
        neighbour_k: int = 5,
        shard_support_set: bool = False,
    ) -> None:
        super().__init__(feature_dim, embedding_dim, projector_hidden_dim, predictor_hidden_dim, ema_momentum)
        if not 1 <= neighbour_k <= support_set_size:
            raise ValueError(f"neighbour_k={neighbour_k} is not between 1 and support_set_size={support_set_size}")
        self.support_set = SupportSet(support_set_size, embedding_dim, shard=shard_support_set)
        self.neighbour_k = neighbour_k

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "MSF")
        p1, p2 = (self.predictor(self.projector(view)).float() for view in features)
        with torch.no_grad():
            t1, t2 = (self.average_projector(view).float() for view in targets_of(targets, "MSF"))
        found = self.support_set.nearest(torch.cat([t1, t2]), max(self.neighbour_k - 1, 1))
        n1, n2 = per_view(Neighbours(*(part[:, : self.neighbour_k - 1] for part in found)))
        loss = msf_loss(p2, t1, n1) + msf_loss(p1, t2, n2)
        first = per_view(Neighbours(*(part[:, :1] for part in found)))
        metrics = {
            **neighbour_metrics(first[0], first[1], ids),
            "support_set_fill": self.support_set.fill,
            "loss_chance": torch.full((), 4.0, device=loss.device),
        }
        return Output(loss, metrics, [t1, t2], ids, first)

    def update(self, out: Output) -> None:
        """Move the averaged projector; enqueue view 1 of the global batch."""
        super().update(out)
        self.support_set.enqueue(gather(out.embeddings[0]), None if out.ids is None else gather(out.ids))
