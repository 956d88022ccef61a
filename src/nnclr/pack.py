"""`nnclr pack`: images in WebDataset tar shards with an index, written so that a kill costs one shard.

The images are shuffled once, by their number: all of them, or where they come in shards those of as many as are mixed
in training, too. A finished shard has a record in
`.pack/` beside it; a start goes on behind the last of these, and the folder is that of one uninterrupted go, byte for
byte. The index appears last: without it there is no data set.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nnclr import counter
from nnclr.checkpoint import lock, sync, write_atomically
from nnclr.data.ahead import ahead
from nnclr.data.decode import FORMATS, BadImage, decode
from nnclr.data.images import Source, safe, shown
from nnclr.data.shards import FORMAT, INDEX, KIND, UNFINISHED
from nnclr.data.source import open_source, refuse_inside
from nnclr.data.tar_index import BLOCK, Row, make_table
from nnclr.errors import DataError, InputError, Stopped, StorageError
from nnclr.interrupt import StopRequest
from nnclr.progress import Lines

_COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # format -> extension
_WIDEST_JPEG = 65500
_MB = 10**6
_FEW = 100  # unreadable images of a shard that never mean that the data is gone
_OVERHEAD = 6 * BLOCK  # of a sample with a label, and of the end mark


def pack(
    data: Any,
    out: str | Path,
    *,
    size: int | None = None,
    shard_size: int = 256,
    quality: int = 90,
    say: Callable[[str], None] = print,
) -> Path:
    """Write images as shards `OUT/shard-000000.tar`, ... that `open_source` and the webdataset library read.

    A sample is `KEY.jpg` (or `.png`, `.webp`) and, where there are labels, `KEY.cls` with the number of the class. KEY
    is the index of the image in its source. JPEG, PNG and WebP files that need no resizing are copied byte for byte;
    images without a file become PNG, all others JPEG. What cannot be read is listed in `OUT/bad_samples.jsonl`.

    Args:
        data: anything that `open_source` takes.
        out: folder; new, empty, or that of the same call before.
        size: pixels that the shorter side is reduced to; a smaller image stays as it is.
        shard_size: MB (10**6 bytes) that a shard has at most, if it holds more than one image.
        quality: of the JPEG files that are written, 1 to 100.
        say: takes the lines for people.

    Returns:
        out. A finished folder of the same data and settings is left as it is.

    Raises:
        InputError: if an argument is wrong, no image can be read, or the folder holds something else.
        DataError: if more than 100 images for a shard cannot be read, and fewer can.
        FolderInUseError: if another process writes there.
        StorageError: if the disk is full or read-only; finished shards stay.
        Stopped: after SIGINT or SIGTERM; finished shards stay.
    """
    out = Path(out)
    for name, value, most in (
        ("size", size, _WIDEST_JPEG),
        ("shard size", shard_size, 10**6),
        ("quality", quality, 100),
    ):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"a {name} of {value} is not between 1 and {most}")
    refuse_inside(data, out)
    source = open_source(data)
    facts = {
        "data": source.name,
        "data_fingerprint": source.fingerprint,
        "data_revision": source.revision,
        "size": size,
        "shard_size": shard_size,
        "quality": quality,
        "pillow": metadata.version("pillow"),
    }
    if _is_done(out, facts, say):
        return out
    folder = out / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{shown(folder)} could not be made: {error.strerror}") from error
    with lock(folder), StopRequest("stopping, with what is finished kept") as stop:
        if _is_done(out, facts, say):  # by the process that held the lock
            return out
        _claim(folder, facts)
        packer = _Packer(source, out, size, shard_size * _MB, quality, say, stop)
        try:
            records = packer.write_missing(_records(out))
            _finish(out, source, facts, records, say)
            shutil.rmtree(folder)
        except InputError:  # to go on would end the same way
            shutil.rmtree(folder, ignore_errors=True)
            for file in out.glob(".tmp-*"):
                file.unlink()
            with suppress(OSError):  # it is not empty
                out.rmdir()
            raise
        except OSError as error:
            raise StorageError(
                f"{shown(out)} could not be written: {error.strerror or error}; finished shards are kept, make room "
                "and run the same command again"
            ) from error
    return out


# ---- the folder --------------------------------------------------------------------------------------------


def _is_done(out: Path, facts: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the folder holds this data set already.

    Raises:
        InputError: if it holds something else.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise InputError(f"{shown(out)} is a file; name a folder for the shards")
    try:
        index = json.loads((out / INDEX).read_bytes())
        known = index["made_from"] if index["kind"] == KIND else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        if any(out.iterdir()) and not _is_begun(out):
            raise InputError(f"{shown(out)} is not empty and holds no shards; choose a new folder") from None
        return False
    if _differing(known, facts):
        raise InputError(f"{shown(out)} holds shards of {_differing(known, facts)}; choose a new folder, or delete it")
    if missing := [e["file"] for e in index["shards"] if not _has(out / e["file"], e["bytes"])]:
        raise InputError(
            f"{shown(out)}: {missing[0]} is missing or cut; restore it, or delete the folder and pack again"
        )
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # what a kill behind the last step left
    say(f"{shown(out)} is done already: it holds these images, packed in this way")
    return True


def _is_begun(out: Path) -> bool:
    """Whether a folder is one that was begun here: nothing of anybody else's may be written over or removed."""
    folder = out / UNFINISHED
    if folder.is_symlink() or not folder.is_dir():
        return False
    if _facts(folder) is not None:
        return True
    own = re.compile(r"\.lock|facts\.json|\d{6}\.json|\.tmp-.*\.json-\d+")
    return list(out.iterdir()) == [folder] and all(own.fullmatch(file.name) for file in folder.iterdir())


