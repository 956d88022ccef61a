"""NNCLR: nearest neighbours as positives (Dwibedi et al., ICCV 2021), section 3 of the paper, top to bottom.

Legend of the shape suffixes: N images on this rank, G images of the global batch, D embedding width, K neighbours.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr import counter
from nnclr.distributed import gather, rank, world_size
from nnclr.models.ema import average_of, update_average
from nnclr.models.heads import PredictionHead, ProjectionHead
from nnclr.objectives.objective import Objective, Output, targets_of
from nnclr.support_set import NO_ID, Neighbours, SupportSet

NEIGHBOURS = ("nearest", "kth", "random", "soft", "oracle")


def nnclr_loss(
    neighbours: Tensor,
    predictions: Tensor,
    temperature: float = 0.1,
    transpose: bool = False,
    decoupled: bool = False,
) -> Tensor:
    """Contrast each neighbour with the prediction of the other view of its image (paper, equation 3).

    L_i = -log( exp(a_i . p_i / t) / sum_{k=1..G} exp(a_i . p_k / t) ), averaged over i. The G - 1 negatives
    are the other predictions of the global batch: there are no same-view terms, and entries of the support
    set are never negatives.

    Args:
        neighbours: (n, d) anchors a; normalised here, no gradient reaches them.
        predictions: (n, d) predictions p; normalised here and gathered across ranks with gradient.
        temperature: t > 0.
        transpose: add the softmax over the columns of the same matrix (paper, section 3.2, "symmetric loss").
        decoupled: leave the positive out of the denominator (DCL, Yeh et al., 2022).

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
        p_ND = F.normalize(predictions.to(dtype), dim=1)
        own_N = torch.arange(len(a_ND), device=a_ND.device) + rank() * len(a_ND)
        loss = _cross_entropy(a_ND @ gather(p_ND).T / temperature, own_N, decoupled)
        if transpose:
            loss = loss + _cross_entropy(p_ND @ gather(a_ND).T / temperature, own_N, decoupled)
        return loss.to(predictions.dtype)


def _cross_entropy(logits_NG: Tensor, own_N: Tensor, decoupled: bool) -> Tensor:
    if not decoupled:
        return F.cross_entropy(logits_NG, own_N)
    negatives = logits_NG.scatter(1, own_N[:, None], -torch.inf)
    return (negatives.logsumexp(dim=1) - logits_NG.gather(1, own_N[:, None])[:, 0]).mean()


