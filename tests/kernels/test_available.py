"""Where Triton works, its kernels are used; where it does not, a run goes on without them."""

import pytest
import torch

from nnclr.data import augment
from nnclr.kernels import available
from nnclr.support_set import _has_fast_form

pytest.importorskip("triton")

from nnclr.kernels import smallest_triton

CUDA = torch.device("cuda")


@pytest.fixture
def ampere(monkeypatch):
    """A machine with a device that Triton's kernels are for; `triton_works` asks anew."""
    available.triton_works.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    yield
    available.triton_works.cache_clear()


def test_kernels_are_used_where_the_smallest_one_runs(ampere, monkeypatch, recwarn):
    tried = []
    monkeypatch.setattr(smallest_triton, "run_smallest", tried.append)
    assert available.triton_works(CUDA)
    assert available.triton_works(CUDA)
    assert tried == [CUDA]
    assert _has_fast_form(CUDA)
    assert augment.triton_works is available.triton_works
    assert not recwarn.list


def test_without_a_compiler_a_run_goes_on_and_says_so_once(ampere, monkeypatch, recwarn):
    def fails(device):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(smallest_triton, "run_smallest", fails)
    assert not available.triton_works(CUDA)
    assert not _has_fast_form(CUDA)
    (warning,) = recwarn.list
    assert str(warning.message) == (
        "Triton cannot build kernels here (Failed to find C compiler. Please specify via CC environment variable.): "
        "views and neighbours are computed by PyTorch's own operations, which is slower; often a C compiler or "
        "Python's headers are missing"
    )


@pytest.mark.parametrize("lacking", ["Triton", "NVIDIA", "Ampere", "CUDA"])
def test_nothing_is_tried_where_no_kernel_could_run(ampere, lacking, monkeypatch, recwarn):
    monkeypatch.setattr(smallest_triton, "run_smallest", lambda device: pytest.fail("it was tried"))
    if lacking == "Triton":
        monkeypatch.setattr(available, "find_spec", lambda name: None)
    if lacking == "NVIDIA":
        monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD, which calls its devices cuda too
    if lacking == "Ampere":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not available.triton_works(torch.device("cpu") if lacking == "CUDA" else CUDA)
    assert not recwarn.list


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_smallest_kernel_runs_on_a_gpu():
    available.triton_works.cache_clear()
    assert available.triton_works(CUDA)
