"""Images in a parquet file, in the form that Hugging Face data sets have."""

import hashlib
import os
from pathlib import Path

import numpy as np

from nnclr.data.decode import BadImage, decode
from nnclr.data.images import Source, printable
from nnclr.errors import InputError


def parquet_source(path: Path, query: dict[str, str]) -> Source:
    """Images and labels of a parquet file.

    Args:
        path: the file; a column of image bytes, plain or as struct {bytes, path}.
        query: `image=COLUMN` (default `image`), `label=COLUMN` (default `label` if there is one), and any
            other `COLUMN=VALUE`, which keeps the rows with this value.

    Raises:
        InputError: if the file or a column is missing or of another kind, or no row is left.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow; pip install 'nnclr[parquet]'") from None
    name = printable(os.fsencode(path))
    if not path.is_file():
        raise InputError(f"{name} does not exist")
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} is not a readable parquet file: {str(error)[:120]}") from error
    image = query.get("image", "image")
    label = query.get("label", "label" if "label" in columns else None)
    filters = {column: value for column, value in query.items() if column not in ("image", "label")}
    wanted = [image, *([label] if label else []), *filters]
    for column in wanted:
        if column not in columns:
            raise InputError(f"{name} has no column '{column}'; it has {', '.join(columns)}")
    table = pq.read_table(path, columns=list(dict.fromkeys(wanted)), use_threads=False)
    for column, value in filters.items():
        table = table.filter(pc.equal(pc.cast(table[column], pa.string()), value))
    if table.num_rows == 0:
        raise InputError(f"{name} has no row with {' and '.join(f'{c}={v}' for c, v in filters.items()) or 'images'}")
    pictures = table[image].combine_chunks()
    names = None
    if pa.types.is_struct(pictures.type):
        fields = [pictures.type.field(i).name for i in range(pictures.type.num_fields)]
        names = pictures.field("path") if "path" in fields else None
        if "bytes" not in fields:
            raise InputError(f"{name}: column '{image}' is a struct without 'bytes'; it has {', '.join(fields)}")
        pictures = pictures.field("bytes")
    if not (pa.types.is_binary(pictures.type) or pa.types.is_large_binary(pictures.type)):
        raise InputError(f"{name}: column '{image}' holds {pictures.type}, not image bytes")

    def fetch(i: int) -> np.ndarray:
        data = pictures[i].as_py()
        if data is None:
            raise BadImage("unreadable", "no bytes in this row")
        return decode(data)

    def title(i: int) -> str:
        file = None if names is None else names[i].as_py()
        return f"{name}#{i}" if file is None else printable(file.encode("utf-8", "surrogateescape"))

    labels, class_names = (None, None) if label is None else _labels(table[label].to_pylist(), name, label)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(repr(sorted(query.items())).encode())
    return Source(name, table.num_rows, fetch, title, digest.hexdigest(), labels, class_names)


def _labels(values: list[object], name: str, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices: whole numbers from 0 as they are, anything else numbered in sorted order."""
    if any(value is None for value in values):
        raise InputError(f"{name}: column '{column}' lacks a label in {sum(v is None for v in values)} rows")
    if all(isinstance(value, int) and value >= 0 for value in values):
        labels = np.array(values, np.int64)
        return labels, tuple(str(i) for i in range(int(labels.max()) + 1))
    texts = [str(value) for value in values]
    classes = sorted(set(texts))
    number = {text: i for i, text in enumerate(classes)}
    return np.array([number[text] for text in texts], np.int64), tuple(classes)
