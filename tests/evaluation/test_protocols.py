"""Protocols on frozen features, through `nnclr.evaluate`: known answers, records, and what is refused."""

import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import nnclr
from nnclr.data.images import array_source
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.evaluation import PROTOCOLS
from nnclr.evaluation.knn import nearest_rows, without_itself
from nnclr.evaluation.task import Task
from nnclr.pretrained import random_encoder


def plane(images):
    """Two features of an image: the values of its first two channels, so that a test can place features."""
    return images[:, :2].mean(dim=(2, 3))


class Plane(nn.Module):
    def forward(self, images):
        return plane(images)


def placed(points, labels):
    """Pictures whose features, by `encoder`, are the points, whole numbers from 0 to 255."""
    images = np.zeros((len(points), 8, 8, 3), np.uint8)
    images[..., :2] = np.asarray(points)[:, None, None]
    return images, np.asarray(labels)


@pytest.fixture
def encoder():
    return Encoder(Plane(), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def clouds():
    """Three classes in a plane that overlap, 150 points to learn from and 90 to score."""
    rng = np.random.default_rng(3)
    labels = np.arange(240) % 3
    centres = np.array([[200, 200], [60, 200], [128, 40]])
    points = np.clip(centres[labels] + rng.normal(scale=55, size=(240, 2)), 0, 255).astype(np.uint8)
    return placed(points[:150], labels[:150]), placed(points[150:], labels[150:])


def features_of(pictures):
    return pictures[0][:, 0, 0, :2] / 127.5 - 1, pictures[1]


def test_knn_is_that_of_scikit_learn(encoder, clouds):
    (x, y), (test, test_y) = (features_of(part) for part in clouds)
    for k, temperature in ((1, 0.07), (7, 0.1), (30, 0.5)):
        model = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance, t=temperature: np.exp((1 - distance) / t), algorithm="brute"
        ).fit(x, y)
        result = nnclr.evaluate(encoder, *clouds, protocol="knn", k=k, temperature=temperature)
        assert result.value == pytest.approx((model.predict(test) == test_y).mean(), abs=1e-9)
        assert 0.5 < result.value < 0.95


def test_a_grid_of_k_is_chosen_from_without_the_test_images(encoder, clouds):
    (x, y), _ = (features_of(part) for part in clouds)
    ks, temperatures = (1, 5, 20, 149), (0.07, 1.0)
    result = nnclr.evaluate(encoder, *clouds, protocol="knn", k=ks, temperature=temperatures)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -np.inf)  # each image asked without itself
    own = {}
    for k in ks:
        for temperature in temperatures:
            hits = 0
            for i, row in enumerate(similarities):
                near = np.argsort(-row)[:k]
                votes = [np.exp(row[near][y[near] == c] / temperature).sum() for c in range(3)]
                hits += int(np.argmax(votes) == y[i])
            own[k, temperature] = hits / len(y)
    found = {(cell["k"], cell["temperature"]): cell["leave_one_out"] for cell in result.details["grid"]}
    assert found == pytest.approx(own, abs=0.0201)  # some of the 150 rows tie in float32
    best = max(found, key=found.get)
    assert (result.parameters["k"], result.parameters["temperature"]) == best
    values = {(cell["k"], cell["temperature"]): cell["value"] for cell in result.details["grid"]}
    assert result.value == values[best]
    for k, temperature in values:
        alone = nnclr.evaluate(encoder, *clouds, protocol="knn", k=k, temperature=temperature)
        assert alone.value == values[k, temperature]


def test_a_row_is_left_out_among_its_own_neighbours_also_where_it_has_a_twin():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    similarities, indices = without_itself(*nearest_rows(x, x, 3))
    assert similarities.shape == indices.shape == (5, 2)
    assert all(i not in row for i, row in enumerate(indices.tolist()))
    assert indices[3, 0] == 4


def test_logistic_finds_the_bayes_classifier(encoder, clouds):
    from sklearn.linear_model import LogisticRegression

    (x, y), (test, test_y) = (features_of(part) for part in clouds)
    result = nnclr.evaluate(encoder, *clouds, protocol="logistic")
    expected = LogisticRegression(C=1 / result.parameters["strength"], max_iter=1000).fit(x, y).score(test, test_y)
    assert result.value == pytest.approx(expected, abs=0.0112)  # one of 90 images
    assert result.value > 0.75


