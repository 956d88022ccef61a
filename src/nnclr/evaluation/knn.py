"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 2018; DINO's form)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.errors import InputError
from nnclr.evaluation.metrics import top1
from nnclr.exact import exact_float32
from nnclr.finite import as_array, as_rows, class_indices, refuse_not_finite, refuse_other_labels
from nnclr.kernels.lookup import bfloat16_is_native, least_maximum

_BLOCK = 4096  # rows of test and of train that are compared at a time: 64 MiB of similarities
_WIDE, _QUERIES = 16, 128  # bfloat16 products: blocks of train rows, and queries, at a time, 16 MiB of similarities
_GROUP, _LEAST = 16, 64  # rows in a group; groups from which on they pay
_VOTES = 1 << 22  # of queries for classes that are counted at a time, 32 MiB
_MOST = 0.25  # share of the groups with candidates above which comparing all is faster


@torch.no_grad()
def nearest_rows(train: Tensor, test: Tensor, k: int, block: int = _BLOCK) -> tuple[Tensor, Tensor]:
    """The k train rows with the largest cosine similarity to each test row, best first, compared in float32.

    Where a CPU computes in bfloat16, products of that type say first which rows are worth comparing.

    Args:
        train: (m, d) features, normalised here.
        test: (n, d) features, normalised here.
        k: at most m.
        block: rows of either side that are compared at a time; memory is O(block ** 2 + block * d); of equal rows
            another one may be found with another block.

    Returns:
        Similarities (n, k) float32 and indices (n, k) int64.
    """
    best = torch.full((len(test), 0 if len(test) else k), 0.0, device=train.device)
    where = torch.zeros(best.shape, dtype=torch.int64, device=train.device)
    quick = train.device.type == "cpu" and bfloat16_is_native(train.device)
    start = 0
    with exact_float32(train.device):
        while start < len(train) and len(test):
            some = train[start : start + (_WIDE * block if quick else block)]
            if quick and len(some) >= _GROUP * max(k, _LEAST):
                some = some[: len(some) // _GROUP * _GROUP]
                tops, places = _of_candidates(some, test, k, block, best)
            else:
                tops, places = _of_all(some, test, min(k, len(some)), block)
            both = torch.cat([best, tops], 1), torch.cat([where, places + start], 1)
            best, order = both[0].topk(min(k, both[0].shape[1]), dim=1)
            where = both[1].gather(1, order)
            start += len(some)
    return best, where


def _of_all(train: Tensor, test: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """The k best of some train rows for each test row, by comparing all of them."""
    found = []
    for queries in test.split(max(1, block * block // len(train))):
        # Normalised block by block: a copy of the whole would need as much memory again.
        unit = F.normalize(queries.float(), dim=1)
        scores = [unit @ F.normalize(rows.float(), dim=1).T for rows in train.split(block)]
        found.append(torch.cat(scores, 1).topk(k, dim=1))
    best, where = zip(*found, strict=True)
    return torch.cat(best), torch.cat(where)


def _of_candidates(train: Tensor, test: Tensor, k: int, block: int, known: Tensor) -> tuple[Tensor, Tensor]:
    """As `_of_all`, in float32 only where a product in bfloat16 leaves the chance to be among the k best.

    The k-th largest of the maxima of disjoint groups of rows, and of similarities that are `known` from other rows, is
    a similarity that k rows reach. What rounding can take from such a row is bounded. Where fewer than k rows are worth
    comparing, similarity -inf fills up.

    Args:
        train: (m, d), m a multiple of the group's size.
        test: (n, d).
        k: at most the number of groups.
        block: rows that are normalised at a time.
        known: similarities (n, any number) of other rows.
    """
    unit, moved = torch.empty(train.shape, dtype=torch.bfloat16), 0.0
    for rows, rounded in zip(train.split(max(1, block // 4)), unit.split(max(1, block // 4)), strict=True):
        of_length_1 = F.normalize(rows.float(), dim=1)
        rounded.copy_(of_length_1)
        moved = max(moved, float(of_length_1.sub_(rounded.float()).norm(dim=1).max()))
    inverse = 1 / torch.cat([rows.float().norm(dim=1) for rows in train.split(max(1, block // 4))]).clamp(min=1e-12)
    groups = len(train) // _GROUP
    scores = torch.empty(_QUERIES, len(train), dtype=torch.bfloat16)  # once: fresh memory comes page by page
    found: list[tuple[Tensor, Tensor]] = []
    for queries, reached in zip(test.split(_QUERIES), known.split(_QUERIES), strict=True):
        queries = F.normalize(queries.float(), dim=1)
        # A group is every so-and-so-many-th row, so that the maxima of all are taken along whole lines of memory.
        torch.mm(queries.to(torch.bfloat16), unit.T, out=scores[: len(queries)])
        by_group = scores[: len(queries)].view(-1, _GROUP, groups)
        maxima = by_group.amax(dim=1).float()
        kth = torch.cat([maxima, reached], 1).topk(k, dim=1, sorted=False).values.amin(dim=1)
        floor = least_maximum(kth, queries, moved)
        candidates = maxima >= floor[:, None]
        if candidates.float().mean() > _MOST:  # rows crowd together
            found.append(_of_all(train, queries, k, block))
            continue
        query, group = candidates.nonzero(as_tuple=True)
        pair, member = (by_group[query, :, group] >= floor[query, None]).nonzero(as_tuple=True)
        query, rows = query[pair], member * groups + group[pair]
        counts = query.bincount(minlength=len(queries))
        exact = [
            train.index_select(0, some).float() @ q
            for q, some in zip(queries, rows.split(counts.tolist()), strict=True)
        ]
        place = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
        padded = torch.full((len(queries), max(k, int(counts.max()))), -torch.inf)
        padded[query, place] = torch.cat(exact) * inverse[rows]
        its_row = torch.zeros(padded.shape, dtype=torch.int64)
        its_row[query, place] = rows
        top, order = padded.topk(k, dim=1)
        found.append((top, its_row.gather(1, order)))
    best, where = zip(*found, strict=True)
    return torch.cat(best), torch.cat(where)


def vote(similarities: Tensor, indices: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Predictions (n,) int64 of the first k neighbours (n, >= k); of equal votes the lowest class wins."""
    similarities, indices = similarities[:, :k], indices[:, :k]
    # Relative to the best one: exp(1 / 0.07) times k is near what float32 can add up exactly.
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    predictions = []
    rows = max(1, _VOTES // num_classes)
    for some, weight in zip(indices.split(rows), weights.split(rows), strict=True):
        votes = torch.zeros(len(some), num_classes, dtype=torch.float64, device=labels.device)
        predictions.append(votes.scatter_add_(1, labels[some], weight).argmax(dim=1))
    return torch.cat(predictions)


def knn_predict(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block: int = _BLOCK,
) -> Tensor:
    """Vote of the k most similar training rows, each with weight exp(cosine / temperature).

    Args:
        train_features: (m, d) array or tensor.
        train_labels: (m,) whole numbers below num_classes.
        test_features: (n, d).
        num_classes: c.
        k: voters, cut to m.
        temperature: T > 0.
        block: rows compared at a time.

    Returns:
        (n,) int64 predictions; of equal votes the lowest class wins.

    Raises:
        InputError: if a feature is not finite, k or the temperature is not above 0, or labels do not fit.
    """
    train, test = as_rows(train_features), as_rows(test_features)
    if k < 1 or temperature <= 0:
        raise InputError(f"k={k} and temperature={temperature} must be above 0")
    labels = class_indices(train_labels, len(train), num_classes).to(train.device)
    for name, features in (("training", train), ("test", test)):
        refuse_not_finite(features, f"the {name} features")
    similarities, indices = nearest_rows(train, test, min(k, len(train)), block)
    return vote(similarities, indices, labels, num_classes, k, temperature)


def knn_accuracy(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in [0, 1] of `knn_predict`."""
    refuse_other_labels(test_labels, len(test_features))
    predicted = knn_predict(train_features, train_labels, test_features, num_classes, k, temperature)
    return top1(predicted.cpu().numpy(), as_array(test_labels))


def without_itself(similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours of rows among themselves, (n, k + 1), less each row itself, or less the last where it is not there."""
    itself = indices == torch.arange(len(indices), device=indices.device)[:, None]
    itself[:, -1] |= ~itself.any(dim=1)
    shape = (len(indices), indices.shape[1] - 1)
    return similarities[~itself].view(shape), indices[~itself].view(shape)


def cross_group_recall(features: Any, labels: Any, groups: Any, block: int = 1024) -> float:
    """Recall@1 across groups: is the nearest item of *another* group of the same label?

    Only items whose label occurs in another group are asked. With artists as groups and concepts as labels it
    measures whether a drawing finds another artist's drawing of the same thing.

    Args:
        features: (n, d).
        labels: (n,) whole numbers or texts.
        groups: (n,) whole numbers or texts.
        block: queries at a time; memory is O(block * n).
    """
    vectors = F.normalize(as_rows(features).float(), dim=1)
    label = torch.from_numpy(np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1))
    group = torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1))
    hits = asked = 0
    for start in range(0, len(vectors), block):
        rows = slice(start, start + block)
        other = group[rows, None] != group[None]
        possible = (other & (label[rows, None] == label[None])).any(dim=1)
        scores = (vectors[rows] @ vectors.T).masked_fill(~other, -torch.inf)
        right = label[scores.argmax(dim=1)] == label[rows]
        hits += int((right & possible).sum())
        asked += int(possible.sum())
    return hits / asked if asked else float("nan")
