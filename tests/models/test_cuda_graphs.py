"""The backbone as CUDA graphs: what is tried beforehand, and a whole run, by a stand-in that works on the CPU.

The stand-in for `torch.cuda.make_graphed_callables` keeps its ways: numbers pass through the same memory in every step,
and the backward is that of the last forward. tests/gpu/test_cuda_graphs.py takes the real one.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnclr import pretrain, report
from nnclr.checkpoint import load_latest
from nnclr.errors import NNCLRError
from nnclr.models import cuda_graphs
from nnclr.models.cuda_graphs import AllViews, in_few_launches

IMAGES, SIZES = 6, [12, 12, 8]


class Backbone(nn.Module):
    """Batch norm moves buffers, dropout draws random numbers, and one weight is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Linear(5, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, images):
        return self.last(F.dropout(self.norm(self.first(images)).relu().mean(dim=(2, 3)), 0.3, self.training))


class StandIn:
    """Called like `torch.cuda.make_graphed_callables`; counts its calls. A fault is what a graph may get wrong."""

    def __init__(self, fault=None):
        self.fault, self.made, self.replays = fault, 0, 0

    def __call__(self, module, samples, allow_unused_input=False):
        assert allow_unused_input
        assert not torch.is_autocast_enabled("cpu")  # the real one allows no casts that are kept
        self.made += 1
        if isinstance(self.fault, Exception):
            raise self.fault
        plain, weights, samples = module.forward, tuple(module.parameters()), tuple(samples)
        for _ in range(3):
            static = [out.detach().clone() for out in plain(*samples)]
        tape, gradients = [], [torch.empty_like(p) for p in weights]
        buffers, then_weights = list(module.buffers()), [p.detach().clone() for p in weights]

        def swap_weights():
            if self.fault == "old weights":
                for i, p in enumerate(weights):
                    p.data, then_weights[i] = then_weights[i], p.data

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *given):
                self.replays += 1
                for gradient in gradients:  # lie in memory that a forward may use as well
                    gradient.fill_(torch.nan)
                for sample, new in zip(samples, given, strict=False):
                    if self.fault != "old images":
                        assert (new.dtype, new.shape, new.stride()) == (sample.dtype, sample.shape, sample.stride())
                        sample.copy_(new)
                before = [buffer.clone() for buffer in buffers]
                if self.fault == "other random numbers":
                    torch.rand(1)
                swap_weights()
                with torch.enable_grad():
                    tape[:] = plain(*samples)
                swap_weights()
                for kept, out in zip(static, tape, strict=True):
                    kept.copy_(out)
                if self.fault == "still buffers":
                    for buffer, then in zip(buffers, before, strict=True):
                        buffer.data.copy_(then)
                return tuple(out.detach() for out in static)

            @staticmethod
            def backward(ctx, *towards):
                found = torch.autograd.grad(tape, weights, towards, allow_unused=True)
                for kept, gradient in zip(gradients, found, strict=True):
                    if gradient is not None:
                        kept.copy_(gradient)
                if self.fault == "gradient a bit off":
                    gradients[-1][0] *= 1 + 2**-22
                if self.fault == "not a number":
                    gradients[-1][0] = torch.nan
                given = (None if new is None else kept.detach() for new, kept in zip(found, gradients, strict=True))
                return (*(None for _ in samples), *given)

        module.forward = lambda *views: Graphed.apply(*views, *weights)
        return module


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in into torch's place, for networks on the CPU, with times of a step that speak for graphs."""

    def put(fault=None, times=(5e-3, 4e-3, 3e-3)):
        made, left = StandIn(fault), iter(())

        def seconds(call):
            nonlocal left
            call()
            if (time := next(left, None)) is None:
                left = iter(times)
                time = next(left)
            return time

        monkeypatch.setattr(cuda_graphs, "_DEVICE", "cpu")
        monkeypatch.setattr(cuda_graphs, "_seconds", seconds)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", made)
        return made

    return put


def network(bf16=False):
    torch.manual_seed(1)
    return AllViews(Backbone().to(memory_format=torch.channels_last).train(), bf16)


