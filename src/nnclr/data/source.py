"""DATA in any of its forms to a `Source`."""

import glob
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nnclr.data.array_file import npy_source
from nnclr.data.folder import folder_source
from nnclr.data.hub import hub_source
from nnclr.data.images import Source, array_source, is_tensor, shown
from nnclr.data.named import torchvision_source
from nnclr.data.parquet import parquet_source
from nnclr.data.photos import photo_patches
from nnclr.data.pictures import are_pictures, file_source, paths_of_pictures, picture_source
from nnclr.data.shards import is_shard_folder, shard_source
from nnclr.data.storage import is_remote, listed
from nnclr.errors import InputError

ACCEPTED = (
    "a folder of images, a list of folders, a folder of shards, SHARDS.tar, FILES.parquet, FILE.npy, "
    "hf:NAME_OR_PATH, torchvision:NAME, demo-photos, an array of images, a list of Pillow images or of paths of "
    "pictures, or a pair (images, labels)"
)


def refuse_inside(data: Any, out: str | Path) -> None:
    """Raise the InputError for an output below a folder of images: what is written there would be among them."""
    for part in data if isinstance(data, (list, tuple)) else [data]:
        folder = os.path.realpath(part) if isinstance(part, (str, os.PathLike)) and os.path.isdir(part) else None
        if folder is not None and Path(os.path.realpath(out)).is_relative_to(folder):
            raise InputError(f"the output {shown(out)} lies in the images of {shown(part)}; choose one outside of them")


def open_source(data: Any) -> Source:
    """Open DATA in any of its forms.

    Args:
        data: a `Source` (returned as it is); a folder at any depth, or a list of them; a folder that `nnclr pack`
            wrote; `SHARDS.tar` or `FILES.parquet`, each a file, a pattern with `*` or `{000..099}`, or a list, the
            latter with an optional `?split=train&label=COLUMN`; `FILE.npy[?labels=FILE.npy]`, which is not read as
            a whole; `hf:NAME_OR_PATH`; `torchvision:NAME[?split=test]`;
            `demo-photos[?split=test]`; an array or tensor of uint8 images (n, h, w[, 1 or 3]) or (n, 3, h, w); a Pillow
            image, or a list of them or of arrays (h, w[, 3]); a list of paths of pictures; or a pair (images, labels)
            of any of the last four, labels whole numbers or texts. Shards and parquet files may be addresses, such as
            `s3://...`.

    Raises:
        InputError: if it is none of these, or holds no image; the message says what was found.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, np.ndarray) or is_tensor(data):
        return array_source(data, None)
    if isinstance(data, Image.Image):
        return picture_source([data])
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], (str, os.PathLike, Image.Image)):
        if (paths := paths_of_pictures(data[0])) is not None:
            return file_source(paths, data[1])
        return picture_source(*data) if are_pictures(data[0]) else array_source(*data)
    if (paths := paths_of_pictures(data)) is not None:
        return file_source(paths)
    if are_pictures(data):
        return picture_source(data)
    if isinstance(data, (list, tuple)) and data and all(isinstance(part, (str, os.PathLike)) for part in data):
        return _files_source([os.fspath(part) for part in data])
    if not isinstance(data, (str, os.PathLike)):
        why = "; it is empty or of several kinds" if isinstance(data, (list, tuple)) else ""
        if not why and hasattr(data, "__getitem__"):
            why = "; of a data set give its images or their paths, with the labels: ([...], [...])"
        raise InputError(f"data of type {type(data).__name__} is none of: {ACCEPTED}{why}")
    path = os.fspath(data)
    text, _, query = path.partition("?")
    if text.startswith("torchvision:"):
        return torchvision_source(text.removeprefix("torchvision:"), **parse_query(query, {"split"}))
    if text == "demo-photos":
        return photo_patches(**parse_query(query, {"split"}))
    if text.startswith("hf:") and not is_remote(text):
        return hub_source(text.removeprefix("hf:"), **parse_query(query, {"split", "image", "label", "config"}))
    if text.endswith(".parquet"):
        return parquet_source([text], parse_query(query))
    if text.endswith(".npy") and not is_remote(text):
        return npy_source(Path(text), **parse_query(query, {"labels"}))
    if text.endswith(".tar") or is_remote(text):
        parse_query(query, set())
        return shard_source([text])
    return _files_source([path])


def _files_source(paths: list[str]) -> Source:
    """Folders of images, of shards or of parquet files, or such files."""
    for extension, source in ((".tar", shard_source), (".parquet", lambda found: parquet_source(found, {}))):
        if all(path.endswith(extension) for path in paths):
            return source(paths)
    if all(is_shard_folder(path) for path in paths):
        return shard_source(paths)
    try:
        return folder_source([Path(path) for path in paths])
    except InputError:
        for extension in (".tar", ".parquet"):
            found = [sorted(glob.glob(f"{glob.escape(path)}/*{extension}")) for path in paths]
            if all(found):
                name = listed([f"{path}/*{extension}" for path in paths])
                return replace(_files_source([file for some in found for file in some]), name=name)
        raise


def test_split(data: Any) -> Source | None:
    """The test images that belong to DATA by convention, or None where there is no such convention."""
    if not isinstance(data, str):
        return None
    text, _, query = data.partition("?")
    if "split=" in query or not (text.startswith("torchvision:") or text == "demo-photos"):
        return None
    return open_source(text + "?split=test")


test_split.__test__ = False  # type: ignore[attr-defined]  # pytest: this is no test


def parse_query(query: str, known: set[str] | None = None) -> dict[str, str]:
    """`a=x&b=y` as a dict.

    Raises:
        InputError: for a part without `=`, or a name that is not known.
    """
    pairs = dict(part.split("=", 1) for part in query.split("&") if "=" in part)
    wrong = [part for part in query.split("&") if part and "=" not in part]
    wrong += [] if known is None else sorted(pairs.keys() - known)
    if wrong:
        choices = "NAME=VALUE" if known is None else ", ".join(f"{name}=..." for name in sorted(known)) or "nothing"
        raise InputError(f"'{wrong[0]}' after the ? is not understood; expected {choices}")
    return pairs
