"""How many labels do I need? Accuracy against labels a class, for three ways to use them."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nnclr.data.images import Source
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.evaluation.finetune import batch_size_for, first_of_each, train_classifier
from nnclr.evaluation.linear import standardisation
from nnclr.evaluation.logistic import fit_logistic, logistic_scores
from nnclr.evaluation.metrics import half_width, top1
from nnclr.evaluation.result import wilson_interval
from nnclr.evaluation.task import Outcome, Task
from nnclr.pretrained import pixel_encoder, random_encoder

BUDGETS = (1, 2, 5, 10, 20, 50, 100)  # labels a class
_STEPS = 300  # of the network from scratch, at every budget
_RATE = 0.1  # its learning rate per 256 images
_PENALTY = 0.1  # L2 strength of the classifier on frozen features, times their width


def label_curve(task: Task, budgets: Sequence[int] = BUDGETS, repeats: int = 3, from_scratch: bool = True) -> Outcome:
    """Test accuracy of the encoder, of a supervised network from scratch and of pixels, by labels a class.

    The encoder and pixels are frozen: logistic regression on features that are standardised by all training images,
    with a fixed strength (a tenth of the width), because a handful of labels leaves none to choose it with. The
    network from scratch has the encoder's architecture and sees 300 batches with random crops and flips.

    Args:
        task: what is evaluated.
        budgets: labels a class; those that a class does not have are left out.
        repeats: draws of the labelled images; the interval is over them, and over the test images.
        from_scratch: also train the supervised network.

    Raises:
        InputError: if no class has as many images as the smallest budget.
    """
    source, scored = task.split()
    assert source.labels is not None
    smallest = int(np.bincount(source.labels)[np.unique(source.labels)].min())
    used = sorted({budget for budget in budgets if budget <= smallest})
    if not used:
        raise InputError(
            f"the smallest class of {source.name} has {smallest} images, fewer than {_labels(min(budgets))} a class"
        )
    if used != sorted(budgets):
        task.warn(f"the smallest class of {source.name} has {smallest} images: only {used} labels a class are tried")
    ways: dict[str, Callable[[np.ndarray, int], float]] = {
        "encoder": _frozen(task, source, scored),
        "pixels": _frozen(replace(task, encoder=_pixels(task.encoder), _known={}), source, scored),
    }
    backbone = task.encoder.provenance.get("backbone")
    if from_scratch and isinstance(backbone, str) and not backbone.startswith("module:"):
        ways["supervised"] = _from_scratch(task, backbone, source, scored)
    curve = []
    for budget in used:
        point: dict[str, Any] = {"labels_per_class": budget}
        for name, measure in ways.items():
            values = []
            for repeat in range(repeats):
                rows = first_of_each(source.labels, budget, task.seed + repeat)
                values.append(measure(rows, task.seed + repeat))
            point[name] = {"mean": statistics.mean(values), "values": values}
        curve.append(point)
        shown = ", ".join(f"{name} {100 * point[name]['mean']:.1f} %" for name in ways)
        task.say(f"{_labels(budget)} a class: {shown}")
    last, n_test = curve[-1]["encoder"], int(np.isfinite(task.embedded(scored)[:, 0]).sum())
    half = half_width(last["values"]) or 0.0
    low, high = wilson_interval(last["mean"], n_test)  # draws that agree say nothing about a small test set
    parameters = {
        "budgets": used,
        "repeats": repeats,
        "classifier": f"logistic regression, strength {_PENALTY} x width, standardised features",
        "supervised": f"{_STEPS} batches, learning rate {_RATE}, random crops and flips",
    }
    return Outcome(
        f"top-1 accuracy with {_labels(used[-1])} a class",
        last["mean"],
        (max(0.0, min(low, last["mean"] - half)), min(1.0, max(high, last["mean"] + half))),
        "the wider of: over draws of the labelled images, Student's t; over images of the test set, Wilson",
        parameters,
        source,
        scored,
        used[-1] * len(np.unique(source.labels)),
        n_test,
        {"curve": curve, "in_words": in_words(curve, 1 / len(np.unique(source.labels)))},
    )


def in_words(curve: list[dict[str, Any]], chance: float = 0.0) -> str:
    """From how many labels on a network from scratch, and pixels, do what the encoder does with the fewest.

    Args:
        curve: as in the result's details.
        chance: share of right answers of who guesses.
    """
    few, most = curve[0], curve[-1]
    n, target = few["labels_per_class"], few["encoder"]["mean"]
    last = most["labels_per_class"]
    sentences = [f"With {_labels(n)} a class the encoder is right in {100 * target:.0f} %."]
    if target <= 1.1 * chance:  # what others need for that says nothing
        sentences = [sentences[0].replace(" %.", f" %, and guessing in {100 * chance:.0f} %.")]
    for name, title in (
        ("supervised", "A network trained from scratch"),
        ("pixels", "A classifier of pixels"),
    ):
        if name in few and target > 1.1 * chance:
            reached = [p["labels_per_class"] for p in curve if p[name]["mean"] >= target]
            sentences.append(f"{title} needs {reached[0] if reached else f'more than {last}'} for that.")
        if name in few and most[name]["mean"] > most["encoder"]["mean"]:
            theirs, ours = (f"{100 * most[who]['mean']:.0f} %" for who in (name, "encoder"))
            sentences.append(f"With {last} {title[0].lower()}{title[1:]} is right in {theirs}, the encoder in {ours}.")
    return " ".join(sentences)


def _labels(count: int) -> str:
    return f"{count} label{'s' if count > 1 else ''}"


def _pixels(encoder: Encoder) -> Encoder:
    return pixel_encoder(min(encoder.image_size, 32))


def _frozen(task: Task, source: Source, scored: Source) -> Callable[[np.ndarray, int], float]:
    """Accuracy of a classifier on frozen features that learns from some rows."""
    assert source.labels is not None
    train, labels = task.embedded(source), source.labels
    test, test_labels = task.features(scored)
    readable = np.isfinite(train[:, 0])
    known = train if readable.all() else train[readable]
    mean, std = (part.numpy() for part in standardisation(torch.from_numpy(known)))
    test = (test - mean) / std

    def measure(rows: np.ndarray, seed: int) -> float:
        rows = rows[readable[rows]]
        width = train.shape[1]
        features = (train[rows] - mean) / std
        weights = fit_logistic(features, labels[rows], len(source.class_names or ()), _PENALTY * width)
        return top1(logistic_scores(weights, test).argmax(dim=1).numpy(), test_labels)

    return measure


def _from_scratch(task: Task, backbone: str, source: Source, scored: Source) -> Callable[[np.ndarray, int], float]:
    """Accuracy of a network that is trained on some rows from random weights."""
    assert source.labels is not None
    assert scored.labels is not None
    test_labels = scored.labels

    def measure(rows: np.ndarray, seed: int) -> float:
        untrained = random_encoder(backbone, task.encoder.image_size, seed)
        untrained.module.to(task.encoder.device)
        per_epoch = max(1, len(rows) // batch_size_for(len(rows)))

        def say(text: str) -> None:
            task.say(f"from scratch with {len(rows)} labels, draw {seed - task.seed + 1}: {text}")

        here = replace(task, encoder=untrained, seed=seed, say=say, _known={})
        trained = train_classifier(
            here, source.subset(rows), len(source.class_names or ()), _RATE, math.ceil(_STEPS / per_epoch)
        )
        scores = trained.embed(scored, num_workers=task.num_workers)
        readable = np.isfinite(scores[:, 0])
        return top1(scores[readable].argmax(axis=1), test_labels[readable])

    return measure
