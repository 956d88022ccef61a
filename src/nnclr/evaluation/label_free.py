"""Measures of frozen features that need no labels: how many directions they use, and how they spread.

None of them alone says that features are good. `rank_me`, `lidar` and `alpha_req` look at directions and hardly
at scale, `feature_std` at scale and not at directions: read them together.
"""

import math
from collections.abc import Iterator

import numpy as np

from nnclr import counter
from nnclr.errors import InputError
from nnclr.finite import refuse_not_finite

_BLOCK = 1024  # rows that are held in float64 at a time
_VANISHED = 1e-13  # of the largest eigenvalue: below lies the rounding of float32 features and of their products
_FIRST_RANK, _LAST_RANK = 4, 100  # of the fit of alpha_req, as in the authors' code; the paper names none
_UNIFORMITY_ROWS = 8192


def label_free(features: np.ndarray, views: np.ndarray) -> dict[str, float]:
    """All measures of this file.

    Args:
        features: (n, d) float32 of images without augmentation, in memory or memory-mapped.
        views: (m, q, d) float32 of q augmented views of each of m images.

    Returns:
        `rank_me` and `rank_me_share` (of min(n, d)), `alpha_req`, `uniformity`, `feature_std` of the features;
        `lidar` and `alignment` (of each view with the next) of the views; `features` (n) and `dim` (d).

    Raises:
        InputError: if there are fewer than two images, fewer than two views of each, or a feature is not finite.
    """
    n, dim = features.shape
    if min(n, len(views)) < 2:
        raise InputError("label-free measures need at least two images that can be read; give more images")
    if views.shape[1] < 2:
        raise InputError("label-free measures need at least two views of each image; ask for more views")
    raw, centred = _spectra(features)
    rank = _effective_rank(np.sqrt(raw))
    return {
        "rank_me": rank,
        "rank_me_share": rank / min(n, dim),
        "lidar": lidar(views),
        "alpha_req": _decay(centred),
        "alignment": alignment(views[:, :-1], views[:, 1:]),
        "uniformity": uniformity(features),
        "feature_std": feature_std(features),
        "features": n,
        "dim": dim,
    }


def rank_me(features: np.ndarray) -> float:
    """Effective rank: exp of the entropy of the normalised singular values, uncentred.

    RankMe (Garrido et al., 2023, equation 1), with 0 log 0 = 0 in place of the paper's epsilon. Between 1 and
    min(n, d); 1 for features that are all 0.

    Args:
        features: (n, d). Memory is O(d^2), time O(n d^2) in float64.
    """
    return _effective_rank(np.sqrt(_spectra(features)[0]))


def alpha_req(features: np.ndarray) -> float:
    """Exponent of the decay of the covariance's eigenvalues: the i-th is about i^-alpha.

    alpha-ReQ (Agrawal et al., 2022). The slope is fitted by least squares in log-log form over the ranks 4 to
    100 with weights 1 / rank, as the authors' code does (the paper gives no range), up to where the
    eigenvalues vanish. The paper finds features near 1 best; larger is closer to collapse.

    Args:
        features: (n, d). Memory is O(d^2), time O(n d^2) in float64.

    Returns:
        alpha; infinity if the eigenvalues vanish before rank 5, so that there is no slope.
    """
    return _decay(_spectra(features)[1])


