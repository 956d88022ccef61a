import numpy as np
import pytest
import torch

from nnclr import health
from nnclr.support_set import Neighbours
from tests.reference import unit


def collapsed_to_a_point():
    return torch.ones(256, 64) + 0.001 * torch.randn(256, 64)


def of_rank_4():
    return torch.randn(256, 4) @ torch.randn(4, 64)


def test_measures_against_numpy():
    z1, z2 = torch.randn(40, 16), torch.randn(40, 16)
    a, b = unit(z1.double().numpy()), unit(z2.double().numpy())
    assert health.embedding_std(z1).item() == pytest.approx(a.std(axis=0, ddof=1).mean() * 4, rel=1e-5)
    assert health.alignment(z1, z2).item() == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), rel=1e-5)
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(40) for j in range(40) if i != j]
    assert health.uniformity(z1, block=7).item() == pytest.approx(np.log(np.mean(pairs)), rel=1e-4)
    values = np.linalg.svd(z1.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert health.rank_me(z1).item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)


def test_each_measure_misses_the_others_collapse():
    """Why both are needed."""
    assert health.embedding_std(torch.randn(256, 64)) > 0.95
    assert health.embedding_std(collapsed_to_a_point()) < 0.01
    assert health.embedding_std(of_rank_4()) > 0.9
    assert health.rank_me(of_rank_4()) < 5
    centred = collapsed_to_a_point() - 1
    assert health.rank_me(centred) > 50


def test_purity_counts_only_found_neighbours():
    ids = torch.tensor([[0], [1], [2], [-1]])
    found = Neighbours(torch.zeros(4, 1, 2), ids, torch.zeros(4, 1), torch.zeros(4, 1))
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert health.neighbour_purity([found], torch.tensor([1, 4, 3, 0]), labels) == pytest.approx(2 / 3)
    none = found._replace(ids=torch.full((4, 1), -1))
    assert np.isnan(health.neighbour_purity([none], torch.arange(4), labels))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"std": 0.02}, "collapsed to a point"),
        ({"rank": 5.0}, "collapsed to a subspace"),
        ({"distinct": 0.01}, "share a few hubs"),
    ],
)
def test_a_collapse_warns_once_in_words(values, words):
    healthy = {"std": 0.98, "rank": 60.0, "dim": 256, "samples": 128, "distinct": 0.7}
    monitor = health.CollapseMonitor(warmup=2, patience=3)
    said = [monitor.observe(step=i, **{**healthy, **(values if i >= 4 else {})}) for i in range(12)]
    assert [text is not None for text in said] == [i == 6 for i in range(12)]
    assert words in said[6]
    assert "step 6" in said[6]


def test_no_alarm_for_warm_up_dips_and_healthy_runs():
    monitor = health.CollapseMonitor(warmup=5, patience=3)
    bad = {"std": 0.0, "rank": 1.0, "dim": 64, "samples": 256, "distinct": 0.01}
    good = {"std": 0.97, "rank": 20.0, "dim": 64, "samples": 256, "distinct": 0.6}
    observations = [bad] * 5 + [good, bad, bad, good, bad] + [good] * 20
    assert [monitor.observe(step=i, **o) for i, o in enumerate(observations)] == [None] * 30


def test_monitor_continues_from_its_state():
    bad = {"std": 0.0, "rank": 1.0, "dim": 64, "samples": 256}
    one = health.CollapseMonitor(warmup=0, patience=3)
    assert [one.observe(step=i, **bad) for i in range(2)] == [None, None]
    two = health.CollapseMonitor(warmup=0, patience=3)
    two.load_state_dict(one.state_dict())
    assert two.observe(step=2, **bad) is not None
