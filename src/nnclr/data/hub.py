"""Data sets of the Hugging Face library, from a folder or from the hub; code of a data set is never run."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.data.decode import BadImage, decode, read_file
from nnclr.data.images import SPLIT_NAMES, Source, classes_of_numbers, safe, shown
from nnclr.data.parquet import hidden_labels, number_labels, parquet_source
from nnclr.errors import InputError, first_line


def hub_source(
    name: str, split: str = "train", image: str | None = None, label: str | None = None, config: str | None = None
) -> Source:
    """Images and labels of `hf:NAME_OR_PATH[?split=train&image=COLUMN&label=COLUMN&config=NAME]`.

    Args:
        name: a folder that `save_to_disk` wrote, a folder of parquet files, or a name on the hub, whose files are
            fetched into the cache of the library.
        split: which part; a folder without parts ignores it.
        image: column of images; default `image`, or the only one.
        label: column of labels; default `label`, or the only ClassLabel.
        config: of a data set on the hub that comes in several; a folder is one of them.

    Raises:
        InputError: if the library is not installed, the data set cannot be had, or a column is missing.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"hf:{name} needs the datasets library; pip install 'nnclr[hub]'") from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise InputError(
            "datasets 4 or newer is needed: older ones may run code of a data set; pip install -U datasets"
        )
    folder, title = Path(name), f"hf:{shown(name)}?split={safe(split)}"
    if folder.is_dir() and config is not None:
        raise InputError(
            f"{title}: config= chooses among those of a data set on the hub; name the folder of it instead"
        )
    if folder.is_dir() and not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        found = sorted(str(path) for path in folder.rglob("*.parquet"))
        query = {key: value for key, value in (("image", image), ("label", label)) if value is not None}
        return replace(parquet_source(_of_split(found, split, folder), query), name=title)
    try:
        data = datasets.load_from_disk(name) if folder.is_dir() else datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library's own, and those of the network and of the hub's library
        raise InputError(_reason(f"hf:{shown(name)}", error)) from error
    if isinstance(data, dict):
        if split not in data:
            raise InputError(f"hf:{shown(name)} has no split '{safe(split)}'; it has {safe(', '.join(data))}")
        data = data[split]
    return _source(data, title, image, label, [folder] if folder.is_dir() else _cache_folders())


