"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 2018; DINO's form)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 4096  # rows of test and of train that are compared at a time: 64 MiB of similarities


@torch.no_grad()
def nearest_rows(train: Tensor, test: Tensor, k: int, block: int = _BLOCK) -> tuple[Tensor, Tensor]:
    """The k train rows with the largest cosine similarity to each test row, best first.

    Args:
        train: (m, d) features, normalised here.
        test: (n, d) features, normalised here.
        k: at most m.
        block: rows of either side at a time; memory is O(block ** 2), the result does not depend on it.

    Returns:
        Similarities (n, k) float32 and indices (n, k) int64.
    """
    with torch.autocast(train.device.type, enabled=False):
        similarities, indices = [], []
        for rows in test.split(block):
            queries = F.normalize(rows.float(), dim=1)
            best = queries.new_full((len(queries), 0), 0.0)
            where = torch.zeros(len(queries), 0, dtype=torch.int64, device=train.device)
            for start in range(0, len(train), block):
                # Normalised block by block: a copy of the whole would need as much memory again.
                scores = queries @ F.normalize(train[start : start + block].float(), dim=1).T
                top, index = scores.topk(min(k, scores.shape[1]), dim=1)
                best, where = torch.cat([best, top], 1), torch.cat([where, index + start], 1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                where = where.gather(1, order)
            similarities.append(best)
            indices.append(where)
    return torch.cat(similarities), torch.cat(indices)


def vote(similarities: Tensor, indices: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Predictions (n,) int64 of the first k neighbours (n, >= k); of equal votes the lowest class wins."""
    similarities, indices = similarities[:, :k], indices[:, :k]
    # Relative to the best one: exp(1 / 0.07) times k is near what float32 can add up exactly.
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    votes = torch.zeros(len(indices), num_classes, dtype=torch.float64, device=labels.device)
    votes.scatter_add_(1, labels[indices], weights)
    return votes.argmax(dim=1)


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
    """
    train, test = torch.as_tensor(train_features), torch.as_tensor(test_features)
    labels = torch.as_tensor(train_labels).to(train.device)
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
    predicted = knn_predict(train_features, train_labels, test_features, num_classes, k, temperature)
    return float((predicted == torch.as_tensor(test_labels).to(predicted.device)).double().mean())


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
    vectors = F.normalize(torch.as_tensor(features).float(), dim=1)
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
