"""What is in a tar file, as a table by which its images are read.

Python's tarfile takes a damaged header for the end of the file (python/cpython#120740): the samples behind it are
lost, and nobody is told. Here each byte belongs to a header, to data or to the end mark, or the file is refused.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nnclr.data.folder import EXTENSIONS
from nnclr.data.images import printable
from nnclr.errors import InputError

BLOCK = 512
_MOST_HEADER = 1 << 20  # bytes of a long name or of pax records
_MOST_LABEL = 1 << 20  # bytes of a .cls or .json member
_LONGEST_NAME, _LONGEST_LABEL = 240, 240  # bytes in a table
MOST_ROW = 8 + 8 + _LONGEST_NAME + _LONGEST_LABEL + 4  # bytes
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # of WebDataset: up to the first dot of the file's name

Read = Callable[[int, int], bytes]
"""(offset, size) -> so many bytes, fewer at the end of the file."""


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int  # of its first byte
    size: int


def members(read: Read, length: int, where: str) -> Iterator[Member]:
    """The regular files of a tar file (ustar, pax or GNU) in their order; links, folders and devices are passed over.

    Args:
        read: of the file.
        length: its bytes.
        where: its name, for messages.

    Raises:
        InputError: if it is compressed, cut, damaged or sparse; the message names the byte.
    """
    position = 0
    told: dict[str, Any] = {}
    while True:
        block = read(position, BLOCK)
        if len(block) < BLOCK:
            raise _damaged(where, position, "it ends there without the end mark of a tar file")
        if block.count(0) == BLOCK:
            _require_end(read, position, length, where)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if position == 0:
                raise InputError(_no_tar(where, block)) from error
            raise _damaged(where, position, "there is no valid header") from error
        told, extended = ({}, told) if header.type not in _EXTENDING else (told, {})
        size = 0 if header.type in _WITHOUT_DATA else int(extended.get("size", header.size))
        data, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if size < 0 or position > length:
            raise _damaged(where, data - BLOCK, f"{printable(_bytes(header.name))} ends behind the end of the file")
        if header.type in _EXTENDING:
            told |= _extension(header.type, read, data, size, where)
        elif header.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse") for name in extended):
            raise InputError(f"{where} holds a sparse file at byte {data - BLOCK}; write it without --sparse")
        elif header.type in tarfile.REGULAR_TYPES:
            yield Member(extended.get("path", header.name), data, size)


_EXTENDING = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def _extension(kind: bytes, read: Read, offset: int, size: int, where: str) -> dict[str, Any]:
    """What a header for the next header says of it: its path, its size."""
    if size > _MOST_HEADER:
        raise _damaged(where, offset - BLOCK, f"a header of {size} bytes is none")
    content = read(offset, size)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(content.partition(b"\0")[0])}
    told: dict[str, Any] = {}
    start = 0
    while start < len(content):
        length = re.match(rb"(\d{1,7}) ", content[start : start + 8])
        end = start + int(length[1]) if length is not None else 0
        if length is None or not start + length.end() < end <= len(content):
            raise _damaged(where, offset, "its pax records are no records")
        keyword, _, value = content[start + length.end() : end].rstrip(b"\n").partition(b"=")
        told[_text(keyword)] = _text(value)
        start = end
    if not re.fullmatch(r"[0-9]{1,18}", told.get("size", "0")):
        raise _damaged(where, offset, "its pax size is no number")
    return told if kind != tarfile.XGLTYPE else {}  # what is said of all files concerns none's place


def _require_end(read: Read, position: int, length: int, where: str) -> None:
    """Two zero blocks, and nothing behind them: a header that was overwritten by zeros is no end."""
    if length < position + 2 * BLOCK:
        raise _damaged(where, position, "it ends there without the end mark of a tar file")
    while position < length:
        chunk = read(position, 1 << 20)
        if chunk.count(0) != len(chunk):
            behind = position + len(chunk) - len(chunk.lstrip(b"\0"))
            raise _damaged(where, position, f"zeros stand for a header, and data follows at byte {behind}")
        if not chunk:
            raise _damaged(where, position, "it is shorter than it was")
        position += len(chunk)


def _damaged(where: str, position: int, what: str) -> InputError:
    return InputError(f"{where} is damaged at byte {position}: {what}; fetch or write this shard anew")


def _no_tar(where: str, block: bytes) -> str:
    if block.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return f"{where} is compressed, and no image in it can be found without reading all before it; unpack it"
    return f"{where} is no tar file, or its first header is damaged"


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# ---- tables ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """An image in a shard."""

    name: str
    offset: int
    size: int
    label: str  # text of its .cls; empty for none
    crc32: int = 0  # of its bytes


def make_table(rows: list[Row], crc32: bool = False) -> np.ndarray:
    """(n,) records with name, offset, size, label and, where asked for, crc32."""
    names = [_shortened(row.name, _LONGEST_NAME) for row in rows]
    labels = [row.label.encode() for row in rows]
    fields = [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("name", f"S{max(map(len, names), default=1) or 1}"),
        ("label", f"S{max(map(len, labels), default=1) or 1}"),
    ]
    columns: list[Any] = [[row.offset for row in rows], [row.size for row in rows], names, labels]
    if crc32:
        fields.append(("crc32", "<u4"))
        columns.append([row.crc32 for row in rows])
    table = np.zeros(len(rows), np.dtype(fields))
    for (name, _), values in zip(fields, columns, strict=True):
        table[name] = values
    return table


def valid_table(table: Any, length: int, crc32: bool = False) -> bool:
    """Whether an array that was read from a file can be a table of a tar file of so many bytes."""
    if not isinstance(table, np.ndarray) or table.ndim != 1 or table.dtype.names is None:
        return False
    kinds = {name: table.dtype[name].str[:2] for name in table.dtype.names}
    if kinds != {"offset": "<i", "size": "<i", "name": "|S", "label": "|S", **({"crc32": "<u"} if crc32 else {})}:
        return False
    offset, size = table["offset"], table["size"]
    return bool(np.all((offset >= BLOCK) & (size >= 0) & (size <= length) & (offset <= length - size)))


@dataclass
class _Sample:
    """Members with one key, as far as they matter."""

    image: Member | None = None
    cls: str | None = None
    json: str | None = None


def scan(read: Read, length: int, where: str) -> tuple[np.ndarray, int]:
    """The table of a WebDataset shard, and the number of samples without an image, which are not in it.

    Members whose names are equal up to the first dot make a sample. Its image is the member with the extension of an
    image format, its label the content of `.cls`, or "label" of `.json`.

    Raises:
        InputError: if the file is damaged (see `members`), a key comes twice, or a label is none.
    """
    samples: dict[str, _Sample] = {}
    last, left_out = "", 0
    for member in members(read, length, where):
        match = _KEY.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        if key != last and key in samples:
            raise InputError(f"{where} holds the key {_shown(key)} twice, so its samples cannot be told apart")
        last, sample = key, samples.setdefault(key, _Sample())
        if f".{extension}" in EXTENSIONS:
            if sample.image is not None:
                raise InputError(f"{where} holds two images with the key {_shown(key)}")
            sample.image = member
        elif extension == "cls":
            sample.cls = _label(read, member, where)
        elif extension == "json" and member.size <= _MOST_LABEL:
            sample.json = _json_label(read(member.offset, member.size))
    rows = []
    for sample in samples.values():
        if sample.image is None:
            left_out += 1
            continue
        label = sample.json if sample.cls is None else sample.cls
        name = printable(_bytes(sample.image.name))
        rows.append(Row(name, sample.image.offset, sample.image.size, label or ""))
    return make_table(rows), left_out


def _json_label(content: bytes) -> str:
    """What may be a label; a `.json` is often something else, so nothing in it is an error."""
    try:
        told = json.loads(content)
        label = told.get("label") if isinstance(told, dict) else None
        text = printable(str(label).encode("utf-8", "replace").strip()) if isinstance(label, (int, str)) else ""
    except (ValueError, RecursionError):
        return ""
    return text if len(text.encode()) <= _LONGEST_LABEL else ""


def _label(read: Read, member: Member, where: str) -> str:
    if member.size > _MOST_LABEL:
        raise InputError(f"{where}: {_shown(member.name)} has {member.size} bytes, too many for a label")
    text = printable(read(member.offset, member.size).strip())
    if len(text.encode()) > _LONGEST_LABEL:
        raise InputError(f"{where}: {_shown(member.name)} holds {len(text)} characters, too many for a label")
    return text


def _shown(name: str) -> str:
    return printable(_bytes(name))


def _shortened(name: str, most: int) -> bytes:
    """A name in at most so many bytes of UTF-8."""
    encoded = name.encode("utf-8", "backslashreplace")
    if len(encoded) <= most:
        return encoded
    return encoded[: most - 3].decode("utf-8", "ignore").encode() + b"..."
