"""SimSiam (Chen and He, CVPR 2021): BYOL without averaged weights; the stopped gradient alone prevents collapse."""

from typing import ClassVar

import torch
from torch import Tensor

from nnclr.models.heads import PredictionHead, ProjectionHead
from nnclr.objectives.byol import byol_loss
from nnclr.objectives.objective import Objective, Output, two_views


class SimSiam(Objective):
    """Each view's prediction against the other view's embedding, through which no gradient flows.

    The loss is BYOL's, 2 - 2 cos summed over both directions: 4 times the paper's plus 4.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d; the paper's 2048 is `embedding_dim=2048`.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor; the paper has a bottleneck, 512.
    """

    settings: ClassVar[tuple[str, ...]] = ("embedding_dim", "projector_hidden_dim", "predictor_hidden_dim")

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
    ) -> None:
        super().__init__()
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.predictor = PredictionHead(embedding_dim, predictor_hidden_dim)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss; shapes as in `Objective.forward`."""
        two_views(features, "SimSiam")
        z1, z2 = (self.projector(view) for view in features)
        loss = byol_loss(self.predictor(z1).float(), z2.float()) + byol_loss(self.predictor(z2).float(), z1.float())
        metrics = {"loss_chance": torch.full((), 4.0, device=loss.device)}
        return Output(loss, metrics, [z1.detach().float(), z2.detach().float()], ids)
