from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score

from nnclr.evaluation.metrics import (
    average_precision,
    average_precision_11,
    bootstrap_interval,
    map_11,
    mean_per_class,
    top1,
)
from nnclr.evaluation.result import wilson_interval


@pytest.fixture
def predicted():
    """Uneven classes 0, 1, 3, 4 (2 does not occur), the rare ones right less often."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 3, 4], 3000, p=[0.7, 0.2, 0.08, 0.02])
    right = rng.random(3000) < np.array([0.9, 0.6, 0, 0.4, 0.1])[labels]
    return np.where(right, labels, rng.choice([0, 1, 3, 4], 3000)), labels


def slow_ap_11(scores, targets):
    """VOC2007's definition word by word, in fractions."""
    ranking = sorted((i for i in range(len(scores)) if targets[i] >= 0), key=lambda i: (-scores[i], i))
    positives = sum(int(targets[i]) for i in ranking)
    curve, found = [], 0
    for place, i in enumerate(ranking, 1):
        found += int(targets[i])
        curve.append((Fraction(found, positives), Fraction(found, place)))
    best = [max(p for recall, p in curve if recall >= Fraction(t, 10)) for t in range(11)]
    return float(sum(best) / 11)


def test_accuracies_against_scikit_learn(predicted):
    predictions, labels = predicted
    assert top1(predictions, labels) == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    assert mean_per_class(predictions, labels) == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)
    assert top1(predictions, labels) - mean_per_class(predictions, labels) > 0.1  # control: they are not the same


def test_ap_11_by_hand():
    # Ranking + - + - - +: precision 1 up to recall 1/3, 2/3 up to 2/3, 1/2 up to 1.
    # Recalls 0 to 0.3 see 1, 0.4 to 0.6 see 2/3, 0.7 to 1 see 1/2.
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    targets = np.array([1, 0, 1, 0, 0, 1])
    assert average_precision_11(scores, targets) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 / 2) / 11)
    shuffled = np.array([3, 0, 5, 2, 4, 1])
    assert average_precision_11(scores[shuffled], targets[shuffled]) == pytest.approx(8 / 11)
    # Rows that do not count change nothing; as negatives they would.
    scores, targets = np.append(scores, [1.0, 0.65]), np.append(targets, [-1, -1])
    assert average_precision_11(scores, targets) == pytest.approx(8 / 11)
    assert average_precision_11(scores, np.maximum(targets, 0)) < 0.6


def test_recall_of_three_tenths_reaches_the_threshold():
    """3 of 10 against 3 * 0.1 in floating point, 0.30000000000000004, would fail."""
    targets = np.array([1] * 3 + [0] * 3 + [1] * 7)
    scores = -np.arange(13.0)
    assert average_precision_11(scores, targets) == pytest.approx((4 + 7 * 10 / 13) / 11)


@pytest.mark.parametrize("seed", range(20))
def test_ap_11_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 30, 60) / 10  # with ties
    targets = rng.choice([-1, 0, 1], 60, p=[0.1, 0.6, 0.3])
    assert average_precision_11(scores, targets) == pytest.approx(slow_ap_11(scores, targets), abs=1e-12)


def test_map_11_leaves_out_classes_without_a_positive():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(80, 4))
    targets = rng.choice([-1, 0, 1], (80, 4))
    targets[:, 2] = rng.choice([-1, 0], 80)
    expected = np.mean([slow_ap_11(scores[:, c], targets[:, c]) for c in (0, 1, 3)])
    assert map_11(scores, targets) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(map_11(scores[:, 2:3], targets[:, 2:3]))
    assert np.isnan(average_precision_11(scores[:, 2], targets[:, 2]))


def test_average_precision():
    assert average_precision(np.array([True, False, True])) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(np.zeros(3, bool)))
    rng = np.random.default_rng(0)
    scores, relevant = rng.normal(size=50), rng.random(50) < 0.3
    theirs = average_precision_score(relevant, scores)
    assert average_precision(relevant[np.argsort(-scores)]) == pytest.approx(theirs, abs=1e-12)


def test_bootstrap_of_a_share_is_near_wilson():
    hits = np.arange(2000) < 600
    low, high = bootstrap_interval(top1, hits, np.ones(2000, bool))
    assert (low, high) == pytest.approx(wilson_interval(0.3, 2000), abs=0.003)
    assert bootstrap_interval(top1, hits, np.ones(2000, bool)) == (low, high)
    assert bootstrap_interval(top1, hits, np.ones(2000, bool), seed=1) != (low, high)


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = halved = 0
    for _ in range(120):
        hits = rng.random(150) < 0.4
        low, high = bootstrap_interval(np.mean, hits, draws=150)
        covered += low <= 0.4 <= high
        halved += abs(0.4 - hits.mean()) <= (high - low) / 4  # control: half as wide covers about 2 of 3
    assert 0.88 <= covered / 120 <= 0.99
    assert halved / 120 < 0.8


def test_bootstrap_takes_the_same_rows_of_all_arrays(predicted):
    labels = predicted[1]
    assert bootstrap_interval(top1, labels, labels, draws=50) == (1.0, 1.0)


def test_bootstrap_against_another_generator(predicted):
    predictions, labels = predicted
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3000, (300, 3000))
    theirs = np.quantile([balanced_accuracy_score(labels[r], predictions[r]) for r in rows], [0.025, 0.975])
    assert bootstrap_interval(mean_per_class, predictions, labels) == pytest.approx(tuple(theirs), abs=0.01)


def test_bootstrap_leaves_out_draws_without_a_positive():
    scores, targets = np.arange(4.0), np.array([0, 0, 0, 1])
    assert bootstrap_interval(average_precision_11, scores, targets, draws=50) == (1.0, 1.0)
    assert np.isnan(bootstrap_interval(average_precision_11, scores, np.zeros(4), draws=5)).all()
