"""Multinomial and one-vs-rest logistic regression of frozen features by L-BFGS (paper, table 4: transfer).

The protocol of Kornblith et al. (2019), "Do Better ImageNet Models Transfer Better?", as in SimCLR, BYOL and NNCLR.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.errors import InputError
from nnclr.finite import as_array, as_rows, class_indices, refuse_not_finite

STRENGTHS: tuple[float, ...] = tuple(np.logspace(-6, 5, 45).tolist())  # lambda of the L2 penalty
_TOLERANCE = 1e-13  # of the objective, relative: probabilities are then within 1e-4 of the optimum's, mostly 1e-6
_PATH_TOLERANCE = 1e-8  # while a strength is chosen: the same choice at a fifth of the cost; 1e-6 chose others
_MAX_ITERATIONS = 5000  # 20 to 600 were needed
_BLOCK = 512  # rows at a time: 8 MiB of float64 at 2,048 dimensions; larger blocks leave the cache and are slower
_HISTORY = 20  # pairs that L-BFGS remembers; 50 save a sixth of the iterations and cost 1.6 GB at 2,048 x 1,000
_BLIND = 10  # iterations that do not end a search, see `_search`
_UNIT = 1e5  # what the objective is scaled to, see `_minimise`
_MOST_AXES = 4096  # features whose principal axes are found: 128 MiB and half a minute for the most
_HELD_BYTES = 2**30  # of rows that are kept along their axes instead of being read again in each iteration

Part = tuple[Tensor, Tensor]  # features (n, d) and targets of some rows


@dataclass(frozen=True)
class LogisticOutcome:
    """What `logistic_regression` found."""

    scores: np.ndarray  # (n_test, c) float64 logits
    strength: float
    validation: list[tuple[float, float]]  # (strength, value) from the strongest to the weakest
    protocol: dict[str, Any]


def logistic_regression(
    train: Any,
    train_targets: Any,
    val: Any,
    val_targets: Any,
    test: Any,
    num_classes: int,
    score: Callable[[np.ndarray, Any], float],
    *,
    strengths: tuple[float, ...] = STRENGTHS,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LogisticOutcome:
    """Choose the L2 strength on the validation rows, fit train and validation together, score the test rows.

    The strengths are fitted from the strongest to the weakest, each from the weights of the one before. The best on
    validation (of equal ones the strongest) is fitted again on all rows of train and validation, likewise warm.

    Args:
        train: (m, d) array, memory-mapped array or tensor; read in blocks, copied where float64 takes up to 1 GiB.
        train_targets: as in `fit_logistic`.
        val: (k, d).
        val_targets: in the form of train_targets.
        test: (n, d).
        num_classes: c.
        score: the data set's own metric: logits (k, c) float64 and val_targets to a value in [0, 1], more is better.
        strengths: candidates, in any order.
        device: where products are taken; it must know float64.
        progress: called after each strength with the number done and the number of all.

    Raises:
        InputError: if a feature is not finite, or labels do not fit.
    """
    fitted, chosen = _part(train, train_targets, num_classes), _part(val, val_targets, num_classes)
    for name, features in (("validation", chosen[0]), ("test", as_rows(test))):  # now, not after hours
        _column_sums(features, name, _BLOCK)
    weights: Tensor | None = None
    best_weights: Tensor | None = None
    best_value, best_strength = -float("inf"), float("nan")
    validation, unfinished = [], []
    path = sorted(strengths, reverse=True)
    rows = _Rows([fitted], device)
    for i, strength in enumerate(path):
        weights, finished = _fit(rows, num_classes, strength, weights, _PATH_TOLERANCE)
        value = float(score(logistic_scores(weights, chosen[0]).cpu().numpy(), val_targets))
        validation.append((strength, value))
        if not finished:
            unfinished.append(strength)
        if value > best_value:
            best_value, best_strength, best_weights = value, strength, weights
        if progress is not None:
            progress(i + 1, len(path))
    final, finished = _fit(_Rows([fitted, chosen], device), num_classes, best_strength, best_weights)
    protocol = {
        "features": "frozen, as they are",
        "optimizer": f"L-BFGS, {_HISTORY} pairs, strong Wolfe, float64",
        "objective": "softmax regression" if fitted[1].ndim == 1 else "one-vs-rest logistic regression",
        "convention": "sum of losses + strength / 2 ||W||^2, intercept free; scikit-learn's C = 1 / strength",
        "strengths": path,
        "strength": best_strength,
        "validation_value": best_value,
        "refit": "train and validation",
        "max_iterations": _MAX_ITERATIONS,
        "tolerance": _TOLERANCE,
        "tolerance_of_the_path": _PATH_TOLERANCE,
        "unfinished_strengths": unfinished,  # those that max_iterations cut off
        "refit_finished": finished,
    }
    return LogisticOutcome(logistic_scores(final, test).cpu().numpy(), best_strength, validation, protocol)


def fit_logistic(
    features: Any,
    targets: Any,
    num_classes: int,
    strength: float,
    *,
    start: Tensor | None = None,
    tolerance: float = _TOLERANCE,
    max_iterations: int = _MAX_ITERATIONS,
    block: int = _BLOCK,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Weights that minimise the sum of the rows' losses + strength / 2 * ||W||^2; the intercept is not penalised.

    This is scikit-learn's LogisticRegression(C=1 / strength), save for softmax regression of two classes: it has
    two columns where scikit-learn has their difference, and so is C=2 / strength there. A class without a row is
    fine: its intercept is pushed down until that gains nothing.

    Args:
        features: (n, d) array, memory-mapped array or tensor of any float type; copied where float64 takes up to 1 GiB.
        targets: (n,) class indices for softmax regression, or (n, c) of 1, 0 and -1 for c independent problems, each
            of which leaves out its rows of -1.
        num_classes: c.
        strength: lambda > 0.
        start: (d + 1, c) weights to start from; zeros without.
        tolerance: the fit ends when an iteration lowers the objective by less than this share of it.
        max_iterations: L-BFGS iterations at most.
        block: rows at a time; the result does not depend on it.
        device: where products are taken; it must know float64.

    Returns:
        (d + 1, c) float64 weights on device; the last row is the intercept.

    Raises:
        InputError: if a feature is not finite, or labels do not fit.
    """
    rows = _Rows([_part(features, targets, num_classes)], device, block)
    return _fit(rows, num_classes, strength, start, tolerance, max_iterations)[0]


