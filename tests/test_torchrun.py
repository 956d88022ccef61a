"""Runs of several processes: the same training, and a quick end for all when one of them is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import nnclr
from nnclr.counter import step_seed

JOB, EMBED = (Path(__file__).with_name(f"torchrun_{name}.py") for name in ("job", "embed"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def torchrun(ranks, *arguments, job=JOB, options=(), **variables):
    """The ended job, by torchrun where there is more than one rank."""
    command = [sys.executable, job]
    if ranks > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            *options,
            job,
        ]
    command += map(str, arguments)
    environment = ENVIRONMENT | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def workers(ranks, *arguments):
    """The processes of a job without a launcher, so that nobody but themselves can end them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        environment = ENVIRONMENT | {"MASTER_PORT": str(port)} | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, JOB, *map(str, arguments)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    return started


def ended(process, limit):
    """Output and exit code of a process that must end by itself."""
    try:
        output, errors = process.communicate(timeout=limit)
    finally:
        process.kill()
    return process.returncode, output, errors


def final(run):
    return safetensors.torch.load_file(sorted((run / "checkpoints").iterdir())[-1] / "tensors.safetensors")


def assert_same_training(run, other):
    """Weights to 1e-5 (relative); order, ids and counters of the support set exactly."""
    ours, theirs = final(run), final(other)
    assert ours.keys() == theirs.keys()
    exact = [name for name, value in ours.items() if not value.is_floating_point() and not name.startswith("rng.")]
    assert any(name.startswith("objective.support_set") for name in exact)
    assert all(torch.equal(ours[name], theirs[name]) for name in exact)
    for part in ("backbone.", "objective.predictor.", "objective.projector.", "objective.support_set.", "optimizer."):
        names = [name for name in ours if name.startswith(part) and name not in exact]
        one, two = (torch.cat([state[name].flatten() for name in names]) for state in (ours, theirs))
        most = 1e-4 if part == "optimizer." else 1e-5  # momentum: gradients that nearly cancel by now
        assert (one - two).norm() <= most * one.norm(), part
    for one, two in zip(nnclr.Run(run).metrics, nnclr.Run(other).metrics, strict=True):
        for name in ("loss", "grad_norm", "neighbour_similarity", "embedding_std", "rank_me", "neighbour_purity"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)
    assert [line["value"] for line in nnclr.Run(run).evaluations] == [
        line["value"] for line in nnclr.Run(other).evaluations
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process: 50 steps."""
    run = tmp_path_factory.mktemp("alone") / "run"
    answer = torchrun(1, run, 5)
    assert answer.returncode == 0, answer.stderr
    return run


def test_two_processes_train_what_one_trains(alone, tmp_path):
    """Also in parts, from a network that has other weights in each process; and a second job of the same processes."""
    answer = torchrun(2, tmp_path / "run", 5, "grad_cache@*:5", "weights@1:7", "times@*:2", "tell_seed@*:7")
    assert answer.returncode == 0, answer.stderr
    for rank in range(2):  # of dropout: each rank has masks of its own
        assert f"seed {rank} {step_seed(0, 6, rank)}\n" in answer.stdout
        assert f"calls {rank} []" in answer.stdout
    assert step_seed(0, 6, 0) != step_seed(0, 6, 1) != step_seed(0, 7, 1)
    assert answer.stdout.count("finished: ") == 2  # rank 0 alone speaks
    assert answer.stdout.count("it is finished") == 1
    assert_same_training(alone, tmp_path / "run")


def test_four_processes_stop_together_and_two_go_on(alone, tmp_path):
    """The signal reaches one rank only; every rank stops at the same step, and the job goes on at another size.

    Before the stop the support set is sharded, and after it whole: how it is held changes nothing of the run.
    """
    answer = torchrun(4, tmp_path / "run", 5, "terminate@2:17", "shard_support_set@*:1")
    assert "exitcode  : 80" in answer.stderr
    assert answer.stderr.count("stopped by a signal to another process at step 18 of 50") == 1
    answer = torchrun(2, tmp_path / "run", 5)
    assert answer.returncode == 0, answer.stderr
    assert "resumed" in answer.stdout
    assert_same_training(alone, tmp_path / "run")


def test_a_transformer_that_is_shared_out_trains_as_a_whole_one(tmp_path):
    """Three processes with FSDP and activations computed again, from other weights in each; stopped, one goes on.

    Averaged weights, moments, online evaluation and encoder are those of the run of one process.
    """
    alone, ours = tmp_path / "alone", tmp_path / "run"
    answer = torchrun(1, alone, 4, "transformer@*:")
    assert answer.returncode == 0, answer.stderr
    answer = torchrun(3, ours, 4, "transformer@*:", "fsdp@*:1", "recompute@*:1", "weights@1:7", "terminate@2:27")
    assert "exitcode  : 80" in answer.stderr, answer.stderr
    answer = torchrun(2, ours, 4, "transformer@*:", "fsdp@*:1", "recompute@*:1")
    assert answer.returncode == 0, answer.stderr
    assert "resumed" in answer.stdout
    for rank in range(2):
        # The network and its average; two views in each of the 12 steps that were left, and a try when it was built.
        assert f"calls {rank} [('networks shared out', 2), ('recomputed', 25)]" in answer.stdout
    assert_same_training(alone, ours)
    one, two = (safetensors.torch.load_file(run / "encoder/model.safetensors") for run in (alone, ours))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_launcher_restarts_a_job_that_lost_a_process(alone, tmp_path):
    answer = torchrun(2, tmp_path / "run", 5, "kill@1:13", options=["--max-restarts=1"])
    assert answer.returncode == 0, answer.stderr
    assert "at step 10 of 50" in answer.stdout
    assert_same_training(alone, tmp_path / "run")


def test_a_signal_while_a_finished_job_leaves_is_no_failure(tmp_path):
    """It comes to a rank that waits for rank 0, which still writes the report."""
    answer = torchrun(2, tmp_path / "run", 1, "terminate_late@1:10", "slow_report@0:4")
    assert answer.returncode == 0, answer.stderr
    assert "finished: " in answer.stdout


def test_ranks_that_were_started_differently(tmp_path):
    answers = [ended(process, 60) for process in workers(2, tmp_path / "run", 5, "support_set_size@1:64")]
    assert [code for code, _, _ in answers] == [2, 2]
    assert "rank 1 has another configuration than rank 0" in answers[0][2]
    assert not (tmp_path / "run").exists()


def test_batch_that_cannot_be_divided(tmp_path):
    answer = torchrun(5, tmp_path / "run", 5)
    assert "batch_size=24 cannot be divided among 5 processes; use a multiple of 5" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_error_of_one_rank_is_told_by_the_others(tmp_path):
    answers = [ended(process, 60) for process in workers(2, tmp_path / "run", 5, "fail@1:13")]
    assert [code for code, _, _ in answers] == [85, 81]
    assert "rank 1: the disk of this rank is gone" in answers[0][2]


def test_one_rank_that_differs_by_a_bit(tmp_path):
    answers = [ended(process, 60) for process in workers(2, tmp_path / "run", 5, "flip@1:13")]
    assert [code for code, _, _ in answers] == [82, 82]
    assert "differ from each other in objective.predictor.weight" in answers[0][2]


def test_one_rank_whose_loss_is_not_finite(tmp_path):
    answers = [ended(process, 60) for process in workers(2, tmp_path / "run", 5, "spoil@1:13")]
    assert [code for code, _, _ in answers] == [82, 82]
    assert "loss nan and gradient norm nan at step 16 are not both finite, as in 4 of the last 17" in answers[0][2]
    assert answers[1][2] == ""  # one rank speaks for all
    for step in (13, 14, 15, 16):
        record = json.loads((tmp_path / f"run/nonfinite/step-{step:08d}.json").read_text())
        assert len(set(record["ids"])) == 24  # of both
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000010"]


@pytest.mark.parametrize(("lost", "limit"), [("kill@1:13", 5), ("kill@0:13", 5), ("freeze@1:13", 3 + 5)])
def test_lost_process_ends_the_others(lost, limit, alone, tmp_path):
    """Without a launcher's help, with code 85, and the same command goes on from the checkpoint to the same end."""
    victim = int(lost.partition("@")[2][0])
    processes = workers(2, tmp_path / "run", 5, lost, "patience@*:3")
    survivor = processes[1 - victim]
    code, _, errors = ended(survivor, 100)
    left = time.time()
    assert code == 85, errors
    assert "start the job again" in errors
    assert "Traceback" not in errors
    processes[victim].kill()
    output, _ = processes[victim].communicate()
    happened = float(next(line for line in output.splitlines() if line.startswith(("dying", "freezing"))).split()[1])
    assert left - happened < limit
    if lost.startswith("freeze"):
        assert "rank 1 gave no sign for 3 s" in errors
        answer = torchrun(1, tmp_path / "run", 5)
        assert answer.returncode == 0, answer.stderr
        assert_same_training(alone, tmp_path / "run")


def test_ranks_share_embedding_and_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(300):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(100 * (i % 2), 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    (tmp_path / "data/a/007.png").write_bytes(b"no image")
    said = {}
    for ranks in (1, 3):
        answer = torchrun(
            ranks, tmp_path / "data", tmp_path / f"{ranks}.npy", job=EMBED, NNCLR_CACHE=str(tmp_path / f"cache{ranks}")
        )
        assert answer.returncode == 0, answer.stderr
        said[ranks] = sorted(line for line in answer.stdout.splitlines() if line.startswith("rank"))
        assert answer.stdout.count(" embeddings of 128 numbers") == 1
    written = sorted(path.name.removeprefix("1.") for path in tmp_path.glob("1.*"))
    assert {"npy", "npy.skipped.csv"} < set(written)
    for name in written:
        assert (tmp_path / f"1.{name}").read_bytes() == (tmp_path / f"3.{name}").read_bytes(), name
    value = said[1][0].partition("value")[2]
    parts = [line.partition(" rows")[0] for line in said[3]]
    rows = [int(line.partition("rows ")[2].split()[0]) for line in said[3]]
    assert sum(rows) == int(said[1][0].partition("rows ")[2].split()[0])  # each image by one of them
    assert min(rows) > 0
    assert parts == ["rank 0 parts [0, 192]", "rank 1 parts [64, 256]", "rank 2 parts [128]"]
    assert [line.partition("value")[2] for line in said[3]] == [value] * 3
