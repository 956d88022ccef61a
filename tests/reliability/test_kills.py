"""SIGKILL at any time: the next start ends with the bits of the uninterrupted run."""

import json
import os
import random
import secrets
import shutil
import time
from pathlib import Path

import pytest

from nnclr import checkpoint
from nnclr.checkpoint import lock
from nnclr.errors import FolderInUseError
from tests.reliability.runs import TOTAL, after_update, ctrl_c_twice, die, final, same, train
from tests.reliability.test_ranks import job

HERE = "tests.reliability.test_kills"
TRIALS = 60


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """The final state of the uninterrupted run, and the seconds that it takes."""
    folder, times = tmp_path_factory.mktemp("whole"), []
    for number in range(3):
        began = time.perf_counter()
        assert warm.run("tests.reliability.runs:train", str(folder / str(number))) == 0
        times.append(time.perf_counter() - began)
    assert same(final(folder / "0"), final(folder / "1"))
    return final(folder / "0"), min(times)


def test_killed_at_random_times(warm, whole, tmp_path, count):
    seed = int(os.environ.get("NNCLR_CHAOS_SEED") or secrets.randbits(32))
    print(f"NNCLR_CHAOS_SEED={seed} repeats these times")
    expected, seconds = whole
    chances = random.Random(seed)
    alike, killed, resumed = 0, 0, 0
    for number in range(TRIALS):
        run = tmp_path / str(number)
        code = warm.run("tests.reliability.runs:train", str(run), kill_after=chances.uniform(0, seconds))
        killed += code == -9
        resumed += any((run / "checkpoints").glob("step-*"))
        code = warm.run("tests.reliability.runs:train", str(run), log=tmp_path / f"{number}.log")
        assert code == 0, (tmp_path / f"{number}.log").read_text()
        alike += same(final(run), expected)
        shutil.rmtree(run)
    count("A1", "runs killed at a random time that ended bit for bit as the uninterrupted one", alike, TRIALS)
    assert alike == TRIALS, f"NNCLR_CHAOS_SEED={seed}"
    assert killed > TRIALS / 2, "most must still have been running"
    assert 5 < resumed < TRIALS, "both kills before the first checkpoint and kills after it must be among them"


# ---- inside the write of a checkpoint ----------------------------------------------------------------------

# Where in the write of the checkpoint of step 9, and the newest checkpoint that must be found then.
POINTS = {
    "folder made": 6,
    "tensors half written": 6,
    "tensors written": 6,
    "state half written": 6,
    "manifest half written": 6,
    "manifest written": 6,
    "files on the disk": 6,
    "renamed": 9,
    "oldest renamed to be deleted": 9,
    "oldest half deleted": 9,
}


def killed_at(folder, point):
    """In a child: the run, and its end at a point of the write of step 9."""
    after_update(9, lambda: arm(point))
    train(folder)


def half(path, content):
    """Half of a file, as a kill in the middle of a write leaves it."""
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
    die()


def arm(point):
    """The write of the checkpoint before is done with, or waited for, in the save that follows."""
    save = checkpoint.save

    def armed(folder, step, tensors, state, keep=None):
        if step == 9:
            patch(point, folder)
        return save(folder, step, tensors, state, keep)

    checkpoint.save = armed


def patch(point, folder):
    library, sync, write_text = checkpoint.safetensors.torch, checkpoint.sync, Path.write_text
    rename, rmtree = Path.rename, shutil.rmtree
    save_file = library.save_file
    if point == "folder made":
        library.save_file = die
    elif point == "tensors half written":
        library.save_file = lambda tensors, path: half(path, library.save(tensors))
    elif point == "tensors written":
        library.save_file = lambda tensors, path: (save_file(tensors, path), die())
    elif point in ("state half written", "manifest half written"):
        name = point.split()[0]
        Path.write_text = lambda p, text: half(p, text.encode()) if p.stem == name else write_text(p, text)
    elif point == "manifest written":
        checkpoint.sync = die
    elif point == "files on the disk":
        Path.rename = die
    elif point == "renamed":
        checkpoint.sync = lambda path: die() if path == folder else sync(path)
    elif point == "oldest renamed to be deleted":
        Path.rename = lambda p, to: (rename(p, to), die()) if "old" in Path(to).name else rename(p, to)
    elif point == "oldest half deleted":
        checkpoint.shutil.rmtree = lambda path, **options: (
            (next(path.iterdir()).unlink(), die()) if "old" in path.name else rmtree(path, **options)
        )
    else:
        raise KeyError(point)


