"""Images in one NumPy file, of any number: it is mapped into memory, and read where it is needed."""

import tokenize
import warnings
from pathlib import Path

import numpy as np

from nnclr.data.images import Source, array_source, shown
from nnclr.errors import InputError, first_line

# What NumPy raises for files that are none: it evaluates a header as a literal of Python.
UNREADABLE = (OSError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError, EOFError, SyntaxError,
              tokenize.TokenError)  # fmt: skip
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
    classes = None if given is None else np.array(open_npy(given))
    images = open_npy(path)
    if images.nbytes > _LARGE:
        warnings.warn(f"{shown(path)}: reading {images.nbytes / 1e9:.0f} GB once, for its fingerprint", stacklevel=2)
    try:
        return array_source(images, classes, shown(path))
    except InputError as error:
        raise InputError(f"{shown(path)}: {error}") from error


def open_npy(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped into memory read-only.

    Raises:
        InputError: if it is missing or no array of plain values.
    """
    if not path.is_file():
        raise InputError(f"{shown(path)} does not exist")
    try:
        # open_memmap compares the header with the size of the file, and takes neither objects nor archives.
        mapped: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        raise InputError(f"{shown(path)} is not a readable NumPy file: {first_line(error)}") from error
    return mapped
