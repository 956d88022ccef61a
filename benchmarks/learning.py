"""What is learned: pixels, the untrained network, SimCLR and NNCLR on the same heads and budget.

    python -m benchmarks.learning demo --seeds 0 1 2
    python -m benchmarks.learning methods --seeds 0 1 2
    python -m benchmarks.learning fashion-mnist --seeds 0 1 2
    python -m benchmarks.learning emoji --data emoji64.parquet --seeds 0

Runs go to runs/learning/ and are resumed if they are there; rows go to docs/results/NAME.json, and
docs/results.md is written from all of these.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import nnclr
from nnclr.config import make_config
from nnclr.data.source import open_source
from nnclr.encoder import Encoder
from nnclr.evaluation.knn import cross_group_recall, knn_accuracy
from nnclr.evaluation.linear import linear_accuracy
from nnclr.objectives import OBJECTIVES
from nnclr.pretrained import pixel_encoder
from nnclr.training import build, resolve

RESULTS = Path("docs/results")
MEASURES = {
    "demo": ("kNN", "linear"),
    "fashion-mnist": ("kNN", "linear"),
    "methods": ("kNN", "linear"),
    "emoji": ("group kNN", "subgroup kNN", "cross-family recall@1"),
}

PRESETS = {"methods": "demo"}  # where it has another name
SMALL_SWAV = {"prototypes": 100, "swav_queue_size": 512}  # 3000 prototypes are for a million images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASURES)
    parser.add_argument("--data", help="emoji: path of emoji64.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if options.name == "emoji" and options.data is None:
        parser.error("emoji needs --data")
    data, size = {
        "demo": ("demo-photos", 32),
        "methods": ("demo-photos", 32),
        "fashion-mnist": ("torchvision:fashion-mnist", 28),
        "emoji": (f"{options.data}?split=train&label=group", 32),
    }[options.name]
    measure = Emoji(options.data) if options.name == "emoji" else Labelled(data)
    rows = [row("raw pixels", None, measure(pixel_encoder(size).embed), 0.0)]
    for seed in options.seeds:
        fields = {"preset": PRESETS.get(options.name, options.name), "seed": seed}
        config = resolve(make_config(data, "unused", **fields), measure.train)
        untrained = Encoder(build(config, torch.device("cpu")).backbone, size)
        rows.append(row("untrained", seed, measure(untrained.embed), 0.0))
        for objective in OBJECTIVES if options.name == "methods" else ("simclr", "nnclr"):
            out = Path("runs/learning") / f"{options.name}-{objective}-{seed}"
            own = SMALL_SWAV if objective == "swav" else {}
            run = nnclr.pretrain(data, out, objective=objective, **fields, **own)
            values = measure(Encoder.from_pretrained(run.path).embed)
            rows.append(row(objective, seed, values, training_seconds(run.path)))
            save(options.name, rows, len(measure.train))
    render()


def row(method, seed, values, seconds):
    made = {"method": method, "seed": seed, "values": values, "train_seconds": round(seconds)}
    print(json.dumps(made), flush=True)
    return made


def training_seconds(run):
    """Seconds in training steps, summed from the run's log, so that a resumed run counts in full."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    images = np.diff([0, *(line["images"] for line in lines)])
    return float(sum(images / [line["images_per_second"] for line in lines]))


class Labelled:
    """kNN (k = 20, T = 0.07) and linear accuracy on the test images, learned from the training images."""

    def __init__(self, data):
        self.train, self.test = open_source(data), open_source(f"{data}?split=test")

    def __call__(self, embed):
        classes = len(self.train.class_names)
        split = (embed(self.train), self.train.labels, embed(self.test), self.test.labels, classes)
        return {"kNN": knn_accuracy(*split), "linear": linear_accuracy(*split).test_accuracy}


class Emoji:
    """kNN on concepts that were not seen, and whether a drawing finds another artist's drawing of its concept."""

    def __init__(self, path):
        import pyarrow.parquet as pq

        self.train = open_source(f"{path}?split=train&label=group")
        self.groups = [open_source(f"{path}?split={split}&label=group") for split in ("train", "test")]
        self.subgroups = [open_source(f"{path}?split={split}&label=subgroup") for split in ("train", "test")]
        table = pq.read_table(path, columns=["concept", "family", "split"]).to_pylist()
        self.concepts, self.families = (
            np.array([line[column] for line in table if line["split"] == "test"]) for column in ("concept", "family")
        )

    def __call__(self, embed):
        train, test = (embed(source) for source in self.groups)
        values = {}
        for name, (one, two) in (("group kNN", self.groups), ("subgroup kNN", self.subgroups)):
            names = sorted({*one.class_names, *two.class_names})
            labels = [np.array([names.index(s.class_names[label]) for label in s.labels]) for s in (one, two)]
            values[name] = knn_accuracy(train, labels[0], test, labels[1], len(names))
        values["cross-family recall@1"] = cross_group_recall(test, self.concepts, self.families)
        return values


def save(name, rows, images):
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "rows": rows,
        "images": images,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "preset": (Path(nnclr.__file__).parent / "presets" / f"{PRESETS.get(name, name)}.toml").read_text(),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def render():
    """Write docs/results.md from the records."""
    text = [
        "# What was learned\n",
        "Written by `python -m benchmarks.learning`; every figure is a line of a record in `docs/results/`.",
        "Test accuracy in %, mean over seeds, and in brackets the lowest and highest. Only the row `supervised` has",
        "learned from labels.",
    ]
    for name, measures in MEASURES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        text += [
            f"\n## {name}\n",
            f"`python -m benchmarks.learning {name}{' --data emoji64.parquet' if name == 'emoji' else ''}`",
        ]
        text += [f"on {record['machine']}, torch {record['torch']}, {record['date']}; {record['images']} images.\n"]
        text += ["| | seeds | " + " | ".join(measures) + " | training |", "|---" * (len(measures) + 3) + "|"]
        for method in dict.fromkeys(r["method"] for r in record["rows"]):
            rows = [r for r in record["rows"] if r["method"] == method]
            if rows:
                cells = [cell([r["values"][m] for r in rows]) for m in measures]
                minutes = statistics.mean(r["train_seconds"] for r in rows) / 60
                text.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + f" | {minutes:.1f} min |")
        text += ["\nThe preset:\n", "```toml", record["preset"].strip(), "```"]
    notes = RESULTS / "notes.md"
    text += ["\n" + notes.read_text().strip()] if notes.exists() else []
    Path("docs/results.md").write_text("\n".join(text) + "\n")


def cell(values):
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f}-{100 * max(values):.1f})"


if __name__ == "__main__":
    main()
