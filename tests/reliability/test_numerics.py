"""Numbers that are not finite, and training that goes wrong: nothing of it is kept, and all of it is said."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch

import nnclr
from nnclr import checkpoint, health, report, training
from nnclr.config import make_config, own_fields
from nnclr.data.loader import Batch
from nnclr.errors import InputError, NoCheckpointError, NonFiniteError
from nnclr.findings import findings, judge, read_record
from nnclr.models.backbone import SmallConvNet
from nnclr.objectives import OBJECTIVES, Output
from nnclr.skipped_steps import too_many
from nnclr.train_state import TrainState
from tests.test_resume import interrupt_after, same

STEP = 4  # 0-based, of the fault; 5 steps are an epoch
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """A run's report takes longer than its steps."""
    monkeypatch.setattr(report, "write_report", lambda run, **_: Path(run))


# ---- C1: one step that is not finite -----------------------------------------------------------------------


class Seen(training.Undo):
    """Keeps the whole state as it was before each step; `len(Seen.states) - 1` is the step under way."""

    states = []  # noqa: RUF012 - of the run under way

    def __init__(self, state):
        super().__init__(state)
        self.state = state
        Seen.states = []

    def remember(self):
        Seen.states.append(self.state.tensors())
        super().remember()


def now(steps):
    return len(Seen.states) - 1 in steps


def gradient(index, value):
    """One number of the gradient of one parameter."""

    def fault(patch, objective, steps=(STEP,)):
        post = training.StepCheck.post

        def spoilt(self, batch, out, parameters, asked):
            if batch.step in steps:
                parameters[index].grad[(0,) * parameters[index].ndim] = value
            return post(self, batch, out, parameters, asked)

        patch.setattr(training.StepCheck, "post", spoilt)

    return fault


def forward(before=None, after=None):
    """What goes into the objective, or its loss."""

    def fault(patch, objective, steps=(STEP,)):
        kind = OBJECTIVES[objective]
        real = kind.forward

        def spoilt(self, features, targets=None, ids=None):
            if not now(steps):
                return real(self, features, targets, ids)
            out = real(self, features if before is None else [before(view) for view in features], targets, ids)
            out.loss = out.loss if after is None else after(out.loss)
            return out

        patch.setattr(kind, "forward", spoilt)

    return fault


def row(features):
    return torch.cat([features[:3], features[3:4] * NAN, features[4:]])


def pixel(patch, objective, steps=(STEP,)):
    """One pixel, which reaches every batch norm and, by those, every image."""
    real = SmallConvNet.forward

    def spoilt(self, images):
        if self.training and now(steps):
            images = images.clone()
            images[0, 0, 0, 0] = NAN
        return real(self, images)

    patch.setattr(SmallConvNet, "forward", spoilt)


loss_nan = forward(after=lambda loss: loss * NAN)
EVENTS = {
    "loss NaN": (loss_nan, {}),
    "loss infinite": (forward(after=lambda loss: loss * INF), {}),
    "loss NaN, gradient finite": (forward(after=lambda loss: loss + NAN), {}),
    "first layer NaN": (gradient(0, NAN), {}),
    "first layer infinite": (gradient(0, INF), {}),
    "last layer NaN": (gradient(-1, NAN), {}),
    "last layer infinite": (gradient(-1, -INF), {}),
    "a batch norm NaN": (gradient(-4, NAN), {}),
    "embedding of one image NaN": (forward(before=row), {}),
    "features overflow": (forward(before=lambda view: view * 1e38), {}),
    "one pixel NaN": (pixel, {}),
    "clipped": (pixel, {"clip_grad_norm": 1.0}),
    "in parts": (pixel, {"grad_cache": 8}),
    "averaged weights": (pixel, {"ema_momentum": 0.9}),
    "bf16": (pixel, {"precision": "bf16"}),
    "random slots": (pixel, {"replacement": "random", "enqueue_both_views": True}),
    "sgd": (loss_nan, {"optimizer": "sgd"}),
    "adamw": (gradient(0, NAN), {"optimizer": "adamw"}),
    "byol": (pixel, {"objective": "byol"}),
    "moco": (pixel, {"objective": "moco-v2"}),
    "swav": (pixel, {"objective": "swav", "prototypes": 10, "swav_queue_size": 48}),
    "supervised": (pixel, {"objective": "supervised"}),
}


def settings_of(tiny, options):
    """Seven steps of the method; nothing is written down before the last."""
    objective = options.get("objective", "nnclr")
    unused = own_fields() - set(OBJECTIVES[objective].settings)
    settings = {name: value for name, value in tiny.items() if name not in unused}
    return settings | {"epochs": 1.4, "log_every_steps": 100, "evaluate_every_epochs": 0} | options


