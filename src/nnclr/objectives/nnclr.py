"""NNCLR: nearest neighbours as positives (Dwibedi et al., ICCV 2021), section 3 of the paper, top to bottom.

Legend of the shape suffixes: N images on this rank, G images of the global batch, D embedding width.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr.distributed import gather, rank, world_size
from nnclr.models.heads import PredictionHead, ProjectionHead
from nnclr.support_set import NO_ID, Neighbours, SupportSet


@dataclass
class Output:
    """What an objective computes from one batch; every tensor but `loss` is detached."""

    loss: Tensor  # () float32, the mean over this rank's rows
    metrics: dict[str, Tensor]  # name -> 0-d tensor on the device, nothing waited for
    embeddings: list[Tensor]  # one (n, d) float32 tensor a view, before normalisation
    ids: Tensor | None = None  # (n,) int64 image ids
    neighbours: list[Neighbours] = field(default_factory=list)  # one a view, k = 1; empty without a look-up


def nnclr_loss(neighbours: Tensor, predictions: Tensor, temperature: float = 0.1) -> Tensor:
    """Contrast each neighbour with the prediction of the other view of its image (paper, equation 3).

    L_i = -log( exp(a_i . p_i / t) / sum_{k=1..G} exp(a_i . p_k / t) ), averaged over i. The G - 1 negatives
    are the other predictions of the global batch: there are no same-view terms, and entries of the support
    set are never negatives.

    Args:
        neighbours: (n, d) anchors a; normalised here, no gradient reaches them.
        predictions: (n, d) predictions p; normalised here and gathered across ranks with gradient.
        temperature: t > 0.

    Returns:
        A scalar of the inputs' dtype (computed in float32 at least): the mean over this rank's rows, so that
        the gradient which DDP averages over ranks is the single-process gradient.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.
    """
    if neighbours.shape != predictions.shape or predictions.ndim != 2:
        raise ValueError(
            f"neighbours {tuple(neighbours.shape)} and predictions {tuple(predictions.shape)} must both be (n, d)"
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    with torch.autocast(predictions.device.type, enabled=False):
        a_ND = F.normalize(neighbours.detach().to(dtype), dim=1)
        p_GD = gather(F.normalize(predictions.to(dtype), dim=1))
        logits_NG = a_ND @ p_GD.T / temperature
        own_N = torch.arange(len(a_ND), device=a_ND.device) + rank() * len(a_ND)
        return F.cross_entropy(logits_NG, own_N).to(predictions.dtype)


class NNCLR(nn.Module):
    """The objective: heads, support set and loss, everything after the backbone.

    One training step is `out = objective(features, ids=ids)`, `out.loss.backward()`, the optimiser's step,
    `objective.update(out)`. The first call only reads the support set, the last one writes it: what is
    looked up never contains the batch itself.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        support_set_size: m, entries of the support set.
        temperature: of the softmax.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "embedding_dim",
        "projector_hidden_dim",
        "predictor_hidden_dim",
        "support_set_size",
        "temperature",
    )
    """The config's fields that the constructor takes beside `feature_dim`."""

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        support_set_size: int = 98_304,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.predictor = PredictionHead(embedding_dim, predictor_hidden_dim)
        self.support_set = SupportSet(support_set_size, embedding_dim)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss of two views (paper, section 3.2); reads the support set, never writes it.

        Args:
            features: two (n, feature_dim) tensors, one a view of the same n images.
            targets: features of a momentum encoder; this objective has none and ignores them.
            ids: (n,) int64 image ids, for the metrics and for the support set.

        Raises:
            ValueError: if there are not two views.
        """
        if len(features) != 2:
            raise ValueError(f"NNCLR contrasts 2 views, got {len(features)}")
        z1_ND, z2_ND = (self.projector(view) for view in features)
        p1_ND, p2_ND = self.predictor(z1_ND), self.predictor(z2_ND)
        z1_ND, z2_ND = z1_ND.detach().float(), z2_ND.detach().float()

        nn1, nn2 = _per_view(self.support_set.nearest(torch.cat([z1_ND, z2_ND])))
        loss = 0.5 * nnclr_loss(_positives(nn1, z1_ND), p2_ND.float(), self.temperature) + 0.5 * nnclr_loss(
            _positives(nn2, z2_ND), p1_ND.float(), self.temperature
        )
        metrics = {
            **neighbour_metrics(nn1, nn2, ids),
            "support_set_fill": self.support_set.fill,
            "loss_chance": torch.full((), math.log(len(z1_ND) * world_size()), device=loss.device),
        }
        return Output(loss, metrics, [z1_ND, z2_ND], ids, [nn1, nn2])

    @torch.no_grad()
    def update(self, out: Output) -> None:
        """Enqueue view 1 of the global batch; call it after the optimiser's step."""
        ids = None if out.ids is None else gather(out.ids)
        self.support_set.enqueue(gather(out.embeddings[0]), ids)


def _per_view(both: Neighbours) -> tuple[Neighbours, Neighbours]:
    """Split the look-up of two concatenated views: one pass over the support set serves both."""
    halves = zip(*(part.chunk(2) for part in both), strict=True)
    first, second = (Neighbours(*half) for half in halves)
    return first, second


def _positives(neighbours: Neighbours, z_ND: Tensor) -> Tensor:
    """The neighbours as (n, d), and the own embedding where the support set is still empty (first step)."""
    found = neighbours.similarities.isfinite()
    return torch.where(found, neighbours.embeddings.squeeze(1), F.normalize(z_ND, dim=1))


def neighbour_metrics(nn1: Neighbours, nn2: Neighbours, ids: Tensor | None) -> dict[str, Tensor]:
    """Health of one look-up, as 0-d float tensors; NaN while the support set is empty.

    `neighbour_similarity` (mean cosine), `neighbour_age` (mean, in steps), and with ids also `own_id_share`
    (neighbours that are an older embedding of the image itself) and `distinct_neighbours` (different
    entries among a view's neighbours, over the batch: few mean hubs).
    """
    found = nn1.similarities.isfinite() & nn2.similarities.isfinite()

    def mean(one: Tensor, two: Tensor) -> Tensor:
        both = 0.5 * (one.float() + two.float())
        return torch.where(found, both, 0.0).sum() / found.sum()

    metrics = {
        "neighbour_similarity": mean(nn1.similarities, nn2.similarities),
        "neighbour_age": mean(nn1.ages, nn2.ages),
    }
    if ids is not None:
        own = torch.where(ids == NO_ID, NO_ID - 1, ids)[:, None]  # an unknown image is not its own neighbour
        metrics["own_id_share"] = mean(nn1.ids == own, nn2.ids == own)
        distinct = 0.5 * (_distinct(nn1) + _distinct(nn2))
        metrics["distinct_neighbours"] = torch.where(found.any(), distinct, torch.nan)
    return metrics


def _distinct(neighbours: Neighbours) -> Tensor:
    """Different entries over queries: an entry is known by its image and its age."""
    ids, ages = neighbours.ids.flatten(), neighbours.ages.flatten()
    by_id = ids.argsort(stable=True)
    order = by_id[ages[by_id].argsort(stable=True)]
    changed = (ids[order].diff() != 0) | (ages[order].diff() != 0)
    return (changed.sum() + 1) / len(ids)