@torch.no_grad()
def logistic_scores(weights: Tensor, features: Any, block: int = _BLOCK) -> Tensor:
    """Logits (n, c) float64 of features (n, d) under weights (d + 1, c), on the device of the weights."""
    return torch.cat([rows.to(weights) @ weights[:-1] + weights[-1] for rows in as_rows(features).split(block)])


class _Rows:
    """The rows of all parts: read in blocks, with their mean, principal axes and the variances along these.

    Along axes without variance there is nothing to learn, and they are left out: grey pictures as RGB have three times
    the pixels that matter. Where the rest is small enough it is kept in memory.

    Rows become float64 a block at a time. Measured on 5,000 x 512 with 10 classes, float32 products cost about 0.6 of
    the time, but their rounding ends the line search early at weak strengths: probabilities were off by up to 4e-3
    and the objective by 6e-7, against 4e-5 and 1e-10 in float64 at the same tolerance.
    """

    def __init__(self, parts: list[Part], device: str | torch.device, block: int = _BLOCK) -> None:
        self.parts, self.device = parts, torch.device(device)
        self.count = sum(len(features) for features, _ in parts)
        sums = torch.stack([_column_sums(features, "training", block).to(device) for features, _ in parts]).sum(dim=0)
        self.centre = sums[0] / self.count
        width = len(self.centre)
        self.block = block
        self.axes: Tensor | None = None  # (d, r), a column an axis; None for the features' own
        self.held: list[Part] | None = None  # rows along the axes, (n, r)
        mean = (sums[1] / self.count - self.centre.square()).mean().clamp(min=0)
        self.variances = mean.expand(width)
        if width <= _MOST_AXES:
            self.variances, self.axes = self._principal_axes()
            if 8 * self.count * len(self.variances) <= _HELD_BYTES:
                self.held = [(x @ self.axes, y) for x, y in self.blocks()]

    def _principal_axes(self) -> tuple[Tensor, Tensor]:
        """Variances (r,) above the rounding of the largest, and their axes (d, r)."""
        width = len(self.centre)
        covariance = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        for x, _ in self.blocks():
            covariance.addmm_(x.T, x)
        variances, axes = torch.linalg.eigh(covariance.div_(self.count))
        told_apart = variances > width * torch.finfo(torch.float64).eps * variances[-1]
        return variances[told_apart], axes[:, told_apart].contiguous()

    def blocks(self) -> Iterator[Part]:
        """Centred features, along the axes if they are held, and targets of some rows."""
        if self.held is not None:
            yield from self.held
            return
        buffer = torch.empty(self.block, len(self.centre), dtype=torch.float64, device=self.device)
        for features, targets in self.parts:
            for rows, y in zip(features.split(self.block), targets.split(self.block), strict=True):
                x = torch.sub(rows.to(self.device), self.centre, out=buffer[: len(rows)])  # until the next block
                yield x, y.to(self.device)


