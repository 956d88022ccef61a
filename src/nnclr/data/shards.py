"""Images in WebDataset tar shards, on this machine or in object storage, read at random by an index.

`nnclr pack` writes the index beside the shards: `index.json` with the size, SHA-256 and number of images of each, and
one table a shard with place, size, CRC-32, label and name of each image. A shard without an index is gone through
once, and its table is kept in the cache.
"""

import hashlib
import io
import json
import os
import re
import tempfile
import warnings
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.data.array_file import UNREADABLE
from nnclr.data.decode import MAX_BYTES, BadImage, decode
from nnclr.data.images import MOST_CLASS, Source, classes_of_numbers, printable, safe, shown
from nnclr.data.storage import (
    File,
    NoSuchFileError,
    RemoteFile,
    cache_folder,
    files,
    in_passing,
    is_remote,
    listed,
)
from nnclr.data.tar_index import MOST_ROW, scan, valid_table
from nnclr.errors import InputError

INDEX, KIND, FORMAT = "index.json", "nnclr shards", 1
UNFINISHED = ".pack"  # folder in a folder of shards that are being written
WINDOW_BYTES = 8 << 30  # of shards whose images are shuffled together; half of what the cache of remote ones holds
_ENTRY = {  # of a shard in the index; a name with a slash would lead out of the folder
    "file": r"[\w-]+\.tar",
    "bytes": r"\d{1,15}",
    "sha256": "[0-9a-f]{64}",
    "images": r"\d{1,12}",
    "index": r"[\w.-]+\.npy",
    "index_sha256": "[0-9a-f]{64}",
}
_MOST_INDEX = 1 << 25  # bytes of an index.json
_MOST_HEADER = 1 << 12  # bytes of a table before its rows


@dataclass(frozen=True)
class Shard:
    """A tar file and what is in it."""

    file: File
    table: np.ndarray  # see `tar_index.make_table`
    left_out: int = 0  # samples without an image
    class_names: tuple[str, ...] | None = None
    indexed: bool = False  # by `nnclr pack`; then the file has a SHA-256


def is_shard_folder(text: str) -> bool:
    """Whether a path or an address is that of a folder that `nnclr pack` wrote."""
    return (is_remote(text) or os.path.isdir(text)) and _read_index(text.rstrip("/")) is not None