def lidar(views: np.ndarray, delta: float = 1e-4) -> float:
    """Effective rank of what tells images apart, measured against what augmentation changes.

    LiDAR (Thilak et al., 2023, section 4): each image is a class, its views are the members; exp of the entropy
    of the normalised eigenvalues of W^-1/2 B W^-1/2, where W is the covariance within classes plus delta on the
    diagonal and B that of the class means. Between 1 and min(n - 1, d), so n should be above d; 1 if all means
    are the same. delta is absolute, as in the paper: values of features of other scales do not compare.

    Args:
        views: (n, q, d). Memory is O(d^2), time O(n q d^2) in float64.
        delta: added to the variance within classes.
    """
    refuse_not_finite(views, "the views")
    n, q, dim = views.shape
    within = np.zeros((dim, dim))
    means = _Moments(dim)
    at_once = max(1, _BLOCK // q)
    for start in range(0, n, at_once):
        block = np.asarray(views[start : start + at_once], np.float64)
        mean = block.mean(axis=1)
        deviations = (block - mean[:, None]).reshape(-1, dim)
        within += deviations.T @ deviations
        means.add(mean)
    variances, directions = np.linalg.eigh(within / (n * q))
    whiten = directions / np.sqrt(np.maximum(variances, 0) + delta)
    return _effective_rank(np.linalg.eigvalsh(whiten.T @ (means.scatter / n) @ whiten))


def alignment(z1: np.ndarray, z2: np.ndarray) -> float:
    """Mean squared distance of two normalised views of the same image (Wang and Isola, 2020, section 4.1.2).

    Args:
        z1: (n, ..., d).
        z2: (n, ..., d), the other view of each.

    Returns:
        In [0, 4]; 0 if the views are the same.
    """
    total = sum(float(np.square(a - b).sum()) for a, b in zip(_unit_blocks(z1), _unit_blocks(z2), strict=True))
    return total * int(z1.shape[-1]) / int(z1.size)


def uniformity(z: np.ndarray, most: int = _UNIFORMITY_ROWS) -> float:
    """log of the mean of exp(-2 ||x - y||^2) over distinct pairs of normalised rows (Wang and Isola, 2020).

    Args:
        z: (n, d), at least two rows. Of more than `most` a fixed random sample of `most` is taken.
        most: memory is O(most * d), time O(most^2 d).

    Returns:
        At most 0, the value of a collapse to a point; near -4 if rows are mutually orthogonal.
    """
    refuse_not_finite(z, "the features")
    rows = np.sort(counter.permutation(0, 0, len(z))[:most])
    z = np.concatenate([block.astype(np.float32) for block in _unit_blocks(z[rows])])
    lengths = np.square(z).sum(axis=1)  # 1, or 0 for a row of zeros
    total = 0.0
    for start in range(0, len(z), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = np.maximum(lengths[block, None] + lengths - 2 * (z[block] @ z.T), 0)
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        total += float(np.exp(-2 * distances).sum(dtype=np.float64))
    return math.log(total / (len(z) * (len(z) - 1)))


def feature_std(z: np.ndarray) -> float:
    """Mean standard deviation of the normalised rows (n, d), times sqrt(d).

    Near 1 for features spread over the sphere, 0 for a collapse to one point; `health.embedding_std` by blocks.
    """
    n, dim = z.shape
    total, squares = np.zeros(dim), np.zeros(dim)
    for block in _unit_blocks(z):
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    variance = np.maximum(squares - total**2 / n, 0) / (n - 1)
    return float(np.sqrt(variance).mean()) * math.sqrt(dim)


class _Moments:
    """Mean and scatter matrix of rows in float64, block by block (Chan et al., 1983).

    Each block is centred by its own mean, so that a large common mean costs no digits.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    def add(self, rows: np.ndarray) -> None:
        mean = rows.mean(axis=0)
        centred = rows - mean
        step = mean - self.mean
        total = self.count + len(rows)
        self.scatter += centred.T @ centred
        self.scatter += np.outer(step, step * (self.count * len(rows) / total))
        self.mean += step * (len(rows) / total)
        self.count = total


def _spectra(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of X^T X and of the centred one, each (min(n, d),), largest first, 0 where they vanish."""
    refuse_not_finite(features, "the features")
    n, dim = features.shape
    if n <= dim:
        x = np.asarray(features, np.float64)
        values = [np.linalg.svd(y, compute_uv=False) ** 2 for y in (x, x - x.mean(axis=0))]
    else:
        moments = _Moments(dim)
        for start in range(0, n, _BLOCK):
            moments.add(np.asarray(features[start : start + _BLOCK], np.float64))
        gram = moments.scatter + n * np.outer(moments.mean, moments.mean)
        values = [np.linalg.eigvalsh(matrix)[::-1] for matrix in (gram, moments.scatter)]
    floor = _VANISHED * values[0][0]
    return np.where(values[0] > floor, values[0], 0.0), np.where(values[1] > floor, values[1], 0.0)


def _effective_rank(weights: np.ndarray) -> float:
    """exp of the entropy of weights over their sum; 1 if there is no weight."""
    weights = weights[weights > 0]
    shares = weights / weights.sum()
    return math.exp(-float((shares * np.log(shares)).sum()))


def _decay(eigenvalues: np.ndarray) -> float:
    """Minus the slope of log eigenvalue over log rank; see `alpha_req`."""
    ranks = np.arange(_FIRST_RANK, min(_LAST_RANK, int(np.count_nonzero(eigenvalues))) + 1)
    if len(ranks) < 2:
        return math.inf
    x, y, weight = np.log(ranks), np.log(eigenvalues[ranks - 1]), 1 / ranks
    x = x - np.average(x, weights=weight)
    return -float((weight * x * y).sum() / (weight * x * x).sum())


def _unit_blocks(z: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of rows (b, ..., d) over their norms, in float64; zeros stay zeros."""
    refuse_not_finite(z, "the features")
    at_once = max(1, _BLOCK * z.shape[-1] * len(z) // z.size)
    for start in range(0, len(z), at_once):
        block = np.asarray(z[start : start + at_once], np.float64)
        norm = np.linalg.norm(block, axis=-1, keepdims=True)
        yield np.divide(block, norm, out=np.zeros_like(block), where=norm > 0)
