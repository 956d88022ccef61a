import dataclasses

import pytest

from nnclr.config import Config, differences, from_toml, load_preset, make_config, presets, to_toml
from nnclr.data.source import open_source
from nnclr.errors import InputError
from nnclr.objectives import Objective, name_of
from nnclr.training import make_views, resolve


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


@pytest.mark.parametrize(
    "text", ["\N{CAMERA WITH FLASH} Ferien", "a\x7fb", "\u2028\ue000\ufeff", "".join(map(chr, range(1, 160)))]
)
def test_any_text_of_a_path_comes_back(text):
    config = make_config(text, text)
    assert from_toml(to_toml(config).encode(), "here") == config


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_is_checked(name):
    values = load_preset(name)
    config = make_config("data", "out", name)
    assert all(getattr(config, field) == value for field, value in values.items())
    assert config.preset == name


FIELDS = (
    "backbone image_size batch_size epochs augmentation optimizer learning_rate weight_decay warmup_epochs "
    "temperature support_set_size embedding_dim projector_hidden_dim predictor_hidden_dim momentum"
).split()
HEADS = (256, 2048, 4096, 0.9)
PAPER = ("lars", 0.3, 1e-6, 10, 0.1, 98_304, *HEADS)  # Dwibedi et al., section 4.1
MOCO_V3 = (224, 4096, 300, "byol", "adamw", 1.5e-4, 0.1, 40, 0.1, 98_304, *HEADS)  # Chen, Xie and He, section 4
SOLO = ("lars", 0.4, 1e-5, 10, 0.2, 65_536, *HEADS)  # solo-learn, scripts/pretrain/*/nnclr.yaml
PUBLISHED = {
    "imagenet-resnet50": ("resnet50", 224, 4096, 1000, "byol", *PAPER),
    "imagenet-resnet50-100": ("resnet50", 224, 4096, 100, "byol", *PAPER),
    "imagenet-resnet50-200": ("resnet50", 224, 4096, 200, "byol", *PAPER),
    "imagenet-resnet50-400": ("resnet50", 224, 4096, 400, "byol", *PAPER),
    "imagenet-resnet50-800": ("resnet50", 224, 4096, 800, "byol", *PAPER),
    "imagenet-resnet50-multi-crop": ("resnet50", 224, 4096, 1000, "multi-crop", *PAPER),
    "imagenet-resnet50-ablation": (
        *("resnet50", 224, 4096, 1000, "byol"),
        *("lars", 0.15, 1e-6, 10, 0.1, 32_768, *HEADS),
    ),
    "imagenet-vit-small": ("timm/vit_small_patch16_224", *MOCO_V3),
    "imagenet-vit-base": ("timm/vit_base_patch16_224", *MOCO_V3),
    "imagenet100-resnet18-solo-learn": ("resnet18", 224, 128, 400, "byol", *SOLO),
    "cifar10-resnet18-solo-learn": ("resnet18", 32, 256, 1000, "byol", *SOLO),
    "cifar100-resnet18-solo-learn": ("resnet18", 32, 256, 1000, "byol", *SOLO),
    # lightly's rate is 0.06 for its batch of 128
    "cifar10-resnet18-lightly": ("resnet18", 32, 128, 200, "simclr", "sgd", 0.12, 5e-4, 0, 0.5, 4096, *HEADS),
}
CHANGED = {  # in the views, beside the policy
    "imagenet-resnet50-multi-crop": {"crop_min_scale": 0.14, "small_view_size": 96},  # SwAV's
    "cifar10-resnet18-lightly": {"jitter_strengths": (0.4, 0.4, 0.4, 0.1)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_what_was_published(name):
    config = make_config("data", "out", name)
    assert {field: getattr(config, field) for field in FIELDS} == dict(zip(FIELDS, PUBLISHED[name], strict=True))
    changed = CHANGED.get(name, {}) | ({"crop_min_scale": 0.08} if "resnet18" in name else {})
    own = dataclasses.asdict(dataclasses.replace(Config("data", "out", name), **changed))
    for field in own.keys() - set(FIELDS):  # everything else is the method's default
        assert getattr(config, field) == own[field], field


def test_every_preset_is_published_or_ours():
    assert set(presets()) - set(PUBLISHED) == {"demo", "emoji", "fashion-mnist"}


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
        ({"lr": 0.1}, "no setting is called 'lr'; did you mean learning_rate"),
        ({"memory_bank_size": 9}, "no setting is called 'memory_bank_size'; did you mean support_set_size"),
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
        ({"fsdp": True}, "fsdp=True needs optimizer=adamw: that of lars does not work"),
        ({"fsdp": True, "optimizer": "sgd"}, "fsdp=True needs optimizer=adamw: that of sgd does not work"),
        ({"fsdp": True, "optimizer": "adamw", "grad_cache": 8}, "fsdp=True and grad_cache exclude each other"),
        ({"batch_size": 64, "grad_cache": 65}, "grad_cache=65 is above batch_size=64; leave it out"),
        ({"jitter_strengths": (0.4, 0.4, 0.4)}, "jitter_strengths=.* must be four numbers from 0 on"),
        ({"jitter_strengths": (0.4, 0.4, 0.4, 0.6)}, "hue, the last at most 0.5"),
        ({"jitter_strengths": (0.4, -0.1, 0.4, 0.1)}, "jitter_strengths=.* must be four numbers from 0 on"),
        ({"sync_bn_group": 0}, "sync_bn_group=0 must be a finite number at least 1"),
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
    four, five = (dataclasses.replace(one, temperature=value) for value in (0.1 + 0.2, 0.3))
    assert differences(one, four) == ["temperature: 0.1 there, 0.3 now"]
    assert differences(four, five) == ["temperature: 0.30000000000000004 there, 0.3 now"]


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
    with pytest.raises(InputError, match="Mine has a setting 'alpha' that is no field"):
        make_config("data", "out", objective=name_of(kind))
    make_config("data", "out")  # which knows nothing of it
    kind.settings = "embedding_dim"
    with pytest.raises(InputError, match="has settings='embedding_dim', a text; make it a tuple"):
        make_config("data", "out", objective=name_of(kind))
    kind.settings = ("embedding_dim", "epochs")
    make_config("data", "out", objective=name_of(kind), epochs=1.0)
    make_config("data", "out", epochs=1.0)  # still a setting of every run
    with pytest.raises(InputError, match=r"int is no subclass of nnclr\.Objective"):
        name_of(int)


def test_ranges_of_an_augmentation_are_fields():
    settings = {"crop_max_ratio": 2.0, "blur_max_sigma": 3.0, "solarize_threshold": 0.7, "solarize": 0.3}
    small = {"augmentation": "multi-crop", "small_views": 1, "small_crop_min_scale": 0.1, "small_crop_max_scale": 0.3}
    views = make_views(make_config("data", "out", **settings, **small))
    assert len(views) == 3
    for view in views:
        assert (view.crop_ratio, view.blur_sigma, view.solarize_threshold) == ((0.5, 2.0), (0.1, 3.0), 0.7)
    assert views[2].crop_scale == (0.1, 0.3)
    jittered = make_views(make_config("data", "out", jitter_strengths=(0.1, 0.2, 0.3, 0.05)))
    for view in jittered:
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.1, 0.2, 0.3, 0.05)
    assert make_views(make_config("data", "out"))[0].saturation == 0.2  # else the policy's
    assert make_views(make_config("data", "out"))[0].crop_ratio == (3 / 4, 4 / 3)


@pytest.mark.parametrize(("epochs", "expected"), [(1000.0, 10.0), (100.0, 10.0), (6.0, 0.6)])
def test_default_warm_up_is_the_papers_or_a_tenth_of_a_short_run(pictures, epochs, expected):
    config = make_config("data", "out", image_size=16, batch_size=24, epochs=epochs)
    assert resolve(config, open_source(pictures)).warmup_epochs == pytest.approx(expected)


def test_a_recipe_does_not_build_on_another(tmp_path):
    (tmp_path / "mine.toml").write_text('preset = "demo"\nepochs = 2\n')
    with pytest.raises(
        InputError, match=r"mine.toml: a recipe cannot build on preset='demo'; copy the lines of that one"
    ):
        load_preset(str(tmp_path / "mine.toml"))
    (tmp_path / "config.toml").write_text(to_toml(make_config("data", "out", "demo")))  # of a run
    assert load_preset(str(tmp_path / "config.toml"))["learning_rate"] == load_preset("demo")["learning_rate"]
