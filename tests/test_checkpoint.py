"""What a kill, a flipped bit and a full disk leave behind."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch

from nnclr import checkpoint, train_state
from nnclr.errors import NoCheckpointError, NonFiniteError, StorageError


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {"weights": torch.randn(50, 40, generator=generator), "count": torch.tensor(step), "rng": torch.arange(9)}


def write(folder, *steps):
    for step in steps:
        checkpoint.save(folder, step, tensors(step), {"notes": {"at": step}})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_retention(tmp_path):
    write(tmp_path, 5, 10, 15)
    found, skipped = checkpoint.load_latest(tmp_path)
    assert (found.step, found.state["notes"], skipped) == (15, {"at": 15}, [])
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors(15).items())
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    write(tmp_path, 15)  # the same step again: nothing to do
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert checkpoint.load_latest(tmp_path) == (None, [])


def test_files_of_two_steps_swapped(tmp_path):
    write(tmp_path, 1, 2)
    one, two = tmp_path / "step-00000001", tmp_path / "step-00000002"
    shutil.copy(one / "tensors.safetensors", two / "tensors.safetensors")
    assert checkpoint.load_latest(tmp_path)[0].step == 1
    shutil.rmtree(two)
    shutil.copytree(one, two)  # a whole checkpoint under another step's name
    found, skipped = checkpoint.load_latest(tmp_path)
    assert found.step == 1
    assert "another checkpoint" in skipped[0]


def test_all_bad_is_never_a_silent_restart(tmp_path):
    write(tmp_path, 1, 2)
    for path in tmp_path.glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(NoCheckpointError, match=r"none of the 2 checkpoints.*manifest\.json is missing"):
        checkpoint.load_latest(tmp_path)


def test_newest_is_the_highest_step_whatever_the_clock_says(tmp_path):
    write(tmp_path, 9, 100)
    os.utime(tmp_path / "step-00000009", (4e9, 4e9))
    assert checkpoint.load_latest(tmp_path)[0].step == 100


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "step-00000002/state.json").write_text("{}")
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    found, _ = checkpoint.load_latest(tmp_path)
    assert found.step == 3


def test_non_finite_state_is_not_saved(tmp_path):
    write(tmp_path, 1)
    broken = tensors(2)
    broken["weights"][3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="weights is not finite at step 2"):
        checkpoint.save(tmp_path, 2, broken, {})
    assert names(tmp_path) == ["step-00000001"]


def test_storage_failure_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(StorageError, match="No space left on device; it needs about 1 MiB") as raised:
        checkpoint.save(tmp_path, 3, tensors(3), {})
    assert raised.value.exit_code == 83
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_file_size_limit_in_a_real_process(tmp_path):
    """EFBIG from the kernel, in the middle of the tensors."""
    write(tmp_path, 1)
    code = """
import resource, signal, sys, torch
from pathlib import Path
from nnclr import checkpoint, errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: checkpoint.save(Path(sys.argv[1]), 2, {"weights": torch.ones(100_000)}, {})
except errors.StorageError as error: sys.exit(error.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 83
    assert names(tmp_path) == ["step-00000001"]


def test_atomic_write_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    checkpoint.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(StorageError, match="could not be written: I/O error"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.json"]


def test_manifest_names_size_and_hash(tmp_path):
    write(tmp_path, 1)
    manifest = json.loads((tmp_path / "step-00000001/manifest.json").read_text())
    assert set(manifest["files"]) == {"tensors.safetensors", "state.json"}
    assert all(set(entry) == {"bytes", "sha256"} for entry in manifest["files"].values())


def test_who_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path):
    write(tmp_path, 1)
    assert len({path.stat().st_mode for path in (tmp_path / "step-00000001").iterdir()}) == 1


class Small(torch.nn.Module):
    """Tied and computed weights, a buffer that is no part of the state, and filters in channels-last order."""

    def __init__(self):
        super().__init__()
        self.filters = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(4)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.third = torch.nn.utils.weight_norm(torch.nn.Linear(4, 4))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.third(self.second(self.first(self.norm(self.filters(x)).mean((2, 3))))) * self.scale


def small_state():
    backbone, objective = Small(), torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *objective.parameters()], fused=True)
    take_step(backbone, optimizer)
    return train_state.TrainState(backbone, objective, optimizer)


