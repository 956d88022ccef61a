"""Pictures that are named or held one by one: Pillow images, arrays of any sizes, and files."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from nnclr.data.decode import BadImage, decode, pixels_of, read_file
from nnclr.data.folder import EXTENSIONS
from nnclr.data.images import Source, checked_labels, label_bytes, shown
from nnclr.errors import InputError


def are_pictures(data: Any) -> bool:
    """Whether it is a list of Pillow images and arrays, at least one."""
    return (
        isinstance(data, (list, tuple)) and bool(data) and all(isinstance(p, (Image.Image, np.ndarray)) for p in data)
    )


def picture_source(pictures: Sequence[Image.Image | np.ndarray], labels: Any = None) -> Source:
    """Pictures in memory, of any sizes and modes.

    Args:
        pictures: Pillow images, read as their files would be; and arrays, uint8 (h, w), (h, w, 1) or (h, w, 3).
        labels: as in `checked_labels`.

    Raises:
        InputError: for arrays of another dtype or shape, or labels that do not fit.
    """
    checked, names = checked_labels(labels, len(pictures))
    digest = hashlib.sha256(label_bytes(labels))
    for i, picture in enumerate(pictures):
        if isinstance(picture, np.ndarray):
            content = _array(picture, i)
        else:
            try:
                content = pixels_of(picture)
            except BadImage as error:  # met again, and counted, where it is used
                digest.update(str(error).encode())
                continue
        digest.update(str(content.shape).encode() + content.tobytes())

    def fetch(i: int) -> np.ndarray:
        picture = pictures[i]
        return _array(picture, i) if isinstance(picture, np.ndarray) else pixels_of(picture)

    return Source("pictures", len(pictures), fetch, lambda i: f"pictures#{i}", digest.hexdigest(), checked, names)


def _array(picture: np.ndarray, i: int) -> np.ndarray:
    """A copy of it as (h, w, 3)."""
    if picture.dtype != np.uint8:
        raise InputError(f"pictures must be uint8 from 0 to 255, number {i} is {picture.dtype}")
    planes = picture[..., None] if picture.ndim == 2 else picture
    if planes.ndim != 3 or planes.shape[2] not in (1, 3) or 0 in planes.shape:
        raise InputError(f"pictures must be (h, w), (h, w, 1) or (h, w, 3), number {i} is {picture.shape}")
    return np.array(np.broadcast_to(planes, (*planes.shape[:2], 3)))


def paths_of_pictures(data: Any) -> list[str] | None:
    """The paths, where data is a list of nothing but names of pictures by their extension, at least one; else None."""
    if not isinstance(data, (list, tuple)) or not data:
        return None
    if not all(isinstance(path, (str, os.PathLike)) and _names_a_picture(path) for path in data):
        return None
    return [os.fspath(path) for path in data]


def _names_a_picture(path: str | os.PathLike[str]) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS and not os.path.isdir(path)


def file_source(paths: Sequence[str], labels: Any = None) -> Source:
    """Files of pictures in the order they are given.

    The fingerprint is over names below their common folder, sizes and labels.

    Raises:
        InputError: if one does not exist, or labels do not fit.
    """
    checked, names = checked_labels(labels, len(paths))
    digest, times = hashlib.sha256(label_bytes(labels)), []
    above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # the latter for what can be no name
            raise InputError(f"{shown(path)} does not exist or cannot be looked at") from error
        name = os.fsencode(os.path.relpath(path, above))
        digest.update(name + b"\0" + str(status.st_size).encode() + b"\n")
        times.append(status.st_mtime_ns)
    written = hashlib.sha256(repr(times).encode()).hexdigest()

    def content(i: int) -> bytes:
        return read_file(paths[i])

    return Source(
        shown(paths[0]) if len(paths) == 1 else f"{len(paths)} pictures",
        len(paths),
        lambda i: decode(content(i)),
        lambda i: shown(paths[i]),
        digest.hexdigest(),
        checked,
        names,
        revision=written,
        content=content,
    )
