"""Patches of the real photographs that the scikit-image wheel ships: data for a demo without network."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from nnclr import counter
from nnclr.data.decode import decode, read_file
from nnclr.data.images import Source, array_source
from nnclr.errors import InputError

PHOTOS = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
    "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg"
).split()
_PATCH, _SIDE = 32, 256  # pixels of a patch; pixels of the shorter side of a photograph before it is cut
_TRAIN, _TEST = (0.0, 0.60), (0.65, 1.0)  # share of the width; no pixel is in both
_PER_PHOTO = {"train": 300, "test": 60}


def photo_patches(split: str = "train") -> Source:
    """32 x 32 patches at fixed pseudo-random places; the label is the photograph.

    Train patches come from the left 60 % of each photograph, test patches from the right 35 %.

    Raises:
        InputError: if scikit-image is not installed, or the split is unknown.
    """
    if split not in _PER_PHOTO:
        raise InputError(f"demo-photos?split={split}: a split is train or test")
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("the demo's photographs come with scikit-image; pip install 'nnclr[demo]'")
    folder = Path(package.origin).parent / "data"
    low, high = _TRAIN if split == "train" else _TEST
    patches, labels = [], []
    for label, name in enumerate(PHOTOS):
        photo = _shrink(decode(read_file(str(folder / name))))
        height, width = photo.shape[:2]
        left, right = round(low * width), round(high * width)
        places = counter.uniform(0, 0, np.arange(_PER_PHOTO[split]), label, 2)
        tops = np.floor(places[:, 0] * (height - _PATCH + 1)).astype(int)
        lefts = left + np.floor(places[:, 1] * (right - left - _PATCH + 1)).astype(int)
        patches += [photo[y : y + _PATCH, x : x + _PATCH] for y, x in zip(tops, lefts, strict=True)]
        labels += [label] * len(places)
    names = [Path(name).stem for name in PHOTOS]
    return array_source(np.stack(patches), np.array(labels), f"demo-photos?split={split}", names)


def _shrink(photo: np.ndarray) -> np.ndarray:
    """Shorter side to 256 pixels, so that a patch shows more than a speck."""
    height, width = photo.shape[:2]
    scale = min(1.0, _SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
