"""A resumed run is the uninterrupted run, bit for bit; the controls are in tests/reliability/test_identity.py."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import nnclr
from nnclr import checkpoint
from nnclr.config import own_fields
from nnclr.errors import Stopped
from nnclr.models.backbone import SmallConvNet
from nnclr.objectives import OBJECTIVES

STEPS_PER_EPOCH = 5  # 120 pictures, batch 24
LAST = "step-00000020"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / LAST / "tensors.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def interrupt_after(monkeypatch, steps: int, kind=nnclr.NNCLR) -> None:
    """Deliver SIGTERM to ourselves when the given step's support-set update is done."""
    finished = 0
    update = kind.update

    def counted(self, out):
        nonlocal finished
        update(self, out)
        finished += 1
        if finished == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(kind, "update", counted)


class Droppy(torch.nn.Module):
    """A backbone with dropout, so that the generator's state matters."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2)
        )

    def forward(self, images):
        return self.layers(images).mean(dim=(2, 3))


def train_twice(monkeypatch, data, tmp_path, stop_after: int, tiny, resumed=None):
    """The final states of an uninterrupted run, and of one that is stopped and started again."""
    torch.manual_seed(1)
    nnclr.pretrain(data, tmp_path / "whole", **{**tiny, "backbone": Droppy()})
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop_after, OBJECTIVES[tiny.get("objective", "nnclr")])
        torch.manual_seed(1)
        backbone = Droppy()
        with pytest.raises(Stopped) as stopped:
            nnclr.pretrain(data, tmp_path / "parts", **{**tiny, "backbone": backbone})
    assert stopped.value.exit_code == 80
    saved = sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir())
    assert saved[-1] == f"step-{stop_after:08d}"
    torch.manual_seed(99)  # what the process does in between must not matter
    nnclr.pretrain(data, tmp_path / "parts", **{**tiny, "backbone": Droppy(), **(resumed or {})})
    return final_state(tmp_path / "whole"), final_state(tmp_path / "parts")


@pytest.mark.parametrize("stop_after", [7, 10], ids=["mid-epoch", "epoch-end"])
@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_resumed_equals_uninterrupted(monkeypatch, pictures, tmp_path, tiny, stop_after, optimizer):
    tiny["optimizer"] = optimizer
    whole, parts = train_twice(monkeypatch, pictures, tmp_path, stop_after, tiny)
    assert same(whole, parts)
    one, two = nnclr.Run(tmp_path / "whole").metrics, nnclr.Run(tmp_path / "parts").metrics
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    knn = [[line["value"] for line in nnclr.Run(tmp_path / name).evaluations] for name in ("whole", "parts")]
    assert knn[0] == knn[1]


@pytest.mark.parametrize("stop_after", [7, 10], ids=["mid-epoch", "epoch-end"])
def test_streamed_images_and_other_workers(monkeypatch, tmp_path, tiny, stop_after):
    """Decoded in 2 threads until the stop and in none after it, one file unreadable: still the same bits."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(120):
        picture = rng.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    (folder / "050.png").write_bytes((folder / "050.png").read_bytes()[:200])
    tiny["num_workers"] = 2
    whole, parts = train_twice(monkeypatch, folder, tmp_path, stop_after, tiny, {"num_workers": 0})
    assert same(whole, parts)
    assert "050.png" in (tmp_path / "parts/bad_samples.jsonl").read_text()


AVERAGED = {"moco-v2", "moco-v3", "byol", "msf", "snclr", "all4one", "nn-byol"}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_method_resumes(monkeypatch, pictures, tmp_path, tiny, objective):
    unused = own_fields() - set(OBJECTIVES[objective].settings)
    tiny = {name: value for name, value in tiny.items() if name not in unused} | {"objective": objective}
    if objective == "swav":
        tiny |= {"prototypes": 10, "swav_queue_size": 48}
    whole, parts = train_twice(monkeypatch, pictures, tmp_path, 7, tiny)
    assert same(whole, parts)
    assert all(value.isfinite().all() for value in whole.values() if value.is_floating_point())
    assert any(name.startswith("average.") for name in whole) == (objective in AVERAGED)


@pytest.mark.parametrize(
    "options",
    [
        {"ema_momentum": 0.9, "exclude_own_id": True},
        {"neighbour": "random", "neighbour_k": 4, "replacement": "random"},
        {"neighbour": "oracle", "augmentation": "multi-crop", "small_views": 2, "small_view_size": 8},
    ],
    ids=["momentum", "random", "oracle multi-crop"],
)
def test_options_resume(monkeypatch, pictures, tmp_path, tiny, options):
    whole, parts = train_twice(monkeypatch, pictures, tmp_path, 7, tiny | options)
    assert same(whole, parts)


