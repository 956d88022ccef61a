"""Threads, file descriptors and memory: what a long run takes, and what hangs or is killed beside it."""

import contextlib
import gc
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import nnclr
from nnclr import cli, neighbour_sheet
from nnclr.data import ahead, decode, folder
from nnclr.data.augment import policy
from nnclr.data.images import Source
from nnclr.data.loader import Plan, StreamLoader, load_resident
from nnclr.errors import DataError, Stopped
from nnclr.evaluation.knn import knn_predict, nearest_rows
from nnclr.recorder import Recorder
from tests.data.test_decode import encoded, photo, png_header
from tests.settings import TINY
from tests.test_cli import PLAIN

CPU = torch.device("cpu")
KIB = 64  # of growth an epoch
WARM, EPOCHS, LEAKY = 8, 30, 8  # epochs before the measurement, in it, and in that of the control
STEPS = 3  # of an epoch


def of_two_sizes(n=120, look=lambda i: None):
    """A source whose images are read step by step, because they differ in size; look(i) is called for each read."""
    images = np.random.default_rng(0).integers(0, 256, (n, 16, 17, 3), dtype=np.uint8)

    def fetch(i):
        look(i)
        return images[i][:, : 16 + i % 2]

    return Source("two sizes", n, fetch, lambda i: f"{i:03d}.png", "0" * 64)


def loader_of(source, workers=2, batch_size=8):
    return StreamLoader(source, Plan(len(source), batch_size, policy("crop-only", 16), 0), CPU, workers)


