"""The training loop against a loop written out here: rate, clipping, averaged weights, targets, order of updates."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import nnclr
from nnclr import training
from nnclr.config import make_config
from nnclr.data.loader import create_loader
from nnclr.data.source import open_source
from tests import reference

CPU = torch.device("cpu")
STEPS, PER_EPOCH, WARMUP, RATE, DECAY, CLIP, BASE = 8, 5, 0.5, 0.005, 0.01, 28.0, 0.9


@pytest.fixture
def settings(tiny):
    """Eight steps, less than one of them warm-up; momentum, decay and clipping that show."""
    del tiny["support_set_size"]
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
    """Weights, statistics and support set at the end of a run."""
    run = nnclr.pretrain(pictures[0], out, **settings)
    assert run.metrics[-1]["step"] == round(settings["epochs"] * PER_EPOCH)
    return safetensors.torch.load_file(sorted((run.path / "checkpoints").iterdir())[-1] / "tensors.safetensors")


def start(pictures, settings):
    """The state before the first step, and the batches."""
    source = open_source(pictures[0])
    fields = {name: value for name, value in settings.items() if name != "quiet"}
    config = training.resolve(make_config("data", "out", **fields), source)
    loader = create_loader(source, training.make_plan(config, len(source)), CPU, 0)
    return training.build(config, CPU), loader.batches(0, STEPS)


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


def descend(weights, gradients, buffers, step, optimizer):
    """One update of all weights in float64, with the rate of the step."""
    if step < WARMUP:
        rate = min((step + 1) / WARMUP, 1)
    else:
        rate = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
    rate *= RATE * 24 / 256
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        matrix = weight.ndim > 1
        moved, buffers[i] = reference.lars_step(
            weight.detach().double().numpy(),
            gradient,
            buffers[i],
            rate,
            momentum=0.9,
            weight_decay=DECAY if matrix else 0.0,
            trust=1e-3 if matrix and optimizer == "lars" else None,
        )
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
        gradients = [g * min(1.0, settings["clip_grad_norm"] / norms[-1]) for g in gradients]
        descend(weights, gradients, buffers, step, settings["optimizer"])
        momentum = 1 - (1 - BASE) * (math.cos(math.pi * step / STEPS) + 1) / 2
        for old, new in ((average, backbone), (heads.average_projector, heads.projector)):
            for mean, weight in zip(old.parameters(), new.parameters(), strict=True):
                mean.data.mul_(momentum).add_(weight.data, alpha=1 - momentum)
    if queue is not None:
        heads.support_set.vectors.copy_(torch.tensor(np.array([slot[0] for slot in queue.slots])))
    return state.tensors(), norms


def largest_difference(one, two):
    """Over all weights, batch-norm statistics and rows of the support set."""
    names = {
        name
        for name in one.keys() | two.keys()
        if name.startswith(("backbone.", "average.", "objective."))
        and not name.endswith(("ids", "born", "enqueued", "updates", "refused"))
    }
    assert {name.split(".")[0] for name in names} == {"backbone", "average", "objective"}
    # Running variances are tens, other values at most about 1.
    return max(((one[n].double() - two[n].double()).abs() / two[n].abs().clamp(min=1)).max().item() for n in names)


@pytest.mark.parametrize("fields", [{}, {"objective": "nn-byol", "support_set_size": 50, "optimizer": "lars"}])
def test_the_loop_is_the_one_written_out_here(pictures, tmp_path, settings, fields):
    settings |= fields
    expected, norms = by_hand(pictures, settings)
    assert min(norms) < CLIP < max(norms)
    assert largest_difference(by_package(pictures, tmp_path / "run", settings), expected) < 1e-6


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


MUTATIONS = {
    "constant momentum": lambda m: m.setattr(training, "momentum_at", lambda step, *, base, **_: base),
    "momentum of the next step": lambda m: m.setattr(
        training, "momentum_at", lambda step, **given: MOMENTUM_AT(step + 1, **given)
    ),
    "online features": online_features,
    "average stands still": lambda m: m.setattr(training, "update_average", lambda *given: None),
    "no clipping": lambda m: m.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *given: None),
    "constant rate": lambda m: m.setattr(training, "learning_rate", lambda step, *, peak, **_: peak),
}
MOMENTUM_AT = training.momentum_at


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_control_another_loop_is_noticed(pictures, tmp_path, settings, monkeypatch, mutation):
    expected, _ = by_hand(pictures, settings)
    MUTATIONS[mutation](monkeypatch)
    assert largest_difference(by_package(pictures, tmp_path / "run", settings), expected) > 1e-4


def test_clipping_bounds_the_update(pictures, tmp_path, settings):
    """Of one step of plain SGD, whose update is the rate times the clipped gradient."""
    settings |= {"epochs": 1 / PER_EPOCH, "warmup_epochs": 0, "weight_decay": 0.0, "momentum": 0.0}
    state, _ = start(pictures, settings)
    first = {f"backbone.{name}": weight.double() for name, weight in state.backbone.named_parameters()}
    first |= {f"objective.{n}": w.double() for n, w in state.objective.named_parameters() if w.requires_grad}
    lengths = []
    for clip in (1e-3, 1e-2, 1e6):
        last = by_package(pictures, tmp_path / str(clip), settings | {"clip_grad_norm": clip, "log_every_steps": 1})
        moved = sum((last[name].double() - weight).square().sum().item() for name, weight in first.items())
        lengths.append(math.sqrt(moved) / (RATE * 24 / 256))
    logged = [nnclr.Run(tmp_path / str(clip)).metrics[0]["grad_norm"] for clip in (1e-3, 1e6)]
    assert lengths[:2] == pytest.approx([1e-3, 1e-2], rel=2e-3)
    assert lengths[2] == pytest.approx(logged[1], rel=1e-4)
    assert logged[0] == logged[1] > 0.1  # the norm before clipping is what is logged
