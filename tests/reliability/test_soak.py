"""The soak's judge: what it must notice. The soak itself runs for half an hour and more, by hand; see tools/soak.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnclr import checkpoint

SPEC = importlib.util.spec_from_file_location("soak", Path(__file__).parents[2] / "tools/soak.py")
soak = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(soak)


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints and four lines of metrics."""
    for step in (10, 20):
        checkpoint.save(tmp_path / "checkpoints", step, {"w": torch.arange(100.0) + step}, {})
    lines = [{"step": step, "loss": 1.0} for step in (5, 10, 15, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def ended(run, codes, said="", left=()):
    """The processes of a job that are over."""
    return SimpleNamespace(
        run=run,
        processes=codes,
        codes=lambda: codes,
        said=lambda: said,
        left_over=lambda: list(left),
        wait=lambda _: True,
    )


def event(fault, said="", codes=()):
    return soak.Event(0.0, 1, 1, fault, 20, list(codes), said, None, [])


@pytest.mark.parametrize(
    ("fault", "codes", "said", "left", "wrong"),
    [
        ("SIGTERM", [80], "nnclr: stopped by SIGTERM at step 3", [], ""),
        ("SIGTERM", [0], "", [], ""),  # it was over a moment before
        ("SIGTERM", [1], "nnclr: stopped by SIGTERM at step 3", [], "exit codes"),
        ("SIGTERM", [80], "nnclr: out of luck", [], "said"),
        ("SIGKILL", [-9], "", ["4711"], "process 4711 was left"),
        ("disk full", [83], "nnclr: No space left on device", [], ""),
        ("disk full", [-9], "", [], "exit codes"),
        ("one process killed", [85, -9], "nnclr: rank 1 gave no sign", [], ""),
        ("one process killed", [0, -9], "", [], ""),
        ("one process killed", [1, -9], "nnclr: rank 1", [], "exit codes"),
    ],
)
def test_codes_words_and_processes(run, fault, codes, said, left, wrong):
    found = event(fault, said)
    soak.judge(found, ended(run, codes, said, left), set())
    assert wrong in " ".join(found.wrong)
    assert bool(found.wrong) == bool(wrong)


def test_files(run):
    assert soak.problems(run, set()) == []
    newest = soak.checkpoints(run)[0]
    soak.flip_a_byte(newest / "tensors.safetensors", soak.random.Random(0))
    assert soak.problems(run, set()) == ["step-00000020: tensors.safetensors is damaged"]
    assert soak.problems(run, {newest}) == []  # what was done on purpose
    lines = run / "metrics.jsonl"
    whole = lines.read_text()
    lines.write_text(whole + '{"step": 20, "loss": 1.0}\n')
    assert soak.problems(run, {newest}) == ["steps of metrics.jsonl are not in order"]
    lines.write_text(whole + '{"step": 25, "loss": NaN}\n')
    assert soak.problems(run, {newest}) == ["loss of step 25 is not finite"]
    lines.write_text(whole + '{"step": 25, "lo')
    assert soak.problems(run, {newest}) == []  # cut by a kill
    lines.write_text('{"st\n' + whole)
    assert soak.problems(run, {newest}) == ["line 1 of metrics.jsonl is cut"]


def test_ends(run, tmp_path_factory):
    judge = soak.Soak(run, run / "soak.jsonl", 1.0, 0, False)
    judge.reference = {1: soak.digest(run)}
    judge.judge_end(1, ended(run, [0]), {})
    judge.reference = {1: "20 of another"}
    judge.judge_end(2, ended(run, [0]), {})
    judge.judge_end(3, ended(run, [1], "nnclr: bad luck"), {})
    judge.judge_end(4, ended(run, [0]), {Path("a.jpg"): b""})  # damaged late, and never read again
    judge.events = [soak.Event(0.0, 5, 1, "image damaged", 20, [], "", None, [])]
    judge.judge_end(5, ended(run, [0]), {Path("a.jpg"): b""})
    assert [run["wrong"] for run in judge.finished] == [
        [],
        ["the last checkpoint is not that of the run that nothing happened to"],
        ["ended with [1]: nnclr: bad luck"],
        [],
        ["0 bad images listed, 1 damaged"],
    ]
    page = soak.report(judge, 60.0, 0)
    assert "1 of 3 without damaged images" in page.replace("\n", " ")
    assert "Run 3: ended with [1]" in page


@pytest.mark.parametrize(("lasting", "wrong"), [("pass", []), ("import time; time.sleep(60)", ["no step within"])])
def test_a_next_start_that_has_nothing_to_do_is_none_that_hangs(run, lasting, wrong):
    """The wait of no seconds sees a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", lasting])
    try:
        job = object.__new__(soak.Job)
        job.run, job.processes, job.said = run, [process], lambda: ""
        assert job.wait(20 if not wrong else 0.5) == (not wrong)
        found = event("SIGUSR1", codes=[0])
        soak.judge_later(found, job)
        assert [text[:14] for text in found.wrong] == wrong
    finally:
        process.kill()
        process.wait()
