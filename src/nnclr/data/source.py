"""DATA in any of its forms to a `Source`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnclr.data.folder import folder_source
from nnclr.data.images import Source, array_source
from nnclr.data.named import torchvision_source
from nnclr.data.parquet import parquet_source
from nnclr.data.photos import photo_patches
from nnclr.errors import InputError

ACCEPTED = (
    "a folder of images, a list of folders, FILE.parquet, torchvision:NAME, demo-photos, an array of images, "
    "or a pair (images, labels)"
)


def open_source(data: Any) -> Source:
    """Open DATA in any of its forms.

    Args:
        data: a `Source` (returned as it is); a folder at any depth, or a list of them; `FILE.parquet` with an
            optional `?split=train&label=COLUMN`; `torchvision:NAME[?split=test]`; `demo-photos[?split=test]`; an
            array or tensor of uint8 images (n, h, w[, 1 or 3]) or (n, 3, h, w); or a pair (images, labels).

    Raises:
        InputError: if it is none of these, or holds no image; the message says what was found.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return array_source(data, None)
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], (str, os.PathLike)):
        return array_source(*data)
    if isinstance(data, (list, tuple)) and data and all(isinstance(part, (str, os.PathLike)) for part in data):
        return folder_source([Path(part) for part in data])
    if not isinstance(data, (str, os.PathLike)):
        raise InputError(f"data of type {type(data).__name__} is none of: {ACCEPTED}")
    text, _, query = os.fspath(data).partition("?")
    if text.startswith("torchvision:"):
        return torchvision_source(text.removeprefix("torchvision:"), **parse_query(query, {"split"}))
    if text == "demo-photos":
        return photo_patches(**parse_query(query, {"split"}))
    if text.endswith(".parquet"):
        return parquet_source(Path(text), parse_query(query))
    if text.startswith("hf:") or text.endswith(".tar"):
        raise InputError(f"{text}: this version does not read hf: and .tar data; it reads {ACCEPTED}")
    return folder_source([Path(os.fspath(data))])


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
        choices = "NAME=VALUE" if known is None else ", ".join(f"{name}=..." for name in sorted(known))
        raise InputError(f"'{wrong[0]}' after the ? is not understood; expected {choices}")
    return pairs
