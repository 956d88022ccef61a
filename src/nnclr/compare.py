"""`nnclr compare`: the evaluations of several runs as one table and one plot."""

import csv
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnclr import comparable
from nnclr.checkpoint import write_atomically
from nnclr.data.images import safe
from nnclr.errors import InputError
from nnclr.plots import draw_comparison

_FILES = ("compare.md", "compare.csv", "compare.png")
_FIRST = "In %, with the 95 % interval of each figure."  # the line by which a table of ours is known


@dataclass(frozen=True)
class Measured:
    """One figure of one encoder."""

    encoder: str  # a row
    what: str  # a column: protocol, metric and images
    value: float
    interval: tuple[float, float] | None
    method: str  # what the interval is over, and how it was made
    asked: dict[str, Any]  # what figures of one column agree in
    step: int | None  # of the run


def compare(paths: list[str], out: Path | None = None) -> str:
    """One table of what was measured, the latest of each kind.

    Args:
        paths: run folders, whose evaluations.jsonl and baselines.jsonl are read, or files of result lines.
        out: folder for `compare.md`, `compare.csv` and `compare.png`.

    Returns:
        The table in Markdown: encoders against protocols and data sets, the longer list downwards.

    Raises:
        InputError: if a path holds no evaluations.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder for the table and the plot")
    if out is not None:
        _refuse_others(out)
    found = _told_apart([measured for path in paths for measured in _read(Path(path))])
    latest = {(measured.encoder, measured.what): measured for measured in found}
    rows = list(dict.fromkeys(encoder for encoder, _ in latest))
    columns = sorted(dict.fromkeys(what for _, what in latest))
    steps = {row: {m.step for (encoder, _), m in latest.items() if encoder == row} for row in rows}
    cells = {(row, column): _cell(latest.get((row, column)), len(steps[row]) > 1) for row in rows for column in columns}
    if len(columns) > len(rows):
        lines = _table("measured", columns, rows, {(column, row): text for (row, column), text in cells.items()})
    else:
        lines = _table("encoder", rows, columns, cells)
    table = "\n".join([_FIRST, "", *lines, "", *_methods(list(latest.values()))]).rstrip("\n") + "\n"
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from error
        write_atomically(out / "compare.md", table.encode())
        write_atomically(out / "compare.csv", _csv(list(latest.values())).encode())
        draw_comparison(out / "compare.png", rows, columns, {k: (m.value, m.interval) for k, m in latest.items()})
    return table


def _refuse_others(out: Path) -> None:
    """Replace a table that was written here, and nothing else."""
    table = out / "compare.md"
    ours = table.is_file() and table.read_bytes().startswith(_FIRST.encode())
    for name in _FILES:
        if (out / name).exists() and not ours:
            raise InputError(f"{out / name} exists and was not written by nnclr compare; choose another --out")


def _table(corner: str, rows: list[str], columns: list[str], cells: dict[tuple[str, str], str]) -> list[str]:
    head = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return head + [f"| {row} | {' | '.join(cells[row, column] for column in columns)} |" for row in rows]


def _told_apart(found: list[Measured]) -> list[Measured]:
    """What is called the same and was measured in another way, by what it differs in."""
    named: dict[str, dict[str, dict[str, Any]]] = {}
    for measured in found:
        named.setdefault(measured.what, {})[json.dumps(measured.asked, sort_keys=True)] = measured.asked
    names = {}
    for what, ways in named.items():
        for way, text in zip(ways, comparable.differences(ways.values()), strict=True):
            names[what, way] = safe(f"{what} ({text})") if text else what
    return [replace(m, what=names[m.what, json.dumps(m.asked, sort_keys=True)]) for m in found]


def _methods(found: list[Measured]) -> list[str]:
    """What the intervals are over, which differs between protocols: that of most figures, then the others and where."""
    columns: dict[str, dict[str, None]] = {}
    for measured in found:
        if measured.interval is not None:
            protocol = str(measured.asked["protocol"])
            name = measured.what if protocol == "transfer" else protocol
            columns.setdefault(measured.method, {})[name] = None
    ways = sorted(columns, key=lambda method: -sum(m.method == method for m in found))
    others = [f"{', '.join(columns[method])}: {method}" for method in ways[1:]]
    return [f"Intervals: {'; '.join([ways[0], *others])}."] if ways else []


def _read(path: Path) -> list[Measured]:
    """The figures of a run folder, of its baselines, or of a file."""
    found = []
    for file in [path / "evaluations.jsonl", path / "baselines.jsonl"] if path.is_dir() else [path]:
        try:
            lines = file.read_bytes().decode("utf-8", "replace").splitlines() if file.is_file() else []
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                own = file.name == "evaluations.jsonl"  # in a run folder: the run's own encoder at some step
                found += _figures(record, str(file.parent if own else record["encoder_name"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                if path.is_dir() and number == len(lines) - 1:  # cut off by a kill
                    continue
                raise InputError(
                    f"line {number + 1} of {file} is no evaluation result; name run folders, or .jsonl files that "
                    "nnclr evaluate wrote"
                ) from error
    if not found:
        raise InputError(
            f"{path} holds no evaluations; run nnclr evaluate on it, or name a run folder or a .jsonl file"
        )
    return found


def _figures(record: dict[str, Any], encoder: str) -> list[Measured]:
    """The figures of a record: one, or one a data set of a transfer."""
    if record["protocol"] == "transfer":
        by, step = record["parameters"]["by"], record.get("step")
        return [
            _measured(
                encoder, f"transfer by {by}, {row['title']}", {**row, "step": step}, comparable.asked(record | row)
            )
            for row in record["details"]["sets"]
        ]
    what = f"{comparable.title(record)}, {record['n_test']} images of {record['test']}"
    return [_measured(encoder, what, record, comparable.asked(record))]


def _measured(encoder: str, what: str, record: dict[str, Any], asked: dict[str, Any]) -> Measured:
    """A figure whose numbers are numbers; ValueError, TypeError or KeyError where they are not."""
    value, interval, step = record["value"], record.get("interval"), record.get("step")
    low, high = (value, value) if interval is None else interval
    if not all(type(number) in (int, float) and math.isfinite(number) for number in (value, low, high)):
        raise ValueError
    method = safe(str(record.get("interval_method", "of a method that the record does not name")))
    ends = None if interval is None else (low, high)
    return Measured(safe(encoder), safe(what), value, ends, method, asked, step if type(step) is int else None)


def _cell(measured: Measured | None, with_step: bool) -> str:
    if measured is None:
        return ""
    spread = "" if measured.interval is None else " ({:.1f}-{:.1f})".format(*(100 * v for v in measured.interval))
    at = f" at step {measured.step}" if with_step and measured.step is not None else ""
    return f"{100 * measured.value:.1f}{spread}{at}"


def _csv(found: list[Measured]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["encoder", "what", "value", "low", "high", "interval", "step"])
    for m in found:
        low, high = m.interval or ("", "")
        writer.writerow([m.encoder, m.what, m.value, low, high, "" if m.interval is None else m.method, m.step])
    return text.getvalue()
