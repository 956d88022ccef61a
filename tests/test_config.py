import dataclasses

import pytest

from nnclr.config import Config, differences, from_toml, load_preset, make_config, presets, to_toml
from nnclr.errors import InputError


def test_defaults_are_the_papers():
    config = Config("data", "out")
    assert (config.optimizer, config.learning_rate, config.momentum, config.weight_decay) == ("lars", 0.3, 0.9, 1e-6)
    assert (config.temperature, config.embedding_dim, config.warmup_epochs) == (0.1, 256, 10)
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
