import math
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import entropy

from nnclr import health
from nnclr.errors import InputError
from nnclr.evaluation.label_free import (
    alignment,
    alpha_req,
    feature_std,
    label_free,
    lidar,
    rank_me,
    uniformity,
)
from tests.reference import unit


def entropy_rank(weights):
    return np.exp(entropy(weights / weights.sum()))


def with_spectrum(n, eigenvalues, seed=0):
    """Features whose covariance has exactly these eigenvalues, far from the origin."""
    rng = np.random.default_rng(seed)
    d = len(eigenvalues)
    scores = rng.normal(size=(n, d))
    scores = np.linalg.qr(scores - scores.mean(axis=0))[0] * np.sqrt(n * np.asarray(eigenvalues))
    return (scores @ np.linalg.qr(rng.normal(size=(d, d)))[0] + 3 * rng.normal(size=d)).astype(np.float32)


SHAPES = [(3000, 40), (2500, 7), (40, 40), (30, 90)]  # blocks that do not come out even, and fewer rows than columns


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_rank_me_against_singular_values(shape, offset):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=shape) * np.geomspace(1, 1e-3, shape[1]) + offset).astype(np.float32)
    exact = entropy_rank(np.linalg.svd(features.astype(np.float64), compute_uv=False))
    assert rank_me(features) == pytest.approx(exact, rel=1e-5)
    assert rank_me(features) == pytest.approx(float(health.rank_me(torch.from_numpy(features))), rel=1e-3)


def test_rank_me_known_answers():
    rng = np.random.default_rng(0)
    assert 31.5 < rank_me(rng.normal(size=(20000, 32)).astype(np.float32)) <= 32
    for n in (500, 50):
        for rank in (1, 3, 20):
            features = (rng.normal(size=(n, rank)) @ rng.normal(size=(rank, 64))).astype(np.float32)
            assert 0.7 * rank < rank_me(features) <= rank + 1e-3
    assert rank_me(np.eye(9, dtype=np.float32)) == pytest.approx(9)


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_req_against_numpy(shape):
    rng = np.random.default_rng(0)
    features = (rng.normal(size=shape) @ rng.normal(size=(shape[1], shape[1]))).astype(np.float32)
    values = np.linalg.eigvalsh(np.cov(features.astype(np.float64).T))[::-1][: min(shape[1], shape[0] - 1)]
    ranks = np.arange(4, len(values) + 1)
    slope = np.polyfit(np.log(ranks), np.log(values[3:]), 1, w=np.sqrt(1 / ranks))[0]
    assert alpha_req(features) == pytest.approx(-slope, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_req_of_a_power_law(alpha):
    assert alpha_req(with_spectrum(2000, np.arange(1, 121.0) ** -alpha)) == pytest.approx(alpha, abs=1e-3)
    # The first three and those above a hundred do not count; neither do dimensions that vanish.
    spectrum = np.arange(1, 121.0) ** -alpha
    spectrum[:3], spectrum[100:] = 5.0, 1e-7
    assert alpha_req(with_spectrum(2000, spectrum)) == pytest.approx(alpha, abs=1e-3)
    spectrum[30:] = 0
    assert alpha_req(with_spectrum(2000, spectrum)) == pytest.approx(alpha, abs=1e-3)


@pytest.mark.parametrize("shape", [(300, 10, 24), (20, 3, 24), (700, 2, 50)])
@pytest.mark.parametrize("scale", [1.0, 0.01])  # delta matters for the small one
def test_lidar_against_generalised_eigenvalues(shape, scale):
    rng = np.random.default_rng(0)
    n, q, d = shape
    centres = rng.normal(size=(n, 1, d)) * np.geomspace(1, 0.1, d)
    views = (scale * (centres + 0.3 * rng.normal(size=shape) @ rng.normal(size=(d, d)) + 2)).astype(np.float32)
    exact = views.astype(np.float64)
    between, within = np.zeros((d, d)), 1e-4 * np.eye(d)
    means = exact.mean(axis=1)
    for x in range(n):
        deviation = means[x] - means.mean(axis=0)
        between += np.outer(deviation, deviation) / n
        for view in exact[x]:
            within += np.outer(view - means[x], view - means[x]) / (n * q)
    expected = entropy_rank(np.maximum(scipy.linalg.eigh(between, within, eigvals_only=True), 0))
    assert lidar(views) == pytest.approx(expected, rel=1e-6)


def test_lidar_known_answers():
    rng = np.random.default_rng(0)
    few = 10 * np.eye(10, 40)[:, None] + 0.1 * rng.normal(size=(10, 200, 40))
    assert lidar(few.astype(np.float32)) == pytest.approx(9, abs=0.1)
    many = rng.normal(size=(2000, 1, 16)) + 0.1 * rng.normal(size=(2000, 4, 16))
    assert lidar(many.astype(np.float32)) == pytest.approx(16, abs=0.1)
    # Noise where classes differ hides them, noise elsewhere does not; RankMe cannot tell these two apart.
    loud = np.where(np.arange(16) < 8, 30, 0.1)
    hidden = rng.normal(size=(2000, 1, 16)) * (loud > 1) + loud * rng.normal(size=(2000, 4, 16))
    beside = rng.normal(size=(2000, 1, 16)) * (loud < 1) + loud * rng.normal(size=(2000, 4, 16))
    assert lidar(beside.astype(np.float32)) == pytest.approx(8, abs=0.5)
    assert lidar(hidden.astype(np.float32)) > 12  # what is left is the noise of the means, equal everywhere
    assert rank_me(hidden[:, 0]) == pytest.approx(rank_me(beside[:, 0]), rel=0.2)


def test_distances_against_double_loops():
    rng = np.random.default_rng(0)
    z1, z2 = (rng.normal(size=(60, 5)).astype(np.float32) for _ in range(2))
    a, b = unit(z1.astype(np.float64)), unit(z2.astype(np.float64))
    assert alignment(z1, z2) == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), rel=1e-9)
    assert alignment(z1, 3 * z1) < 1e-9
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(60) for j in range(60) if i != j]
    assert uniformity(z1) == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)
    assert feature_std(z1) == pytest.approx(a.std(axis=0, ddof=1).mean() * math.sqrt(5), rel=1e-9)