def kilobytes(name):
    """A figure of /proc/self/status."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def children():
    return sum(
        len(Path(f"/proc/self/task/{task}/children").read_text().split()) for task in os.listdir("/proc/self/task")
    )


# ---- workers are threads -----------------------------------------------------------------------------------


def decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_error_of_a_worker_ends_the_run_and_its_threads(tmp_path, count):
    """Whatever it is: here one that no image should raise. It comes out as it is, and nothing waits for ever."""

    def fail(i):
        if i == 77:
            raise MemoryError("no memory for image 77")

    with pytest.raises(MemoryError, match="image 77"):
        nnclr.pretrain(of_two_sizes(look=fail), tmp_path / "run", **TINY | {"num_workers": 3})
    count("E1", "threads left after an error in one", len(decoding_threads()), 0)
    assert decoding_threads() == []


def test_a_hundred_loaders_in_a_row():
    """Begun and left in the middle, as evaluations do: nothing hangs, nothing stays."""
    before = threading.active_count()
    ids = []
    for _ in range(100):
        batches = loader_of(of_two_sizes(32), workers=2).batches(0, 4)
        ids.append(next(batches).ids.tolist())
        batches.close()
    assert ids == [ids[0]] * 100
    assert threading.active_count() == before


# ---- reads that hang ---------------------------------------------------------------------------------------


class Blocked:
    """A read of one image that does not end before it is released."""

    def __init__(self, image):
        self.image, self.on, self.release = image, False, threading.Event()

    def __call__(self, i):
        if self.on and i == self.image:
            self.release.wait()


@pytest.fixture
def blocked():
    made = Blocked(77)
    yield made
    made.release.set()
    while decoding_threads():
        time.sleep(0.01)


def test_a_read_without_an_end_is_named_and_then_ends_the_run(blocked, monkeypatch, tmp_path):
    """A line that names the image, later code 81; the thread that hangs is not waited for."""
    monkeypatch.setattr(ahead, "SAID_AFTER", 0.3)
    monkeypatch.setattr(ahead, "MOST_SECONDS", 1.5)
    monkeypatch.setattr(ahead, "_LOOK", 0.1)
    monkeypatch.setattr(ahead, "_LEAVE", 0.5)
    real = Recorder.after_step

    def then_block(self, *rest):
        real(self, *rest)
        blocked.on = self.state.step >= 5

    monkeypatch.setattr(Recorder, "after_step", then_block)
    began = time.monotonic()
    said = r"077.png of two sizes has been read for \d+ s and is not there yet: its storage is slow or gone"
    with pytest.warns(UserWarning, match=said) as warned:  # noqa: SIM117
        with pytest.raises(DataError, match=r"077.png of two sizes has been read for .* without an end") as raised:
            nnclr.pretrain(of_two_sizes(look=blocked), tmp_path / "run", **TINY | {"num_workers": 2})
    assert raised.value.exit_code == 81
    assert len(warned) == 1  # and not one for each look
    assert time.monotonic() - began < 60
    assert decoding_threads()  # the control: it hangs still


@pytest.mark.parametrize("where", ["the first image of a set", "the picture of neighbours"])
def test_reads_outside_of_training_are_named_and_end_too(where, blocked, monkeypatch):
    """Where no loader is: a read in the main thread would be waited for without a word."""
    monkeypatch.setattr(ahead, "SAID_AFTER", 0.1)
    monkeypatch.setattr(ahead, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(ahead, "_LOOK", 0.05)
    monkeypatch.setattr(ahead, "_LEAVE", 0.1)
    blocked.image, blocked.on = 0, True
    unblock = threading.Timer(10, blocked.release.set)  # so that this fails, and does not hang, in the main thread
    unblock.start()
    source, said = of_two_sizes(look=blocked), r"000\.png of two sizes has been read"

    def read():
        if where == "the first image of a set":
            load_resident(source, CPU, 2)
        else:
            neighbour_sheet._sheet(source, [(5, [(3, 0.9), (0, 0.8)])])

    with pytest.warns(UserWarning, match=said), pytest.raises(DataError, match=said):
        read()
    unblock.cancel()


def test_a_read_that_was_left_behind_is_not_held_against_others(blocked, monkeypatch):
    """As in a notebook, or the explorer: one set hangs and is given up, and another one is read."""
    monkeypatch.setattr(ahead, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(ahead, "_LOOK", 0.05)
    monkeypatch.setattr(ahead, "_LEAVE", 0.1)
    blocked.image, blocked.on = 0, True
    with pytest.raises(DataError, match=r"000\.png"):
        list(ahead.ahead(of_two_sizes(look=blocked).read, range(2), threads=1))
    assert decoding_threads()
    assert list(ahead.ahead(lambda i: time.sleep(0.5), range(2), threads=1)) == [None, None]
    blocked.image = 1  # the control: such a wait for this pool's own read
    with pytest.raises(DataError, match=r"001\.png"):
        list(ahead.ahead(of_two_sizes(look=blocked).read, range(2), threads=1))


@pytest.mark.parametrize("when", ["while it is waited for", "before"])
def test_a_pause_of_the_whole_process_is_not_held_against_a_read(when, monkeypatch):
    """SIGSTOP and SIGCONT an hour later, `scontrol suspend`, a frozen container: clocks go on, and nothing is read."""
    paused = [0.0]
    monkeypatch.setattr(ahead, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + paused[0]))
    monkeypatch.setattr(ahead, "_LOOK", 0.05)

    def waited_for():
        begun, go_on = threading.Event(), threading.Event()
        source = of_two_sizes(look=lambda i: (begun.set(), go_on.wait()))
        pause = threading.Timer(0.2, lambda: paused.__setitem__(0, paused[0] + 3600))
        end = threading.Timer(0.6, go_on.set)
        with ahead.Threads(1) as pool:
            future = pool.submit(source.read, 3)
            assert begun.wait(10)
            pause.start()
            end.start()
            if when == "before":
                pause.join()
            try:
                return pool.wait_for(future).shape
            finally:
                end.join()

    assert waited_for() == (16, 17, 3)
    when = "while it is waited for"  # the control: an hour of nothing but waiting
    monkeypatch.setattr(ahead, "_PAUSED", 10_000)
    with pytest.raises(DataError, match=r"003.png of two sizes has been read for 360\d s"):
        waited_for()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_heard_while_images_are_waited_for(number, blocked, monkeypatch, tmp_path):
    """With a checkpoint of the last step, from which the run goes on as if nothing had been."""
    monkeypatch.setattr(ahead, "_LEAVE", 0.5)
    settings = TINY | {"num_workers": 2, "log_every_steps": 1}
    expected = nnclr.pretrain(of_two_sizes(look=blocked), tmp_path / "whole", **settings)
    real, asked = Recorder.after_step, []

    def then_block(self, *rest):
        real(self, *rest)
        if self.state.step == 5:
            blocked.on = True
            timer = threading.Timer(2.0, lambda: (asked.append(time.monotonic()), os.kill(os.getpid(), number)))
            timer.daemon = True
            timer.start()

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "after_step", then_block)
        with pytest.raises(Stopped, match=rf"stopped by {number.name} at step \d+ of 20") as raised:
            nnclr.pretrain(of_two_sizes(look=blocked), tmp_path / "run", **settings)
    seconds = time.monotonic() - asked[0]
    assert raised.value.exit_code == 80
    assert seconds < 5
    assert decoding_threads()
    blocked.on = False
    blocked.release.set()
    run = nnclr.pretrain(of_two_sizes(look=blocked), tmp_path / "run", **settings)
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in expected.metrics]


HANGING = """
import os, sys, torch
torch.set_num_threads(1)
from nnclr import cli
from nnclr.data import ahead, decode
ahead.SAID_AFTER, ahead._LEAVE = 0.5, 0.5
pipe, real = sys.argv[1], decode._read_once