def _fit(
    rows: _Rows,
    num_classes: int,
    strength: float,
    start: Tensor | None,
    tolerance: float = _TOLERANCE,
    max_iterations: int = _MAX_ITERATIONS,
) -> tuple[Tensor, bool]:
    """`fit_logistic` on the rows; the weights and whether the tolerance was met."""
    objective = _Objective(rows, strength, num_classes)
    if start is None:
        start = torch.zeros(len(rows.centre) + 1, num_classes)
    weights = start.detach().to(rows.device, torch.float64, copy=True)
    weights[-1] += rows.centre @ weights[:-1]
    free = objective.free(weights)
    finished = _minimise(objective, free, tolerance, max_iterations)
    weights = objective.weights(free)
    weights[-1] -= rows.centre @ weights[:-1]
    return weights, finished


class _Objective:
    """Mean loss + strength / (2 n) * ||W||^2 and its gradient, as a function of rotated and scaled weights.

    The minimum is the same one: the intercept is free, so taking the mean off the features moves it and nothing else,
    and the penalty is that of W itself. But the problem becomes round. Along principal axis j the curvature is about
    spread * variance_j + decay, where spread is that of a class's indicator under equal probabilities; the free
    weights are W along the axis times its root. So L-BFGS starts from a Hessian near the identity: on 3,000 pictures of
    Fashion-MNIST as pixels it needs 167, 406 and 997 iterations at strengths 10, 1 and 0.1, against 692, 1,370 and
    2,351 with one unit for all features.
    """

    def __init__(self, rows: _Rows, strength: float, num_classes: int) -> None:
        self.rows = rows
        self.decay = strength / rows.count
        spread = (1 - 1 / num_classes) / num_classes if rows.parts[0][1].ndim == 1 else 0.25
        curvature = torch.cat([spread * rows.variances + self.decay, rows.variances.new_full((1,), spread)])
        self.scale = curvature.rsqrt()[:, None]

    def free(self, weights: Tensor) -> Tensor:
        """The free weights (r + 1, c) of weights (d + 1, c) for centred features; what acts on nothing is dropped."""
        axes = self.rows.axes
        rotated = weights if axes is None else torch.cat([axes.T @ weights[:-1], weights[-1:]])
        return rotated / self.scale

    def weights(self, free: Tensor) -> Tensor:
        """Weights (d + 1, c) for centred features of free weights."""
        rotated, axes = free * self.scale, self.rows.axes
        return rotated if axes is None else torch.cat([axes @ rotated[:-1], rotated[-1:]])

    @torch.no_grad()
    def __call__(self, free: Tensor) -> tuple[float, Tensor]:
        """Value, and gradient in the shape of the free weights."""
        rotated, count, axes = free * self.scale, self.rows.count, self.rows.axes
        rotates = axes if self.rows.held is None else None  # rows that are held are rotated already
        matrix = rotated[:-1] if rotates is None else rotates @ rotated[:-1]
        slopes = free.new_zeros(free.shape[1], len(matrix))  # transposed: error^T x is the faster product
        loss, intercept = free.new_zeros(()), torch.zeros_like(free[-1])
        for x, y in self.rows.blocks():
            losses, error = _losses(x @ matrix + rotated[-1], y)
            loss += losses
            slopes += error.T @ x
            intercept += error.sum(dim=0)
        slope = slopes.T if rotates is None else rotates.T @ slopes.T
        gradient = torch.cat([slope / count + self.decay * rotated[:-1], intercept[None] / count])
        return float(loss / count + self.decay / 2 * rotated[:-1].square().sum()), gradient * self.scale


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and its derivative by the logits (n, c)."""
    if targets.ndim == 1:
        log_probabilities = logits.log_softmax(dim=1)
        loss = F.nll_loss(log_probabilities, targets, reduction="sum")
        error = log_probabilities.exp_()
        error[torch.arange(len(targets), device=targets.device), targets] -= 1
        return loss, error
    known, positive = targets >= 0, (targets > 0).to(logits)
    loss = (F.softplus(logits) - positive * logits)[known].sum()
    return loss, (logits.sigmoid() - positive) * known


def _minimise(objective: _Objective, weights: Tensor, tolerance: float, max_iterations: int) -> bool:
    """Move the weights to the minimum in place; False if max_iterations cut it off.

    torch's LBFGS has absolute limits, on the change of the objective (its tolerance_change) and on the curvature of a
    pair (1e-10: below it no pair is remembered, and near the optimum of a mean loss that means hundreds of
    iterations without memory). So the objective is scaled to `_UNIT` at the start, which makes them relative. Where it
    has since fallen by more than half, as for separable rows at a weak strength, the scale no longer fits and the
    search starts anew from where it is.
    """
    value, gradient = objective(weights)
    iterations = 0
    while value > 0 and bool(gradient.any()) and iterations < max_iterations:
        before = value
        iterations += _search(objective, weights, _UNIT / value, tolerance, max_iterations - iterations)
        value, gradient = objective(weights)
        if value > before / 2:
            break
    return iterations < max_iterations


def _search(objective: _Objective, weights: Tensor, scale: float, tolerance: float, max_iterations: int) -> int:
    """One run of L-BFGS on scale times the objective; the number of its iterations.

    The first iterations know no curvature and can gain next to nothing far from the optimum, so they do not end it:
    started from the weights of a neighbouring strength, it would stop on the spot.
    """
    optimizer = torch.optim.LBFGS(
        [weights.requires_grad_()],
        max_iter=min(_BLIND, max_iterations),
        max_eval=2 * _BLIND,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient = objective(weights)
        weights.grad = gradient * scale
        return value * scale

    optimizer.step(closure)
    rest = max_iterations - optimizer.state[weights]["n_iter"]
    if rest > 0:
        limits = {"max_iter": rest, "max_eval": 2 * rest + 25, "tolerance_change": tolerance * _UNIT}
        optimizer.param_groups[0].update(limits)
        optimizer.step(closure)
    weights.requires_grad_(False)
    weights.grad = None
    return int(optimizer.state[weights]["n_iter"])


def _part(features: Any, targets: Any, num_classes: int) -> Part:
    rows = as_rows(features)
    if np.ndim(targets) == 1:
        return rows, class_indices(targets, len(rows), num_classes)
    given = as_array(targets)
    many = as_rows(np.sign(given.astype(np.int64)).astype(np.int8) if given.dtype.kind in "iub" else given)
    if many.shape != (len(rows), num_classes):
        raise InputError(
            f"labels of shape {tuple(many.shape)} are not one for each of the {len(rows)} rows of features, nor one "
            f"for each row and each of the {num_classes} classes"
        )
    return rows, many


def _column_sums(features: Tensor, name: str, block: int) -> Tensor:
    """(2, d) float64: sums over the rows of the values and of their squares; finite only if every value is."""
    total = torch.zeros(2, features.shape[1], dtype=torch.float64, device=features.device)
    for rows in features.split(block):
        x = rows.double()
        total += torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
        if not bool(total.isfinite().all()):
            refuse_not_finite(features, f"the {name} features")
            raise InputError(
                f"the {name} features hold numbers too large to be squared; divide them all by their largest"
            )
    return total
