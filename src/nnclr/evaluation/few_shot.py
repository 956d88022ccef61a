"""Few-shot classification of frozen features: nearest class centroid over many small random tasks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nnclr import counter
from nnclr.errors import InputError
from nnclr.finite import refuse_not_finite, refuse_other_labels

_EPISODES = -4  # what the random numbers are for, beside those of counter and metrics
_GATHERED = 2**24  # numbers of a block of episodes: 64 MiB
_WAYS, _QUERIES = 5, 15  # that are asked for, where nothing else is


@dataclass(frozen=True)
class FewShotOutcome:
    """Accuracy of one number of shots, and how it was measured."""

    shots: int  # images to learn from, a class
    ways: int  # classes an episode
    queries: int  # images to classify, a class
    episodes: int
    classes: int  # that episodes are drawn from
    left_out: int  # classes with too few images
    accuracy: float  # mean over episodes, in [0, 1]
    interval: tuple[float, float]  # 95 %: the mean and 1.96 s / sqrt(episodes) to each side


def few_shot(
    features: np.ndarray,
    labels: np.ndarray,
    shots: tuple[int, ...] = (1, 5, 10),
    ways: int = _WAYS,
    queries: int = _QUERIES,
    episodes: int = 600,
    seed: int = 0,
) -> dict[int, FewShotOutcome]:
    """Accuracy of the nearest centroid on episodes of a few classes and a few images of each.

    Prototypes as in Snell et al. (2017) on the features of SimpleShot's L2N (Wang et al., 2019): each feature is
    divided by its norm, a class is the mean of its shots, and a query goes to the class with the largest cosine.
    There is no centring (CL2N): the mean of all given features would be knowledge of the queries.

    Args:
        features: (n, d) float32, in memory or memory-mapped; not copied.
        labels: (n,) whole numbers.
        shots: numbers of images a class to learn from; each is measured on its own.
        ways: classes an episode, cut to those that have at least shots + 1 images.
        queries: images a class to classify, cut to what the smallest of those classes has beside its shots.
        episodes: random tasks for each number of shots, at least 2.
        seed: an episode is a pure function of seed, shots, its number, and the labels.

    Returns:
        An outcome for each number of shots.

    Raises:
        InputError: if fewer than two classes have shots + 1 images, a number is too small, labels are not one
            a row, or a feature is not finite.
    """
    if min(*shots, queries) < 1 or min(ways, episodes) < 2:
        raise InputError("few-shot needs at least 1 shot, 1 query, 2 ways and 2 episodes; raise the one that is lower")
    refuse_other_labels(labels, len(features))
    refuse_not_finite(features, "the features")
    return {count: _measure(features, labels, count, ways, queries, episodes, seed) for count in shots}


def episodes_in_words(outcomes: Sequence[FewShotOutcome]) -> str:
    """What an episode is; where numbers of shots differ in it, in their order."""
    shots = _each([outcome.shots for outcome in outcomes])
    return (
        f"{_each([o.episodes for o in outcomes])} episodes for each number of shots; an episode draws "
        f"{_each([o.ways for o in outcomes])} classes (ways), learns from {shots} image{'s' * (shots != '1')} a class "
        f"(shots) and classifies {_each([o.queries for o in outcomes])} others a class (queries)"
    )


def episodes_cut(outcomes: Iterable[FewShotOutcome], ways: int = _WAYS, queries: int = _QUERIES) -> Iterator[str]:
    """Where episodes are smaller than was asked for, and why: other figures of few-shot are then another task's."""
    said: dict[str, list[int]] = {}
    for outcome in outcomes:
        for text in _cuts(outcome, ways, queries):
            said.setdefault(text, []).append(outcome.shots)
    for text, shots in said.items():
        yield f"with {_each(shots)} shot{'s' * (shots != [1])} {text}"


