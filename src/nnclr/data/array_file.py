"""Images in one NumPy file, of any number: it is mapped into memory, and read where it is needed."""

import warnings
from pathlib import Path

import numpy as np

from nnclr.data.images import Source, array_source, shown
from nnclr.errors import InputError

_LARGE = 8 << 30  # bytes above which reading all once, for the fingerprint, is announced


def npy_source(path: Path, labels: str | None = None) -> Source:
    """The images of a `.npy` file.

    Args:
        path: uint8 (n, h, w), (n, h, w, 1), (n, h, w, 3) or (n, 3, h, w), as `np.save` writes them.
        labels: a `.npy` file of (n,) whole numbers from 0; default `FILE.labels.npy` beside `FILE.npy`, if it exists.

    Raises:
        InputError: if a file is missing, no array, or of another dtype or shape.
    """
    beside = path.with_suffix(".labels.npy")
    given = Path(labels) if labels else beside if beside.is_file() else None
    classes = None if given is None else np.array(_open(given))
    images = _open(path)
    if images.nbytes > _LARGE:
        warnings.warn(f"{shown(path)}: reading {images.nbytes / 1e9:.0f} GB once, for its fingerprint", stacklevel=2)
    try:
        return array_source(images, classes, shown(path))
    except InputError as error:
        raise InputError(f"{shown(path)}: {error}") from error


def _open(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{shown(path)} does not exist")
    try:
        mapped: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{shown(path)} is not a readable NumPy file: {str(error)[:120]}") from error
    return mapped
