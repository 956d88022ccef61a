"""BYOL (Grill et al., NeurIPS 2020): predict the averaged network's embedding of the other view; no negatives."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.models.ema import average_of, update_average
from nnclr.models.heads import PredictionHead, ProjectionHead
from nnclr.objectives.objective import Objective, Output, targets_of, two_views


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of ||p - t||^2 of unit vectors, 2 - 2 cos (BYOL, equation 2).

    Args:
        predictions: (n, d); normalised here.
        targets: (n, d); normalised here, no gradient reaches them.

    Returns:
        A scalar in [0, 4]; 2 for unrelated vectors.
    """
    return 2 - 2 * F.cosine_similarity(predictions, targets.detach(), dim=1).mean()


class BYOL(Objective):
    """The baseline without negatives, on NNCLR's heads.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        ema_momentum: of the averaged weights at the start; it rises to 1 over the run.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "embedding_dim",
        "projector_hidden_dim",
        "predictor_hidden_dim",
        "ema_momentum",
    )
    momentum_to_one = True

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        ema_momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.predictor = PredictionHead(embedding_dim, predictor_hidden_dim)
        self.average_projector = average_of(self.projector)
        self.momentum = ema_momentum

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "BYOL")
        p1, p2 = (self.predictor(self.projector(view)).float() for view in features)
        with torch.no_grad():
            t1, t2 = (self.average_projector(view).float() for view in targets_of(targets, "BYOL"))
        loss = byol_loss(p1, t2) + byol_loss(p2, t1)
        metrics = {"loss_chance": torch.full((), 4.0, device=loss.device)}
        return Output(loss, metrics, [t1, t2], ids)

    def update(self, out: Output) -> None:
        """Move the averaged projector."""
        if self.momentum is not None:
            update_average(self.average_projector, self.projector, self.momentum)
