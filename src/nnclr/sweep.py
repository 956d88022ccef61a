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
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nnclr.checkpoint import write_atomically
from nnclr.errors import InputError
from nnclr.report import draw_sweep
from nnclr.training import check_settings, pretrain

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them its expansion in 1 / n.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_KEYS = {"data", "preset", "test_data", "seeds", "settings", "grid"}


@dataclass(frozen=True)
class Spec:
    """What a sweep runs."""

    data: str
    grid: dict[str, list[Any]]
    seeds: list[int]
    settings: dict[str, Any]
    preset: str | None = None
    test_data: str | None = None

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
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is no readable sweep: {error}") from error
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise InputError(f"{path}: '{unknown[0]}' is unknown; there are {', '.join(sorted(_KEYS))}")
    grid, settings, seeds = values.get("grid", {}), values.get("settings", {}), values.get("seeds", [0])
    if not isinstance(values.get("data"), str):
        raise InputError(f"{path} lacks data")
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise InputError(f"{path} lacks a [grid] of settings with lists of values")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{path}: seeds must be a list of whole numbers")
    if not isinstance(settings, dict) or settings.keys() & grid.keys():
        raise InputError(f"{path}: [settings] must be a table, and name nothing that [grid] varies")
    return Spec(values["data"], grid, seeds, settings, values.get("preset"), values.get("test_data"))


def run_sweep(path: Path, out: Path, quiet: bool = False) -> Path:
    """Run what is not yet finished of a sweep and write `results.json`, `table.md` and `plot.png` into `out`.

    A run that was interrupted resumes from its checkpoint; the table grows after each combination.

    Returns:
        The table's path.

    Raises:
        InputError: if the SPEC is wrong, or the images have no labels to measure with.
    """
    spec = read_spec(path)
    rows: list[dict[str, Any]] = []
    cells = list(spec.cells())
    for cell in cells:  # a mistake in the last combination must not cost the runs before it
        check_settings(spec.data, out, spec.preset, **spec.settings, **cell)
    for cell in cells:
        values: list[float] = []
        for seed in spec.seeds:
            fields = {**spec.settings, **cell, "seed": seed}
            name = f"{_slug(cell)}-seed{seed}"
            if not quiet:
                done = len(rows) * len(spec.seeds) + len(values)
                print(f"run {done + 1} of {len(cells) * len(spec.seeds)}: {name}", flush=True)
            run = pretrain(spec.data, out / name, preset=spec.preset, test_data=spec.test_data, quiet=True, **fields)
            knn = [line["value"] for line in run.evaluations if line["protocol"] == "knn"]
            if not knn:
                raise InputError(f"{spec.data} has no labels, so that the runs of a sweep cannot be compared")
            values.append(knn[-1])
        rows.append({"cell": cell, "values": values, "mean": statistics.mean(values), "interval": interval(values)})
        if not quiet:
            print(f"  kNN {_percent(rows[-1])}", flush=True)
        _write(out, path, spec, rows)
    return out / "table.md"


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    z = 1.959964
    t = (
        _T95[freedom - 1]
        if freedom <= len(_T95)
        else z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    )
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _write(out: Path, path: Path, spec: Spec, rows: list[dict[str, Any]]) -> None:
    record = {"spec": path.read_text(), "seeds": spec.seeds, "rows": rows}
    write_atomically(out / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    names = list(spec.grid)
    lines = [
        f"kNN accuracy in %, mean and 95 % interval over {len(spec.seeds)} seeds ({path.name}).\n",
        f"| {' | '.join(names)} | kNN |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {' | '.join(_shown(row['cell'][name]) for name in names)} | {_percent(row)} |" for row in rows),
    ]
    write_atomically(out / "table.md", ("\n".join(lines) + "\n").encode())
    labels = [", ".join(_shown(value) for value in row["cell"].values()) for row in rows]
    draw_sweep(out / "plot.png", ", ".join(names), labels, rows)


def _percent(row: dict[str, Any]) -> str:
    spread = "" if row["interval"] is None else f" +- {100 * row['interval']:.1f}"
    return f"{100 * row['mean']:.1f}{spread}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _slug(cell: dict[str, Any]) -> str:
    """A folder name; anything that a file system could take amiss becomes a dash."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", f"{name}-{_shown(value)}") for name, value in cell.items())
