"""Data sets by their torchvision name, from an installed copy where the system has one."""

import difflib
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.data.images import Source, array_source
from nnclr.errors import InputError, first_line

INSTALLED = Path("/usr/share/datasets")  # where Debian's dataset-* packages put their files
_CLASSES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "stl10": "STL10",
}
_BY_SPLIT_NAME = ("svhn", "stl10")  # these take split="train", the others train=True


def torchvision_source(name: str, split: str = "train") -> Source:
    """A data set by name, downloaded into $NNCLR_DATA (default ~/.cache/nnclr) if it is not installed.

    Raises:
        InputError: if the name or the split is unknown, or the download fails.
    """
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, _CLASSES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no torchvision data set is called '{name}'; {hint}there are {', '.join(_CLASSES)}")
    if split not in ("train", "test"):
        raise InputError(f"split='{split}' is neither train nor test")
    title = f"torchvision:{name}?split={split}"
    installed = _installed(name, split)
    if installed is not None:
        return array_source(*installed, title)
    data = _torchvision(name, split)
    images, labels = np.asarray(data.data), np.asarray(getattr(data, "targets", getattr(data, "labels", None)))
    return array_source(images, labels, title, getattr(data, "classes", None))


def _installed(name: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    stem = {"train": "train", "test": "t10k"}[split]
    images = INSTALLED / name / f"{stem}-images-idx3-ubyte.gz"
    labels = INSTALLED / name / f"{stem}-labels-idx1-ubyte.gz"
    if not (images.is_file() and labels.is_file()):
        return None
    return read_idx(images), read_idx(labels).astype(np.int64)


def read_idx(path: Path) -> np.ndarray:
    """An uint8 array from a gzipped IDX file, the format of MNIST.

    Raises:
        InputError: if it is something else or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        zero, kind, dimensions = int.from_bytes(content[:2], "big"), content[2], content[3]
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if zero != 0 or kind != 8 or values.size != shape.prod():
            raise ValueError("its header does not fit its content")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"{path} is not a readable IDX file: {error}") from error


def _torchvision(name: str, split: str) -> Any:
    from torchvision import datasets

    root = os.environ.get("NNCLR_DATA", str(Path.home() / ".cache" / "nnclr"))
    which = {"split": split} if name in _BY_SPLIT_NAME else {"train": split == "train"}
    try:
        return getattr(datasets, _CLASSES[name])(root, download=True, **which)
    except Exception as error:
        raise InputError(
            f"torchvision:{name} is not in {root} and could not be downloaded ({first_line(error)}); "
            "put its files there"
        ) from error
