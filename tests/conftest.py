import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads are slower than one on a busy machine

import numpy as np
import pytest
import torch

from nnclr import plots
from tests.reliability.record import pytest_runtest_logreport, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 - hooks
from tests.settings import TINY

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def curves():
    """A test that asks for this is about curves.png, and has it drawn."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing them takes half a second at the end of each run, of which there are hundreds."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(plots, "draw_curves", lambda run: None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Features that a test computes are no other's, and not the user's."""
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def pictures():
    """120 random 16 x 16 pictures of 4 classes: a class colour under noise, and the labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 4
    colours = rng.integers(0, 256, (4, 1, 1, 3))
    noise = rng.integers(-40, 40, (120, 16, 16, 3))
    return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels


@pytest.fixture
def tiny():
    """Settings of a run of 20 steps that takes about a second."""
    return dict(TINY)
