"""Jobs of several processes: whatever happens to one of them, all end or all go on, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nnclr import distributed
from tests.reliability import rank_jobs
from tests.reliability.runs import Warm

JOB = Path(__file__).parents[1] / "torchrun_job.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def warm():
    with Warm() as server:
        yield server


def job(warm, folder, **fault):
    """What became of the two ranks, and what they said."""
    folder.mkdir(exist_ok=True)
    for log in folder.glob("?.log"):
        log.unlink()
    log = folder / "launcher.log"
    assert warm.run("tests.reliability.rank_jobs:launch", str(folder), fault, log=log) == 0, log.read_text()
    said = [(folder / f"{rank}.log").read_text() for rank in range(rank_jobs.RANKS)]
    return json.loads((folder / "job.json").read_text()) | {"said": said}


def final(folder):
    newest = sorted((folder / "run/checkpoints").iterdir())[-1]
    return newest.name, safetensors.torch.load_file(newest / "tensors.safetensors")


def test_a_killed_rank_ends_the_others_and_the_next_start_goes_on(warm, tmp_path, count):
    """Within 5 seconds, with code 85 and no process left; the end is that of the job that nothing happened to."""
    assert job(warm, tmp_path / "whole")["codes"] == [0, 0]
    name, whole = final(tmp_path / "whole")
    of, in_time, alike = [(0, 5), (1, 5), (0, 13), (1, 14)], 0, 0
    for victim, step in of:
        folder = tmp_path / f"{victim} {step}"
        answer = job(warm, folder, kill=[victim, step])
        happened = float((folder / "died").read_text())
        assert answer["codes"][victim] == -signal.SIGKILL
        gone = answer["codes"][1 - victim] == 85 and max(answer["ended"]) - happened < 5 and not answer["left"]
        in_time += gone
        assert gone, answer
        assert "start the job again" in answer["said"][1 - victim]
        assert "Traceback" not in answer["said"][1 - victim]
        assert job(warm, folder)["codes"] == [0, 0]
        again, state = final(folder)
        alike += again == name and all(torch.equal(whole[key], state[key]) for key in whole)
    count("D1", "jobs with a killed process that were gone within 5 s, with code 85 and nothing left", in_time, len(of))
    count("D1", "of them that ended bit for bit alike after a restart", alike, len(of))
    assert alike == len(of)


def test_not_finite_on_one_rank_is_skipped_by_both(warm, tmp_path, count):
    """Each rank's weights, moments, statistics and support set keep every bit over the step; around it they move."""
    answer = job(warm, tmp_path / "job", **{"not finite": [1, 7], "settings": {"checkpoint_every_steps": 100}})
    assert answer["codes"] == [0, 0], answer["said"]
    passed = 0
    for rank in range(rank_jobs.RANKS):
        report = json.loads((tmp_path / f"job/{rank}.json").read_text())
        changed = report["changed"][7 - report["first"]]
        others = [report["changed"][step - report["first"]] for step in (6, 8)]
        assert all(any(name.startswith("backbone") for name in names) for names in others)
        passed += not changed and report["finite"] and report["counted"] == 1
    count("C1", "ranks of which no bit had changed after one rank's loss was not finite", passed, rank_jobs.RANKS)
    assert passed == rank_jobs.RANKS


def test_ranks_with_other_images_do_not_begin(warm, tmp_path):
    """One pixel differs: code 2 on both before anything is trained or written; without the comparison it trains."""
    answer = job(warm, tmp_path / "job", **{"other pixel": 1})
    assert answer["codes"] == [2, 2]
    assert "rank 1 has another set of images than rank 0" in answer["said"][0]
    assert not (tmp_path / "job/run").exists()
    settings = {"epochs": 1, "evaluate_every_epochs": 0}
    answer = job(warm, tmp_path / "control", **{"other pixel": 1, "unguarded": "agreement", "settings": settings})
    assert answer["codes"] == [0, 0]


