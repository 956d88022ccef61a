"""`nnclr embed`: the embeddings of all images of a source, in parts that survive a kill.

The rows are cut into fixed ranges. Each becomes a file in `.FILE.parts/` beside the output, with a hash over its
content and over everything that it depends on; no part needs another. A start computes the parts that are missing
or damaged and puts all of them together, so that the file is that of one uninterrupted go, byte for byte.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from nnclr import __version__, distributed
from nnclr.blotted import without_secrets
from nnclr.checkpoint import lock, write_atomically
from nnclr.data.ahead import Threads, threads_for
from nnclr.data.decode import BadImage
from nnclr.data.images import Source, cell, printable, shown
from nnclr.data.source import open_source
from nnclr.embeddings import Block, companions, header_of, open_embeddings, refuse_name, skipped_list, store
from nnclr.encoder import Encoder
from nnclr.errors import DataError, InputError, NNCLRError, NonFiniteError, Stopped, StorageError
from nnclr.evaluation.result import versions
from nnclr.interrupt import StopRequest
from nnclr.models.backbone import feature_dim
from nnclr.progress import Lines

_PART_ROWS = 2048  # at least; what a kill can cost
_FEW = 100  # unreadable images of a part that never mean that the folder is gone
_NAMES_ONLY = ("encoder", "data", "data_name")  # facts that say where things lie, not what they are


def embed_to_file(
    encoder: Encoder,
    data: Any,
    out: str | Path,
    *,
    dtype: str = "float32",
    batch_size: int = 256,
    num_workers: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Embed all images and write them to a file that `open_embeddings` opens; the same call goes on after a stop.

    In a job of several ranks each calls it and computes its share of the parts; they need one file system.

    Images that cannot be read have no row; they are listed in `FILE.parquet.skipped.csv` or `FILE.npy.skipped.csv`
    (id, path, reason). Memory is that of one part, of at least 2048 rows, whatever the number of images.

    Args:
        encoder: what makes the vectors.
        data: anything that `open_source` takes.
        out: `FILE.parquet` or `FILE.npy`.
        dtype: "float32" or "float16".
        batch_size: images at a time.
        num_workers: threads that decode; None for one a core, up to eight.
        say: takes the lines for people.

    Returns:
        out. A finished file of the same encoder, data and settings is left as it is.

    Raises:
        InputError: if an argument is wrong, no image can be read, a value does not fit float16, or the output or its
            unfinished parts come from something else; nothing is overwritten.
        FolderInUseError: if another process writes the same file.
        NonFiniteError: if the encoder gives a NaN or an infinity.
        StorageError: if the disk is full or read-only; finished parts stay.
        Stopped: after SIGINT or SIGTERM; finished parts stay.
    """
    out = Path(out)
    refuse_name(out)
    if dtype not in ("float32", "float16"):
        raise InputError(f"dtype {dtype} is neither float32 nor float16")
    if batch_size < 1:
        raise InputError(f"a batch size of {batch_size} is below 1")
    if num_workers is not None and num_workers < 0:
        raise InputError(f"{num_workers} workers are below 0")
    if distributed.rank() != 0:
        say = _silent
    source = open_source(data)
    facts = _facts(encoder, source, data, dtype, batch_size, out.suffix)
    distributed.agree({"encoder or set of images": _key(facts)})
    folder = out.with_name(f".{out.name}.parts")
    parts = _Parts(folder, _key(facts), feature_dim(encoder.module, encoder.image_size), np.dtype(dtype))
    ranges = _ranges(len(source), batch_size)
    with ExitStack() as stack:
        if distributed.from_main(lambda: _begin(parts, out, facts, say, stack)):
            return out
        answer = "stopping, with what is finished kept" if distributed.rank() == 0 else ""
        stop = stack.enter_context(StopRequest(answer))
        try:
            _compute_missing(parts, ranges, _Embedder(encoder, source, batch_size, num_workers, dtype), say, stop)
            distributed.barrier()
            distributed.from_main(lambda: _assemble(parts, ranges, source, out, facts, say))
        except (Stopped, StorageError, DataError):
            raise
        except NNCLRError:  # to go on would end the same way, and the parts would only be in the way
            if distributed.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return out


def _silent(text: str) -> None:
    """Rank 0 speaks for all."""


