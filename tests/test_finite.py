"""Rows of pictures that cannot be read are NaN: whatever takes features says so, and works with the others."""

import numpy as np
import pytest
import torch

from nnclr.errors import InputError
from nnclr.evaluation import knn, linear, logistic
from nnclr.evaluation.few_shot import few_shot
from nnclr.evaluation.label_free import alignment, alpha_req, feature_std, label_free, lidar, rank_me, uniformity
from nnclr.evaluation.metrics import top1
from nnclr.evaluation.retrieval import retrieval
from nnclr.finite import as_rows, refuse_not_finite
from nnclr.neighbours import NeighbourIndex

N, LABELS = 60, np.arange(60) % 2


def features(bad=()):
    rows = np.random.default_rng(0).normal(size=(N, 8)).astype(np.float32) + 3 * np.eye(8)[LABELS].astype(np.float32)
    rows[list(bad)] = np.nan
    return rows


def views(rows):
    return np.stack([rows, rows + 1], axis=1)


TAKERS = {
    "NeighbourIndex": NeighbourIndex,
    "queries": lambda x: NeighbourIndex(features()).kneighbors(x),
    "knn, training": lambda x: knn.knn_accuracy(x, LABELS[: len(x)], features(), LABELS, 2),
    "knn, test": lambda x: knn.knn_accuracy(features(), LABELS, x, LABELS[: len(x)], 2),
    "linear": lambda x: linear.linear_accuracy(x, LABELS[: len(x)], x, LABELS[: len(x)], 2, epochs=1),
    "linear, test": lambda x: linear.linear_accuracy(features(), LABELS, x, LABELS[: len(x)], 2, epochs=1),
    "logistic": lambda x: logistic.logistic_regression(x, LABELS[: len(x)], features(), LABELS, x, 2, top1_of_scores),
    "few_shot": lambda x: few_shot(x, LABELS[: len(x)], (1,), 2, 2, 3),
    "retrieval": lambda x: retrieval(x, LABELS[: len(x)]),
    "label_free": lambda x: label_free(x, views(features())),
    "label_free, views": lambda x: label_free(features(), views(x)),
    "rank_me": rank_me,
    "alpha_req": alpha_req,
    "lidar": lambda x: lidar(views(x)),
    "alignment": lambda x: alignment(features()[: len(x)], x),
    "uniformity": lambda x: uniformity(x, 10),
    "feature_std": feature_std,
}


def top1_of_scores(scores, labels):
    return top1(scores.argmax(axis=1), labels)


@pytest.mark.parametrize("taker", TAKERS)
def test_rows_that_are_nan_are_counted_and_named(taker):
    bad = [3, 17, 59]
    with pytest.raises(InputError) as caught:
        TAKERS[taker](features(bad))
    assert "3 of the 60 rows of" in str(caught.value)
    assert "are not finite (rows 3, 17, 59)" in str(caught.value)
    assert "features[np.isfinite(features).all(axis=1)]" in str(caught.value)
    rows = features([3, 16, 17, 58, 59, 2])
    TAKERS[taker](rows[np.isfinite(rows).all(axis=1)])  # what the sentence says