def _cuts(outcome: FewShotOutcome, ways: int, queries: int) -> Iterator[str]:
    if outcome.left_out:
        classes = (
            "one class takes no part, which has"
            if outcome.left_out == 1
            else f"{outcome.left_out} classes take no part, which have"
        )
        yield f"{classes} fewer than {outcome.shots + 1} images"
    if outcome.ways < ways:
        yield f"an episode has {outcome.ways} classes instead of {ways}, as there are no more"
    if outcome.queries < queries:
        yield (
            f"{outcome.queries} images a class are classified instead of {queries}, as the smallest class has "
            f"{outcome.shots + outcome.queries}"
        )


def _each(numbers: Sequence[int]) -> str:
    """One number where all are equal, else all of them."""
    if len(set(numbers)) == 1:
        return str(numbers[0])
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _measure(
    features: np.ndarray, labels: np.ndarray, shots: int, ways: int, queries: int, episodes: int, seed: int
) -> FewShotOutcome:
    sizes = np.unique(labels, return_counts=True)[1]
    enough = np.flatnonzero(sizes > shots)
    if len(enough) < 2:
        raise InputError(
            f"few-shot with {shots} images a class needs two classes of at least {shots + 1} images, and the data "
            f"has {len(enough)}; ask for fewer shots or give more images"
        )
    ways = min(ways, len(enough))
    queries = min(queries, int(sizes[enough].min()) - shots)
    rows = _episodes(labels, enough, shots, ways, queries, episodes, seed)
    at_once = max(1, _GATHERED // (ways * (shots + queries) * features.shape[1]))
    accuracies = np.concatenate(
        [_accuracies(features, rows[i : i + at_once], shots) for i in range(0, episodes, at_once)]
    )
    mean = float(accuracies.mean())
    half = 1.96 * float(accuracies.std(ddof=1)) / episodes**0.5
    interval = max(0.0, mean - half), min(1.0, mean + half)
    return FewShotOutcome(shots, ways, queries, episodes, len(enough), len(sizes) - len(enough), mean, interval)


def _episodes(
    labels: np.ndarray, classes: np.ndarray, shots: int, ways: int, queries: int, episodes: int, seed: int
) -> np.ndarray:
    """Rows (episodes, ways, shots + queries) of the features; classes are places in the sorted distinct labels."""
    by_class = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    episode = np.arange(episodes)
    drawn = classes[_distinct(np.full(episodes, len(classes)), ways, seed, shots, _EPISODES, episode, -1)]
    keys = (seed, shots, _EPISODES, episode[:, None], np.arange(ways))
    places = _distinct(sizes[drawn], shots + queries, *keys)
    rows: np.ndarray = by_class[starts[drawn][..., None] + places]
    return rows


def _distinct(sizes: np.ndarray, count: int, *keys: int | np.ndarray) -> np.ndarray:
    """Ordered samples without replacement: (..., count) of the whole numbers below each of sizes (...).

    The i-th number is drawn among the size - i that are left, then moved past the earlier ones.
    """
    chosen = np.empty((*sizes.shape, count), np.int64)
    for i in range(count):
        value = (counter.bits(*keys, i) % (sizes - i).astype(np.uint64)).astype(np.int64)
        for earlier in np.moveaxis(np.sort(chosen[..., :i]), -1, 0):
            value += value >= earlier
        chosen[..., i] = value
    return chosen


def _accuracies(features: np.ndarray, rows: np.ndarray, shots: int) -> np.ndarray:
    """(e,) accuracy of each of the episodes (e, ways, shots + queries); of equal classes the first wins."""
    episodes, ways = rows.shape[:2]
    gathered = np.asarray(features[rows], np.float32)
    centroids = _unit(_unit(gathered[:, :, :shots]).mean(axis=2))
    # The norm of a query scales all its similarities alike, so the largest stays the largest.
    queries = gathered[:, :, shots:].reshape(episodes, -1, gathered.shape[-1])
    predicted = (queries @ centroids.swapaxes(1, 2)).argmax(axis=2).reshape(episodes, ways, -1)
    accuracies: np.ndarray = (predicted == np.arange(ways)[:, None]).mean(axis=(1, 2))
    return accuracies


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors over their norms; zeros stay zeros."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit: np.ndarray = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    return unit
