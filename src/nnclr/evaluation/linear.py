"""Linear classification of frozen features (paper, section 4.2), with and without augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.data.images import Source
from nnclr.data.loader import Plan, create_loader
from nnclr.errors import InputError
from nnclr.evaluation.metrics import mean_per_class, top1
from nnclr.evaluation.result import WILSON, wilson_interval
from nnclr.evaluation.task import Outcome, Task, balanced_share, crop_and_flip, renormalised
from nnclr.finite import as_rows, class_indices, refuse_not_finite

_BATCH, _VALIDATION = 256, 0.1  # images a step with augmentation; share of each class that chooses the rate
LEARNING_RATES = tuple(10.0**e for e in np.arange(-2.5, 1.01, 0.5).tolist())
_BLOCK = 2048  # rows that are standardised or scored at a time


@dataclass(frozen=True)
class LinearOutcome:
    """What `linear_accuracy` found."""

    test_accuracy: float
    mean_per_class: float  # on the test images too
    validation_accuracy: float
    learning_rate: float
    protocol: dict[str, Any]


def linear(
    task: Task, augmentation: bool = False, epochs: int = 80, learning_rates: Sequence[float] = LEARNING_RATES
) -> Outcome:
    """Accuracy of a linear classifier on the test images.

    Args:
        task: what is evaluated.
        augmentation: train on random crops and flips, embedded anew in every epoch, instead of on the features of
            the evaluation view.
        epochs: passes over the training images.
        learning_rates: candidates.

    Raises:
        InputError: if there is nothing to validate on, because every class has one image.
    """
    source, scored = task.split()
    (train, labels), (test, test_labels) = task.features(source), task.features(scored)
    classes, rates = len(source.class_names or ()), tuple(learning_rates)
    if np.bincount(labels).max() < 2:
        raise InputError(f"every class of {source.name} has one image; a linear classifier is chosen on a second one")
    if augmentation:
        outcome = _augmented(task, source, train, test, test_labels, classes, epochs, rates)
    else:
        outcome = linear_accuracy(
            train, labels, test, test_labels, classes, epochs=epochs, learning_rates=rates, seed=task.seed
        )
    task.warn_of_edge(outcome.protocol["validation"])
    value = outcome.test_accuracy
    interval = wilson_interval(value, len(test))
    details = {"mean_per_class": outcome.mean_per_class}
    return Outcome(
        "top-1 accuracy", value, interval, WILSON, outcome.protocol, source, scored, len(train), len(test), details
    )


def linear_accuracy(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    test_labels: Any,
    num_classes: int,
    *,
    epochs: int = 80,
    batch_size: int = 1024,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    validation_fraction: float = _VALIDATION,
    seed: int = 0,
) -> LinearOutcome:
    """Train linear classifiers with many learning rates at once, choose one, train it anew on everything.

    SGD with Nesterov momentum 0.9, no weight decay, cosine to 0. Features are standardised by the training
    set's mean and standard deviation. The rate is chosen on a class-balanced validation split of the training
    set; the chosen one is trained again on all of it, and that classifier is scored on the test set.

    Args:
        train_features: (m, d) float32, may be memory-mapped: no copy of it is made.
        train_labels: (m,) whole numbers below num_classes.
        test_features: (n, d).
        test_labels: (n,).
        num_classes: c.
        epochs: passes over the training rows.
        batch_size: rows a step.
        learning_rates: candidates, all trained in one pass.
        validation_fraction: share of each class that chooses the rate.
        seed: of the split and the order.

    Raises:
        InputError: if a feature is not finite, or labels do not fit.
    """
    train, test = as_rows(train_features), as_rows(test_features)
    labels = class_indices(train_labels, len(train), num_classes)
    test_labels = class_indices(test_labels, len(test), num_classes).numpy()
    for name, features in (("training", train), ("test", test)):
        refuse_not_finite(features, f"the {name} features")
    scale = standardisation(train)
    held_out = torch.from_numpy(balanced_share(labels.numpy(), validation_fraction, seed))
    rows, held_rows = torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
    weights = _fit(train, labels, num_classes, learning_rates, epochs, batch_size, seed, rows, scale)
    accuracies = _accuracies(_predictions(weights, train, scale, held_rows), labels[held_rows])
    best = int(accuracies.argmax())
    final = _fit(train, labels, num_classes, (learning_rates[best],), epochs, batch_size, seed, None, scale)
    predicted = _predictions(final, test, scale)[:, 0].numpy()
    protocol = {
        **_described("none", epochs, batch_size, learning_rates),
        **_choice(learning_rates, accuracies, validation_fraction),
    }
    return _outcome(predicted, test_labels, float(accuracies[best]), learning_rates[best], protocol)


def _outcome(
    predicted: np.ndarray, labels: np.ndarray, validation: float, rate: float, protocol: dict[str, Any]
) -> LinearOutcome:
    return LinearOutcome(top1(predicted, labels), mean_per_class(predicted, labels), validation, rate, protocol)


def _augmented(
    task: Task,
    source: Source,
    train: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    epochs: int,
    learning_rates: tuple[float, ...],
) -> LinearOutcome:
    """As `linear_accuracy`, on random crops and flips: the images pass through the encoder once an epoch.

    Two sets of classifiers see the same batches. The first leaves the validation rows out and chooses the rate; the
    second learns from all rows, and its classifier of that rate is scored.
    """
    assert source.labels is not None
    encoder, labels = task.encoder, torch.from_numpy(source.labels)
    scale = standardisation(torch.from_numpy(train))
    held_out = torch.from_numpy(balanced_share(source.labels, _VALIDATION, task.seed))
    batch_size = min(_BATCH, len(source))
    plan = Plan(len(source), batch_size, (crop_and_flip(encoder.image_size),), task.seed)
    steps = epochs * plan.steps_per_epoch
    loader = create_loader(source, plan, encoder.device, task.num_workers)
    choosing, final = (_Classifiers(train.shape[1], num_classes, learning_rates, steps) for _ in range(2))
    for batch in loader.batches(0, steps):
        ids = batch.ids.cpu()
        x = _standardised(encoder.features(renormalised(batch.views[0], encoder)).cpu(), scale)
        kept = ~held_out[ids]
        choosing.step(x[kept], labels[ids][kept])
        final.step(x, labels[ids])
        if (batch.step + 1) % plan.steps_per_epoch == 0:
            task.say(f"linear with augmentation: epoch {(batch.step + 1) // plan.steps_per_epoch} of {epochs}")
    centre = torch.from_numpy(task.embedded(source))
    held = torch.nonzero(held_out & centre[:, 0].isfinite()).flatten()
    accuracies = _accuracies(_predictions(choosing.weights, centre, scale, held), labels[held])
    best = int(accuracies.argmax())
    predicted = _predictions(final.weights, torch.from_numpy(test), scale)[:, best].numpy()
    protocol = {
        **_described("random crops and flips", epochs, batch_size, learning_rates),
        "crop_min_scale": plan.views[0].crop_scale[0],
        **_choice(learning_rates, accuracies, _VALIDATION),
    }
    return _outcome(predicted, test_labels, float(accuracies[best]), learning_rates[best], protocol)


def _described(augmentation: str, epochs: int, batch_size: int, learning_rates: tuple[float, ...]) -> dict[str, Any]:
    return {
        "features": "frozen, standardised",
        "augmentation": augmentation,
        "optimizer": "SGD Nesterov 0.9, weight decay 0, cosine",
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rates": list(learning_rates),
    }


def _choice(learning_rates: tuple[float, ...], accuracies: Tensor, fraction: float) -> dict[str, Any]:
    """The rate of the highest accuracy (rates,) on the validation rows, and what each reached."""
    best = int(accuracies.argmax())
    return {
        "learning_rate": learning_rates[best],
        "validation_fraction": fraction,
        "validation_accuracy": float(accuracies[best]),
        "validation": {f"{rate:g}": float(value) for rate, value in zip(learning_rates, accuracies, strict=True)},
    }


Scale = tuple[Tensor, Tensor]  # mean and standard deviation, (d,) float32 each


def standardisation(features: Tensor) -> Scale:
    """Mean and standard deviation (at least 1e-6) of the columns, summed in float64 block by block."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in features.split(_BLOCK):
        total += rows.double().sum(dim=0)
    mean = total / len(features)
    squares = torch.zeros_like(mean)
    for rows in features.split(_BLOCK):
        squares += (rows.double() - mean).square().sum(dim=0)
    return mean.float(), (squares / max(len(features) - 1, 1)).sqrt().clamp(min=1e-6).float()