def views(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    made = (torch.randn(IMAGES, 3, size, size, generator=draw) for size in SIZES)
    return [view.to(dtype, memory_format=torch.channels_last) for view in made]


def steps(of, dtype=torch.float32):
    """Three steps of descent: features, gradients, and in the end weights and buffers."""
    seen = []
    for step in range(3):
        torch.manual_seed(step)
        features = of(*views(step, dtype))
        of.zero_grad()
        sum(out.square().sum() for out in features).backward()
        seen += [out.detach().clone() for out in features]
        with torch.no_grad():
            for p in of.parameters():
                if p.grad is not None:
                    seen.append(p.grad.clone())
                    p -= 0.1 * p.grad
    return seen + [value.detach().clone() for value in (*of.parameters(), *of.buffers())]


def alike(these, those):
    return len(these) == len(those) and all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize(
    ("bf16", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)], ids=str
)
def test_graphs_give_the_same_bits(stand_in, bf16, dtype):
    made, plain = stand_in(), network(bf16)
    expected = steps(plain, dtype)
    of = network(bf16)
    graphs, said = in_few_launches(of, SIZES, IMAGES, dtype)
    assert graphs is not of
    assert graphs.backbone is of.backbone
    assert said == "CUDA graphs of the backbone: 3.00 ms instead of 5.00 a step"
    before = made.replays
    assert alike(steps(graphs, dtype), expected)
    assert made.replays == before + 3
    features = graphs(*views(0, dtype))
    then = [out.clone() for out in features]
    graphs(*views(1, dtype))
    assert alike(features, then)  # they outlive the next step
    assert of.forward.__func__ is AllViews.forward  # who holds the network itself holds no graphs
    other = network(bf16)
    other.backbone.norm.momentum = 0.2
    assert not alike(steps(other, dtype), expected)  # control


