"""docs/reliability.md from the catalogue and the record of a run: `make reliability`, or

    python -m tests.reliability.page

The record of the last session (`reliability.json`) is copied to docs/results/, the page is written from it.
"""

import json
import shutil
import sys

from tests.reliability.record import CHAPTERS, FILE, ROOT, catalogue

RECORD, PAGE = ROOT / "docs/results/reliability.json", ROOT / "docs/reliability.md"
INTRODUCTION = """# What it survives

Every fault below is made on purpose by a test of the gate, and what happens then is what stands beside it. A figure
"60 of 60" was counted by the test. Guards have controls: the same test with the guard taken away must fail.

Limits. Bit identity holds for the same versions, device type, number of threads and number of processes. No test here
ran on a GPU or cut the power; what is on the disk then rests on `fsync` of the file system. Network file systems
without atomic rename are out of scope.

`make reliability` runs the tests and writes this page; [exit codes](exit-codes.md) are a page of their own, and so is
the report of a [soak](results/soak.md): random faults at random times. The one fault that it marks is a signal to a run
that was finished (step 600 of 600, code 0): its judge then took a next start with nothing to do for one that hangs.
"""


def summary(ran):
    """`37 passed, 1 skipped` of test outcomes."""
    counts = {kind: sum(outcome == kind for outcome in ran.values()) for kind in ("passed", "failed", "skipped")}
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "not run"


def cell(text):
    """As a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def rendered(record):
    """The page of a record as `record.pytest_sessionfinish` writes it."""
    lines = [INTRODUCTION, f"Ran on {record['date']}: {record['machine']}, Python {record['python']}."]
    for letter, (title, _) in CHAPTERS.items():
        lines += ["", f"## {letter}. {title}", "", "| | fault | behaviour | tests | result |", "|---|---|---|---|---|"]
        for name, entry in catalogue().items():
            if name[0] != letter:
                continue
            found = record["entries"].get(name, {"tests": {}, "figures": []})
            files = sorted({test.partition("::")[0].removeprefix("tests/") for test in entry["tests"]})
            links = ", ".join(f"[{file.removesuffix('.py')}](../tests/{file})" for file in files)
            result = "<br>".join(
                [
                    summary(found["tests"]),
                    *("{what}: {passed} of {of}".format(**figure) for figure in found["figures"]),
                    *([f"Not here: {entry['not_here']}"] if "not_here" in entry else []),
                ]
            )
            lines.append(f"| {name} | {cell(entry['fault'])} | {cell(entry['behaviour'])} | {links} | {cell(result)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if not FILE.exists():
        sys.exit("reliability.json is missing; run the tests first, or `make reliability`")
    shutil.copy(FILE, RECORD)
    PAGE.write_text(rendered(json.loads(RECORD.read_text())))
