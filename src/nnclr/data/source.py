"""Where images come from: one `Source` for folders, parquet files, torchvision sets, arrays and photographs.

An image's id is its index in the source; the order is fixed by names, never by the file system.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnclr.data.decode import BadImage, decode, read_file
from nnclr.errors import InputError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
ACCEPTED = (
    "a folder of images, a list of folders, FILE.parquet, torchvision:NAME, demo-photos, an array of images, "
    "or a pair (images, labels)"
)


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
    """

    name: str
    length: int
    fetch: Callable[[int], np.ndarray]
    title: Callable[[int], str]
    fingerprint: str
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    def read(self, i: int) -> np.ndarray:
        """Image i as (h, w, 3) uint8 RGB.

        Raises:
            BadImage: if it cannot be used.
        """
        return self.fetch(i)

    def describe(self, i: int) -> str:
        """Path or name of image i, with everything escaped that could harm a terminal."""
        return self.title(i)

    def subset(self, indices: np.ndarray) -> "Source":
        """The images with these indices, in this order, as a source of its own."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.astype("<i8").tobytes()).hexdigest()
        return Source(
            self.name,
            len(chosen),
            lambda i: self.fetch(int(chosen[i])),
            lambda i: self.title(int(chosen[i])),
            digest,
            None if self.labels is None else self.labels[chosen],
            self.class_names,
        )


def open_source(data: Any) -> Source:
    """Open DATA in any of its forms.

    Args:
        data: a `Source` (returned as it is); a folder at any depth, or a list of them; `FILE.parquet` with an
            optional `?split=train&label=COLUMN`; `torchvision:NAME[?split=test]`; `demo-photos[?split=test]`; an
            array or tensor of uint8 images (n, h, w[, 1 or 3]) or (n, 3, h, w); or a pair (images, labels).

    Raises:
        InputError: if it is none of these, or holds no image; the message says what was found.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return array_source(data, None)
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], (str, os.PathLike)):
        return array_source(*data)
    if isinstance(data, (list, tuple)) and data and all(isinstance(part, (str, os.PathLike)) for part in data):
        return folder_source([Path(part) for part in data])
    if not isinstance(data, (str, os.PathLike)):
        raise InputError(f"data of type {type(data).__name__} is none of: {ACCEPTED}")
    text, _, query = os.fspath(data).partition("?")
    if text.startswith("torchvision:"):
        from nnclr.data.named import torchvision_source

        return torchvision_source(text.removeprefix("torchvision:"), **parse_query(query, {"split"}))
    if text == "demo-photos":
        from nnclr.data.photos import photo_patches

        return photo_patches(**parse_query(query, {"split"}))
    if text.endswith(".parquet"):
        from nnclr.data.parquet import parquet_source

        return parquet_source(Path(text), parse_query(query))
    if text.startswith("hf:") or text.endswith(".tar"):
        raise InputError(f"{text}: this version does not read hf: and .tar data; it reads {ACCEPTED}")
    return folder_source([Path(os.fspath(data))])


def test_split(data: Any) -> Source | None:
    """The test images that belong to DATA by convention, or None where there is no such convention."""
    if not isinstance(data, str):
        return None
    text, _, query = data.partition("?")
    if "split" in query or not (text.startswith("torchvision:") or text == "demo-photos"):
        return None
    return open_source(text + "?split=test")


test_split.__test__ = False  # type: ignore[attr-defined]  # pytest: this is no test


def parse_query(query: str, known: set[str] | None = None) -> dict[str, str]:
    """`a=x&b=y` as a dict.

    Raises:
        InputError: for a part without `=`, or a name that is not known.
    """
    pairs = dict(part.split("=", 1) for part in query.split("&") if "=" in part)
    wrong = [part for part in query.split("&") if part and "=" not in part]
    wrong += [] if known is None else sorted(pairs.keys() - known)
    if wrong:
        choices = "NAME=VALUE" if known is None else ", ".join(f"{name}=..." for name in sorted(known))
        raise InputError(f"'{wrong[0]}' after the ? of the data is not understood; expected {choices}")
    return pairs


