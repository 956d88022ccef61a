"""What the fault suite found, as `reliability.json`: for each entry of the catalogue its tests and what they counted.

The catalogue is one TOML file a chapter: fault, behaviour, and the tests that prove it, wherever they are in tests/.
The hooks below run in every session of pytest; the file holds the tests that ran. `python -m tests.reliability.page`
makes docs/reliability.md of it.
"""

import datetime
import json
import os
import platform
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "reliability.json"
CHAPTERS = {
    "A": ("Crash, checkpoint, resume", 22),
    "B": ("Images, folders, shards", 21),
    "C": ("Numerics", 10),
    "D": ("Several processes", 9),
    "E": ("Processes and the operating system", 10),
    "F": ("Hostile files and settings", 12),
    "G": ("The explorer", 9),
    "H": ("Export and import", 5),
}
_outcomes, _figures = {}, []  # of this session: node -> outcome, [{entry, what, passed, of}]


@cache
def catalogue():
    """Entry -> {fault, behaviour, tests, and not_here: what cannot be tested on such a machine, and why}."""
    found = {}
    for path in sorted(Path(__file__).with_name("catalogue").glob("*.toml")):
        found |= tomllib.loads(path.read_text())
    return dict(sorted(found.items(), key=lambda item: (item[0][0], int(item[0][1:]))))


def of_entry(node, tests):
    """Whether a node is one of these tests, or a case of one."""
    return node.partition("[")[0] in {test.partition("[")[0] for test in tests} and any(
        node == test or "[" not in test for test in tests
    )


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":  # a fixture that fails or skips ends the test
        _outcomes[report.nodeid] = report.outcome
    if report.when == "call":
        _figures.extend(value for name, value in report.user_properties if name == "reliability")


def pytest_terminal_summary(terminalreporter):
    for figure in sorted(_figures, key=lambda figure: (figure["entry"], figure["what"])):
        terminalreporter.write_line("{entry}: {what}: {passed} of {of}".format(**figure))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput") or "NNCLR_TEST_ALONE" in os.environ:  # another session has the reports
        return
    entries = {}
    for name, entry in catalogue().items():
        ran = {node: outcome for node, outcome in sorted(_outcomes.items()) if of_entry(node, entry["tests"])}
        figures = [figure for figure in _figures if figure["entry"] == name]
        if ran:
            entries[name] = {"tests": ran, "figures": figures}
    if entries:
        record = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "entries": entries,
        }
        FILE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":  # the files that hold the tests, for the command line of pytest
    print(*sorted({test.partition("::")[0] for entry in catalogue().values() for test in entry["tests"]}))
