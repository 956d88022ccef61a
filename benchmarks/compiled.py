"""Whether `torch.compile` pays in a training step on one thread of this machine's CPU:

    python -m benchmarks.compiled [NETWORK...]

Forward and backward of a network under bfloat16 autocast, as it is and compiled, in fresh processes in turns; both have
to give the same features. The record goes to docs/results/compiled.json, and its table into docs/performance.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine

RECORD, PAGE = Path("docs/results/compiled.json"), Path("docs/performance.md")
BEGIN, END = "| forward and backward |", "\nOn CUDA,"
NETWORKS = {  # name: (pixels, images)
    "small-convnet": (32, 512),
    "resnet18": (32, 128),
    "resnet50": (224, 8),
    "timm/vit_small_patch16_224": (224, 8),
}
ROUNDS, STEPS = 3, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="default: all")
    parser.add_argument("--worker", nargs=2, metavar=("NETWORK", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return 0
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in options.networks or NETWORKS:
        if name not in NETWORKS:
            parser.error(f"no network is called {name}; there are {', '.join(NETWORKS)}")
        known[name] = compared(name)
        RECORD.write_text(json.dumps(known, indent=1) + "\n")
        print(row(name, known[name]), flush=True)
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + table(known) + page[page.index(END) :])
    return 0


def compared(name: str) -> dict[str, Any]:
    """Everything that was seen of a network.

    Raises:
        AssertionError: if compiled features differ by more than the rounding of bfloat16.
    """
    seen: dict[str, list[dict[str, Any]]] = {"eager": [], "compiled": []}
    with tempfile.TemporaryDirectory() as cache:  # what others compiled before would hide what it takes
        for _ in range(ROUNDS):
            for side, runs in seen.items():
                runs.append(_in_a_process_of_its_own(name, side, cache))
    gap = max(run["gap"] for run in seen["compiled"])
    if gap > 0.05:
        raise AssertionError(f"compiled features of {name} differ by {gap:.2f}")
    import torch

    return {
        "gap": gap,
        "sides": {
            side: {
                "seconds": statistics.median(run["seconds"] for run in runs),
                "lowest": min(run["seconds"] for run in runs),
                "highest": max(run["seconds"] for run in runs),
                "first_step": max(run["first"] for run in runs),  # later processes find the code in the cache
            }
            for side, runs in seen.items()
        },
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{machine()}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _in_a_process_of_its_own(name: str, side: str, cache: str) -> Any:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled", "--worker", name, side],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise SystemExit(f"{name}, {side} failed:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def measure(name: str, side: str) -> dict[str, float]:
    """CPU seconds of a step, wall seconds of the first one, and how far the features are from the plain network's."""
    import torch

    from nnclr.models.backbone import create_backbone

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, images = NETWORKS[name]
    network = create_backbone(name, size).to(memory_format=torch.channels_last).train()
    x = torch.randn(images, 3, size, size).contiguous(memory_format=torch.channels_last)

    def features(module: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    def step() -> None:
        features(run).square().mean().backward()
        network.zero_grad()

    with torch.no_grad():
        expected = features(network).float()
    run = torch.compile(network) if side == "compiled" else network
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    with torch.no_grad():
        gap = ((features(run).float() - expected).norm() / expected.norm()).item()
    step()
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    return {"seconds": statistics.median(seconds), "first": first, "gap": gap}


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    size, images = NETWORKS[name]
    eager, compiled = found["sides"]["eager"], found["sides"]["compiled"]
    spread = max(side["highest"] / side["lowest"] for side in (eager, compiled))
    return (
        f"| {name}, {images} images of {size} px | {1000 * eager['seconds']:.0f} | {1000 * compiled['seconds']:.0f} | "
        f"{eager['seconds'] / compiled['seconds']:.2f} x | {spread:.2f} | {compiled['first_step']:.0f} |"
    )


def table(known: dict[str, Any]) -> str:
    """The section, from the records alone."""
    lines = [
        BEGIN + " ms as it is | ms compiled | | spread | seconds of the first step, compiled |",
        "|---|--:|--:|--:|--:|--:|",
        *(row(name, known[name]) for name in NETWORKS if name in known),
        "",
        *sorted({f"{found['date']}, {found['machine']}." for found in known.values()}),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