@pytest.mark.parametrize("kind", ["array", "memory-mapped", "tensor", "float16", "three axes"])
def test_every_kind_of_rows_block_by_block(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("nnclr.finite._BLOCK", 7)
    rows = features(range(20, 30))
    rows[20, 0], rows[21] = np.inf, -np.inf
    if kind == "memory-mapped":
        np.save(tmp_path / "x.npy", rows)
        rows = np.load(tmp_path / "x.npy", mmap_mode="r")
    given = {"tensor": torch.from_numpy, "float16": np.float16, "three axes": views}.get(kind, lambda x: x)(rows)
    with pytest.raises(
        InputError, match=r"10 of the 60 rows of these are not finite \(rows 20, 21, 22, 23, 24, \.\.\.\)"
    ):
        refuse_not_finite(given, "these")
    refuse_not_finite(given[:20], "these")


LABEL_TYPES = ["u1", "u2", "i1", "i2", "i4", "i8", ">i8", ">i2", list, torch.from_numpy]
FEATURE_TYPES = ["<f4", ">f4", "<f8", ">f8", "<f2"]


def taken(features, labels):
    """What each function on arrays makes of them."""
    strengths = {"strengths": (1.0,)}
    return {
        "knn": knn.knn_accuracy(features, labels, features, labels, 2, k=3),
        "linear": linear.linear_accuracy(features, labels, features, labels, 2, epochs=2).test_accuracy,
        "logistic": logistic.logistic_regression(
            features,
            labels,
            features,
            labels,
            features,
            2,
            lambda s, y: top1(s.argmax(axis=1), np.asarray(y)),
            **strengths,
        )
        .scores.argmax(axis=1)
        .tolist(),
        "few_shot": few_shot(features, labels, (1,), 2, 2, 3)[1].accuracy,
        "retrieval": retrieval(features, labels).metrics,
        "cross_group": knn.cross_group_recall(features, labels, np.arange(N) % 3),
        "index": NeighbourIndex(features).kneighbors(features[:5], 3)[1].flatten().tolist(),
        "rank_me": rank_me(features),
    }


@pytest.mark.parametrize("kind", LABEL_TYPES)
def test_labels_of_every_type_of_whole_numbers(kind):
    labels = kind(LABELS) if callable(kind) else LABELS.astype(kind)
    assert taken(features(), labels) == taken(features(), LABELS)


@pytest.mark.parametrize("kind", [*FEATURE_TYPES, "read-only", "backwards", "strided"])
def test_features_of_every_kind_of_memory(kind):
    rows = features().astype(np.float16).astype(np.float32)  # which all types hold
    expected, given = taken(rows, LABELS), rows.copy()
    if kind == "backwards":
        given = given[::-1].copy()[::-1]
    elif kind == "strided":
        given = np.repeat(given, 2, axis=1)[:, ::2]
    elif kind == "read-only":
        given.flags.writeable = False
    else:
        given = given.astype(kind)
    found = taken(given, LABELS)
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}


@pytest.mark.parametrize("labels", [LABELS - 1, LABELS + 1, LABELS[:-1], LABELS.astype(float), LABELS[:, None]])
@pytest.mark.parametrize("taker", ["linear", "linear, test", "logistic", "logistic, validation", "knn, test"])
def test_labels_that_do_not_fit_are_refused(labels, taker):
    rows, options = features(), {"strengths": (1.0,)}
    if taker == "knn, test":  # which may have other classes
        if labels.shape == (N,):
            assert 0 <= knn.knn_accuracy(rows, LABELS, rows, labels, 2) <= 1
            return
        call = lambda: knn.knn_accuracy(rows, LABELS, rows, labels, 2)  # noqa: E731
    else:
        one, two = (labels, LABELS) if "," not in taker else (LABELS, labels)
        call = {
            "linear": lambda: linear.linear_accuracy(rows, one, rows, two, 2, epochs=1),
            "logistic": lambda: logistic.logistic_regression(rows, one, rows, two, rows, 2, top1_of_scores, **options),
        }[taker.partition(",")[0]]
    with pytest.raises(
        InputError, match=r"labels of (shape \(.*\) are not one for each of the 60 rows|2 classes must be)"
    ):
        call()


def test_rows_are_copied_where_they_must_be_alone(tmp_path):
    np.save(tmp_path / "rows.npy", features())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for rows in (mapped, features(), features()[:, ::2]):
        assert as_rows(rows).data_ptr() == rows.__array_interface__["data"][0]
    tensor = torch.rand(3, 4)
    assert as_rows(tensor) is tensor
    assert as_rows(features()[::-1]).numpy().tolist() == features()[::-1].tolist()


@pytest.mark.parametrize("kind", ["u1", "u2", "i8", ">i4", "?", "f4", torch.from_numpy])
def test_labels_of_several_classes_an_image_of_every_type(kind):
    several = np.stack([LABELS, 1 - LABELS, np.ones(N, int)], axis=1)
    given = kind(several) if callable(kind) else several.astype(kind)
    expected, found = (logistic.fit_logistic(features(), some, 3, 1.0) for some in (several.astype(np.int8), given))
    assert torch.equal(found, expected)