# ---- arrays ------------------------------------------------------------------------------------------------


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
        InputError: for another dtype or shape, or labels that do not fit.
    """
    pixels = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if pixels.dtype != np.uint8:
        raise InputError(f"images must be uint8 from 0 to 255, these are {pixels.dtype}")
    if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] not in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or 0 in pixels.shape:
        raise InputError(f"images of shape {tuple(images.shape)} are not (n, h, w), (n, h, w, 3) or (n, 3, h, w)")
    checked, names = None, None
    if labels is not None:
        checked = np.asarray(labels)
        if checked.shape != (len(pixels),) or not np.issubdtype(checked.dtype, np.integer) or checked.min() < 0:
            raise InputError(f"labels must be {len(pixels)} whole numbers from 0, one an image")
        checked = checked.astype(np.int64)
        names = tuple(class_names or (str(i) for i in range(int(checked.max()) + 1)))
    digest = hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
    digest.update(b"" if checked is None else checked.tobytes())

    def fetch(i: int) -> np.ndarray:
        return np.array(np.broadcast_to(pixels[i], (*pixels.shape[1:3], 3)))  # a copy that may be written

    return Source(name, len(pixels), fetch, lambda i: f"{name}#{i}", digest.hexdigest(), checked, names)


# ---- folders -----------------------------------------------------------------------------------------------


@dataclass
class _Scan:
    """What was found below one root."""

    root: Path
    images: list[tuple[bytes, int]] = field(default_factory=list)  # relative path, bytes in the file
    others: Counter[str] = field(default_factory=Counter)  # extension -> files that are no images
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> files


def folder_source(roots: Sequence[Path]) -> Source:
    """All images below some folders, sorted by relative path.

    Labels are the first-level folder names when every image lies in such a folder, and absent otherwise.
    Hidden files are left out; links are followed once, and not out of their root.

    Raises:
        InputError: if a folder does not exist or no image is found; the message says what is there instead.
    """
    scans = []
    for root in roots:
        if not root.exists():
            raise InputError(f"{printable(os.fsencode(root))} does not exist; data is {ACCEPTED}")
        if not root.is_dir():
            raise InputError(f"{printable(os.fsencode(root))} is a file; data is {ACCEPTED}")
        scans.append(_scan(root))
    name = ", ".join(printable(os.fsencode(root)) for root in roots)
    files = [(scan.root, path, size) for scan in scans for path, size in sorted(scan.images)]
    skipped: Counter[str] = sum((scan.skipped for scan in scans), Counter())
    if not files:
        raise InputError(_nothing_found(name, sum((scan.others for scan in scans), Counter()), skipped))
    prefix = [b"" if len(scans) == 1 else b"%d/" % number for number in range(len(scans))]
    paths = [prefix[number] + path for number, scan in enumerate(scans) for path, _ in sorted(scan.images)]
    labels, class_names = _folder_labels([path for _, path, _ in files])
    digest = hashlib.sha256()
    for path, (_, _, size) in zip(paths, files, strict=True):
        digest.update(path + b"\0" + str(size).encode() + b"\n")

    def fetch(i: int) -> np.ndarray:
        root, path, _ = files[i]
        return decode(read_file(os.path.join(os.fsencode(root), path)))

    def title(i: int) -> str:
        return printable(paths[i])

    return Source(name, len(files), fetch, title, digest.hexdigest(), labels, class_names, dict(skipped))


def _scan(root: Path) -> _Scan:
    scan = _Scan(root)
    real_root = os.path.realpath(os.fsencode(root))
    visited: set[tuple[int, int]] = set()  # folders, so that a loop of links ends
    waiting = [b""]
    while waiting:
        relative = waiting.pop()
        folder = os.path.join(os.fsencode(root), relative)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            scan.skipped["unreadable folder"] += 1
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if not entry.name.startswith(b"."):
                _take(scan, entry, os.path.join(relative, entry.name), real_root, waiting)
    return scan


def _take(scan: _Scan, entry: "os.DirEntry[bytes]", relative: bytes, real_root: bytes, waiting: list[bytes]) -> None:
    """Sort one entry into images, folders to visit, and the rest."""
    try:
        status = entry.stat()
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if os.path.commonpath([real_root, target]) != real_root:
                scan.skipped["link out of the folder"] += 1
                return
    except OSError:
        scan.skipped["dangling link"] += 1
        return
    if stat.S_ISDIR(status.st_mode):
        waiting.append(relative)
        return
    extension = os.path.splitext(entry.name)[1].decode("ascii", "replace").lower()
    if extension not in EXTENSIONS:
        scan.others[extension or "without extension"] += 1
    elif not stat.S_ISREG(status.st_mode):
        scan.skipped["not a regular file"] += 1
    else:
        scan.images.append((relative, status.st_size))


def _folder_labels(paths: list[bytes]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    if not all(b"/" in path for path in paths):
        return None, None
    folders = [path.split(b"/", 1)[0] for path in paths]
    names = sorted(set(folders))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[folder] for folder in folders]), tuple(printable(name) for name in names)


def _nothing_found(name: str, others: Counter[str], skipped: Counter[str]) -> str:
    found = [f"{count} {extension}" for extension, count in others.most_common(4)]
    found += [f"{count} x {reason}" for reason, count in skipped.most_common(2)]
    there = f"it holds {', '.join(found)}" if found else "it is empty"
    return f"no images found in {name}: {there}; accepted are {' '.join(sorted(EXTENSIONS))}"


def printable(name: bytes) -> str:
    """A file name as text for people: control characters and bytes that are no UTF-8 appear escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


__all__ = [
    "ACCEPTED",
    "BadImage",
    "Source",
    "array_source",
    "folder_source",
    "open_source",
    "parse_query",
    "test_split",
]
