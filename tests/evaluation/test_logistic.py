import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nnclr.errors import InputError
from nnclr.evaluation import logistic
from nnclr.evaluation.logistic import (
    STRENGTHS,
    _fit,
    _Objective,
    _Rows,
    fit_logistic,
    logistic_regression,
    logistic_scores,
)

CLASSES = 4


def clouds(rows, spread, seed=0):
    """Rectified features of overlapping (spread 2) or separable (spread 0.3) clouds, float32, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, 12))
    labels = np.arange(rows) % CLASSES
    features = np.maximum(centres[labels] + spread * rng.normal(size=(rows, 12)) + 0.5, 0)
    return features.astype(np.float32), labels


def problems(labels, seed=0):
    """One-vs-rest targets of which an eighth is unknown."""
    targets = (labels[:, None] == np.arange(CLASSES)).astype(np.int8)
    targets[np.random.default_rng(seed).random(targets.shape) < 0.125] = -1
    return targets


def scikit(features, labels, strength, solver="newton-cg"):
    """Weights (d + 1, columns) of scikit-learn's fit; on few separable rows its own L-BFGS ends a little early."""
    model = LogisticRegression(C=1 / strength, tol=1e-12, max_iter=20000, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at so tight a tolerance a line search may end in rounding
        model.fit(features.astype(np.float64), labels)
    return np.concatenate([model.coef_.T, model.intercept_[None]])


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(logits):
    return np.exp(-np.logaddexp(0, -logits))


def logits_of(weights, features):
    return features.astype(np.float64) @ weights[:-1] + weights[-1]


def logits(weights, features):
    return torch.tensor(logits_of(weights.numpy(), features))


def multinomial(weights, features, labels, strength):
    """The objective in float64 NumPy."""
    z = logits_of(weights, features)
    top = z.max(axis=1)
    losses = np.log(np.exp(z - top[:, None]).sum(axis=1)) + top - z[np.arange(len(z)), labels]
    return losses.sum() + strength / 2 * (weights[:-1] ** 2).sum()


def binary(weights, features, targets, strength):
    """The objective of independent problems in float64 NumPy: log(1 + exp(-z)) of a 1, log(1 + exp(z)) of a 0."""
    z = logits_of(weights, features)
    losses = np.where(targets == 1, np.logaddexp(0, -z), np.where(targets == 0, np.logaddexp(0, z), 0))
    return losses.sum() + strength / 2 * (weights[:-1] ** 2).sum()


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 1.0, 1e3, 1e5])
@pytest.mark.parametrize(
    ("rows", "spread", "solver"), [(400, 2.0, "lbfgs"), (400, 0.3, "lbfgs"), (60, 2.0, "newton-cg")]
)  # overlapping, far apart, and few enough to be separable by small margins
def test_multinomial_is_scikit_learns(rows, spread, solver, strength):
    features, labels = clouds(rows, spread)
    unseen = clouds(200, spread, seed=1)[0]
    ours = fit_logistic(features, labels, CLASSES, strength).numpy()
    theirs = scikit(features, labels, strength, solver)
    expected = softmax(logits_of(theirs, unseen))
    np.testing.assert_allclose(softmax(logits_of(ours, unseen)), expected, atol=1e-4)
    value = multinomial(theirs, features, labels, strength)
    assert multinomial(ours, features, labels, strength) == pytest.approx(value, rel=1e-6)
    if 1e-3 < strength < 1e5:  # control: ten times the strength is outside of both tolerances
        other = fit_logistic(features, labels, CLASSES, strength * 10).numpy()
        assert abs(softmax(logits_of(other, unseen)) - expected).max() > 1e-3
        assert multinomial(other, features, labels, strength) > value * (1 + 1e-5)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
def test_each_column_of_one_vs_rest_is_scikit_learns_without_the_unknown_rows(strength):
    features, labels = clouds(400, 2.0)
    targets, unseen = problems(labels), clouds(200, 2.0, seed=1)[0]
    ours = fit_logistic(features, targets, CLASSES, strength).numpy()
    for c in range(CLASSES):
        known = targets[:, c] >= 0
        theirs = scikit(features[known], targets[known, c], strength)
        expected = sigmoid(logits_of(theirs, unseen))
        np.testing.assert_allclose(sigmoid(logits_of(ours[:, c : c + 1], unseen)), expected, atol=1e-4)
        value = binary(theirs, features, targets[:, c : c + 1], strength)
        assert binary(ours[:, c : c + 1], features, targets[:, c : c + 1], strength) == pytest.approx(value, rel=1e-6)
        taken_as_negative = scikit(features, targets[:, c] == 1, strength)  # control
        assert abs(sigmoid(logits_of(taken_as_negative, unseen)) - expected).max() > 1e-2