def take_step(backbone, optimizer):
    backbone(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    backbone.scale.add_(1)


def saved_weights(path):
    return safetensors.torch.load_file(path / "tensors.safetensors")


def saved_while_training_goes_on(folder, state, tensors):
    """What reaches the disk if a step is taken between the save and the write."""
    writer, go = checkpoint.BackgroundWriter(), threading.Event()

    def write():
        go.wait()
        checkpoint.save(folder, 1, tensors, {})

    writer.submit(write)
    take_step(state.backbone, state.optimizer)
    go.set()
    writer.close()
    return saved_weights(folder / "step-00000001")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_snapshot_does_not_follow_the_training(tmp_path):
    state = small_state()
    before = {name: value.clone() for name, value in state.tensors().items()}
    assert same(saved_while_training_goes_on(tmp_path / "copied", state, state.tensors()), before)
    before = {f"backbone.{name}": value.clone() for name, value in state.backbone.state_dict().items()}
    del before["backbone.second.weight"]  # one tensor of two names cannot be written without copies
    live = {name: value for name, value in state.backbone.state_dict(prefix="backbone.").items() if name in before}
    assert not same(saved_while_training_goes_on(tmp_path / "live", state, live), before)  # control


def test_a_frozen_copy_does_not_follow_the_training():
    state = small_state()
    images = torch.randn(2, 3, 5, 5)
    expected = state.backbone.eval()(images)
    tensors = state.tensors()
    frozen = train_state.frozen_copy(state.backbone, tensors, "backbone.")
    assert frozen.first.weight is frozen.second.weight
    assert frozen.norm.running_mean is tensors["backbone.norm.running_mean"]  # no memory of its own
    take_step(state.backbone.train(), state.optimizer)
    assert torch.equal(frozen.eval()(images), expected)
    assert not torch.equal(state.backbone.eval()(images), expected)  # control


def test_restored_moments_lie_in_memory_as_the_weights_do(tmp_path):
    """Fused optimisers go through memory; the control is the file, where everything is in the plain order."""
    state, other = small_state(), small_state()
    checkpoint.save(tmp_path, 1, state.tensors(), {})
    read = checkpoint.load_latest(tmp_path)[0].tensors
    other.restore(read)
    filters = other.backbone.filters.weight
    moments = other.optimizer.state[filters]["exp_avg"]
    assert torch.equal(moments, state.optimizer.state[state.backbone.filters.weight]["exp_avg"])
    assert moments.stride() == filters.stride()
    assert read["optimizer.0.exp_avg"].shape == filters.shape
    assert read["optimizer.0.exp_avg"].stride() != filters.stride()


def test_writes_come_one_after_the_other():
    writer, go, seen = checkpoint.BackgroundWriter(), threading.Event(), []

    def write(number):
        seen.append(("begin", number))
        assert go.wait(60)
        seen.append(("end", number))

    writer.submit(lambda: write(1))
    assert ("end", 1) not in seen  # `submit` came back before the write was done
    threading.Timer(0.05, go.set).start()
    writer.submit(lambda: write(2))
    assert seen[:2] == [("begin", 1), ("end", 1)]
    writer.wait()
    assert seen[2:] == [("begin", 2), ("end", 2)]
    writer.close()


@pytest.mark.parametrize("call", ["check", "wait", "submit", "close"])
def test_a_failed_write_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer = checkpoint.BackgroundWriter()
    writer.submit(lambda: write(tmp_path, 2))
    while not writer._pending.done():
        time.sleep(0.001)
    arguments = [lambda: pytest.fail("begun after a failure")] if call == "submit" else []
    with pytest.raises(StorageError, match="No space left on device") as raised:
        getattr(writer, call)(*arguments)
    assert raised.value.exit_code == 83
    assert names(tmp_path) == ["step-00000001"]
    writer.close()  # it is raised once


IN_BACKGROUND = """
import os, sys, threading, torch
from pathlib import Path
from nnclr import checkpoint
folder, point = Path(sys.argv[1]), sys.argv[2]
there, real = threading.Event(), getattr(checkpoint, point)
def halted(*arguments):
    there.set()
    threading.Event().wait()
def slow(*arguments):
    threading.Event().wait(0.1)
    return real(*arguments)
setattr(checkpoint, point, halted if sys.argv[3] == "kill" else slow)
checkpoint.BackgroundWriter().submit(lambda: checkpoint.save(folder, 3, {"weights": torch.ones(4)}, {}))
if sys.argv[3] == "kill":
    there.wait()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("point", "newest"), [("sync", 2), ("_prune", 3)])
def test_killed_while_the_background_writes(tmp_path, point, newest):
    folder = tmp_path / "checkpoints"
    write(folder, 1, 2)
    killed = subprocess.run([sys.executable, "-c", IN_BACKGROUND, str(folder), point, "kill"], check=False)
    assert killed.returncode == -9
    found, skipped = checkpoint.load_latest(folder)
    assert (found.step, skipped) == (newest, [])
    checkpoint.clean(tmp_path)
    assert all(name.startswith("step-") for name in names(folder))


def test_a_process_that_ends_waits_for_the_write(tmp_path):
    write(tmp_path, 1, 2)
    subprocess.run([sys.executable, "-c", IN_BACKGROUND, str(tmp_path), "sync", "end"], check=True)
    assert checkpoint.load_latest(tmp_path)[0].step == 3
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
