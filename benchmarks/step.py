"""Where one training step goes, on one thread of this machine's CPU:

    python -m benchmarks.step [--steps 40] [--write NAME]

Trains on two sets, 32-pixel images in memory and 500 x 375 JPEG files at 224 pixels, under Python's profiler, and adds
up the CPU time of the step's parts. The functions are found by name, so the same file measures older commits:
`PYTHONPATH=OLD/src:. python -m benchmarks.step`. With --write the record goes to docs/results/step.json under that
name, and docs/performance.md is written from all records.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECORDS, PAGE = Path("docs/results/step.json"), Path("docs/performance.md")
BEGIN = "### Figures"
# Part of a step -> the functions whose time it is: (end of the file's name, function).
PARTS = {
    "images and views": [("data/loader.py", "batches")],
    "backbone, forward": [("models/backbone.py", "forward")],
    "heads, look-up, loss": [("objectives/nnclr.py", "forward")],
    "of it the look-up": [("nnclr/support_set.py", "nearest")],
    "backward": [("torch/_tensor.py", "backward")],
    "optimiser": [("nnclr/optim.py", "guarded_step"), ("nnclr/optim.py", "step")],
    "support set, written": [("objectives/nnclr.py", "update")],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", metavar="NAME", help="keep the record under this name")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found = {
        "images in memory, 32 px, batch 256, set 16,384": several(_in_memory, options.steps, options.rounds),
        "JPEG files, 224 px, batch 32, set 1,024": several(_files, max(options.steps // 4, 4), options.rounds),
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(found, indent=1))
    if options.write:
        known = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        RECORDS.write_text(json.dumps(known | {options.write: found}, indent=1) + "\n")
        page = PAGE.read_text()
        PAGE.write_text(page[: page.index(BEGIN)] + BEGIN + "\n\n" + table(known | {options.write: found}))
    return 0


def several(run: Any, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU a step of each part, the median of several runs."""
    seen = [run(steps) for _ in range(rounds)]
    return {part: round(statistics.median(one[part] for one in seen), 2) for part in seen[0]}


def _in_memory(steps: int) -> dict[str, float]:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8)
    return _profiled(images, steps, image_size=32, batch_size=256, support_set_size=16_384, epochs=steps / 16)


def _files(steps: int) -> dict[str, float]:
    from benchmarks.cases import _jpegs

    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(4 * _jpegs()):
            (Path(folder) / f"{i:03d}.jpg").write_bytes(content)
        return _profiled(folder, steps, image_size=224, batch_size=32, support_set_size=1024, epochs=steps / 4)


def _profiled(data: Any, steps: int, **settings: Any) -> dict[str, float]:
    import nnclr

    with tempfile.TemporaryDirectory() as folder:
        profile = cProfile.Profile(time.process_time)
        profile.enable()
        nnclr.pretrain(
            data,
            f"{folder}/run",
            backbone="small-convnet",
            augmentation="simclr",
            num_workers=0,
            warmup_epochs=0.0,
            evaluate_every_epochs=0.0,
            log_every_steps=10**6,
            checkpoint_every_steps=10**6,
            quiet=True,
            **settings,
        )
        profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # (file, line, name) -> times
    found = {}
    for part, functions in PARTS.items():
        for file, name in functions:  # the first that there is: of two, one calls the other
            seconds = [times[3] for (path, _, called), times in stats.items() if path.endswith(file) and called == name]
            if seconds:
                found[part] = 1e3 * sum(seconds) / steps
                break
    return found


def table(known: dict[str, Any]) -> str:
    """Parts downwards, records to the right."""
    lines = []
    for case in [name for name in next(iter(known.values())) if name not in ("machine", "date")]:
        lines += [f"{case}, milliseconds of one CPU a step:\n", "| | " + " | ".join(known) + " |"]
        lines += ["|---" * (len(known) + 1) + "|"]
        for part in PARTS:
            cells = [f"{found[case][part]:.1f}" if part in found[case] else "" for found in known.values()]
            lines.append(f"| {part} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"{name}: {found['date']}, {found['machine']}." for name, found in known.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