def test_softmax_of_two_classes_is_scikit_learns_at_half_the_strength():
    features, labels = clouds(300, 2.0)
    ours = fit_logistic(features, labels % 2, 2, 1.0).numpy()
    theirs = scikit(features, labels % 2, 0.5)
    np.testing.assert_allclose((ours[:, 1] - ours[:, 0])[:, None], theirs, atol=1e-4)


# Along the principal axes with rows in memory and not, and along the features' own.
@pytest.mark.parametrize(("most_axes", "held"), [(12, 2**30), (12, 0), (11, 0)])
@pytest.mark.parametrize("kind", ["multinomial", "one-vs-rest"])
def test_value_gradient_and_curvature_against_finite_differences(kind, most_axes, held, monkeypatch):
    monkeypatch.setattr(logistic, "_MOST_AXES", most_axes)
    monkeypatch.setattr(logistic, "_HELD_BYTES", held)
    features, labels = clouds(90, 2.0)
    features[:, 3] *= 50
    targets, reference = (labels, multinomial) if kind == "multinomial" else (problems(labels), binary)
    parts = [(torch.tensor(features[a]), torch.tensor(targets[a])) for a in (slice(0, 50), slice(50, 90))]
    objective = _Objective(_Rows(parts, "cpu", 16), 3.0, CLASSES)
    mean = features.astype(np.float64).mean(axis=0)

    def value(free):
        """The reference at the weights that these free weights stand for."""
        weights = objective.weights(torch.tensor(free)).numpy().copy()
        weights[-1] -= mean @ weights[:-1]
        return reference(weights, features, targets, 3.0) / len(features)

    point = np.random.default_rng(5).normal(size=(13, CLASSES))
    torch.testing.assert_close(objective.free(objective.weights(torch.tensor(point))), torch.tensor(point))
    ours, gradient = objective(torch.tensor(point))
    assert ours == pytest.approx(value(point), rel=1e-12)
    curvatures = []
    for i, j in np.ndindex(13, CLASSES):
        step = np.zeros((13, CLASSES))
        step[i, j] = 1e-5
        slope = (value(point + step) - value(point - step)) / 2e-5
        assert float(gradient[i, j]) == pytest.approx(slope, abs=1e-8)
        curvatures.append((value(100 * step) - 2 * value(0 * step) + value(-100 * step)) / 1e-6)
    if most_axes == 12 and kind == "multinomial":  # at no weights every class has the same probability
        np.testing.assert_allclose(curvatures, 1, atol=1e-5)
    if most_axes == 11:  # control: without the axes the problem is not round
        assert max(curvatures) > 10 * min(curvatures)


@pytest.mark.parametrize("held", [2**30, 0])
def test_columns_that_say_the_same_need_no_weights_of_their_own(held, monkeypatch):
    monkeypatch.setattr(logistic, "_HELD_BYTES", held)
    features, labels = clouds(300, 2.0)
    grey = np.concatenate([features, features, features], axis=1)
    rows = _Rows([(torch.tensor(grey), torch.tensor(labels))], "cpu")
    assert rows.variances.shape == (12,)
    start = torch.randn(37, CLASSES, generator=torch.Generator().manual_seed(0))
    ours = fit_logistic(grey, labels, CLASSES, 1.0, start=start)
    torch.testing.assert_close(ours[:12], ours[12:24], atol=1e-12, rtol=0)
    expected = softmax(logits_of(scikit(grey, labels, 1.0), grey))
    np.testing.assert_allclose(softmax(logits_of(ours.numpy(), grey)), expected, atol=1e-4)


