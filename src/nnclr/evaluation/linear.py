"""Linear classification of frozen features (paper, section 4.2), without augmentation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LEARNING_RATES = tuple(10.0**e for e in np.arange(-2.5, 1.01, 0.5).tolist())


@dataclass(frozen=True)
class LinearOutcome:
    """What `linear_accuracy` found."""

    test_accuracy: float
    validation_accuracy: float
    learning_rate: float
    protocol: dict[str, Any]


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
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> LinearOutcome:
    """Train linear classifiers with many learning rates at once, choose one, train it anew on everything.

    SGD with Nesterov momentum 0.9, no weight decay, cosine to 0. Features are standardised by the training
    set's mean and standard deviation. The rate is chosen on a class-balanced validation split of the training
    set; the chosen one is trained again on all of it, and that classifier is scored on the test set.

    Args:
        train_features: (m, d).
        train_labels: (m,) whole numbers below num_classes.
        test_features: (n, d).
        test_labels: (n,).
        num_classes: c.
        epochs: passes over the training rows.
        batch_size: rows a step.
        learning_rates: candidates, all trained in one pass.
        validation_fraction: share of each class that chooses the rate.
        seed: of the split and the order.
    """
    train, test = torch.as_tensor(train_features).float(), torch.as_tensor(test_features).float()
    labels, test_labels = torch.as_tensor(train_labels), torch.as_tensor(test_labels)
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    chosen = _validation_rows(labels, validation_fraction, seed)
    weights = _fit(train[~chosen], labels[~chosen], num_classes, learning_rates, epochs, batch_size, seed)
    accuracies = _accuracies(weights, train[chosen], labels[chosen])
    best = int(accuracies.argmax())
    final = _fit(train, labels, num_classes, (learning_rates[best],), epochs, batch_size, seed)
    protocol = {
        "features": "frozen, standardised",
        "augmentation": "none",
        "optimizer": "SGD Nesterov 0.9, weight decay 0, cosine",
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rates": list(learning_rates),
        "learning_rate": learning_rates[best],
        "validation_fraction": validation_fraction,
        "validation_accuracy": float(accuracies[best]),
    }
    value = float(_accuracies(final, test, test_labels)[0])
    return LinearOutcome(value, float(accuracies[best]), learning_rates[best], protocol)


def _validation_rows(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """(m,) bool: a seeded share of each class, at least one row of a class that has two."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        count = max(int(fraction * len(rows)), 1) if len(rows) > 1 else 0
        chosen[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return chosen


@torch.no_grad()
def _fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rates: tuple[float, ...],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Weights (d + 1, rates * c) of independent classifiers, side by side so that one product serves all.

    The gradient of softmax regression, x^T (softmax - one-hot) / rows, is written out: autograd would add its
    bookkeeping to each of thousands of tiny steps.
    """
    rates = len(learning_rates)
    features = F.pad(features, (0, 1), value=1.0)  # the bias
    weights = torch.zeros(features.shape[1], rates * num_classes)
    buffer = torch.zeros_like(weights)
    peak = torch.tensor(learning_rates).repeat_interleave(num_classes)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(features))
    steps = epochs * (len(features) // batch_size)
    step = 0
    while step < steps:
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            if len(rows) < batch_size or step == steps:
                break
            x = features[rows]
            error = (x @ weights).view(-1, rates, num_classes).softmax(dim=2)
            error[torch.arange(len(rows)), :, labels[rows]] -= 1
            gradient = x.T @ error.view(len(rows), -1) / len(rows)
            buffer.mul_(0.9).add_(gradient)
            rate = 0.5 * peak * (1 + np.cos(np.pi * step / steps))
            weights -= rate * (gradient + 0.9 * buffer)
            step += 1
    return weights.view(-1, rates, num_classes)


@torch.no_grad()
def _accuracies(weights: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy of each classifier; a diverged one scores 0."""
    flat = weights.flatten(1)
    hits = torch.zeros(weights.shape[1])
    for x, y in zip(features.split(8192), labels.split(8192), strict=True):
        logits = (F.pad(x, (0, 1), value=1.0) @ flat).view(len(x), *weights.shape[1:])
        hits += ((logits.argmax(dim=2) == y[:, None]) & logits.isfinite().all(dim=2)).sum(dim=0)
    return hits / len(features)
