"""The golden vector: features of one synthetic picture, by which a saved encoder proves that nothing was mixed up.

Weights and preprocessing lie in two files. Whoever loads them computes the features again; another size, crop, mean or
order of channels, or weights of another save, give others.
"""

import json
from pathlib import Path

import numpy as np
import safetensors

from nnclr.errors import InputError

_KEY = "nnclr_golden"  # in the metadata of the weights, so that no kill can part the two
_NUMBERS = 64
# Float32 on another processor or with other threads moves features by about 1e-5 of the largest one, TF32 and a
# Pillow that rounds otherwise by 1e-3; a crop 0.01 tighter, or a mean 0.01 off, moves them by 1e-2 and more.
_LARGEST_DIFFERENCE, _SMALLEST_COSINE = 4e-3, 0.99999


def golden_image() -> np.ndarray:
    """A picture (277, 331, 3) uint8 of integer arithmetic, the same everywhere.

    Its channels have other levels and other patterns, coarse to fine, so that exchanged channels, another mean,
    size, crop or interpolation change the features.
    """
    y, x = np.mgrid[:277, :331]
    red = 96 + (y * y // 24 + 3 * x) % 160
    green = (x * x // 31 + 2 * y) % 256
    blue = (x // 23 + y // 19) % 2 * 56 + x * y // 97 % 56
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def sample(features: np.ndarray) -> np.ndarray:
    """Up to 64 of the features (d,), evenly spaced: enough to notice any change, and small."""
    chosen = np.linspace(0, len(features) - 1, min(len(features), _NUMBERS)).round().astype(int)
    some: np.ndarray = features[chosen]
    return some


def compare(found: np.ndarray, stored: np.ndarray, path: str) -> None:
    """Nothing, where the features are those that were stored.

    Args:
        found: (k,) float32, the sample of the features here and now.
        stored: (k,) float32.
        path: of the encoder, for the message.

    Raises:
        InputError: if they differ.
    """
    if found.shape != stored.shape:
        raise InputError(f"the encoder in {path} has a golden vector of another width than its features")
    scale = float(np.abs(stored).max())
    difference = float(np.abs(found - stored).max()) / max(scale, 1e-12)
    norms = float(np.linalg.norm(found) * np.linalg.norm(stored))
    cosine = float(found @ stored) / norms if norms else 1.0
    if not (difference <= _LARGEST_DIFFERENCE and cosine >= _SMALLEST_COSINE):
        raise InputError(
            f"the encoder in {path} does not give the features it was saved with: the preprocessing in config.json "
            f"(size, crop, mean, std) or the weights in model.safetensors do not match (largest difference "
            f"{difference:.1%} of the largest feature, cosine {cosine:.6f}); use the two files of one save"
        )


def with_golden(content: bytes, features: np.ndarray) -> bytes:
    """A safetensors file with some of these features in its metadata.

    Written into the header, because the library puts several entries in random order: a file has to depend on what is
    in it alone.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][_KEY] = json.dumps(sample(features).tolist())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]])


def stored_golden(path: Path) -> np.ndarray | None:
    """The features in a weights file's metadata, (k,) float32; None where there are none.

    Raises:
        ValueError: if what is there is no vector.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    if text is None:
        return None
    stored = np.array(json.loads(text), np.float32)
    if stored.ndim != 1 or not len(stored):
        raise ValueError("its golden vector is none")
    return stored