def read(path):
    if path.endswith(b"/07.png") and os.path.exists(pipe):
        os.open(pipe, os.O_RDONLY)  # waits for a writer that never comes
    return real(path)

decode._read_once = read
sys.exit(cli.main(sys.argv[2:]))
"""


def test_the_command_leaves_while_a_read_hangs(tmp_path, count):
    """A real system call that never returns, in a thread that the end of the interpreter must not wait for."""
    (tmp_path / "photos").mkdir()
    for i in range(40):
        (tmp_path / f"photos/{i:02d}.png").write_bytes(encoded(photo(20 + i % 2, 20)))
    flags = [
        *PLAIN,
        "--epochs",
        "100000",
        "--log-every-steps",
        "2",
        "--evaluate-every-epochs",
        "0",
        "--num-workers",
        "2",
    ]
    run = [str(tmp_path / "photos"), "--out", str(tmp_path / "run"), *flags]
    command = [sys.executable, "-c", HANGING, str(tmp_path / "pipe"), "pretrain", *run]
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.mkfifo(tmp_path / "pipe")
        while b"07.png of" not in (tmp_path / "err").read_bytes():
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
        seconds = time.monotonic() - began
    finally:
        process.kill()
    said = (tmp_path / "err").read_text()
    assert code == 80, said
    assert re.search(r"nnclr: warning: 07.png of .*photos has been read for \d+ s and is not there yet", said)
    step = int(re.search(r"stopped by SIGTERM at step (\d+)", said)[1])
    assert (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").exists()
    assert seconds < 10
    count("E2", "seconds until the command left with code 80 while a read hung, at most 10", round(seconds), 10)


def test_decoding_threads_leave_the_warnings_of_others_alone():
    """The control: four threads that enter and leave `catch_warnings` end with everything ignored."""
    odd = png_header(9_600, 9_600)
    with pytest.warns(Image.DecompressionBombWarning):  # what Pillow says of it
        Image.open(io.BytesIO(odd)).close()

    def heard(function):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            list(ahead.ahead(lambda i: function(odd), range(400), threads=4))
            warnings.warn("of the main thread", stacklevel=1)
        return [str(warning.message) for warning in said]

    def outcome(data):
        with contextlib.suppress(decode.BadImage):
            decode.decode(data)

    def quietly(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            time.sleep(0.001)

    assert heard(outcome) == ["of the main thread"]
    assert any(heard(quietly) == [] for _ in range(10))


@pytest.mark.filterwarnings("always::UserWarning")
def test_slow_storage_is_said_and_costs_nothing(tmp_path, monkeypatch, capsys):
    """Also where no loader is: `nnclr data check` names the file, waits, and counts it as good."""
    monkeypatch.setattr(ahead, "SAID_AFTER", 0.2)
    monkeypatch.setattr(ahead, "_LOOK", 0.05)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encoded(photo(20, 20)))
    real = folder.read_file
    monkeypatch.setattr(folder, "read_file", lambda path: (time.sleep(0.6 * path.endswith(b"3.png")), real(path))[1])
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    seen = capsys.readouterr()
    assert re.search(r"warning: 3.png of .* has been read for \d+ s", seen.err)
    assert seen.err.count("warning") == 1
    assert seen.out.endswith("verdict       fine\n")


# ---- limits and growth, measured in a process of its own -----------------------------------------------------


def workers():
    """Child processes and threads that decode while a loader reads, and new segments; children of PyTorch's loader."""
    before, seen = set(os.listdir("/dev/shm")), set()
    source = of_two_sizes(look=lambda i: seen.add((children(), len(decoding_threads()))))
    list(loader_of(source, workers=3).batches(0, 10))
    segments = len(set(os.listdir("/dev/shm")) - before)
    images = DataLoader(TensorDataset(torch.zeros(4, 1)), num_workers=1)
    return {
        "seen": sorted(seen),
        "left": len(decoding_threads()),
        "segments": segments,
        "theirs": [children() for _ in images],
    }


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def growth(out, epochs, keep=None):
    """RSS (KiB), tensors, descriptors and threads at the end of each epoch of a run."""
    real, figures, kept = Recorder.after_step, [], []
    gc.collect()
    gc.freeze()  # what is there already is not looked at again and again

    def then_look(self, batch, output, *rest):
        real(self, batch, output, *rest)
        if keep is not None:
            kept.append(keep(output))
        if self.state.step % STEPS == 0:
            self.writer.wait()
            count, threads = tensors(), len(os.listdir("/proc/self/task"))
            figures.append((kilobytes("VmRSS"), count, len(os.listdir("/proc/self/fd")), threads))

    Recorder.after_step = then_look
    try:
        settings = TINY | {
            "epochs": epochs,
            "num_workers": 2,
            "checkpoint_every_steps": 2 * STEPS,
            "log_every_steps": 1,
        }
        nnclr.pretrain(of_two_sizes(STEPS * TINY["batch_size"]), out, **settings)
    finally:
        Recorder.after_step = real
        gc.unfreeze()
    return figures


