import time
from unittest import mock
from urllib.error import URLError

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

import nnclr
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.pretrained import baselines, open_encoder, pixel_encoder, random_encoder


@pytest.fixture(scope="module")
def photographs():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 250, 300, 3), dtype=np.uint8)


def reference_input(images, short, size, mean, std):
    """torchvision's own evaluation transform on tensors."""
    from torchvision.transforms import functional as T

    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = T.center_crop(T.resize(x, [short], T.InterpolationMode.BICUBIC, antialias=True), [size, size])
    return T.normalize(x.float() / 255, mean, std)


def test_torchvision_weights_of_a_file(tmp_path, photographs):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    for suffix, save in ((".pth", torch.save), (".safetensors", safetensors.torch.save_file)):
        path = tmp_path / f"weights{suffix}"
        save(model.state_dict(), path)
        encoder = open_encoder(f"torchvision:resnet18?weights={path}")
        features = encoder.embed(photographs)
        backbone = torch.nn.Sequential(*list(model.children())[:-1], torch.nn.Flatten())
        x = reference_input(photographs, 256, 224, encoder.mean, encoder.std)
        with torch.no_grad():
            expected = backbone(x).numpy()
        assert np.corrcoef(features.ravel(), expected.ravel())[0, 1] > 0.9999  # Pillow and torch round resizing apart
        assert encoder.name == f"torchvision:resnet18?weights={path}"
    torch.save({"layer": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not fit torchvision's resnet18"):
        open_encoder(f"torchvision:resnet18?weights={tmp_path / 'other.pth'}")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"bad\.pth was not written by torch\.save"):
        open_encoder(f"torchvision:resnet18?weights={tmp_path / 'bad.pth'}")


def test_torchvision_pretrained_weights_bring_their_preprocessing(monkeypatch, photographs):
    model = torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: model.state_dict()
    )
    encoder = open_encoder("torchvision:resnet18")
    assert encoder.preprocessing["image_size"] == 224
    assert encoder.crop_pct == pytest.approx(224 / 256)
    assert encoder.embed(photographs).shape == (3, 512)


def test_timm_local_folder_is_our_encoder(tmp_path, pictures):
    """The folder that a run leaves, through timm's own loader."""
    module = nnclr.models.backbone.create_backbone("resnet18", 96)
    ours = Encoder(module, 96, provenance={"backbone": "resnet18"})
    ours.save_pretrained(tmp_path)
    theirs = open_encoder(f"timm:local-dir:{tmp_path}")
    assert theirs.preprocessing == ours.preprocessing
    np.testing.assert_allclose(theirs.embed(pictures[0]), ours.embed(pictures[0]), atol=1e-5)


def answers(error=None):
    """A Hub that answers in one way, and how often it was asked."""
    asked = []

    def metadata(address, **_):
        asked.append(address)
        if error is not None:
            raise error

    return metadata, asked


def test_an_unreachable_hub_is_asked_once(monkeypatch, tmp_path):
    """timm alone asks twelve times in 46 seconds, and each time prints two lines."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to ask again"))
    for name, repository in (("resnet18", "timm/resnet18.a1_in1k"), ("hf-hub:timm/x@v1", "timm/x")):
        metadata, asked = answers(ConnectionError("no route to host"))
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        with pytest.raises(InputError, match=r"cannot be reached \(no route to host\).*local-dir:FOLDER$") as wrong:
            open_encoder(f"timm:{name}")
        assert str(wrong.value).startswith(f"timm:{name} is not in the cache")
        assert len(asked) == 1
        assert f"/{repository}/resolve/" in asked[0]


def test_timm_is_left_to_itself_where_the_hub_answers_or_the_weights_are_there(monkeypatch, tmp_path):
    """The control of the test above."""
    real, made = timm.create_model, []

    def create(name, pretrained, **settings):
        made.append(name)
        return real(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", create)
    response = mock.Mock(status_code=404, headers={})
    missing = huggingface_hub.errors.HfHubHTTPError("Entry not found", response=response)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answers(missing)[0])
    open_encoder("timm:test_resnet")
    metadata, asked = answers(ConnectionError("no route to host"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    cached = {("timm/test_resnet.r160_in1k", "model.safetensors"): "/cache/weights"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, **_: cached.get((name, file)))
    open_encoder("timm:test_resnet")
    assert (len(made), asked) == (2, [])


def test_torchvision_without_network_says_what_to_do(monkeypatch):
    def get(self, *_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", get)
    with pytest.raises(InputError, match=r"fetched \(no route to host\); .* torchvision:resnet18\?weights=FILE$"):
        open_encoder("torchvision:resnet18")


def test_timm_preprocessing_is_timms(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answers()[0])
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **k: real(name, pretrained=False, **k))
    encoder = open_encoder("timm:vit_tiny_patch16_224")
    config = timm.data.resolve_data_config(model=encoder.module)
    assert (encoder.mean, encoder.std) == (config["mean"], config["std"])
    assert (encoder.image_size, encoder.crop_pct) == (224, config["crop_pct"])
    assert encoder.mean == (0.5, 0.5, 0.5)  # not ImageNet's, which would be wrong without a word


def test_random_and_pixels(pictures):
    one, two = random_encoder("small-convnet", 16, seed=3), open_encoder("random:small-convnet?size=16&seed=3")
    assert one.fingerprint == two.fingerprint != open_encoder("random:small-convnet?size=16").fingerprint
    state = torch.random.get_rng_state()
    random_encoder("small-convnet", 16)
    assert torch.equal(state, torch.random.get_rng_state())
    pixels = open_encoder("pixels?size=16").embed(pictures[0])
    assert pixels.shape == (120, 768)
    np.testing.assert_allclose(pixels.mean(axis=1), 0, atol=1e-6)


def test_run_folder_and_encoder_pass_through(tmp_path, pictures, tiny):
    run = nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1})
    encoder = open_encoder(str(run.path))
    assert open_encoder(encoder) is encoder
    assert encoder.name == str(run.path)
    made = baselines(encoder)
    assert [baseline.name for baseline in made] == ["pixels?size=16", "random:small-convnet?size=16&seed=0"]
    assert [b.name for b in baselines(Encoder(torch.nn.Flatten(), 16))] == ["pixels?size=16"]
    assert pixel_encoder(16).fingerprint == made[0].fingerprint


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "no encoder is called 'nothing'; name a run or encoder folder, hf:OWNER/NAME, timm:NAME"),
        ("timm:resnet51", "timm has no model 'resnet51'; did you mean resnet51q"),
        ("torchvision:resnet51", "torchvision has no model 'resnet51'; did you mean resnet50"),
        ("random:resnet51", "no backbone is called 'resnet51'"),
        ("random:resnet18?size=large", "whole numbers"),
        ("torchvision:resnet18?size=3", "'size' after the ?"),
        ("pixels?colour=1", "'colour' after the ?"),
    ],
)
def test_what_is_no_encoder_is_one_sentence(spec, words):
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        open_encoder(spec)


def test_a_bare_network_is_told_how_it_becomes_an_encoder(pictures):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    with pytest.raises(InputError, match=r"a Sequential does not say which images it wants; use nnclr\.Encoder"):
        nnclr.evaluate(network, pictures)
