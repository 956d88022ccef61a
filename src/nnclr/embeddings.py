"""Embeddings in a file: made in parts that survive a kill, opened by everything that searches or looks.

Two forms. `FILE.parquet` has the columns id, path, label, embedding and checksum, and the facts (which encoder, which
data, which preprocessing) as JSON in its schema. `FILE.npy` has the vectors alone, to be memory-mapped, with
`FILE.ids.csv` and `FILE.json` beside it. The checksum of a row is the CRC-32 of its id, path and vector: it proves
that the vector is that of the image. Nothing in either is ever unpickled.
"""

import csv
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.checkpoint import sync
from nnclr.data.array_file import open_npy
from nnclr.data.images import cell, from_cell, printable, shown
from nnclr.encoder import Encoder
from nnclr.errors import InputError, StorageError

FORMAT = 1
_BLOCK = 4096  # rows that are read or looked at together
_SAMPLE = 1000  # rows whose checksum is compared at every opening
_NAME_COLUMNS = ("path", "file_name", "filename", "file", "image_path", "name", "url")  # of other people's files


@dataclass(frozen=True)
class Embeddings:
    """The content of a file of embeddings, n rows.

    Args:
        path: the file.
        vectors: (n, d) float32 or float16, as the encoder gave them; memory-mapped where the file is a `.npy`.
        ids: (n,) int64, index of each image in its source; images that could not be read have no row.
        names: n printable paths or names.
        labels: (n,) int64, -1 for a row without; None where no row has one.
        class_names: name of each label.
        facts: what the rows come from; empty for files of other programs. "encoder" is a text for
            `nnclr.open_encoder`, "data" what `open_source` takes; either is None where it was no text.
    """

    path: Path
    vectors: np.ndarray
    ids: np.ndarray
    names: Sequence[str]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.vectors)

    def label_name(self, row: int) -> str:
        """The class name of a row, empty where it has none."""
        if self.labels is None or self.class_names is None or self.labels[row] < 0:
            return ""
        return self.class_names[int(self.labels[row])]


def other_encoder(facts: dict[str, Any], encoder: Encoder) -> str | None:
    """What of an encoder is not that of the one that made some embeddings: `weights`, `preprocessing`, or None."""
    if facts.get("encoder_fingerprint") != encoder.fingerprint:
        return "weights"
    same = facts.get("preprocessing", encoder.preprocessing) == encoder.preprocessing
    return None if same else "preprocessing"


@dataclass(frozen=True)
class Block:
    """Some rows on their way into a file."""

    vectors: np.ndarray  # (b, d)
    ids: np.ndarray  # (b,)
    names: list[str]
    labels: np.ndarray | None  # (b,), -1 for none


def companions(path: Path) -> tuple[Path, Path]:
    """The list of ids and the facts that lie beside `FILE.npy`."""
    return path.with_suffix(".ids.csv"), path.with_suffix(".json")


def skipped_list(path: Path) -> Path:
    """The list of images without a row; after the whole name, since `e.npy` and `e.parquet` may be of other images."""
    return path.with_name(f"{path.name}.skipped.csv")


