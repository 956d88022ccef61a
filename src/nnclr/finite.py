"""Features and labels as people hand them over: as tensors, and in words what is wrong with them."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnclr.errors import InputError

_BLOCK = 4096  # rows looked at together
_NAMED = 5  # rows in a message


def refuse_not_finite(features: Any, name: str) -> None:
    """Raise the InputError for rows that are not finite: how many, which, and what to do about them.

    Args:
        features: (n, ...) array, memory-mapped array or tensor, n >= 1; read a block at a time.
        name: what they are, for the message.
    """
    bad: list[int] = []
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        finite = block.isfinite().cpu().numpy() if isinstance(block, Tensor) else np.isfinite(block)
        if not finite.all():
            bad += (start + np.flatnonzero(~finite.reshape(len(block), -1).all(axis=1))).tolist()
    if bad:
        rows = f"row{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:_NAMED]))}{', ...' * (len(bad) > _NAMED)}"
        raise InputError(
            f"{len(bad)} of the {len(features)} rows of {name} {'are' if len(bad) > 1 else 'is'} not finite ({rows}): "
            "Encoder.embed gives such a row for an image that cannot be read; keep the others, "
            "features[np.isfinite(features).all(axis=1)]"
        )


def refuse_other_labels(labels: Any, rows: int, num_classes: int | None = None) -> None:
    """Raise the InputError for labels that are not one for each row of features, or no class indices.

    Args:
        labels: array, tensor or list; (rows,) where they are right.
        rows: of the features, at least 1.
        num_classes: they are whole numbers below it; None where anything may be a label.
    """
    found = as_array(labels)
    if rows == 0 or found.shape != (rows,):
        raise InputError(f"labels of shape {found.shape} are not one for each of the {rows} rows of features")
    if num_classes is None:
        return
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= num_classes:
        raise InputError(f"labels of {num_classes} classes must be whole numbers from 0 to {num_classes - 1}")


def class_indices(labels: Any, rows: int, num_classes: int) -> Tensor:
    """Labels (rows,) int64 on the CPU, of whatever whole numbers they were.

    Raises:
        InputError: as `refuse_other_labels`.
    """
    refuse_other_labels(labels, rows, num_classes)
    return torch.from_numpy(as_array(labels).astype(np.int64))


def as_rows(features: Any) -> Tensor:
    """Features as a tensor: the same memory, which must not be written to, or a copy where torch cannot take it."""
    if isinstance(features, Tensor):
        return features
    array = np.asarray(features)
    if not array.dtype.isnative or min(array.strides, default=0) < 0:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array)


def as_array(labels: Any) -> np.ndarray:
    """Labels in whatever form as an array."""
    return np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