def shard_source(texts: Sequence[str]) -> Source:
    """The images of shards, in the order of the shards.

    Labels are the texts of the `.cls` members, or "label" of the `.json` members: whole numbers from 0 as they are,
    anything else numbered in sorted order; none where a sample lacks one.

    Args:
        texts: tar files, patterns of them, or folders that `nnclr pack` wrote; paths or addresses.

    Raises:
        InputError: if a shard is missing, damaged or not the one that its index describes, or there is no image.
    """
    name = listed(texts)
    shards = _find_shards(texts)
    (often, times), *_ = Counter(shard.file.name for shard in shards).most_common(1)
    if times > 1:
        raise InputError(f"{often} is named {times} times")
    counts = [len(shard.table) for shard in shards]
    skipped = Counter({"sample without an image": sum(shard.left_out for shard in shards)})
    if sum(counts) == 0:
        raise InputError(f"no images found in {name}: {skipped.total()} samples without one")
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    labels, class_names = _labels(shards)

    def place(i: int) -> tuple[Shard, np.void]:
        number = bisect_right(starts, i) - 1
        return shards[number], shards[number].table[i - starts[number]]

    def content(i: int) -> bytes:
        return _content(*place(i))

    def title(i: int) -> str:
        shard, row = place(i)
        own = printable(row["name"])  # an index may be anybody's
        return own if shard.indexed else f"{shard.file.name.rpartition('/')[2]}/{own}"

    return Source(
        name,
        starts[-1],
        lambda i: decode(content(i)),
        title,
        _fingerprint(shards),
        labels,
        class_names,
        dict(+skipped),
        revision=hashlib.sha256("\n".join(s.file.sha256 or s.file.stamp for s in shards).encode()).hexdigest(),
        content=content,
        blocks=tuple(counts),
        window=max(1, WINDOW_BYTES // max(shard.file.size for shard in shards)),
    )


def _content(shard: Shard, row: np.void) -> bytes:
    """The bytes of an image, as they were packed."""
    size = int(row["size"])
    if size > MAX_BYTES:
        raise BadImage("too_large", f"{size >> 20} MiB")
    try:
        content = shard.file.read(int(row["offset"]), size)
    except OSError as error:
        raise BadImage("unreadable", f"{shard.file.name}: {error.strerror or error}") from error
    if len(content) != size:
        raise BadImage("truncated", f"{shard.file.name} has become shorter")
    if shard.indexed and zlib.crc32(content) != row["crc32"] and isinstance(shard.file, RemoteFile):
        shard.file.drop_copy()
        try:
            content = shard.file.range(int(row["offset"]), size)
        except OSError as error:
            raise BadImage("unreadable", f"{shard.file.name}: {error.strerror or error}") from error
    if shard.indexed and zlib.crc32(content) != row["crc32"]:
        raise BadImage("unreadable", f"damaged since it was packed in {shard.file.name}")
    return content


def _fingerprint(shards: list[Shard]) -> str:
    """Over sizes, places and labels: the same with and without an index, wherever the shards lie."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.file.size} {len(shard.table)}\n".encode())
        for field in ("offset", "size"):
            digest.update(np.ascontiguousarray(shard.table[field]).tobytes())
        digest.update(b"\n".join(shard.table["label"].tolist()))
    return digest.hexdigest()


def _labels(shards: list[Shard]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    texts = [shard.table["label"] for shard in shards]
    if any((some == b"").any() for some in texts):
        return None, None
    known = shards[0].class_names
    if any(shard.class_names != known for shard in shards):
        return _labels_by_name(shards)
    try:
        numbers = np.concatenate([some.astype(np.int64) for some in texts])
    except (ValueError, OverflowError):
        numbers = np.array([-1])
    if numbers.min() >= 0 and numbers.max() < (MOST_CLASS if known is None else len(known)):
        return classes_of_numbers(numbers) if known is None else (numbers, known)
    classes, labels = np.unique(np.concatenate(texts), return_inverse=True)
    return labels.astype(np.int64), tuple(printable(name) for name in classes)


def _labels_by_name(shards: list[Shard]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of packs that number their classes differently, through the names of the classes."""
    classes = sorted({name for shard in shards for name in shard.class_names or ()})
    numbers = {name: i for i, name in enumerate(classes)}
    labels = []
    for shard in shards:
        if shard.class_names is None:
            raise InputError(
                f"the classes of {shard.file.name} have no names, and those of other shards have, so they cannot be "
                "told to be the same; pack its shards into a folder of their own first, which gives names to them"
            )
        own = np.array([numbers[name] for name in shard.class_names])
        try:
            labels.append(own[shard.table["label"].astype(np.uint64)])
        except (ValueError, OverflowError, IndexError) as error:
            raise InputError(f"{shard.file.name} has a label without a name in its {INDEX}; pack anew") from error
    return np.concatenate(labels).astype(np.int64), tuple(classes)


# ---- finding -----------------------------------------------------------------------------------------------


def _find_shards(texts: Sequence[str]) -> list[Shard]:
    """The shards that paths, addresses and patterns stand for, each with its table.

    Raises:
        InputError: if one is missing or damaged, or its size is not that of its index.
    """
    jobs = _find_files(texts)
    bare = [file for file, index in jobs if index is None or _name(file) not in index.entries]
    if any(isinstance(file, RemoteFile) for file in bare):
        warnings.warn(f"shards of {listed(texts)} have no index: each is read through once to make one", stacklevel=2)
    with ThreadPoolExecutor(min(8, len(jobs))) as pool:
        return list(pool.map(lambda job: _open_shard(*job), jobs))


def _find_files(texts: Sequence[str]) -> "list[tuple[File, _Index | None]]":
    """The files of shards, each with the index of its folder."""
    found: list[File] = []
    indices: dict[str, _Index | None] = {}
    for text in texts:
        if text.endswith(".tar"):
            found += files(text)
            continue
        folder = text.rstrip("/")
        index = _read_index(folder, needed=True)
        assert index is not None
        with ThreadPoolExecutor(8) as pool:
            own = [some[0] for some in pool.map(lambda name, at=folder: files(f"{at}/{name}"), index.entries)]
        found += own
        indices |= {_folder(file): index for file in own}
    for folder in dict.fromkeys(map(_folder, found)):
        if folder not in indices:
            indices[folder] = _read_index(folder)
    return [(file, indices[_folder(file)]) for file in found]


def indexed_files(data: str) -> list[File]:
    """Those shards of DATA, as `open_source` takes it, whose SHA-256 is known."""
    text = data.partition("?")[0]
    jobs = _find_files([text]) if text.endswith(".tar") or is_shard_folder(text) else []
    known = [(file, index.entries[_name(file)]) for file, index in jobs if index and _name(file) in index.entries]
    for file, entry in known:
        file.sha256 = entry["sha256"]
    return [file for file, _ in known]


def _folder(file: File) -> str:
    folder, slash, _ = file.address.rpartition("/")
    return folder or slash or "."


def _name(file: File) -> str:
    return file.address.rpartition("/")[2]


@dataclass(frozen=True)
class _Index:
    """What an index.json says."""

    class_names: tuple[str, ...] | None
    entries: dict[str, dict[str, Any]]  # a shard's file name -> what is said of it


def _read_index(folder: str, needed: bool = False) -> _Index | None:
    """The index of a folder, or None where there is none of ours: without it, missing shards go unnoticed.

    Raises:
        InputError: if it is damaged or cannot be read, or the shards are not all written; where it is needed, also if
            there is none.
    """
    if not is_remote(folder) and os.path.isdir(os.path.join(folder, UNFINISHED)):
        raise InputError(f"{shown(folder)} is not packed to its end; run the same nnclr pack again")
    try:
        file = files(f"{folder}/{INDEX}")[0]
        told = _parsed(file)
        if not isinstance(told, dict) or told.get("kind") != KIND:
            raise NoSuchFileError(f"{file.name} is none of nnclr pack")
    except InputError as error:
        if needed:
            raise InputError(
                f"{shown(folder)} is no folder of nnclr pack ({safe(error)}); name other shards as in "
                f"{shown(folder)}/*.tar"
            ) from error
        if isinstance(error, NoSuchFileError):
            return None
        if is_remote(folder) and isinstance(error.__cause__, PermissionError):  # what S3 says of absent files, too
            warnings.warn(f"{safe(error)}; it is taken to be absent, and missing shards go unnoticed", stacklevel=2)
            return None
        raise
    if told.get("format") != FORMAT:
        raise InputError(f"{file.name} has format {told.get('format')}; this version reads format {FORMAT}")
    try:
        names = None if told["class_names"] is None else tuple(safe(name) for name in told["class_names"])
        entries = {entry["file"]: entry for entry in told["shards"]}
        for entry in entries.values():
            if not all(re.fullmatch(form, str(entry[key]), re.ASCII) for key, form in _ENTRY.items()):
                raise ValueError(f"what it says of {entry['file']}")
            entry["bytes"], entry["images"] = int(entry["bytes"]), int(entry["images"])
        images = sum(entry["images"] for entry in entries.values())
        if not images or images != told["images"] or len(entries) != len(told["shards"]):
            raise ValueError("its numbers do not add up")
    except ValueError as error:
        raise InputError(f"{file.name} is damaged ({safe(error)}); restore it, or pack anew") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file.name} is damaged; restore it, or pack anew") from error
    return _Index(names, entries)


