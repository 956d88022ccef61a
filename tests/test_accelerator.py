"""What runs on another device than the CPU: with the CPU's results, and steps that wait for nothing."""

import numpy as np
import pytest
import safetensors.torch
import torch

import nnclr
from nnclr import report, training
from nnclr.data import loader
from nnclr.data.augment import policy
from nnclr.data.images import array_source
from nnclr.data.loader import Plan
from nnclr.evaluation import PROTOCOLS
from nnclr.objectives import OBJECTIVES, SimCLR, SwAV
from nnclr.recorder import Recorder
from nnclr.skipped_steps import StepCheck
from tests.accelerator import NAME, accelerator
from tests.settings import TINY

HEADS = {"support_set_size", "embedding_dim", "projector_hidden_dim", "predictor_hidden_dim"}
OPTIONS = [
    {"neighbour": "kth", "neighbour_k": 3},
    {"neighbour": "random", "neighbour_k": 3},
    {"neighbour": "soft", "neighbour_k": 3},
    {"neighbour": "oracle"},
    {"exclude_own_id": True, "enqueue_both_views": True},
    {"replacement": "random"},
    {"transpose_loss": True, "decoupled_loss": True, "use_predictor": False},
    {"ema_momentum": 0.99},
    {"augmentation": "multi-crop", "small_views": 2, "small_view_size": 8},
    {"optimizer": "sgd"},
    {"optimizer": "adamw", "clip_grad_norm": 1.0},
    {"grad_cache": 8},
    {"backbone": "timm/vit_tiny_patch16_224", "image_size": 32},
    {"image_size": 24},
]


class Enough(Exception):
    """The steps that were asked for are done."""


class NothingWritten:
    """In the place of the recorder: the first step is not looked at, and after two more the run ends."""

    def __init__(self, device):
        self.device, self.steps = device, 0

    def start(self, *_):
        pass

    def is_due(self):
        return False

    def after_step(self, *_):
        self.steps += 1
        if self.steps == 1:
            self.device.waits.clear()
            self.device.uploads = 0
        if self.steps == 3:
            raise Enough

    def close(self):
        pass


@pytest.fixture
def settings(tiny):
    def of(**changed):
        objective = changed.get("objective", "nnclr")
        known = (OBJECTIVES[objective] if isinstance(objective, str) else objective).settings
        fitting = {name: value for name, value in tiny.items() if name not in HEADS or name in known}
        return fitting | {"learning_rate": 0.02, "epochs": 2} | changed

    return of


@pytest.fixture
def waits(pictures, settings, tmp_path, monkeypatch):
    """What two steps with these settings wait for."""
    monkeypatch.setattr(StepCheck, "read", lambda self, settle=False: False)  # of the step before, on CUDA

    def run(**changed):
        with accelerator(monkeypatch) as device:
            monkeypatch.setattr(training, "create_recorder", lambda *_: NothingWritten(device))
            with pytest.raises(Enough):
                nnclr.pretrain(pictures, tmp_path / "run", **settings(**changed) | {"device": NAME})
        assert device.uploads > 0, "no step was seen"
        return dict(device.waits)

    return run


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_step_of_each_objective_waits_for_nothing(waits, objective, monkeypatch):
    monkeypatch.setattr(SwAV, "_queue_is_full", lambda self: True)  # until then it waits, and says so
    assert waits(objective=objective) == {}


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_a_step_with_each_option_waits_for_nothing(waits, options):
    assert waits(**options) == {}


class Loose(SimCLR):
    """An objective that does what a test puts into `also`."""

    def forward(self, features, targets, ids):
        out = super().forward(features, targets, ids)
        type(self).also(out)
        return out


@pytest.mark.parametrize(
    ("also", "seen"),
    [
        (lambda out: out.loss.item(), "_local_scalar_dense"),
        (lambda out: bool(out.loss > 0), "_local_scalar_dense"),
        (lambda out: out.embeddings[0][:, :1].flatten().tolist(), "_local_scalar_dense"),
        (lambda out: out.embeddings[0][out.embeddings[0] > 0], "index"),
        (lambda out: (out.embeddings[0] > 0).nonzero(), "nonzero"),
        (lambda out: out.embeddings[0].cpu(), "_to_copy between host and device"),
        (lambda out: torch.zeros(3).to(out.loss.device), "_to_copy between host and device"),
        (lambda out: torch.zeros(()).copy_(out.loss.detach()), "copy_ between host and device"),
    ],
    ids=["item", "bool", "tolist", "mask", "nonzero", "to the host", "from the host", "into the host"],
)
def test_waits_are_seen(waits, also, seen, monkeypatch):
    monkeypatch.setattr(Loose, "also", staticmethod(also), raising=False)
    found = waits(objective=Loose)
    assert set(found) == {seen}
    assert found[seen] >= 2