def test_finished_run_is_not_trained_again(pictures, tmp_path, tiny):
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    before = final_state(tmp_path / "run")
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    assert same(before, final_state(tmp_path / "run"))


def test_extended_run_goes_on_where_it_ended(pictures, tmp_path, tiny, capsys):
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    run = nnclr.pretrain(pictures, tmp_path / "run", **tiny, extend_epochs=2)
    assert run.metrics[-1]["step"] == 30
    rates = {line["step"]: line["learning_rate"] for line in run.metrics}
    assert rates[22] > rates[20]  # the cosine is laid over the longer run
    assert rates[30] < rates[22]
    capsys.readouterr()
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"quiet": False})  # as it was first asked for
    assert "at step 30, past the 20 of this command: it is finished" in capsys.readouterr().out.replace("\n", " ")


def test_other_images_are_refused(pictures, tmp_path, tiny):
    images, labels = pictures
    nnclr.pretrain((images, labels), tmp_path / "run", **tiny)
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 1
    with pytest.raises(nnclr.errors.InputError, match="other names, sizes or labels"):
        nnclr.pretrain((changed, labels), tmp_path / "run", **tiny, extend_epochs=1)


def test_added_images_are_named_although_they_change_a_default(pictures, tmp_path, tiny):
    """The default size of the support set is half of the images."""
    images, labels = pictures
    settings = {**tiny, "epochs": 1, "support_set_size": None}
    nnclr.pretrain((images[:100], labels[:100]), tmp_path / "run", **settings)
    said = r"run was trained on 100 images of array; array now holds 120 images with other names, sizes or labels: put"
    with pytest.raises(nnclr.errors.InputError, match=said):
        nnclr.pretrain(pictures, tmp_path / "run", **settings)
    with pytest.raises(nnclr.errors.InputError, match=r"support_set_size: 50 there, 60 now"):  # the control
        nnclr.pretrain((images[:100], labels[:100]), tmp_path / "run", **settings | {"support_set_size": 60})
    (tmp_path / "run/environment.json").write_text('["damaged"]')
    with pytest.raises(nnclr.errors.InputError, match=r"support_set_size: 50 there, 60 now"):
        nnclr.pretrain(pictures, tmp_path / "run", **settings)


def test_other_config_is_refused_and_names_the_fields(pictures, tmp_path, tiny):
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    written = (tmp_path / "run/config.toml").read_text()
    with pytest.raises(
        nnclr.errors.InputError, match=r"temperature: 0.1 there, 0.2 now.*weight_decay|weight_decay.*temp"
    ):
        nnclr.pretrain(pictures, tmp_path / "run", **{**tiny, "temperature": 0.2, "weight_decay": 1e-3})
    assert (tmp_path / "run/config.toml").read_text() == written


def test_other_config_is_refused_although_config_toml_is_lost(pictures, tmp_path, tiny):
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(nnclr.errors.InputError, match=r"another config \(temperature: 0\.1 there, 0\.2 now\)"):
        nnclr.pretrain(pictures, tmp_path / "run", **tiny, temperature=0.2)
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)


def test_second_process_is_refused(pictures, tmp_path, tiny):
    nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    with checkpoint.lock(tmp_path / "run"):
        code = (
            "import numpy as np, sys, nnclr, nnclr.errors, torch\n"
            "from pathlib import Path\n"
            "from nnclr import checkpoint\n"
            "try:\n"
            f"    with checkpoint.lock(Path({str(tmp_path / 'run')!r})): pass\n"
            "except nnclr.errors.FolderInUseError as error: print(error); sys.exit(error.exit_code)\n"
        )
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 84
    assert f"process {os.getpid()}" in answer.stdout
    with checkpoint.lock(tmp_path / "run"):  # free again
        pass


def write_late(monkeypatch, taken: int, seen: list) -> None:
    """Hold every write of a checkpoint back until so many steps were taken; without a thread that is never."""
    later, save, update = threading.Event(), checkpoint.save, nnclr.NNCLR.update

    def counted(self, out):
        update(self, out)
        if int(self.support_set.updates) == taken:
            later.set()

    def late(folder, step, tensors, state, keep=None):
        seen.append((step, later.wait(60)))
        return save(folder, step, tensors, state, keep)

    monkeypatch.setattr(nnclr.NNCLR, "update", counted)
    monkeypatch.setattr(checkpoint, "save", late)


