"""SIGTERM, SIGINT and SIGUSR1 at any moment: a checkpoint of the step in progress, code 80, the same bits after it."""

import os
import re
import signal
import threading
import time

import pytest

from nnclr import checkpoint
from tests.reliability.runs import after_update, ctrl_c_twice, final, same, train

HERE = "tests.reliability.test_signals"
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
# Where the signal comes, and the steps after which the run may stop.
PHASES = {
    "before the first step, while the untrained network is measured": {1},
    "while it trains": {7},
    "while it is evaluated": {11},
    "while a checkpoint is written": {7, 8},
    "while it waits for images": {7},  # the step of the images that are not there is not begun
}
ANSWER = "finishing the step and writing a checkpoint"
AT_ONCE = 5.0  # seconds from the signal to the end


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """Final states of uninterrupted runs: images in memory, and images that are waited for."""
    folder = tmp_path_factory.mktemp("whole")
    assert warm.run("tests.reliability.runs:train", str(folder / "memory")) == 0
    assert warm.run("tests.reliability.test_identity:streamed", str(folder / "streamed"), STREAMED) == 0
    return {name: final(folder / name) for name in ("memory", "streamed")}


STREAMED = {"num_workers": 1}


def interrupted(folder, name, phase):
    """In a child: the run, which sends itself a signal."""
    number = signal.Signals[name]
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    arm(phase, send)
    try:
        run(folder, phase)
    finally:
        print(f"\nseconds {time.monotonic() - sent[0]:.3f}", flush=True)


def run(folder, phase):
    """In a child: the run with the kind of loader that the phase needs."""
    from tests.reliability.test_identity import streamed

    if phase == "while it waits for images":
        streamed(folder, STREAMED)
    else:
        train(folder)


def arm(phase, send):
    """Have the signal sent once, in the phase."""
    from nnclr.data.loader import StreamLoader
    from nnclr.evaluation.online import OnlineKNN

    measure, save, fill = OnlineKNN.measure, checkpoint.save, StreamLoader._fill

    def measuring(self, encoder):
        if encoder.provenance["step"] == (0 if phase.startswith("before") else 10):
            features, waiting = encoder.features, [send]

            def halfway(views):
                if waiting:
                    waiting.pop()()  # which the rest of the measuring must not lose
                return features(views)

            encoder.features = halfway
        return measure(self, encoder)

    def saving(folder, step, *rest):
        if step == 6:
            send()  # from the thread that writes
            time.sleep(0.05)
        return save(folder, step, *rest)

    def filling(self, work, rows):
        if work.step == 7 and rows.start == 0:  # in the thread that decodes, when all batches before are used up
            threading.Timer(0.4, send).start()
            time.sleep(1.2)
        fill(self, work, rows)

    if phase == "while it trains":
        after_update(7, send)
    elif phase == "while a checkpoint is written":
        checkpoint.save = saving
    elif phase == "while it waits for images":
        StreamLoader._fill = filling
    else:
        OnlineKNN.measure = measuring


def test_signals_in_every_phase(warm, whole, tmp_path, count):
    good, slowest = 0, 0.0
    for phase, steps in PHASES.items():
        for name in SIGNALS:
            folder = tmp_path / name / phase
            folder.mkdir(parents=True)
            code = warm.run(f"{HERE}:interrupted", str(folder / "run"), name, phase, log=folder / "log")
            said = (folder / "log").read_text()
            assert code == 80, said
            stopped = int(re.search(rf"stopped by {name} at step (\d+) of 20; the checkpoint is complete", said)[1])
            assert stopped in steps, said
            assert checkpoint.load_latest(folder / "run/checkpoints")[0].step == stopped
            answers = [line for line in said.splitlines() if ANSWER in line]
            again = "; press Ctrl-C again to leave at once" if name == "SIGINT" else ""
            assert answers == [f"nnclr: {name}: {ANSWER}{again}"]
            assert said.index(ANSWER) < said.index("stopped by")
            seconds = float(re.search(r"seconds ([\d.]+)", said)[1])
            slowest = max(slowest, seconds)
            assert warm.run(f"{HERE}:run", str(folder / "run"), phase) == 0
            good += same(final(folder / "run"), whole["streamed" if "images" in phase else "memory"])
    count("A13", "signals in a phase: checkpoint, code 80, and the same bits when resumed", good, 15)
    assert good == 15
    assert slowest < AT_ONCE


def twice(folder):
    """In a child: Ctrl-C, and again before the step is done."""
    after_update(7, ctrl_c_twice)
    train(folder)


def test_a_second_ctrl_c_leaves_at_once(warm, whole, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert warm.run(f"{HERE}:twice", str(folder), log=log) == 130
    assert log.read_text().count(ANSWER) == 1
    assert "stopped by" not in log.read_text()
    assert checkpoint.load_latest(folder / "checkpoints")[0].step <= 6  # none of this step
    assert warm.run("tests.reliability.runs:train", str(folder)) == 0
    assert same(final(folder), whole["memory"])


def deaf(folder, name):
    """In a child: the run that asks nobody whether it should stop."""
    from nnclr import interrupt

    interrupt.StopRequest.__enter__ = lambda self: self
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    interrupted(folder, name, "while it trains")


@pytest.mark.parametrize("name", SIGNALS)
def test_control_without_handlers_the_signal_ends_it(warm, tmp_path, name):
    code = warm.run(f"{HERE}:deaf", str(tmp_path / "run"), name)
    assert code == (1 if name == "SIGINT" else -signal.Signals[name])  # KeyboardInterrupt, which the child caught
    newest = checkpoint.load_latest(tmp_path / "run/checkpoints")[0]
    assert newest is None or newest.step <= 6


def unheard(folder, phase):
    """In a child: an evaluation during which signals are lost."""
    from nnclr.evaluation import online

    evaluate = online.evaluate

    def losing(*arguments, **options):
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return evaluate(*arguments, **options)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    online.evaluate = losing
    interrupted(folder, "SIGTERM", phase)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if "measured" in phase or "evaluated" in phase])
def test_control_an_evaluation_that_loses_a_signal_is_noticed(warm, tmp_path, phase):
    log = tmp_path / "log"
    assert warm.run(f"{HERE}:unheard", str(tmp_path / "run"), phase, log=log) == 0  # where the test above asks for 80
    assert "seconds " in log.read_text()  # it was sent
