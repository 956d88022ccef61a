"""The backbone as CUDA graphs, by torch's own capture: the same bits as kernel by kernel, step by step and in a run."""

import numpy as np
import pytest
import torch

from nnclr import pretrain
from nnclr.checkpoint import load_latest
from nnclr.exact import repeatable_convolutions
from nnclr.models import cuda_graphs
from nnclr.models.backbone import create_backbone
from nnclr.models.cuda_graphs import AllViews, in_few_launches
from tests.models.test_cuda_graphs import alike
from tests.settings import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

IMAGES, SIZES = 16, [32, 32, 24]


@pytest.fixture(autouse=True)
def steps_that_repeat(monkeypatch):
    """Kernels that add in a fixed order, as in a run, and graphs whatever they gain."""
    monkeypatch.setattr(cuda_graphs, "_LAUNCHING", 0.0)
    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr(cuda_graphs, "_seconds", lambda call: (call(), float(next(clock)))[1])
    with repeatable_convolutions():
        yield


def network(name, bf16):
    torch.manual_seed(1)
    backbone = create_backbone(name, 32, any_size=True).cuda().to(memory_format=torch.channels_last).train()
    return AllViews(backbone, bf16)


def steps(of):
    seen = []
    for step in range(3):
        torch.manual_seed(step)
        views = [torch.randn(IMAGES, 3, size, size, device="cuda") for size in SIZES]
        features = of(*(view.contiguous(memory_format=torch.channels_last) for view in views))
        of.zero_grad()
        sum(out.float().square().sum() for out in features).backward()
        seen += [out.detach().clone() for out in features] + [p.grad.clone() for p in of.parameters()]
        with torch.no_grad():
            for p in of.parameters():
                p -= 0.01 * p.grad
    return seen + [value.detach().clone() for value in (*of.parameters(), *of.buffers())]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["small-convnet", "resnet18"])
def test_graphs_give_the_same_bits(name, bf16):
    expected = steps(network(name, bf16))
    of = network(name, bf16)
    graphs, said = in_few_launches(of, SIZES, IMAGES)
    assert said.startswith("CUDA graphs of the backbone: ")
    assert graphs is not of
    assert alike(steps(graphs), expected)
    assert not alike(steps(graphs), expected)  # control: it has moved on


def test_dropped_paths_are_drawn_anew():
    import timm

    def of():
        torch.manual_seed(1)
        backbone = timm.create_model("resnet18", num_classes=0, drop_path_rate=0.5)
        backbone.maxpool = torch.nn.Identity()  # whose backward may add in no fixed order
        return AllViews(backbone.cuda().to(memory_format=torch.channels_last).train(), True)

    graphs, said = in_few_launches(of(), SIZES, IMAGES)
    assert said.startswith("CUDA graphs of the backbone: ")
    assert alike(steps(graphs), steps(of()))
    views = [torch.randn(IMAGES, 3, size, size, device="cuda") for size in SIZES]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    first, second = graphs(*views)[0].clone(), graphs(*views)[0].clone()
    assert not torch.equal(first, second)


def test_trying_leaves_no_trace():
    of, before = network("resnet18", True), network("resnet18", True)
    torch.manual_seed(5)
    states, stream = (torch.get_rng_state(), torch.cuda.get_rng_state()), torch.cuda.current_stream()
    assert in_few_launches(of, SIZES, IMAGES)[1].startswith("CUDA graphs of the backbone: ")
    assert torch.cuda.current_stream() == stream
    assert alike(list(of.state_dict().values()), list(before.state_dict().values()))
    assert all(p.grad is None for p in of.parameters())
    assert alike([torch.get_rng_state(), torch.cuda.get_rng_state()], states)


class Waiting(torch.nn.Module):
    """Cannot be captured: what it computes depends on a number that it waits for."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images):
        out = torch.nn.functional.dropout(self.layer(images).mean(dim=(2, 3)), 0.5, self.training)
        return out if out.sum().item() > 0 else 2 * out


def test_what_cannot_be_captured_is_left_alone():
    of = AllViews(Waiting().cuda().to(memory_format=torch.channels_last).train(), True)
    torch.manual_seed(5)
    state, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
    found, said = in_few_launches(of, SIZES, IMAGES)
    assert found is of
    assert said.startswith("launched kernel by kernel, since CUDA graphs cannot be had: ")
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(value.isfinite().all() for value in steps(of))


def test_a_run_by_graphs_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (120, 16, 16, 3), np.uint8)
    settings = TINY | {"device": "cuda", "precision": "bf16", "quiet": False}

    def run(name):
        found = pretrain(images, tmp_path / name, **settings)
        return list(load_latest(found.path / "checkpoints")[0].tensors.values())

    by_graphs = run("graphs")
    assert "CUDA graphs of the backbone: " in capsys.readouterr().out
    monkeypatch.setattr(cuda_graphs, "_DEVICE", "none")
    assert alike(by_graphs, run("kernels"))
    assert "CUDA graphs" not in capsys.readouterr().out


def test_its_own_measure_of_time_waits_for_the_device(monkeypatch):
    monkeypatch.undo()
    a = torch.randn(4096, 4096, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def call():
        begin.record()
        for _ in range(20):
            a @ a
        end.record()

    taken = cuda_graphs._seconds(call)
    end.synchronize()
    assert taken > 0.8e-3 * begin.elapsed_time(end)
