"""The fast look-up finds what a float64 comparison of everything finds, and its certificate is needed."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnclr.kernels import lookup
from nnclr.support_set import SupportSet


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def clusters(m, d, similarity, seed=0):
    """m unit vectors around m / 64 centres, with about this cosine inside a cluster; and queries of the same kind."""
    centres = unit(m // 64, d, seed=seed)[torch.arange(m) % (m // 64)]
    spread = (1 / similarity - 1) ** 0.5
    vectors = F.normalize(centres + spread * unit(m, d, seed=seed + 1), dim=1)
    return vectors, F.normalize(centres[:96] + spread * unit(96, d, seed=seed + 2), dim=1)


def exact(z, vectors, k):
    scores = z.double().numpy() @ vectors.double().numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def by_all(vectors, filled, k, calls=None):
    def plain(z):
        if calls is not None:
            calls.append(len(z))
        scores = z @ vectors.T
        scores[:, int(filled) :] = -torch.inf
        return lookup.stable_topk(scores, k)

    return plain


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("m", [4096, 4111])
@pytest.mark.parametrize("similarity", [None, 0.68, 0.93, 0.97])
def test_equal_to_a_float64_comparison_of_everything(k, m, similarity):
    if similarity is None:
        vectors, z = unit(m, 48), unit(96, 48, seed=5)
    else:
        vectors, z = clusters(m, 48, similarity)
    calls = []
    found, slots = lookup.nearest_slots(z, vectors, torch.tensor(m), k, 1000, by_all(vectors, m, k, calls))
    best, order = exact(z, vectors, k)
    np.testing.assert_allclose(found.numpy(), best, atol=1e-6)
    picked = np.take_along_axis(z.double().numpy() @ vectors.double().numpy().T, slots.numpy(), 1)
    np.testing.assert_allclose(picked, best, atol=1e-6)
    assert (slots.numpy() == order).mean() > 0.99  # the rest are equal to 1e-6
    if similarity is None and k == 1:
        assert sum(calls) < 20  # most queries by the fast way
    # control: what bfloat16 alone picks
    half = (z.bfloat16() @ vectors.bfloat16().T).float().argmax(dim=1)
    if similarity is not None and similarity > 0.9:
        assert (half.numpy() == order[:, 0]).mean() < 0.95


def test_without_the_error_bound_the_wrong_neighbour_is_picked(monkeypatch):
    vectors, z = clusters(4096, 48, 0.97)
    plain = by_all(vectors, 4096, 1)
    _, order = exact(z, vectors, 1)
    _, right = lookup.nearest_slots(z, vectors, torch.tensor(4096), 1, 1024, plain)
    assert (right.numpy() == order).all()
    monkeypatch.setattr(lookup, "least_maximum", lambda kth, _: kth)
    _, wrong = lookup.nearest_slots(z, vectors, torch.tensor(4096), 1, 1024, plain)
    assert (wrong.numpy() != order).any()


def test_rounding_is_bounded_where_it_is_worst():
    """All elements just above the middle of two bfloat16 numbers, so that every one is rounded up."""
    z = torch.zeros(1, 256)
    z[:, :128] = 2.0**-4 * (1 + 2.0**-8 + 2.0**-12)
    maximum = lookup.group_maxima(z, z.repeat(lookup.GROUP, 1), torch.tensor(lookup.GROUP), 4096)[0].float()
    truth = (z.double() @ z.double().T)[0]
    error = maximum.double() - truth
    assert error > 1.7 * lookup.ROUNDING * truth  # both factors moved by nearly all that one can be
    margin = maximum - lookup.least_maximum(maximum, z)
    assert 2 * error < margin < 5 * error  # two such errors, in opposite directions, are allowed for


@pytest.mark.parametrize("d", [8, 256, 2048])
def test_errors_of_random_vectors_are_within_the_margin(d):
    z, vectors = unit(50, d), unit(400, d, seed=1)
    each = vectors.repeat_interleave(lookup.GROUP, 0)  # groups of one vector
    maxima = lookup.group_maxima(z, each, torch.tensor(len(each)), 4096).float().T
    error = (maxima.double() - z.double() @ vectors.double().T).abs().max(dim=1).values
    kth = maxima.amax(dim=1)
    margin = kth - lookup.least_maximum(kth, z)
    assert (2 * error < margin).all()
    assert (error > 2.0**-14).all()  # control: there are errors


@pytest.mark.parametrize("filled", [0, 1, 70, 2500, 4096, 9000])
@pytest.mark.parametrize("k", [1, 3])
def test_support_set_that_is_partly_filled(filled, k):
    made = SupportSet(4096, 16)
    made.enqueue(-torch.rand(filled, 16), torch.arange(filled))  # similarities below 0: an unfilled slot would win
    z = torch.rand(40, 16)
    found = made.nearest(z, k)
    best, order = exact(F.normalize(z), made.vectors[: min(filled, 4096)], k)
    have = order.shape[1]
    np.testing.assert_allclose(found.similarities[:, :have].numpy(), best, atol=1e-6)
    assert (found.similarities[:, have:] == -torch.inf).all()
    assert (found.ids[:, have:] == -1).all()


@pytest.mark.parametrize("m", [2049, 4111])
@pytest.mark.parametrize("k", [1, 3, 200])
def test_a_set_that_has_wrapped_around_at_any_size(m, k):
    """More was enqueued than there are slots, and the last group is not full: its spare slots do not exist."""
    made = SupportSet(m, 48)
    for start in range(0, 5 * m, m):
        made.enqueue(unit(m, 48, seed=start), torch.arange(start, start + m))
    z = torch.cat([unit(40, 48, seed=9), made.vectors[-3:]])  # the last slots are somebody's nearest
    best, order = exact(z, made.vectors, k)
    found = made.nearest(z, k)
    np.testing.assert_allclose(found.similarities.numpy(), best, atol=1e-6)
    assert (found.ids[-3:, 0] == made.ids[-3:]).all()
    assert (found.ids.numpy() == made.ids.numpy()[order]).mean() > 0.99


def test_crowded_vectors_are_compared_with_all_after_a_few_queries():
    alike = F.normalize(unit(1, 64) + 0.02 * unit(4096, 64, seed=3), dim=1)
    calls = []
    _, slots = lookup.nearest_slots(alike[:500], alike, torch.tensor(4096), 1, 1024, by_all(alike, 4096, 1, calls))
    assert calls == [500]
    assert slots[:, 0].tolist() == list(range(500))


def test_the_lowest_slot_wins_among_duplicates():
    vectors = unit(4096, 24)
    vectors[[100, 900, 901, 4000]] = vectors[7].clone()
    z = vectors[[7, 5, 100]]
    _, slots = lookup.nearest_slots(z, vectors, torch.tensor(4096), 3, 512, by_all(vectors, 4096, 3))
    assert slots[[0, 2]].tolist() == [[7, 100, 900]] * 2
    assert slots[1, 0] == 5


def test_queries_with_very_many_candidates_are_compared_with_all():
    vectors, z = unit(4096, 64), unit(50, 64, seed=5)
    alike = F.normalize(unit(1, 64) + 0.02 * unit(4096, 64, seed=3), dim=1)
    calls = []
    lookup.nearest_slots(alike[:7], alike, torch.tensor(4096), 1, 1024, by_all(alike, 4096, 1, calls))
    assert calls == [7]
    mixed = torch.cat([z, torch.zeros(2, 64)])  # nothing is nearest to zero: all slots are candidates
    calls.clear()
    found, slots = lookup.nearest_slots(mixed, vectors, torch.tensor(4096), 1, 1024, by_all(vectors, 4096, 1, calls))
    assert 2 <= sum(calls) < 10
    assert (slots[:50].numpy() == exact(z, vectors, 1)[1]).all()
    assert (found[50:] == 0).all()


def test_a_query_that_is_not_finite_finds_nothing():
    made = SupportSet(4096, 16)
    made.enqueue(unit(4096, 16), torch.arange(4096))
    z = unit(3, 16, seed=4)
    z[1, 3] = torch.nan
    found = made.nearest(z)
    assert found.similarities.isfinite().flatten().tolist() == [True, False, True]
    assert found.ids[1] == -1


INTERPRETED = """
import numpy as np, torch, torch.nn.functional as F
from nnclr.kernels import lookup, lookup_triton
from tests.kernels.test_lookup import clusters, exact, unit
lookup_triton._SCAN = 16
checked = 0
for d in (24, 100):
    for m, filled in ((300, 5000), (400, 277), (130, 2)):
        for k in (1, 4):
            vectors, z = (unit(m, d), unit(9, d, seed=5)) if m != 400 else clusters(448, d, 0.97)
            vectors, z = vectors[:m].clone(), z[:5]
            vectors[5] = vectors[1].clone()  # a tie
            vectors[filled:] = 7.0  # must not be read
            vectors = torch.cat([vectors, torch.full((200, d), 9.0)])[:m]  # nor what lies behind
            z[2] = vectors[1]
            best, slots = lookup_triton.nearest_slots_triton(z, vectors, torch.tensor(filled), k)
            expected, order = exact(z, vectors[: min(filled, m)], k)
            have = order.shape[1]
            np.testing.assert_allclose(best[:, :have].numpy(), expected, atol=1e-6)
            assert (best[:, have:] == -torch.inf).all()
            if filled > 5:
                assert slots[2, : min(k, 2)].tolist() == [1, 5][: min(k, 2)]
            near = np.abs(np.diff(expected, axis=1)).min(axis=1) > 1e-6 if have > 1 else np.ones(5, bool)
            assert (slots[near, :have].numpy() == order[near]).all()
            checked += 1
vectors, z = clusters(1024, 48, 0.97)
expected = exact(z[:6], vectors, 1)[1]
right = lookup_triton.nearest_slots_triton(z[:6], vectors, torch.tensor(1024), 1)[1]
lookup_triton.least_maximum = lambda kth, _: kth + 1.0  # no group is a candidate
none = lookup_triton.nearest_slots_triton(z[:6], vectors, torch.tensor(1024), 1)[0]
print(checked, (right.numpy() == expected).all(), bool((none == -torch.inf).all()))
"""


def test_triton_kernels_in_the_interpreter():
    """The same kernels as on a GPU, run by Triton's interpreter; the last word is the control."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["12", "True", "True"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("similarity", [0.68, 0.97])
def test_on_a_gpu(k, similarity):
    vectors, z = clusters(16384, 256, similarity)
    made = SupportSet(16384, 256).to("cuda")
    made.enqueue(vectors.cuda(), torch.arange(16384, device="cuda"))
    best, order = exact(z, vectors, k)
    found = made.nearest(z.cuda(), k)
    np.testing.assert_allclose(found.similarities.cpu().numpy(), best, atol=1e-6)
    assert (found.ids.cpu().numpy() == order).mean() > 0.99