def _cache_folders() -> list[Path]:
    """Where the library keeps its files."""
    import datasets
    from huggingface_hub import constants

    own = datasets.config
    return [Path(own.HF_CACHE_HOME), Path(own.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]


def _of_split(found: Sequence[str], split: str, folder: Path) -> list[str]:
    """The files of a split, by name: `train-00000-of-00010.parquet` or `train/0000.parquet`.

    All of them where no name looks like that of a split.

    Raises:
        InputError: if there are others, but not this one: to measure on what was trained on would not be noticed.
    """
    if not found:
        raise InputError(f"{shown(folder)} holds neither a data set of save_to_disk nor parquet files")
    parts = [os.path.relpath(path, folder).replace(os.sep, "/") for path in found]
    chosen = [
        path
        for path, part in zip(found, parts, strict=True)
        if split in part.split("/")[:-1]
        or part.rpartition("/")[2].removesuffix(".parquet").partition("-")[0] == split
        or split in _splits(part)
    ]
    others = sorted(set().union(*map(_splits, parts)))
    if not chosen and others:
        raise InputError(f"hf:{shown(folder)} has no split '{safe(split)}'; it has {safe(', '.join(others))}")
    return chosen or list(found)


def _splits(part: str) -> set[str]:
    """What looks like the name of a split in the path of a file."""
    *folders, file = part.removesuffix(".parquet").split("/")
    words = {word for name in (*folders, file) for word in re.split(r"[^A-Za-z0-9]+", name)}
    words = {word for word in words if word.lower() in SPLIT_NAMES}
    numbered = re.fullmatch(r"(.+?)-\d+-of-\d+", file)
    return words or ({numbered[1]} if numbered else set())


def _reason(name: str, error: Exception) -> str:
    kind, text = type(error).__name__, first_line(error)
    if isinstance(error, IndexError):  # what the library says of a saved set without rows
        return f"{name} cannot be opened: it, or one of its splits, has no rows"
    if "Offline" in kind or "Connection" in kind or isinstance(error, (ConnectionError, TimeoutError)):
        return f"{name} is neither a folder nor in the cache, and the hub cannot be reached ({text})"
    return f"{name} cannot be opened: {text}"


def _source(data: Any, name: str, image: str | None, label: str | None, below: Sequence[Path]) -> Source:
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(data) == 0:
        raise InputError(f"{name} holds no images: it has no rows")
    data = data.with_format(None)  # one that it was saved with hides columns, or gives other types
    image = _column(data, image, "image", datasets.Image, name)
    if image is None:
        raise InputError(f"{name} has no column of images; it has {safe(', '.join(data.column_names))}")
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    elif data.features[image] != datasets.Value("binary"):
        raise InputError(f"{name}: column '{safe(image)}' holds {safe(data.features[image])}, not images")
    pictures = data.select_columns([image])
    digest, paths = hashlib.sha256(), []
    for table in pictures.with_format("arrow").iter(batch_size=1000):
        column = table[image]
        if pa.types.is_struct(column.type):
            paths.append(pc.struct_field(column, "path"))
            column = pc.struct_field(column, "bytes")
            for path in paths[-1].filter(column.is_null()).to_pylist():  # a file that is only named
                own = None if path is None else _own_file(path, below)
                size = -1 if own is None else os.path.getsize(own)
                digest.update(f"{os.path.basename(path or '')} {size}\n".encode("utf-8", "backslashreplace"))
        digest.update(pc.binary_length(column).fill_null(-1).to_numpy().astype("<i8").tobytes())
    names = pa.chunked_array([part for column in paths for part in column.chunks], pa.string())
    chosen = _column(data, label, "label", datasets.ClassLabel, name)
    labels, class_names = _labels(data, chosen, name)
    digest.update(b"" if labels is None else labels.tobytes())
    if labels is not None and class_names is None:
        labels, class_names = classes_of_numbers(labels)

    def content(i: int) -> bytes:
        return _content(pictures[i][image], below)

    def title(i: int) -> str:
        file = names[i].as_py() if len(names) else None
        return f"{name}#{i}" if file is None else safe(file)

    unlabelled = hidden_labels(chosen) if chosen is not None and labels is None else ""
    return Source(
        name,
        len(data),
        lambda i: decode(content(i)),
        title,
        digest.hexdigest(),
        labels,
        class_names,
        unlabelled=unlabelled,
        content=content,
    )


def _column(data: Any, asked: str | None, usual: str, kind: type, name: str) -> str | None:
    """The column that is asked for, or the usual one, or the only one of its kind; None where there is none."""
    if asked:
        if asked not in data.column_names:
            raise InputError(f"{name} has no column '{safe(asked)}'; it has {safe(', '.join(data.column_names))}")
        return asked
    if asked is None and usual in data.column_names:
        return usual
    found = [column for column, feature in data.features.items() if isinstance(feature, kind)]
    return found[0] if asked is None and len(found) == 1 else None


def _labels(data: Any, column: str | None, name: str) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Class indices and names; neither where a ClassLabel says -1, see `number_labels`."""
    if column is None:
        return None, None
    values, known = data.with_format("arrow")[column][:], getattr(data.features[column], "names", None)
    return number_labels(values, name, column, None if known is None else tuple(map(safe, known)))


def _own_file(path: str, below: Sequence[Path]) -> str | None:
    """The real path of a file that lies in one of these folders, or None."""
    real = os.path.realpath(path)
    inside = any(os.path.commonpath([real, root]) == root for root in map(os.path.realpath, below))
    return real if inside and os.path.isfile(real) else None


def _content(stored: Any, below: Sequence[Path]) -> bytes:
    """The bytes of an image; a file that is only named is read if it lies where the data set does."""
    if isinstance(stored, bytes):
        return stored
    if stored is not None and stored["bytes"] is not None:
        content: bytes = stored["bytes"]
        return content
    path = None if stored is None else stored["path"]
    if path is None:
        raise BadImage("unreadable", "no bytes in this row")
    own = _own_file(path, below)
    if own is None:
        raise BadImage("unreadable", f"{safe(path)} is not stored with the data set")
    return read_file(own)
