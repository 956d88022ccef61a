"""Features of images, computed once: memory-mapped files under a key of everything that they depend on."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from nnclr import distributed
from nnclr.data.array_file import UNREADABLE
from nnclr.data.images import Source
from nnclr.encoder import Encoder
from nnclr.evaluation.result import versions
from nnclr.models.backbone import feature_dim
from nnclr.progress import Lines

MOST_BYTES = 20 * 2**30  # of the cache; what was used longest ago is removed first


def cache_folder() -> Path:
    """$NNCLR_CACHE, or ~/.cache/nnclr."""
    return Path(os.environ.get("NNCLR_CACHE", str(Path.home() / ".cache" / "nnclr"))) / "features"


def embedded(encoder: Encoder, source: Source, num_workers: int, say: Callable[[str], None]) -> np.ndarray:
    """Features of all images, (n, d) float32, memory-mapped and read from the cache where they are there.

    Memory is that of one batch whatever n is. A module of your own, whose code may change while its weights do not,
    is never looked up in the cache. Writing to the result changes the caller's copy only. In a job of several ranks
    all of them call it together: each computes a share of the batches and gets all features.
    """
    key = cache_key(encoder, source)
    distributed.agree({"encoder or set of images": key})
    known = cache_folder() / f"{key}.npy"
    found = _cached(known) if encoder.name else None
    if not distributed.mean({"missing": float(found is None)})["missing"] and found is not None:
        return found
    if not encoder.name or distributed.rank() != 0:  # one rank keeps them for all
        return _computed(encoder, source, num_workers, say, None)
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        needed = 4 * len(source) * feature_dim(encoder.module, encoder.image_size)
        if shutil.disk_usage(known.parent).free < 1.1 * needed:  # writing to a map of a full disk would be fatal
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor, temporary = tempfile.mkstemp(dir=known.parent, prefix=".tmp-", suffix=".npy")
        os.close(descriptor)
    except OSError as error:
        say(f"warning: features are not kept: {known.parent} cannot be written ({error.strerror})")
        return _computed(encoder, source, num_workers, say, None)
    try:
        _computed(encoder, source, num_workers, say, Path(temporary))
        os.replace(temporary, known)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _prune(known)
    kept: np.ndarray = np.load(known, mmap_mode="c")
    return kept


def _cached(known: Path) -> np.ndarray | None:
    try:
        features: np.ndarray = np.load(known, mmap_mode="c")
        os.utime(known)
        return features
    except UNREADABLE:  # not there, cut off by a full disk, or removed meanwhile
        return None


def cache_key(encoder: Encoder, source: Source) -> str:
    """SHA-256 over weights, architecture, preprocessing, device, images and versions, hex."""
    facts = {
        "encoder": encoder.fingerprint,
        "architecture": str(encoder.module),
        "preprocessing": encoder.preprocessing,
        "device": encoder.device.type,  # other devices round in another way
        "data": source.fingerprint,
        "revision": source.revision,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _computed(
    encoder: Encoder, source: Source, num_workers: int, say: Callable[[str], None], path: Path | None
) -> np.ndarray:
    """The features in memory, or in a memory-mapped file."""
    shape = (len(source), feature_dim(encoder.module, encoder.image_size))
    out: np.ndarray = (
        np.empty(shape, np.float32)
        if path is None
        else np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    )
    lines, done = Lines(f"embedding {source.name}", len(source), 0, say), 0
    for rows in encoder.embed_batches(source, num_workers=num_workers, together=True):
        out[done : done + len(rows)] = rows
        done += len(rows)
        lines.at(done)
    if isinstance(out, np.memmap):
        out.flush()
    return out


def _prune(keep: Path) -> None:
    """Remove what was used longest ago until the cache is small enough, and what killed processes left."""
    found = []
    for file in keep.parent.glob("*.npy"):
        with suppress(OSError):  # renamed by its process meanwhile
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = 0
    for used, size, file in sorted(found, reverse=True):
        unfinished = file.name.startswith(".tmp-")
        total += 0 if unfinished else size
        if used < time.time() - 86400 if unfinished else total > MOST_BYTES and file != keep:
            file.unlink(missing_ok=True)