def _standardised(x: Tensor, scale: Scale) -> Tensor:
    return (x.float() - scale[0]) / scale[1]


class _Classifiers:
    """Independent softmax classifiers side by side, so that one product serves all.

    SGD with Nesterov momentum 0.9 and a cosine to 0, each classifier with its own peak rate. The gradient of softmax
    regression, x^T (softmax - one-hot) / rows, is written out: autograd would add its bookkeeping to each of
    thousands of tiny steps.
    """

    def __init__(self, dim: int, num_classes: int, learning_rates: tuple[float, ...], steps: int) -> None:
        self.rates, self.num_classes, self.steps, self.done = len(learning_rates), num_classes, steps, 0
        self._weights = torch.zeros(dim + 1, self.rates * num_classes)  # the last row is the bias
        self._buffer = torch.zeros_like(self._weights)
        self._peak = torch.tensor(learning_rates).repeat_interleave(num_classes)

    @property
    def weights(self) -> Tensor:
        """(d + 1, rates, c)."""
        return self._weights.view(-1, self.rates, self.num_classes)

    @torch.no_grad()
    def step(self, x: Tensor, labels: Tensor) -> None:
        """One update of all classifiers by standardised features (b, d) and labels (b,)."""
        rate = 0.5 * self._peak * (1 + np.cos(np.pi * self.done / self.steps))
        self.done += 1
        if len(x) == 0:
            return
        x = F.pad(x, (0, 1), value=1.0)
        error = (x @ self._weights).view(-1, self.rates, self.num_classes).softmax(dim=2)
        error[torch.arange(len(x)), :, labels] -= 1
        gradient = x.T @ error.view(len(x), -1) / len(x)
        self._buffer.mul_(0.9).add_(gradient)
        self._weights -= rate * (gradient + 0.9 * self._buffer)