def test_trying_leaves_no_trace(stand_in, monkeypatch):
    stand_in()

    def changed():
        of, before = network(), network()
        torch.manual_seed(5)
        state = torch.get_rng_state()
        in_few_launches(of, SIZES, IMAGES)
        found = alike(list(before.state_dict().values()), list(of.state_dict().values()))
        return (
            not found,
            any(p.grad is not None for p in of.parameters()),
            not torch.equal(state, torch.get_rng_state()),
        )

    assert changed() == (False, False, False)
    monkeypatch.setattr(cuda_graphs, "buffers_as_now", lambda of: nullcontext())  # controls
    assert changed() == (True, False, False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    assert changed() == (True, False, True)


@pytest.mark.parametrize(
    "fault",
    ["old images", "old weights", "other random numbers", "still buffers", "gradient a bit off", "not a number"],
)
def test_graphs_that_compute_something_else_are_not_used(stand_in, fault):
    made, of = stand_in(fault), network()
    found, said = in_few_launches(of, SIZES, IMAGES)
    assert found is of
    assert made.made == 1
    assert said.startswith("launched kernel by kernel, since CUDA graphs differ from it by ")
    assert alike(steps(of), steps(network()))


def test_a_network_whose_steps_differ_may_differ_as_much_as_a_graph(stand_in):
    """Kernels that add in no fixed order: equal bits cannot be had of them anyway."""
    unseeded = torch.Generator()

    def shaken(of, size):
        of.backbone.last.register_forward_hook(
            lambda module, given, out: out + size * torch.rand(out.shape, generator=unseeded.manual_seed(next(number)))
        )
        return of

    number = iter(range(1000))
    stand_in()
    assert in_few_launches(shaken(network(), 1e-4), SIZES, IMAGES)[1].startswith("CUDA graphs of the backbone: ")
    for fault in ("old images", "gradient a bit off"):  # controls: each tensor may differ as much as itself
        stand_in(fault)
        of = shaken(network(), 1e-4)
        assert in_few_launches(of, SIZES, IMAGES)[0] is of


def test_what_is_not_finite_cannot_be_compared(stand_in):
    stand_in()
    of = network()
    with torch.no_grad():
        of.backbone.first.weight[0] = torch.nan
    found, said = in_few_launches(of, SIZES, IMAGES)
    assert found is of
    assert said == "launched kernel by kernel, since CUDA graphs differ from it by nan"


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_capture_that_fails_is_said(stand_in, monkeypatch, kind):
    stand_in(kind("operation not permitted when stream is capturing\nand a long explanation"))
    of = network()
    state = torch.get_rng_state()
    found, said = in_few_launches(of, SIZES, IMAGES)
    assert found is of
    assert said == (
        "launched kernel by kernel, since CUDA graphs cannot be had: operation not permitted when stream is capturing"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert alike(steps(of), steps(network()))

    def broken(*arguments, **options):
        raise RuntimeError("Offset increment outside graph capture")

    monkeypatch.setattr(torch, "rand", broken)  # what a failed capture may leave behind
    with pytest.raises(
        NNCLRError, match=r"\(operation not permitted.*\).*again with NNCLR_CUDA_GRAPHS=0 in the env"
    ) as told:
        in_few_launches(of, SIZES, IMAGES)
    assert told.value.exit_code == 1


def test_an_environment_variable_leaves_graphs_out(stand_in, monkeypatch):
    made, of = stand_in(), network()
    monkeypatch.setenv("NNCLR_CUDA_GRAPHS", "0")
    assert in_few_launches(of, SIZES, IMAGES) == (of, "")
    assert made.made == 0
    monkeypatch.setenv("NNCLR_CUDA_GRAPHS", "1")
    assert in_few_launches(of, SIZES, IMAGES)[0] is not of


@pytest.mark.parametrize(
    ("times", "captured", "used"),
    [
        ((5e-3, 3.4e-3, 1e-3), 0, False),  # most of the time goes into computing, whatever a graph would take
        ((5e-3, 3.6e-3, 4.9e-3), 1, True),
        ((5e-3, 3.6e-3, 5.1e-3), 1, False),  # slower
    ],
)
def test_graphs_are_for_steps_that_wait_for_launches(stand_in, times, captured, used):
    made, of = stand_in(times=times), network()
    sizes = []
    of.backbone.first.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    found, said = in_few_launches(of, SIZES, IMAGES)
    assert sizes[:6] == [IMAGES] * 3 + [2] * 3  # those of two images tell how long launching takes
    assert made.made == captured
    assert (found is not of) == used == bool(said)


def test_nothing_is_tried_on_a_cpu(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", made)
    monkeypatch.setattr(cuda_graphs, "_seconds", lambda call: 1 / 0)
    of = network()
    assert in_few_launches(of, SIZES, IMAGES) == (of, "")
    assert made.made == 0


def test_seconds_are_the_median_of_calls_that_are_warm(monkeypatch):
    clock, took = [0.0], iter([100.0, 1.0, 5.0, 2.0, 4.0, 3.0])

    def call():
        clock[0] += next(took)

    monkeypatch.setattr(cuda_graphs.time, "perf_counter", lambda: clock[0])
    assert cuda_graphs._seconds(call) == 3.0


def test_views_are_computed_in_the_precision_that_is_asked_for():
    assert [out.dtype for out in network(True)(*views(0))] == [torch.bfloat16] * 3
    assert [out.dtype for out in network(False)(*views(0))] == [torch.float32] * 3


# ---- whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, tiny, pictures, monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda run, **_: tmp_path)
    numbers = iter(range(100))

    def run(**fields):
        settings = tiny | {"epochs": 1.0, "quiet": False} | fields
        found = pretrain(np.ascontiguousarray(pictures[0]), tmp_path / str(next(numbers)), **settings)
        return load_latest(found.path / "checkpoints")[0].tensors

    return run


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "bf16"},
        {"objective": "byol", "support_set_size": None, "optimizer": "sgd"},
        {"augmentation": "multi-crop", "small_views": 2, "small_view_size": 8},
        {"clip_grad_norm": 0.1, "ema_momentum": 0.9},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_a_run_by_graphs_ends_with_the_same_bits(trained, stand_in, fields, capsys):
    expected = trained(**fields)
    made = stand_in()
    found = trained(**fields)
    assert made.made == 1
    assert made.replays > 3
    assert "CUDA graphs of the backbone: 3.00 ms instead of 5.00 a step\n" in capsys.readouterr().out
    assert found.keys() == expected.keys()
    assert alike(list(found.values()), list(expected.values()))
    assert not alike(list(trained(**fields, seed=1).values()), list(expected.values()))  # control


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_run_computes_in_its_precision(trained, precision, dtype):
    backbone, seen = Backbone(), []
    backbone.last.register_forward_hook(lambda module, given, out: seen.append(out.dtype) if module.training else None)
    trained(backbone=backbone, precision=precision, evaluate_every_epochs=0)
    assert seen[-10:] == [dtype] * 10


@pytest.mark.parametrize(
    "fields", [{"backbone": Backbone()}, {"grad_cache": 8}, {"recompute": True}], ids=lambda fields: next(iter(fields))
)
def test_what_a_graph_cannot_hold_is_launched_kernel_by_kernel(trained, stand_in, fields):
    """Modules of one's own may do anything in Python; what computes twice is left alone."""
    made = stand_in()
    trained(**fields)
    assert made.made == 0
    trained()
    assert made.made == 1  # control


def test_a_finished_run_tries_nothing(stand_in, tmp_path, tiny, pictures):
    made = stand_in()
    for _ in range(2):
        pretrain(np.ascontiguousarray(pictures[0]), tmp_path / "run", **tiny | {"epochs": 1.0})
        assert made.made == 1
