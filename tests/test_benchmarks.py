"""The runners of the benchmarks: results are compared, records become a page. No time is judged."""

import json

import pytest
import torch
from benchmarks import __main__ as runner
from benchmarks import cases, compiled, gpu, scaling

import nnclr


@pytest.fixture
def without_peers(monkeypatch):
    """The sides that need no other library."""
    sides = cases._lookup

    def ours(*arguments):
        return {name: side for name, side in sides(*arguments).items() if name != "lightly"}

    monkeypatch.setattr(cases, "_lookup", ours)


def test_a_case_compares_results_first(without_peers, monkeypatch):
    assert cases._lookup_check(600, 16)() == "all 512 neighbours equal a float64 comparison; loss equal to 0e+00"
    nearest = nnclr.SupportSet.nearest

    def second(self, z):
        found = nearest(self, z, k=2)
        return found._replace(embeddings=found.embeddings[:, 1:])

    monkeypatch.setattr(nnclr.SupportSet, "nearest", second)
    with pytest.raises(AssertionError, match="'nnclr': 0"):
        cases._lookup_check(600, 16)()


def test_every_case_has_its_peer_and_a_goal():
    for name, case in cases.CASES.items():
        assert {"nnclr", case.peer} <= set(case.sides), name
        assert case.goal > 0


def test_the_sides_that_are_compared_are_measured_in_turns_and_other_peers_once(monkeypatch):
    asked = []

    def child(arguments):
        asked.append(arguments[2] if arguments[0] == "--worker" else arguments[0])
        return {"seconds": [2.0, 1.0, 3.0], "extra_mib": 1.0}

    monkeypatch.setattr(runner, "_child", child)
    found = runner.record("jpeg", 3, 1.0)
    assert asked == ["--check", "nnclr", "lightly", "torchvision v2", *["nnclr", "lightly"] * 2]
    assert {name: seen["repeats"] for name, seen in found["sides"].items()} == {
        "nnclr": 9,
        "lightly": 9,
        "torchvision v2": 3,
    }


def side(seconds):
    return {"seconds": seconds, "lowest": seconds, "highest": 2 * seconds, "repeats": 9, "extra_mib": 1.5}


def test_page_says_what_was_reached_and_what_was_missed():
    facts = {
        "equal": "to the bit",
        "date": "2026-01-02",
        "machine": "a machine",
        "torch": "2",
        "python": "3",
        "load": 0,
    }
    known = {
        "lars": {"sides": {"nnclr": side(1.0), "lightly": side(1.2)}, **facts},
        "lookup-large": {"sides": {"nnclr": side(0.1), "lightly": side(0.6)}, **facts},
    }
    lines = runner.render(known).splitlines()
    reached, missed = (next(line for line in lines if cases.CASES[n].title in line) for n in ("lookup-large", "lars"))
    assert "6.00 x lightly | 4 x | reached | 2.00 |" in reached
    assert "1.20 x lightly | 1.5 x | **missed** | 2.00 |" in missed
    assert "Measured on 2026-01-02, a machine, torch 2, Python 3." in lines


