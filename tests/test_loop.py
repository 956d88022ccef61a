"""The training loop against a loop written out here: rate, clipping, averaged weights, targets, order of updates."""

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import nnclr
from nnclr import distributed, report, training
from nnclr.config import make_config
from nnclr.data.loader import create_loader
from nnclr.data.source import open_source
from nnclr.errors import InputError
from tests import reference

CPU = torch.device("cpu")
STEPS, PER_EPOCH, WARMUP, RATE, DECAY, CLIP, BASE = 8, 5, 2.0, 0.005, 0.01, 12.0, 0.9


class Smooth(nn.Module):
    """A backbone without kinks: at those, rounding would grow with every step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.GELU()),
            *(nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.GELU()),
        )

    def forward(self, images):
        return self.layers(images).mean(dim=(2, 3))


def test_a_batch_of_one_image_a_process_is_refused(monkeypatch, pictures, tiny):
    """Batch norms would have nothing to norm by; two are enough."""
    monkeypatch.setattr(distributed, "agree", lambda values: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    source, tiny = open_source(pictures), tiny | {"batch_size": 16}
    del tiny["quiet"]
    training.check_ranks(make_config("data", "out", **tiny), source)
    with pytest.raises(
        InputError, match="batch_size=8 gives each of 8 processes one image, too few for batch norms; use at least 16"
    ):
        training.check_ranks(make_config("data", "out", **tiny | {"batch_size": 8}), source)
    cuda = tiny | {"batch_size": 8, "device": "cuda"}  # where batch norms look at all processes
    training.check_ranks(make_config("data", "out", **cuda), source)
    with pytest.raises(InputError, match="one image"):
        training.check_ranks(make_config("data", "out", **cuda, sync_bn_group=1), source)


def fresh_backbone():
    torch.manual_seed(0)
    return Smooth()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """A run's report takes longer than its eight steps."""
    monkeypatch.setattr(report, "write_report", lambda run, **_: Path(run))


@pytest.fixture
def settings(tiny):
    """Eight steps, two of them warm-up; momentum, decay and clipping that show."""
    for name in ("support_set_size", "backbone"):
        del tiny[name]
    return tiny | {
        "objective": "byol",
        "optimizer": "sgd",
        "epochs": STEPS / PER_EPOCH,
        "warmup_epochs": WARMUP / PER_EPOCH,
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "clip_grad_norm": CLIP,
        "ema_momentum": BASE,
    }


def by_package(pictures, out, settings):
    """Weights, batch-norm statistics and support set at the end of a run."""
    run = nnclr.pretrain(pictures[0], out, backbone=fresh_backbone(), **settings)
    assert run.metrics[-1]["step"] == round(settings["epochs"] * PER_EPOCH)
    return safetensors.torch.load_file(sorted((run.path / "checkpoints").iterdir())[-1] / "tensors.safetensors")


def start(pictures, settings):
    """The state before the first step, and the batches."""
    source = open_source(pictures[0])
    fields = {name: value for name, value in settings.items() if name != "quiet"}
    config = training.resolve(make_config("data", "out", **fields), source)
    loader = create_loader(source, training.make_plan(config, len(source)), CPU, 0)
    return training.build(config, CPU, fresh_backbone()), loader.batches(0, STEPS)


def targets_by_hand(average, heads, views, ids, queue):
    """Embeddings by the averaged weights; their nearest neighbours where there is a queue with entries."""
    with torch.no_grad():
        keys = [heads.average_projector(average(view)) for view in views]
    if queue is None:
        return keys
    rows = [key.double().numpy() for key in keys]
    if queue.slots:
        keys = [torch.tensor(np.array([queue.slots[slot][0] for slot in queue.nearest(row)])).float() for row in rows]
    queue.push(rows[0], ids)
    return keys


def descend(weights, gradients, buffers, step):
    """One update of all weights by SGD with momentum, in float64 and with the rate of the step."""
    if step < WARMUP:
        rate = min((step + 1) / WARMUP, 1)
    else:
        rate = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    rate *= RATE * 24 / 256
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        values, decay = weight.detach().double().numpy(), DECAY if weight.ndim > 1 else 0.0
        moved, buffers[i] = reference.lars_step(values, gradient, buffers[i], rate, 0.9, decay, trust=None)
        weight.data.copy_(torch.from_numpy(moved))