def few_descriptors(out):
    """A whole run, of files and with workers, where a process may have 64 files open; and what 64 more would do."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    settings = TINY | {"num_workers": 8, "epochs": 2, "quiet": True}
    run = nnclr.pretrain(out / "photos", out / "few", **settings)
    opened = []
    try:
        while True:
            opened.append(open(os.devnull))  # noqa: SIM115
    except OSError as error:
        refused = error.errno
    for file in opened:
        file.close()
    return len(run.metrics), len(opened), refused


def million_paths(root):
    """Bytes that a source of so many images takes beyond their names, with a pass over it, and as lists do."""
    n = 1_000_000
    name = b"n%08d/n%08d_%08d.JPEG"
    length = len(name % (0, 0, 0))

    def scanned(root):
        scan = folder._Scan(root)
        scan.images = [(name % (i % 1000, i % 1000, i), 100_000 + i, 10**18 + i) for i in range(n)]
        return scan

    folder._scan = scanned
    used = kilobytes("VmRSS")
    source = folder.folder_source([root])
    gc.collect()
    held = 1024 * (kilobytes("VmRSS") - used) / n - length
    used = kilobytes("VmRSS")
    shown = sum(len(source.describe(i)) for i in range(0, n, 5))
    passed = kilobytes("VmRSS") - used
    images = scanned(root).images
    listed = 1024 * (kilobytes("VmRSS") - used - passed) / n - length
    return {
        "held": held,
        "passed": passed,
        "listed": listed,
        "shown": shown == length * n // 5,
        "length": len(source),
        "last": images[-1][1],
    }


def large_bank():
    """kNN of 500 queries in a bank of 200,000 x 256 with 400 MiB to spare, and what a plain product does there."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(200_000, 256, generator=generator), torch.randn(500, 256, generator=generator)
    labels = torch.randint(0, 10, (200_000,), generator=generator)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * kilobytes("VmSize") + (400 << 20),) * 2)
    predicted = knn_predict(bank, labels, queries, 10)
    try:
        (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(20)
        plain = "it fits"
    except (RuntimeError, MemoryError) as error:
        plain = str(error)
    few = bank[:20_000]
    similarities, indices = nearest_rows(few, queries[:100], 20)
    exact = F.normalize(queries[:100].double(), dim=1) @ F.normalize(few.double(), dim=1).T
    best = exact.topk(20)
    error = float((similarities - best.values).abs().max())
    same = float((exact.gather(1, indices) - best.values).abs().max())
    return {"predicted": len(predicted), "plain": plain, "error": error, "same": same}


def measured(out):
    """All that is measured, in a process that does nothing else."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {"workers": workers(), "growth": growth(out / "run", WARM + EPOCHS)}
    found["leak"] = growth(out / "leak", LEAKY, keep=lambda output: (output, np.ones(50_000)))
    found["descriptors"] = few_descriptors(out)
    found["paths"] = million_paths(out / "photos")
    found["bank"] = large_bank()
    return found


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """What `measured` found in a fresh process."""
    out = tmp_path_factory.mktemp("child")
    (out / "photos").mkdir()
    for i in range(60):
        (out / f"photos/{i:02d}.png").write_bytes(encoded(photo(20 + i % 2, 20)))
    code = (
        "import json, sys; from pathlib import Path; from tests.reliability.test_processes import measured\n"
        "print('\\n' + json.dumps(measured(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(out)]
    root = Path(__file__).parents[2]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=140)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


def slopes(figures):
    """Growth an epoch of each figure: the line of least squares, which a single jump of the allocator moves little."""
    table = np.array(figures, float)
    return np.polyfit(np.arange(len(table)), table, 1)[0].tolist()


def test_workers_are_threads_without_processes_or_shared_memory(child, count):
    """So none can be killed or frozen alone, and none leaves locks or segments behind. The control is PyTorch's."""
    found = child["workers"]
    count("E3", "segments of shared memory of a loader with three workers", found["segments"], 0)
    assert found["seen"] == [[0, 3]]
    assert found["segments"] == found["left"] == 0
    assert found["theirs"] == [1] * 4


def test_nothing_grows_over_epochs(child, count):
    """Memory, tensors, file descriptors and threads over 30 epochs with checkpoints, evaluations and log lines."""
    kib, first, last = slopes(child["growth"][WARM:])[0], child["growth"][WARM][1:], child["growth"][-1][1:]
    more = sum(max(0, after - before) for before, after in zip(first, last, strict=True))
    count("E5", "KiB an epoch over 30 epochs, at most 64", max(0, round(kib)), KIB)
    count("E5", "more tensors, descriptors and threads after them", more, 0)
    assert len(child["growth"]) == WARM + EPOCHS
    assert kib <= KIB, child["growth"]
    assert more == 0, child["growth"]
    kept = slopes(child["leak"][2:])  # the control: what a step made is kept
    assert kept[0] > KIB, child["leak"]
    assert kept[1] > 1


def test_sixty_four_open_files_are_enough(child, count):
    lines, free, refused = child["descriptors"]
    count("E4", "lines of a run with eight workers that may open 64 files", lines, 2)
    assert lines == 2
    assert refused == 24  # EMFILE: the limit was in force,
    assert 0 < free < 64  # and 64 more files would not have gone


def test_a_million_paths_take_no_lists(child, count):
    paths = child["paths"]
    count("E6", "bytes of memory for an image beyond its name, at most 64", max(0, round(paths["held"])), 64)
    assert paths["length"] == 10**6
    assert paths["shown"]
    assert paths["held"] <= 64
    assert paths["passed"] < 1024  # KiB, over a pass
    assert paths["listed"] > 100  # the control


def test_a_large_bank_is_searched_in_little_memory(child, count):
    bank = child["bank"]
    count("E10", "queries of a bank of 200,000 x 256 answered within 400 MiB", bank["predicted"], 500)
    assert bank["predicted"] == 500
    assert "alloc" in bank["plain"]  # the control: all similarities at once
    assert bank["error"] <= 1e-6
    assert bank["same"] <= 1e-6
