import csv
import json

import pytest

import nnclr
from nnclr.cli import main
from nnclr.compare import compare
from nnclr.errors import InputError


@pytest.fixture
def runs(tmp_path, pictures, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, objective in (("one", "nnclr"), ("two", "simclr")):
        own = {} if objective == "nnclr" else {"support_set_size": None, "predictor_hidden_dim": 4096}
        nnclr.pretrain(pictures, name, **{**tiny, "epochs": 1, "objective": objective, **own})
    return tmp_path


def folder_of(pictures, root):
    from PIL import Image

    for i, (image, label) in enumerate(zip(*pictures, strict=True)):
        path = root / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return str(root)


def test_one_table_of_runs_and_baselines(runs, pictures, capsys):
    data = folder_of(pictures, runs / "images")
    for name in ("one", "two"):
        more = ["--baselines"] if name == "one" else []
        assert main(["evaluate", name, data, "--test", data, "--k", "3", *more]) == 0
    printed = capsys.readouterr().out
    assert main(["compare", "one", "two", "--out", "compared"]) == 0
    table = capsys.readouterr().out
    assert (runs / "compared/compare.md").read_text() == table
    records = {
        name: [json.loads(line) for line in (runs / name / "evaluations.jsonl").read_text().splitlines()][-1]
        for name in ("one", "two")
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    column = next(i for i, title in enumerate(lines[0]) if "k=3" in title and "120 images" in title)
    cells = {line[0]: line[column] for line in lines[2:]}
    assert set(cells) == {"one", "pixels?size=16", "random:small-convnet?size=16&seed=0", "two"}
    for name, record in records.items():
        assert cells[name].startswith(f"{100 * record['value']:.1f} (")
    with open(runs / "compared/compare.csv") as file:
        rows = list(csv.DictReader(file))
    values = {row["encoder"]: float(row["value"]) for row in rows if "k=3" in row["what"]}
    assert values["two"] == records["two"]["value"]
    assert (runs / "compared/compare.png").read_bytes().startswith(b"\x89PNG")
    # baselines are not the run's own results
    assert len((runs / "one/baselines.jsonl").read_text().splitlines()) == 2
    assert "random:" not in (runs / "one/evaluations.jsonl").read_text()
    assert printed.count('"value"') >= 4


def test_the_longer_list_runs_downwards(runs):
    def shown(paths):
        lines = [line for line in compare(paths).splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("|---")]

    upright = shown(["one", "two"])  # two encoders, one measure
    assert [row[0] for row in upright] == ["encoder", "one", "two"]
    last = json.loads((runs / "one/evaluations.jsonl").read_text().splitlines()[-1])
    with open(runs / "one/evaluations.jsonl", "a") as file:
        for protocol in ("retrieval", "few-shot"):
            file.write(json.dumps({**last, "protocol": protocol, "metric": "m", "value": 0.5}) + "\n")
    wide = shown(["one", "two"])  # two encoders, three measures
    assert wide[0] == ["measured", "one", "two"]
    assert len(wide) == 4
    knn = next(row for row in wide if row[0].startswith("knn"))
    assert knn[1:] == [row[1] for row in upright[1:]]
    assert next(row for row in wide if row[0].startswith("retrieval"))[1].startswith("50.0")


def test_latest_result_of_a_kind_counts(runs):
    path = runs / "one/evaluations.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with open(path, "a") as file:
        file.write(json.dumps({**last, "value": 0.123}) + "\n")
    assert "12.3" in compare(["one"])


def test_what_holds_no_results_is_one_sentence(runs):
    (runs / "empty").mkdir()
    (runs / "text.jsonl").write_text('{"value": 1}\n')
    for path, words in (
        ("empty", "empty holds no evaluations"),
        ("text.jsonl", "line 1 of text.jsonl is no evaluation"),
    ):
        with pytest.raises(InputError, match=words):
            compare([path])
    assert main(["compare"]) == 2


GOOD = {
    **dict.fromkeys(("metric", "test"), "m"),
    **{
        "encoder_name": "e",
        "protocol": "retrieval",
        "n_test": 1,
        "parameters": {},
        "value": 0.5,
        "interval": [0.4, 0.6],
    },
}


def test_ways_of_making_intervals_are_told_apart(tmp_path):
    """One line where all are made alike; otherwise a line a way, with what it is said of."""

    def told(*changes):
        path = tmp_path / "results.jsonl"
        path.write_text("".join(json.dumps({**GOOD, **change}) + "\n" for change in changes))
        return [line for line in compare([str(path)]).splitlines()[1:] if line and not line.startswith("|")]

    wilson = {"interval_method": "over images, Wilson"}
    episodes = {"interval_method": "over episodes", "protocol": "few-shot"}
    without = {"interval": None, "interval_method": "none", "protocol": "label-free"}
    assert told(wilson, {**wilson, "protocol": "logistic"}, without) == ["Intervals: over images, Wilson."]
    assert told(without) == []
    assert told(wilson, episodes, {"protocol": "old"}) == [
        "- Intervals over images, Wilson: retrieval, m, 1 images of m.",
        "- Intervals over episodes: few-shot, m, 1 images of m.",
        "- Intervals of a method that the record does not name: old, m, 1 images of m.",
    ]
    sets = [{"title": t, "value": 0.5, "interval": [0.4, 0.6], "interval_method": t} for t in ("A", "B")]
    transfer = {"protocol": "transfer", "parameters": {"by": "logistic"}, "details": {"sets": sets}}
    assert told(transfer) == [f"- Intervals {t}: transfer by logistic, {t}." for t in ("A", "B")]


@pytest.mark.parametrize(
    "odd",
    [
        b"\x89PNG\r\n\x1a\n",
        b"[1, 2]",
        b"3",
        b"{}",
        json.dumps({**GOOD, "value": "half"}).encode(),
        json.dumps({**GOOD, "value": None}).encode(),
        json.dumps({**GOOD, "value": float("nan")}).encode(),
        json.dumps({**GOOD, "value": 10**400}).encode(),
        json.dumps({**GOOD, "interval": "ab"}).encode(),
        json.dumps({**GOOD, "interval": 0.5}).encode(),
        json.dumps({**GOOD, "interval": [0.1]}).encode(),
        json.dumps({**GOOD, "parameters": []} | {"protocol": "knn"}).encode(),
        json.dumps({**GOOD, "protocol": "transfer", "details": {"sets": 5}}).encode(),
        json.dumps({**GOOD, "protocol": "finetune", "parameters": {"fraction": "all"}}).encode(),
        b"[" * 100_000,
    ],
)
def test_odd_files_are_one_plain_sentence(tmp_path, capsys, odd):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n")
    assert main(["compare", str(path)]) == 0  # the control
    assert "| e | 50.0 (40.0-60.0) |" in capsys.readouterr().out
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + odd + b"\n" + json.dumps(GOOD).encode())
    assert main(["compare", str(path)]) == 2
    said = "is no evaluation result; name run folders, or .jsonl files that nnclr evaluate wrote"
    assert capsys.readouterr() == ("", f"nnclr: line 2 of {path} {said}\n")


def test_a_folder_that_cannot_be_made_is_one_plain_sentence(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text(json.dumps(GOOD) + "\n")
    out = tmp_path / "results.jsonl" / "table"
    assert main(["compare", str(tmp_path / "results.jsonl"), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"nnclr: --out {out} cannot be made: Not a directory; choose another folder\n"


def test_files_of_others_are_not_replaced(runs, capsys):
    assert main(["compare", "one", "--out", "mine"]) == 0
    assert main(["compare", "one", "two", "--out", "mine"]) == 0  # its own
    for name in ("compare.md", "compare.csv", "compare.png"):
        (runs / f"of-{name}").mkdir()
        (runs / f"of-{name}" / name).write_text("work of years")
        assert main(["compare", "one", "--out", f"of-{name}"]) == 2
        assert f"{name} exists and was not written by nnclr compare" in capsys.readouterr().err
        assert [path.read_text() for path in (runs / f"of-{name}").iterdir()] == ["work of years"]
