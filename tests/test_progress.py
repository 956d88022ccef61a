import json
import re
import time
from contextlib import nullcontext

import numpy as np
import pytest

import nnclr
from nnclr import progress, recorder
from nnclr.data import loader as loader_module
from nnclr.data.images import Source
from nnclr.progress import Reporter, Window, slow_data


@pytest.mark.parametrize(
    ("share", "workers", "cores", "words"),
    [
        (0.2, 2, 8, None),
        (0.43, 2, 8, "data: 43 % of step time with 2 workers; try --num-workers 5"),
        (0.43, 2, 4, "data: 43 % of step time with 2 workers; try --num-workers 4"),
        (0.5, 1, 16, "data: 50 % of step time with 1 worker; try --num-workers 3"),
        (1.0, 0, 16, "data: 100 % of step time with 0 workers; try --num-workers 9"),
        (0.6, 4, 4, "data: 60 % of step time with 4 workers, as many as cores; decoding is the limit: smaller files by "
                    "`nnclr pack`, or more cores"),
    ],
)  # fmt: skip
def test_a_slow_loader_in_words(share, workers, cores, words):
    assert slow_data(share, workers, cores) == words


def test_a_window_tells_waiting_working_and_the_rest_apart(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    window = Window()
    for _ in range(4):
        clock[0] += 2.0
        window.add(0.5)
    clock[0] += 2.0
    window.exclude(2.0)
    assert window.seconds() == 8
    assert window.data_share() == 0.25
    assert window.aside_share() == 0.2
    assert window.rate(10) == 5


@pytest.mark.parametrize(("quiet", "many", "lines"), [(True, True, 3), (True, False, 0), (False, True, 0)])
def test_one_of_many_runs_says_now_and_then_how_far_it_is(monkeypatch, capsys, quiet, many, lines):
    """100 steps of a second: a line each half minute. The control: a run that is alone is quiet, or says its own."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with progress.one_of_many() if many else nullcontext():
        reporter = Reporter(200, quiet)
    for step in range(101, 201):
        clock[0] += 1
        reporter.step(step, "64 img/s")
    reporter.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    if lines:
        assert said[0] == "  step 130 of 200, 64 img/s, 1 min 10 s left"


def test_one_of_many_runs_has_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take anything for a terminal
    for quiet, bar in ((True, True), (False, True)):
        with progress.one_of_many():
            reporter = Reporter(2, quiet)
        assert (reporter._bar is not None) == bar
        reporter.close()
    assert Reporter(2, quiet=True)._bar is None  # the control


def slow(pixels, seconds):
    def fetch(i):
        time.sleep(seconds)
        return pixels[i]

    return Source("slow", len(pixels), fetch, str, "0" * 64)


@pytest.mark.parametrize("limit", [progress.SLOW_DATA, 1.0])
def test_a_run_says_once_that_its_data_is_slow(tmp_path, tiny, capsys, monkeypatch, limit):
    """In the run's metrics, the parts of a step are shares."""
    monkeypatch.setattr(loader_module, "load_resident", lambda *_: (None, {}))
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(progress, "SLOW_DATA", limit)
    pixels = np.random.default_rng(0).integers(0, 256, (72, 16, 16, 3), dtype=np.uint8)
    settings = tiny | {"quiet": False, "num_workers": 1, "epochs": 4}
    run = nnclr.pretrain(slow(pixels, 0.02), tmp_path / "run", **settings)
    said = [line for line in capsys.readouterr().out.splitlines() if "--num-workers" in line]
    assert len(said) == (1 if limit < 1 else 0)
    assert all("with 1 worker; try --num-workers" in line for line in said)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["data_share"] <= 1 for line in lines)
    assert all(0 <= line["aside_share"] < 1 for line in lines)
    assert max(line["aside_share"] for line in lines) > 0  # evaluations and checkpoints
    assert np.mean([line["data_share"] for line in lines]) > 0.5


@pytest.mark.parametrize("after", [-1.0, 1e9])
def test_a_slow_run_says_how_long_it_will_take_before_its_first_figures(
    pictures, tmp_path, tiny, capsys, monkeypatch, after
):
    monkeypatch.setattr(recorder, "ESTIMATE_AFTER", after)
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"quiet": False, "log_every_steps": 4, "epochs": 2})
    lines = capsys.readouterr().out.splitlines()
    said = [i for i, line in enumerate(lines) if "a step:" in line]
    assert len(said) == (1 if after < 0 else 0)
    for i in said:
        found = re.fullmatch(r"(\d+\.\d) s a step: (.+) left, first figures at step 4 in (.+)", lines[i])
        each = float(found[1])  # said after step 1 of 10, rounded to a tenth
        for words, steps in ((found[2], 9), (found[3], 3)):
            assert words in {progress.duration(steps * (each + tenths / 100)) for tenths in range(-5, 6)}
        assert i < next(j for j, line in enumerate(lines) if line.startswith("step     4/10"))
