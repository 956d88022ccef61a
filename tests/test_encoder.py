import inspect
import json
import shutil
import warnings

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from nnclr import encoder as encoder_module
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.golden import golden_image
from nnclr.models.backbone import create_backbone
from nnclr.pretrained import open_encoder


def made(backbone, size, **options):
    torch.manual_seed(0)
    module = create_backbone(backbone, size)
    with torch.no_grad():  # statistics as after training
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return Encoder(module, size, provenance={"backbone": backbone, "step": 7}, **options)


@pytest.fixture(params=[("small-convnet", 32), ("test_resnet", 112), ("timm/test_vit", 96)], ids=lambda p: p[0])
def saved(request, tmp_path):
    """A saved encoder: a ResNet, a ViT and the small network."""
    encoder = made(*request.param)
    encoder.save_pretrained(tmp_path / "encoder")
    return encoder, tmp_path / "encoder"


def change(folder, **values):
    """Edit the preprocessing in a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        (config["nnclr"] if name == "image_size" else config["pretrained_cfg"])[name] = value
    path.write_text(json.dumps(config))


def test_what_was_saved_passes_and_files_depend_on_the_encoder_alone(saved, tmp_path):
    encoder, folder = saved
    loaded = Encoder.from_pretrained(folder)
    assert loaded.fingerprint == encoder.fingerprint
    assert loaded.preprocessing == encoder.preprocessing
    loaded.module.train()
    torch.manual_seed(5)
    for number in range(4):  # the library's own order of metadata is random
        loaded.save_pretrained(tmp_path / str(number))
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / str(number) / name).read_bytes() == (folder / name).read_bytes()
    assert loaded.module.training
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        golden = np.array(json.loads(file.metadata()["nnclr_golden"]), np.float32)
        assert file.metadata()["format"] == "pt"  # transformers asks for it
    assert len(golden) == 64
    np.testing.assert_array_equal(golden[[0, -1]], encoder.golden_features()[[0, -1]])


@pytest.mark.parametrize(
    "values",
    [
        {"mean": [0.406, 0.456, 0.485], "std": [0.225, 0.224, 0.229]},  # the channels' order
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        {"mean": [0.495, 0.466, 0.416]},
        {"crop_pct": 0.95},
        {"crop_pct": 0.8},
        {"interpolation": "bilinear"},
        {"crop_mode": "border"},
        {"input_size": [3, 40, 40]},
        {"input_size": [3, 128, 128], "image_size": 128},
    ],
    ids=str,
)
def test_another_preprocessing_is_noticed(saved, values):
    _, folder = saved
    change(folder, **values)
    with pytest.raises(InputError, match=r"do not match|cannot be loaded: .*(preprocessing|sizes|size mismatch)"):
        Encoder.from_pretrained(folder)


def test_exchanged_channels_and_other_code_are_noticed(saved, monkeypatch):
    _, folder = saved
    real = encoder_module.eval_image
    for spoilt in (
        lambda image, size, crop: real(image, size, crop)[::-1].copy(),  # BGR
        lambda image, size, crop: np.roll(real(image, size, crop), size // 4, axis=2),
        lambda image, size, crop: real(image[::2, ::2], size, crop),  # another interpolation
    ):
        monkeypatch.setattr(encoder_module, "eval_image", spoilt)
        with pytest.raises(InputError, match="do not match"):
            Encoder.from_pretrained(folder)
    monkeypatch.setattr(encoder_module, "eval_image", real)
    Encoder.from_pretrained(folder)


def test_other_weights_are_noticed(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping to iterate
    first = next(key for key in sorted(weights) if weights[key].ndim == 4 and weights[key].shape[1] == 3)
    weights[first] = weights[first].flip(1).contiguous()  # as a network for BGR
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(InputError, match="do not match"):
        Encoder.from_pretrained(folder)
    weights[first] = weights[first].flip(1).contiguous() * (1 + 1e-6)  # control: the rounding of another processor
    safetensors.torch.save_file(weights, path, metadata)
    Encoder.from_pretrained(folder)
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="without a golden vector"):
        Encoder.from_pretrained(folder)
    safetensors.torch.save_file(weights, path, {"format": "pt", "nnclr_golden": "[1, 2]"})
    with pytest.raises(InputError, match="golden vector of another width"):
        Encoder.from_pretrained(folder)
    for text in ("no JSON", "[]", "[[1]]", '{"a": 1}', "[" * 100_000):
        safetensors.torch.save_file(weights, path, {"format": "pt", "nnclr_golden": text})
        with pytest.raises(InputError, match="cannot be loaded"):
            Encoder.from_pretrained(folder)


def test_golden_image_is_fixed_and_its_channels_are_distinct():
    image = golden_image()
    y, x = 100, 200  # by hand: y² // 24 + 3x, x² // 31 + 2y, an odd square of the board and xy // 97
    assert image[y, x].tolist() == [96 + 1016 % 160, 1490 % 256, 56 + 206 % 56]
    assert image.shape == (277, 331, 3)
    assert np.all(np.diff(image.reshape(-1, 3).mean(axis=0)) < -40)


@pytest.mark.parametrize(
    "backbone",
    ["os.system", "module:os.system", "hf-hub:evil/model", "local-dir:/tmp", "timm/hf-hub:evil/model", "../resnet18",
     "__import__('os').system('x')", "torchvision.transforms.Compose", 5, None, ["resnet18"], {"_target_": "os.system"},
     "resnet18.tag", ""],
    ids=str,
)  # fmt: skip
def test_a_backbone_in_a_file_is_looked_up_and_never_run(tmp_path, backbone):
    made("small-convnet", 16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["nnclr"]["backbone"] = backbone
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        Encoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", [0.5]), ("mean", ["0.5", 0.5, 0.5]), ("std", [0.0, 1.0, 1.0]), ("std", [float("nan"), 1, 1]),
        ("crop_pct", 0), ("crop_pct", None), ("crop_pct", 1e-9), ("image_size", 10**9), ("image_size", -16),
        ("image_size", "16"), ("image_size", True),
    ],
)  # fmt: skip
def test_nonsense_in_a_config_is_one_sentence(tmp_path, name, value):
    made("small-convnet", 16).save_pretrained(tmp_path)
    change(tmp_path, **{name: value})
    with pytest.raises(InputError, match=r"cannot be loaded|do not match"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "5", '{"nnclr": 5}', '{"nnclr": {}}', "[" * 100_000, '{"a":' * 100_000])
def test_no_config_is_one_sentence(tmp_path, text):
    made("small-convnet", 16).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="cannot be loaded"):
        Encoder.from_pretrained(tmp_path)


class OwnNetwork(nn.Sequential):
    pass


def own_network():
    torch.manual_seed(0)
    return OwnNetwork(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_an_own_module_is_given_by_the_user(tmp_path):
    encoder = Encoder(own_network(), 16, provenance={"backbone": "module:OwnNetwork"})
    encoder.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"a module of your own, OwnNetwork: build it and give it as module="):
        Encoder.from_pretrained(tmp_path)
    empty = own_network()
    nn.init.zeros_(empty[0].weight)
    assert Encoder.from_pretrained(tmp_path, module=empty).fingerprint == encoder.fingerprint
    with pytest.raises(InputError, match="cannot be loaded"):
        Encoder.from_pretrained(tmp_path, module=nn.Flatten())


def test_a_kill_between_the_two_files_leaves_a_whole_encoder(tmp_path, monkeypatch):
    encoder = made("small-convnet", 16)
    encoder.save_pretrained(tmp_path)
    real = encoder_module.write_atomically

    def stop_before_config(path, content):
        if path.name == "config.json":
            raise KeyboardInterrupt
        real(path, content)

    with torch.no_grad():
        encoder.module.stem[0].weight.mul_(-1.0)
    monkeypatch.setattr(encoder_module, "write_atomically", stop_before_config)
    with pytest.raises(KeyboardInterrupt):
        encoder.save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint


# The Hub


class Hub:
    """Stands in for the Hugging Face Hub; calls are bound to the true signatures."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.asked, self.error = folder, [], None
        signatures = {
            name: inspect.signature(getattr(owner, name))
            for owner, name in (
                (huggingface_hub, "snapshot_download"),
                (huggingface_hub.HfApi, "create_repo"),
                (huggingface_hub.HfApi, "upload_folder"),
            )
        }

        def record(name):
            def call(*args, **kwargs):
                bound = signatures[name].bind(*args, **kwargs).arguments
                self.asked.append((name, bound))
                if self.error is not None:
                    raise self.error
                return getattr(self, name)(**{key: value for key, value in bound.items() if key != "self"})

            return call

        monkeypatch.setattr(huggingface_hub, "snapshot_download", record("snapshot_download"))
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, record(name))

    def snapshot_download(self, repo_id, allow_patterns):
        return str(self.folder / repo_id)

    def create_repo(self, repo_id, token, private, exist_ok):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, token):
        (self.folder / repo_id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    return Hub(monkeypatch, tmp_path / "hub")


def test_push_and_pull(hub, tmp_path, pictures):
    encoder = made("timm/test_vit", 96)
    encoder.provenance["data"] = "/home/someone/secret/photos, b/more"
    address = encoder.push_to_hub("someone/birds", private=True, token="word")
    assert address == "https://huggingface.co/someone/birds"
    assert hub.asked[0][1]["private"] is True
    assert [call[1]["token"] for call in hub.asked] == ["word", "word"]
    files = sorted(path.name for path in (hub.folder / "someone/birds").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    for name in ("README.md", "config.json"):
        text = (hub.folder / "someone/birds" / name).read_text()
        assert "photos, more" in text
        assert "secret" not in text
        assert "word" not in text
    hub.asked.clear()
    for name in ("someone/birds", "hf:someone/birds"):
        pulled = Encoder.from_pretrained(name)
        assert pulled.name == "hf:someone/birds"
        np.testing.assert_array_equal(pulled.embed(pictures[0][:3]), encoder.embed(pictures[0][:3]))
    assert hub.asked[0][1]["allow_patterns"] == ["config.json", "model.safetensors"]  # no code, no pickles
    assert open_encoder("hf:someone/birds").fingerprint == encoder.fingerprint
    with pytest.raises(InputError, match=r"no encoder is called 'someone/birds'; name .*hf:OWNER/NAME"):
        open_encoder("someone/birds")


def not_found():
    request = huggingface_hub.errors.RepositoryNotFoundError.__new__(huggingface_hub.errors.RepositoryNotFoundError)
    request.args = ("404 Client Error",)
    return request


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("no network"), "the Hugging Face Hub cannot be reached"),
        (ConnectionError("no network"), "the Hugging Face Hub cannot be reached"),
        (not_found(), "there is no such model, or it is private"),
        (ValueError("odd\nanswer"), "cannot be had from the Hugging Face Hub: odd"),
    ],
)
def test_hub_errors_are_one_sentence(hub, error, words):
    hub.error = error
    with pytest.raises(InputError, match=words) as caught:
        Encoder.from_pretrained("someone/birds")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be pushed"):
        made("small-convnet", 16).push_to_hub("someone/birds")


