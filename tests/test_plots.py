"""Drawings for a page: what they show is the data, and they take their colours from the page."""

import re
import sys

import numpy as np
import pytest

from nnclr import plots
from nnclr.plots import MOST_POINTS, Line, draw_sweep, line_drawing, thinned


def test_thinning_keeps_ends_and_extremes():
    """A spike of one line among 100,000 is what a person looks for."""
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.normal(size=100_000))]
    points[54_321] = (54_321, 99.0)
    points[7] = (7, -99.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(set(kept) & set(points))
    assert {points[0], points[7], points[54_321], points[-1]} <= set(kept)
    assert points[54_321] not in points[:: len(points) // MOST_POINTS]  # control: every n-th line loses it
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def paths(svg, colour):
    found = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--{colour}\)', svg)
    return [np.array(re.findall(r"[ML] (\S+) (\S+)", path), float) for path in found]


def test_a_line_is_where_its_data_are():
    """Coordinates on the page are an affine map of the data, with y upwards."""
    rng = np.random.default_rng(0)
    data = np.column_stack([np.arange(50) * 10, rng.normal(size=50)])
    svg = line_drawing([Line(data.tolist(), "loss"), Line([(0, 1.0), (490, 1.0)], "chance", "reference")], "Loss")
    drawn = max(paths(svg, "series-1"), key=len)  # the other is the legend's
    for column, sign in ((0, 1), (1, -1)):
        slope, offset = np.polyfit(data[:, column], drawn[:, column], 1)
        assert slope * sign > 0
        np.testing.assert_allclose(drawn[:, column], slope * data[:, column] + offset, atol=0.011)
    assert np.ptp(max(paths(svg, "muted"), key=lambda path: np.ptp(path[:, 0]))[:, 1]) == 0


def test_areas_stand_on_one_another():
    svg = line_drawing([Line([(0, 10), (10, 10)], "a"), Line([(0, 5), (10, 5)], "b", "second")], "Time", stacked=True)
    heights = []
    for colour in ("series-1", "series-2"):
        name = re.search(rf'<use href="#(\w+)"[^>]*fill: var\(--{colour}\)', svg)[1]
        area = re.search(rf'<path id="{name}" d="([^"]*)"', svg)[1]
        heights.append(sorted({float(y) for y in re.findall(r"[ML] \S+ (\S+)", area)}))
    (top, bottom), (upper, lower) = heights
    assert lower == top
    assert top - upper == pytest.approx((bottom - top) / 2, abs=0.02)


def test_a_drawing_is_the_pages_own():
    """No colour, font, style rule or identifier that would clash with the page or another drawing."""
    lines = [Line([(0, 0.0021), (1, 0.0013)], "rate <&>", band=[(0, 0.001, 0.003), (1, 0.001, 0.002)], marked=True)]
    one, two = line_drawing(lines, 'Rate "<b>"'), line_drawing(lines, "Other")
    for svg in (one, two):
        assert not re.search(r"#[0-9a-f]{6}|font-family|<style|<script|<!|xlink|http", svg)
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) == {"ink", "muted", "line", "series-1"}
    assert 'aria-label="Rate &quot;&lt;b&gt;&quot;"' in one
    assert "rate &lt;&amp;&gt;" in one
    assert ">0.0020<" in one  # a tick is text, and keeps its digits
    names = [set(re.findall(r'\sid="([^"]*)"', svg)) for svg in (one, two)]
    assert names[0]
    assert not names[0] & names[1]
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', one))
    assert used == names[0]
    assert line_drawing(lines, "Other") == two


def test_without_matplotlib_nothing_is_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert line_drawing([Line([(0, 1)])], "x") is None


def test_the_bars_of_a_sweep_end_at_0_and_100(tmp_path, monkeypatch):
    """The interval of the mean of two seeds may be wider than what an accuracy can be."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    rows = [
        {"values": [m], "mean": m, "interval": half} for m, half in ((0.9, 0.4), (0.2, 0.7), (0.5, 0.1), (0.3, None))
    ]
    draw_sweep(tmp_path / "sweep.png", "k", list("abcd"), rows)
    (bars,) = figures[0].axes[0].containers[0].lines[2]
    ends = [(low, high) for (_, low), (_, high) in bars.get_segments()]
    np.testing.assert_allclose(ends, [(50, 100), (0, 90), (40, 60), (30, 30)])
