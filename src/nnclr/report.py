"""One page about a run: what it says in words, its neighbours over time, curves, map, results and settings.

The page is a single file. It loads nothing and runs nothing, and every text that comes from the run is escaped. A
run that is unfinished or damaged gets a page that says what is missing.
"""

import base64
import io
import json
import math
import os
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from nnclr import comparable
from nnclr.checkpoint import write_atomically
from nnclr.errors import InputError
from nnclr.findings import (
    Finding,
    Record,
    earlier,
    escaped,
    findings,
    judge,
    percent,
    read_record,
    same_measure,
    took,
)
from nnclr.neighbour_sheet import SheetRow, read_sheet
from nnclr.plots import Line, line_drawing

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title} · nnclr</title>
<style>
{style}</style>
</head>
<body>
<header>
{head}
</header>
<main>
{main}
</main>
<footer>{foot}</footer>
</body>
</html>
"""
_SHEETS = 4  # of neighbours that are shown of each query
_ROWS = 500  # of a table of all evaluations
_MARKS = {"good": "✓", "bad": "!", "plain": "·", "missing": "–"}
_RECORDED = "nnclr commit command python torch numpy platform device threads data".split()  # of environment.json


def write_report(
    run: Path, out: Path | None = None, *, with_map: bool = True, say: Callable[[str], None] | None = None
) -> Path:
    """Write one self-contained HTML file about a run, finished or not.

    Args:
        run: the run folder.
        out: the file; default `report.html` in the run folder.
        with_map: embed up to 2,000 images for a map; without it the report takes about a second.
        say: is told that the map takes a while.

    Returns:
        The file.

    Raises:
        InputError: if the folder holds no run, or `out` is no new file, and no earlier report, in a folder that exists.
        StorageError: if the file cannot be written.
    """
    run = Path(run)
    path = run / "report.html" if out is None else Path(out)
    if out is not None:
        _refuse_out(path)
    record = read_record(run)
    sections = {
        "Summary": _summary(record),
        "Neighbours over time": _neighbours(record),
        "Curves": _curves(record),
        "Map": _map(record, with_map, say),
        "Evaluations": _evaluations(record),
        "Use the encoder": _use(record),
        "Settings": _settings(record),
    }
    anchors = {title: title.split()[0].lower() for title in sections}
    nav = "".join(f'<a href="#{anchors[title]}">{title}</a>' for title in sections)
    paged = ("Neighbours over time", "Map", "Evaluations")
    main = "\n".join(
        f'<section{" class=paged" if title in paged else ""}><h2 id="{anchors[title]}">{title}</h2>\n{body}</section>'
        for title, body in sections.items()
    )
    page = _PAGE.format(
        title=escaped(run.resolve().name),
        style=(resources.files("nnclr") / "report.css").read_text(),
        head=f'{_head(record)}\n<nav aria-label="Sections">{nav}</nav>',
        main=main,
        foot=f"Written by nnclr {escaped(record.environment.get('nnclr', ''))} from {escaped(run)}. "
        "This file needs no network and runs no script.",
    )
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def _refuse_out(path: Path) -> None:
    if path.suffix not in (".html", ".htm") or not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--out {path} must be a .html file in a folder that exists")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--out {path} cannot be written: its folder is not yours to write in; choose another one")
    if os.path.lexists(path) and not _is_report(path):
        raise InputError(f"--out {path} exists and is no report of nnclr; choose another name")


def _is_report(path: Path) -> bool:
    beginning = _PAGE.partition("{")[0].encode()  # with the content policy, which no page of others has
    try:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


# ---- head and summary --------------------------------------------------------------------------------------


def _head(record: Record) -> str:
    verdict, config = judge(record), record.config
    data = record.environment.get("data")
    name = data.get("name") if isinstance(data, dict) else config.get("data")
    kicker = " · ".join(escaped(part) for part in (config.get("objective"), config.get("backbone"), name) if part)
    tiles = "".join(
        f"<li><span>{label}</span><b>{value}</b><span>{note}</span></li>" for label, value, note in _tiles(record)
    )
    return (
        f'<p class="kicker">{kicker}</p>\n<h1>{escaped(record.path.resolve().name)}</h1>\n'
        f'<p class="verdict {verdict.tone}"><strong>{verdict.topic}</strong> <span>{verdict.text}</span></p>\n'
        + (f'<ul class="tiles">{tiles}</ul>' if tiles else "")
    )


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """Label, figure and note of what matters most."""
    tiles = []
    for name, label, show in (
        ("loss", "Loss", "{:.3f}"),
        ("knn", "kNN accuracy", "{:.1%}"),
        ("neighbour_purity", "Neighbour purity", "{:.1%}"),
        ("rank_me", "Effective rank", "{:.1f}"),
        ("neighbour_age", "Neighbour age", "{:.1f} steps"),
    ):
        points = [(e["step"], e["value"]) for e in record.knn] if name == "knn" else record.series(name)
        if points:
            chance = record.series("loss_chance")
            note = f"chance {chance[-1][1]:.3f}" if name == "loss" and chance else earlier(points, show.format)
            if name == "knn" and points[0][0] == 0:
                note = note.replace("at step 0", "untrained")
            tiles.append((label, show.format(points[-1][1]).replace("%", " %"), note.replace("%", " %")))
    if record.metrics:
        total = "" if record.total is None else f"of {record.total:,}"
        tiles.append(("Steps", f"{record.step:,}", ", ".join(filter(None, (total, took(record))))))
    return tiles


def _summary(record: Record) -> str:
    rows = "".join(_finding(finding) for finding in findings(record))
    return (
        '<table class="findings"><caption>What the figures say; every sentence is computed from the files of the run.'
        f"</caption><tbody>{rows}</tbody></table>"
    )


def _finding(finding: Finding) -> str:
    return (
        f'<tr class="{finding.tone}"><td class="mark" aria-hidden="true">{_MARKS[finding.tone]}</td>'
        f'<th scope="row">{escaped(finding.topic)}</th><td>{escaped(finding.text)}</td></tr>'
    )


# ---- pictures ----------------------------------------------------------------------------------------------


def _neighbours(record: Record) -> str:
    sheets, damaged = _sheets(record)
    note = "".join(f"<p class=note>{escaped(name)} is no readable sheet and is left out.</p>" for name in damaged)
    if not sheets:
        known = record.series("neighbour_similarity") or math.isfinite(record.setting("support_set_size"))
        why = "there are none" if known else "the objective looks up no neighbours"
        return f"<p>No pictures of neighbours: {why}.</p>{note}"
    labelled = any(row.frames["same"] + row.frames["other"] for _, rows in sheets for row in rows)
    legend = (
        '<ul class="legend"><li><i class="frame" style="--swatch: #2e8b57"></i>has the query’s label</li>'
        '<li><i class="frame" style="--swatch: #c8503c"></i>has another label</li>'
        '<li><i class="frame" style="--swatch: #969696"></i>an older embedding of the query itself</li></ul>'
        if labelled
        else "<p class=note>A grey frame marks an older embedding of the query itself; there are no labels.</p>"
    )
    counts = [
        f"{sum(row.frames['same'] for row in rows)} of {sum(row.frames.total() for row in rows)} at step {step:,}"
        for step, rows in sheets
    ]
    shown = f" Of those shown, {', '.join(counts)} have the query’s label." if labelled else ""
    figures = "".join(_query(number, sheets) for number in range(min(len(rows) for _, rows in sheets)))
    return (
        "<p>The same queries at several steps, and what the support set returned as their nearest entries, nearest "
        f"first; the figure below each is the cosine similarity.{shown} Labels only draw the frames.</p>"
        f'{legend}{note}<div class="neighbours">{figures}</div>'
    )


def _sheets(record: Record) -> tuple[list[tuple[int, list[SheetRow]]], list[str]]:
    """The first sheet, some between and the last, with their steps; and the names of those that cannot be read."""
    found = sorted(path for path in (record.path / "neighbours").glob("step-*.png") if path.stem[5:].isdecimal())
    if len(found) > _SHEETS:
        found = [found[round(i * (len(found) - 1) / (_SHEETS - 1))] for i in range(_SHEETS)]
    sheets, damaged = [], []
    for path in found:
        try:
            sheets.append((int(path.stem[5:]), read_sheet(path)))
        except (OSError, ValueError, SyntaxError):  # Pillow calls a broken PNG a syntax error
            damaged.append(path.name)
    return sheets, damaged


def _query(number: int, sheets: list[tuple[int, list[SheetRow]]]) -> str:
    words = {"same": "with its label", "other": "with another", "self": "the query itself"}
    strips = []
    for step, rows in sheets:
        frames = rows[number].frames
        said = ", ".join(f"{frames[kind]} {word}" for kind, word in words.items() if frames[kind]) or "no labels"
        picture = _picture(rows[number].neighbours, f"Nearest entries of query {number + 1} at step {step}: {said}")
        strips.append(f'<p class="step">step {step:,}</p>{picture}')
    query = _picture(sheets[-1][1][number].query, f"Query {number + 1}")
    return f'<figure><div class="query">{query}query {number + 1}</div><div>{"".join(strips)}</div></figure>'


def _picture(image: Image.Image, alt: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alt}" width="{image.width}" height="{image.height}" src="data:image/webp;base64,{content}">'


def _curves(record: Record) -> str:
    if not record.metrics and not record.knn:
        return "<p>There is nothing to draw yet.</p>"
    figures = []
    for title, unit, note, lines in _lines(record):
        drawn = [line for line in lines if line.points]
        if drawn:
            svg = line_drawing(drawn, f"{title} by step", stacked=unit == "ms")
            if svg is None:
                return "<p>The curves need matplotlib; pip install 'nnclr[plot]' and write the report again.</p>"
            last = f"{drawn[0].points[-1][1]:,.4g} {unit}"
            figures.append(f"<figure><h3>{title} <b>{last}</b></h3>{svg}<figcaption>{note}</figcaption></figure>")
    return f'<p>By training step; at the top right the last figure.</p><div class="curves">{"".join(figures)}</div>'


def _lines(record: Record) -> list[tuple[str, str, str, list[Line]]]:
    """Title, unit, note and lines of each drawing."""
    of = record.series

    def shares(name: str) -> list[tuple[int, float]]:
        return [(step, 100 * value) for step, value in of(name)]

    knn = record.knn
    band = [(e["step"], 100 * e["interval"][0], 100 * e["interval"][1]) for e in knn if e["interval"]]
    accuracy = Line([(e["step"], 100 * e["value"]) for e in knn], band=band, marked=len(knn) < 60)
    waiting, working, aside = _step_times(record)
    loss = [Line(of("loss"), "loss"), Line(of("loss_chance"), "guessing", "reference")]
    whose = [
        Line(shares("neighbour_purity"), "with the query's label"),
        Line(shares("own_id_share"), "the image itself", "second"),
    ]
    spread = [Line(of("alignment"), "alignment"), Line(of("uniformity"), "uniformity", "second")]
    times = [Line(working, "computing"), Line(waiting, "waiting for images", "second")]
    times += [Line(aside, "evaluating and saving", "reference")]
    return [
        ("Loss", "", "Below the level of guessing it has learned something.", loss),
        ("kNN accuracy", "%", "With its 95 % interval; step 0 is the untrained network.", [accuracy]),
        ("Whose neighbours", "%", "Shares of the neighbours found.", whose),
        ("Effective rank (RankMe)", "", "Of a batch; a fall to a few is a collapse.", [Line(of("rank_me"))]),
        ("Neighbour age", "steps", "Since the entry was written, mean.", [Line(of("neighbour_age"))]),
        ("Neighbour similarity", "", "Cosine, mean.", [Line(of("neighbour_similarity"))]),
        ("Distinct neighbours", "%", "Few: hubs answer every query.", [Line(shares("distinct_neighbours"))]),
        ("Embedding deviation", "", "1: spread over the sphere, 0: one point.", [Line(of("embedding_std"))]),
        ("Alignment and uniformity", "", "Lower is better for both.", spread),
        ("Learning rate", "", "As the optimiser used it.", [Line(of("learning_rate"))]),
        ("Gradient norm", "", "Before clipping.", [Line(of("grad_norm"))]),
        ("Images per second", "", "Without evaluations and checkpoints.", [Line(of("images_per_second"))]),
        ("Step time", "ms", "What a step waits for, how long it works, and what comes on top of it.", times),
    ]


def _step_times(record: Record) -> tuple[list[tuple[int, float]], ...]:
    """(step, milliseconds a step) waiting for images, working, and for evaluations and checkpoints."""
    waiting, working, aside, batch_size = [], [], [], record.setting("batch_size")
    for line in record.metrics:
        if line.get("images_per_second", 0) > 0 and "data_share" in line and batch_size > 0:
            whole, step = 1000 * batch_size / line["images_per_second"], int(line["step"])
            waiting.append((step, whole * line["data_share"]))
            working.append((step, whole * (1 - line["data_share"])))
            share = min(line.get("aside_share", 0.0), 0.99)
            aside.append((step, whole * share / (1 - share)))
    return waiting, working, aside


def _map(record: Record, with_map: bool, say: Callable[[str], None] | None) -> str:
    if not with_map:
        command = f"nnclr report {shlex.quote(str(record.path))}"
        return f"<p>Drawn on request, since it embeds images anew: <code>{escaped(command)}</code></p>"
    from nnclr.run_map import MOST_IMAGES, draw_map

    if say is not None:
        say(
            f"drawing the map of at most {MOST_IMAGES:,} images; the first one takes about half a minute more while "
            "UMAP is compiled"
        )
    drawn = draw_map(record)
    if isinstance(drawn, str):
        return f"<p>{escaped(drawn)}</p>"
    legend = "".join(
        f'<li><i style="--swatch: {colour}"></i>{escaped(name)}<span class="count">{count:,}</span></li>'
        for name, colour, count in drawn.classes
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else "<p class=note>There are no labels to colour it by.</p>"
    return (
        f"<p>{escaped(drawn.text)} What lies together looks alike to the encoder; the axes have no meaning.</p>"
        f'<div class="map"><figure>{drawn.svg}</figure>{legend}</div>'
    )


# ---- tables ------------------------------------------------------------------------------------------------


def _evaluations(record: Record) -> str:
    if not record.evaluations:
        return (
            "<p>Nothing was evaluated: kNN accuracy needs labels, and <code>nnclr evaluate</code> measures with a "
            "labelled data set of your choice.</p>"
        )
    latest = {comparable.key(line): line for line in record.evaluations}
    rows, shown = [], []
    for line in latest.values():
        beside = same_measure(line, record.baselines)
        shown += beside
        rows += [_result_row(line, ""), *(_result_row(other, "baseline") for other in beside)]
    rows += [_result_row(line, "baseline") for line in record.baselines if line not in shown]
    every = "".join(
        f"<tr><td class=number>{line['step'] if line['step'] is not None else ''}</td><td>{escaped(line['protocol'])}"
        f"</td><td>{escaped(line['metric'])}</td><td class=number>{percent(line['value'])}</td>"
        f"<td class=number>{_interval(line)}</td></tr>"
        for line in record.evaluations[-_ROWS:]
    )
    left = f", the last {_ROWS}" if len(record.evaluations) > _ROWS else ""
    curve = record.path / "label-curve.png"
    return (
        '<div class="scroll"><table><caption>The latest result of each kind, with baselines that were measured the '
        "same way in grey. Intervals are of 95 %.</caption><thead><tr><th>what</th><th class=number>value</th>"
        "<th>interval</th><th>learned from</th><th>scored on</th><th class=number>step</th><th>protocol</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<details><summary>All {len(record.evaluations)} evaluations</summary><table><caption>In the order of "
        f"evaluations.jsonl{left}.</caption><thead><tr><th class=number>step</th><th>protocol</th><th>metric</th>"
        f"<th class=number>value</th><th class=number>interval</th></tr></thead><tbody>{every}</tbody></table>"
        "</details>" + (_file_picture(curve, "Accuracy against labels a class") if curve.is_file() else "")
    )


def _file_picture(path: Path, title: str) -> str:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if max(image.size) > 4000:
                raise ValueError
            return f"<figure><h3>{title}</h3>{_picture(image.convert('RGB'), title)}</figure>"
    except (OSError, ValueError, SyntaxError):
        return f"<p class=note>{escaped(path.name)} cannot be read.</p>"


def _interval(line: dict[str, Any]) -> str:
    return "" if line["interval"] is None else " to ".join(f"{100 * end:.1f}" for end in line["interval"])


def _result_row(line: dict[str, Any], kind: str) -> str:
    named = f"<br><small>{escaped(line.get('encoder_name', 'baseline'))}</small>" if kind else ""
    known = ("protocol", "metric", "value", "interval", "step", "data", "test", "n_train", "n_test")
    full = json.dumps({k: v for k, v in line.items() if k not in known}, indent=1, ensure_ascii=False)
    full = full if len(full) < 6000 else full[:6000] + "\n... the rest is in the run folder"
    parameters = ", ".join(f"{k} {v}" for k, v in line["parameters"].items() if not isinstance(v, (list, dict)))
    cells = [
        f'<th scope="row">{escaped(line["protocol"])} {escaped(line["metric"])}{named}</th>',
        f"<td class=number>{percent(line['value'])}</td><td>{_bar(line)} <span>{_interval(line)}</span></td>",
        f"<td>{escaped(line.get('data', ''))} <small>{escaped(line.get('n_train', ''))}</small></td>",
        f"<td>{escaped(line.get('test', ''))} <small>{escaped(line.get('n_test', ''))}</small></td>",
        f"<td class=number>{'' if line['step'] is None else line['step']}</td><td>{escaped(parameters)}</td>",
    ]
    return (
        f'<tr class="{kind}">{"".join(cells)}</tr><tr class="more {kind}"><td colspan="7"><details><summary>'
        f'every parameter</summary><pre class="columns">{escaped(full)}</pre></details></td></tr>'
    )


def _bar(line: dict[str, Any]) -> str:
    """A value between 0 and 100 % with its interval, as a small drawing."""
    at = min(max(line["value"], 0.0), 1.0) * 100
    low, high = (min(max(end, 0.0), 1.0) * 100 for end in line["interval"] or (line["value"], line["value"]))
    return (
        '<svg class="range" viewBox="-4 0 108 10" preserveAspectRatio="none" aria-hidden="true">'
        '<path d="M0 5H100" stroke="var(--line)" stroke-width="1.5"/>'
        f'<path d="M{low:.1f} 5H{high:.1f}" stroke="var(--series-1)" stroke-width="4" stroke-opacity=".45"/>'
        f'<path d="M{at:.1f} 1V9" stroke="var(--series-1)" stroke-width="2.4"/></svg>'
    )


def _use(record: Record) -> str:
    if not (record.path / "encoder" / "config.json").is_file():
        return "<p>There is no encoder yet: it is written with the first checkpoint.</p>"
    run, data = str(record.path), record.config.get("data")
    code = (
        f"import nnclr\n\nencoder = nnclr.Encoder.from_pretrained({run!r})\n"
        f"features = encoder.embed({str(data)!r})  # (n, d) float32"
    )
    name, images = shlex.quote(run), shlex.quote(str(data))
    commands = [
        f"nnclr evaluate {name} {images} --protocol linear --baselines",
        f"nnclr embed {name} {images} --out embeddings.parquet",
        "nnclr search embeddings.parquet PICTURE.jpg",
        "nnclr explore embeddings.parquet",
        f"nnclr export {name} --format timm --out exported",
    ]
    return f"<p>In Python:</p><pre>{escaped(code)}</pre><p>From here:</p><pre>{escaped(chr(10).join(commands))}</pre>"


def _settings(record: Record) -> str:
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{escaped(_plain(record.environment[name]))}</td></tr>'
        for name in _RECORDED
        if record.environment.get(name) is not None
    )
    bad = "".join(
        f"<tr><td>{escaped(line.get('image', ''))}</td><td>{escaped(line.get('reason', ''))}</td></tr>"
        for line in record.bad[:_ROWS]
    )
    return (
        f'<p>config.toml, which repeats the run:</p><pre class="columns">{escaped(record.config_text.strip())}</pre>'
        + (f"<table><caption>Where it ran</caption><tbody>{rows}</tbody></table>" if rows else "")
        + (
            f"<details><summary>{len(record.bad)} images that cannot be read</summary><table><caption>From "
            f"bad_samples.jsonl</caption><thead><tr><th>image</th><th>reason</th></tr></thead><tbody>{bad}</tbody>"
            "</table></details>"
            if bad
            else ""
        )
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