def test_killed_at_every_point_of_the_write(warm, whole, tmp_path, count):
    """The old or the new checkpoint, never a third thing; also in a copy that is made of it at that moment."""
    expected, _ = whole
    alike = 0
    for number, (point, newest) in enumerate(POINTS.items()):
        run, copied = tmp_path / str(number), tmp_path / f"{number}-copied"
        log = tmp_path / f"{number}.log"
        assert warm.run(f"{HERE}:killed_at", str(run), point, log=log) == -9, (point, log.read_text())
        found, skipped = checkpoint.load_latest(run / "checkpoints")
        assert (found.step, skipped) == (newest, []), point
        shutil.copytree(run / "checkpoints", copied)
        assert checkpoint.load_latest(copied)[0].step == newest, point
        assert warm.run("tests.reliability.runs:train", str(run), log=log) == 0, (point, log.read_text())
        alike += same(final(run), expected)
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        kept = [f"step-{newest:08d}", "step-00000018", "step-00000020"]
        assert names == kept, point  # what was half done is gone, and what was resumed from is there
    count("A2", "kills inside the write of a checkpoint, resumed to the same bits", alike, len(POINTS))
    assert alike == len(POINTS)


def naive(folder, step):
    """In a child: a checkpoint under its final name from the start, as most programs write it, and a loss of power."""
    path = Path(folder) / "checkpoints/step-00000009"

    def save(*_):
        shutil.copytree(path.with_name("step-00000006"), path)
        (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("6", "9"))
        file = path / "tensors.safetensors"
        library = checkpoint.safetensors.torch
        tensors = library.load_file(file)
        tensors["objective.support_set.vectors"].zero_()  # as where blocks never reached the disk
        library.save_file(tensors, file)
        die()

    after_update(step, lambda: setattr(checkpoint, "save", save))
    train(folder)


def trusting(folder):
    """In a child: the run by a reader that takes any folder for a checkpoint."""
    checkpoint.problem = lambda path: None
    train(folder)


def test_control_a_checkpoint_written_in_place_is_lost(warm, whole, tmp_path):
    run = tmp_path / "run"
    assert warm.run(f"{HERE}:naive", str(run), 9) == -9
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    assert warm.run(f"{HERE}:trusting", str(copied)) == 0
    assert not same(final(copied), whole[0])  # in silence another run
    assert warm.run("tests.reliability.runs:train", str(run)) == 0  # the manifest finds it out
    assert same(final(run), whole[0])
    assert nnclr_line(run, TOTAL)["skipped_checkpoints"] == 1


