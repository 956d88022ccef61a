"""Image retrieval with frozen features: every image asks all others for its own label."""

from dataclasses import dataclass

import numpy as np

from nnclr.errors import InputError
from nnclr.evaluation.metrics import average_precision
from nnclr.finite import refuse_not_finite, refuse_other_labels


@dataclass(frozen=True)
class RetrievalOutcome:
    """What `retrieval` found: the numbers, and their parts a query."""

    metrics: dict[str, float]  # "recall@k" for each k, "mAP", "queries", "without_relevant"
    first_relevant: np.ndarray  # (queries,) int64: how many images rank before the first of the same label
    average_precisions: np.ndarray  # (queries,) float64


def retrieval(
    features: np.ndarray, labels: np.ndarray, ks: tuple[int, ...] = (1, 5, 10), block: int = 256
) -> RetrievalOutcome:
    """Rank all other images by cosine similarity to each image; relevant are those of the same label.

    recall@k is the share of queries with a relevant image among the first k (Jegou et al., 2011); mAP is the
    mean of the average precision over the whole ranking. Images without another one of their label are not
    asked, but can be found. Of equal similarities the lower row ranks first.

    Args:
        features: (n, d) float32, in memory or memory-mapped; not copied.
        labels: (n,) whole numbers.
        ks: for recall.
        block: queries at a time; memory is O(block * (n + d)), time O(n^2 (d + log n)).

    Raises:
        InputError: if no label occurs twice, labels are not one a row, or a feature is not finite.
    """
    features = np.asarray(features, np.float32)
    refuse_other_labels(labels, len(features))
    labels = np.unique(labels, return_inverse=True)[1].reshape(-1)
    asked = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not len(asked):
        raise InputError(
            "retrieval needs two images of the same label, and all labels differ; give more images a label"
        )
    refuse_not_finite(features, "the features")
    scale = _inverse_norms(features)
    first = np.empty(len(asked), np.int64)
    precisions = np.empty(len(asked))
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        scores = (features[rows] * scale[rows, None]) @ features.T
        scores *= scale
        scores[np.arange(len(rows)), rows] = -np.inf  # the own row comes last and is cut off
        for i, row in enumerate(rows, start):
            order = np.argsort(-scores[i - start], kind="stable")[:-1]
            relevant = labels[order] == labels[row]
            first[i] = relevant.argmax()
            precisions[i] = average_precision(relevant)
    metrics = {f"recall@{k}": float(np.mean(first < k)) for k in ks}
    counts = {"queries": len(asked), "without_relevant": len(labels) - len(asked)}
    return RetrievalOutcome({**metrics, "mAP": float(precisions.mean()), **counts}, first, precisions)


def _inverse_norms(features: np.ndarray, block: int = 4096) -> np.ndarray:
    """(n,) float32: 1 / norm of each row, 0 for a row of zeros."""
    norms = [np.linalg.norm(features[i : i + block], axis=1) for i in range(0, len(features), block)]
    norm = np.concatenate(norms)
    inverse: np.ndarray = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    return inverse
