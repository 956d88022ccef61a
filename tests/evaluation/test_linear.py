import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from nnclr.evaluation.linear import _accuracies, _fit, _predictions, linear_accuracy, standardisation
from nnclr.evaluation.task import balanced_share


@pytest.fixture(scope="module")
def clusters():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 20))
    labels = rng.integers(0, 5, 5000)
    features = (centres[labels] + 1.6 * rng.normal(size=(5000, 20))) * rng.uniform(0.01, 30, 20)  # odd scales
    return features[:3000], labels[:3000], features[3000:], labels[3000:]


def test_near_logistic_regression(clusters):
    train, labels, test, truth = clusters
    mean, std = train.mean(0), train.std(0)
    theirs = LogisticRegression(max_iter=500).fit((train - mean) / std, labels)
    expected = theirs.score((test - mean) / std, truth)
    outcome = linear_accuracy(*clusters, 5, epochs=40, batch_size=256)
    assert 0.6 < expected < 0.95  # neither trivial nor hopeless
    assert outcome.test_accuracy == pytest.approx(expected, abs=0.01)
    assert outcome.protocol["learning_rate"] == outcome.learning_rate


def test_mean_per_class_is_that_of_scikit_learn(clusters):
    train, labels, test, truth = clusters
    rare = np.isin(labels, (0, 1)) | (np.arange(len(labels)) % 10 == 0)  # unequal classes, or both measures agree
    kept = np.isin(truth, (0, 1)) | (np.arange(len(truth)) % 10 == 0)
    outcome = linear_accuracy(train[rare], labels[rare], test[kept], truth[kept], 5, epochs=40, batch_size=256)
    mean, std = train[rare].mean(0), train[rare].std(0)
    theirs = LogisticRegression(max_iter=500).fit((train[rare] - mean) / std, labels[rare])
    predicted = theirs.predict((test[kept] - mean) / std)
    assert outcome.mean_per_class == pytest.approx(balanced_accuracy_score(truth[kept], predicted), abs=0.03)
    assert abs(outcome.mean_per_class - outcome.test_accuracy) > 0.04  # more than the tolerance above


def test_a_diverged_classifier_is_never_right():
    weights = torch.zeros(3, 2, 4)
    weights[:, 1] = torch.nan
    features, labels = torch.ones(6, 2), torch.zeros(6, dtype=torch.int64)
    predicted = _predictions(weights, features, (torch.zeros(()), torch.ones(())))
    assert predicted.tolist() == [[0, -1]] * 6
    assert _accuracies(predicted, labels).tolist() == [1.0, 0.0]


def test_twice_the_same(clusters):
    assert linear_accuracy(*clusters, 5, epochs=5) == linear_accuracy(*clusters, 5, epochs=5)


def test_side_by_side_classifiers_are_those_trained_alone(clusters):
    train, labels = torch.tensor(clusters[0][:512]).float(), torch.tensor(clusters[1][:512])
    both = _fit(train / 30, labels, 5, (0.1, 1.0), 3, 128, 0)
    for i, rate in enumerate((0.1, 1.0)):
        alone = _fit(train / 30, labels, 5, (rate,), 3, 128, 0)
        torch.testing.assert_close(both[:, i], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_update_is_pytorchs_sgd_on_cross_entropy(clusters):
    features, labels = torch.tensor(clusters[0][:256]).float() / 30, torch.tensor(clusters[1][:256])
    ours = _fit(features, labels, 5, (0.5,), 4, 256, 0)[:, 0]  # full batches: the order does not matter
    model = torch.nn.Linear(20, 5)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features), labels).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(ours[:-1], model.weight.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[-1], model.bias, rtol=1e-4, atol=1e-6)


def test_validation_split_is_balanced_and_seeded():
    labels = np.array([0] * 100 + [1] * 30 + [2] * 2 + [3])
    chosen = balanced_share(labels, 0.1, 0)
    assert [int(chosen[labels == c].sum()) for c in range(4)] == [10, 3, 1, 0]
    assert np.array_equal(chosen, balanced_share(labels, 0.1, 0))
    assert not np.array_equal(chosen, balanced_share(labels, 0.1, 1))


def test_standardisation_is_that_of_numpy(monkeypatch):
    x = np.random.default_rng(0).normal(1000, 3, (5000, 7)).astype(np.float32)  # far from 0: float32 sums would drift
    x[:, 6] = 2.0
    mean, std = standardisation(torch.from_numpy(x))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std[:6], wide.std(0, ddof=1)[:6], rtol=1e-6)
    assert std[6] == pytest.approx(1e-6)
