import dataclasses
import itertools
import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import nnclr
from nnclr.data.decode import BadImage
from nnclr.data.images import array_source
from nnclr.errors import InputError
from nnclr.evaluation import finetune, label_curve
from nnclr.evaluation.finetune import first_of_each
from nnclr.evaluation.label_curve import in_words
from nnclr.evaluation.metrics import half_width
from nnclr.evaluation.result import wilson_interval
from nnclr.pretrained import random_encoder


def test_curve_is_scikit_learns_on_the_same_draws(pictures, monkeypatch):
    encoder = random_encoder("small-convnet", 16)
    test = (pictures[0][::-1].copy() // 2 + 30, pictures[1][::-1].copy())
    options = {"protocol": "label-curve", "budgets": (2, 10, 99), "repeats": 2, "from_scratch": False}
    result = nnclr.evaluate(encoder, pictures, test, **options)
    curve = result.details["curve"]
    assert [point["labels_per_class"] for point in curve] == [2, 10]  # a class has 30 images
    train, scored = encoder.embed(pictures[0]).astype(np.float64), encoder.embed(test[0]).astype(np.float64)
    mean, std = train.mean(0), np.maximum(train.std(0, ddof=1), 1e-6)  # some features are 0 in every image
    for point in curve:
        for repeat, value in enumerate(point["encoder"]["values"]):
            rows = first_of_each(pictures[1], lambda n, point=point: point["labels_per_class"], repeat)
            model = LogisticRegression(C=1 / (0.1 * 128), max_iter=2000, tol=1e-8)
            model.fit((train[rows] - mean) / std, pictures[1][rows])
            assert value == pytest.approx(model.score((scored - mean) / std, test[1]), abs=0.0167)  # two of 120
    assert result.value == curve[-1]["encoder"]["mean"]
    wilson, draws = wilson_interval(result.value, 120), half_width(curve[-1]["encoder"]["values"])
    assert result.interval[0] == max(0, min(wilson[0], result.value - draws))
    assert result.interval[1] == min(1, max(wilson[1], result.value + draws))
    assert set(curve[0]) == {"labels_per_class", "encoder", "pixels"}
    assert json.loads(result.to_json())["details"]["curve"] == curve
    monkeypatch.setattr(label_curve, "in_words", lambda curve, chance: f"one of {1 / chance:g} classes")
    alike = nnclr.evaluate(encoder, pictures, test, **options | {"repeats": 1})
    assert alike.details["in_words"] == "one of 4 classes"
    assert alike.interval == wilson_interval(alike.value, 120)  # one draw has no spread, and 120 images are few


def test_network_from_scratch_is_part_of_it(pictures, monkeypatch):
    import nnclr.evaluation.label_curve as module

    monkeypatch.setattr(module, "_STEPS", 30)
    encoder = random_encoder("small-convnet", 16)
    clock = itertools.count(0, 60)
    monkeypatch.setattr(finetune.time, "perf_counter", lambda: next(clock))
    said = []
    options = {"protocol": "label-curve", "budgets": (5,), "repeats": 1, "say": said.append}
    result = nnclr.evaluate(encoder, pictures, pictures, **options)
    lines = [
        text.removeprefix("from scratch with 20 labels, draw 1: fine-tuning with learning rate 0.1: ") for text in said
    ]
    assert "step 10 of 30, 1 h 00 min left" in lines  # three looks at the clock in a step
    assert "step 29 of 30, 3 min 00 s left" in lines
    (point,) = result.details["curve"]
    assert point["supervised"]["mean"] > 0.5  # colours are soon learned
    assert "A network trained from scratch needs" in result.details["in_words"]


def test_words():
    def point(n, encoder, supervised, pixels):
        means = {"encoder": encoder, "supervised": supervised, "pixels": pixels}
        return {"labels_per_class": n, **{name: {"mean": mean} for name, mean in means.items()}}

    text = in_words([point(1, 0.62, 0.3, 0.2), point(10, 0.8, 0.5, 0.3), point(50, 0.9, 0.7, 0.4)])
    assert text == (
        "With 1 label a class the encoder is right in 62 %. A network trained from scratch needs 50 for that. "
        "A classifier of pixels needs more than 50 for that."
    )
    assert in_words([point(1, 0.26, 0.3, 0.2), point(50, 0.4, 0.4, 0.5)], 0.25) == (
        "With 1 label a class the encoder is right in 26 %, and guessing in 25 %. "
        "With 50 a classifier of pixels is right in 50 %, the encoder in 40 %."
    )
    assert in_words([point(1, 0.62, 0.3, 0.2)], 0.25) == in_words([point(1, 0.62, 0.3, 0.2)])


def test_too_few_images_are_one_sentence(pictures):
    with pytest.raises(InputError, match="the smallest class of array has 30 images, fewer than 31 labels a class"):
        nnclr.evaluate(random_encoder("small-convnet", 16), pictures, pictures, protocol="label-curve", budgets=(31,))


def test_images_that_cannot_be_read_are_not_counted(pictures):
    images = array_source(*pictures)

    def fetch(i):
        if i == 3:
            raise BadImage("truncated", "cut off")
        return images.read(i)

    scored = dataclasses.replace(images, fetch=fetch, fingerprint="other")
    options = {"protocol": "label-curve", "budgets": (2,), "repeats": 1, "from_scratch": False}
    assert nnclr.evaluate(random_encoder("small-convnet", 16), images, scored, **options).n_test == len(images) - 1