def nnclr_line(run, step):
    """The line of metrics.jsonl of a step."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == step)


# ---- behind the last checkpoint, and around the lock -------------------------------------------------------


def killed_while_it_finishes(folder):
    """In a child: the whole run, and its end when the curves are to be drawn."""
    from nnclr import plots

    plots.draw_curves = die
    train(folder, outputs=True)


def finished_again(folder):
    """In a child: the run, whose steps must not be taken again."""
    import nnclr

    nnclr.NNCLR.forward = None
    train(folder, outputs=True)


def test_killed_between_the_last_checkpoint_and_the_end(warm, whole, tmp_path):
    run = tmp_path / "run"
    assert warm.run(f"{HERE}:killed_while_it_finishes", str(run)) == -9
    assert not (run / "report.html").exists()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix == ".jsonl"}
    assert warm.run(f"{HERE}:finished_again", str(run), log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "it is finished" in (tmp_path / "log").read_text()
    assert same(final(run), whole[0])
    assert (run / "report.html").read_text().rstrip().endswith("</html>")
    assert (run / "curves.png").stat().st_size > 1000
    assert (run / "encoder/model.safetensors").exists()
    assert before == {name: (run / name).read_bytes() for name in before}


def hold(folder):
    """In a child: own the folder, and die with it."""
    with lock(Path(folder)):
        die()


def test_the_lock_of_a_killed_process_is_free_at_once(warm, tmp_path):
    assert warm.run(f"{HERE}:hold", str(tmp_path)) == -9
    assert "process" in (tmp_path / ".lock").read_text()  # its owner could not tidy up
    with lock(tmp_path), pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), lock(tmp_path):
        pytest.fail("two owners")  # the control: a living one keeps it


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    with pytest.raises(checkpoint.StorageError, match="has no locks"), lock(tmp_path):
        pytest.fail("nobody may own it")


# ---- a step that kills the process every time --------------------------------------------------------------


def poisoned(folder, step):
    """In a child: the run, which dies in a step however often it is started, with the checkpoint before it written."""

    def strike():
        until = time.monotonic() + 30
        while not any(Path(folder).glob("checkpoints/step-*")) and time.monotonic() < until:
            time.sleep(0.01)
        die()

    after_update(step, strike)
    train(folder)


def left_at_once(folder, step):
    """In a child: the run, and Ctrl-C twice in a step."""
    after_update(step, ctrl_c_twice)
    train(folder)


def uncounted(folder, step):
    """In a child: `poisoned`, where nobody counts the starts."""
    from contextlib import nullcontext

    from nnclr import run_folder

    run_folder.attempt = lambda run, step: nullcontext()
    poisoned(folder, step)


def test_a_poisoned_step_ends_with_code_87(warm, whole, tmp_path, count):
    """Three restarts from one checkpoint are granted; a new checkpoint, or a stop on request, starts a new count."""
    run, log = tmp_path / "run", tmp_path / "log"
    codes = [warm.run(f"{HERE}:poisoned", str(run), 5, log=log)]  # the first start came to the checkpoint of step 3
    codes += [warm.run(f"{HERE}:poisoned", str(run), 5, log=log) for _ in range(5)]
    count("A20", "starts from one checkpoint before a run is given up", codes[1:].count(-9), 4)
    assert codes == [-9] * 5 + [87]
    said = log.read_text().splitlines()[-1]
    assert "started again 3 times from step 3 and never came to its next checkpoint; see" in said
    assert f"delete {run}/attempts.json to try once more" in said
    assert warm.run(f"{HERE}:uncounted", str(run), 5) == -9  # the control
    (run / "attempts.json").unlink()
    assert warm.run("tests.reliability.runs:train", str(run)) == 0
    assert same(final(run), whole[0])
    assert not (run / "attempts.json").exists()


def test_leaving_at_once_is_no_failed_start(warm, tmp_path):
    assert [warm.run(f"{HERE}:left_at_once", str(tmp_path / "run"), 2) for _ in range(5)] == [130] * 5


def test_starts_are_counted_by_step_and_damage_is_forgiven(tmp_path):
    from nnclr.errors import DataError, NonFiniteError, NoProgressError
    from nnclr.run_folder import attempt

    def start(step, error):
        with pytest.raises(type(error)), attempt(tmp_path, lambda: step):
            raise error

    for _ in range(5):
        start(0, TypeError("an objective that is being written, at the first step of all"))
    for _ in range(4):
        start(6, RuntimeError("killed, as far as the file can tell"))
    with pytest.raises(NoProgressError) as raised, attempt(tmp_path, lambda: 6):
        pytest.fail("begun")
    assert raised.value.exit_code == 87
    start(9, RuntimeError("there was a new checkpoint"))
    assert json.loads((tmp_path / "attempts.json").read_text()) == {"step": 9, "starts": 1}
    for error in (DataError("repair the images and start again"), NonFiniteError("another learning rate")):
        start(9, error)
        assert not (tmp_path / "attempts.json").exists()
    for damage in (b"", b"[]", b'{"step": 9}', b"\xff"):
        (tmp_path / "attempts.json").write_bytes(damage)
        with attempt(tmp_path, lambda: 9):
            assert json.loads((tmp_path / "attempts.json").read_text())["starts"] == 1


def test_all_ranks_of_a_job_give_up_together(warm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / "attempts.json").write_text('{"step": 0, "starts": 4}')
    assert job(warm, tmp_path)["codes"] == [87, 87]
    said = [(tmp_path / f"{rank}.log").read_text().count("started again 3 times from step 0") for rank in range(2)]
    assert said[0] > 0
