"""A sweep: what it runs, what it reports, and that it goes on where it was stopped."""

import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnclr import cli, progress, sweep, training
from nnclr.config import from_toml, make_config
from nnclr.errors import InputError, NonFiniteError, StorageError
from nnclr.evaluation.metrics import half_width
from nnclr.run_folder import Run

SETTINGS = """
[settings]
backbone = "small-convnet"
image_size = 16
batch_size = 16
epochs = 1
embedding_dim = 8
projector_hidden_dim = 8
predictor_hidden_dim = 8
support_set_size = 20
device = "cpu"
num_workers = 0
evaluate_every_epochs = 1
"""


def write_spec(folder):
    rng = np.random.default_rng(0)
    for i in range(40):
        photos = folder / "photos" / ("cats", "dogs")[i % 2]
        photos.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    path = folder / "spec.toml"
    path.write_text(
        f'data = "{folder}/photos"\nseeds = [0, 1]\n{SETTINGS}\n[grid]\ntemperature = [0.1, 0.5]\nflip = [0.0]\n'
    )
    return path


@pytest.fixture
def spec(tmp_path):
    return write_spec(tmp_path)


def test_a_sweep_runs_its_grid_and_reports_it(spec, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["sweep", str(spec), "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["cell"] for row in rows] == [{"temperature": 0.1, "flip": 0.0}, {"temperature": 0.5, "flip": 0.0}]
    for row in rows:
        runs = [out / f"temperature-{row['cell']['temperature']}-flip-0.0-seed{seed}" for seed in (0, 1)]
        lines = [[json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()] for run in runs]
        assert row["values"] == [line[-1]["value"] for line in lines]
        assert row["mean"] == statistics.mean(row["values"])
        spread = abs(row["values"][0] - row["values"][1])
        assert row["interval"] == pytest.approx(12.706 * spread / 2, abs=1e-6)
        assert f"| {100 * row['mean']:.1f} +- {100 * row['interval']:.1f} |" in (out / "table.md").read_text()
    assert (out / "plot.png").stat().st_size > 5_000
    said = capsys.readouterr().out
    assert "run 4 of 4" in said
    assert "finished before" not in said

    before = {path: path.stat().st_mtime_ns for path in out.rglob("tensors.safetensors")}
    (out / "table.md").unlink()
    assert cli.main(["sweep", str(spec), "--out", str(out)]) == 0  # finished runs are read, not trained
    assert {path: path.stat().st_mtime_ns for path in out.rglob("tensors.safetensors")} == before
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    assert (out / "table.md").is_file()
    assert capsys.readouterr().out.count(": finished before\n") == 4


def test_a_sweep_says_how_far_a_run_is(spec, tmp_path, capsys, monkeypatch):
    spec.write_text(spec.read_text().replace("epochs = 1", "epochs = 2", 1))
    monkeypatch.setattr(progress, "_EVERY_OF_MANY", 0.0)
    assert cli.main(["sweep", str(spec), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("run 1 of 4"))
    assert re.fullmatch(r"  step \d of 4, \d+ img/s, \d+ s left", lines[first + 1])
    sweep.run_sweep(spec, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr().out == ""  # the control


def test_a_sweep_that_was_changed_is_refused_before_any_run(spec, tmp_path, capsys):
    assert cli.main(["sweep", str(spec), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    spec.write_text(
        spec.read_text()
        .replace("epochs = 1", "epochs = 2", 1)
        .replace("temperature = [0.1, 0.5]", "temperature = [0.2, 0.5]")
    )
    before = sorted((tmp_path / "out").iterdir())
    assert cli.main(["sweep", str(spec), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "temperature-0.5-flip-0.0-seed0 holds a run with another config (epochs: 1.0 there, 2.0 now" in said.err
    assert said.out == ""
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_folder_with_something_else_is_no_place_for_a_sweep(spec, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("work of years")
    for out, words in (
        ("mine", "something else"),
        ("mine/thesis.tex", "something else"),
        ("photos/x", "lies in the images"),
    ):
        assert cli.main(["sweep", str(spec), "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("temperature = [0.1, 0.5]", "temprature = [0.1]"), "did you mean temperature"),
        (("temperature = [0.1, 0.5]", "temperature = [0.1, -1.0]"), "temperature=-1.0 must be"),
        (("temperature = [0.1, 0.5]", "temperature = 0.1"), "lists of values"),
        (("seeds = [0, 1]", "seeds = 3"), "list of whole numbers"),
        (("seeds = [0, 1]", "sedes = [0]"), "'sedes' is unknown"),
        (("data = ", "preset = "), "lacks data"),
        (("[grid]", "[grid"), r"spec.toml is no TOML file \(line 17, column 6\); docs/sweep.md shows"),
        (("[grid]", "[grid]\nx = [1,"), r"spec.toml is no TOML file \(line \d+, column \d+\); docs/sweep.md shows"),
        (("epochs = 1\n", "epochs = 1\nflip = 0.5\n"), r"name nothing that \[grid\] varies"),
        (("flip = [0.0]", "seed = [0, 1]"), r"seed belongs in neither .* use seeds = \[...\]"),
        (("epochs = 1\n", "epochs = 1\nseed = 3\n"), r"seed belongs in neither .* use seeds = \[...\]"),
        (("epochs = 1\n", 'epochs = 1\nout = "x"\n'), "out belongs in neither .* use --out"),
        (("flip = [0.0]", 'preset = ["demo"]'), "preset belongs in neither"),
        (("flip = [0.0]", 'data = ["photos"]'), "data belongs in neither"),
        (("epochs = 1\n", 'epochs = 1\ntest_data = "photos"\n'), "test_data belongs in neither"),
        (("seeds = [0, 1]", "preset = 3"), "preset=3 must be text"),
        (("seeds = [0, 1]", "test_data = 3"), "test_data=3 must be text"),
        (("seeds = [0, 1]", 'test_data = "nowhere"'), "nowhere"),
        (("seeds = [0, 1]", "seeds = [0, -1]"), "seed=-1 must be"),
        (("seeds = [0, 1]", f"seeds = [0, {2**63}, 1]"), "must be below"),
        (("seeds = [0, 1]", "seeds = [1, 0, 1]"), r"seeds=\[1, 0, 1\] names one twice"),
        (("epochs = 1\n", "epochs = 0.01\n"), "less than a step"),
        (("/photos", "/photos/cats"), "has no labels"),
        (("flip = [0.0]", "evaluate_every_epochs = [1, 0]"), "evaluate_every_epochs=0 measures nothing"),
        (("flip = [0.0]", "neighbour_k = [1, 2]"), "neighbour_k=2 needs"),
        (("flip = [0.0]", "batch_size = [16, 64]"), "batch_size=64 is larger than the data"),
        (("flip = [0.0]", 'backbone = ["small-convnet", "resnet5"]'), "no backbone is called 'resnet5'"),
        (
            ("temperature = [0.1, 0.5]", "temperature = [0.5, 0.5]"),
            "two combinations .* the folder temperature-0.5-flip-0.0-seed0: values",
        ),
        (("flip = [0.0]", 'objective = ["nnclr", "a:b", "a-b"]'), "folder temperature-0.1-objective-a-b-seed0"),
    ],
)
def test_a_wrong_spec_is_refused_before_the_first_run(spec, tmp_path, change, words):
    text = spec.read_text()
    name = change[1].partition(" = ")[0]
    if change[0].startswith("flip"):  # what the grid varies may not be set above it
        text = re.sub(rf"(?m)^{name} = .*\n", "", text, count=1) if name != "data" else text
    spec.write_text(text.replace(*change, 1))
    with pytest.raises(InputError, match=words):
        sweep.run_sweep(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89PNG\r\n\x1a\n\xff", "is no TOML file; docs/sweep.md shows what a sweep looks like"),
        (b"a = 1\na = 2", "is no TOML file (end of document); docs/sweep.md shows what a sweep looks like"),
        (None, "cannot be read as a sweep: no such file or directory"),
        ("folder", "cannot be read as a sweep: is a directory"),
    ],
)
def test_what_is_no_spec_is_told_in_plain_words(capsys, tmp_path, content, said):
    path = tmp_path / "spec.toml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert cli.main(["sweep", str(path)]) == 2
    assert capsys.readouterr().err == f"nnclr: {path} {said}\n"


def test_each_combination_is_built_once_before_the_first_run(spec, tmp_path, monkeypatch):
    class FirstRun(Exception):
        pass

    def run(*_, **__):
        raise FirstRun

    built = []
    monkeypatch.setattr(training, "build", lambda config, *_, **__: built.append(config.temperature))
    monkeypatch.setattr(sweep, "pretrain", run)
    with pytest.raises(FirstRun):
        sweep.run_sweep(spec, tmp_path / "out", quiet=True)
    assert built == [0.1, 0.5]  # and not for each of the two seeds


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = write_spec(tmp_path_factory.mktemp("trained"))
    path.write_text(path.read_text().replace("temperature = [0.1, 0.5]", "temperature = [0.1]"))
    sweep.run_sweep(path, path.parent / "out", quiet=True)
    return path.parent / "out"


@pytest.fixture
def finished(trained, spec, tmp_path):
    """A folder with the two finished runs of one combination, and `spec` for it."""
    spec.write_text(spec.read_text().replace("temperature = [0.1, 0.5]", "temperature = [0.1]"))
    return shutil.copytree(trained, tmp_path / "out")


def rows_of(out):
    return json.loads((out / "results.json").read_text())["rows"]


def test_the_last_steps_own_knn_is_reported(finished, spec):
    """Neither what `nnclr evaluate` added later, nor what an earlier step reached."""
    path = finished / "temperature-0.1-flip-0.0-seed0" / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    values = rows_of(finished)[0]["values"]
    assert len({line["step"] for line in lines}) == 2
    with open(path, "a") as file:
        file.write(json.dumps(lines[-1] | {"value": 0.123}) + "\n")
    sweep.run_sweep(spec, finished, quiet=True)
    assert rows_of(finished)[0]["values"] == values
    path.write_text(json.dumps(lines[0]) + "\n")  # as if the run had been trained without evaluations
    with pytest.raises(InputError, match="has no kNN of its last step, 2; remove the folder"):
        sweep.run_sweep(spec, finished, quiet=True)


def test_the_table_says_where_the_figures_come_from(finished, spec):
    runs = [finished / f"temperature-0.1-flip-0.0-seed{seed}" for seed in (0, 1)]
    facts = json.loads((runs[0] / "environment.json").read_text())
    config = from_toml((runs[0] / "config.toml").read_bytes(), "config.toml")
    (origin,) = rows_of(finished)[0]["origins"]
    assert origin == {name: facts[name] for name in ("device", "torch", "nnclr", "commit")} | {
        "precision": config.precision
    }
    first = (finished / "table.md").read_text().splitlines()[0]
    assert f"on {facts['device']}, torch {facts['torch']}, {config.precision}, nnclr {facts['nnclr']}" in first
    assert "Warning" not in (finished / "table.md").read_text()

    parsed = sweep.read_spec(spec)
    for name, other in (("device", "Abacus 3"), ("torch", "9.9"), ("commit", "f" * 40)):
        (runs[1] / "environment.json").write_text(json.dumps(facts | {name: other}))
        origins = [sweep.origin(Run(run), parsed) for run in runs]
        row = {"cell": {"temperature": 0.1, "flip": 0.0}, "values": [0.5, 0.6], "mean": 0.55, "interval": None}
        sweep._write(finished, spec, parsed, [row | {"failed": [], "origins": origins}])
        table = (finished / "table.md").read_text()
        assert "Warning: the runs come from different machines or versions" in table
        assert other[:9] in table
        assert [one[name] for one in rows_of(finished)[0]["origins"]] == [facts[name], other]


def test_what_the_grid_varies_is_no_difference_of_origin(finished, spec):
    run = Run(finished / "temperature-0.1-flip-0.0-seed0")
    parsed = sweep.read_spec(spec)
    assert "precision" in sweep.origin(run, parsed)
    parsed.grid["precision"] = ["bf16", "fp32"]
    assert "precision" not in sweep.origin(run, parsed)


def test_a_diverging_combination_does_not_end_the_sweep(spec, tmp_path, capsys):
    spec.write_text(
        spec.read_text()
        .replace("temperature = [0.1, 0.5]\nflip = [0.0]", "learning_rate = [1e38, 0.3]")
        .replace("seeds = [0, 1]", "seeds = [0]")
        .replace("num_workers = 0", 'num_workers = 0\noptimizer = "sgd"\nprecision = "fp32"')
        .replace("epochs = 1\n", "epochs = 6\n", 1)  # more steps than may be skipped in a row, and no kNN among them
        .replace("evaluate_every_epochs = 1", "evaluate_every_epochs = 6")
    )
    assert cli.main(["sweep", str(spec), "--out", str(tmp_path / "out")]) == 0
    bad, good = rows_of(tmp_path / "out")
    assert (bad["values"], bad["mean"], bad["interval"]) == ([], None, None)
    assert [failure["seed"] for failure in bad["failed"]] == [0]
    assert "not both finite" in bad["failed"][0]["reason"]
    assert (len(good["values"]), good["failed"]) == (1, [])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 1e+38 | failed: 1 of 1 |" in table
    assert f"| 0.3 | {100 * good['mean']:.1f} |" in table
    assert (tmp_path / "out" / "plot.png").is_file()


def test_a_failed_run_is_left_out_of_the_mean_and_tried_again(finished, spec, monkeypatch):
    runs, failing = [], [NonFiniteError("the loss is not finite")]
    pretrain = sweep.pretrain

    def broken(data, out, **options):
        runs.append(out.name)
        if out.name.endswith("seed1") and failing:
            raise failing[0]
        return pretrain(data, out, **options)

    before = rows_of(finished)
    monkeypatch.setattr(sweep, "pretrain", broken)
    sweep.run_sweep(spec, finished, quiet=True)
    (row,) = rows_of(finished)
    assert row["values"] == before[0]["values"][:1]
    assert row["failed"] == [{"seed": 1, "reason": "the loss is not finite"}]
    assert f"| {100 * row['mean']:.1f} failed: 1 of 2 |" in (finished / "table.md").read_text()
    failing.clear()
    sweep.run_sweep(spec, finished, quiet=True)
    assert rows_of(finished) == before

    for error in (StorageError("full"), KeyboardInterrupt()):  # nothing that the next combination could do better
        failing[:] = [error]
        with pytest.raises(type(error)):
            sweep.run_sweep(spec, finished, quiet=True)


def test_a_spec_that_vanishes_meanwhile_is_recorded_as_it_was_run(finished, spec, monkeypatch):
    text, pretrain = spec.read_text(), sweep.pretrain

    def meanwhile(data, out, **options):
        spec.unlink(missing_ok=True)
        return pretrain(data, out, **options)

    monkeypatch.setattr(sweep, "pretrain", meanwhile)
    sweep.run_sweep(spec, finished, quiet=True)
    assert json.loads((finished / "results.json").read_text())["spec"] == text


def test_labels_of_one_image_each_are_refused_before_the_first_run(spec, tmp_path):
    photos = next((tmp_path / "photos").rglob("*.png")).parent.parent
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        (photos / str(i)).mkdir()
        path.rename(photos / str(i) / "x.png")
    with pytest.raises(InputError, match="no two classes with an image to learn from and one to score"):
        sweep.run_sweep(spec, tmp_path / "out", quiet=True)


def test_ctrl_c_between_runs_is_no_loss(finished, spec, monkeypatch, capsys):
    """It ends with 80, and the same command goes on; what is finished stays."""
    before, pretrain = rows_of(finished), sweep.pretrain

    def interrupted(data, out, **options):
        if out.name.endswith("seed1"):
            raise KeyboardInterrupt
        return pretrain(data, out, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "pretrain", interrupted)
        assert cli.main(["sweep", str(spec), "--out", str(finished)]) == 80
    assert "finished runs are kept, run the same command again to go on" in capsys.readouterr().err
    sweep.run_sweep(spec, finished, quiet=True)
    assert [row["values"] for row in rows_of(finished)] == [row["values"] for row in before]


def test_an_objective_may_lie_in_the_working_directory(spec, tmp_path, monkeypatch):
    (tmp_path / "objective_of_a_sweep.py").write_text("from nnclr import SimCLR\n\n\nclass Mine(SimCLR):\n    pass\n")
    text = spec.read_text().replace("predictor_hidden_dim = 8\nsupport_set_size = 20\n", "")
    spec.write_text(
        text.replace("[0.1, 0.5]", "[0.1]").replace("flip = [0.0]", 'objective = ["objective_of_a_sweep:Mine"]')
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    sweep.run_sweep(spec, tmp_path / "out", quiet=True)
    assert rows_of(tmp_path / "out")[0]["cell"]["objective"] == "objective_of_a_sweep:Mine"


def test_interval_is_students():
    """Against published two-sided 95 % quantiles."""
    for n, t in ((2, 12.706), (3, 4.303), (10, 2.262), (21, 2.086), (61, 2.000)):
        values = np.random.default_rng(n).normal(size=n).tolist()
        assert half_width(values) == pytest.approx(t * np.std(values, ddof=1) / np.sqrt(n), rel=1e-3)
    assert half_width([0.5]) is None


@pytest.mark.parametrize("path", sorted(Path("benchmarks/ablations").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_ablation_is_a_good_spec(path):
    spec = sweep.read_spec(path)
    for cell in spec.cells():
        make_config(spec.data, "out", spec.preset, **spec.settings, **cell)
    assert len(spec.seeds) == 3
