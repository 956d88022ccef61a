import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from nnclr.errors import InputError
from nnclr.evaluation import knn
from nnclr.evaluation.knn import cross_group_recall, knn_accuracy, knn_predict, nearest_rows
from tests.reference import unit


@pytest.fixture
def clusters():
    """Overlapping clusters, so that votes are close: 400 train and 150 test rows of 7 classes."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(7, 12))
    labels = rng.integers(0, 7, 550)
    features = centres[labels] + 0.9 * rng.normal(size=(550, 12))
    return features[:400], labels[:400], features[400:], labels[400:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (200, 0.07), (400, 0.1)])
def test_against_scikit_learn(clusters, k, temperature):
    train, labels, test, _ = clusters
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train, labels)
    assert knn_predict(train, labels, test, 7, k, temperature).tolist() == theirs.predict(test).tolist()


def test_against_plain_numpy(clusters):
    train, labels, test, truth = clusters
    similarities = unit(test) @ unit(train).T
    right = 0
    for row, label in zip(similarities, truth, strict=True):
        votes = np.zeros(7)
        for i in np.argsort(-row)[:20]:
            votes[labels[i]] += np.exp(row[i] / 0.07)
        right += votes.argmax() == label
    assert knn_accuracy(train, labels, test, truth, 7) == pytest.approx(right / len(truth), abs=1e-12)
    unweighted = knn_predict(train, labels, test, 7, temperature=1e6)  # control: the weights matter
    assert not torch.equal(unweighted, knn_predict(train, labels, test, 7))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_do_not_change_the_result(clusters, block):
    train, labels, test, _ = clusters
    whole = knn_predict(train, labels, test, 7)
    assert torch.equal(knn_predict(train, labels, test, 7, block=block), whole)


def crowd(rows, queries, spread):
    """Vectors around three centres; the smaller the spread, the more similarities round to the same bfloat16."""
    centres = torch.randn(3, 24)
    return (centres[torch.arange(n) % 3] + spread * torch.randn(n, 24) for n in (rows, queries))


@pytest.fixture
def native(monkeypatch):
    """As on a CPU that computes in bfloat16, whatever this one does."""
    monkeypatch.setattr(knn, "bfloat16_is_native", lambda device: True)


@pytest.mark.parametrize("spread", [10.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize(("rows", "k"), [(1040, 1), (5001, 5), (9001, 20), (5001, 100)])
def test_candidates_are_the_neighbours_of_a_float64_comparison(native, rows, k, spread):
    train, test = crowd(rows, 300, spread)
    train[50] = train[20]  # equal rows
    exact = torch.from_numpy(unit(test.double().numpy()) @ unit(train.double().numpy()).T)
    best, where = nearest_rows(train, test, k, block=256)  # 4,096 rows at a time
    assert all(len(set(row)) == k for row in where.tolist())
    assert torch.allclose(best.double(), exact.topk(k).values, atol=1e-6)
    assert torch.allclose(exact.gather(1, where), exact.topk(k).values, atol=1e-6)


def test_control_without_the_bound_neighbours_are_missed(native, monkeypatch):
    monkeypatch.setattr(knn, "least_maximum", lambda kth, queries, moved: kth)
    train, test = crowd(9001, 300, 0.5)
    exact = torch.from_numpy(unit(test.double().numpy()) @ unit(train.double().numpy()).T)
    best, _ = nearest_rows(train, test, 1, block=256)
    assert not torch.allclose(best.double(), exact.topk(1).values, atol=1e-6)


def test_most_rows_are_not_compared_in_float32(native, monkeypatch):
    products = []
    compared = knn._of_all
    monkeypatch.setattr(knn, "_of_all", lambda train, *rest: (products.append(len(train)), compared(train, *rest))[1])
    train, test = crowd(8201, 50, 10.0)
    nearest_rows(train, test, 20, block=256)
    assert products == [9]  # rows that are left over beside groups of 16


def test_what_is_known_of_other_rows_raises_the_bound(native, monkeypatch):
    """So that later rows are compared with the best of all, not with the best of their own."""
    bounds, least = [], knn.least_maximum

    def noting(kth, *rest):
        bounds.append(kth)
        return least(kth, *rest)

    monkeypatch.setattr(knn, "least_maximum", noting)
    train, test = crowd(4096, 50, 10.0)
    nearest_rows(train, test, 20, block=128)  # 2,048 rows at a time
    first, _ = nearest_rows(train[:2048], test, 20, block=128)
    nearest_rows(train[2048:], test, 20, block=128)
    _, second, _, alone = bounds
    assert (second >= first[:, -1] - 1e-6).all()
    assert (second >= alone).all()
    assert (second > alone + 1e-3).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k=0 and temperature=0.07 must be above 0"),
        ({"temperature": 0.0}, "k=20 and temperature=0.0 must be above 0"),
        ({"train_labels": np.zeros(29, np.int64)}, r"labels of shape \(29,\) are not one for each of the 30 rows"),
        ({"train_labels": np.full(30, 3)}, "labels of 3 classes must be whole numbers from 0 to 2"),
        ({"train_labels": np.full(30, -1)}, "whole numbers from 0 to 2"),
        ({"train_labels": np.zeros(30)}, "whole numbers from 0 to 2"),
        ({"train_features": np.zeros((0, 4)), "train_labels": np.zeros(0, np.int64)}, "one for each of the 0 rows"),
    ],
)
def test_what_cannot_vote_is_refused(change, words):
    features = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    given = {"train_features": features, "train_labels": np.arange(30) % 3, "test_features": features, "num_classes": 3}
    assert len(knn_predict(**given)) == 30
    with pytest.raises(InputError, match=words):
        knn_predict(**given | change)


@pytest.mark.parametrize("most", [1, 20, 10**6])
def test_votes_are_counted_for_a_few_queries_at_a_time(clusters, monkeypatch, most):
    train, train_labels, test, _ = clusters
    whole = knn_predict(train, train_labels, test, 7)
    monkeypatch.setattr(knn, "_VOTES", most)
    assert knn_predict(train, train_labels, test, 7).tolist() == whole.tolist()
    assert knn_predict(train, train_labels, test[:0], 7).tolist() == []


def test_more_voters_than_rows():
    assert knn_predict(np.eye(3), [0, 1, 2], np.eye(3), 3, k=20).tolist() == [0, 1, 2]


def test_neighbours_are_exact_under_autocast():
    train, test = torch.randn(1, 64) + 0.1 * torch.randn(300, 64), torch.randn(1, 64) + 0.1 * torch.randn(50, 64)
    exact = (unit(test.double().numpy()) @ unit(train.double().numpy()).T).argmax(axis=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_rows(train, test, 1)[1][:, 0].tolist() == exact.tolist()


def test_memory_is_bounded():
    """30,000 x 30,000 similarities would take 3.6 GB; a fresh process stays below 500 MB more."""
    code = """
import resource, torch
torch.set_num_threads(1)
from nnclr.errors import InputError
from nnclr.evaluation import knn
from nnclr.evaluation.knn import nearest_rows
train, test = torch.randn(30000, 8), torch.randn(30000, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_rows(train, test, 20, block=4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 500


def test_cross_group_recall_by_hand():
    features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.05], [0.7, 0.7]])
    concepts = np.array(["cat", "cat", "dog", "dog", "dog", "lone"])
    families = np.array(["a", "b", "a", "b", "a", "a"])
    # Row 0: nearest of family b is row 1, a cat: right. Row 1: nearest of family a is row 4, a dog: wrong.
    # Rows 2 and 3 find each other. Row 4: nearest of b is row 1: wrong. Row 5 has no partner: not asked.
    assert cross_group_recall(features, concepts, families) == pytest.approx(3 / 5)
    assert cross_group_recall(features, concepts, families, block=2) == pytest.approx(3 / 5)
