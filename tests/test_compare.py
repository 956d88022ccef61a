import csv
import json
import shutil

import pytest

import nnclr
from nnclr.cli import main
from nnclr.compare import compare
from nnclr.errors import InputError
from tests.settings import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """Two runs, which each test gets a copy of."""
    folder = tmp_path_factory.mktemp("trained")
    for name, objective in (("one", "nnclr"), ("two", "simclr")):
        own = {} if objective == "nnclr" else {"support_set_size": None, "predictor_hidden_dim": 4096}
        nnclr.pretrain(pictures, folder / name, **{**TINY, "epochs": 1, "objective": objective, **own})
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
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
    (own,) = [row for row in rows if row["encoder"] == "one" and "k=3" in row["what"]]
    assert own["interval"] == records["one"]["interval_method"]
    assert own["step"] == str(records["one"]["step"])
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
    """That of most figures first, then the others with what they are said of."""

    def told(*changes):
        path = tmp_path / "results.jsonl"
        path.write_text("".join(json.dumps({**GOOD, **change}) + "\n" for change in changes))
        return [line for line in compare([str(path)]).splitlines()[1:] if line and not line.startswith("|")]

    wilson = {"interval_method": "over images, Wilson"}
    episodes = {"interval_method": "over episodes", "protocol": "few-shot"}
    without = {"interval": None, "interval_method": "none", "protocol": "label-free"}
    assert told(wilson, {**wilson, "protocol": "logistic"}, without) == ["Intervals: over images, Wilson."]
    assert told(without) == []
    assert told(episodes, wilson, {**wilson, "protocol": "logistic"}, {"protocol": "old"}) == [
        "Intervals: over images, Wilson; few-shot: over episodes; old: of a method that the record does not name."
    ]
    sets = [{"title": t, "value": 0.5, "interval": [0.4, 0.6], "interval_method": t} for t in ("A", "B")]
    transfer = {"protocol": "transfer", "parameters": {"by": "logistic"}, "details": {"sets": sets}}
    assert told(transfer) == ["Intervals: A; transfer by logistic, B: B."]


def test_what_was_measured_in_another_way_stands_apart(tmp_path):
    """By what differs; what is chosen for an encoder, as learning rates are, and seeds make no difference."""

    def columns(*changes):
        path = tmp_path / "results.jsonl"
        path.write_text("".join(json.dumps({**GOOD, **change}) + "\n" for change in changes))
        heads = [line for line in compare([str(path)]).splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in heads if not line.startswith("|---")]
        return rows[0][1:] if rows[0][0] == "encoder" else [row[0] for row in rows[1:]]

    def linear(rate, epochs=80):
        parameters = {"augmentation": "none", "epochs": epochs, "batch_size": 8, "learning_rate": rate}
        return {"protocol": "linear", "parameters": parameters}

    same = "linear, m, 1 images of m"
    assert columns(linear(0.1), {**linear(0.2), "seed": 3, "encoder_name": "f"}) == [same]
    assert columns(linear(0.1), linear(0.1, epochs=1)) == [f"{same} (epochs 1)", f"{same} (epochs 80)"]
    parts = [{"by": "finetune", "epochs": epochs} for epochs in (1, 50)]
    sets = {"sets": [{"title": "Pets", "value": 0.5, "interval": [0.4, 0.6]}]}
    transfers = [{"protocol": "transfer", "parameters": part, "details": sets} for part in parts]
    assert columns(*transfers) == [f"transfer by finetune, Pets (epochs {epochs})" for epochs in (1, 50)]
    long = [{"protocol": "finetune", "parameters": {"fraction": 1, "subset": "lists/a" + 56 * "b" + n}} for n in "12"]
    assert len(set(columns(*long))) == 2
    same_source = [{"test_fingerprint": 64 * n, "data_fingerprint": 64 * n, "n_train": 0} for n in "ab"]
    assert columns(*same_source)[0] == "retrieval, m, 1 images of m (images scored aaaaaaaa)"
    images = [{"test_fingerprint": letter * 64} for letter in "ab"]
    assert columns(*images) == [f"retrieval, m, 1 images of m (images scored {letter * 8})" for letter in "ab"]


def test_records_of_strangers_send_nothing_to_the_terminal(tmp_path):
    path = tmp_path / "results.jsonl"
    names = ("metric", "test", "encoder_name", "interval_method")
    odd = {**GOOD, **{name: f"\x1b[2J{name}" for name in names}}
    others = [{**odd, "protocol": "finetune", "parameters": {"fraction": 1, "subset": f"\x1b{n}"}} for n in "ab"]
    path.write_text("".join(json.dumps(record) + "\n" for record in (odd, *others)))
    table = compare([str(path)])
    assert "\x1b" not in table
    assert all(name in table for name in names)


def test_figures_of_several_steps_say_so(tmp_path):
    for name, steps in (("one", (200, 200)), ("two", (200, 220))):
        (tmp_path / name).mkdir()
        lines = [{**GOOD, "step": step, "metric": metric} for step, metric in zip(steps, "mn", strict=True)]
        (tmp_path / name / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = compare([str(tmp_path / "one"), str(tmp_path / "two")])
    assert table.count("50.0 (40.0-60.0) |") == 2
    assert table.count("50.0 (40.0-60.0) at step 200 |") == table.count("50.0 (40.0-60.0) at step 220 |") == 1


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