def open_embeddings(path: str | Path, verify: bool = False) -> Embeddings:
    """Open a file of embeddings: ours, or any parquet with a list column `embedding`, or a plain (n, d) `.npy`.

    Args:
        path: `FILE.parquet`, read into memory, or `FILE.npy`, memory-mapped.
        verify: compare the checksum of every row, not only of a thousand.

    Raises:
        InputError: if it is missing, damaged, of another kind, or holds a row that is not finite.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".npy"):
        raise InputError(f"{shown(path)} is no file of embeddings: it must end in .parquet or .npy")
    if not path.is_file():
        raise InputError(f"{shown(path)} does not exist; `nnclr embed` writes such a file")
    embeddings, checksums = _open_parquet(path) if path.suffix == ".parquet" else _open_npy(path)
    _refuse_damage(embeddings, checksums, verify)
    return embeddings


def write_embeddings(
    path: str | Path,
    vectors: np.ndarray,
    ids: np.ndarray,
    names: Sequence[str],
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a file of embeddings in one go; a file of this name is replaced as a whole.

    Args:
        path: `FILE.parquet`, or `FILE.npy` with `FILE.ids.csv` and `FILE.json` beside it.
        vectors: (n, d) float32 or float16, finite.
        ids: (n,) whole numbers, each once.
        names: n texts.
        labels: (n,) whole numbers, -1 for none.
        class_names: one for each label; default their numbers.
        facts: anything that JSON can hold.

    Raises:
        InputError: if these do not fit each other, or the name ends in something else.
        StorageError: if it cannot be written.
    """
    path, vectors, ids = Path(path), np.asarray(vectors), np.asarray(ids)
    refuse_name(path)
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype not in (np.float32, np.float16):
        raise InputError(f"embeddings must be (n, d) float32 or float16, these are {vectors.shape} {vectors.dtype}")
    n = len(vectors)
    if ids.shape != (n,) or ids.dtype.kind not in "iu" or len(np.unique(ids)) < n or len(names) != n:
        raise InputError(f"{n} embeddings need {n} names and as many different whole numbers as ids")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (n,) or labels.dtype.kind not in "iu":
            raise InputError(f"{n} embeddings need {n} whole numbers as labels")
        class_names = class_names or [str(i) for i in range(int(labels.max()) + 1)]
        if labels.max() >= len(class_names):
            raise InputError(f"label {labels.max()} has no name: there are {len(class_names)} class names")
    _refuse_non_finite(vectors, "the array")
    safe = [printable(os.fsencode(name)) for name in names]

    def blocks() -> Iterator[Block]:
        for start in range(0, n, _BLOCK):
            rows = slice(start, start + _BLOCK)
            yield Block(vectors[rows], ids[rows], safe[rows], None if labels is None else labels[rows])

    workplace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name}-"))
    try:
        store(path, vectors.shape, vectors.dtype, blocks(), class_names, facts or {}, workplace)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def store(
    path: Path,
    shape: tuple[int, int],
    dtype: Any,
    blocks: Iterable[Block],
    class_names: Sequence[str] | None,
    facts: dict[str, Any],
    workplace: Path,
) -> None:
    """Write rows as they come, one block in memory; the same rows give the same bytes.

    Args:
        path: where the file appears, when all of it is on the disk.
        shape: n and d.
        dtype: float32 or float16.
        blocks: the rows; each block becomes a row group.
        class_names: of the labels.
        facts: for the header.
        workplace: a folder of the same file system for what is unfinished.

    Raises:
        StorageError: if it cannot be written.
    """
    header = {**facts, "class_names": None if class_names is None else list(class_names), "format": FORMAT}
    text = json.dumps(header, sort_keys=True)
    made = [workplace / path.name]
    try:
        if path.suffix == ".parquet":
            _write_parquet(made[0], shape[1], dtype, blocks, class_names, text)
        else:
            ids, described = (workplace / file.name for file in companions(path))
            made = [described, ids, *made]  # the vectors appear last: without them there is no file
            _write_npy(made, shape, dtype, blocks, class_names, text)
        for file in made:
            sync(file)
        for file in made:
            file.replace(path.with_name(file.name))
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{shown(path)} could not be written: {error.strerror or error}") from error


def refuse_name(path: Path) -> None:
    """Check the name of a file that is to be written.

    Raises:
        InputError: if it ends in something else than .parquet or .npy, or its folder does not exist.
    """
    if path.suffix not in (".parquet", ".npy"):
        raise InputError(f"--out {shown(path)} must end in .parquet or .npy")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--out {shown(path)} must be a file in a folder that exists")
    if path.suffix == ".parquet":
        _pyarrow(path)


def header_of(path: Path) -> dict[str, Any]:
    """The facts of a file of ours; empty for others, and for what cannot be read."""
    try:
        if path.suffix == ".npy":
            text: str | bytes = companions(path)[1].read_bytes()
        else:
            pa, pq = _pyarrow(path)
            try:
                text = (pq.read_schema(path).metadata or {}).get(b"nnclr", b"{}")
            except pa.ArrowException:
                return {}
        return _facts_of(text)[0]
    except (OSError, ValueError, RecursionError):
        return {}


def _write_parquet(
    file: Path, dimension: int, dtype: Any, blocks: Iterable[Block], class_names: Sequence[str] | None, header: str
) -> None:
    pa, pq = _pyarrow(file)
    value = pa.float32() if np.dtype(dtype) == np.float32 else pa.float16()
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("embedding", pa.list_(pa.field("element", value, nullable=False), dimension), nullable=False),
            pa.field("checksum", pa.uint32(), nullable=False),
        ],
        {"nnclr": header},
    )
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=["label"]) as writer:
        for block in blocks:
            columns = [
                pa.array(block.ids, pa.int64()),
                pa.array(block.names, pa.string()),
                pa.array(_label_names(block, class_names), pa.string()),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(np.ascontiguousarray(block.vectors).reshape(-1), value), type=schema.field(3).type
                ),
                pa.array(_checksums(block.ids, block.names, block.vectors), pa.uint32()),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(len(block.ids), 1))