@pytest.mark.parametrize(
    "also",
    [
        lambda out: out.embeddings[0] + torch.ones(out.embeddings[0].shape),
        lambda out: out.embeddings[0][torch.zeros(2, dtype=torch.int64)],
        lambda out: torch.where(torch.ones(1, dtype=torch.bool), out.loss, 0.0),
    ],
    ids=["sum", "index", "where"],
)
def test_tensors_of_two_devices_are_refused(waits, also, monkeypatch):
    monkeypatch.setattr(Loose, "also", staticmethod(also), raising=False)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        waits(objective=Loose)


def both(monkeypatch, run):
    """What `run` returns on the CPU and on the other device."""
    here = run("cpu")
    with accelerator(monkeypatch) as device:
        there = run(NAME)
    assert device.uploads + sum(device.waits.values()) > 0, "nothing ran on the device"
    return here, there


def checkpoint(run):
    return safetensors.torch.load_file(run.path / "checkpoints/step-00000010/tensors.safetensors")


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"objective": "swav", "swav_queue_size": 48},
        {"objective": "moco-v2"},
        {"augmentation": "multi-crop", "small_views": 2, "small_view_size": 8},
        {"optimizer": "sgd"},
        {"optimizer": "adamw", "clip_grad_norm": 1.0},
        {"image_size": 24, "num_workers": 2},
    ],
    ids=["nnclr", "swav", "moco-v2", "multi-crop", "sgd", "adamw", "files"],
)
def test_a_run_is_that_of_the_cpu(pictures, settings, changed, tmp_path, monkeypatch):
    """Metrics, evaluations and the last checkpoint of a run that fails once and goes on."""
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)
    images, labels = pictures
    if "num_workers" in changed:  # of other sizes, so that they are decoded step by step
        images = [image[: 16 - i % 3] for i, image in enumerate(images)]
    after_step = Recorder.after_step

    def failing(self, *rest):
        after_step(self, *rest)
        if self.state.step == 7:
            raise Enough

    def train(device):
        made = settings(**changed) | {"device": device, "evaluate_every_epochs": 1, "out": tmp_path / device}
        made["learning_rate"] = 0.001  # where rounding, which memory's alignment changes, grows little in ten steps
        made |= {"data": (images, labels), "test_data": (images[:40], labels[:40])}
        with monkeypatch.context() as once:
            once.setattr(Recorder, "after_step", failing)
            with pytest.raises(Enough):
                nnclr.pretrain(**made)
        return nnclr.pretrain(**made)

    here, there = both(monkeypatch, train)
    assert [line["step"] for line in there.metrics] == [2, 4, 6, 8, 10]
    for ours, cpu in zip(there.metrics, here.metrics, strict=True):
        for name in ("loss", "grad_norm", "rank_me", "alignment", "uniformity"):
            assert ours[name] == pytest.approx(cpu[name], rel=1e-3), (name, ours["step"])
    assert [line["value"] for line in there.evaluations] == [line["value"] for line in here.evaluations]
    ours, cpu = checkpoint(there), checkpoint(here)
    assert ours.keys() == cpu.keys()
    for name, tensor in ours.items():
        if not name.startswith("rng"):  # rounding grows over ten steps; a mistake is of the order of the tensor
            tensor, expected = tensor.double(), cpu[name].double()
            assert (tensor - expected).norm() < 0.01 * expected.norm() + 1e-4 * expected.numel() ** 0.5, name


