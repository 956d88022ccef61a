"""Features that hold a NaN or an infinity, and labels that do not fit them, in words."""

from typing import Any

import numpy as np
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
    found = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if rows == 0 or found.shape != (rows,):
        raise InputError(f"labels of shape {found.shape} are not one for each of the {rows} rows of features")
    if num_classes is None:
        return
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= num_classes:
        raise InputError(f"labels of {num_classes} classes must be whole numbers from 0 to {num_classes - 1}")