def _parsed(file: File) -> Any:
    """What is in an index.json; None where it is too large for one of ours and does not look like one.

    Raises:
        InputError: if it cannot be read, or is no JSON.
    """
    try:
        if file.size > _MOST_INDEX and KIND.encode() not in file.read(0, 4096):
            return None
        if file.size <= _MOST_INDEX:
            return json.loads(file.read(0, file.size))
    except OSError as error:
        raise InputError(f"{file.name} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file.name} is damaged: it is no JSON; restore it, or pack anew; rename it if it is no index of shards"
        ) from error
    raise InputError(f"{file.name} has {file.size >> 20} MiB; an index has at most {_MOST_INDEX >> 20}; pack anew")


def _open_shard(file: File, index: _Index | None) -> Shard:
    entry = None if index is None else index.entries.get(_name(file))
    if index is None or entry is None:
        table, left_out = _scanned(file)
        return Shard(file, table, left_out)
    if file.size != entry["bytes"]:
        raise InputError(
            f"{file.name} has {file.size} bytes, and its index says {entry['bytes']}: it was cut or written anew; "
            "restore it, or pack the images into a new folder"
        )
    file.sha256 = entry["sha256"]
    table = _read_table(files(f"{_folder(file)}/{entry['index']}")[0], entry)
    return Shard(file, table, 0, index.class_names, indexed=True)


