import json
import re

import numpy as np

import nnclr
from nnclr import report


def run_with(tmp_path, pictures, tiny, name="run"):
    return nnclr.pretrain(pictures, tmp_path / name, **tiny)


def test_report_is_one_safe_file(tmp_path, pictures, tiny):
    """A run whose names are hostile: nothing of it reaches the page as markup."""
    run = run_with(tmp_path, pictures, tiny, "<script>alert(1)</script>".replace("/", "_"))
    text = (run.path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert text.count("data:image/png;base64,") >= 3  # curves, an early and a late sheet
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert f"{100 * run.evaluations[-1]['value']:.1f} % top-1 accuracy" in text
    assert "temperature = 0.1" in text
    (run.path / "config.toml").write_text('data = "</pre><img src=x>"\n')
    assert "<img src=x>" not in report.write_report(run.path).read_text()


def test_sheet_shows_what_the_look_up_returned(tmp_path, pictures, tiny, monkeypatch):
    """Rows are the fixed queries; frames tell same label, other label and the image itself apart."""
    rows = []
    sheet = report._sheet
    monkeypatch.setattr(report, "_sheet", lambda source, made: rows.append(made) or sheet(source, made))
    run = run_with(tmp_path, pictures, tiny)
    assert len(rows) == len(list((run.path / "neighbours").iterdir())) == 3  # the first log, and two evaluations
    queries = [[query for query, _ in made] for made in rows]
    assert queries[0] == queries[1] == queries[2]
    assert len(set(queries[0])) == report.QUERIES
    for _, neighbours in rows[-1]:
        similarities = [s for _, s in neighbours]
        assert similarities == sorted(similarities, reverse=True)
    labels = pictures[1]
    picture = np.asarray(sheet(nnclr.data.source.open_source(pictures), rows[-1]))
    colours = {tuple(c) for c in picture.reshape(-1, 3)[::1].tolist()}
    same = any(i != q and labels[i] == labels[q] for q, found in rows[-1] for i, _ in found)
    other = any(labels[i] != labels[q] for q, found in rows[-1] for i, _ in found)
    assert (report._SAME in colours) == same
    assert (report._OTHER in colours) == other


def test_without_matplotlib_there_are_no_curves(tmp_path, pictures, tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run = run_with(tmp_path, pictures, tiny)
    assert not (run.path / "curves.png").exists()
    assert (run.path / "report.html").exists()
    assert json.loads((run.path / "environment.json").read_text())["data"]["images"] == 120
