"""Transfer to twelve data sets (paper, table 4): logistic regression on frozen features, or fine-tuning."""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.data.images import Source, joined
from nnclr.data.transfer_sets import TRANSFER_SETS, Splits, TransferSet, download_transfer_set, open_transfer_set
from nnclr.errors import InputError
from nnclr.evaluation.finetune import LEARNING_RATES, choose_and_train, targets_of
from nnclr.evaluation.logistic import STRENGTHS, logistic_regression
from nnclr.evaluation.metrics import bootstrap_interval, map_11, mean_per_class, top1_of_scores
from nnclr.evaluation.result import BOOTSTRAP, WILSON, wilson_interval
from nnclr.evaluation.task import Outcome, Task

# As leaderboards list them for NNCLR, measured by others and by fine-tuning as far as one can tell.
LISTED_FINETUNED = {"food101": {"NNCLR": 85.5}, "cifar100": {"NNCLR": 84.7}, "dtd": {"NNCLR": 79.2}}
METHODS = ("NNCLR", "BYOL", "SimCLR", "supervised")


def transfer(
    task: Task,
    by: str = "logistic",
    sets: Sequence[str] | None = None,
    download: bool = False,
    epochs: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> Outcome:
    """The average over the data sets that are there of each one's own metric; `details` has a row for each.

    Images are resized to the encoder's size by the shorter side and cut in the centre. Hyper-parameters are chosen
    on the validation split; training and validation images together make the classifier that is scored.

    Args:
        task: `data` is the folder that holds the data sets.
        by: `logistic`, logistic regression on frozen features over the strengths; or `finetune`, the whole network.
        sets: keys of the data sets; default all twelve.
        download: fetch through torchvision what is not there.
        epochs: passes over the training images (finetune); default 30.
        strengths: L2 strengths (logistic).

    Raises:
        InputError: if the folder does not exist, a key is unknown, or none of the data sets is there.
    """
    root, keys = Path(str(task.data)), _checked(task, by, sets, download, epochs)
    epochs = 30 if epochs is None else epochs
    rows, missing, opened = [], {}, []
    for key in keys:
        splits, reason = _opened(key, root, task, download)
        if splits is None:
            missing[key] = reason
            task.warn(f"{TRANSFER_SETS[key].title} is missing and skipped: {reason}")
        else:
            opened.append((TRANSFER_SETS[key], splits))
    if not opened:
        raise InputError(f"none of {', '.join(keys)} is in {root}; docs/evaluation.md shows the folders that are read")
    here = replace(task, encoder=replace(task.encoder, crop_pct=1.0), _known={})
    for known, splits in opened:
        if by == "logistic":
            rows.append(_by_logistic(here, known, splits, strengths))
        else:
            rows.append(_by_finetuning(here, known, splits, epochs))
        task.say(f"{known.title}: {known.metric} {100 * rows[-1]['value']:.1f} %")
    value = float(np.mean([row["value"] for row in rows]))
    parameters = {
        "by": by,
        "sets": [row["set"] for row in rows],
        "resize": "shorter side to the image size, centre crop",
        **({"epochs": epochs} if by == "finetune" else {"strengths": list(strengths)}),
    }
    all_train, all_test = (
        _summary(str(root), [getattr(splits, part) for _, splits in opened]) for part in ("train", "test")
    )
    return Outcome(
        f"mean of {len(rows)} of {len(TRANSFER_SETS)} data sets' metrics",
        value,
        None,
        "none of the mean; see each data set",
        parameters,
        all_train,
        all_test,
        sum(row["n_train"] for row in rows),
        sum(row["n_test"] for row in rows),
        {"sets": rows, "missing": missing},
    )


def _checked(task: Task, by: str, sets: Sequence[str] | None, download: bool, epochs: int | None) -> tuple[str, ...]:
    """The keys of the data sets, if everything goes together."""
    keys = tuple(TRANSFER_SETS) if sets is None else (sets,) if isinstance(sets, str) else tuple(sets)
    if by not in ("logistic", "finetune"):
        raise InputError(f"by='{by}' is neither logistic nor finetune")
    for key in keys:
        if key not in TRANSFER_SETS:
            near = difflib.get_close_matches(key, TRANSFER_SETS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no transfer data set is called '{key}'; {hint}there are {', '.join(TRANSFER_SETS)}")
    if task.test is not None:
        raise InputError("transfer scores each data set's own test images; leave the test images out")
    if by == "logistic" and epochs is not None:
        raise InputError("epochs belongs to transfer by finetune; logistic regression has none")
    if not Path(str(task.data)).is_dir() and not download:
        raise InputError(
            f"{task.data} is no folder; name the one that holds the transfer data sets, or give --download"
        )
    return keys


def _opened(key: str, root: Path, task: Task, download: bool) -> tuple[Splits | None, str]:
    """The splits, or None and why they are not there."""
    splits = open_transfer_set(key, root, task.seed)
    if splits is None and download:
        task.say(f"downloading {TRANSFER_SETS[key].title}")
        try:
            download_transfer_set(key, root)
        except InputError as error:
            return None, str(error)
        splits = open_transfer_set(key, root, task.seed)
    return splits, TRANSFER_SETS[key].how.replace("ROOT", str(root))


def _by_logistic(task: Task, known: TransferSet, splits: Splits, strengths: Sequence[float]) -> dict[str, Any]:
    (train, y), (val, val_y), (test, test_y) = (task.features(s) for s in (splits.train, splits.val, splits.test))
    outcome = logistic_regression(
        train, y, val, val_y, test, _classes(splits.train), score_of(known.metric), strengths=tuple(strengths)
    )
    chosen = {"strength": outcome.strength, "validation": max(value for _, value in outcome.validation)}
    return _row(task, known, splits, outcome.scores, test_y, len(train) + len(val), chosen, "logistic")


def _by_finetuning(task: Task, known: TransferSet, splits: Splits, epochs: int) -> dict[str, Any]:
    source = joined(splits.train, splits.val)
    held_out = np.arange(len(source)) >= len(splits.train)
    scores, parameters = choose_and_train(
        task,
        source,
        held_out,
        splits.test,
        _classes(splits.train),
        score_of(known.metric),
        epochs,
        LEARNING_RATES,
    )
    readable = np.isfinite(scores[:, 0])
    chosen = {name: parameters[name] for name in ("learning_rate", "batch_size", "validation")}
    return _row(
        task, known, splits, scores[readable], targets_of(splits.test)[readable], len(source), chosen, "finetune"
    )


def score_of(metric: str) -> Any:
    """(scores (n, c), targets) -> value in [0, 1], of a metric's name in `TRANSFER_SETS`."""
    return {
        "top-1 accuracy": top1_of_scores,
        "mean per-class accuracy": lambda scores, labels: mean_per_class(scores.argmax(axis=1), labels),
        "11-point mAP": map_11,
    }[metric]


def _row(
    task: Task,
    known: TransferSet,
    splits: Splits,
    scores: np.ndarray,
    targets: np.ndarray,
    n_train: int,
    chosen: dict[str, Any],
    by: str,
) -> dict[str, Any]:
    value = score_of(known.metric)(scores, targets)
    method = BOOTSTRAP
    if known.metric == "top-1 accuracy":
        low, high = wilson_interval(value, len(targets))
        method = WILSON
    elif known.metric == "11-point mAP":
        low, high = bootstrap_interval(map_11, scores, targets, seed=task.seed, draws=200)
    else:
        low, high = bootstrap_interval(mean_per_class, scores.argmax(axis=1), targets, seed=task.seed)
    return {
        "set": known.key,
        "title": known.title,
        "metric": known.metric,
        "value": value,
        "interval": [low, high],
        "interval_method": method,
        "n_train": n_train,
        "n_test": len(targets),
        "chosen": chosen,
        "data_fingerprint": splits.train.fingerprint,
        "test_fingerprint": splits.test.fingerprint,
        "published": known.published if by == "logistic" else LISTED_FINETUNED.get(known.key, {}),
    }


def _classes(source: Source) -> int:
    return len(source.class_names or ())


def _summary(name: str, sources: list[Source]) -> Source:
    """What stands for several data sets in the record: their names and fingerprints."""
    digest = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()
    return replace(sources[0], name=name, length=sum(map(len, sources)), fingerprint=digest)


def table(details: dict[str, Any], name: str) -> str:
    """The rows as Markdown; figures of other columns are the papers', measured by others."""
    lines = [
        f"| data set | metric | {name} | 95 % | {' | '.join(f'{m} (theirs)' for m in METHODS)} | test images |",
        "|---" * (5 + len(METHODS)) + "|",
    ]
    for row in details["sets"]:
        theirs = " | ".join(f"{row['published'][m]:.1f}" if m in row["published"] else "" for m in METHODS)
        low, high = (f"{100 * v:.1f}" for v in row["interval"])
        ours = f"{row['metric']} | {100 * row['value']:.1f} | {low}-{high}"
        lines.append(f"| {row['title']} | {ours} | {theirs} | {row['n_test']} |")
    mean = np.mean([row["value"] for row in details["sets"]])
    lines.append(f"| mean of {len(details['sets'])} | | {100 * mean:.1f} | | {' | ' * len(METHODS)}|")
    lines += [f"\nNot there: {TRANSFER_SETS[key].title}: {why}" for key, why in details["missing"].items()]
    return "\n".join(lines)