def test_training_goes_on_while_a_checkpoint_is_written(monkeypatch, pictures, tmp_path, tiny):
    """The checkpoint of step 3 is written after step 5, and is that of a run in which it was not held back."""
    tiny |= {"epochs": 1, "evaluate_every_epochs": 0}
    nnclr.pretrain(pictures, tmp_path / "at once", **tiny)
    seen = []
    write_late(monkeypatch, 5, seen)
    nnclr.pretrain(pictures, tmp_path / "late", **tiny)
    assert seen == [(3, True), (5, True)]
    for step in ("step-00000003", "step-00000005"):
        one, two = (
            safetensors.torch.load_file(tmp_path / name / "checkpoints" / step / "tensors.safetensors")
            for name in ("at once", "late")
        )
        assert same(one, two)
    one, two = ((tmp_path / name / "encoder/model.safetensors").read_bytes() for name in ("at once", "late"))
    assert one == two


def test_a_checkpoint_that_is_written_between_two_views_changes_no_bit(monkeypatch, pictures, tmp_path, tiny):
    """Under autocast views share their weights' casts, which any thread that leaves autocast would drop."""
    tiny |= {"epochs": 1, "evaluate_every_epochs": 0, "precision": "bf16"}
    waiting, forward = [], SmallConvNet.forward
    written = []

    def between(self, images):
        out = forward(self, images)
        if self.training and waiting:
            thread = threading.Thread(target=waiting.pop())
            thread.start()
            thread.join()
            written.append(True)
        return out

    def run(name):
        nnclr.pretrain(pictures, tmp_path / name, **tiny)
        return safetensors.torch.load_file(tmp_path / name / "checkpoints/step-00000005/tensors.safetensors")

    expected = run("at once")
    monkeypatch.setattr(SmallConvNet, "forward", between)
    monkeypatch.setattr(checkpoint.BackgroundWriter, "submit", lambda self, write: waiting.append(write))
    monkeypatch.setattr(
        checkpoint.BackgroundWriter, "wait", lambda self: [write() for write in waiting] and waiting.clear()
    )
    assert same(run("between"), expected)
    assert written == [True]
    features = nnclr.Encoder.features

    def leaving(self, views):
        with torch.autocast("cpu", enabled=False):
            return features(self, views)

    monkeypatch.setattr(nnclr.Encoder, "features", leaving)  # control
    assert not same(run("leaving"), expected)


@pytest.mark.parametrize(("failing", "earlier", "last"), [(6, 3, 9), (7, 6, 7), (20, 18, 20)])
def test_a_write_that_fails_in_the_background_ends_the_run(
    monkeypatch, pictures, tmp_path, tiny, failing, earlier, last
):
    """At the next save or before it, after SIGTERM in step 7, or at the end: code 83, the earlier checkpoint whole."""
    sync = checkpoint.sync

    def full(path):
        if f".tmp-{failing}-" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", full)
    if failing == 7:
        interrupt_after(monkeypatch, 7)
    with pytest.raises(nnclr.errors.StorageError, match=r"No space left on device.*earlier checkpoints") as raised:
        nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"evaluate_every_epochs": 0, "log_every_steps": 1})
    assert raised.value.exit_code == 83
    assert checkpoint.load_latest(tmp_path / "run/checkpoints")[0].step == earlier
    assert nnclr.Run(tmp_path / "run").metrics[-1]["step"] <= last


def test_killed_before_the_first_checkpoint_starts_afresh(monkeypatch, pictures, tmp_path, tiny):
    """SIGKILL leaves lines but no checkpoint; the repeated lines must not stand there twice."""
    nnclr.pretrain(pictures, tmp_path / "whole", **tiny)
    update = nnclr.NNCLR.update

    def die(self, out):
        update(self, out)
        if int(self.support_set.updates) == 2:
            raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(nnclr.NNCLR, "update", die)
        with pytest.raises(SystemExit):
            nnclr.pretrain(pictures, tmp_path / "killed", **tiny)
    assert not (tmp_path / "killed/checkpoints").exists()
    assert nnclr.Run(tmp_path / "killed").evaluations
    nnclr.pretrain(pictures, tmp_path / "killed", **tiny)
    assert same(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    steps = [[line["step"] for line in nnclr.Run(tmp_path / name).evaluations] for name in ("whole", "killed")]
    assert steps[0] == steps[1]


def test_a_full_disk_is_code_83(monkeypatch, pictures, tmp_path, tiny):
    from nnclr.evaluation import result

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result.os, "write", full)
    with pytest.raises(nnclr.errors.StorageError, match="No space left on device") as raised:
        nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    assert raised.value.exit_code == 83


def test_a_finished_run_keeps_the_record_of_where_it_was_trained(pictures, tmp_path, tiny):
    """Read again on another machine, it must not claim to have been trained there."""
    record = tmp_path / "run" / "environment.json"
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1})
    record.write_text('{"device": "elsewhere"}')
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1})
    assert record.read_text() == '{"device": "elsewhere"}'
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1, "extend_epochs": 1})  # control: trained on
    assert "elsewhere" not in record.read_text()
