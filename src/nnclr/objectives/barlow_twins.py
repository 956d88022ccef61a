"""Barlow Twins (Zbontar et al., ICML 2021): the cross-correlation of two views should be the identity."""

from typing import ClassVar

import torch
from torch import Tensor

from nnclr.distributed import gather
from nnclr.models.heads import ProjectionHead
from nnclr.objectives.objective import Objective, Output, two_views


def barlow_twins_loss(z1: Tensor, z2: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """sum_i (1 - C_ii)^2 + weight * sum_{i != j} C_ij^2, C over the global batch (equation 1).

    Args:
        z1: (n, d) embeddings of view 1, gathered across ranks with gradient.
        z2: (n, d) embeddings of view 2.
        off_diagonal_weight: lambda.

    Returns:
        A scalar, the same on every rank.
    """
    with torch.autocast(z1.device.type, enabled=False):
        one, two = (gather(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z1, z2))
        one, two = ((z - z.mean(dim=0)) / z.std(dim=0, correction=0).clamp(min=1e-5) for z in (one, two))
        correlation_DD = one.T @ two / len(one)
        squares = correlation_DD.square()
        diagonal = correlation_DD.diagonal()
        off = squares.sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + off_diagonal_weight * off


class BarlowTwins(Objective):
    """Redundancy reduction on NNCLR's projector; published with embeddings of width 8192.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        off_diagonal_weight: lambda.
    """

    settings: ClassVar[tuple[str, ...]] = ("embedding_dim", "projector_hidden_dim", "off_diagonal_weight")

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        off_diagonal_weight: float = 0.0051,
    ) -> None:
        super().__init__()
        self.off_diagonal_weight = off_diagonal_weight
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The loss of two views; shapes as in `Objective.forward`."""
        two_views(features, "BarlowTwins")
        z1, z2 = (self.projector(view).float() for view in features)
        loss = barlow_twins_loss(z1, z2, self.off_diagonal_weight)
        metrics = {"loss_chance": torch.full((), float(z1.shape[1]), device=loss.device)}
        return Output(loss, metrics, [z1.detach(), z2.detach()], ids)
