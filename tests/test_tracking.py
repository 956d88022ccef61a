"""Other tools get what the run folder has, once, and cannot stop a run."""

import json
import os
import shutil
import signal
import sys
import time
import types
from collections import Counter
from functools import partial

import numpy as np
import pytest
import safetensors.torch

import nnclr
from nnclr import config, report, tracking
from nnclr.errors import InputError, Stopped

KILLED_AT, CHECKPOINT = 8, 6


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda run, **_: run)


def killed_and_resumed(monkeypatch, pictures, out, settings, between=lambda: None):
    """A run that logs step 8, dies before it is in a checkpoint, and goes on from step 6."""
    with monkeypatch.context() as patch:
        done, update = Counter(), nnclr.NNCLR.update

        def counted(self, output):
            update(self, output)
            done["steps"] += 1
            if done["steps"] == KILLED_AT:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(nnclr.NNCLR, "update", counted)
        with pytest.raises(Stopped):
            nnclr.pretrain(pictures, out, **settings)
    shutil.rmtree(out / "checkpoints" / f"step-{KILLED_AT:08d}")
    between()
    run = nnclr.pretrain(pictures, out, **settings)
    assert [line["step"] for line in run.metrics] == list(range(2, 21, 2))
    return run


def expected(run):
    """(name, step) -> value, from the JSONL files."""
    values = {}
    for line in run.metrics:
        values |= {(name, line["step"]): value for name, value in line.items() if name != "step"}
    for line in run.evaluations:
        values[f"evaluation/{line['protocol']}/{line['metric']}", line["step"]] = line["value"]
    return values


def events(folder, purge=True):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=purge).Reload()
    return [(tag, e.step, e.value) for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)]


def test_tensorboard_reads_what_the_run_folder_has(monkeypatch, pictures, tmp_path, tiny):
    """Also after a kill: the steps that were repeated are there once."""
    settings = tiny | {"log_to": ["tensorboard"]}
    wait = partial(time.sleep, 1.1)  # event files are ordered by the second in their name
    run = killed_and_resumed(monkeypatch, pictures, tmp_path / "run", settings, wait)
    found = events(run.path / "tensorboard")
    wanted = expected(run)
    assert len(found) == len(wanted) > 100
    assert {(tag, step): value for tag, step, value in found} == {
        key: float(np.float32(value)) for key, value in wanted.items()
    }
    doubled = Counter((tag, step) for tag, step, _ in events(run.path / "tensorboard", purge=False))
    assert doubled["loss", KILLED_AT] == 2  # control
    before = sorted((run.path / "tensorboard").iterdir())
    nnclr.pretrain(pictures, tmp_path / "run", **settings)  # it is finished: nothing is logged
    assert sorted((run.path / "tensorboard").iterdir()) == before


class Store:
    """What a server got."""

    def __init__(self):
        self.opened, self.lines, self.closed, self.fail_at, self.stuck = [], [], 0, None, False
        self.endings = []

    def take(self, values, step):
        if self.fail_at is not None and step >= self.fail_at:
            raise ConnectionError("no route\nto host")
        assert all(type(value) is float for value in values.values())
        self.lines += [((name, step), value) for name, value in values.items()]

    def close(self):
        if self.stuck:
            raise TimeoutError
        self.closed += 1


def fake_wandb(store):
    """wandb with the signatures that are used."""

    class Run:
        def log(self, data, step=None, commit=None):
            store.take(data, step)

        def finish(self, exit_code=None, quiet=None):
            store.endings.append(exit_code == 0)
            store.close()

    def init(entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None, mode=None):
        assert resume == "allow"
        assert mode is None  # WANDB_MODE decides
        store.opened.append({"id": id, "dir": dir, "name": name, "project": project, "config": config})
        return Run()

    module = types.ModuleType("wandb")
    module.init = init
    return module


def fake_mlflow(store):
    """MLflow with the signatures that are used; it gives the run's id itself."""
    module = types.ModuleType("mlflow")

    def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, tags=None):
        made = run_id or f"made-{len(store.opened)}"
        store.opened.append({"id": made, "name": run_name})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=made))

    def log_params(params, synchronous=None, run_id=None):
        assert all(type(value) is str for value in params.values())
        store.opened[-1]["config"] = params

    def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
        store.take(metrics, step)

    def end_run(status="FINISHED"):
        store.endings.append(status == "FINISHED")
        store.close()

    module.start_run, module.log_params, module.log_metrics, module.end_run = (
        start_run,
        log_params,
        log_metrics,
        end_run,
    )
    return module