def _read_table(file: File, entry: dict[str, Any]) -> np.ndarray:
    """The table that `nnclr pack` wrote beside a shard; that of a remote one is kept in the cache.

    Raises:
        InputError: if it is not the table of the index.
    """
    kept = cache_folder() / f"{entry['index_sha256']}.npy" if isinstance(file, RemoteFile) else None
    content = b""
    if kept is not None:
        with suppress(OSError):
            content = kept.read_bytes()
    if not content or hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        try:
            content = file.read(0, file.size) if file.size <= _MOST_HEADER + MOST_ROW * entry["images"] else b""
        except OSError as error:
            raise InputError(f"{file.name} cannot be read: {error.strerror or error}") from error
        if kept is not None and hashlib.sha256(content).hexdigest() == entry["index_sha256"]:
            _keep(kept, content, file.name)
    try:
        if hashlib.sha256(content).hexdigest() == entry["index_sha256"]:
            table: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)  # no map: a file stays open for each
            if valid_table(table, entry["bytes"], crc32=True) and len(table) == entry["images"]:
                return table
    except UNREADABLE:  # no array, or one that is longer than it can be
        pass
    raise InputError(f"{file.name} is damaged: it is not the table that {INDEX} describes; restore it, or pack anew")


def _scanned(file: File) -> tuple[np.ndarray, int]:
    """The table of a shard without an index, and its samples without an image."""
    kept = cache_folder() / f"{hashlib.sha256(file.stamp.encode()).hexdigest()}.npz"
    try:
        with open(kept, "rb") as opened, np.load(opened, allow_pickle=False) as known:
            table, left_out = known["table"], int(known["left_out"])
        if valid_table(table, file.size):
            with suppress(OSError):
                os.utime(kept)
            return table, left_out
    except (  # none yet, or damaged in any way that a zip file can be: made anew
        OSError,
        ValueError,
        LookupError,
        EOFError,
        TypeError,
        RuntimeError,  # and NotImplementedError
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        pass
    try:
        table, left_out = scan(in_passing(file), file.size, file.name)
    except OSError as error:
        raise InputError(f"{file.name} cannot be read: {error.strerror or error}") from error
    content = io.BytesIO()
    np.savez(content, table=table, left_out=np.array(left_out))
    _keep(kept, content.getvalue(), file.name)
    return table, left_out


def _keep(path: Path, content: bytes, name: str) -> None:
    """Write a file of the cache so that a reader sees the whole of it or none; warn where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError:
            os.unlink(unfinished)
            raise
    except OSError as error:
        warnings.warn(f"{name} is not kept: {shown(path.parent)}: {error.strerror}", stacklevel=2)