def by_hand(pictures, settings):
    """What `by_package` returns, for BYOL or NN-BYOL, and the gradient norm of each step."""
    state, batches = start(pictures, settings)
    backbone, average, heads = state.backbone, state.average, state.objective
    queue = reference.Queue(settings["support_set_size"]) if "support_set_size" in settings else None
    weights = [p for module in (backbone, heads.projector, heads.predictor) for p in module.parameters()]
    buffers, norms = [np.zeros(p.shape) for p in weights], []
    for step, batch in enumerate(batches):
        views = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
        predictions = [heads.predictor(heads.projector(backbone(view))) for view in views]
        targets = targets_by_hand(average, heads, views, batch.ids.tolist(), queue)
        loss = sum(
            (F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(dim=1).mean()
            for p, t in zip(predictions, targets[::-1], strict=True)
        )
        gradients = [g.double().numpy() for g in torch.autograd.grad(loss, weights)]
        norms.append(math.sqrt(sum((g**2).sum() for g in gradients)))
        gradients = [g * min(1.0, CLIP / norms[-1]) for g in gradients]
        descend(weights, gradients, buffers, step)
        momentum = 1 - (1 - BASE) * (math.cos(math.pi * step / STEPS) + 1) / 2
        for old, new in ((average, backbone), (heads.average_projector, heads.projector)):
            for mean, weight in zip(old.parameters(), new.parameters(), strict=True):
                mean.data.mul_(momentum).add_(weight.data, alpha=1 - momentum)
    if queue is not None:
        heads.support_set.vectors.copy_(torch.tensor(np.array([slot[0] for slot in queue.slots])))
        heads.support_set.ids.copy_(torch.tensor([slot[1] for slot in queue.slots]))
    return state.tensors(), norms


def largest_difference(one, two):
    """Over all weights and batch-norm statistics, relative where they are above 1."""
    names = [name for name in two if name.startswith(("backbone.", "average.", "objective.")) and "_set." not in name]
    assert {name.split(".")[0] for name in names} == {"backbone", "average", "objective"}
    return max(((one[n].double() - two[n]).abs() / two[n].abs().clamp(min=1)).max().item() for n in names)


@pytest.mark.parametrize("fields", [{}, {"objective": "nn-byol", "support_set_size": 50}], ids=["byol", "nn-byol"])
def test_the_loop_is_the_one_written_out_here(pictures, tmp_path, settings, fields):
    expected, norms = by_hand(pictures, settings | fields)
    made = by_package(pictures, tmp_path / "run", settings | fields)
    assert min(norms) < CLIP < max(norms)
    assert largest_difference(made, expected) < 1e-6
    if fields:
        assert torch.equal(made["objective.support_set.ids"], expected["objective.support_set.ids"])
        rows = [tensors["objective.support_set.vectors"] for tensors in (made, expected)]
        torch.testing.assert_close(*rows, rtol=0, atol=1e-5)


def online_features(monkeypatch):
    """The features of the network itself in place of the averaged one's."""
    build, states = training.build, []

    def remember(*given):
        states.append(build(*given))
        return states[-1]

    def features(average, views):
        with torch.no_grad():
            return [states[-1].backbone(view) for view in views]

    monkeypatch.setattr(training, "build", remember)
    monkeypatch.setattr(training, "averaged_features", features)


MOMENTUM_AT = training.momentum_at
MUTATIONS = {
    "constant momentum": lambda m: m.setattr(training, "momentum_at", lambda step, *, base, **_: base),
    "next step's momentum": lambda m: m.setattr(training, "momentum_at", lambda step, **k: MOMENTUM_AT(step + 1, **k)),
    "online features": online_features,
    "average stands still": lambda m: m.setattr(training, "update_average", lambda *given: None),
    "no clipping": lambda m: m.setattr(training, "clip", lambda *given: None),
    "constant rate": lambda m: m.setattr(training, "learning_rate", lambda step, *, peak, **_: peak),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_control_another_loop_is_noticed(pictures, tmp_path, settings, monkeypatch, mutation):
    expected, _ = by_hand(pictures, settings)
    MUTATIONS[mutation](monkeypatch)
    assert largest_difference(by_package(pictures, tmp_path / "run", settings), expected) > 5e-5


def test_clipping_bounds_the_update(pictures, tmp_path, settings):
    """Of one step of plain SGD, whose update is the rate times the clipped gradient."""
    settings |= {"epochs": 1 / PER_EPOCH, "warmup_epochs": 0, "weight_decay": 0.0, "momentum": 0.0}
    settings |= {"learning_rate": 10.0, "log_every_steps": 1}
    state, _ = start(pictures, settings)
    whole = nn.ModuleDict({"backbone": state.backbone, "objective": state.objective})
    first = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    lengths, logged = {}, {}
    for clip in (0.1, 1.0, 1e6):
        last = by_package(pictures, tmp_path / str(clip), settings | {"clip_grad_norm": clip})
        moved = sum((last[name] - p.detach()).double().square().sum().item() for name, p in first.items())
        lengths[clip] = math.sqrt(moved) / (10 * 24 / 256)
        logged[clip] = nnclr.Run(tmp_path / str(clip)).metrics[0]["grad_norm"]
    assert lengths == pytest.approx({0.1: 0.1, 1.0: 1.0, 1e6: logged[1e6]}, rel=1e-3)
    assert logged[0.1] == logged[1.0] == logged[1e6] > 2  # the norm before clipping is what is logged