def test_features_of_very_different_variance_need_few_iterations(monkeypatch):
    features, labels = clouds(400, 2.0)
    features *= np.logspace(-1.5, 1.5, 12, dtype=np.float32)
    part = [(torch.tensor(features), torch.tensor(labels))]
    counts = []
    searched = logistic._search

    def counting(*arguments):
        counts[-1] += searched(*arguments)
        return counts[-1]

    monkeypatch.setattr(logistic, "_search", counting)
    fits = []
    for most_axes in (12, 11):
        monkeypatch.setattr(logistic, "_MOST_AXES", most_axes)
        counts.append(0)
        fits.append(_fit(_Rows(part, "cpu"), CLASSES, 1.0, None)[0])
    torch.testing.assert_close(
        logits(fits[0], features).softmax(1), logits(fits[1], features).softmax(1), atol=1e-4, rtol=0
    )
    assert 3 * counts[0] < counts[1]


def test_block_kind_and_scale_of_features_do_not_matter(tmp_path):
    features, labels = clouds(300, 2.0)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    reference = fit_logistic(features, labels, CLASSES, 0.1)
    for other in (
        fit_logistic(features, labels, CLASSES, 0.1, block=7),
        fit_logistic(mapped, torch.tensor(labels), CLASSES, 0.1),
        fit_logistic(torch.tensor(features), labels, CLASSES, 0.1, block=1000),
        fit_logistic(features * 1024, labels, CLASSES, 0.1 * 1024**2) * torch.tensor([1024.0] * 12 + [1.0])[:, None],
    ):
        torch.testing.assert_close(
            logistic_scores(other, mapped, block=11), logits(reference, features), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1e4])
def test_warm_and_cold_start_agree(strength):
    features, labels = clouds(400, 2.0)
    cold = fit_logistic(features, labels, CLASSES, strength)
    for start in (fit_logistic(features, labels, CLASSES, 1.8 * strength), torch.full((13, CLASSES), 0.5), cold):
        kept = start.clone()
        warm = fit_logistic(features, labels, CLASSES, strength, start=start)
        assert torch.equal(start, kept)
        torch.testing.assert_close(
            logits(warm, features).softmax(1), logits(cold, features).softmax(1), atol=1e-4, rtol=0
        )
    # Control: it is a start, and one iteration from far away does not lead into the tolerance above.
    far = torch.randn(13, CLASSES, generator=torch.Generator().manual_seed(0))
    unmoved = fit_logistic(features, labels, CLASSES, strength, start=far, max_iterations=1)
    assert abs(logits(unmoved, features).softmax(1) - logits(cold, features).softmax(1)).max() > 1e-2


def test_class_without_a_row():
    features, labels = clouds(300, 2.0)
    ours = fit_logistic(features, labels, CLASSES + 1, 1.0)
    probabilities = logits(ours, features).softmax(1)
    assert probabilities[:, CLASSES].max() < 1e-4
    expected = softmax(logits_of(scikit(features, labels, 1.0), features))
    np.testing.assert_allclose(probabilities[:, :CLASSES].numpy(), expected, atol=1e-4)
    targets = np.stack([labels == 0, labels < 0, labels == 1], axis=1).astype(np.int8)  # none is positive in the middle
    targets = np.concatenate([targets, np.full((300, 1), -1, np.int8)], axis=1)  # nothing is known of the last
    ours = fit_logistic(features, targets, 4, 1.0)
    assert logits(ours, features)[:, 1].sigmoid().max() < 1e-4
    assert not ours[:, 3].any()
    expected = sigmoid(logits_of(scikit(features, labels == 1, 1.0), features))
    np.testing.assert_allclose(logits(ours, features)[:, 2:3].sigmoid().numpy(), expected, atol=1e-4)


def top1(scores, targets):
    return float((scores.argmax(axis=1) == targets).mean())