def test_folders_are_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/mistyped", "./a/b", "/a/b", "a", "a/b/c", "../a/b", tmp_path / "x"):
        with pytest.raises(InputError, match="holds no encoder"):
            Encoder.from_pretrained(name)
    for name in ("hf:a", "hf:a/b/c", "hf:../b", "hf:/a/b"):
        with pytest.raises(InputError, match="is no name on the Hugging Face Hub"):
            Encoder.from_pretrained(name)
    with pytest.raises(InputError, match="is no name"):
        made("small-convnet", 16).push_to_hub("birds")
    assert hub.asked == []
    (tmp_path / "hub/a/b").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no encoder"):
        Encoder.from_pretrained("a/b")
    assert len(hub.asked) == 1


# Models that timm saved


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 160), ("test_vit", 128)])
def test_a_model_of_timms_loads_with_its_own_preprocessing(tmp_path, name, size):
    options = {"img_size": size} if "vit" in name else {}
    theirs = timm.create_model(name, num_classes=10, **options).eval()
    mean = (0.1, 0.2, 0.3)
    timm.models.save_for_hf(
        theirs, tmp_path, data_config={"mean": mean, "input_size": (3, size, size)}, safe_serialization=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the test models are trained with other crops
        encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.mean == mean
    assert encoder.image_size == size
    assert encoder.provenance == {"backbone": f"timm/{name}"}
    theirs.reset_classifier(0)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(encoder.module(x), theirs(x))
    encoder.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/model.safetensors").rename(tmp_path / "ours/pytorch_model.bin")
    with pytest.raises(InputError, match="weights in other files are not read"):
        Encoder.from_pretrained(tmp_path / "ours")
    encoder.save_pretrained(tmp_path / "ours")
    Encoder.from_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["interpolation"] = "bilinear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained with bilinear resizing"):
        Encoder.from_pretrained(tmp_path)
    config["global_pool"], config["model_args"] = "max", {"global_pool": "max"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.warns(UserWarning, match="trained with bilinear"),
        pytest.raises(InputError, match="pools by max where timm's test_"),
    ):
        Encoder.from_pretrained(tmp_path)
    config["model_args"] = {"drop_rate": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="sets drop_rate for timm's model; open it by timm:local-dir:"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_maxvit", "test_convnext", "test_efficientnet"])
def test_encoder_folders_load_by_timm(tmp_path, name):
    """Also networks that are built for one size, and those that take no size."""
    encoder = made(name, 96)
    encoder.save_pretrained(tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(theirs(x), encoder.module.eval()(x))


def test_its_text_is_one_line_without_the_layers():
    said = repr(made("small-convnet", 32))
    assert said.startswith("Encoder(image_size=32")
    assert "Conv" not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"module": "resnet18"}, "an encoder holds a network, not 'resnet18'; open_encoder takes names"),
        ({"image_size": 0}, "image_size=0 must be above 0"),
        ({"mean": (0.0, 0.0)}, "three numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "those of std above 0"),
    ],
)
def test_what_cannot_embed_is_no_encoder(change, words):
    with pytest.raises(InputError, match=words):
        Encoder(**{"module": nn.Flatten()} | change)
