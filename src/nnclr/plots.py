"""Drawings of figures; where matplotlib (`pip install 'nnclr[plot]'`) is not installed, nothing is drawn."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnclr.checkpoint import write_atomically
from nnclr.findings import read_record

MOST_POINTS = 400  # of a line on a page; what a run of 100,000 log lines needs is no more
Points = Sequence[tuple[float, float]]

# Colours that stand for variables of the page's style sheet, so that a drawing follows light, dark and print.
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_SERIES = ("#010206", "#010207")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "line", _SERIES[0]: "series-1", _SERIES[1]: "series-2"}


@dataclass(frozen=True)
class Line:
    """One line of a drawing for a page.

    Args:
        points: (x, y), by x.
        label: for the legend; empty for none.
        style: the first or the second colour, or a dashed line for what a value is compared with.
        band: (x, low, high) around it, by x.
        marked: a dot at every point.
    """

    points: Points
    label: str = ""
    style: Literal["first", "second", "reference"] = "first"
    band: Sequence[tuple[float, float, float]] = ()
    marked: bool = False


def line_drawing(lines: Sequence[Line], description: str, stacked: bool = False) -> str | None:
    """An SVG element to stand in a page: its colours are variables of the page, its text is text.

    Args:
        lines: at most two of them in colour.
        description: for those who do not see it.
        stacked: areas on top of one another instead of lines; all at the same x.

    Returns:
        The element, or None where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    colours = {"first": _SERIES[0], "second": _SERIES[1], "reference": _MUTED}
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": description,  # identifiers that are this drawing's own, and the same the next time
        "text.color": _INK,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "font.size": 9,
        "text.parse_math": False,
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.1), layout="constrained")
        panel = figure.subplots()
        base: list[float] | None = None
        for line in lines:
            x, y = zip(*thinned(line.points), strict=True)
            colour = colours[line.style]
            if stacked:
                below = base or [0.0] * len(y)
                base = [low + value for low, value in zip(below, y, strict=True)]
                panel.fill_between(x, below, base, color=colour, alpha=0.75, linewidth=0, label=line.label)
                continue
            if line.band:
                at, low, high = zip(*line.band, strict=True)
                panel.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
            dashes, width = ("--", 1.2) if line.style == "reference" else ("-", 1.6)
            marker = "o" if line.marked or len(x) == 1 else None
            panel.plot(x, y, dashes, color=colour, linewidth=width, marker=marker, markersize=3, label=line.label)
        _dress(panel, any(line.label for line in lines))
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    return _for_a_page(buffer.getvalue(), description)


_METADATA = ("Date", "Creator", "Format", "Type")


def thinned(points: Points) -> Points:
    """Fewer points that look the same: of each stretch the lowest and the highest, and both ends."""
    if len(points) <= MOST_POINTS:
        return points
    count = MOST_POINTS // 2 - 1
    kept = {0, len(points) - 1}
    for number in range(count):
        stretch = range(number * len(points) // count, (number + 1) * len(points) // count)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _dress(panel: Any, legend: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panel.grid(axis="y", color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0)
    for side in ("top", "left", "right"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(_GRID)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    panel.margins(x=0.02, y=0.08)
    if legend:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2}  # above: nothing is covered
        panel.legend(frameon=False, fontsize=9, handlelength=1.4, borderpad=0.2, borderaxespad=0.0, **place)


def _for_a_page(svg: str, description: str) -> str:
    """matplotlib's file as an element among others: no prologue, no style of its own, no name used twice."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"font: (?:\d+ )?([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # the family is the page's
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d{2})\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return f'<svg {box[0]} role="img" aria-label="{html.escape(description)}">{svg}'


def draw_curves(run: Path) -> Path | None:
    """Draw metrics.jsonl and evaluations.jsonl into `curves.png`.

    Returns:
        The picture, or None where matplotlib (`pip install 'nnclr[plot]'`) is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    record = read_record(run)
    metrics, knn = record.metrics, record.knn
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
    means = [100 * row["mean"] for row in rows]
    halves = [100 * (row["interval"] or 0.0) for row in rows]  # of two seeds it may pass either end
    spread = [[min(half, abs(mean - end)) for half, mean in zip(halves, means, strict=True)] for end in (0, 100)]
    panel.errorbar(range(len(rows)), means, yerr=spread, fmt="o", capsize=4)
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


def _plot(panel: Any, title: str, metrics: list[dict[str, float]], names: dict[str, str]) -> None:
    for name, label in names.items():
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            panel.plot(*zip(*points, strict=True), label=label)
    panel.set_title(title)
    if panel.lines:
        panel.legend(fontsize=8)
