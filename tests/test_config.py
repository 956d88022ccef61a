import dataclasses

import pytest

from nnclr.config import Config, differences, from_toml, load_preset, make_config, presets, to_toml
from nnclr.errors import InputError
from nnclr.objectives import OBJECTIVES, Objective
from nnclr.training import make_views


def test_defaults_are_the_papers():
    config = Config("data", "out")
    assert (config.optimizer, config.learning_rate, config.momentum, config.weight_decay) == ("lars", 0.3, 0.9, 1e-6)
    assert (config.temperature, config.embedding_dim, config.warmup_epochs) == (0.1, 256, None)  # None: 10
    assert (config.projector_hidden_dim, config.predictor_hidden_dim) == (2048, 4096)
    assert (config.backbone, config.image_size, config.augmentation) == ("resnet50", 224, "byol")
    assert (config.knn_k, config.knn_temperature) == (20, 0.07)


def test_toml_round_trip():
    config = make_config('a "quoted" path\\with\nodd\tcharacters é', "out", temperature=0.2, epochs=3, num_workers=0)
    assert from_toml(to_toml(config).encode(), "here") == config


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_is_checked(name):
    values = load_preset(name)
    config = make_config("data", "out", name)
    assert all(getattr(config, field) == value for field, value in values.items())
    assert config.preset == name


def test_keywords_win_over_the_preset():
    assert make_config("data", "out", "demo", epochs=1).epochs == 1.0


def test_a_preset_may_be_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text("temperature = 0.3\nepochs = 2\n")
    config = make_config("data", "out", str(tmp_path / "mine.toml"))
    assert (config.temperature, config.epochs) == (0.3, 2.0)
    (tmp_path / "mine.toml").write_text("temperature = \n")
    with pytest.raises(InputError, match=r"mine\.toml is not valid TOML"):
        make_config("data", "out", str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temprature": 0.1}, "no setting is called 'temprature'; did you mean temperature"),
        ({"epochs": 0}, "epochs=0.0 must be a finite number above 0"),
        ({"epochs": float("inf")}, "epochs=inf must be a finite number"),
        ({"epochs": float("nan")}, "epochs=nan must be a finite number"),
        ({"batch_size": 1}, "batch_size=1 must be a finite number at least 2"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"batch_size": "64"}, "batch_size='64' must be a whole number"),
        ({"objective": "nnclrr"}, "no objective is called 'nnclrr'; did you mean nnclr\\?"),
        ({"backbone": 18}, "backbone=18 must be text"),
        ({"momentum": 1.0}, "momentum=1.0 must be below 1"),
        ({"crop_min_scale": 1.5}, "at most 1"),
        ({"seed": -1}, "seed=-1 must be a finite number at least 0"),
    ],
)
def test_bad_values_are_named(fields, words):
    with pytest.raises(InputError, match=words):
        make_config("data", "out", **fields)


def test_differences_leave_out_what_may_change():
    one = make_config("data", "out")
    two = dataclasses.replace(one, out="elsewhere", num_workers=3, log_every_steps=1, extend_epochs=5.0, data="moved")
    assert differences(one, two) == []
    three = dataclasses.replace(one, temperature=0.2, seed=1)
    assert differences(one, three) == ["temperature: 0.1 there, 0.2 now", "seed: 0 there, 1 now"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"neighbour": "kth"}, "neighbour=kth needs a neighbour_k"),
        ({"neighbour": "soft"}, "neighbour=soft needs a neighbour_k"),
        ({"small_views": 4}, "small_views=4 has no effect without augmentation=multi-crop"),
        ({"small_crop_max_scale": 0.2}, "has no effect without augmentation=multi-crop"),
        ({"momentum": 0.8, "optimizer": "adamw"}, "momentum=0.8 has no effect without optimizer=lars or sgd"),
        ({"warmup_epochs": 20.0, "epochs": 10.0}, "warmup_epochs=20.0 is longer than the run of epochs=10.0"),
        ({"augmentation": "multi-crop", "small_crop_max_scale": 0.01}, "small_crop_min_scale=0.05 is above"),
        ({"solarize_threshold": 1.5}, "solarize_threshold=1.5 must be at most 1"),
        ({"crop_max_ratio": 0.5}, "crop_max_ratio=0.5 must be a finite number at least 1"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        make_config("data", "out", **fields)


def test_settings_that_a_file_gives_to_its_own_objective_are_checked(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('objective = "swav"\nsupport_set_size = 100\n')
    with pytest.raises(InputError, match="support_set_size=100 is no setting of swav"):
        make_config("data", "out", str(recipe))
    recipe.write_text("support_set_size = 100\n")  # NNCLR's, and dropped with it
    assert make_config("data", "out", str(recipe), objective="swav").support_set_size is None
    assert make_config("data", "out", str(recipe)).support_set_size == 100


def test_warm_up_of_a_preset_is_that_of_its_own_length():
    assert make_config("data", "out", "imagenet-vit-small").warmup_epochs == 40.0
    assert make_config("data", "out", "imagenet-vit-small", epochs=100.0).warmup_epochs == 10.0
    assert make_config("data", "out", "imagenet-vit-small", epochs=100.0, warmup_epochs=30.0).warmup_epochs == 30.0


def test_a_setting_of_ones_own_objective_must_be_a_field():
    kind = type("Mine", (Objective,), {"settings": ("embedding_dim", "alpha")})
    OBJECTIVES["tests:Mine"] = kind
    try:
        with pytest.raises(InputError, match="tests:Mine has a setting 'alpha' that is no field"):
            make_config("data", "out", objective="tests:Mine")
    finally:
        del OBJECTIVES["tests:Mine"]


def test_ranges_of_an_augmentation_are_fields():
    settings = {"crop_max_ratio": 2.0, "blur_max_sigma": 3.0, "solarize_threshold": 0.7, "solarize": 0.3}
    small = {"augmentation": "multi-crop", "small_views": 1, "small_crop_min_scale": 0.1, "small_crop_max_scale": 0.3}
    views = make_views(make_config("data", "out", **settings, **small))
    assert len(views) == 3
    for view in views:
        assert (view.crop_ratio, view.blur_sigma, view.solarize_threshold) == ((0.5, 2.0), (0.1, 3.0), 0.7)
    assert views[2].crop_scale == (0.1, 0.3)
    assert make_views(make_config("data", "out"))[0].crop_ratio == (3 / 4, 4 / 3)
