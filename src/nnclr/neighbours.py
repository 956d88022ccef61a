"""Nearest neighbours by cosine similarity: of any vectors, and of every row among the others.

Exact search multiplies in float32, a block at a time, and decides in float64: what float32 cannot tell apart is
computed again, so that a similarity is that of double precision, rounded to float32, and of equal ones the lower row
comes first. An approximate search by faiss only proposes rows; their similarities are computed here.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.checkpoint import write_atomically
from nnclr.errors import InputError, StorageError
from nnclr.finite import refuse_not_finite
from nnclr.progress import duration

_QUERIES, _ROWS = 1024, 4096  # compared at a time: 16 MiB of similarities
_NUMBERS = 2**22  # that are computed again at a time: 32 MiB each side
_SHORTEST, _LONGEST = 1e-30, 1e30  # norms; a shorter vector has no direction, its similarity to all is 0
_MOST_PAIRS = 5_000_000
_EVERY = 10.0  # seconds between two lines of progress
_SEED = 0
_TRAINED_ON = 50  # rows for each inverted list
_ENOUGH = 0.95  # recall@10 up to which more lists are looked into


class NeighbourIndex:
    """The nearest rows of an array by cosine similarity.

    Args:
        features: (n, d) float32 or float16, finite, in memory or memory-mapped; not copied, normalised where read.
        approximate: let faiss propose rows by inverted lists instead of looking at all; for millions of rows.
        path: where the approximate index is kept, with `PATH.json` beside it. It is used again if it was built from
            the same vectors and its hash is the one written then, else built anew. None: built in memory.

    Attributes:
        recall: recall@10 of the approximate index on 200 rows, measured when it was built; None for exact search.
        built: whether the approximate index was built just now.

    Raises:
        InputError: if the array is not (n, d), empty or not finite, or faiss is needed and missing.
        StorageError: if the index cannot be written.
    """

    def __init__(self, features: Any, *, approximate: bool = False, path: Path | None = None) -> None:
        self._features = _array(features)
        self._inverse_norms = _inverse_norms(self._features)
        self._lists: Any = None  # faiss' index
        self.recall: float | None = None
        self.built = False
        if approximate:
            self._open_lists(path)

    def __len__(self) -> int:
        return len(self._features)

    def kneighbors(self, queries: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The k rows most similar to each query; of equal similarities the lower row first.

        Memory is that of a few blocks, whatever n is.

        Args:
            queries: (q, d) or (d,), normalised here.
            k: at least 1, cut to n (scikit-learn refuses a larger one).

        Returns:
            Similarities (q, k) float32, best first, and rows (q, k) int64. An approximate search that finds fewer
            fills up with row -1 at similarity -inf.

        Raises:
            InputError: for queries of another width or not finite, or a k below 1.
        """
        asked = _array(np.atleast_2d(np.asarray(queries)))
        d = self._features.shape[1]
        if asked.shape[1] != d:
            raise InputError(f"the queries have {asked.shape[1]} numbers and the rows {d}: use one encoder for both")
        if k < 1:
            raise InputError(f"k is {k}; ask for at least one neighbour")
        k = min(k, len(self))
        search = self._exact if self._lists is None else self._approximate
        found = [search(_unit(asked[i : i + _QUERIES]), k) for i in range(0, len(asked), _QUERIES)]
        return np.concatenate([block[0] for block in found]), np.concatenate([block[1] for block in found])

    def neighbours_of(self, rows: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The k other rows most similar to each of some rows, as `kneighbors` gives them.

        Args:
            rows: (r,) whole numbers below n.
            k: at least 1, cut to n - 1.
        """
        asked = np.asarray(rows, np.int64)
        return _without(asked, *self.kneighbors(self._features[asked], k + 1))

    def recall_at(self, k: int, sample: int = 1000) -> float:
        """Share of the k true neighbours of some rows that the search finds; 1 for exact search.

        Args:
            k: neighbours, without the row itself. One that is as similar as the k-th true one counts as found.
            sample: rows that are asked, drawn with a fixed seed.
        """
        rows = np.sort(np.random.default_rng(_SEED).permutation(len(self))[:sample])
        return self._recall(rows, self._true(rows, k))

    def similarities(self, unit: np.ndarray, asked: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Similarity of pairs, (p,) float32: of `unit[asked]` with the given rows, computed in float64."""
        out = np.empty(len(rows), np.float32)
        step = max(1, _NUMBERS // unit.shape[1])
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            theirs = self._features[rows[some]].astype(np.float64) * self._inverse_norms[rows[some], None]
            out[some] = np.einsum("pd,pd->p", unit[asked[some]], theirs)
        return out

    def scores(self, unit: np.ndarray, rows: slice) -> np.ndarray:
        """Similarities of normalised queries with a block of rows, (q, b) float32, to within half of `margin`."""
        block: np.ndarray = unit.astype(np.float32) @ self._features[rows].astype(np.float32, copy=False).T
        block *= self._inverse_norms[rows].astype(np.float32)
        return block

    @property
    def margin(self) -> float:
        """Twice the largest error of a similarity in float32: d + 8 roundings of a sum below 1."""
        return float(2 * (self._features.shape[1] + 8) * 2.0**-24)

    def unit_rows(self, rows: slice) -> np.ndarray:
        """Rows of length 1, (b, d) float64; zeros stay zeros."""
        unit: np.ndarray = self._features[rows].astype(np.float64) * self._inverse_norms[rows, None]
        return unit

    def _exact(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        best = _nothing(len(unit), k)
        for start in range(0, len(self), _ROWS):
            rows = slice(start, start + _ROWS)
            scores = self.scores(unit, rows)
            floor, width = best[0][:, -1], scores.shape[1]
            candidates = scores >= (floor - self.margin)[:, None]
            if width > k and np.count_nonzero(candidates) > 4 * k * len(unit):
                floor = np.maximum(floor, np.partition(scores, width - k, axis=1)[:, width - k])
                candidates = scores >= (floor - self.margin)[:, None]
            if width > k and np.count_nonzero(candidates) > candidates.size / 8:  # collapsed vectors: all are alike
                exact = (unit @ self.unit_rows(rows).T).astype(np.float32)
                asked, column = np.nonzero(_largest(exact, k))
                similarities = exact[asked, column]
            else:
                asked, column = np.nonzero(candidates)
                similarities = self.similarities(unit, asked, column + start)
            best = _merged(best, asked, column + start, similarities)
        return best

    def _approximate(self, unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        # More than k, as faiss breaks ties in its own way.
        _, proposed = self._lists.search(unit.astype(np.float32), min(2 * k + 16, len(self)))
        asked, place = np.nonzero(proposed >= 0)
        rows = proposed[asked, place]
        return _merged(_nothing(len(unit), k), asked, rows, self.similarities(unit, asked, rows))

    def _true(self, rows: np.ndarray, k: int) -> np.ndarray:
        k = min(k, len(self) - 1)
        found = [
            _without(some, *self._exact(_unit(self._features[some]), k + 1))[0]
            for some in np.split(rows, range(_QUERIES, len(rows), _QUERIES))
        ]
        return np.concatenate(found)

    def _recall(self, rows: np.ndarray, true: np.ndarray) -> float:
        if true.shape[1] == 0:
            return 1.0
        found, _ = self.neighbours_of(rows, true.shape[1])
        return float(np.mean(found >= true[:, -1:]))

    def _open_lists(self, path: Path | None) -> None:
        """Read the approximate index if it is the one that these vectors give, else build and keep it."""
        faiss = _faiss()
        facts = {"vectors": _hash(self._features), "faiss": faiss.__version__, "format": 1}
        described = None if path is None else path.with_name(path.name + ".json")
        if path is not None and described is not None:
            known = _known(path, described)
            if known is not None and facts.items() <= known.items():
                self._lists = faiss.read_index(str(path))
                self._lists.nprobe, self.recall = int(known["probes"]), float(known["recall"])
                return
        self._build(faiss)
        if path is None or described is None:
            return
        unfinished = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            faiss.write_index(self._lists, str(unfinished))
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
                facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise StorageError(f"the index could not be written to {path}: {str(error)[:160]}") from error
        facts |= {"probes": self._lists.nprobe, "recall": self.recall}
        write_atomically(described, (json.dumps(facts, indent=1) + "\n").encode())

    def _build(self, faiss: Any) -> None:
        """Inverted lists, and as many of them looked into as a recall of 0.95 needs; the same rows give the same."""
        n, d = self._features.shape
        lists = max(1, min(round(2 * n**0.5), n // _TRAINED_ON))
        built = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        built.cp.seed, built.cp.spherical, built.cp.min_points_per_centroid = 1 + _SEED, True, 1
        order = np.random.default_rng(_SEED).permutation(n)
        sample = np.sort(order[: _TRAINED_ON * lists])
        built.train(_unit(self._features[sample]).astype(np.float32))
        for start in range(0, n, _ROWS):
            built.add(self.unit_rows(slice(start, start + _ROWS)).astype(np.float32))
        self._lists, self.built = built, True
        asked = np.sort(order[:200])
        true = self._true(asked, 10)
        built.nprobe = min(8, lists)
        while (recall := self._recall(asked, true)) < _ENOUGH and built.nprobe < lists:
            built.nprobe = min(2 * built.nprobe, lists)
        self.recall = recall


@dataclass(frozen=True)
class Duplicates:
    """Rows that are nearly the same."""

    pairs: np.ndarray  # (p, 2) int64 rows i < j, in order
    similarities: np.ndarray  # (p,) float32
    groups: list[np.ndarray]  # rows that are linked by pairs, largest group first


@dataclass(frozen=True)
class Hints:
    """Rows whose neighbours carry another label, the clearest first."""

    rows: np.ndarray  # (h,) int64
    suggested: np.ndarray  # (h,) int64, the label of most neighbours
    share: np.ndarray  # (h,) float64, of the labelled neighbours that carry it
    own_share: np.ndarray  # (h,) float64, that carry the row's own label


def near_duplicates(features: Any, threshold: float, say: Callable[[str], None] | None = None) -> Duplicates:
    """All pairs of rows with a cosine similarity of at least threshold, and the groups that they form.

    Every row is compared with every other, in blocks; time is O(n^2 d).

    Args:
        features: (n, d), or a `NeighbourIndex` of them.
        threshold: above 0, at most 1.
        say: takes a line of progress every ten seconds.

    Raises:
        InputError: if the threshold is out of range, or so low that more than 5 million pairs reach it.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"a similarity of {threshold} is no threshold: it must be above 0 and at most 1")
    index = features if isinstance(features, NeighbourIndex) else NeighbourIndex(features)
    progress = _Progress(len(index) ** 2, say)
    pairs, similarities, count = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)], 0
    for first in range(0, len(index), _QUERIES):
        unit = index.unit_rows(slice(first, first + _QUERIES))
        for start in range(first, len(index), _ROWS):
            scores = index.scores(unit, slice(start, start + _ROWS))
            i, j = np.nonzero(scores >= threshold - index.margin)
            later = j + start > i + first
            i, j = i[later], j[later] + start
            exact = index.similarities(unit, i, j)
            enough = exact >= np.float32(threshold)
            pairs.append(np.stack([i + first, j], axis=1)[enough])
            similarities.append(exact[enough])
            count += int(enough.sum())
            if count > _MOST_PAIRS:
                raise InputError(
                    f"more than {_MOST_PAIRS:,} pairs are at least {threshold:g} similar; ask for a higher similarity"
                )
        progress.at(len(index) ** 2 - (len(index) - first - len(unit)) ** 2)
    found, values = np.concatenate(pairs), np.concatenate(similarities)
    order = np.lexsort((found[:, 1], found[:, 0]))
    return Duplicates(found[order], values[order], _groups(found))


def label_hints(features: Any, labels: Any, k: int = 10, say: Callable[[str], None] | None = None) -> Hints:
    """Rows whose k nearest others vote for another label than their own: perhaps a mistake, perhaps a hard case.

    Each labelled neighbour has one vote; of equal votes the row's own label wins, then the lowest.

    Args:
        features: (n, d), or a `NeighbourIndex` of them.
        labels: (n,) whole numbers, -1 for a row without, which neither votes nor is asked.
        k: neighbours.
        say: takes a line of progress every ten seconds.

    Raises:
        InputError: if the labels do not fit.
    """
    index = features if isinstance(features, NeighbourIndex) else NeighbourIndex(features)
    labels = np.asarray(labels)
    if labels.shape != (len(index),) or labels.dtype.kind not in "iu":
        raise InputError(f"{len(index)} rows need as many whole numbers as labels")
    labels = labels.astype(np.int64)
    asked = np.flatnonzero(labels >= 0)
    progress = _Progress(len(asked), say)
    found = [np.empty((0, 4))]
    for start in range(0, len(asked), _QUERIES):
        rows = asked[start : start + _QUERIES]
        neighbours = index.neighbours_of(rows, k)[1]
        theirs = np.where(neighbours >= 0, labels[neighbours], -1)
        votes = ((theirs[:, :, None] == theirs[:, None, :]) & (theirs >= 0)[:, :, None]).sum(axis=2)
        most, voters = votes.max(axis=1, initial=0), (theirs >= 0).sum(axis=1)
        suggested = np.where(votes == most[:, None], theirs, np.iinfo(np.int64).max).min(axis=1, initial=2**62)
        own = (theirs == labels[rows, None]).sum(axis=1)
        wrong = most > own
        total = voters[wrong]
        hint = [rows[wrong], suggested[wrong], most[wrong] / total, own[wrong] / total]
        found.append(np.stack(hint, axis=1))
        progress.at(start + len(rows))
    table = np.concatenate(found)
    table = table[np.lexsort((table[:, 0], table[:, 3], -table[:, 2]))]
    return Hints(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], table[:, 3])


class _Progress:
    def __init__(self, total: int, say: Callable[[str], None] | None) -> None:
        self.total, self.say = total, say
        self.began = self.said = time.perf_counter()

    def at(self, done: int) -> None:
        now = time.perf_counter()
        if self.say is not None and now - self.said > _EVERY and done < self.total:
            left = duration((now - self.began) * (self.total - done) / done)
            self.say(f"comparing: {100 * done / self.total:.0f} %, {left} left")
            self.said = now


def _array(features: Any) -> np.ndarray:
    array: np.ndarray = features if isinstance(features, np.ndarray) else np.asarray(features)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise InputError(f"vectors must be numbers of shape (n, d), these are {array.shape} {array.dtype}")
    return array


def _inverse_norms(features: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 / norm of each row, 0 for a row that is too short to have a direction."""
    out = np.empty(len(features))
    for start in range(0, len(features), _ROWS):
        norms = np.linalg.norm(features[start : start + _ROWS].astype(np.float64), axis=1)
        bad = ~(norms < _LONGEST)
        if bad.any():
            refuse_not_finite(features, "the vectors")
            raise InputError(f"row {start + int(bad.argmax())} of the vectors is longer than 1e30")
        out[start : start + _ROWS] = np.divide(1, norms, out=np.zeros_like(norms), where=norms > _SHORTEST)
    return out


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64."""
    unit: np.ndarray = vectors.astype(np.float64) * _inverse_norms(vectors)[:, None]
    return unit


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Mask of the k largest of each row; of equal ones the first."""
    last = scores.shape[1] - k
    least = np.partition(scores, last, axis=1)[:, last, None]
    above, equal = scores > least, scores == least
    mask: np.ndarray = above | (equal & (np.cumsum(equal, axis=1) <= k - above.sum(axis=1, keepdims=True)))
    return mask


def _nothing(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)


def _merged(
    best: tuple[np.ndarray, np.ndarray], asked: np.ndarray, rows: np.ndarray, similarities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best of what was known and of new pairs (query, row), in order."""
    queries, k = best[0].shape
    known, place = np.nonzero(best[1] >= 0)
    query = np.concatenate([known, asked])
    row = np.concatenate([best[1][known, place], rows])
    similarity = np.concatenate([best[0][known, place], similarities])
    order = np.lexsort((row, -similarity, query))
    query, row, similarity = query[order], row[order], similarity[order]
    rank = np.arange(len(query)) - np.searchsorted(query, np.arange(queries))[query]
    kept = rank < k
    out = _nothing(queries, k)
    out[0][query[kept], rank[kept]] = similarity[kept]
    out[1][query[kept], rank[kept]] = row[kept]
    return out


def _without(rows: np.ndarray, similarities: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours less the row that was asked, or less the last where more equal rows stand before it."""
    itself = indices == rows[:, None]
    itself[:, -1] |= ~itself.any(axis=1)
    shape = (len(rows), indices.shape[1] - 1)
    return similarities[~itself].reshape(shape), indices[~itself].reshape(shape)


def _groups(pairs: np.ndarray) -> list[np.ndarray]:
    """Connected components, largest first, then by their first row."""
    above: dict[int, int] = {}

    def root(row: int) -> int:
        while above.setdefault(row, row) != row:
            above[row] = row = above[above[row]]
        return row

    for i, j in pairs.tolist():
        one, other = root(i), root(j)
        above[max(one, other)] = min(one, other)
    members: dict[int, list[int]] = {}
    for row in sorted(above):
        members.setdefault(root(row), []).append(row)
    return sorted((np.array(group) for group in members.values()), key=lambda group: (-len(group), group[0]))


def _hash(features: np.ndarray) -> str:
    digest = hashlib.sha256(f"{features.shape} {features.dtype.str}".encode())
    for start in range(0, len(features), _ROWS):
        digest.update(np.ascontiguousarray(features[start : start + _ROWS]).tobytes())
    return digest.hexdigest()


def _known(path: Path, described: Path) -> dict[str, Any] | None:
    """What was written when an index was built, if the file is still that one; faiss must not read any other."""
    try:
        facts = json.loads(described.read_bytes())
        with open(path, "rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]
        return facts if intact and {"probes", "recall"} <= facts.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError("approximate search needs faiss; pip install 'nnclr[index]', or search exactly") from None
    return faiss
