"""Fine-tuning of the whole network on all or few labels (paper, section 4.2, "semi-supervised learning").

SGD with Nesterov momentum, cosine to 0, random crops and flips; the learning rate is chosen on a part of the labelled
images that the candidates do not see, and the chosen one is trained again on all of them.
"""

import copy
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr import counter
from nnclr.data.images import Source
from nnclr.data.loader import Plan, create_loader
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.evaluation.metrics import mean_per_class, top1_of_scores
from nnclr.evaluation.result import WILSON, wilson_interval
from nnclr.evaluation.task import Outcome, Task, balanced_share, crop_and_flip, renormalised
from nnclr.models.backbone import feature_dim
from nnclr.progress import duration

LEARNING_RATES = (0.02, 0.1, 0.5)  # per 256 images
_SIMCLR_LISTS = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/"
_LISTS = {"simclr-1percent": f"{_SIMCLR_LISTS}1percent.txt", "simclr-10percent": f"{_SIMCLR_LISTS}10percent.txt"}
Score = Callable[[np.ndarray, np.ndarray], float]  # (n, c) scores and targets to a value in [0, 1]


def finetune(
    task: Task,
    fraction: float | None = None,
    subset: str | None = None,
    epochs: int | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Outcome:
    """Top-1 accuracy on the test images of the network fine-tuned on a share of the labels.

    Args:
        task: what is evaluated.
        fraction: share of each class, seeded, at least one image; smaller shares are part of larger ones; default 1.
        subset: instead of a fraction: a file or https address of a list of image names, one a line, or
            `simclr-1percent` or `simclr-10percent` for SimCLR's lists of ImageNet.
        epochs: passes over the labelled images; default 60 up to 2 % of the labels and 30 above, as published.
        learning_rates: candidates, per 256 images.

    Raises:
        InputError: if the fraction is not in (0, 1], the list cannot be had, or names images that are not there.
    """
    if fraction is not None and subset is not None:
        raise InputError("fraction and subset exclude each other: the list says which images are learned from")
    fraction = 1.0 if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise InputError(f"fraction={fraction} must be above 0 and at most 1")
    source, scored = task.split()
    assert source.labels is not None
    if subset is not None:
        rows = listed_rows(source, read_list(subset))
        fraction = len(rows) / len(source)
    else:
        rows = balanced_rows(source.labels, fraction, task.seed)
    rows = task.readable_rows(source, rows)
    labelled = source.subset(rows) if len(rows) < len(source) else source
    epochs = (60 if fraction <= 0.02 else 30) if epochs is None else epochs
    task.readable(scored)  # before anything is trained
    held_out = balanced_share(source.labels[rows], 0.2, task.seed)
    scores, parameters = choose_and_train(
        task, labelled, held_out, scored, len(source.class_names or ()), top1_of_scores, epochs, learning_rates
    )
    task.warn_of_edge(parameters["validation"])
    readable = np.isfinite(scores[:, 0])
    assert scored.labels is not None
    labels = scored.labels[readable]
    value = top1_of_scores(scores[readable], labels)
    parameters = {"fraction": fraction, "subset": subset, **parameters}
    details = {"mean_per_class": mean_per_class(scores[readable].argmax(axis=1), labels)}
    interval = wilson_interval(value, len(labels))
    return Outcome(
        "top-1 accuracy", value, interval, WILSON, parameters, labelled, scored, len(labelled), len(labels), details
    )


def choose_and_train(
    task: Task,
    source: Source,
    held_out: np.ndarray,
    scored: Source,
    num_classes: int,
    score: Score,
    epochs: int,
    learning_rates: Sequence[float],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Choose a learning rate on the held-out rows, train with it on all rows, and score other images.

    Args:
        task: for the encoder, which is copied, and the seed.
        source: labelled images.
        held_out: (n,) bool, rows that choose; where there is none the middle rate is taken.
        scored: images to be scored.
        num_classes: c.
        score: what the rate is chosen by.
        epochs: passes over the labelled images.
        learning_rates: candidates, per 256 images.

    Returns:
        Scores (m, c) of the other images, NaN where one cannot be read, and the parameters.
    """
    rates = sorted(float(rate) for rate in learning_rates)
    chosen, found = rates[len(rates) // 2], {}
    if len(rates) > 1 and held_out.any():
        rest, validation = source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))
        targets = targets_of(validation)
        for rate in rates:
            trained = train_classifier(task, rest, num_classes, rate, epochs)
            scores = trained.embed(validation, num_workers=task.num_workers)
            readable = np.isfinite(scores[:, 0])
            found[rate] = score(scores[readable], targets[readable]) if readable.any() else 0.0
            task.say(f"fine-tuning with learning rate {rate:g}: {100 * found[rate]:.1f} % on the hold-out")
        chosen = max(rates, key=lambda rate: found[rate])
    final = train_classifier(task, source, num_classes, chosen, epochs)
    parameters = {
        "trained": "the whole network",
        "optimizer": "SGD Nesterov 0.9, weight decay 0, cosine",
        "augmentation": "random crops and flips",
        "epochs": epochs,
        "batch_size": batch_size_for(len(source)),
        "learning_rates": rates,
        "learning_rate": chosen,
        "validation": {f"{rate:g}": value for rate, value in found.items()},
    }
    return final.embed(scored, num_workers=task.num_workers), parameters


def batch_size_for(images: int) -> int:
    """256, but at most a tenth of the images, so that an epoch has ten steps, and at least 16."""
    return min(images, max(16, min(256, images // 10)))


def train_classifier(task: Task, source: Source, num_classes: int, learning_rate: float, epochs: int) -> Encoder:
    """A copy of the encoder with a linear layer on top, trained as a whole; its `embed` gives logits.

    Args:
        task: for the encoder, the seed, and where to say how far it is.
        source: labelled images: softmax cross entropy over labels, or a binary one for each class of multilabels.
        num_classes: c.
        learning_rate: peak, per 256 images.
        epochs: passes over the images.

    Raises:
        InputError: if there are fewer than two images.
    """
    if len(source) < 2:
        raise InputError(f"{source.name} has {len(source)} labelled images to train on; fine-tuning needs two")
    encoder = task.encoder
    width = feature_dim(encoder.module, encoder.image_size)
    # What the network draws, such as dropout masks, comes from the seed, and leaves the caller's numbers alone.
    with torch.random.fork_rng([encoder.device] if encoder.device.type == "cuda" else []):
        torch.manual_seed(task.seed)
        head = nn.Linear(width, num_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        module = nn.Sequential(copy.deepcopy(encoder.module), head.to(encoder.device)).train()
        module.requires_grad_(True)
        batch_size = batch_size_for(len(source))
        plan = Plan(len(source), batch_size, (crop_and_flip(encoder.image_size),), task.seed)
        total = epochs * plan.steps_per_epoch
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, nesterov=True)
        targets = torch.from_numpy(targets_of(source)).to(encoder.device)
        began = said = time.perf_counter()
        for batch in create_loader(source, plan, encoder.device, task.num_workers).batches(0, total):
            rate = 0.5 * learning_rate * batch_size / 256 * (1 + np.cos(np.pi * batch.step / total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(module(renormalised(batch.views[0], encoder)), targets[batch.ids])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)  # a rate that is far too high must not end in NaN
            optimizer.step()
            now = time.perf_counter()
            if now - said > 10:
                left = duration((now - began) * (total - batch.step - 1) / (batch.step + 1))
                step = f"step {batch.step + 1} of {total}, {left} left"
                task.say(f"fine-tuning with learning rate {learning_rate:g}: {step}")
                said = now
    return Encoder(module.eval(), encoder.image_size, encoder.mean, encoder.std, crop_pct=encoder.crop_pct)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets)
    counted = targets >= 0
    each = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0).float(), reduction="none")
    return (each * counted).sum() / counted.sum().clamp(min=1) * logits.shape[1]


def targets_of(source: Source) -> np.ndarray:
    """Labels (n,) int64, or (n, c) int8 where there are several an image."""
    targets = source.labels if source.multilabels is None else source.multilabels
    assert targets is not None
    return targets


def balanced_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted rows: a seeded share of each class, at least one; a smaller share is part of a larger one."""
    return first_of_each(labels, lambda n: max(1, round(fraction * n)), seed)


def first_of_each(labels: np.ndarray, count: int | Callable[[int], int], seed: int) -> np.ndarray:
    """Sorted rows: the first `count`, or count(n) of a class of n rows, of each class, in a seeded order."""
    rank = counter.bits(seed, -6, np.arange(len(labels)))
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(
        np.concatenate(
            [
                rows[np.argsort(rank[rows], kind="stable")[: count if isinstance(count, int) else count(len(rows))]]
                for rows in by_class
            ]
        )
    )


def read_list(subset: str) -> list[str]:
    """Image names of a file, an https address, or one of SimCLR's lists by name.

    Raises:
        InputError: if it cannot be read, or is empty.
    """
    address = _LISTS.get(subset, subset)
    try:
        if address.startswith("https://"):
            with urllib.request.urlopen(address, timeout=30) as answer:
                text = answer.read(100 * 10**6).decode()
        else:
            text = Path(address).read_text()
    except (OSError, ValueError) as error:
        hint = f"; save it from {address} and name the file" if address.startswith("https://") else ""
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or str(reason)[:120]
        raise InputError(f"the list {subset} cannot be read: {reason}{hint}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise InputError(f"the list {subset} names no image")
    return names


def listed_rows(source: Source, names: Sequence[str]) -> np.ndarray:
    """Sorted rows of the images that are listed by path, or by file name alone where no two images share it.

    Raises:
        InputError: if some are not there, or a name is that of several images.
    """
    paths: dict[str, list[int]] = {}
    files: dict[str, list[int]] = {}
    for i in range(len(source)):
        path = source.describe(i)
        paths.setdefault(path, []).append(i)
        files.setdefault(os.path.basename(path), []).append(i)
    found = {name: paths.get(name) or files.get(name, []) for name in names}
    missing = [name for name, rows in found.items() if not rows]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} listed images are not among the {len(source)} of {source.name} that are "
            f"learned from, first {missing[0]}"
        )
    several = [name for name, rows in found.items() if len(rows) > 1]
    if several:
        raise InputError(
            f"'{several[0]}' is the name of several images of {source.name}; list them with their folders, or "
            "give each a name of its own"
        )
    return np.unique([rows[0] for rows in found.values()])
