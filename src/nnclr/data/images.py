"""What a source of images is, and the simplest one: images that are already in memory.

An image's id is its index in the source; the order is fixed by names, never by the file system.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from nnclr.data.ahead import reading
from nnclr.data.decode import decode
from nnclr.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import, and to look at images does without
    import torch

MOST_CLASS = 1 << 20  # a larger number as a label is a name, or an error
SPLIT_NAMES = frozenset("train training test testing val valid validation dev eval evaluation".split())  # usual ones
_FEW_CLASSES = 1000  # up to which numbers without an image cost nothing


@dataclass(frozen=True)
class Source:
    """n images, with labels for all of them or for none.

    Args:
        name: for people.
        length: n.
        fetch: index -> (h, w, 3) uint8; raises `BadImage`.
        title: index -> name of an image, printable everywhere.
        fingerprint: SHA-256 over what identifies the images and labels, hex; it does not depend on where
            they are stored.
        labels: (n,) int64 class indices, or None.
        class_names: name of each class, or None.
        skipped: reason -> files that were not taken.
        unlabelled: why there are no labels, where that may not be meant; empty otherwise.
        multilabels: (n, classes) int8 where an image may show several classes: 1 for each that it shows, 0 for
            each that it does not, -1 for what is not scored; else None.
        revision: changes when a file is written anew, which the fingerprint does not notice where the size stays.
        content: index -> the file of an image as it is stored; raises `BadImage`; None where images have no files.
        blocks: images in each part that is best read in one go, as a shard; None where all places are alike.
        window: blocks whose images are shuffled together.
        skipped_first: reason -> names of the first few that were not taken, printable everywhere; absent where they
            have none.
    """

    name: str
    length: int
    fetch: Callable[[int], np.ndarray]
    title: Callable[[int], str]
    fingerprint: str
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    unlabelled: str = ""
    multilabels: np.ndarray | None = None
    revision: str = ""
    content: Callable[[int], bytes] | None = None
    blocks: tuple[int, ...] | None = None
    window: int = 1
    skipped_first: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> np.ndarray:
        """Image i as (h, w, 3) uint8 RGB.

        Args:
            i: from 0.
            reduction: see `decode`.

        Raises:
            BadImage: if it cannot be used.
        """
        with self.reading(i):
            if reduction is None or self.content is None:
                return self.fetch(i)
            return decode(self.content(i), reduction)

    def reading(self, i: int) -> AbstractContextManager[None]:
        """While entered, image i is read: if that takes long, it is named."""
        return reading(lambda: f"{self.describe(i)} of {self.name}")

    def describe(self, i: int) -> str:
        """Path or name of image i, with everything escaped that could harm a terminal."""
        return self.title(i)

    def subset(self, indices: np.ndarray) -> Source:
        """The images with these indices, in this order, as a source of its own."""
        chosen, content = np.asarray(indices, np.int64), self.content
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.astype("<i8").tobytes()).hexdigest()
        return Source(
            self.name,
            len(chosen),
            lambda i: self.fetch(int(chosen[i])),
            lambda i: self.title(int(chosen[i])),
            digest,
            None if self.labels is None else self.labels[chosen],
            self.class_names,
            multilabels=None if self.multilabels is None else self.multilabels[chosen],
            revision=self.revision,
            content=None if content is None else lambda i: content(int(chosen[i])),
        )


def joined(first: Source, second: Source) -> Source:
    """The images of two sources with the same classes, one after the other."""

    def both(one: np.ndarray | None, two: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or two is None else np.concatenate([one, two])

    n, ours, theirs = len(first), first.content, second.content
    return Source(
        first.name,
        n + len(second),
        lambda i: first.fetch(i) if i < n else second.fetch(i - n),
        lambda i: first.title(i) if i < n else second.title(i - n),
        hashlib.sha256(f"{first.fingerprint} {second.fingerprint}".encode()).hexdigest(),
        both(first.labels, second.labels),
        first.class_names,
        multilabels=both(first.multilabels, second.multilabels),
        revision=first.revision + second.revision,
        content=None if ours is None or theirs is None else lambda i: ours(i) if i < n else theirs(i - n),
    )


def array_source(
    images: np.ndarray | torch.Tensor,
    labels: Any,
    name: str = "array",
    class_names: Sequence[str] | None = None,
) -> Source:
    """Images that are already in memory.

    Args:
        images: uint8 (n, h, w), (n, h, w, 1), (n, h, w, 3) or (n, 3, h, w).
        labels: (n,) whole numbers from 0, or None.
        name: for people.
        class_names: one for each label; default their numbers.

    Raises:
        InputError: for another dtype or shape, one picture (h, w, 3), what may be one (3, h, w), or labels that do
            not fit.
    """
    pixels = images.cpu().numpy() if is_tensor(images) else np.asarray(images)
    if pixels.dtype != np.uint8:
        raise InputError(f"images must be uint8 from 0 to 255, these are {pixels.dtype}")
    if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] not in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim == 3 and pixels.shape[2] == 3:  # else it would be read as many grey pictures of three columns
        raise InputError(
            f"an array of shape {tuple(images.shape)} looks like one picture, not a stack; use array[None]"
        )
    if pixels.ndim == 3 and pixels.shape[0] == 3 and labels is None:
        raise InputError(
            f"an array of shape {tuple(images.shape)} may be one picture, colours first, or three grey ones; "
            "use array[None] or array[..., None]"
        )
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or 0 in pixels.shape:
        raise InputError(f"images of shape {tuple(images.shape)} are not (n, h, w), (n, h, w, 3) or (n, 3, h, w)")
    checked, names = checked_labels(labels, len(pixels), class_names)
    digest = hashlib.sha256(str(pixels.shape).encode())
    for image in pixels:  # one at a time: the array may be a file that is larger than memory
        digest.update(np.ascontiguousarray(image).data)
    digest.update(label_bytes(labels))

    def fetch(i: int) -> np.ndarray:
        return np.array(np.broadcast_to(pixels[i], (*pixels.shape[1:3], 3)))  # a copy that may be written

    return Source(name, len(pixels), fetch, lambda i: f"{name}#{i}", digest.hexdigest(), checked, names)


def checked_labels(
    labels: Any, n: int, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels (n,) int64 and the name of each class, by default its number; None and None where there are no labels.

    Args:
        labels: n whole numbers from 0; or n texts, which are the names of the classes, numbered in sorted order.
        n: images.
        class_names: of the numbers.

    Raises:
        InputError: if they are neither.
    """
    if labels is None:
        return None, None
    checked = np.asarray(labels)
    each = labels if isinstance(labels, (list, tuple)) else checked.tolist()  # NumPy makes texts of mixed ones
    if checked.shape == (n,) and checked.dtype.kind in "UO" and all(isinstance(label, str) for label in each):
        classes, indices = np.unique([safe(label) for label in each], return_inverse=True)
        return indices.astype(np.int64), tuple(classes.tolist())
    if checked.shape != (n,) or not np.issubdtype(checked.dtype, np.integer) or checked.min() < 0:
        raise InputError(f"labels must be {n} whole numbers from 0, or {n} texts, one an image")
    if checked.max() >= MOST_CLASS:
        raise InputError(f"labels go up to {checked.max()}, and classes end at {MOST_CLASS - 1}: number them from 0")
    checked = checked.astype(np.int64)
    return (checked, tuple(class_names)) if class_names else classes_of_numbers(checked)


