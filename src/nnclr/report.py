"""Pictures of a run: what the look-up returned, the curves, and one page with all of it."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from nnclr import counter
from nnclr.checkpoint import write_atomically
from nnclr.data.augment import eval_image
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.encoder import Encoder
from nnclr.objectives import NNCLR

QUERIES, NEIGHBOURS = 8, 6
_TILE, _GAP, _HEAD = 72, 6, 22
_SAME, _OTHER, _SELF = (46, 139, 87), (200, 80, 60), (150, 150, 150)


def draw_neighbours(path: Path, encoder: Encoder, objective: NNCLR, source: Source, bad: dict[int, str]) -> None:
    """A sheet of fixed queries and what `SupportSet.nearest` returns for them, nearest first.

    With labels a neighbour's frame is green where its label is the query's and red where it is not; grey
    marks an older embedding of the query itself. The figure below each is the cosine similarity.

    Args:
        path: the PNG to write.
        encoder: the backbone that the look-up uses: the averaged one, where there is one.
        objective: for its projector, likewise, and its support set.
        source: the images that were trained on.
        bad: ids of images that cannot be read; they are not asked for.
    """
    order = counter.permutation(0, 0, len(source)).tolist()
    queries = [i for i in order if i not in bad][:QUERIES]
    features = torch.from_numpy(encoder.embed(source.subset(np.array(queries)), num_workers=0)).to(encoder.device)
    projector, support_set = objective.average_projector or objective.projector, objective.support_set
    was_training = projector.training
    projector.eval()
    with torch.no_grad():
        found = support_set.nearest(projector(features), k=min(NEIGHBOURS, support_set.size))
    projector.train(was_training)
    rows = [
        (query, [(i, s) for i, s in zip(ids, similarities, strict=True) if s > -np.inf])
        for query, ids, similarities in zip(queries, found.ids.tolist(), found.similarities.tolist(), strict=True)
    ]
    sheet = _sheet(source, rows)
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _sheet(source: Source, rows: list[tuple[int, list[tuple[int, float]]]]) -> Image.Image:
    width = (1 + NEIGHBOURS) * (_TILE + _GAP) + 3 * _GAP
    sheet = Image.new("RGB", (width, _HEAD + len(rows) * (_TILE + 14 + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 5), "query", fill="black")
    draw.text((_TILE + 4 * _GAP, 5), "nearest in the support set", fill="black")
    for row, (query, neighbours) in enumerate(rows):
        y = _HEAD + row * (_TILE + 14 + _GAP)
        sheet.paste(_thumbnail(source, query), (_GAP, y))
        for column, (i, similarity) in enumerate(neighbours):
            x = (column + 1) * (_TILE + _GAP) + 3 * _GAP
            sheet.paste(_thumbnail(source, i), (x, y))
            if i == query:
                colour: tuple[int, int, int] | None = _SELF
            elif source.labels is None:
                colour = None
            else:
                colour = _SAME if source.labels[i] == source.labels[query] else _OTHER
            if colour is not None:
                draw.rectangle((x - 2, y - 2, x + _TILE + 1, y + _TILE + 1), outline=colour, width=3)
            draw.text((x + _TILE // 2 - 10, y + _TILE + 2), f"{similarity:.2f}", fill="black")
    return sheet


def _thumbnail(source: Source, i: int) -> Image.Image:
    try:
        image = Image.fromarray(eval_image(source.read(i), _TILE).transpose(1, 2, 0))
    except BadImage:
        image = Image.new("RGB", (_TILE, _TILE), "black")
    return image


def draw_curves(run: Path) -> Path | None:
    """Draw metrics.jsonl and evaluations.jsonl into `curves.png`.

    Returns:
        The picture, or None where matplotlib (`pip install 'nnclr[plot]'`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    metrics, evaluations = _lines(run / "metrics.jsonl"), _lines(run / "evaluations.jsonl")
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    _plot(panels[0], "loss", metrics, {"loss": "loss", "loss_chance": "chance level, log of the candidates"})
    _plot(
        panels[1],
        "share of neighbours",
        metrics,
        {"neighbour_purity": "with the query's label", "own_id_share": "of the image itself"},
    )
    _plot(panels[2], "neighbour similarity", metrics, {"neighbour_similarity": "cosine"})
    _plot(panels[3], "embedding health", metrics, {"embedding_std": "std (1 = healthy, 0 = collapsed)"})
    _plot(panels[4], "effective rank", metrics, {"rank_me": "RankMe of a batch"})
    knn = [line for line in evaluations if line["protocol"] == "knn"]
    panels[5].plot([line["step"] for line in knn], [line["value"] for line in knn], marker="o")
    panels[5].set_title("kNN accuracy" if knn else "kNN accuracy (needs labels)")
    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    path = run / "curves.png"
    _save(figure, path)
    return path


def draw_sweep(path: Path, title: str, labels: list[str], rows: list[dict[str, Any]]) -> None:
    """Draw each combination's values, mean and interval; nothing where matplotlib is not installed.

    Args:
        path: PNG to write.
        title: of the axis of combinations.
        labels: one a combination.
        rows: `values`, `mean` and `interval` (None for one seed) of each, as shares.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(max(4.0, 1.1 * len(rows) + 2), 4), layout="constrained")
    panel = figure.subplots()
    spread = [100 * (row["interval"] or 0.0) for row in rows]
    panel.errorbar(range(len(rows)), [100 * row["mean"] for row in rows], yerr=spread, fmt="o", capsize=4)
    for position, row in enumerate(rows):
        panel.plot([position] * len(row["values"]), [100 * v for v in row["values"]], ".", color="grey", alpha=0.6)
    panel.set_xticks(range(len(rows)), labels, rotation=30 if len(rows) > 5 else 0)
    panel.set_xlabel(title)
    panel.set_ylabel("kNN accuracy in %, 95 % interval")
    panel.grid(alpha=0.3)
    _save(figure, path)


def draw_comparison(
    path: Path,
    encoders: list[str],
    columns: list[str],
    figures: dict[tuple[str, str], tuple[float, tuple[float, float] | None]],
) -> None:
    """Draw what several encoders reach, a group a column; nothing where matplotlib is not installed.

    Args:
        path: PNG to write.
        encoders: names of the rows.
        columns: names of what was measured.
        figures: (encoder, column) -> value and 95 % interval, as shares.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(columns) + 0.2 * len(columns) * len(encoders)), layout="constrained")
    panel = figure.subplots()
    step = 0.8 / max(len(encoders), 1)
    for number, encoder in enumerate(encoders):
        places = [(row, figures[encoder, column]) for row, column in enumerate(columns) if (encoder, column) in figures]
        y = [row + (number - (len(encoders) - 1) / 2) * step for row, _ in places]
        x = [100 * value for _, (value, _) in places]
        spread = [
            [100 * abs(value - (value if interval is None else interval[side])) for _, (value, interval) in places]
            for side in (0, 1)
        ]
        panel.errorbar(x, y, xerr=spread, fmt="o", capsize=3, label=encoder)
    panel.set_yticks(range(len(columns)), columns, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("%, with 95 % intervals")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    _save(figure, path)


def draw_label_curve(path: Path, curve: list[dict[str, Any]]) -> None:
    """Draw accuracy against labels a class; nothing where matplotlib is not installed.

    Args:
        path: PNG to write.
        curve: points of `label_curve`: `labels_per_class`, and `mean` and `values` of each way to use them.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    panel = figure.subplots()
    titles = {"encoder": "encoder, frozen", "supervised": "supervised from scratch", "pixels": "raw pixels"}
    budgets = [point["labels_per_class"] for point in curve]
    for name, title in titles.items():
        if name in curve[0]:
            (line,) = panel.plot(budgets, [100 * point[name]["mean"] for point in curve], marker="o", label=title)
            low, high = ([100 * of(point[name]["values"]) for point in curve] for of in (min, max))
            panel.fill_between(budgets, low, high, color=line.get_color(), alpha=0.15)
    panel.set_xscale("log")
    panel.set_xticks(budgets, [str(budget) for budget in budgets])
    panel.set_xlabel("labels a class")
    panel.set_ylabel("test accuracy in %, mean and range over draws")
    panel.grid(alpha=0.3)
    panel.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _plot(panel: Any, title: str, metrics: list[dict[str, Any]], names: dict[str, str]) -> None:
    for name, label in names.items():
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            panel.plot(*zip(*points, strict=True), label=label)
    panel.set_title(title)
    if panel.lines:
        panel.legend(fontsize=8)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; background: white; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; }}
pre {{ overflow-x: auto; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(run: Path) -> Path:
    """Write `report.html`, one file that needs nothing else: results, curves, neighbours, settings, environment.

    Text from the run is escaped, and the page may load nothing and run nothing.
    """
    metrics, evaluations = _lines(run / "metrics.jsonl"), _lines(run / "evaluations.jsonl")
    sheets = sorted((run / "neighbours").glob("step-*.png"))
    parts = []
    if evaluations:
        header = "<tr><th>step<th>protocol<th>value<th>95 % interval<th>learned from<th>scored</tr>"
        rows = "".join(_evaluation_row(line) for line in evaluations)
        parts.append(f"<h2>Evaluations</h2><table>{header}{rows}</table>")
    if (run / "curves.png").exists():
        parts.append(f"<h2>Curves</h2>{_picture(run / 'curves.png')}")
    for sheet in dict.fromkeys([*sheets[:1], *sheets[-1:]]):
        parts.append(f"<h2>What the look-up returned after {int(sheet.stem[5:])} steps</h2>{_picture(sheet)}")
    if metrics:
        rows = "".join(f"<tr><td>{html.escape(k)}<td>{v:.5g}</tr>" for k, v in metrics[-1].items())
        parts.append(f"<h2>Last metrics</h2><table>{rows}</table>")
    for name in ("config.toml", "environment.json"):
        parts.append(f"<h2>{name}</h2><pre>{html.escape((run / name).read_text())}</pre>")
    path = run / "report.html"
    page = _PAGE.format(title=html.escape(f"nnclr: {run.name}"), body="\n".join(parts))
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def _evaluation_row(line: dict[str, Any]) -> str:
    interval = line["interval"]
    cells = [
        str(line["step"]),
        f"{line['protocol']} {json.dumps(line['parameters'])}",
        f"{100 * line['value']:.1f} % {line['metric']}",
        "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
        f"{line['data']} ({line['n_train']})",
        f"{line['test']} ({line['n_test']})",
    ]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>"


def _picture(path: Path) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
