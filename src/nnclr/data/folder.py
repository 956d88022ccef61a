"""Images in folders: an untrusted tree of files, in a fixed order."""

import hashlib
import os
import stat
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnclr.data.decode import BadImage, decode, read_file
from nnclr.data.images import SPLIT_NAMES, Source, printable
from nnclr.errors import InputError

_UNREAD = "unread "
_NAMED = 3  # files that are left out, for each reason
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

# Pictures as cameras and programs save them, which somebody would miss without a word.
NOT_READ = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"}
)


@dataclass
class _Scan:
    """What was found below one root."""

    root: Path
    images: list[tuple[bytes, int, int]] = field(default_factory=list)  # relative path, bytes, when it was written
    others: Counter[str] = field(default_factory=Counter)  # extension -> files that are no images
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> files
    skipped_first: dict[str, list[bytes]] = field(default_factory=dict)  # reason -> relative paths

    def leave_out(self, relative: bytes, reason: str) -> None:
        """Count what is not taken, and keep the first names: folders of strangers may hold millions."""
        self.skipped[reason] += 1
        names = self.skipped_first.setdefault(reason, [])
        if len(names) < _NAMED:
            names.append(relative or b".")


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
            raise InputError(f"{printable(os.fsencode(root))} does not exist")
        if not root.is_dir():
            raise InputError(f"{printable(os.fsencode(root))} is a file, not a folder of images")
        scans.append(_scan(root))
    name = ", ".join(printable(os.fsencode(root)) for root in roots)
    skipped: Counter[str] = sum((scan.skipped for scan in scans), Counter())
    prefixes = [b"" if len(scans) == 1 else b"%d/" % number for number in range(len(scans))]
    named = _first_left_out(scans, prefixes)
    if not any(scan.images for scan in scans):
        raise InputError(_nothing_found(name, sum((scan.others for scan in scans), Counter()), skipped, named))
    for scan in scans:
        scan.images.sort()
    written = hashlib.sha256(repr([[time for _, _, time in scan.images] for scan in scans]).encode()).hexdigest()
    labels, class_names = _folder_labels([path for scan in scans for path, *_ in scan.images])
    if class_names is not None and len(scans) == 1:
        _warn_of_splits(name, class_names, [path for path, *_ in scans[0].images])
    digest = hashlib.sha256()
    for prefix, scan in zip(prefixes, scans, strict=True):
        for path, size, _ in scan.images:
            digest.update(prefix + path + b"\0" + str(size).encode() + b"\n")
    names = _Names([path for scan in scans for path, *_ in scan.images])
    starts = np.cumsum([len(scan.images) for scan in scans]).tolist()
    folders = [(os.fsencode(root), os.path.realpath(os.fsencode(root))) for root in roots]

    def content(i: int) -> bytes:
        root, real_root = folders[bisect_right(starts, i)]
        # A link that was put there since may lead out of the folder.
        target = os.path.realpath(os.path.join(root, names[i]))
        if os.path.commonpath([real_root, target]) != real_root:
            raise BadImage("unreadable", "a link out of the folder")
        return read_file(target)

    def title(i: int) -> str:
        return printable(prefixes[bisect_right(starts, i)] + names[i])

    return Source(
        name,
        starts[-1],
        lambda i: decode(content(i)),
        title,
        digest.hexdigest(),
        labels,
        class_names,
        dict(skipped),
        unlabelled=_loose([path for scan in scans for path, *_ in scan.images]),
        revision=written,
        content=content,
        skipped_first=named,
    )


def _first_left_out(scans: list[_Scan], prefixes: list[bytes]) -> dict[str, tuple[str, ...]]:
    """The first names for each reason, for people."""
    named: dict[str, tuple[str, ...]] = {}
    for scan, prefix in zip(scans, prefixes, strict=True):
        for reason, paths in scan.skipped_first.items():
            named[reason] = (*named.get(reason, ()), *(printable(prefix + path) for path in paths))[:_NAMED]
    return named


class _Names:
    """Byte strings in one piece: as a list, those of a million images would take five times as much memory."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self._text = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __getitem__(self, i: int) -> bytes:
        return self._text[self._ends[i] : self._ends[i + 1]]


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
            scan.leave_out(relative, "unreadable folder")
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
                scan.leave_out(relative, "link out of the folder")
                return
    except OSError:
        scan.leave_out(relative, "dangling link")
        return
    if stat.S_ISDIR(status.st_mode):
        waiting.append(relative)
        return
    extension = os.path.splitext(entry.name)[1].decode("ascii", "replace").lower()
    if extension not in EXTENSIONS:
        scan.others[extension or "without extension"] += 1
        if extension in NOT_READ:
            scan.leave_out(relative, f"{_UNREAD}{extension} file")
    elif not stat.S_ISREG(status.st_mode):
        scan.leave_out(relative, "not a regular file")
    else:
        scan.images.append((relative, status.st_size, status.st_mtime_ns))


def _folder_labels(paths: list[bytes]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    if not all(b"/" in path for path in paths):
        return None, None
    folders = [path.split(b"/", 1)[0] for path in paths]
    names = sorted(set(folders))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[folder] for folder in folders]), tuple(printable(name) for name in names)


def _warn_of_splits(name: str, class_names: tuple[str, ...], paths: list[bytes]) -> None:
    """Say where `train` and `val` are taken for classes, although the classes are folders inside."""
    usual = len(class_names) > 1 and SPLIT_NAMES.issuperset(map(str.lower, class_names))
    if not usual or not all(path.count(b"/") > 1 for path in paths):
        return
    learned = next((folder for folder in class_names if folder.lower().startswith("train")), class_names[0])
    other = next(folder for folder in class_names if folder != learned)
    warnings.warn(
        f"{', '.join(class_names)} in {name} seem to be splits, and are taken for classes, as first-level folders are: "
        f"give {name}/{learned} as the data and {name}/{other} as the test set",
        stacklevel=2,
    )


def _loose(paths: list[bytes]) -> str:
    """The few images that lie beside class folders, and so take the labels from all others."""
    loose = [path for path in paths if b"/" not in path]
    if not 0 < len(loose) < len(paths) / 2:
        return ""
    lie = f"{len(loose)} of {len(paths)} images lie" if len(loose) > 1 else f"one of {len(paths)} images lies"
    return f"{lie} in no class folder ({printable(loose[0])}{', ...' if len(loose) > 1 else ''})"


def _nothing_found(name: str, others: Counter[str], skipped: Counter[str], named: dict[str, tuple[str, ...]]) -> str:
    found = [f"{count} {extension}" for extension, count in others.most_common(4)]
    skipped = Counter({reason: count for reason, count in skipped.items() if not reason.startswith(_UNREAD)})
    for reason, count in skipped.most_common(2):
        found.append(f"{count} x {reason} ({named[reason][0]}{', ...' if count > 1 else ''})")
    there = f"it holds {', '.join(found)}" if found else "it is empty"
    return f"no images found in {name}: {there}; accepted are {' '.join(sorted(EXTENSIONS))}"
