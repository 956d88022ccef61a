"""The catalogue names every entry, and tests that exist; the page is that of the record."""

import ast
import json

from tests.reliability.page import PAGE, RECORD, rendered
from tests.reliability.record import CHAPTERS, ROOT, catalogue, of_entry


def missing(entries, root):
    """Entries without a fault, a behaviour or a test, and tests that are not there."""
    wrong = []
    for name, entry in entries.items():
        if not entry.get("fault") or not entry.get("behaviour"):
            wrong.append(f"{name}: says too little")
        if not entry.get("tests") and not entry.get("not_here"):
            wrong.append(f"{name}: no test, and no reason")
        for test in entry.get("tests", ()):
            file, _, function = test.partition("::")
            path = root / file
            tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
            if function.partition("[")[0] not in {getattr(node, "name", None) for node in tree.body}:
                wrong.append(f"{name}: {test} does not exist")
    return wrong


def test_every_entry_has_tests_that_exist():
    expected = [f"{letter}{number}" for letter, (_, count) in CHAPTERS.items() for number in range(1, count + 1)]
    assert list(catalogue()) == expected
    assert missing(catalogue(), ROOT) == []
    good = {"fault": "x", "behaviour": "y", "tests": ["tests/reliability/test_catalogue.py::missing"]}
    assert missing({"A1": good}, ROOT) == []
    for change in ({"tests": []}, {"tests": ["tests/nowhere.py::test_x"]}, {"behaviour": ""}):
        assert len(missing({"A1": good | change}, ROOT)) == 1


def test_nodes_belong_to_their_entry():
    assert of_entry("tests/a.py::test_x[1-b]", ["tests/a.py::test_x"])
    assert of_entry("tests/a.py::test_x", ["tests/a.py::test_x"])
    assert of_entry("tests/a.py::test_x[1]", ["tests/a.py::test_x[1]"])
    assert not of_entry("tests/a.py::test_x[2]", ["tests/a.py::test_x[1]"])
    assert not of_entry("tests/a.py::test_xy", ["tests/a.py::test_x"])


def test_the_page_is_that_of_a_record_in_which_everything_passed():
    record = json.loads(RECORD.read_text())
    assert PAGE.read_text() == rendered(record)
    assert record["entries"].keys() == catalogue().keys()
    for name, entry in record["entries"].items():
        assert set(entry["tests"].values()) <= {"passed", "skipped"}, name
    broken = json.loads(RECORD.read_text())
    next(iter(broken["entries"].values()))["tests"] = {"tests/x.py::test_x": "failed"}
    assert "1 failed" in rendered(broken)
