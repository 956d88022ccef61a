"""Time and memory of a step against batch, support set and processes, beside a cost model; and what it says of more.

    python -m benchmarks.scaling            # six minutes of two cores; writes docs/results/scaling.json
    python -m benchmarks.scaling --page     # writes its part of docs/scale.md anew; without a record, what is on paper

Each point is a run of its own in fresh processes, trained on random 32 px images. Seconds of a step are the median
over lines of metrics.jsonl, memory is the largest of a process. The model has four prices, found by least squares over
all points: of a step, of an image of a process' share, of a number compared in the look-up, of a byte sent. Beside it
stand the ways to train in less memory, on a small vision transformer.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

RECORD, PAGE = Path("docs/results/scaling.json"), Path("docs/scale.md")
BEGIN, END = "<!-- table: written by python -m benchmarks.scaling -->", "<!-- end of the table -->"
DIM, EVERY, LINES = 128, 4, 5  # width of embeddings; steps between lines; lines, of which the first is left out


@dataclass(frozen=True)
class Point:
    """What is measured, or asked of the model."""

    batch: int  # images, over all processes
    entries: int  # of the support set
    ranks: int = 1
    sharded: bool = False


POINTS = (
    Point(64, 4096), Point(128, 4096), Point(256, 4096), Point(512, 4096),
    Point(128, 32_768), Point(128, 131_072), Point(128, 524_288), Point(512, 131_072),
    Point(128, 4096, 2), Point(256, 4096, 2), Point(512, 4096, 2), Point(128, 131_072, 2), Point(512, 131_072, 2),
    Point(128, 131_072, 2, True), Point(512, 524_288, 2, True),
)  # fmt: skip

# Ways to train a transformer in less memory: processes, and what is set.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "everything kept": (1, {}),
    "`--recompute`": (1, {"recompute": True}),
    "`--grad-cache 16`": (1, {"grad_cache": 16}),
    "everything kept, 2 processes": (2, {}),
    "`--fsdp`, 2 processes": (2, {"fsdp": True}),
    "`--fsdp --recompute`, 2 processes": (2, {"fsdp": True, "recompute": True}),
}
TRANSFORMER = {
    "backbone": "timm/vit_tiny_patch16_224", "image_size": 64, "batch_size": 128, "support_set_size": 1024,
    "optimizer": "adamw", "learning_rate": 1e-4, "weight_decay": 0.1,
}  # fmt: skip


def settings_of(point: Point) -> dict[str, Any]:
    """Those of the small network's run."""
    return {
        "backbone": "small-convnet", "image_size": 32, "batch_size": point.batch, "support_set_size": point.entries,
        "shard_support_set": point.sharded,
    }  # fmt: skip


def job(settings: dict[str, Any], out: str) -> None:
    """One run on this process; prints its memory."""
    import torch

    import nnclr
    from nnclr.training import build, make_views, resolve  # noqa: F401 - imported before memory is looked at

    torch.set_num_threads(1)
    size, batch = settings["image_size"], settings["batch_size"]
    images = np.random.default_rng(0).integers(0, 256, (2048, size, size, 3), dtype=np.uint8)
    before = kib("VmRSS")
    steps = EVERY * LINES
    nnclr.pretrain(
        images, out, epochs=steps * batch / 2048, embedding_dim=DIM, projector_hidden_dim=256,
        predictor_hidden_dim=256, precision="fp32", device="cpu", num_workers=0, log_every_steps=EVERY,
        evaluate_every_epochs=0, checkpoint_every_steps=10**6, warmup_epochs=0, quiet=True, **settings,
    )  # fmt: skip
    print(json.dumps({"mib": (kib("VmHWM") - before) / 1024}))


