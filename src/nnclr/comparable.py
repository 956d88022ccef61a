"""Which results of evaluations can stand beside each other, and what they are called; records as dictionaries.

It does not need torch, without which the commands that only read records start at once.
"""

import json
from collections.abc import Iterable
from typing import Any

# What one asks of a protocol. Other parameters describe it, or were chosen for an encoder, as learning rates are.
_ASKED = {
    "knn": ("k", "temperature"),
    "linear": ("augmentation", "epochs", "batch_size", "learning_rates"),
    "logistic": ("strengths",),
    "finetune": ("fraction", "subset", "epochs", "learning_rates"),
    "few-shot": ("shots", "ways", "queries", "episodes"),
    "label-curve": ("budgets", "repeats"),
    "label-free": ("views", "augmentation"),
    "retrieval": (),
    "transfer": ("by", "epochs", "strengths"),
}
_IMAGES = ("n_test", "test_fingerprint", "data_fingerprint")
_SHOWN = {"n_test": "images scored", "test_fingerprint": "images scored", "data_fingerprint": "images learned from"}


def asked(record: dict[str, Any]) -> dict[str, Any]:
    """What two results must agree in: protocol, metric, images, and the settings that were asked for.

    Raises:
        KeyError, TypeError: if the record is none of ours.
    """
    parameters = record["parameters"]
    if not isinstance(parameters, dict):
        raise TypeError(parameters)
    names = _ASKED.get(record["protocol"], sorted(set(parameters) - {"image_size"}))
    images = {name: record.get(name) for name in _IMAGES}
    if not record.get("n_train"):  # nothing was learned from: the record then names what was scored
        del images["data_fingerprint"]
    of = {"protocol": record["protocol"], "metric": record["metric"]}
    return of | images | {name: parameters.get(name) for name in names}


def key(record: dict[str, Any]) -> str:
    """`asked` as one text."""
    return json.dumps(asked(record), sort_keys=True)


def title(record: dict[str, Any]) -> str:
    """Protocol with the settings that are told most often, and metric.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: if the record is none of ours.
    """
    parameters, protocol = record["parameters"], record["protocol"]
    if protocol == "knn":
        protocol += f" k={parameters['k']} T={parameters['temperature']}"
    elif protocol == "finetune":
        protocol += f" {100 * parameters['fraction']:.3g} % of the labels"
        if isinstance(record.get("n_train"), int):
            protocol += f" ({record['n_train']} images)"
    elif protocol == "linear" and parameters["augmentation"] != "none":
        protocol += " with augmentation"
    elif protocol == "transfer":
        protocol += f" by {parameters['by']}"
    return f"{protocol}, {record['metric']}"


def differences(every: Iterable[dict[str, Any]]) -> list[str]:
    """For each of several `asked` that are called the same: in what it differs from the others, in words."""
    every = list(every)
    names = {name: None for one in every for name in one if len({json.dumps(other.get(name)) for other in every}) > 1}
    return [", ".join(f"{_SHOWN.get(name, name)} {_value(name, one.get(name))}" for name in names) for one in every]


def _value(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if name.endswith("_fingerprint") else text