def test_linear_with_augmentation_learns_and_says_so(pictures):
    from nnclr.pretrained import random_encoder

    encoder = random_encoder("small-convnet", 16)
    plain = nnclr.evaluate(encoder, pictures, pictures, protocol="linear", epochs=6)
    augmented = nnclr.evaluate(encoder, pictures, pictures, protocol="linear", epochs=6, augmentation=True)
    assert augmented.value > 0.9
    assert augmented.parameters["augmentation"] == "random crops and flips"
    assert plain.parameters["augmentation"] == "none"
    again = nnclr.evaluate(encoder, pictures, pictures, protocol="linear", epochs=6, augmentation=True)
    assert again.value == augmented.value
    assert again.parameters == augmented.parameters


def test_augmented_linear_without_augmentation_is_the_plain_one(pictures, monkeypatch):
    """With views that are the evaluation view, both ways are the same classifier but for the order of rows."""
    import nnclr.evaluation.linear as module
    from nnclr.data.augment import View

    whole = View(16, (1.0, 1.0), (1.0, 1.0), flip=0, jitter=0, grayscale=0, blur=0)
    monkeypatch.setattr(module, "crop_and_flip", lambda size: whole)
    encoder = random_encoder("small-convnet", 16)
    rates = {"learning_rates": (0.03,), "epochs": 30}
    test = (pictures[0][::-1].copy() // 2, pictures[1][::-1].copy())
    ours = nnclr.evaluate(encoder, pictures, test, protocol="linear", augmentation=True, **rates)
    plain = nnclr.evaluate(encoder, pictures, test, protocol="linear", **rates)
    assert ours.value == pytest.approx(plain.value, abs=0.05)
    assert ours.parameters["validation_accuracy"] == pytest.approx(plain.parameters["validation_accuracy"], abs=0.1)


def test_retrieval_asks_the_test_images(encoder, clouds):
    result = nnclr.evaluate(encoder, *clouds, protocol="retrieval")
    x, y = features_of(clouds[1])
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -np.inf)
    expected = (y[similarities.argmax(axis=1)] == y).mean()
    assert result.value == pytest.approx(expected, abs=0.0112)
    assert (result.n_train, result.n_test) == (0, 90)
    low, high = result.interval
    assert low < result.value < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(expected * (1 - expected) / 90), rel=0.2)
    assert result.details["recall@10"] > result.value


def test_few_shot_reports_each_number_of_shots(encoder, clouds):
    said = []
    result = nnclr.evaluate(encoder, *clouds, protocol="few-shot", shots=(1, 10), say=said.append)
    assert (
        "draws 3 classes (ways), learns from 1 or 10 images a class (shots) and classifies 15"
        in (result.details["in_words"])
    )
    assert said == ["warning: few-shot: with 1 or 10 shots an episode has 3 classes instead of 5, as there are no more"]
    assert result.value == result.details["10 shots"]["value"] > result.details["1 shots"]["value"] > 0.4
    assert result.parameters["ways"] == 3
    assert result.parameters["episodes"] == 600


def test_label_free_needs_no_labels(pictures):
    from nnclr.pretrained import random_encoder

    encoder = random_encoder("small-convnet", 16)
    result = nnclr.evaluate(encoder, pictures[0], protocol="label-free")
    features = encoder.embed(pictures[0]).astype(np.float64)
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert result.details["rank_me"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert result.value == pytest.approx(result.details["rank_me"] / 120)
    assert result.interval is None
    assert {"lidar", "alpha_req", "alignment", "uniformity", "feature_std"} <= result.details.keys()
    assert result.parameters["views"] == 10


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS.keys() - {"transfer", "finetune", "label-curve"}))
def test_every_record_is_complete_json_and_repeats(protocol, pictures):
    from nnclr.pretrained import random_encoder

    options = {"linear": {"epochs": 3}}.get(protocol, {})
    results = [
        nnclr.evaluate(
            random_encoder("small-convnet", 16),
            pictures,
            None if protocol == "label-free" else pictures,
            protocol=protocol,
            **options,
        )
        for _ in range(2)
    ]
    one, two = (json.loads(result.to_json()) for result in results)
    assert one.pop("seconds") > 0
    two.pop("seconds")
    assert one == two
    assert 0 <= one["value"] <= 1
    assert one["parameters"]
    assert one["preprocessing"]["image_size"] == 16
    assert one["interval_method"]
    assert {"torch", "timm", "python", "numpy"} <= one["versions"].keys()
    assert len(one["encoder"]) == len(one["data_fingerprint"]) == len(one["test_fingerprint"]) == 64


