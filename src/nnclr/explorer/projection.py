"""From embeddings to a map: two coordinates and a cluster for every picture, computed once and kept in a file.

The map is UMAP's, after a PCA to 50 dimensions where the embeddings are wider; without umap-learn, or for a handful
of pictures, the first two principal components. Everything is seeded: the same embeddings give the same map.
"""

import hashlib
import io
import json
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnclr.checkpoint import write_atomically
from nnclr.data.array_file import UNREADABLE
from nnclr.errors import InputError, StorageError

FORMAT = 1
METHODS = ("umap", "pca")
TINY = 15  # pictures below which UMAP's graph of neighbours has no meaning
_NEIGHBOURS, _MIN_DIST, _PCA_DIMS, _SEED = 15, 0.1, 50, 0
_CLUSTERS, _PER_CLUSTER = 12, 5  # at most; pictures that a cluster needs on average
_MINI_BATCH = 20_000  # pictures above which k-means learns from batches


@dataclass(frozen=True)
class Projection:
    """Where n pictures lie on the map, and in which cluster.

    Args:
        points: (n, 2) float32 from -1 to 1, the longer side filling that range.
        clusters: (n,) int64 from 0, numbered by size, or None where scikit-learn is missing or n is too small.
        how: for people: what made the points.
    """

    points: np.ndarray
    clusters: np.ndarray | None
    how: str


def project(
    vectors: np.ndarray, keep: Path, method: str = "umap", say: Callable[[str], None] = print, title: str = ""
) -> Projection:
    """The map of some embeddings, read from `keep` if it is that of these embeddings, else computed.

    Args:
        vectors: (n, d) float32 of length 1.
        keep: where a UMAP map is kept; a damaged or outdated file is replaced, and a folder that cannot be written
            costs the next start the same time again.
        method: `umap` or `pca`.
        say: told what is done, and the seconds.
        title: named in these lines.

    Raises:
        InputError: for another method, or no pictures.
    """
    if method not in METHODS:
        raise InputError(f"projection '{method}' is none of: {', '.join(METHODS)}")
    if len(vectors) == 0:
        raise InputError(f"{title or 'the embeddings'} hold no picture")
    umap_version = _version("umap-learn")
    if method == "pca" or umap_version is None or len(vectors) < TINY:
        if method == "umap" and umap_version is None:
            say("the map shows principal components; pip install 'nnclr[explore]' for UMAP, which separates groups")
        return Projection(_scaled(principal(vectors, 2)), _clusters(vectors), "first two principal components")
    facts = {"format": FORMAT, "umap": umap_version, "sklearn": _version("scikit-learn"), "neighbours": _NEIGHBOURS}
    facts |= {"min_dist": _MIN_DIST, "pca": _PCA_DIMS, "seed": _SEED, "shape": list(vectors.shape)}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + np.ascontiguousarray(vectors).data).hexdigest()
    how = f"UMAP, {_NEIGHBOURS} neighbours" + (f", after PCA to {_PCA_DIMS}" if vectors.shape[1] > _PCA_DIMS else "")
    kept = _read(keep, key, len(vectors))
    if kept is not None:
        return Projection(*kept, how)
    say(
        f"computing the map of {len(vectors):,} pictures by UMAP{f' ({title})' if title else ''}; it is done once, and "
        "takes about half a minute more while UMAP is compiled"
    )
    started = time.perf_counter()
    points, clusters = _scaled(_umap(vectors)), _clusters(vectors)
    seconds = time.perf_counter() - started
    try:
        write_atomically(keep, _packed(key, points, clusters))
        say(f"the map took {seconds:.0f} s and is kept in {keep}")
    except StorageError as error:
        say(f"the map took {seconds:.0f} s and is not kept: {error}")
    return Projection(points, clusters, how)


def principal(vectors: np.ndarray, dims: int) -> np.ndarray:
    """Coordinates (n, dims) float32 on the first principal components, by a seeded randomised decomposition.

    The sign of a component, which is arbitrary, is such that its largest entry is positive. Components that the
    data do not have are 0.
    """
    centred = torch.from_numpy(np.asarray(vectors, np.float32) - np.asarray(vectors, np.float32).mean(0))
    rank = min(dims + 10, *centred.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        axes = torch.svd_lowrank(centred, rank, niter=4)[2].numpy()[:, :dims]
    axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    coordinates = np.zeros((len(vectors), dims), np.float32)
    coordinates[:, : axes.shape[1]] = centred.numpy() @ axes
    return coordinates


def _umap(vectors: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba and UMAP talk about threads and caches
        from umap import UMAP

        narrow = principal(vectors, _PCA_DIMS) if vectors.shape[1] > _PCA_DIMS else vectors
        # One job: with several the result depends on how they interleave.
        layout = UMAP(n_neighbors=_NEIGHBOURS, min_dist=_MIN_DIST, init="pca", random_state=_SEED, n_jobs=1)
        points: np.ndarray = layout.fit_transform(narrow)
    return points


def _scaled(points: np.ndarray) -> np.ndarray:
    """Centred, the longer side from -1 to 1; a point that has no place (UMAP knows such) lies in the middle."""
    finite = np.nan_to_num(np.asarray(points, np.float64))
    low, high = finite.min(0), finite.max(0)
    scaled: np.ndarray = (2 * finite - (low + high)) / max(float((high - low).max()), 1e-12)
    return scaled.astype(np.float32)


def _clusters(vectors: np.ndarray) -> np.ndarray | None:
    count = min(_CLUSTERS, len(vectors) // _PER_CLUSTER)
    if count < 2 or _version("scikit-learn") is None:
        return None
    from sklearn.cluster import KMeans, MiniBatchKMeans

    narrow = principal(vectors, _PCA_DIMS) if vectors.shape[1] > _PCA_DIMS else vectors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct pictures than clusters
        if len(narrow) > _MINI_BATCH:
            means = MiniBatchKMeans(count, batch_size=4096, n_init=3, random_state=_SEED)
        else:
            means = KMeans(count, n_init=3, random_state=_SEED)
        found = means.fit_predict(narrow)
    by_size = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    numbers = np.empty(count, np.int64)
    numbers[by_size] = np.arange(count)
    numbered: np.ndarray = numbers[found]
    return numbered


def _packed(key: str, points: np.ndarray, clusters: np.ndarray | None) -> bytes:
    content: dict[str, Any] = {"key": np.array(key), "points": points}
    if clusters is not None:
        content["clusters"] = clusters
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **content)
    return file.getvalue()


def _read(path: Path, key: str, n: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """What the file holds, or None if it is missing, damaged, too large to be ours, or of other embeddings."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 16 * n + 10_000:
                return None
        with np.load(path, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return None
            points = content["points"]
            clusters = content.get("clusters")
    except (*UNREADABLE, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    right = points.shape == (n, 2) and points.dtype == np.float32 and bool(np.isfinite(points).all())
    if clusters is not None:
        right &= (
            clusters.shape == (n,)
            and clusters.dtype == np.int64
            and bool(((clusters >= 0) & (clusters < _CLUSTERS)).all())
        )
    return (points, clusters) if right else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