def label_bytes(labels: Any) -> bytes:
    """Good labels as they were given, for a fingerprint."""
    if labels is None:
        return b""
    given = np.asarray(labels)
    if given.dtype.kind in "iu":
        return given.astype(np.int64).tobytes()
    return "\0".join(map(str, given.tolist())).encode("utf-8", "backslashreplace")


def classes_of_numbers(numbers: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices (n,) int64 and the names of the classes of whole numbers from 0, which are the indices.

    Numbers of another kind, such as those of products or people, would make more classes than there are images, and
    what counts by class would need memory for all: they are numbered anew.
    """
    if numbers.max() < max(len(numbers), _FEW_CLASSES):
        return numbers, tuple(map(str, range(int(numbers.max()) + 1)))
    values, indices = np.unique(numbers, return_inverse=True)
    return indices.astype(np.int64), tuple(map(str, values.tolist()))


def is_tensor(data: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor; where torch was never imported there is none."""
    loaded = sys.modules.get("torch")
    return loaded is not None and isinstance(data, loaded.Tensor)


def printable(name: bytes) -> str:
    """A file name as text for people: control characters and bytes that are no UTF-8 appear escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe(text: object) -> str:
    """A text of unknown origin as text for people."""
    return printable(str(text).encode("utf-8", "backslashreplace"))


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text for people."""
    return printable(os.fsencode(path))


def cell(value: object) -> object:
    """A value for a table; text that a spreadsheet would take for a formula starts with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "'")) else value


def from_cell(text: str) -> str:
    """The text that `cell` wrote."""
    return text.removeprefix("'")