def kib(name: str) -> int:
    """A line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def measure(settings: dict[str, Any], ranks: int) -> dict[str, float]:
    """Seconds a step, MiB of the largest process beside its libraries, and bytes sent by a process."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        started = []
        for rank in range(ranks):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            names = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | (names if ranks > 1 else {})
            command = [sys.executable, "-m", "benchmarks.scaling", "--job", f"{folder}/run", json.dumps(settings)]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit(f"{settings} with {ranks} processes failed")
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        file = sorted((Path(folder) / "run/checkpoints").iterdir())[-1] / "tensors.safetensors"
        with safe_open(file, "np") as tensors:
            names = [name for name in tensors.keys() if name.startswith("optimizer.")]  # noqa: SIM118 - not a dict
            weights = sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in names)
    seconds = [settings["batch_size"] / line["images_per_second"] for line in lines[1:]]
    return {
        "seconds": statistics.median(seconds),
        "highest": max(seconds),
        "mib": max(json.loads(text.splitlines()[-1])["mib"] for text in said),
        "weights": weights,
    }


def compared(point: Point, dim: int = DIM) -> float:
    """Products of numbers in the look-up of both views, on one process."""
    return 2.0 * point.batch * point.entries * dim / point.ranks


def sent(point: Point, weights: float, dim: int = DIM, gradient: int = 4) -> float:
    """Bytes that a process sends in a step: of a gathered tensor (W - 1) / W of the whole, of a sum twice that.

    Gathered are the embeddings of view 1 with their ids, which are enqueued, and the predictions of both views, whose
    gradients are summed, as those of the weights are. A sharded look-up gathers queries and the slots that won, and
    exchanges the candidates of each query, four numbers of 8 bytes, and the entries.
    """
    others = (point.ranks - 1) / point.ranks
    rows = 4.0 * dim * point.batch
    gathers = rows + 8 * point.batch + 2 * rows
    sums = 2 * (2 * rows + gradient * weights)
    lookup = 2 * (rows + 8 * point.batch + 32 * point.batch + rows) if point.sharded else 0.0
    return others * (gathers + sums + lookup)


def costs(point: Point, weights: float) -> list[float]:
    """What the four prices are paid for."""
    return [1.0, point.batch / point.ranks, compared(point), sent(point, weights)]


def held(entries: int, dim: int, ranks: int = 1) -> float:
    """Bytes of a support set on one process: float32 vectors, id and time of each."""
    return entries * (4 * dim + 16) / ranks


def fitted(record: dict) -> np.ndarray:
    """The prices, none below zero, that fit all points best in relative error."""
    from scipy.optimize import nnls

    rows = [(costs(Point(**point["point"]), point["weights"]), point["seconds"]) for point in record["points"]]
    matrix = np.array([cost for cost, _ in rows])
    seconds = np.array([second for _, second in rows])
    scale = matrix.max(axis=0)
    return nnls(matrix / scale / seconds[:, None], np.ones(len(rows)))[0] / scale


