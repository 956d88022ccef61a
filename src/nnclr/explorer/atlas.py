"""A parquet file that Apple's Embedding Atlas opens: thumbnails, map and neighbours in one file."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.checkpoint import sync
from nnclr.data.decode import BadImage
from nnclr.data.images import printable
from nnclr.errors import InputError, StorageError
from nnclr.explorer.collection import Collection, open_collection

_BLOCK = 1024  # rows written together
_SIZE = 128  # pixels of a thumbnail's longer side
_MARK = b"nnclr_atlas"  # in the metadata: the file is one of ours, and may be replaced


def write_atlas(
    embeddings: str | Path,
    out: str | Path,
    *,
    data: Any = None,
    projection: str = "umap",
    k: int = 20,
    say: Callable[[str], None] = print,
) -> None:
    """Write `image`, `x`, `y`, `neighbors`, `path`, `label` and the other columns of the explorer as parquet.

    Args:
        embeddings: a file that `nnclr embed` wrote.
        out: `FILE.parquet`; an earlier atlas of this name is replaced as a whole.
        data: where the pictures are, if not where the file says.
        projection: `umap`, kept beside the embeddings and shared with the explorer, or `pca`.
        k: neighbours of each picture; the distance is 1 minus the cosine similarity.
        say: takes lines for people, in the end the command that opens the file.

    Raises:
        InputError: if the embeddings cannot be opened, or out is neither a new parquet file nor an earlier atlas
            in a folder that exists.
        StorageError: if it cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("the atlas is a parquet file and needs pyarrow; pip install 'nnclr[parquet]'") from None
    path, shown = Path(out), printable(os.fsencode(out))
    _refuse_out(path, Path(embeddings))  # before the map is computed
    collection = open_collection([embeddings], data, None, projection, say)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, _schema(pa, collection), compression="none") as writer:
            for columns in _blocks(collection, k):
                writer.write_table(pa.table(columns, schema=writer.schema))
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{shown} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a read-only folder has said so above
            temporary.unlink(missing_ok=True)
    say(f"{len(collection):,} pictures in {shown}; open it, in a browser with WebGPU, by")
    say(f"uvx embedding-atlas {shown} --image image --x x --y y --neighbors neighbors")


def _refuse_out(path: Path, embeddings: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shown = printable(os.fsencode(path))
    if path.suffix != ".parquet" or not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{shown} must be a .parquet file in a folder that exists")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{shown} cannot be written: its folder is not yours to write in; choose another one")
    if not os.path.lexists(path):
        return
    if path.exists() and embeddings.exists() and path.samefile(embeddings):
        raise InputError(f"{shown} is the file of embeddings itself; choose another name")
    try:
        ours = _MARK in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        ours = False
    if not ours:
        raise InputError(f"{shown} exists and is no atlas of nnclr; choose another name")


def _schema(pa: Any, collection: Collection) -> Any:
    neighbours = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))])
    fields = [("image", pa.struct([("bytes", pa.binary())])), ("x", pa.float32()), ("y", pa.float32())]
    fields += [("neighbors", neighbours), ("path", pa.string())]
    return pa.schema(fields + [(column.name, pa.string()) for column in collection.columns], {_MARK: b"1"})


def _blocks(collection: Collection, k: int) -> Iterator[dict[str, list[Any]]]:
    from nnclr.explorer.server import thumbnail

    def picture(row: int) -> dict[str, bytes] | None:
        try:
            return {"bytes": thumbnail(collection.picture(row), _SIZE)}
        except BadImage:
            return None

    side = collection.sides[0]
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(collection), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(collection)))
            similarities, indices = side.index.neighbours_of(rows, k)
            points = side.projection.points[rows]
            yield {
                "image": list(pool.map(picture, rows.tolist())),
                "x": points[:, 0].tolist(),
                "y": points[:, 1].tolist(),
                "neighbors": [
                    {"ids": ids, "distances": distances}
                    for ids, distances in zip(indices.tolist(), (1 - similarities).tolist(), strict=True)
                ],
                "path": [collection.names[row] for row in rows.tolist()],
                **{
                    column.name: [column.categories[code] if code >= 0 else None for code in column.codes[rows]]
                    for column in collection.columns
                },
            }