def late(patch):
    """Learn of each step one step later, as on CUDA."""
    create = training.StepCheck.__init__

    def created(self, *given):
        create(self, *given)
        self.lag = 1

    patch.setattr(training.StepCheck, "__init__", created)


def changed(before, after):
    """Names of the tensors of which a bit changed, NaN being equal to itself."""
    assert before.keys() == after.keys()
    bits = lambda tensor: tensor.contiguous().view(-1).view(torch.uint8)  # noqa: E731 - twice below
    return {name for name, tensor in before.items() if not torch.equal(bits(tensor), bits(after[name]))}


def run_with(monkeypatch, pictures, out, settings, fault, lag=0):
    with monkeypatch.context() as patch:
        patch.setattr(training, "Undo", Seen)
        fault(patch, settings.get("objective", "nnclr"))
        if lag:
            late(patch)
        return nnclr.pretrain(pictures, out, **settings)


def test_a_step_that_is_not_finite_leaves_no_trace(monkeypatch, pictures, tmp_path, tiny, count):
    """Weights, moments, statistics, averages, support set and queues keep every bit; the steps around it train."""
    passed, of = [], [(name, 0) for name in EVENTS] + [(name, 1) for name in ("adamw", "averaged weights", "moco")]
    for name, lag in of:
        fault, options = EVENTS[name]
        run = run_with(monkeypatch, pictures, tmp_path / f"{name} {lag}", settings_of(tiny, options), fault, lag)
        kept = not changed(Seen.states[STEP], Seen.states[STEP + 1])
        others = [changed(Seen.states[i], Seen.states[i + 1]) for i in (STEP - 1, STEP + 1)]
        finite = all(value.isfinite().all() for value in Seen.states[-1].values() if value.is_floating_point())
        files = [path.name for path in (run.path / "nonfinite").iterdir()]
        counted = run.metrics[-1]["skipped_steps"] == 1 and files == [f"step-{STEP:08d}.json"]
        if kept and finite and counted and all(any(n.startswith("backbone") for n in names) for names in others):
            passed.append((name, lag))
    count("C1", "events that are not finite, after which no bit had changed", len(passed), len(of))
    assert passed == of


GUARDS = {
    "the optimiser's": lambda patch: patch.setattr(training, "guarded_step", lambda optimizer, _: optimizer.step()),
    "the statistics'": lambda patch: patch.setattr(Seen, "unless", lambda self, finite: nullcontext()),
}


@pytest.mark.parametrize(
    ("guard", "event", "broken"),
    [
        ("the optimiser's", "first layer NaN", "backbone.stem.0.weight"),
        ("the optimiser's", "adamw", "optimizer.0.exp_avg"),
        ("the statistics'", "one pixel NaN", "backbone.stem.1.running_mean"),
        ("the statistics'", "first layer NaN", "objective.support_set.vectors"),
        ("the statistics'", "averaged weights", "objective.average_projector.layers.0.weight"),
        ("the statistics'", "byol", "average.stem.0.weight"),
        ("the statistics'", "swav", "objective.queue"),
        ("the statistics'", "moco", "objective.queue.updates"),
    ],
)
def test_control_without_a_guard_the_step_leaves_traces(monkeypatch, pictures, tmp_path, tiny, guard, event, broken):
    fault, options = EVENTS[event]
    GUARDS[guard](monkeypatch)
    with pytest.raises(NonFiniteError) if guard == "the optimiser's" or fault is pixel else nullcontext():
        run_with(monkeypatch, pictures, tmp_path / "run", settings_of(tiny, options), fault)
    assert broken in changed(Seen.states[STEP], Seen.states[STEP + 1])


@pytest.mark.parametrize("objective", ["nnclr", "swav", "moco-v2"])
def test_skipping_never_waits_for_the_device(objective):
    """On a device that has shapes and no values, whatever reads a value fails."""
    made = OBJECTIVES[objective](16).to("meta")
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16)).to("meta")
    average = None if made.momentum is None else training.average_of(net)
    parameters = [p for of in (net, made) for p in of.parameters() if p.requires_grad]
    state = TrainState(net, made, torch.optim.SGD(parameters), average)
    check, undo = training.StepCheck(Path("nowhere"), state, torch.device("meta")), training.Undo(state)
    rows, ids = [torch.randn(6, 256, device="meta") for _ in range(2)], torch.arange(6, device="meta")
    out = Output(torch.zeros((), device="meta"), {}, rows, ids, keep={"keys": rows[1]})
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    undo.remember()
    _, finite = check.post(Batch(0, ids, rows, 0.0), out, parameters, False)
    with undo.unless(finite):
        made.update(out)
    with pytest.raises(RuntimeError, match="meta"):  # control
        check.read(settle=True)