def _write_npy(
    files: Sequence[Path],
    shape: tuple[int, int],
    dtype: Any,
    blocks: Iterable[Block],
    class_names: Sequence[str] | None,
    header: str,
) -> None:
    facts, ids_csv, vectors = files
    facts.write_text(header + "\n")
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with open(ids_csv, "w", newline="", encoding="utf-8") as table, open(vectors, "wb") as file:
        # Written as a stream: a full disk is an error here, and would be a fatal signal with a memory map.
        np.lib.format.write_array_header_1_0(file, described)
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["id", "path", "label", "checksum"])
        for block in blocks:
            file.write(np.ascontiguousarray(block.vectors).tobytes())
            labels = ["" if name is None else name for name in _label_names(block, class_names)]
            checksums = _checksums(block.ids, block.names, block.vectors)
            texts = (map(cell, block.names), map(cell, labels))
            rows.writerows(zip(block.ids.tolist(), *texts, checksums.tolist(), strict=True))


def _label_names(block: Block, class_names: Sequence[str] | None) -> list[str | None]:
    if block.labels is None or class_names is None:
        return [None] * len(block.ids)
    return [class_names[label] if label >= 0 else None for label in block.labels]


def _checksums(ids: np.ndarray, names: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """(b,) uint32: CRC-32 of id (8 bytes), path (UTF-8) and vector, all little-endian."""
    rows = zip(ids.tolist(), names, np.ascontiguousarray(vectors), strict=True)
    started = [
        zlib.crc32(vector, zlib.crc32(name.encode(), zlib.crc32(i.to_bytes(8, "little", signed=True))))
        for i, name, vector in rows
    ]
    return np.array(started, np.uint32)


def _open_parquet(path: Path) -> tuple[Embeddings, np.ndarray | None]:
    pa, pq = _pyarrow(path)
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "embedding" not in schema.names:
                raise InputError(f"{shown(path)} has no column 'embedding'; it has {', '.join(schema.names)}")
            ours = (schema.metadata or {}).get(b"nnclr")
            facts, class_names = ({}, None) if ours is None else _facts_of(ours)
            vectors = _vectors(file, path)
            wanted = [name for name in ("id", *_NAME_COLUMNS, "label", "checksum") if name in schema.names]
            table = file.read(columns=wanted, use_threads=False)
        n = len(vectors)
        ids, names = np.arange(n), [f"{shown(path)}#{i}" for i in range(n)]
        if "id" in wanted and pa.types.is_integer(table["id"].type) and not table["id"].null_count:
            ids = table["id"].to_numpy().astype(np.int64)
        for column in reversed([name for name in wanted if name in _NAME_COLUMNS]):
            if pa.types.is_string(table[column].type) or pa.types.is_large_string(table[column].type):
                texts = enumerate(table[column].to_pylist())
                names = [names[i] if text is None else printable(text.encode()) for i, text in texts]
        labels, class_names = _labels(table["label"].to_pylist() if "label" in wanted else [], class_names)
        checksums = table["checksum"].to_numpy() if ours is not None and "checksum" in wanted else None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(f"{shown(path)} is not a readable file of embeddings: {str(error)[:120]}") from error
    return Embeddings(path, vectors, ids, names, labels, class_names, facts), checksums


def _vectors(file: Any, path: Path) -> np.ndarray:
    """The column `embedding`, (n, d), read a block at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, n = file.schema_arrow.field("embedding").type, file.metadata.num_rows
    fixed = pa.types.is_fixed_size_list(kind)
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_floating(
        kind.value_type
    ):
        raise InputError(f"{shown(path)}: column 'embedding' holds {kind}, not lists of float32 or float16")
    vectors, filled = np.empty((0, 0), np.float32), 0
    for batch in file.iter_batches(_BLOCK, columns=["embedding"], use_threads=False):
        column = batch.column(0)
        lengths = set(pc.unique(pc.list_value_length(column)).to_pylist())
        if filled == 0 and len(batch):
            dimension = kind.list_size if fixed else next((length for length in lengths if length), 0)
            dtype = np.float16 if pa.types.is_float16(kind.value_type) else np.float32
            _refuse_size(path, n, dimension, dtype)
            vectors = np.empty((n, dimension), dtype)
        if lengths - {vectors.shape[1]}:
            raise InputError(f"{shown(path)}: the embeddings of rows {filled} and after differ in length")
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        vectors[filled : filled + len(batch)] = values
        filled += len(batch)
    if filled != n or not vectors.size:
        raise InputError(f"{shown(path)} holds no embeddings")
    return vectors


def _refuse_size(path: Path, n: int, dimension: int, dtype: Any) -> None:
    needed = n * dimension * np.dtype(dtype).itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"{shown(path)} needs {needed >> 30} GiB of memory and the machine has {there >> 30}; embed into a "
            ".npy, which is read from the disk as it is needed"
        )


def _labels(
    values: Sequence[Any], class_names: tuple[str, ...] | None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels as numbers, and what they are called; texts or whole numbers are labels, nothing else is."""
    given = {value for value in values if value is not None and value != ""}
    if not given or not all(isinstance(value, (str, int)) for value in given):
        return None, class_names
    if class_names is None:
        order = sorted(given, key=lambda value: (isinstance(value, str), value))
        class_names = tuple(printable(str(value).encode()) for value in order)
        number: dict[Any, int] = {value: i for i, value in enumerate(order)}
    else:
        number = {name: i for i, name in reversed(list(enumerate(class_names)))}
        if given - number.keys():
            raise InputError(f"the label {min(given - number.keys())!r} is none of the file's own class names")
    return np.array([number.get(value, -1) for value in values], np.int64), class_names


def _open_npy(path: Path) -> tuple[Embeddings, np.ndarray | None]:
    vectors = open_npy(path)
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype.kind != "f":
        held = f"{vectors.shape} {vectors.dtype}"
        raise InputError(f"{shown(path)} must hold (n, d) float32 or float16, it holds {held}")
    if vectors.dtype not in (np.float32, np.float16):
        _refuse_size(path, vectors.shape[0], vectors.shape[1], np.float32)
        vectors = vectors.astype(np.float32)
    ids_csv, facts_json = companions(path)
    if not ids_csv.exists() and not facts_json.exists():
        names = [f"{shown(path)}#{i}" for i in range(len(vectors))]
        return Embeddings(path, vectors, np.arange(len(vectors)), names, None, None, {}), None
    try:
        facts, class_names = _facts_of(facts_json.read_bytes())
        ids, names, texts, checksums = _ids(ids_csv, len(vectors))
        labels, class_names = _labels(texts, class_names)
    except FileNotFoundError as error:
        raise InputError(f"{shown(path)}: {Path(error.filename).name}, which belongs to it, is missing") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise InputError(f"{shown(path)}: the files beside it cannot be read: {str(error)[:120]}") from error
    return Embeddings(path, vectors, ids, names, labels, class_names, facts), checksums


def _ids(file: Path, n: int) -> tuple[np.ndarray, list[str], list[str], np.ndarray]:
    """Ids, names, labels and checksums of `FILE.ids.csv`."""
    ids, checksums = np.empty(n, np.int64), np.empty(n, np.uint32)
    names: list[str] = []
    labels: list[str] = []
    with open(file, newline="", encoding="utf-8") as text:
        rows = csv.DictReader(text)
        for i, row in enumerate(rows):
            if i == n:
                raise ValueError(f"{file.name} has more than {n} rows")
            ids[i], checksums[i] = int(row["id"]), int(row["checksum"])
            names.append(printable(from_cell(row["path"]).encode()))
            labels.append(from_cell(row["label"]))
    if len(names) != n:
        raise ValueError(f"{file.name} has {len(names)} rows, not {n}")
    return ids, names, labels, checksums


def _facts_of(text: str | bytes) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise ValueError(f"its facts are not those of format {FORMAT}")
    class_names = facts.pop("class_names", None)
    if not isinstance(class_names, list | None):
        raise ValueError("its class names are no list")
    return facts, None if class_names is None else tuple(printable(str(name).encode()) for name in class_names)


def _refuse_damage(embeddings: Embeddings, checksums: np.ndarray | None, verify: bool) -> None:
    n, path = len(embeddings), shown(embeddings.path)
    if len(np.unique(embeddings.ids)) < n:
        raise InputError(f"{path} holds an id twice; every row needs its own")
    _refuse_non_finite(embeddings.vectors, path)
    if checksums is None:
        return
    looked_at = np.arange(n) if verify or n <= _SAMPLE else np.unique(np.linspace(0, n - 1, _SAMPLE).astype(int))
    for start in range(0, len(looked_at), _BLOCK):
        rows = looked_at[start : start + _BLOCK]
        names = [embeddings.names[i] for i in rows]
        found = _checksums(embeddings.ids[rows], names, embeddings.vectors[rows])
        wrong = rows[found != checksums[rows]]
        if len(wrong):
            raise InputError(f"{path} is damaged: row {wrong[0]} is not what was written; embed anew")


def _refuse_non_finite(vectors: np.ndarray, where: str) -> None:
    for start in range(0, len(vectors), _BLOCK):
        bad = ~np.isfinite(vectors[start : start + _BLOCK]).all(axis=1)
        if bad.any():
            raise InputError(
                f"row {start + int(bad.argmax())} of {where} is not finite; leave out the rows of images that could "
                "not be read"
            )


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{shown(path)}: parquet needs pyarrow; pip install 'nnclr[parquet]', or use .npy") from None
    return pa, pq
