"""Threads that decode: how many there are, and how far they work ahead."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import nnclr
from nnclr.data import ahead as module
from nnclr.data.ahead import Threads, threads_for
from nnclr.embed import embed_to_file
from nnclr.encoder import Encoder


@pytest.mark.parametrize(
    ("asked", "cores", "threads"), [(None, 3, 3), (None, 64, 8), (None, None, 1), (5, 2, 5), (1, 4, 1), (0, 4, 1)]
)
def test_threads_are_as_many_as_asked_for_or_as_cores(asked, cores, threads, monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    assert threads_for(asked) == threads


def test_batches_are_given_in_order_while_the_next_one_is_under_way():
    begun, seen = [], []
    may_end = threading.Event()

    def work(i):
        begun.append(i)
        if i >= 3:
            assert may_end.wait(10)
        return -i

    with Threads(4) as pool:
        batches = pool.map_batches(work, [range(3), range(3, 5), range(5, 9), []])
        seen.append(next(batches))
        while len(begun) < 5:  # the second batch begins though nobody has asked for it
            threading.Event().wait(0.001)
        assert max(begun) == 4  # and the one after it does not
        may_end.set()
        seen += batches
    assert seen == [[0, -1, -2], [-3, -4], [-5, -6, -7, -8], []]


def test_no_batches_are_none():
    with Threads(1) as pool:
        assert list(pool.map_batches(abs, [])) == []


class Mean(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize("asked", [{}, {"num_workers": 3}])
def test_features_are_computed_with_the_default_of_threads(asked, tmp_path, monkeypatch):
    """In Python and by `nnclr embed` and `evaluate`, which say nothing of a number themselves."""
    counts, init = [], Threads.__init__

    def counting(self, count, *rest):
        counts.append(count)
        init(self, count, *rest)

    monkeypatch.setattr(module.os, "cpu_count", lambda: 5)
    monkeypatch.setattr(Threads, "__init__", counting)
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
    encoder = Encoder(Mean(), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    encoder.embed(images, **asked)
    embed_to_file(encoder, images, tmp_path / "e.npy", **asked)
    nnclr.evaluate(encoder, (images, labels), protocol="knn", **asked)
    assert set(counts) == {asked.get("num_workers", 5)}
    assert len(counts) >= 3
    assert torch.equal(torch.tensor(encoder.embed(images)), torch.tensor(encoder.embed(images, num_workers=1)))
