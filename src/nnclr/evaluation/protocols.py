"""The protocols that need nothing but frozen features; each is a thin layer over the module of its name."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nnclr import counter
from nnclr.data.augment import policy
from nnclr.data.images import Source
from nnclr.data.loader import Plan, create_loader
from nnclr.data.source import open_source
from nnclr.errors import InputError
from nnclr.evaluation.few_shot import episodes_cut, episodes_in_words
from nnclr.evaluation.few_shot import few_shot as measure_few_shot
from nnclr.evaluation.knn import nearest_rows, vote, without_itself
from nnclr.evaluation.label_free import label_free as measure_label_free
from nnclr.evaluation.logistic import logistic_regression
from nnclr.evaluation.metrics import bootstrap_interval, mean_per_class, top1, top1_of_scores
from nnclr.evaluation.result import WILSON, wilson_interval
from nnclr.evaluation.retrieval import retrieval as measure_retrieval
from nnclr.evaluation.task import Outcome, Task, balanced_share, renormalised

_VIEWED, _VIEWS = 1000, 10  # images, and augmented views of each, for LiDAR and alignment


def knn(task: Task, k: int | Sequence[int] = 20, temperature: float | Sequence[float] = 0.07) -> Outcome:
    """Weighted vote of the nearest training images, DINO's form; see `knn_predict`.

    With several k or temperatures the pair that is best on the training images, each asked without itself, is
    reported; `details` has the accuracy of all pairs.

    Args:
        task: what is evaluated.
        k: voters, or several to choose from.
        temperature: T, or several to choose from.

    Raises:
        InputError: if there are fewer training images than voters.
    """
    ks = (k,) if isinstance(k, int) else tuple(k)
    temperatures = (temperature,) if isinstance(temperature, (int, float)) else tuple(temperature)
    source, scored = task.split()
    (train, labels), (test, test_labels) = task.features(source), task.features(scored)
    grid, most = [(k, t) for k in ks for t in temperatures], max(ks)
    if most > len(train) - (len(grid) > 1):
        raise InputError(f"{source.name} has {len(train)} images to learn from, fewer than the k={most} neighbours")
    rows, targets = torch.as_tensor(train), torch.as_tensor(labels)
    classes = len(source.class_names or ())
    similarities, indices = nearest_rows(rows, torch.as_tensor(test), most)
    predicted = {cell: vote(similarities, indices, targets, classes, *cell).numpy() for cell in grid}
    values = {cell: top1(predicted[cell], test_labels) for cell in grid}
    chosen = grid[0]
    details: dict[str, Any] = {}
    if len(grid) > 1:
        near = without_itself(*nearest_rows(rows, rows, most + 1))
        own = {cell: top1(vote(*near, targets, classes, *cell).numpy(), labels) for cell in grid}
        chosen = max(grid, key=lambda cell: own[cell])
        details["grid"] = [
            {"k": k, "temperature": t, "value": values[k, t], "leave_one_out": own[k, t]} for k, t in grid
        ]
    parameters = {
        "k": chosen[0],
        "temperature": chosen[1],
        "similarity": "cosine",
        "weights": "exp(similarity / T)",
        "chosen_by": "leave-one-out on the training images" if len(grid) > 1 else "given",
    }
    details["mean_per_class"] = mean_per_class(predicted[chosen], test_labels)
    interval = wilson_interval(values[chosen], len(test))
    return Outcome(
        "top-1 accuracy", values[chosen], interval, WILSON, parameters, source, scored, len(train), len(test), details
    )


def logistic(task: Task) -> Outcome:
    """Multinomial logistic regression by L-BFGS, its strength chosen on a fifth of each class; see `logistic.py`.

    Raises:
        InputError: if there is nothing to choose the strength on, because every class has one image.
    """
    source, scored = task.split()
    (train, labels), (test, test_labels) = task.features(source), task.features(scored)
    held_out = balanced_share(labels, 0.2, task.seed)
    if not held_out.any():
        raise InputError(f"every class of {source.name} has one image; the strength is chosen on a second one")
    outcome = logistic_regression(
        train[~held_out],
        labels[~held_out],
        train[held_out],
        labels[held_out],
        test,
        len(source.class_names or ()),
        top1_of_scores,
        progress=lambda done, total: None if done % 15 else task.say(f"logistic: strength {done} of {total}"),
    )
    predicted = outcome.scores.argmax(axis=1)
    value = top1(predicted, test_labels)
    parameters = {**outcome.protocol, "validation_fraction": 0.2}
    details = {"mean_per_class": mean_per_class(predicted, test_labels)}
    interval = wilson_interval(value, len(test))
    return Outcome(
        "top-1 accuracy", value, interval, WILSON, parameters, source, scored, len(train), len(test), details
    )


def retrieval(task: Task) -> Outcome:
    """Every image asks all others: recall@1, and in `details` recall@5, recall@10 and mAP; see `retrieval.py`."""
    scored = task.scored()
    features, labels = task.features(scored)
    outcome = measure_retrieval(features, labels)
    hits = (outcome.first_relevant == 0).astype(np.int64)
    details: dict[str, Any] = dict(outcome.metrics)
    details["mAP_interval"] = list(bootstrap_interval(np.mean, outcome.average_precisions, seed=task.seed))
    interval = wilson_interval(float(hits.mean()), len(hits))
    parameters = {"similarity": "cosine", "relevant": "same label, another image", "ks": [1, 5, 10]}
    return Outcome(
        "recall@1", float(hits.mean()), interval, WILSON, parameters, scored, scored, 0, len(features), details
    )


def few_shot(task: Task, shots: Sequence[int] = (1, 5, 10)) -> Outcome:
    """Nearest centroid in 5-way episodes; the value is that of the most shots, `details` has all; see `few_shot.py`.

    Args:
        task: what is evaluated.
        shots: images to learn from, a class.
    """
    scored = task.scored()
    features, labels = task.features(scored)
    outcomes = measure_few_shot(features, labels, tuple(shots), seed=task.seed)
    last = outcomes[max(outcomes)]
    for complaint in episodes_cut(outcomes.values()):
        task.warn(f"few-shot: {complaint}")
    parameters = {
        "shots": last.shots,
        "ways": last.ways,
        "queries": last.queries,
        "episodes": last.episodes,
        "classifier": "nearest class centroid, cosine",
        "classes_left_out": last.left_out,
    }
    details: dict[str, Any] = {
        f"{outcome.shots} shots": {"value": outcome.accuracy, "interval": list(outcome.interval)}
        for outcome in outcomes.values()
    }
    details["in_words"] = f"few-shot: {episodes_in_words(list(outcomes.values()))}"
    method = "over episodes, 1.96 standard errors"
    return Outcome(
        f"{last.shots}-shot accuracy",
        last.accuracy,
        last.interval,
        method,
        parameters,
        scored,
        scored,
        0,
        len(features),
        details,
    )


def label_free(task: Task) -> Outcome:
    """RankMe, LiDAR, alpha-ReQ, alignment, uniformity and std without any label; see `label_free.py`.

    The value is RankMe's effective rank as a share of the largest one that is possible.
    """
    if task.test is not None:
        raise InputError("label-free measures the images of DATA alone; leave the test images out")
    source = open_source(task.data)
    features, rows = task.readable(source)
    if len(features) < 2:
        raise InputError(f"{source.name} has {len(features)} readable images; label-free measures need two")
    chosen = rows[counter.permutation(task.seed, 2, len(features))[:_VIEWED]]
    views = _views(task, source.subset(np.sort(chosen)))
    details = measure_label_free(features, views)
    parameters = {
        "views_of": len(views),
        "views": _VIEWS,
        "augmentation": "byol, view 1",
        "value": "effective rank / min(images, width)",
    }
    details = {name: float(value) for name, value in details.items() if math.isfinite(value)}
    n = len(features)
    return Outcome("RankMe share", details["rank_me_share"], None, "none", parameters, source, source, 0, n, details)


def _views(task: Task, source: Source) -> np.ndarray:
    """Features (m, q, d) of q augmented views of each image."""
    view = policy("byol", task.encoder.image_size)[0]
    batch = min(64, len(source))
    plan = Plan(len(source), batch, (view,) * _VIEWS, task.seed)
    loader = create_loader(source, plan, task.encoder.device, task.num_workers)
    made = [
        torch.stack([task.encoder.features(renormalised(v, task.encoder)) for v in found.views], dim=1).cpu()
        for found in loader.batches(0, plan.steps_per_epoch)
    ]
    return torch.cat(made).numpy()