def test_bad_input_is_one_sentence(encoder, clouds, pictures):
    train, test = clouds
    single = placed(np.arange(10).reshape(5, 2) * 20 + 9, [0, 0, 0, 0, 1])
    distinct = placed(np.arange(10).reshape(5, 2) * 20 + 9, range(5))
    cases = [
        ((train[0],), {}, "has no labels"),
        ((train,), {"protocol": "knn", "k": 500}, "fewer than the k=500"),
        ((train, test), {"protocol": "knn", "k": (1, 150)}, "fewer than the k=150"),
        ((train, test), {"protocol": "knn", "k": 0}, "k=0 must be a whole number above 0"),
        ((single,), {"protocol": "knn", "k": 1}, "class '1' of array has one image"),
        ((distinct, distinct), {"protocol": "linear"}, "every class of array has one image"),
        ((distinct, distinct), {"protocol": "logistic"}, "every class of array has one image"),
        ((distinct,), {"protocol": "retrieval"}, "two images of the same label"),
        ((distinct,), {"protocol": "few-shot"}, "few-shot"),
        ((train, placed([[9, 9]], [3])), {"protocol": "knn"}, "classes that array lacks, for example '3'"),
        ((train, test), {"protocol": "linear", "k": 3}, "k is no parameter of linear; it takes augmentation, epochs"),
        ((train, test), {"protocol": "retrieval", "k": 3}, "k is no parameter of retrieval; it takes none"),
        ((train[0][:1],), {"protocol": "label-free"}, "label-free measures need two"),
        ((train, test), {"protocol": "label-free"}, "leave the test images out"),
        ((train, test), {"protocol": "knn", "k": ()}, "k is an empty list; it must be a whole number above 0, or sev"),
        ((train, test), {"protocol": "knn", "k": (5, 0)}, "^k=0 must be a whole number above 0, or several$"),
        ((train, test), {"protocol": "knn", "k": "five"}, "^k=five must be a whole number above 0"),
        ((train, test), {"protocol": "knn", "k": np.int64(5)}, "^k=5 of type int64 must be a whole number above 0"),
        ((train, test), {"protocol": "knn", "temperature": (0.1, -1.0)}, "^temperature=-1.0 must be a number above 0"),
        ((train, test), {"protocol": "linear", "epochs": 0}, "^epochs=0 must be a whole number above 0$"),
        ((train, test), {"protocol": "linear", "epochs": (3,)}, "^epochs must be a whole number above 0, not a list$"),
        ((train, test), {"protocol": "linear", "learning_rates": (-1.0,)}, "^learning_rates=-1.0 must be a number"),
        ((train, test), {"protocol": "linear", "learning_rates": 0.1}, "^learning_rates must be a list, each entry a"),
        ((train, test), {"protocol": "few-shot", "shots": 5}, "^shots must be a list, each entry a whole number"),
        ((train, test), {"seed": -1}, "seed=-1 must be at least 0"),
        ((train, test), {"protocol": "finetune", "fraction": 0.5, "subset": "x.txt"}, "exclude each other"),
        (((train[0], train[1] * 0),), {}, "have the same label; there is nothing to tell apart"),
        (((train[0], train[1] * 0),), {"protocol": "retrieval"}, "nothing to tell apart"),
    ]
    for data, options, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            nnclr.evaluate(encoder, *data, **options)
        assert "\n" not in str(caught.value)


def test_a_class_without_training_images_is_refused_only_if_it_is_scored(encoder, clouds):
    (images, labels), test = clouds
    rows = labels != 2
    train = array_source(images[rows], labels[rows], class_names=("0", "1", "2"))
    with pytest.raises(InputError, match="lacks, for example '2'"):
        nnclr.evaluate(encoder, train, test)
    without = (test[0][test[1] != 2], test[1][test[1] != 2])
    assert nnclr.evaluate(encoder, train, without).value > 0.7