@pytest.mark.parametrize("kind", ["resident", "stream"])
def test_views_in_bfloat16_are_those_in_float32_rounded(pictures, kind, monkeypatch):
    source, plan = array_source(*pictures), Plan(120, 24, policy("byol", 16), 0)
    if kind == "stream":
        monkeypatch.setattr(loader, "load_resident", lambda *_: (None, {}))
    with accelerator(monkeypatch):
        exact, rounded = (
            list(loader.create_loader(source, plan, torch.device(NAME), 2, dtype).batches(0, 2))
            for dtype in (torch.float32, torch.bfloat16)
        )
        for one, two in zip(exact, rounded, strict=True):
            assert torch.equal(one.ids.cpu(), two.ids.cpu())
            for a, b in zip(one.views, two.views, strict=True):
                assert torch.equal(a.to(torch.bfloat16).cpu(), b.cpu())
                assert not torch.equal(a.cpu(), b.float().cpu())  # control
    here = loader.create_loader(source, plan, torch.device("cpu"), 2)
    for batch, one in zip(here.batches(0, 2), exact, strict=True):
        torch.testing.assert_close(batch.views, [view.near for view in one.views], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("device", "precision", "named", "dtype"),
    [
        (NAME, "bf16", True, torch.bfloat16),
        (NAME, "bf16", False, torch.float32),
        (NAME, "fp32", True, torch.float32),
        ("cpu", "bf16", True, torch.float32),
    ],
)
def test_views_are_rounded_where_the_first_layer_would_round_them(
    pictures, settings, tmp_path, device, precision, named, dtype, monkeypatch
):
    asked = []
    monkeypatch.setattr(training, "create_loader", lambda *arguments: asked.append(arguments[-1]))
    graphs = lambda network, sizes, images, dtype: (asked.append(dtype), (network, ""))[1]  # noqa: E731
    monkeypatch.setattr(training, "in_few_launches", graphs)

    def no_recorder(*_):
        raise Enough

    monkeypatch.setattr(training, "create_recorder", no_recorder)
    changed = {"device": device, "precision": precision}
    if not named:
        changed["backbone"] = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.Flatten())
    with accelerator(monkeypatch), pytest.raises(Enough):
        nnclr.pretrain(pictures, tmp_path / "run", **settings(**changed))
    assert asked == [dtype] * (1 + named)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run, and pictures that it does not tell apart without mistakes."""
    rng = np.random.default_rng(1)
    noisy = (pictures[0] // 4 + rng.integers(0, 192, pictures[0].shape)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("trained") / "run"
    nnclr.pretrain((noisy, pictures[1]), folder, **TINY | {"epochs": 1})
    return folder, noisy, pictures[1]


PARAMETERS = {
    "knn": [{}, {"k": (1, 5), "temperature": (0.07, 1.0)}],
    "linear": [{"epochs": 2}, {"epochs": 2, "augmentation": "crop"}],
    "logistic": [{}],
    "finetune": [{"epochs": 2}],
    "label-free": [{}],
    "retrieval": [{}],
    "few-shot": [{"shots": (1, 5)}],
    "label-curve": [{"budgets": (8, 16), "repeats": 1, "from_scratch": False}],
}


@pytest.mark.parametrize(
    ("protocol", "parameters"),
    [(protocol, parameters) for protocol, each in PARAMETERS.items() for parameters in each],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_evaluation_is_that_of_the_cpu(trained, protocol, parameters, monkeypatch):
    run, images, labels = trained
    data = [(images[:80], labels[:80]), (images[80:], labels[80:])] if protocol != "label-free" else [images]

    def evaluate(device):
        encoder = nnclr.open_encoder(run)
        encoder.module.to(device)
        assert encoder.device == torch.device(device)
        return nnclr.evaluate(encoder, *data, protocol=protocol, **parameters).value

    here, there = both(monkeypatch, evaluate)
    assert there == pytest.approx(here, rel=1e-4)
    assert 0 < here < 1


def test_each_protocol_is_tried_but_for_transfer_which_calls_others():
    assert PARAMETERS.keys() | {"transfer"} == PROTOCOLS.keys()


def test_embeddings_are_those_of_the_cpu(trained, tmp_path, monkeypatch):
    run, images, _ = trained

    def embed(device):
        encoder = nnclr.open_encoder(run)
        encoder.module.to(device)
        encoder.save_pretrained(tmp_path / device)
        return encoder.embed(images)

    here, there = both(monkeypatch, embed)
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "cpu/model.safetensors").read_bytes() == (tmp_path / NAME / "model.safetensors").read_bytes()
