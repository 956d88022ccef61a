"""Every protocol on small sets: NNCLR, SimCLR, supervised training, the untrained network and raw pixels.

    python -m benchmarks.protocols demo
    python -m benchmarks.protocols fashion-mnist
    python -m benchmarks.protocols emoji --data emoji64.parquet        (benchmarks/emoji.py builds it)

Runs go to runs/learning/, where `benchmarks.learning` also looks, and are resumed if they are there. Result lines go
to docs/results/protocols/NAME.jsonl; a line that is there is not measured again. docs/results/protocols/README.md is
written from all of them. Transfer is not among them: its twelve data sets are not at hand.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

import nnclr
from nnclr.evaluation.result import append
from nnclr.plots import draw_label_curve
from nnclr.pretrained import open_encoder, pixel_encoder, random_encoder

RESULTS = Path("docs/results/protocols")
TRAINED = ("nnclr", "simclr", "supervised")
WHO = (*TRAINED, "untrained", "pixels")
SETS = {"demo": ("demo-photos", 32), "fashion-mnist": ("torchvision:fashion-mnist", 28), "emoji": (None, 32)}
EPOCHS = {"emoji": 20.0}  # of the 60 of the preset
PROTOCOLS = {  # title -> protocol and its parameters
    "kNN": ("knn", {"k": (20, 200), "temperature": (0.07, 0.2)}),
    "linear": ("linear", {}),
    "linear, augmented": ("linear", {"augmentation": True, "epochs": 5}),
    "logistic": ("logistic", {}),
    "fine-tuned, 1 % of the labels": ("finetune", {"fraction": 0.01}),
    "fine-tuned, 10 % of the labels": ("finetune", {"fraction": 0.1}),
    "retrieval, recall@1": ("retrieval", {}),
    "few-shot, 10 a class": ("few-shot", {}),
    "label curve, most labels": ("label-curve", {"budgets": (1, 5, 20, 100), "from_scratch": False}),
    "RankMe share": ("label-free", {}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--data", help="emoji: path of emoji64.parquet")
    parser.add_argument("--who", nargs="+", default=WHO, help="some of the encoders only")
    options = parser.parse_args()
    data, size = SETS[options.name]
    if options.name == "emoji":
        if options.data is None:
            parser.error("emoji needs --data")
        data = f"{options.data}?split=train&label=group"
        test = f"{options.data}?split=test&label=group"
    else:
        test = f"{data}?split=test"
    file = RESULTS / f"{options.name}.jsonl"
    RESULTS.mkdir(parents=True, exist_ok=True)
    known = {(line["who"], line["title"]) for line in read(file)}
    for who in options.who:
        encoder = opened(who, options.name, data, size)
        for title, (protocol, parameters) in PROTOCOLS.items():
            parameters = dict(parameters)
            if (who, title) in known or (who == "pixels" and protocol == "finetune"):
                continue
            if who == "pixels" and parameters.get("augmentation"):
                continue
            if protocol == "label-curve" and who == "nnclr":
                parameters["from_scratch"] = True
            scored = None if protocol == "label-free" else test
            result = nnclr.evaluate(encoder, data, scored, protocol=protocol, say=print, **parameters)
            print(result.in_words(), flush=True)
            append(Titled(who, title, result), file)
    render()


class Titled:
    """A result line with the row and the column that it belongs to."""

    def __init__(self, who, title, result):
        self.line = {"who": who, "title": title, **json.loads(result.to_json())}
        for name in ("data", "test", "encoder_name"):
            self.line[name] = self.line[name].rpartition("/")[2]  # no path of the machine

    def to_json(self):
        return json.dumps(self.line)


def opened(who, name, data, size):
    if who == "pixels":
        return pixel_encoder(size)
    if who == "untrained":
        return random_encoder("small-convnet", size)
    shorter = {"epochs": EPOCHS[name]} if name in EPOCHS else {}
    out = Path("runs/learning") / f"{name}-{who}-0{'-short' if shorter else ''}"
    run = nnclr.pretrain(data, out, objective=who, preset=name, **shorter)
    return open_encoder(str(run.path))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def render():
    """Write the page from the records."""
    text = [
        "# Every protocol on small sets\n",
        "Written by `python -m benchmarks.protocols`. Values in %, with 95 % intervals; one run a method, seed 0,",
        "and the presets of [results.md](../../results.md), emoji for 20 of its 60 epochs. Each line of the `.jsonl`",
        "files holds the whole protocol.",
        f"Measured on one thread of a {platform.machine()} CPU with torch {torch.__version__}.",
    ]
    for name in SETS:
        lines = read(RESULTS / f"{name}.jsonl")
        if not lines:
            continue
        whos = [who for who in WHO if any(line["who"] == who for line in lines)]
        cells = {(line["title"], line["who"]): cell(line) for line in lines}
        text += [f"\n## {name}\n", f"| | {' | '.join(whos)} |", "|---" * (len(whos) + 1) + "|"]
        text += [f"| {t} | {' | '.join(cells.get((t, who), '') for who in whos)} |" for t in PROTOCOLS]
        text += label_free(lines, whos) + curve(lines, whos, name)
    notes = RESULTS / "notes.md"
    text += ["\n" + notes.read_text().strip()] if notes.exists() else []
    (RESULTS / "README.md").write_text("\n".join(text) + "\n")


def cell(line):
    spread = "" if line["interval"] is None else " ({:.1f}-{:.1f})".format(*(100 * v for v in line["interval"]))
    return f"{100 * line['value']:.1f}{spread}"


def label_free(lines, whos):
    """The measures that need no labels."""
    found = {line["who"]: line["details"] for line in lines if line["title"] == "RankMe share"}
    names = [n for n in next(iter(found.values()), {}) if n not in ("rank_me_share", "features")]
    text = ["\nWithout labels:\n", f"| | {' | '.join(whos)} |", "|---" * (len(whos) + 1) + "|"]
    for name in names:
        shown = (f"{found[w][name]:.3g}" if name in found.get(w, {}) else "" for w in whos)
        text.append(f"| {name} | {' | '.join(shown)} |")
    return text


def curve(lines, whos, name):
    """Accuracy by labels a class, and the picture of NNCLR's curve."""
    found = {line["who"]: line["details"]["curve"] for line in lines if line["protocol"] == "label-curve"}
    if not found:
        return []
    rows = {
        who: {point["labels_per_class"]: point["encoder"]["mean"] for point in points} for who, points in found.items()
    }
    first = found.get("nnclr", [{}])
    if "supervised" in first[0]:
        rows["supervised from scratch"] = {p["labels_per_class"]: p["supervised"]["mean"] for p in first}
        draw_label_curve(RESULTS / f"{name}-label-curve.png", first)
    budgets = sorted({budget for row in rows.values() for budget in row})
    text = ["\nBy labels a class, mean of three draws:\n", f"| | {' | '.join(map(str, budgets))} |"]
    text.append("|---" * (len(budgets) + 1) + "|")
    for who, row in rows.items():
        text.append(f"| {who} | {' | '.join(f'{100 * row[b]:.1f}' if b in row else '' for b in budgets)} |")
    picture = f"\n![accuracy by labels a class]({name}-label-curve.png)"
    return text + ([picture] if (RESULTS / f"{name}-label-curve.png").exists() else [])


if __name__ == "__main__":
    main()