def page(record: dict) -> str:
    """The measured points beside the model, and the extrapolation."""
    prices = fitted(record)
    lines = [
        f"`python -m benchmarks.scaling` on {record['date']}, {record['machine']}: a small network at 32 px, "
        f"embeddings of width {DIM}, float32, one thread a process.",
        "",
        "    seconds a step = {:.4f} + {:.2e} B / W + {:.2e} (2 B m d / W) + {:.2e} bytes sent".format(*prices),
        "",
        "B images a batch, m entries of width d, W processes; prices by least squares over all points. On small sets "
        "the look-up compares in float32 and costs more than the model says.",
        "",
        "| batch | support set | processes | s a step | model | MiB a process | of these the set |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for found in record["points"]:
        point = Point(**found["point"])
        model = float(np.dot(prices, costs(point, found["weights"])))
        share = " (sharded)" if point.sharded else ""
        lines.append(
            f"| {point.batch} | {point.entries:,}{share} | {point.ranks} | {found['seconds']:.3f} | {model:.3f} | "
            f"{found['mib']:.0f} | {held(point.entries, DIM, point.ranks if point.sharded else 1) / 2**20:.0f} |"
        )
    ways = [*ways_to_save(record["ways"]), ""] if "ways" in record else []
    return "\n".join([*lines, "", *ways, *on_paper()])


def ways_to_save(found: dict[str, dict[str, float]]) -> list[str]:
    """Memory and time of each way, in absolute numbers and against that which keeps everything."""
    rows = []
    for name, (ranks, _) in WAYS.items():
        base = next(found[other] for other, (count, _) in WAYS.items() if count == ranks)
        one = found[name]
        rows.append(
            f"| {name} | {one['mib']:.0f} | {one['mib'] / base['mib']:.2f} | {one['seconds']:.2f} | "
            f"{one['seconds'] / base['seconds']:.2f} |"
        )
    weights = found["everything kept"]["weights"]
    return [
        "### Less memory",
        "",
        f"In the same run, vit_tiny_patch16_224 at {TRANSFORMER['image_size']} px, batch {TRANSFORMER['batch_size']}, "
        f"AdamW, with its heads {weights / 2 / 1e6:.1f} million parameters; against the first row with as many "
        "processes.",
        "",
        "| way | MiB a process | of that | s a step | times |",
        "|---|--:|--:|--:|--:|",
        *rows,
    ]


def on_paper() -> list[str]:
    """What the same formulas say of jobs that were never run."""
    weights, dim = 23.5e6 + 8.9e6 + 2.1e6, 256  # ResNet-50, the paper's projector and predictor
    rows = []
    for name, entries in (("98,304, the paper's", 98_304), ("10 million", 10_000_000), ("1 billion", 1_000_000_000)):
        point = Point(4096, entries, 64, entries > 98_304)
        ranks = 64 if point.sharded else 1
        rows.append(
            f"| {name}{', sharded' if point.sharded else ''} | {sent(point, weights, dim) / 2**20:.0f} MiB | "
            f"{compared(point, dim) * 2 / 1e12:.3g} TFLOP | {held(entries, dim, ranks) / 2**30:.3g} GiB | "
            f"{(8 * weights + held(entries, dim)) / 2**30:.3g} GiB |"
        )
    return [
        "### On paper: 64 GPUs, a billion images",
        "",
        "Computed by the formulas of [benchmarks/scaling.py](../benchmarks/scaling.py) and never run: ResNet-50, batch "
        "4,096, embeddings of width 256, 64 processes.",
        "",
        "| support set | sent by a process in a step | look-up of a process | set held by a process | a checkpoint |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        f"- Nearly all that is sent is the gradient, {2 * 4 * weights * 63 / 64 / 2**20:.0f} MiB; gathered embeddings "
        f"and predictions are {(sent(Point(4096, 98_304, 64), 0, dim)) / 2**20:.0f} MiB.",
        "- A set of a billion is saved as a whole: rank 0 needs memory for it, so that sets above some ten millions "
        "want machines with as much memory, or fewer entries.",
        f"- Embedding a billion images in float16: {1e9 * 2048 * 2 / 1e12:.1f} TB of 2,048 numbers each. At R images a "
        f"second and GPU 64 GPUs need {1e9 / 64 / 3600:,.0f} / R hours; every process writes its own parts.",
        f"- A list of a billion paths of 60 bytes takes {1e9 * (60 + 38) / 2**30:.0f} GiB in each process.",
        f"- An epoch of a billion images is {1e9 / 4096:,.0f} steps.",
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs=2)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.job:
        job(json.loads(options.job[1]), options.job[0])
        return
    if not options.page:
        points = []
        for point in POINTS:
            found = measure(settings_of(point), point.ranks)
            points.append({"point": vars(point), **found})
            print(point, found, flush=True)
        ways = {}
        for name, (ranks, settings) in WAYS.items():
            ways[name] = measure(TRANSFORMER | settings, ranks)
            print(name, ways[name], flush=True)
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        RECORD.write_text(
            json.dumps(
                {"date": str(datetime.now(UTC).date()), "machine": machine, "points": points, "ways": ways}, indent=1
            )
            + "\n"
        )
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    written = page(json.loads(RECORD.read_text())) if RECORD.exists() else "\n".join(on_paper())
    PAGE.write_text(f"{before}{BEGIN}\n{written}\n{END}{after}")


if __name__ == "__main__":
    main()
