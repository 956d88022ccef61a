"""Predictions and labels to numbers, and intervals of any of them by bootstrap."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from nnclr import counter

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them its expansion in 1 / n.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_BOOTSTRAP = -3  # what the random numbers are for, beside counter's own -1 and -2


def top1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose prediction is the label.

    Args:
        predictions: (n,) whole numbers.
        labels: (n,) whole numbers.
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def top1_of_scores(scores: np.ndarray, labels: np.ndarray) -> float:
    """`top1` of the class with the highest score (n, c)."""
    return top1(scores.argmax(axis=1), labels)


def mean_per_class(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur in labels of each one's accuracy.

    Args:
        predictions: (n,) whole numbers.
        labels: (n,) whole numbers from 0.
    """
    rows = np.bincount(labels)
    right = np.bincount(labels, weights=np.asarray(predictions) == np.asarray(labels))
    occurs = rows > 0
    return float(np.mean(right[occurs] / rows[occurs]))


def average_precision(relevant: np.ndarray) -> float:
    """Mean of the precision at each relevant place of a ranking.

    Args:
        relevant: (n,) bool, best first.

    Returns:
        In [0, 1]; NaN where nothing is relevant.
    """
    places = np.flatnonzero(relevant)
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1))) if len(places) else float("nan")


def average_precision_11(scores: np.ndarray, targets: np.ndarray) -> float:
    """VOC2007's average precision of one class (Everingham et al., 2010, section 4.2).

    The mean over the recalls 0, 0.1, ..., 1 of the best precision at that recall or above. A recall is compared
    with a tenth in whole numbers, so that 3 of 10 reaches 0.3. Of equal scores the lower row ranks first.

    Args:
        scores: (n,) higher means more likely.
        targets: (n,) 1 for a positive, 0 for a negative, -1 for a row that does not count (VOC's "difficult").

    Returns:
        In [0, 1]; NaN without a positive.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    counts = targets >= 0
    hit = targets[counts][np.argsort(-scores[counts], kind="stable")] == 1
    found = np.cumsum(hit)
    if not hit.any():
        return float("nan")
    precision = found / np.arange(1, len(hit) + 1)
    best_from = np.maximum.accumulate(precision[::-1])[::-1]
    # The first place at which `found` of all positives is at least each tenth.
    reached = np.searchsorted(10 * found, np.arange(11) * found[-1])
    return float(best_from[reached].mean())


def map_11(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean of `average_precision_11` over the classes that have a positive, NaN if none has.

    Args:
        scores: (n, c).
        targets: (n, c) of 1, 0 and -1.
    """
    targets = np.asarray(targets)
    classes = np.flatnonzero((targets == 1).any(axis=0))
    values = [average_precision_11(scores[:, i], targets[:, i]) for i in classes]
    return float(np.mean(values)) if values else float("nan")


def bootstrap_interval(
    metric: Callable[..., Any], *arrays: np.ndarray, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of a metric by the percentile bootstrap over rows (Efron, 1979).

    Args:
        metric: of arrays like the given ones, to a number.
        arrays: each with n rows; a draw takes the same n rows, with replacement, of all.
        seed: a draw is a pure function of seed, its number and n.
        draws: resamplings.

    Returns:
        The 2.5 % and 97.5 % quantiles of the draws; draws without a value (NaN) are left out, for instance those
        without a positive.
    """
    n = np.uint64(len(arrays[0]))
    rows, half = np.arange(len(arrays[0])), np.uint64(32)
    values = np.empty(draws)
    for draw in range(draws):
        # The upper half of the hash times n: a remainder would take several times as long.
        taken = ((counter.bits(seed, draw, _BOOTSTRAP, rows) >> half) * n >> half).astype(np.int64)
        values[draw] = metric(*(array[taken] for array in arrays))
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def half_width(values: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    z = 1.959964
    t = (
        _T95[freedom - 1]
        if freedom <= len(_T95)
        else z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    )
    return t * statistics.stdev(values) / math.sqrt(len(values))
