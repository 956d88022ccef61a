"""Speed beside the peers, on one thread of this machine's CPU: `make bench`, or

    python -m benchmarks [CASE...] [--rounds 3] [--seconds 0.7]

For each case the results of the sides are compared first. Then every side is measured in fresh processes in turns,
A-B-C-A-B: CPU seconds of one thread, so that other work on the machine counts little. Peers beside the one of the goal
are measured once, since it all should take less than ten minutes. The records go to
docs/results/benchmarks.json, the page docs/benchmarks.md is written from them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import explorer

RECORDS, PAGE = Path("docs/results/benchmarks.json"), Path("docs/benchmarks.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes a side")
    parser.add_argument("--seconds", type=float, default=0.7, help="CPU time of the repeats of a process")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--check", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker or options.check:
        return _in_a_process_of_its_own(options)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    from benchmarks.cases import CASES

    known = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    began = time.perf_counter()
    for name in options.cases or CASES:
        if name not in CASES:
            parser.error(f"no case is called {name}; there are {', '.join(CASES)}")
        known[name] = record(name, options.rounds, options.seconds)
        RECORDS.write_text(json.dumps(known, indent=1) + "\n")
        print(row(name, known[name]), flush=True)
    PAGE.write_text(render(known))
    print(f"in all {(time.perf_counter() - began) / 60:.1f} minutes")
    return 0


def _in_a_process_of_its_own(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.cases import CASES, measure

    torch.set_num_threads(1)
    if options.check:
        print(json.dumps(CASES[options.check].check()))
    else:
        print(json.dumps(measure(*options.worker, options.seconds)))
    return 0


def record(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Everything that was seen of a case."""
    import torch

    from benchmarks.cases import CASES

    case = CASES[name]
    equal = _child(["--check", name])
    seen: dict[str, list[dict[str, Any]]] = {side: [] for side in case.sides}
    for number in range(rounds):
        for side in case.sides if number == 0 else ("nnclr", case.peer):
            seen[side].append(_child(["--worker", name, side, "--seconds", str(seconds)]))
    sides = {}
    for side, runs in seen.items():
        medians = [statistics.median(run["seconds"]) for run in runs]
        sides[side] = {
            "seconds": statistics.median(medians),
            "lowest": min(medians),
            "highest": max(medians),
            "repeats": sum(len(run["seconds"]) for run in runs),
            "extra_mib": statistics.median(run["extra_mib"] for run in runs),
        }
    return {
        "equal": equal,
        "sides": sides,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _child(arguments: list[str]) -> Any:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks", *arguments], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def machine() -> str:
    """The processor's name, and how many cores of it there are."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def ratio(name: str, found: dict[str, Any]) -> float:
    """How many times as fast as the peer of the goal."""
    from benchmarks.cases import CASES

    return found["sides"][CASES[name].peer]["seconds"] / found["sides"]["nnclr"]["seconds"]


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    from benchmarks.cases import CASES

    case, times = CASES[name], ratio(name, found)
    rates = ", ".join(f"{side} {_rate(case.items / seen['seconds'])}" for side, seen in found["sides"].items())
    spread = max(seen["highest"] / seen["lowest"] for seen in found["sides"].values())
    verdict = "reached" if times >= case.goal else "**missed**"
    return (
        f"| {case.title} | {rates} {case.unit}/s | {times:.2f} x {case.peer} | {case.goal:.2g} x | {verdict} | "
        f"{spread:.2f} |"
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def render(known: dict[str, Any]) -> str:
    """The page, from the records alone."""
    lines = ["# Benchmarks\n", *(_table(known) if known else [])]
    lines += ["", explorer.render().strip()] if explorer.RESULT.exists() else []
    return "\n".join(lines) + "\n"


def _table(known: dict[str, Any]) -> list[str]:
    from benchmarks.cases import CASES

    lines = [
        "Written by `make bench` (`python -m benchmarks`): CPU seconds of one thread, median over fresh processes",
        "taken in turns, one process for each peer that no goal is set against; the last column is the largest ratio",
        "of a side's slowest to its fastest process. Equal results are checked before anything is timed.\n",
        "| what | rate on one core | against | goal | | spread |",
        "|---|---|---|---|---|---|",
        *(row(name, known[name]) for name in CASES if name in known),
        "\nWhat was compared before, and the memory that one call takes beside its inputs:\n",
        "| what | results | memory, MiB |",
        "|---|---|---|",
    ]
    for name in CASES:
        if name in known:
            memory = ", ".join(f"{side} {seen['extra_mib']:.0f}" for side, seen in known[name]["sides"].items())
            lines.append(f"| {CASES[name].title} | {known[name]['equal']} | {memory} |")
    facts = {(found["date"], found["machine"], found["torch"], found["python"]) for found in known.values()}
    lines += ["", *(f"Measured on {d}, {m}, torch {t}, Python {p}." for d, m, t, p in sorted(facts))]
    return lines


if __name__ == "__main__":
    sys.exit(main())