def test_best_on_validation_is_fitted_on_both_parts_and_then_scored():
    train, val, test = (clouds(n, 2.0, seed) for seed, n in enumerate((60, 200, 100)))
    seen = []
    outcome = logistic_regression(*train, *val, test[0], CLASSES, top1, progress=lambda *done: seen.append(done))
    assert seen == [(i, 45) for i in range(1, 46)]
    assert outcome.protocol["strengths"] == [s for s, _ in outcome.validation] == sorted(STRENGTHS, reverse=True)
    assert outcome.protocol["unfinished_strengths"] == []
    for strength, value in outcome.validation[::11]:
        # The path's tolerance is loose, so a row or two near a border may change sides: 0.01 at the weakest here.
        assert value == pytest.approx(top1(logits_of(scikit(*train, strength), val[0]), val[1]), abs=0.006)
    best = max(value for _, value in outcome.validation)
    assert 0.5 < outcome.validation[-1][1] < best > outcome.validation[0][1]  # the strength matters
    assert outcome.strength == max(strength for strength, value in outcome.validation if value == best)
    assert outcome.protocol["strength"] == outcome.strength
    assert outcome.protocol["validation_value"] == best
    both = [np.concatenate(pair) for pair in zip(train, val, strict=True)]
    expected = softmax(logits_of(scikit(*both, outcome.strength), test[0]))
    np.testing.assert_allclose(softmax(outcome.scores), expected, atol=1e-4)
    without = softmax(logits_of(scikit(*train, outcome.strength), test[0]))
    assert abs(without - expected).max() > 1e-2  # control


def test_of_equal_values_the_strongest_is_chosen():
    train, val = clouds(60, 2.0), clouds(40, 2.0, seed=1)
    values = iter([0.2, 0.7, 0.7, 0.1])
    outcome = logistic_regression(
        *train, *val, val[0], CLASSES, lambda scores, targets: next(values), strengths=(0.1, 100.0, 1.0, 10.0)
    )
    assert outcome.validation == [(100.0, 0.2), (10.0, 0.7), (1.0, 0.7), (0.1, 0.1)]
    assert outcome.strength == 10.0


def test_one_vs_rest_path():
    (train, labels), (val, val_labels) = clouds(80, 2.0), clouds(80, 2.0, seed=1)
    targets, val_targets = problems(labels), problems(val_labels, seed=1)

    def score(scores, truth):
        assert truth is val_targets
        return float(((scores > 0) == (truth == 1))[truth >= 0].mean())

    strengths = (0.01, 1.0, 100.0)
    outcome = logistic_regression(train, targets, val, val_targets, val, CLASSES, score, strengths=strengths)
    both = np.concatenate([train, val]), np.concatenate([targets, val_targets])
    expected = fit_logistic(*both, CLASSES, outcome.strength)
    np.testing.assert_allclose(sigmoid(outcome.scores), logits(expected, val).sigmoid().numpy(), atol=1e-4)


@pytest.mark.parametrize("which", ["training", "validation", "test"])
def test_feature_that_is_not_finite(which):
    sets = {name: clouds(40, 2.0) for name in ("training", "validation", "test")}
    sets[which][0][17, 3] = np.inf if which == "test" else np.nan
    with pytest.raises(InputError, match=rf"1 of the \d+ rows of the {which} features is not finite \(row 17\)"):
        logistic_regression(*sets["training"], *sets["validation"], sets["test"][0], CLASSES, top1, strengths=(1.0,))
    if which == "training":
        with pytest.raises(InputError, match="row 17"):
            fit_logistic(*sets["training"], CLASSES, 1.0, block=5)


def test_strengths_are_the_papers():
    assert len(STRENGTHS) == 45
    np.testing.assert_allclose(np.diff(np.log10(STRENGTHS)), 0.25)
    assert (STRENGTHS[0], STRENGTHS[-1]) == pytest.approx((1e-6, 1e5))


def test_iterations_that_run_out_are_told():
    features, labels = (torch.tensor(a) for a in clouds(60, 2.0))
    rows = _Rows([(features, labels)], "cpu")
    assert _fit(rows, CLASSES, 0.1, None)[1]
    assert not _fit(rows, CLASSES, 0.1, None, max_iterations=12)[1]


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_warm_start_does_not_end_at_its_first_steps(strength):
    features, labels = clouds(400, 2.0)
    start = fit_logistic(features, labels, CLASSES, 1.8 * strength)
    best = multinomial(fit_logistic(features, labels, CLASSES, strength).numpy(), features, labels, strength)
    assert multinomial(start.numpy(), features, labels, strength) > best * (1 + 5e-5)  # there is a way to go
    loose = fit_logistic(features, labels, CLASSES, strength, start=start, tolerance=1e-6).numpy()
    assert multinomial(loose, features, labels, strength) < best * (1 + 1e-7)