def _fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rates: tuple[float, ...],
    epochs: int,
    batch_size: int,
    seed: int,
    rows: Tensor | None = None,
    scale: Scale | None = None,
) -> Tensor:
    """Weights (d + 1, rates, c) of classifiers trained on some rows of the features, standardised batch by batch."""
    rows = torch.arange(len(features)) if rows is None else rows
    scale = (torch.zeros(()), torch.ones(())) if scale is None else scale
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(rows))
    steps = epochs * (len(rows) // batch_size)
    classifiers = _Classifiers(features.shape[1], num_classes, learning_rates, steps)
    while classifiers.done < steps:
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
            if len(batch) == batch_size and classifiers.done < steps:
                classifiers.step(_standardised(features[batch], scale), labels[batch])
    return classifiers.weights


@torch.no_grad()
def _predictions(weights: Tensor, features: Tensor, scale: Scale, rows: Tensor | None = None) -> Tensor:
    """Classes (n, rates) that the classifiers give to some rows; -1, which is never right, where one has diverged."""
    flat, found = weights.flatten(1), []
    rows = torch.arange(len(features)) if rows is None else rows
    for block in rows.split(_BLOCK):
        x = F.pad(_standardised(features[block], scale), (0, 1), value=1.0)
        logits = (x @ flat).view(len(x), *weights.shape[1:])
        found.append(logits.argmax(dim=2).masked_fill(~logits.isfinite().all(dim=2), -1))
    return torch.cat(found)


def _accuracies(predictions: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy (rates,) float64 of each classifier; 0 of no rows."""
    return (predictions == labels[:, None]).double().sum(dim=0) / max(len(labels), 1)
