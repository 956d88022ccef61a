"""Images in parquet files, in the form that Hugging Face data sets have, read a row group at a time."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnclr.data.decode import BadImage, decode
from nnclr.data.images import MOST_CLASS, Source, classes_of_numbers, safe
from nnclr.data.storage import File, files, listed
from nnclr.errors import InputError, first_line

MOST_BYTES = 2 << 30  # of row groups in memory; those of half of it are shuffled together
_MOST_GROUP = 4 << 30  # bytes of images in one; equal images may take little in the file and much here
_ROWS = 32  # read at a time


@dataclass
class _Pictures:
    """The column of images, with the row groups that were used last in memory."""

    column: str
    files: list[File]
    metadata: list[Any]  # of each file, as pyarrow gives it
    groups: list[tuple[int, int]] = field(default_factory=list)  # file and row group, in order
    rows: list[int] = field(default_factory=list)  # of each group
    nbytes: list[int] = field(default_factory=list)  # of the column in each group, as the file has it uncompressed
    kept: OrderedDict[int, tuple[Any, int]] = field(default_factory=OrderedDict)  # images, and bytes of all of them
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for number, about in enumerate(self.metadata):
            for group in range(about.num_row_groups):
                chunks = [about.row_group(group).column(i) for i in range(about.num_columns)]
                own = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{self.column}.")]
                self.groups.append((number, group))
                self.rows.append(about.row_group(group).num_rows)
                self.nbytes.append(sum(chunk.total_uncompressed_size for chunk in own))

    def content(self, group: int, row: int) -> bytes:
        """The bytes of an image.

        Raises:
            BadImage: if there are none, the file cannot be read any more, or its row group is too large for memory.
        """
        import pyarrow as pa

        with self.lock:
            if group not in self.kept:
                try:
                    read = self._read(group)
                except (pa.ArrowException, OSError) as error:
                    raise BadImage("unreadable", first_line(error)) from error
                self.kept[group] = (read, read.nbytes)
            self.kept.move_to_end(group)
            while len(self.kept) > 1 and sum(nbytes for _, nbytes in self.kept.values()) > MOST_BYTES:
                self.kept.popitem(last=False)
            pictures = self.kept[group][0]
        data: bytes | None = pictures[row].as_py()
        if data is None:
            raise BadImage("unreadable", "no bytes in this row")
        return data

    def _read(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        number, inner = self.groups[group]
        parts, total = [], 0
        with self.files[number].open() as opened:
            parquet = pq.ParquetFile(opened, metadata=self.metadata[number], pre_buffer=True)
            for batch in parquet.iter_batches(_ROWS, row_groups=[inner], columns=[self.column], use_threads=False):
                column = batch.column(self.column)
                parts.append(pc.struct_field(column, "bytes") if _is_struct(column.type) else column)
                total += parts[-1].nbytes
                if total > _MOST_GROUP:
                    raise BadImage("too_large", f"its row group has more than {_MOST_GROUP / 2**30:.3g} GiB of images")
        return pa.chunked_array(parts)


def parquet_source(texts: Sequence[str], query: dict[str, str]) -> Source:
    """Images and labels of parquet files, in the order of the files.

    Files that are larger than the memory are no matter: row groups are read as they are needed, and images are
    shuffled within some of them at a time.

    Args:
        texts: files, or patterns of them; paths or addresses. A column of image bytes, plain or as struct
            {bytes, path}.
        query: `image=COLUMN` (default `image`), `label=COLUMN` (default `label` if there is one; empty for none), and
            any other `COLUMN=VALUE`, which keeps the rows with this value.

    Raises:
        InputError: if a file or a column is missing or of another kind, or no row is left.
    """
    name = listed(texts)
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
    except ImportError:
        raise InputError(f"{name}: reading parquet needs pyarrow; pip install 'nnclr[parquet]'") from None
    found = [file for text in texts for file in files(text)]
    metadata = [_metadata(file) for file in found]
    schema = metadata[0].schema.to_arrow_schema()
    image = query.get("image", "image")
    label = query.get("label", "label" if "label" in schema.names else "") or None
    filters = {column: value for column, value in query.items() if column not in ("image", "label")}
    for file, about in zip(found, metadata, strict=True):
        _require(file, about.schema.to_arrow_schema(), image, [*([label] if label else []), *filters])
    pictures = _Pictures(image, found, metadata)
    kind = schema.field(image).type
    paths = f"{image}.path" if _is_struct(kind) and kind.get_field_index("path") >= 0 else None
    small = list(dict.fromkeys([*([label] if label else []), *filters, *([paths] if paths else [])]))
    tables = [_small_columns(*each, small) for each in zip(found, metadata, strict=True)]
    table, kept = _chosen(tables, filters, name)
    groups = np.repeat(np.arange(len(pictures.rows)), pictures.rows)[kept]
    rows = np.concatenate([np.arange(n) for n in pictures.rows])[kept]
    names = pc.struct_field(table[image], "path").filter(pa.array(kept)) if paths else None
    labels, class_names = None, None
    if label is not None:
        known = [_class_names(about.schema.to_arrow_schema(), label) for about in metadata]
        for file, theirs in zip(found, known, strict=True):
            if theirs != known[0]:
                raise InputError(
                    f"{file.name} names the classes of '{safe(label)}' otherwise than {found[0].name}: the same number "
                    "would mean two things; write the files anew with the same names"
                )
        labels, class_names = number_labels(table[label].filter(pa.array(kept)), name, label, known[0])

    fingerprint = _fingerprint(found, query, labels)
    if labels is not None and class_names is None:
        labels, class_names = classes_of_numbers(labels)

    def content(i: int) -> bytes:
        return pictures.content(int(groups[i]), int(rows[i]))

    def title(i: int) -> str:
        file = None if names is None else names[i].as_py()
        return f"{name}#{i}" if file is None else safe(file)

    return Source(
        name,
        len(rows),
        lambda i: decode(content(i)),
        title,
        fingerprint,
        labels,
        class_names,
        unlabelled=hidden_labels(label) if label is not None and labels is None else "",
        revision=hashlib.sha256("\n".join(file.stamp for file in found).encode()).hexdigest(),
        content=content,
        blocks=tuple(np.bincount(groups, minlength=len(pictures.rows)).tolist()),
        window=max(1, MOST_BYTES // 2 // max(1, *pictures.nbytes)),
    )


def _metadata(file: File) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as opened:
            return pq.read_metadata(opened)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.name} is not a readable parquet file: {first_line(error)}") from error


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _require(file: File, schema: Any, image: str, others: list[str]) -> None:
    """Refuse a file without these columns, or whose images are none."""
    import pyarrow as pa

    for column in (image, *others):
        if column not in schema.names:
            raise InputError(f"{file.name} has no column '{safe(column)}'; it has {safe(', '.join(schema.names))}")
    kind = schema.field(image).type
    if _is_struct(kind):
        fields = [kind.field(i).name for i in range(kind.num_fields)]
        if "bytes" not in fields:
            raise InputError(
                f"{file.name}: column '{safe(image)}' is a struct without 'bytes'; it has {safe(', '.join(fields))}"
            )
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(f"{file.name}: column '{safe(image)}' holds {safe(kind)}, not image bytes")


def _small_columns(file: File, metadata: Any, columns: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open() as opened:
            return pq.ParquetFile(opened, metadata=metadata).read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.name} cannot be read: {first_line(error)}") from error


def _chosen(tables: list[Any], filters: dict[str, str], name: str) -> tuple[Any, np.ndarray]:
    """The small columns of all files as one table, and which of its rows have these values.

    Raises:
        InputError: if the files do not fit each other, a column cannot be compared, or no row is left.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"a column of {name} is not of one kind in all files: {safe(first_line(error))}") from error
    kept = np.ones(sum(len(each) for each in tables), bool)
    for column, value in filters.items():
        try:
            kept &= np.asarray(pc.equal(pc.cast(table[column], pa.string()), value).fill_null(False))
        except pa.ArrowException as error:
            raise InputError(
                f"{name}: column '{safe(column)}' holds {safe(table[column].type)}, so no row can be chosen by it"
            ) from error
    if not kept.any():
        wanted = " and ".join(safe(f"{column}={value}") for column, value in filters.items())
        raise InputError(f"{name} has no row with {wanted or 'images'}")
    return table, kept


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel, which Hugging Face data sets keep in the file's metadata."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(safe(name) for name in told)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _fingerprint(found: list[File], query: dict[str, str], labels: np.ndarray | None) -> str:
    """Over the footers, which hold the sizes and extremes of all columns, wherever the files lie."""
    digest = hashlib.sha256(repr(sorted(query.items())).encode())
    for file in found:
        try:
            end = file.read(file.size - 8, 8)
            length = int.from_bytes(end[:4], "little")
            digest.update(file.read(file.size - 8 - length, length))
        except OSError as error:
            raise InputError(f"{file.name} cannot be read: {first_line(error)}") from error
    digest.update(b"" if labels is None else labels.tobytes())
    return digest.hexdigest()


def hidden_labels(column: str) -> str:
    """Why there are no labels, where a column would have them."""
    return f"column '{safe(column)}' is -1 in some rows, which means no label"


def number_labels(
    column: Any, where: str, title: str, class_names: tuple[str, ...] | None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Class indices (n,) of an Arrow column, and the names of the classes; None for numbers without names.

    Neither where the classes have names and a row says -1, as hidden test labels of Hugging Face data sets do. Whole
    numbers from 0 stay as they are, for `classes_of_numbers` to look at; anything else is numbered in sorted order.

    Raises:
        InputError: if a row has none.
    """
    import pyarrow as pa

    if column.null_count:
        raise InputError(f"{where}: column '{safe(title)}' lacks a label in {column.null_count} rows")
    if pa.types.is_integer(column.type):
        labels = column.to_numpy().astype(np.int64)
        if class_names is not None and labels.min(initial=0) == -1:
            return None, None
        if labels.min() >= 0 and labels.max() < (MOST_CLASS if class_names is None else len(class_names)):
            return labels, class_names
    texts = [safe(value) for value in column.to_pylist()]
    classes = sorted(set(texts))
    number = {text: i for i, text in enumerate(classes)}
    return np.array([number[text] for text in texts], np.int64), tuple(classes)
