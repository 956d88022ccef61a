"""Jobs of two processes that something happens to, for tests/reliability/test_ranks.py: each forked from a warm one."""

import json
import os
import signal
import socket
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from tests.reliability import runs

RANKS, LIMIT = 2, 60  # seconds a job may take before it is ended


def in_session(number):
    """The living processes of a session."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _alive_in(entry) == number]


def _alive_in(process):
    """The session of a process, or None if it has ended, also where nobody has waited for it yet."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def launch(folder, fault=None):
    """Run both ranks in a session of their own, without a launcher that would end one when the other has ended.

    Writes `job.json` beside their logs: the exit code of each, when it ended, and how many processes were then left.
    """
    folder = Path(folder)
    os.setsid()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {}
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": port, **{name: str(value) for name, value in variables.items()}}
            runs.become(
                "tests.reliability.rank_jobs:one_rank", [str(folder), rank, fault or {}], folder / f"{rank}.log"
            )
        ranks[child] = rank
    codes, ended, until = [None] * RANKS, [None] * RANKS, time.monotonic() + LIMIT
    while None in codes and time.monotonic() < until:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[ranks[child]], ended[ranks[child]] = os.waitstatus_to_exitcode(status), time.time()
        time.sleep(0.01)
    left = [process for process in in_session(os.getsid(0)) if process != os.getpid()]
    for process in left:
        os.kill(process, signal.SIGKILL)
    (folder / "job.json").write_text(json.dumps({"codes": codes, "ended": ended, "left": len(left)}))


# ---- in a rank ---------------------------------------------------------------------------------------------


def one_rank(folder, rank, fault):
    """Train in `folder/run`; the fault says what goes wrong."""
    from nnclr import distributed, neighbour_sheet, objectives, plots, report, training

    plots.draw_curves, report.write_report = lambda run: None, lambda run, **_: Path(run)
    neighbour_sheet.draw_neighbours = lambda *_: None
    images, labels = runs.data()
    settings = {**runs.SETTINGS, "quiet": True, **fault.get("settings", {})}
    if "timeout" in fault:
        distributed._TIMEOUT = timedelta(seconds=fault["timeout"])
    if fault.get("unguarded") == "barrier":
        distributed.barrier = lambda: None
    if "late" in fault:
        late(rank, fault["late"], fault.get("unguarded") == "farewell")
    if fault.get("unguarded") == "agreement":
        training.check_ranks = lambda *_: None
    if "images" in fault:
        images, labels = images[: fault["images"]], labels[: fault["images"]]
    if fault.get("other pixel") == rank:
        images[7, 3, 3, 0] ^= 1
    if fault.get("slow") == rank:
        slowed(fault["seconds"])
    if fault.get("kill", [None])[0] == rank:
        killed(objectives.NNCLR, fault["kill"][1], Path(folder))
    if "not finite" in fault:
        return poisoned(Path(folder), rank, (images, labels), settings, *fault["not finite"])
    training.pretrain((images, labels), Path(folder) / "run", backbone=runs.backbone(), **settings)
    return 0


def late(rank, who, unguarded):
    """A rank looks for the others half a second late; unguarded, rank 0 does not wait until it has."""
    from nnclr import distributed

    wait = distributed._wait_for

    def slow(store, keys):
        if rank == who:
            time.sleep(0.5)
        if not (unguarded and keys[0].startswith("passed")):
            wait(store, keys)

    distributed._wait_for = slow


def slowed(seconds):
    """The first result and the first checkpoint take long to be written."""
    from nnclr import checkpoint, recorder

    def once_slow(function):
        left = [seconds]

        def slow(*arguments, **named):
            time.sleep(left.pop() if left else 0)
            return function(*arguments, **named)

        return slow

    recorder.append, checkpoint.save = once_slow(recorder.append), once_slow(checkpoint.save)


def killed(kind, step, folder):
    update = kind.update

    def die(self, out):
        update(self, out)
        if int(self.support_set.updates) == step:
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    kind.update = die


def poisoned(folder, rank, data, settings, victim, step):
    """The loss of one rank is not finite in one step; which tensors change in the steps is written to a file."""
    import torch

    from nnclr import objectives, training

    states, forward = [], objectives.NNCLR.forward

    class Seen(training.Undo):
        def __init__(self, state):
            super().__init__(state)
            self.state = state

        def remember(self):
            states.append(self.state.tensors())
            super().remember()

    def spoilt(self, *given):
        out = forward(self, *given)
        if rank == victim and len(states) - 1 == step:
            out.loss = out.loss * float("nan")
        return out

    objectives.NNCLR.forward, training.Undo = spoilt, Seen
    run = training.pretrain(data, folder / "run", backbone=runs.backbone(), **settings)
    changed = [
        [name for name in one if not torch.equal(one[name], two[name]) and not name.startswith("rng.")]
        for one, two in pairwise(states)
        if one.keys() == two.keys()
    ]
    first = len(states) - 1 - len(changed)  # the very first step makes the moments
    finite = all(value.isfinite().all() for value in states[-1].values() if value.is_floating_point())
    counted = run.metrics[-1]["skipped_steps"]
    report = {"first": first, "changed": changed, "finite": bool(finite), "counted": counted}
    (folder / f"{rank}.json").write_text(json.dumps(report))


def orphan(folder, guarded):
    """A process and its child, of which the first is killed: is the child there two seconds later?"""
    from nnclr import heartbeat

    first = os.fork()
    if first == 0:
        second = os.fork()
        if second == 0:
            if guarded:
                heartbeat.die_with_parent()
            (Path(folder) / "pid").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    path = Path(folder) / "pid"
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    child = int(path.read_text())
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    time.sleep(2.0)
    there = _alive_in(child) is not None
    if there:
        os.kill(child, signal.SIGKILL)
    print("there" if there else "gone")