def test_gpu_runner_with_small_numbers(tmp_path, monkeypatch, capsys):
    chosen = ["limits", "augmentation", "lookup", "lars", "step-resnet18-32"]
    monkeypatch.setattr(
        "sys.argv", ["gpu", *chosen[:-1], "step-resnet18-3?", "--tiny", "--out", str(tmp_path / "gpu.json")]
    )
    assert gpu.main() == 0
    known = json.loads((tmp_path / "gpu.json").read_text())
    assert list(known) == chosen
    assert known["lookup"]["equal"].startswith("64 of 64 equal float64")
    # These are they, but for the rounding to bfloat16 of what is below 4.
    assert known["augmentation"]["equal"] == "to 7.8e-03, in float32 0.0e+00, of the plain functions"
    rates = known["step-resnet18-32"]["views_a_second"]
    assert list(rates) == ["as it comes", "kernel by kernel"]
    assert all(len(side) == 5 and min(side) > 0 for side in rates.values())
    assert known["step-resnet18-32"]["said"] == dict.fromkeys(rates, "")  # there is nothing to launch on a CPU
    monkeypatch.setitem(gpu.CASES, "limits", lambda device: 1 / 0)  # a case that fails is told, and ends in 1
    monkeypatch.setattr("sys.argv", ["gpu", "limits", "--tiny"])
    assert gpu.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_compiled_features_are_compared_with_those_of_the_network(monkeypatch):
    monkeypatch.setitem(compiled.NETWORKS, "small-convnet", (16, 4))
    monkeypatch.setattr(torch, "compile", lambda module: lambda x: 1.5 * module(x))
    assert compiled.measure("small-convnet", "eager")["gap"] == 0
    assert compiled.measure("small-convnet", "compiled")["gap"] == pytest.approx(0.5, abs=0.01)


def test_the_table_of_compiled_networks():
    def side(seconds, highest, first):
        return {"seconds": seconds, "lowest": seconds, "highest": highest, "first_step": first}

    sides = {"eager": side(0.3, 0.3, 0.4), "compiled": side(0.2, 0.25, 20.4)}
    table = compiled.table({"resnet50": {"sides": sides, "date": "2026-01-02", "machine": "a machine"}})
    assert "| resnet50, 8 images of 224 px | 300 | 200 | 1.50 x | 1.25 | 20 |" in table
    assert table.endswith("\n2026-01-02, a machine.\n")


def test_the_cost_model_finds_the_prices_that_made_the_times():
    prices = [0.01, 2e-4, 3e-12, 4e-9]
    points = []
    for point in scaling.POINTS:
        seconds = sum(price * cost for price, cost in zip(prices, scaling.costs(point, 5e5), strict=True))
        points.append({"point": vars(point), "weights": 5e5, "seconds": seconds, "highest": seconds, "mib": 1.0})
    ways = {name: {"mib": 100.0 * ranks, "seconds": 2.0, "weights": 4e6} for name, (ranks, _) in scaling.WAYS.items()}
    ways["`--fsdp`, 2 processes"] |= {"mib": 150.0, "seconds": 3.0}
    record = {"date": "2026-01-02", "machine": "a machine", "points": points, "ways": ways}
    assert scaling.fitted(record) == pytest.approx(prices, rel=1e-6)
    rows = [line.split("|")[1:-1] for line in scaling.page(record).splitlines() if line.startswith("| ")]
    measured = [row for row in rows if len(row) == 7][1:]
    assert len(measured) == len(points)
    assert all(row[3] == row[4] for row in measured)  # the model beside the time
    assert [" `--fsdp`, 2 processes ", " 150 ", " 0.75 ", " 3.00 ", " 1.50 "] in rows
    assert "2.0 million parameters" in scaling.page(record)


def test_what_the_cost_model_sends():
    one, four = scaling.Point(64, 100), scaling.Point(64, 100, 4)
    assert scaling.sent(one, 1e6) == 0
    # Three quarters of: 64 embeddings and 128 predictions of 128 numbers, 64 ids, twice predictions and weights.
    assert scaling.sent(four, 1e6) == 0.75 * (4 * 128 * (64 + 128) + 8 * 64 + 2 * (4 * 128 * 128 + 4e6))
    # A sharded look-up: 128 queries, slots, candidates of four numbers, and entries.
    more = scaling.sent(scaling.Point(64, 100, 4, True), 1e6) - scaling.sent(four, 1e6)
    assert more == 0.75 * 128 * (4 * 128 + 8 + 4 * 8 + 4 * 128)
    assert scaling.held(98_304, 256) == pytest.approx(102e6, rel=0.01)  # as docs/scale.md says
    assert scaling.compared(four) == 2 * 64 * 100 * 128 / 4
