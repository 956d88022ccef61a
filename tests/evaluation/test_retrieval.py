import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from nnclr.errors import InputError
from nnclr.evaluation.retrieval import retrieval
from tests.reference import unit


@pytest.fixture
def clusters():
    """Overlapping clusters of odd lengths: 160 rows of 9 labels, and 3 rows whose label no other has."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.integers(0, 9, 160), [20, 21, 22]])
    features = rng.normal(size=(30, 10))[labels] + 1.2 * rng.normal(size=(163, 10))
    order = rng.permutation(163)
    return (features * rng.uniform(0.1, 9, (163, 1)))[order].astype(np.float32), labels[order]


def test_against_a_double_loop_and_scikit_learn(clusters):
    features, labels = clusters
    exact = unit(features.astype(np.float64))
    ranks, precisions = [], []
    for i in range(163):
        others = [j for j in range(163) if j != i]
        relevant = np.array([labels[j] == labels[i] for j in others])
        if not relevant.any():
            continue
        scores = np.array([exact[i] @ exact[j] for j in others])
        ranks.append((scores > scores[relevant].max()).sum())
        precisions.append(average_precision_score(relevant, scores))
    outcome = retrieval(features, labels, ks=(1, 3, 10, 1000))
    assert outcome.first_relevant.tolist() == ranks
    np.testing.assert_allclose(outcome.average_precisions, precisions, atol=1e-9)
    expected = {f"recall@{k}": np.mean(np.array(ranks) < k) for k in (1, 3, 10, 1000)}
    expected |= {"mAP": np.mean(precisions), "queries": 160, "without_relevant": 3}
    assert outcome.metrics == pytest.approx(expected)
    assert 0.3 < outcome.metrics["recall@1"] < outcome.metrics["recall@3"] < outcome.metrics["recall@1000"] == 1
    raw = (features @ features.T - 1e9 * np.eye(163)).argmax(axis=1)  # control: without cosine it is another one
    assert np.mean((labels[raw] == labels)[labels < 20]) != outcome.metrics["recall@1"]


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_neither_blocks_nor_a_memory_map_change_the_result(clusters, block, tmp_path):
    features, labels = clusters
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert retrieval(mapped, labels, block=block).metrics == retrieval(features, labels).metrics


def test_of_equal_similarities_the_lower_row_ranks_first():
    # Row 0 finds its other at rank 2, row 1 at 3, row 2 at 1, row 3 at 2; row 4 has no other.
    outcome = retrieval(np.ones((5, 4), np.float32), np.array([0, 1, 0, 1, 2]), ks=(1, 2))
    assert outcome.first_relevant.tolist() == [1, 2, 0, 1]
    assert outcome.metrics == {
        "recall@1": 1 / 4,
        "recall@2": 3 / 4,
        "mAP": pytest.approx((1 / 2 + 1 / 3 + 1 + 1 / 2) / 4),
        "queries": 4,
        "without_relevant": 1,
    }


def test_rows_of_zeros_are_far_from_all():
    features = np.array([[0, 0], [1, 0], [1, 0.1], [0, 0]], np.float32)
    outcome = retrieval(features, np.array([0, 0, 1, 1]))
    assert outcome.first_relevant.tolist() == [0, 1, 2, 2]  # all are as far from row 3: the lower ranks first


def test_labels_that_all_differ_are_an_error():
    features = np.eye(4, dtype=np.float32)
    with pytest.raises(InputError, match=r"labels of shape \(2,\) are not one for each of the 3 rows of features"):
        retrieval(np.eye(3, dtype=np.float32), np.array([0, 0]))
    with pytest.raises(InputError, match="two images of the same label"):
        retrieval(features, np.arange(4))
    assert retrieval(features, np.array([0, 1, 2, 2])).metrics["queries"] == 2


def test_features_are_not_copied():
    features = np.random.default_rng(0).normal(size=(20000, 256)).astype(np.float32)
    labels = np.arange(20000)
    labels[1] = 0  # two queries
    tracemalloc.start()
    retrieval(features, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes / 2
