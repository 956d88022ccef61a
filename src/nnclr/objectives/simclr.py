"""SimCLR (Chen et al., ICML 2020) on NNCLR's projector: the positive is the other view of the same image.

Legend of the shape suffixes: N images on this rank, G images of the global batch, D embedding width.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.distributed import gather, rank, world_size
from nnclr.models.heads import ProjectionHead
from nnclr.objectives.objective import Objective, Output, two_views


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, equation 1).

    Each of the 2G embeddings is contrasted with the other view of its image against all other 2G - 2
    embeddings of the global batch, those of the same view included.

    Args:
        z1: (n, d) embeddings of view 1; normalised here and gathered across ranks with gradient.
        z2: (n, d) embeddings of view 2.
        temperature: t > 0.

    Returns:
        A scalar of the inputs' dtype (computed in float32 at least): the mean over this rank's 2n rows.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"embeddings {tuple(z1.shape)} and {tuple(z2.shape)} must both be (n, d)")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    dtype = torch.promote_types(z1.dtype, torch.float32)
    with torch.autocast(z1.device.type, enabled=False):
        z1_ND, z2_ND = F.normalize(z1.to(dtype), dim=1), F.normalize(z2.to(dtype), dim=1)
        z1_GD, z2_GD = gather(z1_ND), gather(z2_ND)
        own_N = torch.arange(len(z1), device=z1.device) + rank() * len(z1)

        def one_way(a_ND: Tensor, same_GD: Tensor, other_GD: Tensor) -> Tensor:
            same_NG = (a_ND @ same_GD.T / temperature).scatter(1, own_N[:, None], -torch.inf)
            return F.cross_entropy(torch.cat([a_ND @ other_GD.T / temperature, same_NG], dim=1), own_N)

        return (0.5 * one_way(z1_ND, z1_GD, z2_GD) + 0.5 * one_way(z2_ND, z2_GD, z1_GD)).to(z1.dtype)


class SimCLR(Objective):
    """The baseline in NNCLR's shape: the same projector, no predictor and no support set.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        temperature: of the softmax.
    """

    settings: ClassVar[tuple[str, ...]] = ("embedding_dim", "projector_hidden_dim", "temperature")

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The NT-Xent loss of two views.

        Args:
            features: two (n, feature_dim) tensors, one a view of the same n images.
            targets: features of a momentum encoder; this objective has none and ignores them.
            ids: (n,) int64 image ids; passed through.

        Raises:
            ValueError: if there are not two views.
        """
        two_views(features, "SimCLR")
        z1_ND, z2_ND = (self.projector(view).float() for view in features)
        loss = nt_xent_loss(z1_ND, z2_ND, self.temperature)
        chance = math.log(2 * len(z1_ND) * world_size() - 1)
        metrics = {"loss_chance": torch.full((), chance, device=loss.device)}
        return Output(loss, metrics, [z1_ND.detach(), z2_ND.detach()], ids)