class NNCLR(Objective):
    """The objective: heads, support set and loss, everything after the backbone.

    What is looked up never contains the batch itself: `forward` reads the support set, `update` writes it.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        support_set_size: m, entries of the support set.
        temperature: of the softmax.
        neighbour: which positive: `nearest`; the `kth` nearest; a `random` one of the k nearest; the `soft` mean of
            the k nearest, weighted by softmax(similarity / temperature); the nearest of the same label (`oracle`).
        neighbour_k: k.
        exclude_own_id: do not take an older embedding of the image itself.
        enqueue_both_views: write both large views to the support set, not only view 1.
        replacement: `fifo` or `random`.
        use_predictor: without it the embeddings themselves are contrasted.
        transpose_loss: see `nnclr_loss`.
        decoupled_loss: see `nnclr_loss`.
        ema_momentum: look up, and enqueue, with averaged weights of this momentum.
        labels: (images,) int64, for `oracle`.
        shard_support_set: keep a share of the support set on each rank instead of all of it; see `SupportSet`.

    Raises:
        ValueError: if the settings do not go together.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "embedding_dim",
        "projector_hidden_dim",
        "predictor_hidden_dim",
        "support_set_size",
        "shard_support_set",
        "temperature",
        "neighbour",
        "neighbour_k",
        "exclude_own_id",
        "enqueue_both_views",
        "replacement",
        "use_predictor",
        "transpose_loss",
        "decoupled_loss",
        "ema_momentum",
        "labels",
    )
    multi_crop = True
    labels: Tensor | None

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        support_set_size: int = 98_304,
        temperature: float = 0.1,
        *,
        neighbour: str = "nearest",
        neighbour_k: int = 1,
        exclude_own_id: bool = False,
        enqueue_both_views: bool = False,
        replacement: str = "fifo",
        use_predictor: bool = True,
        transpose_loss: bool = False,
        decoupled_loss: bool = False,
        ema_momentum: float | None = None,
        labels: Tensor | None = None,
        shard_support_set: bool = False,
    ) -> None:
        super().__init__()
        if neighbour not in NEIGHBOURS:
            raise ValueError(f"neighbour={neighbour!r} is none of {', '.join(NEIGHBOURS)}")
        if neighbour_k > 1 and neighbour in ("nearest", "oracle"):
            raise ValueError(f"neighbour_k={neighbour_k} needs neighbour = kth, random or soft, not {neighbour}")
        if neighbour_k > support_set_size:
            raise ValueError(f"neighbour_k={neighbour_k} is larger than support_set_size={support_set_size}")
        if neighbour == "oracle" and labels is None:
            raise ValueError("neighbour='oracle' takes positives of the same label, and these images have no labels")
        self.temperature, self.neighbour, self.neighbour_k = temperature, neighbour, neighbour_k
        self.exclude_own_id, self.enqueue_both_views = exclude_own_id, enqueue_both_views
        self.transpose_loss, self.decoupled_loss = transpose_loss, decoupled_loss
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.predictor = PredictionHead(embedding_dim, predictor_hidden_dim) if use_predictor else nn.Identity()
        self.support_set = SupportSet(support_set_size, embedding_dim, replacement=replacement, shard=shard_support_set)
        self.momentum = ema_momentum
        self.average_projector = None if ema_momentum is None else average_of(self.projector)
        self.register_buffer("labels", labels if neighbour == "oracle" else None, persistent=False)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss of two views (paper, section 3.2); reads the support set, never writes it.

        With more views (multi-crop) the neighbours of the first two are contrasted with every other view.

        Args:
            features: (n, feature_dim) tensors, one a view of the same n images, the two large views first.
            targets: with `ema_momentum`: features of the two large views from the averaged backbone.
            ids: (n,) int64 image ids, for the metrics and for the support set.

        Raises:
            ValueError: if there are fewer than two views, or targets or ids are missing where they are needed.
        """
        if len(features) < 2:
            raise ValueError(f"NNCLR contrasts at least 2 views, got {len(features)}")
        if ids is None and (self.exclude_own_id or self.neighbour == "oracle"):
            raise ValueError("exclude_own_id and oracle neighbours need ids")
        z = [self.projector(view) for view in features]
        p = [self.predictor(view).float() for view in z]
        if self.average_projector is None:
            keys = [view.detach().float() for view in z[:2]]
        else:
            with torch.no_grad():
                keys = [self.average_projector(view).float() for view in targets_of(targets, "ema_momentum")[:2]]

        neighbours = self._look_up(keys, ids)
        anchors = [positives(found, key) for found, key in zip(neighbours, keys, strict=True)]
        options = self.temperature, self.transpose_loss, self.decoupled_loss
        losses = [
            nnclr_loss(anchor, p[view], *options)
            for large, anchor in enumerate(anchors)
            for view in range(len(p))
            if view != large
        ]
        metrics = {
            **neighbour_metrics(neighbours[0], neighbours[1], ids),
            "support_set_fill": self.support_set.fill,
            "loss_chance": torch.full((), self._chance(len(keys[0]) * world_size()), device=p[0].device),
        }
        return Output(torch.stack(losses).mean(), metrics, keys, ids, neighbours)

    def _chance(self, images: int) -> float:
        """Loss of predictions that say nothing, on a global batch."""
        candidates = images - 1 if self.decoupled_loss else images
        return (2 if self.transpose_loss else 1) * math.log(max(candidates, 1))

    @torch.no_grad()
    def update(self, out: Output) -> None:
        """Enqueue view 1 of the global batch; call it after the optimiser's step."""
        views = 2 if self.enqueue_both_views else 1
        rows = torch.cat([gather(view) for view in out.embeddings[:views]])
        self.support_set.enqueue(rows, None if out.ids is None else gather(out.ids).repeat(views))
        if self.average_projector is not None and self.momentum is not None:
            update_average(self.average_projector, self.projector, self.momentum)

    def _look_up(self, keys: list[Tensor], ids: Tensor | None) -> list[Neighbours]:
        """The positive of each large view, k = 1; one pass over the support set serves both views."""
        both = None if ids is None else ids.repeat(len(keys))
        found = self.support_set.nearest(
            torch.cat(keys),
            self.neighbour_k,
            exclude_ids=both if self.exclude_own_id else None,
            labels=self.labels,
            query_labels=None if self.labels is None or both is None else self.labels[both],
        )
        return per_view(self._choose(found, ids), len(keys))

    def _choose(self, found: Neighbours, ids: Tensor | None) -> Neighbours:
        """One of the k neighbours of each query, or their mean with the ids, similarity and age of the nearest."""
        if self.neighbour_k == 1:
            return found
        first = Neighbours(*(part[:, :1] for part in found))
        if self.neighbour == "soft":
            weights = torch.softmax(found.similarities / self.temperature, dim=1)
            return first._replace(embeddings=(weights[..., None] * found.embeddings).sum(dim=1, keepdim=True))
        rows = torch.arange(len(found.ids), device=found.ids.device)
        if self.neighbour == "kth":
            chosen = torch.full_like(rows, self.neighbour_k - 1)
        else:  # a function of update, view and image: the number of ranks cannot change it
            n = len(rows) // 2
            image = rows % n + rank() * n if ids is None else ids.repeat(2)
            bits = counter.bits_on_device(self.support_set.updates, rows // n, image)
            chosen = (bits & (2**62 - 1)) % found.similarities.isfinite().sum(dim=1).clamp(min=1)
        return Neighbours(*(part[rows, chosen][:, None] for part in found))


def per_view(both: Neighbours, views: int = 2) -> list[Neighbours]:
    """Split the look-up of concatenated views."""
    return [Neighbours(*parts) for parts in zip(*(part.chunk(views) for part in both), strict=True)]


def positives(neighbours: Neighbours, z_ND: Tensor) -> Tensor:
    """The neighbours as (n, d), and the own embedding where the support set is still empty (first step)."""
    found = neighbours.similarities.isfinite()
    return torch.where(found, neighbours.embeddings.squeeze(1), F.normalize(z_ND, dim=1))


def neighbour_metrics(nn1: Neighbours, nn2: Neighbours, ids: Tensor | None) -> dict[str, Tensor]:
    """Health of one look-up, as 0-d float tensors; NaN while the support set is empty, or where it cannot be told.

    `neighbour_similarity` (mean cosine), `neighbour_age` (mean, in steps), and with ids also `own_id_share`
    (neighbours that are an older embedding of the image itself) and `distinct_neighbours` (different
    entries among a view's neighbours, over the batch of all ranks: few mean hubs). Where both views are enqueued, the
    two of an image count as one entry, and entries without an id cannot be told apart.
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
        known = torch.stack([(view.ids != NO_ID) | ~view.similarities.isfinite() for view in (nn1, nn2)]).all()
        metrics["distinct_neighbours"] = torch.where(found.any() & known, distinct, torch.nan)
    return metrics


def _distinct(neighbours: Neighbours) -> Tensor:
    """Different entries over the queries of all ranks: an entry is known by its image and its age."""
    ids, ages = gather(torch.stack([neighbours.ids.flatten(), neighbours.ages.flatten()], dim=1)).unbind(1)
    by_id = ids.argsort(stable=True)
    order = by_id[ages[by_id].argsort(stable=True)]
    changed = (ids[order].diff() != 0) | (ages[order].diff() != 0)
    return (changed.sum() + 1) / len(ids)
