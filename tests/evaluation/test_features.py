"""The feature cache: what is found in it is what would be computed, in bounded memory."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nnclr import progress
from nnclr.data.images import array_source
from nnclr.data.source import open_source
from nnclr.encoder import Encoder
from nnclr.evaluation import features
from nnclr.evaluation.features import cache_folder, cache_key, embedded
from nnclr.pretrained import random_encoder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "cache"))


def silent(text):
    pass


@pytest.fixture
def counted(monkeypatch):
    """Number of batches that went through an encoder."""
    calls = []
    real = Encoder.features
    monkeypatch.setattr(Encoder, "features", lambda self, views: calls.append(1) or real(self, views))
    return calls


def test_second_time_is_read_and_equal(pictures, counted):
    encoder, source = random_encoder("small-convnet", 16), array_source(*pictures)
    first = embedded(encoder, source, 0, silent)
    computed = len(counted)
    second = embedded(encoder, source, 0, silent)
    assert computed > 0
    assert len(counted) == computed
    assert isinstance(second, np.memmap)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, encoder.embed(source))
    second[:] = 0  # the caller's copy, not the file
    np.testing.assert_array_equal(embedded(encoder, source, 0, silent), first)


def test_key_depends_on_everything_that_the_features_depend_on(pictures, tmp_path):
    images, labels = pictures
    encoder, source = random_encoder("small-convnet", 16), array_source(images, labels)
    other_weights, other_size = random_encoder("small-convnet", 16, seed=1), random_encoder("small-convnet", 20)
    other_mean = Encoder(encoder.module, 16, mean=(0.5, 0.5, 0.5), name=encoder.name)
    other_crop = Encoder(encoder.module, 16, crop_pct=0.9, name=encoder.name)
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    keys = {cache_key(e, source) for e in (encoder, other_weights, other_size, other_mean, other_crop)}
    keys |= {cache_key(encoder, array_source(changed, labels)), cache_key(encoder, source.subset(np.arange(5)))}
    assert len(keys) == 7
    assert cache_key(random_encoder("small-convnet", 16), array_source(images.copy(), labels)) == cache_key(
        encoder, source
    )


def test_a_file_written_anew_is_noticed_although_its_size_stays(tmp_path):
    path = tmp_path / "data" / "a" / "x.bmp"
    path.parent.mkdir(parents=True)
    encoder = random_encoder("small-convnet", 16)
    found = []
    for grey in (10, 200):
        Image.new("RGB", (16, 16), (grey,) * 3).save(path)
        os.utime(path, (grey, grey))
        found.append(embedded(encoder, open_source(path.parents[1]), 0, silent))
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_module_of_ones_own_is_never_looked_up(pictures, counted):
    """Its code may change while its weights, here none, do not."""
    source = array_source(*pictures)
    outcomes = [
        embedded(Encoder(module, 16), source, 0, silent)
        for module in (nn.Flatten(), nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Flatten())
    ]
    assert len(counted) == 3
    assert not np.array_equal(outcomes[0], outcomes[1])
    assert not cache_folder().exists()


def test_damaged_entry_is_computed_anew_and_an_interrupted_one_leaves_nothing(pictures, monkeypatch):
    encoder, source = random_encoder("small-convnet", 16), array_source(*pictures)
    expected = np.array(embedded(encoder, source, 0, silent))
    (entry,) = cache_folder().glob("*.npy")
    for length in (200, 3, 0):
        entry.write_bytes(entry.read_bytes()[:length])
        np.testing.assert_array_equal(embedded(encoder, source, 0, silent), expected)
        np.testing.assert_array_equal(np.load(entry), expected)

    def interrupted(self, views):
        raise KeyboardInterrupt

    entry.unlink()
    monkeypatch.setattr(Encoder, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded(encoder, source, 0, silent)
    assert list(cache_folder().iterdir()) == []


def test_a_full_or_read_only_cache_is_said_and_does_without(pictures, monkeypatch, tmp_path):
    encoder, source, said = random_encoder("small-convnet", 16), array_source(*pictures), []
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    assert embedded(encoder, source, 0, said.append).shape == (120, 128)
    assert "not kept" in said[0]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "file"))
    assert embedded(encoder, source, 0, said.append).shape == (120, 128)
    assert len(said) == 2


def test_cache_is_kept_below_its_limit(pictures, monkeypatch):
    encoder, source = random_encoder("small-convnet", 16), array_source(*pictures)
    size = 120 * 128 * 4 + 128
    monkeypatch.setattr(features, "MOST_BYTES", 2 * size)
    for i in range(4):
        embedded(encoder, source.subset(np.roll(np.arange(120), i)), 0, silent)
        time.sleep(0.01)
    stale = cache_folder() / ".tmp-old.npy"
    stale.write_bytes(b"")
    os.utime(stale, (1, 1))
    embedded(encoder, source, 0, silent)
    assert len(list(cache_folder().glob("*.npy"))) == 2
    assert not stale.exists()


def test_progress_is_shown_on_long_work(pictures, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    source, said = array_source(np.repeat(pictures[0], 5, 0), None), []
    embedded(random_encoder("small-convnet", 16), source, 0, said.append)
    assert said
    assert "256 of 600 images" in said[0]
    assert "img/s" in said[0]


MEASURE = """
import sys, threading, time
import numpy as np, torch
torch.set_num_threads(1)
from nnclr.evaluation.knn import knn_accuracy
from nnclr.evaluation.linear import linear_accuracy
n, d = 40_000, 512
made = np.lib.format.open_memmap(sys.argv[1], mode="w+", dtype=np.float32, shape=(n, d))
rng = np.random.default_rng(0)
for start in range(0, n, 4000):
    made[start : start + 4000] = rng.normal(size=(4000, d))
made.flush()
del made
x = np.load(sys.argv[1], mmap_mode="c")
labels = np.arange(n) % 10
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
knn_accuracy(x[:2000], labels[:2000], x[:100], labels[:100], 10)  # what the libraries themselves need
linear_accuracy(x[:2000], labels[:2000], x[:100], labels[:100], 10, epochs=1)
before, peak, running = anonymous(), [0.0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
if sys.argv[2] == "knn":
    knn_accuracy(x, labels, x[:1000], labels[:1000], 10)
elif sys.argv[2] == "linear":
    linear_accuracy(x, labels, x[:1000], labels[:1000], 10, epochs=2)
else:
    kept = torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
    time.sleep(0.1)  # so that the watcher sees it whole
running[0] = False
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")
def test_no_protocol_copies_the_features(tmp_path):
    """82 MB of features from disk; the control is a normalised copy of them."""

    # Freed blocks go back at once, or the account holds what the allocator keeps for later, 40 MB more or less.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

    def extra(protocol):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "x.npy"), protocol]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(answer.stdout)

    megabytes = 40_000 * 512 * 4 / 2**20
    assert extra("copy") > 0.9 * megabytes
    assert extra("linear") < 0.3 * megabytes  # blocks of 2048 rows in float64
    assert extra("knn") < 0.8 * megabytes  # blocks of similarities, whatever the number of rows
    assert torch.get_num_threads() == 1
