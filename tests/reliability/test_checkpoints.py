"""Checkpoints against damage, full disks, other settings, other images, other clocks and other versions."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import nnclr
from nnclr import checkpoint, report, train_state
from nnclr.errors import FolderInUseError, InputError, NoCheckpointError, StorageError
from tests import legacy
from tests.reliability import runs
from tests.reliability.runs import after_update, final, same, train

HERE = "tests.reliability.test_checkpoints"
FILES = ("tensors.safetensors", "state.json", "manifest.json")


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert warm.run("tests.reliability.runs:train", str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(warm, tmp_path_factory):
    """The run folder of a run that was stopped at step 7; its checkpoints are of steps 6 and 7."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert warm.run("tests.reliability.runs:stop_after", str(folder), 7) == 80
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Without the report, which takes longer than the steps."""
    monkeypatch.setattr(report, "write_report", lambda run, **_: Path(run))


def content(folder):
    """Every file with its bytes and its time of writing."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- damage ------------------------------------------------------------------------------------------------


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(64, 100, generator=generator) for name in ("weights", "moments", "support set")}


@pytest.fixture
def three(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "checkpoints", step, tensors(step), {"notes": {"at": step}}, keep=1)
    return tmp_path / "checkpoints"


def damaged(kind, good, rng):
    """The bytes of a file after a fault of the disk."""
    bad = bytearray(good)
    if kind == "flip":
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        start = rng.randrange(len(bad))
        bad[start : start + 4096] = bytes(len(bad[start : start + 4096]))
    else:
        bad = bad[: rng.choice([0, len(bad) - 1, rng.randrange(len(bad))])]
    return bytes(bad)


def loads_in_silence(load, path):
    """Whether a reader gives something else than what was written without a word."""
    try:
        found = load(path)
        return found.keys() != tensors(3).keys() or not all(torch.equal(found[n], t) for n, t in tensors(3).items())
    except Exception:  # noqa: BLE001 - any word will do
        return False