def test_large_inputs_against_the_measures_of_training():
    z = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32) + 0.5
    tensor = torch.from_numpy(z)
    assert uniformity(z) == pytest.approx(float(health.uniformity(tensor)), rel=1e-4)
    assert feature_std(z) == pytest.approx(float(health.embedding_std(tensor)), rel=1e-5)
    assert alignment(z[1:], z[:-1]) == pytest.approx(float(health.alignment(tensor[1:], tensor[:-1])), rel=1e-5)


def test_uniformity_of_a_sample():
    z = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32)
    z = z[np.argsort(z[:, 0])]  # the first rows are unlike the others
    assert uniformity(z, most=1000) == pytest.approx(uniformity(z), abs=0.05)
    assert uniformity(z, most=1000) == uniformity(z, most=1000)
    assert uniformity(z[:1000]) > uniformity(z) + 0.2  # control


def test_all_measures_together():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 30)).astype(np.float32)
    views = (rng.normal(size=(100, 1, 30)) + 0.5 * rng.normal(size=(100, 3, 30))).astype(np.float32)
    pairs = [alignment(views[:, 0], views[:, 1]), alignment(views[:, 1], views[:, 2])]
    assert label_free(features, views) == {
        "rank_me": rank_me(features),
        "rank_me_share": rank_me(features) / 30,
        "lidar": lidar(views),
        "alpha_req": alpha_req(features),
        "alignment": pytest.approx(np.mean(pairs)),
        "uniformity": uniformity(features),
        "feature_std": feature_std(features),
        "features": 500,
        "dim": 30,
    }
    assert label_free(features[:20], views)["rank_me_share"] == rank_me(features[:20]) / 20


@pytest.mark.parametrize("row", [np.zeros(24), np.full(24, 0.1), np.linspace(-7, 900, 24)])
@pytest.mark.parametrize("n", [2, 300])
def test_a_collapse_to_a_point(row, n):
    features = np.tile(row.astype(np.float32), (n, 1))
    found = label_free(features, np.tile(features[:, None], (1, 3, 1)))
    assert found["rank_me"] == pytest.approx(1, abs=1e-3)
    assert found["lidar"] == 1
    assert found["alpha_req"] == math.inf
    assert found["alignment"] == pytest.approx(0, abs=1e-9)
    assert found["uniformity"] == pytest.approx(0, abs=1e-5)
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)


def test_a_collapse_to_a_line():
    rng = np.random.default_rng(0)
    views = (rng.normal(size=(200, 4, 1)) * np.ones(24)).astype(np.float32)
    found = label_free(views[:, 0], views)
    assert found["rank_me"] == pytest.approx(1, abs=1e-3)
    assert found["lidar"] == pytest.approx(1, abs=1e-3)
    assert found["alpha_req"] == math.inf
    assert not any(map(math.isnan, found.values()))


def test_too_little_is_an_error():
    features = np.eye(4, dtype=np.float32)
    views = np.stack([features, features], axis=1)
    for few in ((features[:1], views), (features, views[:1])):
        with pytest.raises(InputError, match="at least two images"):
            label_free(*few)
    with pytest.raises(InputError, match="at least two views"):
        label_free(features, views[:, :1])
    assert label_free(features, views)["features"] == 4


def test_features_are_not_copied(tmp_path):
    features = np.lib.format.open_memmap(tmp_path / "f.npy", "w+", np.float32, (60000, 64))
    features[:] = np.random.default_rng(0).normal(size=(60000, 64))
    views = features.reshape(15000, 4, 64)
    for measure, arrays in (
        (rank_me, (features,)),
        (alpha_req, (features,)),
        (lidar, (views,)),
        (alignment, (views[:, 1:], views[:, :-1])),
        (feature_std, (features,)),
    ):
        tracemalloc.start()
        measure(*arrays)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < features.nbytes / 4, measure