FAKES = {"wandb": fake_wandb, "mlflow": fake_mlflow}


@pytest.mark.parametrize("kind", FAKES)
def test_a_resumed_run_is_one_run_there_and_logs_no_step_twice(monkeypatch, pictures, tmp_path, tiny, kind):
    store = Store()
    monkeypatch.setitem(sys.modules, kind, FAKES[kind](store))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = killed_and_resumed(monkeypatch, pictures, tmp_path / "run", tiny | {"log_to": [kind]})
    seen, wanted = dict(store.lines), expected(run)
    assert len(store.lines) == len(seen) == len(wanted) > 100
    differing = {key for key in wanted if seen[key] != wanted[key]}
    measured_twice = ("images_per_second", "data_share", "aside_share")
    assert differing <= {(name, KILLED_AT) for name in measured_twice}
    first, second = store.opened
    assert first["id"] == second["id"]
    assert first["name"] == "run"
    assert str(first["config"]["support_set_size"]) == "50"
    assert store.closed == 2
    assert store.endings == [False, True]  # the one that was killed is not shown as finished
    if kind == "wandb":
        assert (first["dir"], first["project"]) == (str(run.path), "nnclr")
        assert second == first
    else:
        assert second == {"id": first["id"], "name": None}  # parameters cannot be given twice


def test_without_its_record_steps_are_doubled(monkeypatch, pictures, tmp_path, tiny):
    """Control: what tracking.json is for; and a damaged one begins another run there."""
    store = Store()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(store))
    record = tmp_path / "run" / "tracking.json"
    killed_and_resumed(
        monkeypatch, pictures, tmp_path / "run", tiny | {"log_to": ["wandb"]}, lambda: record.write_text('{"wandb": 3}')
    )
    assert Counter(key for key, _ in store.lines)["loss", KILLED_AT] == 2
    assert store.opened[0]["id"] != store.opened[1]["id"]
    assert json.loads(record.read_text())["wandb"]["metrics"] == 20


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_failing_tool_does_not_stop_the_run(monkeypatch, pictures, tmp_path, tiny, capsys, where):
    """It is named once; the rest of the tools, the files and the weights are as without it."""
    settings = tiny | {"epochs": 1, "quiet": False}
    broken, whole = Store(), Store()
    module = fake_wandb(broken)
    if where == "open":
        module.init = lambda **_: 1 / 0
    elif where == "log":
        broken.fail_at = 4
    else:
        broken.stuck = True
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(whole))
    plain = nnclr.pretrain(pictures, tmp_path / "plain", **settings)
    capsys.readouterr()
    run = nnclr.pretrain(pictures, tmp_path / "run", **settings, log_to=["wandb", "mlflow"])
    said = capsys.readouterr().out
    assert said.count("warning: logging to wandb failed (") == 1
    assert "mlflow" not in said
    assert ("(no route)" in said) == (where == "log")
    assert dict(whole.lines) == expected(run)
    assert {step for (_, step), _ in broken.lines} == {"open": set(), "log": {0, 2}, "close": {0, 2, 4, 5}}[where]
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in plain.metrics]
    weights = [safetensors.torch.load_file(r.path / "encoder/model.safetensors") for r in (plain, run)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_refused_before_anything_is_written(monkeypatch, pictures, tmp_path, tiny, kind):
    monkeypatch.setitem(sys.modules, tracking._NEEDED[kind][0], None)
    with pytest.raises(InputError, match=f"log_to={kind} needs {kind}.*pip install"):
        nnclr.pretrain(pictures, tmp_path / "run", **tiny, log_to=[kind])
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_not_wandb(monkeypatch, tmp_path):
    """wandb leaves such a folder where it is run, and Python takes it for an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="needs wandb"):
        tracking.require(["wandb"])
    sys.modules.pop("wandb", None)


def test_it_may_change_on_resume(pictures, tmp_path, tiny):
    run = nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1})
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1, "log_to": ["tensorboard"]})
    assert not (run.path / "tracking.json").exists()
    made = config.make_config("data", "out", log_to=["wandb", "tensorboard"])
    assert config.from_toml(config.to_toml(made).encode(), "config.toml") == made
    for wrong, message in ((["tensorbord"], "is not one of tensorboard, wandb, mlflow"), ("wandb", "must be a list")):
        with pytest.raises(InputError, match=message):
            config.make_config("data", "out", log_to=wrong)