def _begin(parts: "_Parts", out: Path, facts: dict[str, Any], say: Callable[[str], None], stack: ExitStack) -> bool:
    """Claim the folder of parts until the stack is left; True where the file is done already."""
    if _is_done(out, parts.folder, facts, say):
        return True
    try:
        parts.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{shown(parts.folder)} could not be made: {error.strerror}") from error
    stack.enter_context(lock(parts.folder))
    if _is_done(out, parts.folder, facts, say):  # by the process that held the lock
        return True
    _claim(parts, out, facts)
    return False


@dataclass(frozen=True)
class _Parts:
    """The folder of finished parts: NUMBER.bin holds the vectors, NUMBER.json the rest and the hash of both."""

    folder: Path
    key: str
    dimension: int
    dtype: np.dtype[Any]

    def read(self, rows: range) -> tuple[np.ndarray, list[tuple[int, str]]] | None:
        """Vectors and skipped (id, reason) of a range of rows, or None if the part is missing or damaged."""
        binary, text = self._files(rows)
        try:
            content, record = binary.read_bytes(), json.loads(text.read_bytes())
            if _digest(self.key, rows, record["skipped"], content) != record["sha256"]:
                return None
            vectors = np.frombuffer(content, self.dtype).reshape(-1, self.dimension)
            return vectors, [(i, reason) for i, reason in record["skipped"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, rows: range, vectors: np.ndarray, skipped: list[tuple[int, str]]) -> None:
        """Keep a part; it exists once its `.json` does."""
        binary, text = self._files(rows)
        content = vectors.tobytes()
        record = {
            "first": rows.start,
            "last": rows.stop - 1,
            "skipped": skipped,
            "sha256": _digest(self.key, rows, skipped, content),
        }
        write_atomically(binary, content)
        write_atomically(text, json.dumps(record).encode())

    def _files(self, rows: range) -> tuple[Path, Path]:
        return self.folder / f"{rows.start:010d}.bin", self.folder / f"{rows.start:010d}.json"


def damaged_parts(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Each finished part in the folder of an unfinished file of embeddings, and what is wrong with it."""
    try:
        facts = json.loads((folder / "facts.json").read_bytes())
        parts = _Parts(folder, _key(facts), 1, np.dtype(facts["dtype"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        yield folder / "facts.json", "it cannot be read; nnclr embed begins anew"
        return
    for text in sorted(folder.glob("[0-9]*.json")):
        try:
            record = json.loads(text.read_bytes())
            whole = parts.read(range(record["first"], record["last"] + 1)) is not None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            whole = False
        yield text, None if whole else "its vectors are not those that were written; nnclr embed makes them anew"


@dataclass(frozen=True)
class _Embedder:
    """What turns a range of rows into vectors; it keeps nothing from one range to the next."""

    encoder: Encoder
    source: Source
    batch_size: int
    num_workers: int | None
    dtype: str

    def batches(self, rows: range, pool: Threads) -> Iterator[tuple[np.ndarray, list[tuple[int, str]]]]:
        """Vectors of the readable images of a batch, (b, d), and the id and reason of every other image.

        The next batch is decoded while this one is embedded.
        """
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        for batch, decoded in zip(batches, pool.map_batches(self._image, batches), strict=True):
            skipped = [(i, image) for i, image in zip(batch, decoded, strict=True) if isinstance(image, str)]
            yield self._vectors(batch, decoded), skipped

    def _image(self, i: int) -> np.ndarray | str:
        """The view of an image, (3, s, s) uint8, or why there is none."""
        try:
            return self.encoder.view(self.source.read(i))
        except BadImage as error:
            return printable(str(error).encode("utf-8", "surrogateescape"))

    def _vectors(self, batch: range, decoded: list[np.ndarray | str]) -> np.ndarray:
        good = [row for row, image in enumerate(decoded) if not isinstance(image, str)]
        exact = self.encoder.embed_views([None if isinstance(image, str) else image for image in decoded])[good]
        for row, vector in zip(good, exact, strict=True):
            if not np.isfinite(vector).all():
                image = self.source.describe(batch[row])
                raise NonFiniteError(f"the encoder gives a value that is not finite for {image}; nothing was written")
        largest = float(np.abs(exact).max(initial=0))
        if self.dtype == "float16" and largest >= 65520:  # what rounds to infinity
            raise InputError(f"an embedding holds {largest:.6g} and float16 ends at 65504; use float32")
        vectors: np.ndarray = exact.astype(self.dtype)
        return vectors


def _facts(encoder: Encoder, source: Source, data: Any, dtype: str, batch_size: int, suffix: str) -> dict[str, Any]:
    """Everything that the rows depend on, and the names under which encoder and data are opened again."""
    used = {"nnclr": __version__, "pillow": metadata.version("pillow"), **versions()}
    if suffix == ".parquet":
        used["pyarrow"] = metadata.version("pyarrow")
    facts = {
        "encoder": _absolute(encoder.name) if encoder.name else None,
        "encoder_fingerprint": encoder.fingerprint,
        "architecture": hashlib.sha256(str(encoder.module).encode()).hexdigest(),
        "preprocessing": encoder.preprocessing,
        "device": encoder.device.type,  # other devices round in another way
        "data": _data_text(data),
        "data_name": source.name,
        "data_fingerprint": source.fingerprint,
        "data_revision": source.revision,
        "dtype": dtype,
        "batch_size": batch_size,
        "versions": used,
    }
    loaded: dict[str, Any] = json.loads(json.dumps(facts))
    return loaded


def _data_text(data: Any) -> Any:
    """DATA as a text that opens it from anywhere, a list of them, or None."""
    if isinstance(data, (list, tuple)) and all(isinstance(part, (str, os.PathLike)) for part in data):
        return [os.path.abspath(part) for part in data]
    if not isinstance(data, (str, os.PathLike)):
        return None
    text = os.fspath(data)
    return text if text.partition("?")[0] == "demo-photos" else without_secrets(_absolute(text))


def _absolute(text: str) -> str:
    """A name of an encoder or of data with the files in it as absolute paths."""
    head, mark, query = text.partition("?")
    for scheme in ("timm:local-dir:", "checkpoint:", ""):
        if head.startswith(scheme) and os.path.exists(head.removeprefix(scheme)):
            head = scheme + os.path.abspath(head.removeprefix(scheme))
            break
    pairs = [pair.partition("=") for pair in query.split("&")] if mark else []
    values = [n + e + (os.path.abspath(v) if n == "weights" and os.path.exists(v) else v) for n, e, v in pairs]
    return head + mark + "&".join(values)


def _key(facts: dict[str, Any]) -> str:
    told = {name: value for name, value in facts.items() if name not in _NAMES_ONLY}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(key: str, rows: range, skipped: Any, content: bytes) -> str:
    head = json.dumps([key, rows.start, rows.stop, skipped]).encode()
    return hashlib.sha256(head + b"\0" + content).hexdigest()


def _ranges(n: int, batch_size: int) -> list[range]:
    """The rows of each part: whole batches, so that a batch is the same whoever computes it."""
    size = batch_size * -(-_PART_ROWS // batch_size)
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _differing(known: dict[str, Any], asked: dict[str, Any]) -> str:
    names = [name for name in asked if name not in _NAMES_ONLY and known.get(name) != asked[name]]
    return ", ".join(name.replace("_", " ") for name in names)


def _is_done(out: Path, folder: Path, facts: dict[str, Any], say: Callable[[str], None]) -> bool:
    if not out.exists():
        _refuse_companions(out, facts)
        return False
    if not (known := header_of(out)):
        raise InputError(f"{shown(out)} exists and is no file of embeddings; choose another --out")
    if differing := _differing(known, facts):
        raise InputError(
            f"{shown(out)} exists and is not what is asked for (other {differing}); choose another --out, or "
            "delete it first"
        )
    if out.suffix == ".npy":  # the facts are another file's
        open_embeddings(out)
    shutil.rmtree(folder, ignore_errors=True)  # what a kill behind the last step left
    say(f"{shown(out)} is done already: it holds these images, embedded by this encoder")
    return True


def _refuse_companions(out: Path, facts: dict[str, Any]) -> None:
    """Files beside `FILE.npy` are replaced only if a kill between the last steps left them there."""
    ids, described = companions(out)
    for file in (ids, described) if out.suffix == ".npy" else ():
        if file.exists() and _differing(header_of(out), facts):
            raise InputError(
                f"{shown(file)} exists, and would be written with {out.name}; choose another --out, or delete it"
            )


def _claim(parts: _Parts, out: Path, facts: dict[str, Any]) -> None:
    """Write into the folder of parts whose they are, or refuse if they are another's."""
    file = parts.folder / "facts.json"
    try:
        known = json.loads(file.read_bytes())
        differing = _differing(known, facts) if isinstance(known, dict) else ""
    except (OSError, ValueError, RecursionError):  # none yet, or damaged: each part's hash depends on its facts too
        differing = ""
    if differing:
        raise InputError(
            f"{shown(parts.folder)} holds unfinished parts of something else (other {differing}); finish that with "
            f"the command it was begun with, delete the folder, or choose another --out than {shown(out)}"
        )
    write_atomically(file, json.dumps(facts, indent=1).encode())


def _compute_missing(
    parts: _Parts, ranges: list[range], embedder: _Embedder, say: Callable[[str], None], stop: StopRequest
) -> None:
    name = embedder.source.name if distributed.world_size() == 1 else f"this process's part of {embedder.source.name}"
    rank, ranks = distributed.rank(), distributed.world_size()
    missing = [rows for rows in ranges[rank::ranks] if parts.read(rows) is None]
    n = sum(len(rows) for rows in ranges[rank::ranks])
    before = n - sum(len(rows) for rows in missing)
    if before:
        say(f"embedding {name}: {before} of {n} images are there from before")
    lines = Lines(f"embedding {name}", n, before, say)
    done = before
    with Threads(threads_for(embedder.num_workers)) as pool:
        for rows in missing:
            vectors, skipped = [], []
            for batch, bad in embedder.batches(rows, pool):
                vectors.append(batch)
                skipped += bad
                done += len(batch) + len(bad)
                lines.at(done)
                if stop.asked and sum(map(len, vectors)) + len(skipped) < len(rows):
                    break
            else:
                _refuse_lost(rows, skipped, embedder.source)
                parts.write(rows, np.concatenate(vectors), skipped)
            if stop.asked:
                raise Stopped(f"stopped by {stop.asked}: finished parts are kept, the same command goes on with them")


def _refuse_lost(rows: range, skipped: list[tuple[int, str]], source: Source) -> None:
    """A few bad images are listed; most of a part means that the folder is gone, and is not to be kept as a result."""
    if len(skipped) > max(_FEW, len(rows) // 2):
        i, reason = skipped[0]
        raise DataError(
            f"{len(skipped)} of {len(rows)} images of {source.name} in a row cannot be read; the first is "
            f"{source.describe(i)} ({reason}): bring the images back and run the same command again"
        )


def _assemble(
    parts: _Parts, ranges: list[range], source: Source, out: Path, facts: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Put the parts together, one in memory at a time."""
    skipped: list[tuple[int, str]] = []
    for rows in ranges:
        skipped += _whole(parts, rows)[1]
    n = len(source) - len(skipped)
    first = [f"{source.describe(i)} ({reason})" for i, reason in skipped[:3]]
    if n == 0:
        raise InputError(f"none of the {len(source)} images of {source.name} can be read: {', '.join(first)}")

    def blocks() -> Iterator[Block]:
        for rows in ranges:
            vectors, bad = _whole(parts, rows)
            ids = np.setdiff1d(np.arange(rows.start, rows.stop), np.array([i for i, _ in bad], np.int64))
            if len(ids):
                labels = None if source.labels is None else source.labels[ids]
                yield Block(vectors, ids, [source.describe(int(i)) for i in ids], labels)

    listed = _list_skipped(parts, source, out, skipped)
    store(out, (n, parts.dimension), parts.dtype, blocks(), source.class_names, facts, parts.folder)
    size = out.stat().st_size / 2**20
    say(f"{shown(out)}: {n} embeddings of {parts.dimension} numbers, {parts.dtype}, {size:.3g} MiB")
    if skipped:
        more = ", ..." if len(skipped) > len(first) else ""
        say(f"{len(skipped)} images could not be read, see {shown(listed)}: {', '.join(first)}{more}")


def _list_skipped(parts: _Parts, source: Source, out: Path, skipped: list[tuple[int, str]]) -> Path:
    """Write the list of what was skipped, or remove that of an earlier file of this name."""
    listed = skipped_list(out)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "path", "reason"])
    table.writerows((i, cell(source.describe(i)), reason) for i, reason in skipped)
    unfinished = parts.folder / listed.name  # a kill leaves nothing half done beside the output
    try:
        if skipped:
            write_atomically(unfinished, text.getvalue().encode())
            unfinished.replace(listed)
        else:
            listed.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{shown(listed)} could not be written: {error.strerror}") from error
    return listed


def _whole(parts: _Parts, rows: range) -> tuple[np.ndarray, list[tuple[int, str]]]:
    part = parts.read(rows)
    if part is None:
        raise StorageError(
            f"a part in {shown(parts.folder)} was damaged after it was written; run the same command again"
        )
    return part
