"""`nnclr sweep`: a grid of runs with seeds, resumable, and one table and plot of the outcome.

A SPEC is a TOML file:

    data = "demo-photos"
    preset = "demo"
    seeds = [0, 1, 2]

    [settings]                            # of every run
    epochs = 6

    [grid]                                # one run for each combination and seed
    support_set_size = [256, 1024, 2048]
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from nnclr.bounded_toml import parse_toml
from nnclr.checkpoint import write_atomically
from nnclr.data.images import Source
from nnclr.data.source import open_source, refuse_inside, test_split
from nnclr.errors import InputError, NonFiniteError
from nnclr.evaluation.metrics import half_width
from nnclr.evaluation.online import OnlineKNN
from nnclr.plots import draw_sweep
from nnclr.progress import one_of_many
from nnclr.run_folder import Run
from nnclr.training import check_existing, check_settings, pretrain

_KEYS = {"data", "preset", "test_data", "seeds", "settings", "grid"}
# Fields that no table may set, and what sets them.
_ELSEWHERE = {
    "data": "data = ... above the tables",
    "out": "--out",
    "preset": "preset = ... above the tables",
    "seed": "seeds = [...] above the tables",
    "test_data": "test_data = ... above the tables",
}


@dataclass(frozen=True)
class Spec:
    """What a sweep runs."""

    data: str
    grid: dict[str, list[Any]]
    seeds: list[int]
    settings: dict[str, Any]
    preset: str | None = None
    test_data: str | None = None
    text: str = ""  # of the file

    def cells(self) -> Iterator[dict[str, Any]]:
        """Each combination of the grid's values."""
        for values in product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def read_spec(path: Path) -> Spec:
    """Read and check a SPEC.

    Raises:
        InputError: if it cannot be read, or something is missing or unknown in it.
    """
    try:
        content = path.read_bytes()
        values = parse_toml(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read as a sweep: {(error.strerror or 'unknown reason').lower()}") from error
    except ValueError as error:  # no text, or no TOML
        place = re.search(r"\(at (.+)\)$", str(error))
        where = f" ({place[1]})" if place else ""
        raise InputError(f"{path} is no TOML file{where}; docs/sweep.md shows what a sweep looks like") from error
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise InputError(f"{path}: '{unknown[0]}' is unknown; there are {', '.join(sorted(_KEYS))}")
    grid, settings, seeds = values.get("grid", {}), values.get("settings", {}), values.get("seeds", [0])
    if not isinstance(values.get("data"), str):
        raise InputError(f"{path} lacks data")
    for name in ("preset", "test_data"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{path}: {name}={values[name]!r} must be text")
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise InputError(f"{path} lacks a [grid] of settings with lists of values")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{path}: seeds must be a list of whole numbers")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: seeds={seeds} names one twice, which is no second measurement")
    if not isinstance(settings, dict) or settings.keys() & grid.keys():
        raise InputError(f"{path}: [settings] must be a table, and name nothing that [grid] varies")
    for name in sorted((settings.keys() | grid.keys()) & _ELSEWHERE.keys()):
        raise InputError(f"{path}: {name} belongs in neither [settings] nor [grid]; use {_ELSEWHERE[name]}")
    return Spec(values["data"], grid, seeds, settings, values.get("preset"), values.get("test_data"), content.decode())


def run_sweep(path: Path, out: Path, quiet: bool = False) -> Path:
    """Run what is not yet finished of a sweep and write `results.json`, `table.md` and `plot.png` into `out`.

    A run that was interrupted resumes from its checkpoint; the table grows after each combination. A run whose loss is
    not finite counts as failed; the others go on, and the next call tries it again from its last checkpoint.

    Returns:
        The table's path.

    Raises:
        InputError: if the SPEC is wrong, the images have no labels to measure with, or `out` holds something else.
    """
    spec = read_spec(path)
    cells = list(spec.cells())
    refuse_inside(spec.data, out)
    if out.is_file() or (out.is_dir() and not _is_ours(out)):
        raise InputError(f"--out {out} holds something else than a sweep; choose a new folder")
    if any(":" in str(name) for name in [spec.settings.get("objective"), *spec.grid.get("objective", [])]):
        sys.path.insert(0, "")  # MODULE:CLASS may lie in the working directory, as with python -m
    try:
        check(spec, out)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    rows: list[dict[str, Any]] = []
    for cell in cells:
        rows.append(_run_cell(spec, out, cell, len(rows) * len(spec.seeds), quiet))
        _write(out, path, spec, rows)
    return out / "table.md"


def _is_ours(out: Path) -> bool:
    """Whether a folder is empty or was begun by a sweep."""
    return not any(out.iterdir()) or (out / "results.json").is_file() or any(out.glob("*-seed*/config.toml"))


def _run_cell(spec: Spec, out: Path, cell: dict[str, Any], done: int, quiet: bool) -> dict[str, Any]:
    """The row of one combination, trained with every seed."""
    values: list[float] = []
    failed: list[dict[str, Any]] = []
    origins: list[dict[str, Any]] = []
    total = math.prod(len(choices) for choices in spec.grid.values()) * len(spec.seeds)
    for number, seed in enumerate(spec.seeds, done + 1):
        fields = {**spec.settings, **cell, "seed": seed, "preset": spec.preset}
        name = _name(cell, seed)
        if not quiet:
            before = ": finished before" if (out / name / "report.html").exists() else ""
            print(f"run {number} of {total}: {name}{before}", flush=True)
        try:
            with nullcontext() if quiet else one_of_many():
                run = pretrain(spec.data, out / name, test_data=spec.test_data, quiet=True, **fields)
        except NonFiniteError as error:  # as much an outcome of this combination as a figure
            failed.append({"seed": seed, "reason": str(error)})
            if not quiet:
                print(f"  failed: {error}", flush=True)
            continue
        values.append(final_knn(run))
        origins.append(origin(run, spec))
    row = {
        "cell": cell,
        "values": values,
        "mean": statistics.mean(values) if values else None,
        "interval": half_width(values),
        "failed": failed,
        "origins": _distinct(origins),
    }
    if not quiet:
        print(f"  kNN {_percent(row)}", flush=True)
    return row


def check(spec: Spec, out: Path) -> None:
    """Find what `pretrain` would refuse in any combination: a mistake in the last must not cost the runs before it.

    The data is opened once; backbone and objective of each combination are built once, on the CPU, and dropped.

    Raises:
        InputError: for the first mistake, or if the images have no labels to measure with.
    """
    slugs = Counter(_slug(cell) for cell in spec.cells())
    if slugs.total() > len(slugs):
        raise InputError(
            f"two combinations of the grid would have the folder {slugs.most_common(1)[0][0]}-seed{spec.seeds[0]}: "
            "values must differ in letters, digits, dots or underscores"
        )
    source = open_source(spec.data)
    test = test_split(spec.data) if spec.test_data is None else open_source(spec.test_data)
    for images in (source, test):
        if images is not None and images.labels is None:
            raise InputError(f"{images.name} has no labels, so that the runs of a sweep cannot be compared")
    if OnlineKNN.create(source, test, 1, 1.0, min(spec.seeds), 0) is None:
        raise InputError(
            f"{source.name} has no two classes with an image to learn from and one to score, so that the runs of a "
            "sweep cannot be compared; add images, or name a test set by test_data"
        )
    for cell in spec.cells():
        _check_cell(source, spec, out, cell)


def _check_cell(source: Source, spec: Spec, out: Path, cell: dict[str, Any]) -> None:
    fields = {**spec.settings, **cell, "seed": min(spec.seeds)}
    config = check_settings(spec.data, str(out), spec.preset, source, **fields)
    replace(config, seed=max(spec.seeds)).check()
    if config.evaluate_every_epochs == 0:
        raise InputError("evaluate_every_epochs=0 measures nothing that a sweep could compare; use another number")
    for seed in spec.seeds:
        check_existing(out / _name(cell, seed), replace(config, seed=seed), source)


def final_knn(run: Run) -> float:
    """The online kNN of a finished run's last step.

    Raises:
        InputError: if there is none; the run was then trained with other evaluations, before the sweep.
    """
    step = run.metrics[-1]["step"]
    # Later lines of the same step are from `nnclr evaluate`, perhaps with other images or neighbours.
    for line in run.evaluations:
        if line["protocol"] == "knn" and line["step"] == step:
            return float(line["value"])
    raise InputError(f"{run.path} has no kNN of its last step, {step}; remove the folder to train the run anew")


def origin(run: Run, spec: Spec) -> dict[str, Any]:
    """Device, versions and precision of a run, without what the grid varies."""
    environment = json.loads((run.path / "environment.json").read_text())
    facts = {name: environment[name] for name in ("device", "torch", "nnclr", "commit")}
    facts["precision"] = parse_toml((run.path / "config.toml").read_bytes())["precision"]
    return {name: value for name, value in facts.items() if name not in spec.grid}


def _distinct(origins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for i, one in enumerate(origins) if one not in origins[:i]]


def _write(out: Path, path: Path, spec: Spec, rows: list[dict[str, Any]]) -> None:
    record = {"spec": spec.text, "seeds": spec.seeds, "rows": rows}
    write_atomically(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    names, seeds = list(spec.grid), f"{len(spec.seeds)} seed{'s' * (len(spec.seeds) > 1)}"
    lines = [
        f"kNN accuracy in %, mean and 95 % interval over {seeds} ({path.name}), {_came_from(rows)}\n",
        f"| {' | '.join(names)} | kNN |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {' | '.join(_shown(row['cell'][name]) for name in names)} | {_percent(row)} |" for row in rows),
    ]
    write_atomically(out / "table.md", ("\n".join(lines) + "\n").encode())
    measured = [row for row in rows if row["values"]]
    labels = [", ".join(_shown(value) for value in row["cell"].values()) for row in measured]
    draw_sweep(out / "plot.png", ", ".join(names), labels, measured)


def _came_from(rows: list[dict[str, Any]]) -> str:
    """End of the table's first sentence: on what the figures were measured, with a warning where that differs."""
    origins = _distinct([one for row in rows for one in row["origins"]])
    texts = []
    for one in origins:
        commit = f" ({one['commit'][:9]})" if one["commit"] else ""
        words = [one.get("device"), f"torch {one['torch']}", one.get("precision"), f"nnclr {one['nnclr']}{commit}"]
        texts.append(", ".join(word for word in words if word))
    if len(texts) == 1:
        return f"on {texts[0]}."
    if not texts:
        return "no run was finished."
    listed = "".join(f"\n- {text}" for text in texts)
    return (
        f"see below.\n\nWarning: the runs come from different machines or versions (results.json says which):\n{listed}"
    )


def _percent(row: dict[str, Any]) -> str:
    parts = [] if row["mean"] is None else [f"{100 * row['mean']:.1f}"]
    if row["interval"] is not None:
        parts.append(f"+- {100 * row['interval']:.1f}")
    if row["failed"]:
        parts.append(f"failed: {len(row['failed'])} of {len(row['failed']) + len(row['values'])}")
    return " ".join(parts)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(cell: dict[str, Any], seed: int) -> str:
    """Of the folder of a run."""
    return f"{_slug(cell)}-seed{seed}"


def _slug(cell: dict[str, Any]) -> str:
    """A folder name; anything that a file system could take amiss becomes a dash."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", f"{name}-{_shown(value)}") for name, value in cell.items())
