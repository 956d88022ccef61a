"""Features and labels to numbers: the evaluation protocols, one result record for all."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnclr import counter
from nnclr.data.images import Source
from nnclr.data.source import open_source, test_split
from nnclr.encoder import Encoder
from nnclr.errors import DataError, InputError
from nnclr.evaluation.knn import knn_accuracy
from nnclr.evaluation.linear import linear_accuracy
from nnclr.evaluation.result import Result, versions, wilson_interval

_HOLD_OUT = 0.1  # share of the data that is scored where there is no test set


def _knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    seed: int,
    k: int = 20,
    temperature: float = 0.07,
) -> tuple[float, dict[str, Any]]:
    """Weighted kNN on cosine similarity; without randomness."""
    k = min(k, len(train))
    value = knn_accuracy(train, train_labels, test, test_labels, num_classes, k=k, temperature=temperature)
    return value, {"k": k, "temperature": temperature, "similarity": "cosine", "weights": "exp(similarity / T)"}


def _linear(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    seed: int,
    **options: Any,
) -> tuple[float, dict[str, Any]]:
    """Linear classifier on frozen features, without augmentation."""
    outcome = linear_accuracy(train, train_labels, test, test_labels, num_classes, seed=seed, **options)
    return outcome.test_accuracy, outcome.protocol


PROTOCOLS: dict[str, Callable[..., tuple[float, dict[str, Any]]]] = {"knn": _knn, "linear": _linear}


def evaluate(
    encoder: Encoder | str | Path,
    data: Any,
    test: Any = None,
    *,
    protocol: str = "knn",
    num_workers: int = 2,
    seed: int = 0,
    **parameters: Any,
) -> Result:
    """Measure an encoder on labelled images.

    Args:
        encoder: an `Encoder`, or the path of a run or encoder folder.
        data: labelled images that the protocol may learn from.
        test: labelled images to be scored; else the data's own test split, else a tenth of the data.
        protocol: `knn` (parameters `k`, `temperature`) or `linear` (parameters of `linear_accuracy`).
        num_workers: threads that decode.
        seed: of splits and of the linear classifier.
        **parameters: of the protocol.

    Returns:
        A `Result`; evaluating twice gives the same value.

    Raises:
        InputError: if there are no labels, the classes differ, or the protocol is unknown.
        DataError: if no image can be read.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"no protocol is called '{protocol}'; there are {', '.join(PROTOCOLS)}")
    began = time.perf_counter()
    encoder = encoder if isinstance(encoder, Encoder) else Encoder.from_pretrained(encoder)
    train, scored = split(data, test, seed)
    names = train.class_names or ()
    features, labels = _features(encoder, train, num_workers)
    test_features, test_labels = _features(encoder, scored, num_workers)
    value, used = PROTOCOLS[protocol](
        features, labels, test_features, test_labels, max(len(names), 1), seed, **parameters
    )
    return Result(
        metric="top-1 accuracy",
        value=value,
        protocol=protocol,
        parameters={**used, "image_size": encoder.image_size},
        data=train.name,
        test=scored.name,
        data_fingerprint=train.fingerprint,
        n_train=len(labels),
        n_test=len(test_labels),
        encoder=encoder.fingerprint,
        step=encoder.provenance.get("step"),
        seed=seed,
        seconds=time.perf_counter() - began,
        versions=versions(),
        interval=wilson_interval(value, len(test_labels)),
    )


def split(data: Any, test: Any, seed: int) -> tuple[Source, Source]:
    """Images to learn from and images to score.

    Raises:
        InputError: if either has no labels, or the test set has classes that the other one lacks.
    """
    train = open_source(data)
    scored = open_source(test) if test is not None else test_split(data)
    if train.labels is None:
        raise InputError(
            f"{train.name} has no labels, and evaluation needs them: one folder a class, or a label column"
        )
    if scored is None:
        order = counter.permutation(seed, 0, len(train))
        held_out = max(1, round(_HOLD_OUT * len(train)))
        return train.subset(np.sort(order[held_out:])), train.subset(np.sort(order[:held_out]))
    if scored.labels is None:
        raise InputError(f"{scored.name} has no labels, and evaluation needs them")
    number = {name: i for i, name in enumerate(train.class_names or ())}
    theirs = scored.class_names or ()
    unknown = [name for name in theirs if name not in number]
    if unknown:
        raise InputError(f"{scored.name} has classes that {train.name} lacks, for example '{unknown[0]}'")
    # Classes are matched by name: a test set may lack some.
    labels = np.array([number[name] for name in theirs])[scored.labels]
    return train, replace(scored, labels=labels, class_names=train.class_names)


def _features(encoder: Encoder, source: Source, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the images that can be read."""
    features = encoder.embed(source, num_workers=num_workers)
    readable = np.isfinite(features).all(axis=1)
    if not readable.any():
        raise DataError(f"no image of {source.name} gives finite features")
    assert source.labels is not None
    return features[readable], source.labels[readable]
