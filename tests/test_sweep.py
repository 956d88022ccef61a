"""A sweep: what it runs, what it reports, and that it goes on where it was stopped."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnclr import cli, sweep
from nnclr.config import make_config
from nnclr.errors import InputError

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


@pytest.fixture
def spec(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    path = tmp_path / "spec.toml"
    path.write_text(
        f'data = "{tmp_path}/photos"\nseeds = [0, 1]\n{SETTINGS}\n[grid]\ntemperature = [0.1, 0.5]\nflip = [0.0]\n'
    )
    return path


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
    assert "run 4 of 4" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in out.rglob("tensors.safetensors")}
    (out / "table.md").unlink()
    assert cli.main(["sweep", str(spec), "--out", str(out)]) == 0  # finished runs are read, not trained
    assert {path: path.stat().st_mtime_ns for path in out.rglob("tensors.safetensors")} == before
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    assert (out / "table.md").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("temperature = [0.1, 0.5]", "temprature = [0.1]"), "did you mean temperature"),
        (("temperature = [0.1, 0.5]", "temperature = [0.1, -1.0]"), "temperature=-1.0 must be"),
        (("temperature = [0.1, 0.5]", "temperature = 0.1"), "lists of values"),
        (("seeds = [0, 1]", "seeds = 3"), "list of whole numbers"),
        (("seeds = [0, 1]", "sedes = [0]"), "'sedes' is unknown"),
        (("data = ", "preset = "), "lacks data"),
        (("[grid]", "[grid"), "no readable sweep"),
        (("epochs = 1\n", "epochs = 1\nflip = 0.5\n"), r"name nothing that \[grid\] varies"),
    ],
)
def test_a_wrong_spec_is_refused_before_the_first_run(spec, tmp_path, change, words):
    spec.write_text(spec.read_text().replace(*change, 1))
    with pytest.raises(InputError, match=words):
        sweep.run_sweep(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_interval_is_students():
    """Against published two-sided 95 % quantiles."""
    for n, t in ((2, 12.706), (3, 4.303), (10, 2.262), (21, 2.086), (61, 2.000)):
        values = np.random.default_rng(n).normal(size=n).tolist()
        assert sweep.interval(values) == pytest.approx(t * np.std(values, ddof=1) / np.sqrt(n), rel=1e-3)
    assert sweep.interval([0.5]) is None


@pytest.mark.parametrize("path", sorted(Path("benchmarks/ablations").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_ablation_is_a_good_spec(path):
    spec = sweep.read_spec(path)
    for cell in spec.cells():
        make_config(spec.data, "out", spec.preset, **spec.settings, **cell)
    assert len(spec.seeds) == 3
