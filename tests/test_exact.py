"""Float32 that is float32 whatever a program has asked for, convolutions that repeat, and where both are used."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from torch import nn

import nnclr
from nnclr.encoder import Encoder
from nnclr.evaluation.knn import nearest_rows
from nnclr.exact import exact_float32, repeatable_convolutions
from tests import reference
from tests.accelerator import NAME, accelerator

CUDNN, PRODUCTS, ON_CPU = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
CPU = torch.device("cpu")


@pytest.fixture
def shortcuts():
    """What a program can ask for, each part by itself, after which `get_float32_matmul_precision` is an error."""
    parts = (PRODUCTS, ON_CPU, CUDNN.conv)
    before = [part.fp32_precision for part in parts]
    PRODUCTS.fp32_precision, ON_CPU.fp32_precision, CUDNN.conv.fp32_precision = "tf32", "bf16", "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    yield
    for part, precision in zip(parts, before, strict=True):
        part.fp32_precision = precision


def asked_for():
    return PRODUCTS.fp32_precision, ON_CPU.fp32_precision, CUDNN.conv.fp32_precision


def test_everything_is_exact_inside_and_as_it_was_afterwards(shortcuts):
    with contextlib.suppress(KeyError), exact_float32(CPU):
        assert asked_for() == ("ieee",) * 3
        assert torch.get_float32_matmul_precision() == "highest"
        raise KeyError
    assert asked_for() == ("tf32", "bf16", "tf32")


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_the_older_switches_are_turned_where_they_can_be_read(asked):
    """So that others who read them inside, as torch's compiler does, meet no error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        read = PRODUCTS.allow_tf32
        with exact_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not PRODUCTS.allow_tf32
            with CUDNN.flags(enabled=False, allow_tf32=CUDNN.allow_tf32):
                assert not CUDNN.allow_tf32
        assert (torch.get_float32_matmul_precision(), PRODUCTS.allow_tf32, CUDNN.allow_tf32) == (asked, read, True)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("context", [lambda: exact_float32(CPU), repeatable_convolutions], ids=["float32", "order"])
def test_threads_that_overlap_leave_nothing_switched(context):
    def switches():
        return *asked_for(), torch.get_float32_matmul_precision(), CUDNN.deterministic, CUDNN.benchmark

    before, first_is_in, second_is_in, first_is_out = switches(), *(threading.Event() for _ in range(3))
    inside = []

    def first():
        with context():
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    def second():
        first_is_in.wait(10)
        with context():
            second_is_in.set()
            first_is_out.wait(10)
            inside.append(switches())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches() == before
    assert inside[0] != before  # who is still inside still has what it asked for


def crowd(m):
    """Rows around one centre, whose similarities bfloat16 does not tell apart."""
    return torch.randn(1, 64) + 0.15 * torch.randn(m, 64)


@pytest.mark.parametrize("search", ["support set", "kNN"])
def test_neighbours_are_exact_where_a_program_asks_for_shortcuts(search, shortcuts, monkeypatch):
    inside, normalize = set(), torch.nn.functional.normalize
    noting = lambda x, **options: (inside.add(asked_for()), normalize(x, **options))[1]  # noqa: E731
    vectors = crowd(600)
    queries = vectors[512:]
    unit = reference.unit(vectors.double().numpy())
    expected = (unit[512:] @ unit[:512].T).argmax(axis=1)
    if search == "support set":
        made = nnclr.SupportSet(512, 64)
        made.enqueue(vectors[:512], torch.arange(512))
        monkeypatch.setattr(torch.nn.functional, "normalize", noting)
        found = made.nearest(queries).ids[:, 0]
    else:
        monkeypatch.setattr(torch.nn.functional, "normalize", noting)
        found = nearest_rows(vectors[:512], queries, 1)[1][:, 0]
    assert found.tolist() == expected.tolist()
    assert inside == {("ieee",) * 3}  # not every CPU has a shortcut that would show
    assert asked_for() == ("tf32", "bf16", "tf32")


def test_convolutions_repeat_inside_and_are_as_they_were_afterwards(monkeypatch):
    monkeypatch.setattr(CUDNN, "benchmark", True)
    with contextlib.suppress(KeyError), repeatable_convolutions():
        assert (CUDNN.deterministic, CUDNN.benchmark) == (True, False)
        raise KeyError
    assert (CUDNN.deterministic, CUDNN.benchmark) == (False, True)


class Noting(nn.Module):
    """A backbone that notes how it would be computed on CUDA."""

    seen: set = set()  # noqa: RUF012  (of the class: encoders copy modules)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images):
        mode = "training" if self.training else "evaluation"
        self.seen.add((mode, CUDNN.deterministic, CUDNN.benchmark, CUDNN.allow_tf32))
        return self.layer(images.mean(dim=(2, 3)))


@pytest.fixture
def noting(monkeypatch):
    monkeypatch.setattr(Noting, "seen", set())
    monkeypatch.setattr(CUDNN, "benchmark", True)
    return Noting()


def test_a_run_repeats_its_convolutions(pictures, tiny, tmp_path, noting, monkeypatch):
    """Or a resumed run would not have the weights of the uninterrupted one."""
    del tiny["backbone"]
    with accelerator(monkeypatch):
        nnclr.pretrain(pictures, tmp_path / "run", backbone=noting, **tiny | {"epochs": 1, "device": NAME})
    assert {seen for seen in noting.seen if seen[0] == "training"} == {("training", True, False, True)}
    assert {seen for seen in noting.seen if seen[0] == "evaluation"} >= {("evaluation", True, False, False)}
    assert (CUDNN.deterministic, CUDNN.benchmark) == (False, True)


def test_features_are_float32_on_a_device_and_leave_the_switches_alone_on_the_cpu(noting, monkeypatch):
    """On the CPU it may be the thread that writes a checkpoint, while a step computes on the device."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    Encoder(noting, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).embed(images)
    assert noting.seen == {("evaluation", False, True, True)}
    noting.seen.clear()
    with accelerator(monkeypatch):
        Encoder(noting.to(NAME), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).embed(images)
    assert noting.seen == {("evaluation", True, False, False)}


def test_fine_tuning_repeats(pictures, noting, monkeypatch):
    with accelerator(monkeypatch):
        encoder = Encoder(noting.to(NAME), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        nnclr.evaluate(encoder, pictures, protocol="finetune", epochs=1)
    assert {seen[:3] for seen in noting.seen} == {("training", True, False), ("evaluation", True, False)}