def test_what_is_written_of_a_skipped_step(monkeypatch, pictures, tmp_path, tiny, capsys):
    """The file names loss, images and gradients; the line of that step has no figures; the end says how many."""
    settings = settings_of(tiny, {"log_every_steps": 1, "quiet": False, "checkpoint_every_steps": STEP + 1})
    run = run_with(monkeypatch, pictures, tmp_path / "run", settings, gradient(0, NAN))
    text = (run.path / f"nonfinite/step-{STEP:08d}.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert (record["grad_norm"], record["ended_the_run"], len(set(record["ids"]))) == ("nan", False, 24)
    assert 2 < record["loss"] < 5
    assert [name for name, norm in record["grad_norms"].items() if norm == "nan"] == ["backbone.stem.0.weight"]
    assert record["grad_norms"]["objective.predictor.layers.3.weight"] > 0
    lines = run.metrics
    assert [line["skipped_steps"] for line in lines] == [int(line["step"] > STEP) for line in lines]
    assert ["loss" in line for line in lines] == [line["step"] != STEP + 1 for line in lines]
    assert lines[-1]["refused_embeddings"] == 0
    said = capsys.readouterr().out
    assert said.count("warning: a step was skipped, because its loss or gradient was not finite; 1 so far, see") == 1
    assert f"step {STEP + 1:>5}/7  skipped  lr" in said
    assert "warning: 1 of 7 steps were skipped, not being finite: see" in said
    record = read_record(run.path)
    assert judge(record).topic != "It stopped"
    assert "1 were skipped" in next(found.text for found in findings(record) if found.topic == "Steps")


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_with_skipped_steps_resumes_bit_for_bit(monkeypatch, pictures, tmp_path, tiny, lag):
    """Two steps before the stop are skipped, one of them the very last, and one after it."""
    tiny |= {"ema_momentum": 0.9, "optimizer": "adamw", "support_set_size": 401}
    pixel(monkeypatch, "nnclr", (2, 6, 9))
    monkeypatch.setattr(training, "Undo", Stepwise)
    if lag:
        late(monkeypatch)
    nnclr.pretrain(pictures, tmp_path / "whole", **tiny)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(nnclr.errors.Stopped):
            nnclr.pretrain(pictures, tmp_path / "parts", **tiny)
    nnclr.pretrain(pictures, tmp_path / "parts", **tiny)
    ends = [checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("whole", "parts")]
    assert same(ends[0].tensors, ends[1].tensors)
    assert [end.state["notes"]["not_finite"] for end in ends] == [{"steps": 3, "recent": [2, 6, 9]}] * 2
    assert int(ends[0].tensors["objective.support_set.updates"]) == 20 - 3
    files = [sorted(path.name for path in (tmp_path / name / "nonfinite").iterdir()) for name in ("whole", "parts")]
    assert files[0] == files[1] == [f"step-{step:08d}.json" for step in (2, 6, 9)]


class Stepwise(Seen):
    """`Seen` for a run that may begin later: the step under way is that of the state."""

    def remember(self):
        Seen.states = [None] * self.state.step
        super().remember()


def test_too_many_of_the_last_steps():
    """More than three in a row, or more than a hundredth of the last thousand and at least four."""
    for number in (10, 500, 5000):
        assert not too_many([number - 2, number - 1, number], number)
        assert too_many([number - 3, number - 2, number - 1, number], number)
        assert too_many([number - 4, number - 2, number - 1, number], number) == (number < 400)
    spread = list(range(5000, 6000, 95))
    assert len(spread) == 11
    assert not too_many(spread[:10], spread[9])
    assert too_many(spread, spread[10])
    assert not too_many([0, 130, 260], 260)
    assert too_many([0, 130, 260, 390], 390)  # 4 of 391
    assert not too_many([0, 130, 260, 400], 400)  # 4 of 401


def test_a_run_that_is_not_finite_any_more_ends(monkeypatch, pictures, tmp_path, tiny, capsys):
    """After four steps in a row, with the checkpoint from before them whole; without the fault it goes on."""
    settings = settings_of(tiny, {"epochs": 3, "checkpoint_every_steps": STEP, "log_every_steps": 1})
    fault = lambda patch, objective: pixel(patch, objective, range(STEP, 100))  # noqa: E731 - one use
    with pytest.raises(NonFiniteError, match=rf"at step {STEP + 3} are not both finite, as in 4 of the last 8") as end:
        run_with(monkeypatch, pictures, tmp_path / "run", settings, fault)
    assert end.value.exit_code == 82
    assert len(Seen.states) == STEP + 4  # one step more would have been too many
    good = checkpoint.load_latest(tmp_path / "run/checkpoints")[0]
    assert good.step == STEP
    assert not changed(good.tensors, Seen.states[STEP])
    last = json.loads((tmp_path / f"run/nonfinite/step-{STEP + 3:08d}.json").read_text())
    assert last["ended_the_run"]
    assert judge(read_record(tmp_path / "run")).topic == "It stopped"
    run = nnclr.pretrain(pictures, tmp_path / "run", **settings)
    assert run.metrics[-1]["skipped_steps"] == 0
    assert not list((run.path / "nonfinite").iterdir())  # those steps were made again, and were finite
    assert judge(read_record(run.path)).topic != "It stopped"


# ---- C2: an embedding that is not finite -------------------------------------------------------------------


def test_refused_embeddings_are_counted_in_the_run(monkeypatch, pictures, tmp_path, tiny):
    """One row of each batch; the run goes on, and each line says how many so far."""
    enqueue = nnclr.SupportSet.enqueue

    def spoilt(self, z, ids=None):
        z = z.clone()
        z[2] = NAN
        enqueue(self, z, ids)

    monkeypatch.setattr(nnclr.SupportSet, "enqueue", spoilt)
    run = nnclr.pretrain(pictures, tmp_path / "run", **settings_of(tiny, {"log_every_steps": 1}))
    assert [line["refused_embeddings"] for line in run.metrics] == list(range(1, 8))
    assert final(run)["objective.support_set.enqueued"].item() == 7 * 23


# ---- C3: state that is not finite --------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(monkeypatch, tmp_path):
    """Its manifest fits, as if another program had written it; the older one is used, and with none it is code 86."""
    good, broken = {"w": torch.ones(3)}, {"w": torch.tensor([1.0, NAN, 2.0])}
    checkpoint.save(tmp_path, 1, good, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_not_finite", lambda tensors: None)
        checkpoint.save(tmp_path, 2, broken, {})
        assert checkpoint.load_latest(tmp_path)[0].step == 2  # control
    found, skipped = checkpoint.load_latest(tmp_path)
    assert (found.step, skipped) == (1, ["step-00000002 skipped: w is not finite"])
    (tmp_path / "step-00000001/manifest.json").unlink()
    with pytest.raises(NoCheckpointError, match="w is not finite") as none:
        checkpoint.load_latest(tmp_path)
    assert none.value.exit_code == 86


# ---- C4 to C7: training that goes wrong --------------------------------------------------------------------


class Point(nnclr.NNCLR):
    """All images get nearly the same embedding."""

    settings = ("embedding_dim", "support_set_size")

    def __init__(self, feature_dim, embedding_dim, support_set_size):
        super().__init__(feature_dim, embedding_dim, 24, 24, support_set_size)
        self.projector = torch.nn.Linear(feature_dim, embedding_dim)
        torch.nn.init.constant_(self.projector.bias, 100.0)


class Subspace(Point):
    """Embeddings lie on a line."""

    def __init__(self, feature_dim, embedding_dim, support_set_size):
        super().__init__(feature_dim, embedding_dim, support_set_size)
        one = torch.nn.BatchNorm1d(1)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(feature_dim, 1), one, torch.nn.Linear(1, embedding_dim, bias=False)
        )


class Hub(nnclr.NNCLR):
    """One entry of the support set is the nearest of every query."""

    def update(self, out):
        super().update(out)
        self.support_set.vectors.copy_(self.support_set.vectors[:1].clone().expand_as(self.support_set.vectors))


def warnings_of(capsys):
    said = capsys.readouterr().out
    return [line for line in said.splitlines() if line.startswith("warning: at step")]


BAD = {
    "point": (Point, {"learning_rate": 1e-9}, "collapsed to a point"),
    "subspace": (Subspace, {"learning_rate": 1e-9}, "collapsed to a subspace"),
    "hubs": (Hub, {"learning_rate": 1e-9}, "share a few hubs as neighbours"),
    "rate": (
        "supervised",  # 1000 times its rate
        {"learning_rate": 300.0, "optimizer": "sgd", "epochs": 8, "warmup_epochs": 4},
        "the gradient norm is",
    ),
}
HEALTHY = {
    "nnclr": ({}, "nnclr"),
    "nnclr by adamw": ({"optimizer": "adamw", "learning_rate": 0.001}, "nnclr"),
    "nnclr with averaged weights": ({"ema_momentum": 0.99}, "nnclr"),
    **{name: ({}, name) for name in ("simclr", "byol", "barlow-twins", "moco-v3", "supervised")},
}


def alarmed_run(pictures, out, tiny, options, objective):
    options = {"epochs": 4, "quiet": False, "log_every_steps": 1, "evaluate_every_epochs": 0} | options
    options["checkpoint_every_steps"] = 1000
    own = set(objective.settings if isinstance(objective, type) else OBJECTIVES[objective].settings)
    settings = {name: value for name, value in tiny.items() if name not in own_fields() - own}
    return nnclr.pretrain(pictures, out, objective=objective, **settings | options)


def test_training_that_goes_wrong_is_said_and_sound_training_is_not(pictures, tmp_path, tiny, count, capsys):
    """The run says it, and its report says the same from the figures."""
    found, quiet = [], []
    for name, (objective, options, words) in BAD.items():
        run = alarmed_run(pictures, tmp_path / name, tiny, options, objective)
        said = warnings_of(capsys)
        told = " ".join(finding.text for finding in findings(read_record(run.path)))
        if any(words in line for line in said) and words in told:
            found.append(name)
    for name, options in HEALTHY.items():
        alarmed_run(pictures, tmp_path / name, tiny, *options)
        if not warnings_of(capsys):
            quiet.append(name)
    count("C4", "runs at a learning rate far too high that are warned of", "rate" in found, 1)
    count("C5", "collapses of 4 kinds that are said", len(found), len(BAD))
    count("C5", "sound runs without an alarm", len(quiet), len(HEALTHY))
    assert found == list(BAD)
    assert quiet == list(HEALTHY)


def test_a_jump_is_said_once_and_a_slow_change_is_not():
    loss, norm = (health.jump_monitors()[name] for name in ("loss", "grad_norm"))
    values = [4.0] * 10 + [12.5] * 30 + [4.0] * 5 + [12.5] * 30
    said = [loss.observe(10 * i, value) is not None for i, value in enumerate(values)]
    assert [i for i, one in enumerate(said) if one] == [30, 65]  # 200 steps after each began
    assert [norm.observe(i, value) is not None for i, value in enumerate([1.0] * 6 + [101.0, 300.0, 1.0, 99.0])] == [
        *[False] * 6, True, *[False] * 3,
    ]  # fmt: skip
    slow = health.jump_monitors()["grad_norm"]
    assert not any(slow.observe(i, 1.05**i) for i in range(400))  # twenty times in between two medians at most
    first = health.jump_monitors()["grad_norm"]
    assert not any(first.observe(i, 1000.0**i) for i in range(5))  # nothing is usual yet
    other = health.jump_monitors()["loss"]
    for i in range(20):
        other.observe(10 * i, values[i])
    again = health.jump_monitors()["loss"]
    again.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert [again.observe(10 * i, values[i]) is not None for i in range(20, 40)] == said[20:40]


# ---- C9, C10 -----------------------------------------------------------------------------------------------


def test_forgetting_the_optimisers_step_counter_is_noticed(monkeypatch, pictures, tmp_path, tiny):
    """AdamW's bias correction depends on it: with the counter a resumed run is the whole one, without it is not."""
    tiny |= {"optimizer": "adamw", "epochs": 1.4, "evaluate_every_epochs": 0}
    whole = final(nnclr.pretrain(pictures, tmp_path / "whole", **tiny))
    restore = TrainState.restore

    def forgetful(self, tensors):
        restore(self, {name: t * 0 if name.endswith(".step") else t for name, t in tensors.items()})

    for name, forget in (("kept", False), ("forgotten", True)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 4)
            with pytest.raises(nnclr.errors.Stopped):
                nnclr.pretrain(pictures, tmp_path / name, **tiny)
        with monkeypatch.context() as patch:
            if forget:
                patch.setattr(TrainState, "restore", forgetful)
            assert same(whole, final(nnclr.pretrain(pictures, tmp_path / name, **tiny))) != forget


def final(run):
    return safetensors.torch.load_file(sorted((run.path / "checkpoints").iterdir())[-1] / "tensors.safetensors")


def test_there_is_no_half_precision_and_no_loss_scale():
    """bf16 has the exponents of float32, so there is no scale that could fall for ever."""
    with pytest.raises(InputError, match="precision"):
        make_config("data", "out", precision="fp16")
    root = Path(nnclr.__file__).parent
    assert [path for path in root.rglob("*.py") if "GradScaler" in path.read_text()] == []
    assert "torch.bfloat16" in (root / "training.py").read_text()  # control: the search finds what is there
