import tracemalloc

import numpy as np
import pytest
from scipy.stats import chisquare

from nnclr.errors import InputError
from nnclr.evaluation.few_shot import _distinct, _episodes, episodes_cut, episodes_in_words, few_shot
from tests.reference import unit


@pytest.fixture
def clusters():
    """Overlapping clusters of odd lengths: 8 classes of 25 to 60 images, labels with gaps."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(3 * np.arange(8), rng.integers(25, 60, 8)))
    features = rng.normal(size=(22, 12))[labels] + 1.5 * rng.normal(size=(len(labels), 12)) + 1
    return (features * rng.uniform(0.1, 9, (len(labels), 1))).astype(np.float32), labels


@pytest.mark.parametrize("shots", [1, 5])
def test_against_a_plain_loop(clusters, shots):
    features, labels = clusters
    exact = unit(features.astype(np.float64))
    accuracies = []
    for episode in _episodes(labels, np.arange(8), shots, 5, 15, 60, seed=3):
        centroids = unit(np.array([exact[way[:shots]].mean(axis=0) for way in episode]))
        right = 0
        for i, way in enumerate(episode):
            for query in way[shots:]:
                right += int(np.argmax([exact[query] @ centroid for centroid in centroids]) == i)
        accuracies.append(right / 75)
    outcome = few_shot(features, labels, (shots,), episodes=60, seed=3)[shots]
    assert outcome.accuracy == pytest.approx(np.mean(accuracies), abs=1e-3)
    low, high = outcome.interval
    assert (low + high) / 2 == pytest.approx(outcome.accuracy, abs=1e-12)
    assert high - low == pytest.approx(2 * 1.96 * np.std(accuracies, ddof=1) / np.sqrt(60), rel=3e-3)
    assert 0.3 < outcome.accuracy < 0.95


def test_episodes_are_distinct_rows_of_distinct_classes(clusters):
    labels = clusters[1]
    rows = _episodes(labels, np.array([0, 2, 3, 5, 6, 7]), 5, 4, 15, 50, seed=0)
    assert rows.shape == (50, 4, 20)
    for episode in rows:
        assert len(set(episode.ravel().tolist())) == 80
        assert (labels[episode] == labels[episode[:, :1]]).all()
        assert len(set(labels[episode[:, 0]])) == 4
    assert set(np.unique(labels[rows])) == {0, 6, 9, 15, 18, 21}
    places = _episodes(np.repeat(np.arange(8), 40), np.arange(8), 5, 4, 15, 50, seed=0) % 40
    assert (places[:, 0] != places[:, 1]).any(axis=1).all()  # each class draws for itself


def test_an_episode_is_a_function_of_its_number(clusters):
    features, labels = clusters
    rows = _episodes(labels, np.arange(8), 5, 4, 15, 50, seed=0)
    np.testing.assert_array_equal(_episodes(labels, np.arange(8), 5, 4, 15, 20, seed=0), rows[:20])
    np.testing.assert_array_equal(_episodes(labels, np.arange(8), 5, 3, 7, 50, seed=0), rows[:, :3, :12])
    assert (rows[0] != rows[1]).any()
    assert few_shot(features, labels, episodes=50) == few_shot(features, labels, episodes=50)
    assert few_shot(features, labels, episodes=50)[5] == few_shot(features, labels, (5,), episodes=50)[5]
    assert few_shot(features, labels, episodes=50)[5] != few_shot(features, labels, (5,), episodes=50, seed=1)[5]


def test_ordered_samples_are_uniform():
    drawn = _distinct(np.full(24000, 4), 3, 0, np.arange(24000))
    counts = np.unique(drawn @ [16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24  # all ordered triples of 4, none with a repetition
    assert chisquare(counts).pvalue > 0.001
    mixed = _distinct(np.tile([3, 7], 500), 3, 0, np.arange(1000))
    assert mixed.max(axis=0).tolist() == [6, 6, 6]
    assert mixed[::2].max() == 2


def test_known_answers():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 40)
    separated = 20 * np.eye(10, 32)[labels] + rng.normal(size=(400, 32))
    for outcome in few_shot(separated.astype(np.float32), labels, episodes=100).values():
        assert outcome.accuracy == 1.0
        assert outcome.interval == (1.0, 1.0)
    for outcome in few_shot(rng.normal(size=(400, 32)).astype(np.float32), labels).values():
        assert outcome.interval[0] <= 0.2 <= outcome.interval[1]
        assert outcome.interval[1] - outcome.interval[0] < 0.02
    zeros = few_shot(np.zeros((400, 32), np.float32), labels, (5,), episodes=10)[5]
    assert zeros.accuracy == pytest.approx(0.2)


def test_more_shots_help(clusters):
    values = [outcome.accuracy for outcome in few_shot(*clusters).values()]
    assert values[0] + 0.05 < values[1] < values[2]


def test_episodes_are_cut_to_the_data():
    labels = np.repeat([4, 7, 8, 9], [30, 12, 5, 1])
    features = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
    found = few_shot(features, labels, (1, 4, 5), ways=5, queries=15, episodes=20)
    cut = {k: (o.shots, o.ways, o.queries, o.classes, o.left_out, o.episodes) for k, o in found.items()}
    assert cut == {1: (1, 3, 4, 3, 1, 20), 4: (4, 3, 1, 3, 1, 20), 5: (5, 2, 7, 2, 2, 20)}
    assert episodes_in_words(list(found.values())) == (
        "20 episodes for each number of shots; an episode draws 3, 3 or 2 classes (ways), learns from 1, 4 or 5 images "
        "a class (shots) and classifies 4, 1 or 7 others a class (queries)"
    )
    assert list(episodes_cut([found[5]])) == [
        "with 5 shots 2 classes take no part, which have fewer than 6 images",
        "with 5 shots an episode has 2 classes instead of 5, as there are no more",
        "with 5 shots 7 images a class are classified instead of 15, as the smallest class has 12",
    ]
    assert list(episodes_cut([found[1]], queries=4)) == [
        "with 1 shot one class takes no part, which has fewer than 2 images",
        "with 1 shot an episode has 3 classes instead of 5, as there are no more",
    ]
    assert list(episodes_cut(found.values(), ways=2, queries=1))[1:] == [
        "with 4 shots one class takes no part, which has fewer than 5 images",
        "with 5 shots 2 classes take no part, which have fewer than 6 images",
    ]
    with pytest.raises(InputError, match="needs two classes of at least 13 images, and the data has 1;"):
        few_shot(features, labels, (1, 12))
    with pytest.raises(InputError, match=r"labels of shape \(47,\) are not one for each of the 48 rows of features"):
        few_shot(features, labels[1:])


def test_images_outside_an_episode_do_not_matter(clusters):
    """No statistic of all given features is used: it would know the queries."""
    features, labels = clusters
    alone = np.append(labels, [100])
    found = [
        few_shot(np.append(features, np.full((1, 12), value, np.float32), axis=0), alone, (5,), episodes=50)
        for value in (0.0, 1e6)
    ]
    assert found[0] == found[1]
    moved = few_shot(features + 1e3, labels, (5,), episodes=50)[5]  # control: centring would undo this
    assert moved.accuracy < found[0][5].accuracy


def test_wrong_numbers_are_errors():
    features = np.eye(6, dtype=np.float32)
    with pytest.raises(InputError, match="the data has 0"):
        few_shot(features, np.arange(6), (1,))
    for wrong in ({"shots": (1, 0)}, {"queries": 0}, {"ways": 1}, {"episodes": 1}):
        with pytest.raises(InputError, match="at least 1 shot"):
            few_shot(features, np.array([0, 0, 0, 1, 1, 1]), **wrong)


def test_features_are_not_copied():
    features = np.random.default_rng(0).normal(size=(40000, 256)).astype(np.float32)
    labels = np.arange(40000) % 10
    tracemalloc.start()
    few_shot(features, labels, (1,), episodes=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes / 2