def test_shares_that_do_not_come_out_even(warm, tmp_path):
    """119 images, of which 108 to look up in and 11 to ask about, on two ranks: all take as many steps."""
    answer = job(warm, tmp_path / "job", images=119)
    assert answer["codes"] == [0, 0], answer["said"]
    lines = [json.loads(line) for line in (tmp_path / "job/run/evaluations.jsonl").read_text().splitlines()]
    assert {line["n_train"] % 2 for line in lines} | {line["n_test"] % 2 for line in lines} >= {1}
    assert final(tmp_path / "job")[0] == "step-00000016"  # 4 epochs of 4 batches of 24


def test_rank_0_may_be_busy_for_longer_than_a_collective_waits(warm, tmp_path):
    """It writes a result and a checkpoint for 4 s each, where 3 s end a collective."""
    busy = {"slow": 0, "seconds": 4, "timeout": 3, "settings": {"epochs": 1.6}}
    answer = job(warm, tmp_path / "job", **busy)
    assert answer["codes"] == [0, 0], answer["said"]
    answer = job(warm, tmp_path / "control", **busy, unguarded="barrier")
    assert 85 in answer["codes"]


def test_who_holds_the_store_leaves_last(warm, tmp_path):
    """Without torchrun that is rank 0: a rank that looks half a second later would not find it any more."""
    ends = {"late": 1, "settings": {"epochs": 0.4, "evaluate_every_epochs": 0}}
    answer = job(warm, tmp_path / "job", **ends)
    assert answer["codes"] == [0, 0], answer["said"]
    answer = job(warm, tmp_path / "control", **ends, unguarded="farewell")
    assert answer["codes"][1] != 0


def naming(path):
    """Living processes whose command line names a path: also those that a launcher put in sessions of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(path).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def test_nothing_is_left_of_a_job_whose_launcher_is_killed(tmp_path, count):
    """The launcher of torchrun, by SIGKILL, while its workers train."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, JOB, tmp_path / "run", "2000"], env=ENVIRONMENT, **quiet) as launcher:
        try:
            until = time.monotonic() + 90
            while not (tmp_path / "run/metrics.jsonl").exists():
                assert time.monotonic() < until
                assert launcher.poll() is None
                time.sleep(0.05)
            assert len(naming(tmp_path)) == 3
            launcher.kill()
            launcher.wait()
            killed = time.monotonic()
            while (left := naming(tmp_path)) and time.monotonic() < killed + 20:
                time.sleep(0.05)
            took = time.monotonic() - killed
        finally:
            for process in naming(tmp_path):
                os.kill(process, signal.SIGKILL)
    count("D8", "jobs of which nothing was left 10 s after their launcher was killed", took < 10 and not left, 1)
    assert not left
    assert took < 10


@pytest.mark.parametrize("guarded", [True, False])
def test_a_worker_ends_with_its_launcher(warm, tmp_path, guarded):
    """By the kernel, so that a worker that hangs does too; without the guard it stays."""
    log = tmp_path / "log"
    assert warm.run("tests.reliability.rank_jobs:orphan", str(tmp_path), guarded, log=log) == 0, log.read_text()
    assert log.read_text().split() == ["gone" if guarded else "there"]


def test_taking_leave_has_an_end(monkeypatch):
    """The group of a job may hang when it is destroyed."""
    free = threading.Event()
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: free.wait(60))
    monkeypatch.setattr(distributed, "_GOODBYE", 0.2)
    began = time.monotonic()
    distributed._take_leave()
    assert 0.2 <= time.monotonic() - began < 5
    free.set()


def test_a_process_of_a_job_leaves_although_a_thread_of_it_hangs():
    """With the code of its command; the control, which is in no job, waits for the thread."""
    code = (
        "import runpy, sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "sys.argv = ['nnclr', '--no-such-flag']\n"
        "runpy.run_module('nnclr', run_name='__main__')\n"
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT | {"WORLD_SIZE": size}, **quiet)
        for size in ("2", "1")
    ]
    try:
        assert started[0].wait(40) == 2
        time.sleep(2)
        assert started[1].poll() is None
    finally:
        for process in started:
            process.kill()
            process.wait()