def test_every_damage_is_noticed(three, tmp_path, count):
    """75 flipped bits, zeroed blocks, cut files and exchanged files; the controls are the formats by themselves."""
    rng = random.Random(0)
    newest, noticed, silent, foreign = three / "step-00000003", 0, 0, 0
    other = tmp_path / "state.pt"
    torch.save(tensors(3), other)
    theirs = other.read_bytes()
    for number, kind in itertools.product(range(75), ("flip", "zero", "cut")):
        name = FILES[0] if number % 3 else FILES[number % 9 // 3]
        good = (newest / name).read_bytes()
        (newest / name).write_bytes(damaged(kind, good, rng))
        found, skipped = checkpoint.load_latest(three)
        noticed += found.step == 2 and len(skipped) == 1 and skipped[0].startswith("step-00000003 skipped: ")
        if name == FILES[0] and kind != "cut":
            silent += loads_in_silence(safetensors.torch.load_file, newest / name)
            other.write_bytes(damaged(kind, theirs, rng))
            foreign += loads_in_silence(lambda path: torch.load(path, weights_only=True), other)
        (newest / name).write_bytes(good)
    for number in range(75):
        taken = [name for bit, name in enumerate(FILES) if number % 7 + 1 & 1 << bit]  # each selection of the files
        shutil.copytree(newest, tmp_path / "kept")
        for name in taken:
            shutil.copy(three / f"step-0000000{1 + number % 2}" / name, newest)
        found, skipped = checkpoint.load_latest(three)
        noticed += found.step == 2 and len(skipped) == 1
        shutil.rmtree(newest)
        (tmp_path / "kept").rename(newest)
    assert checkpoint.load_latest(three)[0].step == 3
    count("A6", "flipped bits, zeroed blocks, cuts and exchanged files that were noticed", noticed, 300)
    count("A6", "control: damaged tensors that safetensors alone loads in silence", silent, 100)
    count("A6", "control: damaged files that torch.load loads in silence", foreign, 100)
    assert noticed == 300
    assert silent > 80
    assert foreign > 50


def test_partial_copies_of_a_checkpoint_do_not_count(three, tmp_path):
    """What a copying program leaves where it is stopped, or copies a folder that is being written."""
    newest, size = three / "step-00000003", {}
    for name in FILES:
        size[name] = (newest / name).stat().st_size
    for chosen in itertools.product(*[(0, size[name] // 2, size[name], None) for name in FILES]):
        copied = tmp_path / "copied"
        shutil.copytree(three, copied)
        for name, length in zip(FILES, chosen, strict=True):
            if length is None:
                (copied / newest.name / name).unlink()
            else:
                os.truncate(copied / newest.name / name, length)
        complete = chosen == tuple(size.values())
        assert checkpoint.load_latest(copied)[0].step == (3 if complete else 2)
        shutil.rmtree(copied)
    shutil.copytree(newest, three / ".tmp-4-99")  # unfinished folders are none, whatever is in them
    assert checkpoint.load_latest(three)[0].step == 3


def test_a_damaged_checkpoint_is_skipped_counted_and_named(warm, stopped, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    os.truncate(run / "checkpoints/step-00000007/tensors.safetensors", 100)
    assert warm.run("tests.reliability.runs:train", str(run), log=log) == 0, log.read_text()
    assert "step-00000007 skipped: tensors.safetensors is damaged" in log.read_text()
    assert "warning: one damaged checkpoint was skipped" in log.read_text()
    counted = {line["step"]: line["skipped_checkpoints"] for line in nnclr.Run(run).metrics}
    assert counted == {step: int(step > 6) for step in range(2, 21, 2)}
    assert same(final(run), final(whole))


def test_no_good_checkpoint_is_code_86_and_changes_nothing(warm, stopped, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    for path in (run / "checkpoints").glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-9])
    before = {path: got[0] for path, got in content(run).items()}
    assert warm.run("tests.reliability.runs:train", str(run), log=log) == 86
    assert "none of the 2 checkpoints" in log.read_text()
    assert before == {path: got[0] for path, got in content(run).items()}


# ---- storage -----------------------------------------------------------------------------------------------


def refuse(number, when=lambda *_: True, real=None):
    """A function that fails with an errno where `when` says so."""

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call


def file_size_limit(run):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def full_in_the_tensors(run):
    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    checkpoint.safetensors.torch.save_file = full


def text_fails(name, number):
    Path.write_text = refuse(number, lambda path, text: path.name == name, Path.write_text)


def sync_fails(suffix):
    checkpoint.sync = refuse(errno.EIO, lambda path: str(path).endswith(suffix), checkpoint.sync)


def moved_away(run, name, link=None):
    """Put a file, or a link, in the place of something of the run."""
    os.rename(run / name, run / f"{name} kept")
    if link is None:
        (run / name).write_text("not what it was")
    else:
        (run / name).symlink_to(link)


# What happens before the checkpoint of step 9 is written, what is said of it, and the newest checkpoint after it.
FAULTS = {
    "the kernel refuses a larger file": (file_size_limit, "File too large", 6),
    "the disk is full in the tensors": (full_in_the_tensors, "No space left on device", 6),
    "the disk is full in the state": (lambda run: text_fails("state.json", errno.ENOSPC), "No space left", 6),
    "the quota ends in the manifest": (lambda run: text_fails("manifest.json", errno.EDQUOT), "quota", 6),
    "a file cannot be synced": (lambda run: sync_fails("tensors.safetensors"), "Input/output error", 6),
    "the new folder cannot be synced": (lambda run: sync_fails(f".tmp-9-{os.getpid()}"), "Input/output error", 6),
    "it cannot be renamed": (
        lambda run: setattr(Path, "rename", refuse(errno.EIO)), "Input/output error", 6),
    "the parent cannot be synced": (lambda run: sync_fails("/checkpoints"), "Input/output error", 9),
    "the file system becomes read-only": (
        lambda run: setattr(Path, "mkdir", refuse(errno.EROFS)), "Read-only file system", 6),
    "a file is in the way": (lambda run: moved_away(run, "checkpoints"), "exists", 6),
    "the run folder vanishes": (lambda run: os.rename(run, f"{run} kept"), "No such file or directory", 6),
    "metrics.jsonl cannot be written": (
        lambda run: moved_away(run, "metrics.jsonl", "/dev/full"), "No space left on device", 9),
    "the encoder cannot be written": (lambda run: moved_away(run, "encoder"), "exists", 9),
}  # fmt: skip


def failing(folder, fault):
    """In a child: the run, and a fault of its disk."""
    after_update(8, lambda: checkpoint_is_written(folder) and FAULTS[fault][0](Path(folder)))
    train(folder, {"log_every_steps": 5})


def checkpoint_is_written(folder):
    """Wait for the checkpoint of step 6 and its encoder, which a thread writes."""
    until = time.monotonic() + 30
    config = Path(folder) / "encoder/config.json"
    while not (config.exists() and json.loads(config.read_bytes())["nnclr"]["provenance"]["step"] == 6):
        assert time.monotonic() < until
        time.sleep(0.005)
    return True


def mended(run):
    """Put back what was moved away."""
    for kept in [*run.parent.glob("* kept"), *run.glob("* kept")]:
        place = kept.with_name(kept.name.removesuffix(" kept"))
        assert kept == run.with_name(f"{run.name} kept") or place.is_file() or place.is_symlink()
        assert place != run or not run.exists()  # a vanished folder is not made anew
        place.unlink(missing_ok=True)
        kept.rename(place)


def test_faults_of_the_disk(warm, whole, tmp_path, count):
    """Code 83 and what is wrong; the older checkpoint is whole, nothing partial lies about, and the run goes on."""
    good = 0
    for number, (fault, (_, words, newest)) in enumerate(FAULTS.items()):
        run, log = tmp_path / f"run{number}", tmp_path / f"{number}.log"
        assert warm.run(f"{HERE}:failing", str(run), fault, log=log) == 83, (fault, log.read_text())
        assert words in log.read_text().splitlines()[-1], (fault, log.read_text())
        assert "Traceback" not in log.read_text(), fault
        mended(run)
        found, skipped = checkpoint.load_latest(run / "checkpoints")
        assert (found.step, skipped) == (newest, []), fault
        assert all(name.startswith("step-") for name in names(run / "checkpoints")), fault
        assert warm.run("tests.reliability.runs:train", str(run), log=log) == 0, (fault, log.read_text())
        good += same(final(run), final(whole))
    count("A4", "faults of the disk: code 83, the older checkpoint whole, resumed to the same bits", good, len(FAULTS))
    assert good == len(FAULTS) >= 12


def pretrain(run, **changes):
    return nnclr.pretrain(runs.data(), run, backbone=runs.backbone(), quiet=True, **runs.SETTINGS | changes)


def test_too_little_room_is_noticed_before_the_first_step(monkeypatch, stopped, tmp_path):
    """All checkpoints that are ever there together must fit: a byte less is refused, and the control has that byte."""
    fresh, begun = tmp_path / "fresh", tmp_path / "begun"
    shutil.copytree(stopped, begun)
    written = sum(path.stat().st_size for path in (begun / "checkpoints/step-00000007").iterdir())
    size = nbytes_of_a_run()
    assert size == pytest.approx(written, abs=20_000)  # the generator's state and the text
    together = checkpoint.KEEP + 2  # that which a process began from, and that which is written
    monkeypatch.setattr(nnclr.NNCLR, "forward", lambda *_: pytest.fail("a step was begun"))
    for run, number in ((fresh, together), (begun, together - 2)):
        for free in (1000, number * size - 1):
            monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
            with pytest.raises(
                StorageError, match=rf"{number} more checkpoints in .* takes .* MiB and \d+ MiB are free: make"
            ):
                pretrain(run)
            assert not (run / "attempts.json").exists()
        enough = type("Usage", (), {"free": number * size})
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, enough=enough: enough)
        with pytest.raises(pytest.fail.Exception, match="a step was begun"):  # the control
            pretrain(run)


def nbytes_of_a_run():
    from nnclr.config import make_config
    from nnclr.training import build, resolve

    config = resolve(make_config("data", "out", **runs.SETTINGS), nnclr.data.source.open_source(runs.data()))
    return build(config, torch.device("cpu"), runs.backbone()).nbytes()


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_the_size_of_a_checkpoint_is_known_before_a_step(optimizer):
    from nnclr.config import make_config
    from nnclr.training import build, resolve

    source = nnclr.data.source.open_source(runs.data())
    settings = runs.SETTINGS | {"optimizer": optimizer, "backbone": "small-convnet", "ema_momentum": 0.9}
    state = build(resolve(make_config("data", "out", **settings), source), torch.device("cpu"))
    before = state.nbytes()
    for p in state._parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    written = sum(tensor.nbytes for tensor in state.tensors().values())
    assert before == state.nbytes() == pytest.approx(written, abs=20_000)  # the generators' states


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setattr(nnclr.NNCLR, "forward", lambda *_: pytest.fail("a step was begun"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        pretrain(tmp_path / "file/run")
    with pytest.raises(InputError, match="is a file"):  # a slip of the hand, not of the disk
        pretrain(tmp_path / "file")
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    with pytest.raises(StorageError, match="cannot be written: Read-only file system") as raised:
        pretrain(tmp_path / "run")
    assert raised.value.exit_code == 83


# ---- another run in the folder -----------------------------------------------------------------------------

OTHERS = {
    "temperature": 0.2,
    "support_set_size": 60,
    "embedding_dim": 8,
    "batch_size": 20,
    "image_size": 24,
    "optimizer": "adamw",
    "learning_rate": 0.1,
    "epochs": 5.0,
    "seed": 1,
}


def test_another_configuration_is_refused_and_named(stopped, tmp_path, count):
    before, refused = content(stopped), 0
    for name, value in OTHERS.items():
        with pytest.raises(InputError, match=rf"another config \(.*{name}: .* there, {value!r} now") as raised:
            pretrain(stopped, **{name: value})
        refused += raised.value.exit_code == 2 and content(stopped) == before
    with pytest.raises(InputError, match="backbone: 'module:Sequential' there, 'small-convnet' now"):
        nnclr.pretrain(runs.data(), stopped, backbone="small-convnet", quiet=True, **runs.SETTINGS)
    refused += content(stopped) == before
    count("A8", "changed settings that were refused by name with nothing touched", refused, len(OTHERS) + 1)
    assert refused == len(OTHERS) + 1


def test_settings_that_change_nothing_are_accepted(warm, stopped, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    changes = {"checkpoint_every_steps": 4, "log_every_steps": 5, "evaluate_every_epochs": 1, "knn_k": 5}
    assert warm.run("tests.reliability.runs:train", str(run), changes, log=log) == 0, log.read_text()
    assert same(final(run), final(whole))


def photos(folder):
    rng = np.random.default_rng(0)
    for i in range(24):
        path = folder / "ab"[i % 2] / f"{i:02d}.bmp"  # whose size follows from that of the picture
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def larger(path):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(path)


MUTATIONS = {
    "a file is added": lambda data: larger(data / "a/new.bmp"),
    "a file is removed": lambda data: (data / "a/00.bmp").unlink(),
    "a file is renamed": lambda data: (data / "a/00.bmp").rename(data / "a/99.bmp"),
    "a file has another size": lambda data: larger(data / "a/00.bmp"),
    "a file is in another class": lambda data: (data / "a/00.bmp").rename(data / "b/00.bmp"),
    "a class has another name": lambda data: (data / "a").rename(data / "c"),
}


def test_other_images_are_refused(quick, tmp_path, count):
    """The folder alone may move. What is not noticed, as is documented: other pixels in a file of the same size."""
    photos(tmp_path / "data")
    settings = {"batch_size": 8, "epochs": 1, "evaluate_every_epochs": 0, "backbone": "small-convnet"}

    def start(data):
        return nnclr.pretrain(data, tmp_path / "run", quiet=True, **runs.SETTINGS | settings)

    start(tmp_path / "data")
    before, refused = final_of(tmp_path / "run"), 0
    for number, (mutation, change) in enumerate(MUTATIONS.items()):
        data = tmp_path / str(number)
        shutil.copytree(tmp_path / "data", data)
        change(data)
        with pytest.raises(InputError, match=r"was trained on 24 images of .*data; .* now holds \d+ images") as raised:
            start(data)
        refused += raised.value.exit_code == 2
        assert final_of(tmp_path / "run") == before, mutation
    moved = tmp_path / "moved"
    (tmp_path / "data").rename(moved)
    start(moved)  # the control
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(moved / "a/00.bmp")
    start(moved)
    count("A12", "changes of the images that were refused", refused, len(MUTATIONS))
    assert refused == len(MUTATIONS)


def test_what_a_kill_left_unfinished_is_gone_at_the_next_start(warm, stopped, tmp_path):
    """Also beside the checkpoints; what another process may be writing into the folder stays, and so do real files."""
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    left = [
        *("encoder/.tmp-model.safetensors-99", "encoder/.tmp-config.json-99", ".tmp-config.toml-99"),
        *(".tmp-metrics.jsonl-99", ".tmp-report.html-99", ".tmp-curves.png-99", "checkpoints/.tmp-8-99/state.json"),
        *("neighbours/.tmp-step-00000010.png-99", "nonfinite/.tmp-step-00000003.json-99"),
    ]
    others = [".tmp-vectors.parquet-abc/0", ".tmp-list.index-99", ".tmp-mine.json", "encoder/model.safetensors-99"]
    for name in left + others:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"part")
    assert warm.run("tests.reliability.runs:stop_after", str(run), 8, log=log) == 80, log.read_text()
    assert [name for name in left if (run / name).exists()] == []
    assert [name for name in others if not (run / name).exists()] == []


def test_without_the_lock_nothing_unfinished_is_touched(stopped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "encoder/.tmp-config.json-99").write_bytes(b"another process's")
    with checkpoint.lock(run), pytest.raises(FolderInUseError):
        pretrain(run)
    assert (run / "encoder/.tmp-config.json-99").exists()


def final_of(run):
    return sorted((path.name, (path / FILES[2]).read_text()) for path in (run / "checkpoints").iterdir())


# ---- retention, order, clocks, versions --------------------------------------------------------------------


def test_retention_never_deletes_what_a_process_began_from(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        checkpoint.save(folder, step, tensors(step), {}, keep=1)
    assert names(folder) == ["step-00000001", "step-00000004", "step-00000005"]
    checkpoint.save(folder, 6, tensors(6), {})  # the control
    assert names(folder) == ["step-00000005", "step-00000006"]


def test_nothing_is_deleted_before_two_newer_ones_are_verified(three, monkeypatch):
    problem, seen = checkpoint.problem, []

    def judged(path):
        seen.append(path.name)
        return "it does not fit" if path.name == "step-00000004" and path.exists() else problem(path)

    monkeypatch.setattr(checkpoint, "problem", judged)
    checkpoint.save(three, 4, tensors(4), {})
    assert seen[-3:] == ["step-00000004", "step-00000003", "step-00000002"]  # read again from the newest on
    assert names(three) == ["step-00000002", "step-00000003", "step-00000004"]
    outside = three.parent / "another run's"
    shutil.copytree(three / "step-00000003", outside)
    (three / "step-00000001").symlink_to(outside)
    monkeypatch.setattr(checkpoint, "problem", problem)
    checkpoint.save(three, 5, tensors(5), {})
    assert sorted(names(outside)) == sorted(FILES)  # the link is gone, what it led to is not


def recorded(monkeypatch):
    """The paths that are synced and renamed from now on, in their order."""
    events, fsync = [], os.fsync

    def synced(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def moving(real):
        def move(old, new):
            events.append(("rename", str(old)))
            real(old, new)

        return move

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, moving(getattr(os, name)))
    return events


def not_yet_on_the_disk(events, parent, inner=()):
    """What a loss of power could take although the final name is there."""
    at = next(i for i, (kind, path) in enumerate(events) if kind == "rename" and "/.tmp-" in path)
    temporary = events[at][1]
    before = [("sync", temporary), *(("sync", f"{temporary}/{name}") for name in inner)]
    late = [path for kind, path in before if (kind, path) not in events[:at]]
    return late + [path for path in [str(parent)] if ("sync", path) not in events[at:]]


def test_everything_is_on_the_disk_before_it_has_its_name(monkeypatch, tmp_path):
    """The order of the system's calls: files, folder, renaming, parent; the control leaves the syncs out."""
    folder = tmp_path / "checkpoints"
    events = recorded(monkeypatch)
    checkpoint.save(folder, 1, tensors(1), {})
    assert events[0] == ("sync", str(tmp_path))  # the new folder of checkpoints itself
    assert not_yet_on_the_disk(events, folder, FILES) == []
    events.clear()
    checkpoint.write_atomically(tmp_path / "file", b"content")
    assert not_yet_on_the_disk(events, tmp_path) == []
    events.clear()
    monkeypatch.setattr(checkpoint, "sync", lambda path: None)
    checkpoint.save(folder, 2, tensors(2), {})
    assert len(not_yet_on_the_disk(events, folder, FILES)) == 5


def elsewhen(folder):
    """In a child: the run goes on a day earlier, in another time zone, with the times of its files reversed."""
    from nnclr.recorder import Recorder

    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    now, start = time.time, Recorder.start
    time.time = lambda: now() - 86_400
    for number, path in enumerate(sorted((Path(folder) / "checkpoints").iterdir(), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))

    def started(self, *arguments):
        owner = (Path(folder) / ".lock").read_text()
        assert time.strftime("started %Y-%m-%d %H:", time.gmtime()) in owner, owner
        assert "UTC" in owner
        start(self, *arguments)

    Recorder.start = started
    train(folder)


def test_clocks_play_no_part(warm, stopped, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    assert warm.run(f"{HERE}:elsewhen", str(run), log=log) == 0, log.read_text()
    assert "at step 7 of 20" in log.read_text()
    assert same(final(run), final(whole))


def gone_on(version, run):
    """The losses of the steps after a stored checkpoint, from a network that began otherwise."""
    run.mkdir()
    for name in ("config.toml", "checkpoints"):
        source = legacy.FOLDER / version / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, run / name)
    done = nnclr.pretrain(legacy.pictures(), run, backbone=legacy.network(seed=9), **legacy.settings())
    assert [line["step"] for line in done.metrics] == list(range(legacy.STOPPED + 1, legacy.TOTAL + 1))
    return [line["loss"] for line in done.metrics]


@pytest.mark.parametrize("version", sorted(path.parent.name for path in legacy.FOLDER.glob("*/config.toml")))
def test_checkpoints_of_every_release_go_on(version, quick, monkeypatch, tmp_path, count):
    """To the losses that the release itself had; the control forgets the momentum."""
    expected = [*json.loads((legacy.FOLDER / version / "expected.json").read_text())["losses"].values()]
    losses = gone_on(version, tmp_path / "run")
    count("A18", f"losses after a checkpoint of {version} that are those of that release", len(losses), len(expected))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert sum(path.stat().st_size for path in (legacy.FOLDER / version).rglob("*")) < 60_000
    restore = train_state.TrainState.restore

    def forgetful(self, saved):
        restore(self, {name: torch.zeros_like(t) if "exp_avg" in name else t for name, t in saved.items()})

    monkeypatch.setattr(train_state.TrainState, "restore", forgetful)
    assert gone_on(version, tmp_path / "control") != pytest.approx(expected, rel=1e-3)


def test_a_newer_format_is_not_taken_for_damage(three):
    """Going on from the older one would train the same steps again, and in the end replace the newer one."""
    newest = three / "step-00000003"
    for name in FILES[1:]:
        (newest / name).write_text((newest / name).read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(NoCheckpointError, match=r"step-00000003 has format 2, from a newer nnclr, and this one reads "):
        checkpoint.load_latest(three)
    (newest / FILES[1]).write_text((newest / FILES[1]).read_text().replace('"format": 2', '"format": 1'))
    assert checkpoint.load_latest(three)[0].step == 2  # one flipped digit is damage