def _facts(folder: Path) -> dict[str, Any] | None:
    """What the unfinished shards are of; None where that cannot be read."""
    try:
        known = json.loads((folder / "facts.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return known if isinstance(known, dict) and "data_fingerprint" in known else None


def _differing(known: Any, facts: dict[str, Any]) -> str:
    """In what two differ; empty for nothing. Where the data lie is no matter."""
    if not isinstance(known, dict):
        return "something else"
    names = [name for name in facts if name != "data" and known.get(name) != facts[name]]
    return f"something else (other {', '.join(name.replace('_', ' ') for name in names)})" if names else ""


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Write into the folder of records what they are of, or refuse if they are another's."""
    known = _facts(folder)
    if known is None:
        for file in folder.glob("*.json"):  # of which images they are is not known
            file.unlink()
    elif _differing(known, facts):
        raise InputError(
            f"{shown(folder.parent)} holds unfinished shards of {_differing(known, facts)}; finish them with the "
            "command they were begun with, choose a new folder, or delete it"
        )
    write_atomically(folder / "facts.json", json.dumps(facts, indent=1).encode())
    for file in folder.parent.glob(".tmp-*"):
        file.unlink()


def _records(out: Path) -> list[dict[str, Any]]:
    """What is known of the finished shards, up to the first that is missing."""
    records: list[dict[str, Any]] = []
    while True:
        try:
            record = json.loads((out / UNFINISHED / f"{len(records):06d}.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return records
        if not (_has(out / record["file"], record["bytes"]) and (out / record["index"]).is_file()):
            return records
        records.append(record)


def _finish(
    out: Path, source: Source, facts: dict[str, Any], records: list[dict[str, Any]], say: Callable[[str], None]
) -> None:
    """Write what concerns all shards; the index last."""
    bad = sorted(line for record in records for line in record["bad"])
    images = sum(record["images"] for record in records)
    if bad:
        lines = [json.dumps({"id": i, "image": image, "reason": reason}) + "\n" for i, image, reason in bad]
        write_atomically(out / "bad_samples.jsonl", "".join(lines).encode())
    index = {
        "kind": KIND,
        "format": FORMAT,
        "images": images,
        "class_names": None if source.labels is None else list(source.class_names or ()),
        "made_from": facts,
        "shards": [{name: record[name] for name in _ENTRY} for record in records],
    }
    write_atomically(out / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    sync(out)
    size = sum(record["bytes"] for record in records) / _MB
    say(f"{shown(out)}: {images} images in {len(records)} shard{'s' * (len(records) > 1)}, {size:.4g} MB")
    if bad:
        say(f"{len(bad)} images could not be read, see {shown(out / 'bad_samples.jsonl')}: {bad[0][1]} ({bad[0][2]})")


_ENTRY = ("file", "bytes", "sha256", "images", "index", "index_sha256")


# ---- shards ------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """A shard that is being written."""

    path: Path
    first: int  # place of its first image in the order
    rows: list[Row] = field(default_factory=list)
    bad: list[list[Any]] = field(default_factory=list)  # id, name, reason
    size: int = 0

    def __post_init__(self) -> None:
        self.file = open(self.path, "wb")  # noqa: SIM115  # `write_missing` closes it
        self.digest = hashlib.sha256()

    def add(self, key: str, name: str, sample: "_Sample", label: str | None) -> None:
        """Append an image and its label."""
        if label is not None:
            self._member(f"{key}.cls", label.encode())
        offset = self._member(f"{key}.{sample.extension}", sample.content)
        self.rows.append(Row(name, offset, len(sample.content), label or "", zlib.crc32(sample.content)))

    def _member(self, name: str, content: bytes) -> int:
        header = tarfile.TarInfo(name)  # the same bytes whoever packs whenever: owner and time are 0
        header.size = len(content)
        offset = self.size + BLOCK
        self._write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK))
        return offset

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def finish(self) -> None:
        """End the tar file and have it on the disk."""
        self._write(bytes(2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class _Sample(NamedTuple):
    content: bytes
    extension: str


@dataclass(frozen=True)
class _Packer:
    """What writes the shards of a source one after the other."""

    source: Source
    out: Path
    size: int | None
    most: int  # bytes of a shard
    quality: int
    say: Callable[[str], None]
    stop: StopRequest

    def write_missing(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Go on behind the shards that are there, and return the records of all."""
        source, n = self.source, len(self.source)
        order = counter.block_permutation(0, 0, (n,) if source.blocks is None else source.blocks, source.window)
        start = records[-1]["stop"] if records else 0
        if start:
            self.say(f"packing {source.name}: {start} of {n} images are there from before")
        shard = self._shard(len(records), start)
        lines = Lines(f"packing {source.name}", n, start, self.say)
        try:
            for position, sample in enumerate(ahead(self._sample, map(int, order[start:])), start):
                i = int(order[position])
                if self.stop.asked:
                    raise Stopped(
                        f"stopped by {self.stop.asked}: finished shards are kept, the same command goes on with them"
                    )
                if isinstance(sample, str):
                    shard.bad.append([i, source.describe(i), sample])
                    self._refuse_lost(shard)
                    continue
                if shard.rows and shard.size + len(sample.content) + _OVERHEAD > self.most:
                    records.append(self._keep(shard, len(records), position))
                    shard = self._shard(len(records), position)
                label = None if source.labels is None else str(source.labels[i])
                shard.add(f"{i:09d}", source.describe(i), sample, label)
                lines.at(position + 1)
            if shard.rows:
                return [*records, self._keep(shard, len(records), n)]
        finally:
            shard.file.close()
        shard.path.unlink()
        if records:
            records[-1]["bad"] += shard.bad
            return records
        _, image, reason = shard.bad[0]
        raise InputError(f"none of the {n} images of {source.name} can be read; the first is {image} ({reason})")

    def _shard(self, number: int, first: int) -> _Shard:
        return _Shard(self.out / f".tmp-shard-{number:06d}.tar", first)

    def _keep(self, shard: _Shard, number: int, stop: int) -> dict[str, Any]:
        """Put a shard and its table in their place, and then the record that says so."""
        shard.finish()
        table = io.BytesIO()
        np.save(table, make_table(shard.rows, crc32=True), allow_pickle=False)
        record = {
            "first": shard.first,
            "stop": stop,
            "file": f"shard-{number:06d}.tar",
            "bytes": shard.size,
            "sha256": shard.digest.hexdigest(),
            "images": len(shard.rows),
            "index": f"shard-{number:06d}.index.npy",
            "index_sha256": hashlib.sha256(table.getvalue()).hexdigest(),
            "bad": shard.bad,
        }
        write_atomically(self.out / str(record["index"]), table.getvalue())
        shard.path.replace(self.out / str(record["file"]))
        sync(self.out)
        write_atomically(self.out / UNFINISHED / f"{number:06d}.json", json.dumps(record).encode())
        return record

    def _refuse_lost(self, shard: _Shard) -> None:
        """A hundred bad images are listed; more, if they are more than the good ones, mean that the data is gone."""
        if len(shard.bad) > max(_FEW, len(shard.rows)):
            _, image, reason = shard.bad[0]
            raise DataError(
                f"{len(shard.bad)} images of {self.source.name} for one shard cannot be read, and "
                f"{len(shard.rows)} can; the first is "
                f"{image} ({reason}): bring the images back and run the same command again"
            )

    def _sample(self, i: int) -> _Sample | str:
        """The file to store for an image, or why there is none."""
        try:
            with self.source.reading(i):
                content = None if self.source.content is None else self.source.content(i)
            pixels = self.source.read(i) if content is None else decode(content)
        except BadImage as error:
            return safe(error)
        height, width = pixels.shape[:2]
        image = Image.fromarray(pixels)
        if self.size is not None and min(height, width) > self.size:
            scale = self.size / min(height, width)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        elif content is None:
            return _encoded(image, "PNG")
        elif (extension := _COPIED.get(_format(content))) is not None:
            return _Sample(content, extension)
        return _encoded(image, "JPEG" if max(image.size) <= _WIDEST_JPEG else "PNG", quality=self.quality)


def _format(content: bytes) -> str:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return image.format or ""


def _encoded(image: Image.Image, kind: str, **settings: Any) -> _Sample:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return _Sample(file.getvalue(), _COPIED[kind])