def test_hold_out_is_balanced_and_seeded(encoder, clouds):
    images, labels = clouds[0]
    results = [nnclr.evaluate(encoder, (images, labels), seed=seed) for seed in (0, 0, 1)]
    assert results[0].n_test == 15
    assert results[0].test_fingerprint == results[1].test_fingerprint != results[2].test_fingerprint


def test_unreadable_images_are_left_out_and_said(tmp_path, encoder):
    from PIL import Image

    for i in range(12):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (200 if i % 2 else 20, 100, 0)).save(path)
    (tmp_path / "a" / "bad.png").write_bytes(b"no picture")
    said = []
    result = nnclr.evaluate(encoder, str(tmp_path), str(tmp_path), k=3, say=said.append)
    assert result.n_test == 12
    assert any("1 of 13 images" in line for line in said)
    said.clear()
    assert nnclr.evaluate(encoder, str(tmp_path), protocol="label-free", say=said.append).n_test == 12
    assert said == [next(line for line in said if "1 of 13 images" in line)]


def test_scoring_what_was_learned_from_is_said(encoder, clouds):
    said = []
    nnclr.evaluate(encoder, clouds[0], clouds[0], k=1, say=said.append)
    assert "those that were learned from" in said[0]
    said.clear()
    nnclr.evaluate(encoder, *clouds, k=1, say=said.append)
    assert said == []


def test_a_perfect_score_has_an_interval(encoder, clouds):
    images, labels = placed([[250, 10]] * 9 + [[10, 250]] * 9, [0] * 9 + [1] * 9)
    result = nnclr.evaluate(encoder, (images, labels), protocol="retrieval")
    assert result.value == 1.0
    assert result.interval[0] < 0.9


def test_one_class_does_not_hinder_training(tmp_path, pictures, tiny):
    """A folder in a folder looks like one class, and has to be trained on."""
    run = nnclr.pretrain((pictures[0], pictures[1] * 0), tmp_path / "run", **tiny | {"epochs": 1})
    assert run.metrics
    assert run.evaluations == []


@pytest.mark.parametrize(
    ("validation", "edge"),
    [
        ({"0.1": 0.5, "1": 0.6, "10": 0.7}, ("high", "10")),
        ({"1e-05": 0.7, "1": 0.6, "10": 0.5}, ("low", "1e-05")),
        ({"9": 0.4, "10": 0.5, "1": 0.3}, ("high", "10")),  # in the order of numbers
        ({"0.1": 0.5, "1": 0.6, "10": 0.5}, None),
        ({"0.1": 0.5, "1": 0.7, "10": 0.7}, None),  # no better than the one beside it
        ({"0.1": 0.7, "1": 0.7, "10": 0.7}, None),
        ({"0.1": 0.7}, None),
        ({}, None),
    ],
)
def test_a_rate_at_the_edge_of_those_that_were_tried_is_told(encoder, validation, edge):
    said = []
    Task(encoder, None, None, 0, 0, said.append).warn_of_edge(validation)
    assert said == [
        f"warning: the {word}est learning rate that was tried, {rate}, does best on the hold-out: a {word}er one "
        "may do better (--learning-rates)"
        for word, rate in ([] if edge is None else [edge])
    ]


@pytest.mark.parametrize(
    "options",
    [{"protocol": "linear"}, {"protocol": "linear", "augmentation": True}, {"protocol": "finetune"}],
    ids=["linear", "augmented", "finetune"],
)
def test_who_chooses_a_rate_tells_of_the_edge(pictures, monkeypatch, options):
    seen = []
    monkeypatch.setattr(Task, "warn_of_edge", lambda self, validation: seen.append(validation))
    encoder = random_encoder("small-convnet", 16)
    result = nnclr.evaluate(encoder, pictures, pictures, **options, epochs=3, learning_rates=(1e-6, 0.1))
    assert seen == [result.parameters["validation"]]
    assert list(seen[0]) == ["1e-06", "0.1"]
    assert seen[0][f"{result.parameters['learning_rate']:g}"] == max(seen[0].values())
