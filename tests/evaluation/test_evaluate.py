import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import nnclr
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.evaluation.result import Result, append, wilson_interval
from nnclr.models.backbone import feature_dim
from nnclr.pretrained import pixel_encoder


class Colour(nn.Module):
    """Mean colour, then batch norm: in training mode it would depend on the batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images):
        return self.norm(images.mean(dim=(2, 3)))


def test_result_carries_its_protocol(pictures):
    result = nnclr.evaluate(Encoder(Colour(), 16), pictures, protocol="knn", k=5, temperature=0.1)
    assert result.value == 1.0  # four colours
    assert result.parameters["k"] == 5
    assert result.parameters["temperature"] == 0.1
    assert (result.n_train, result.n_test) == (108, 12)
    assert result.interval == pytest.approx((0.7575, 1.0), abs=1e-3)
    assert len(result.encoder) == len(result.data_fingerprint) == 64


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_twice_gives_the_same_and_leaves_the_module_as_it_was(pictures, protocol):
    encoder = Encoder(Colour().train(), 16)
    before = encoder.fingerprint
    values = [nnclr.evaluate(encoder, pictures, protocol=protocol).value for _ in range(2)]
    assert values[0] == values[1]
    assert encoder.module.training
    assert encoder.fingerprint == before  # no statistic was updated


class Noting(nn.Sequential):
    """Does something of its own when it is put into a mode."""

    def train(self, mode=True):
        self.told = mode
        return super().train(mode)


def test_frozen_layers_stay_frozen(pictures):
    module = Noting(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    module[1][0].eval()  # frozen while the others train
    module[1].training = False  # which says nothing about the layers inside
    module[2].eval()
    before = {name: layer.training for name, layer in module.named_modules()}
    assert before[""]
    assert not before["1.0"]
    encoder = Encoder(module, 16)
    encoder.embed(pictures[0][:4])
    assert feature_dim(module, 16) == 4
    nnclr.evaluate(encoder, pictures, protocol="knn")
    assert {name: layer.training for name, layer in module.named_modules()} == before
    assert module.told


def test_features_do_not_depend_on_batch_or_mode(pictures):
    encoder = Encoder(Colour().train(), 16)
    whole = encoder.embed(pictures[0])
    np.testing.assert_allclose(encoder.embed(pictures[0], batch_size=7), whole, atol=1e-6)
    encoder.module.eval()
    np.testing.assert_array_equal(encoder.embed(pictures[0]), whole)
    with torch.no_grad():  # control: in training mode they would
        alone = encoder.module.train()(torch.randn(4, 3, 16, 16))
    assert (encoder.module.eval()(torch.randn(4, 3, 16, 16)) - alone).abs().max() > 0.1


def test_embed_is_preprocess_and_forward(pictures):
    encoder = Encoder(nn.Flatten(), 16)
    x = torch.from_numpy(pictures[0]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(encoder.embed(pictures[0]), ((x - mean) / std).flatten(1).numpy(), atol=1e-5)
    raw = pixel_encoder(16).embed(pictures[0])
    expected = x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True)
    np.testing.assert_allclose(raw, expected.numpy(), atol=1e-6)


def test_save_and_load(tmp_path, pictures):
    module = nnclr.models.backbone.create_backbone("small-convnet", 16)
    encoder = Encoder(module, 16, provenance={"backbone": "small-convnet", "step": 7})
    encoder.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path)
    assert loaded.fingerprint == encoder.fingerprint
    assert loaded.provenance == encoder.provenance
    np.testing.assert_array_equal(loaded.embed(pictures[0]), encoder.embed(pictures[0]))
    weights = (tmp_path / "model.safetensors").read_bytes()
    for damage in (b"", weights[:1000], b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(damage)
        with pytest.raises(InputError, match="cannot be loaded"):
            Encoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    config["nnclr"]["backbone"] = "os.system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"os\.system"):
        Encoder.from_pretrained(tmp_path)


def test_missing_labels_and_other_classes_are_named(pictures):
    images, labels = pictures
    encoder = Encoder(Colour(), 16)
    with pytest.raises(InputError, match="has no labels"):
        nnclr.evaluate(encoder, images)
    with pytest.raises(InputError, match="has no labels"):
        nnclr.evaluate(encoder, pictures, images)
    with pytest.raises(InputError, match="has classes that array lacks, for example '4'"):
        nnclr.evaluate(encoder, pictures, (images[:8], np.arange(8)))
    with pytest.raises(InputError, match="'knm'; there are knn, linear"):
        nnclr.evaluate(encoder, pictures, protocol="knm")
    assert nnclr.evaluate(encoder, pictures, (images, labels)).n_test == 120


def test_classes_are_matched_by_name(tmp_path):
    """A test folder without some classes, so that its own numbering is another one."""
    from PIL import Image

    for split, names in (("train", "abc"), ("test", "bc")):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                grey = "abc".index(name) * 100 + i
                Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(folder / f"{i}.png")
    result = nnclr.evaluate(Encoder(nn.Flatten(), 16), str(tmp_path / "train"), str(tmp_path / "test"), k=3)
    assert result.n_test == 12
    assert result.value >= 0.5
    mean = Encoder(Colour(), 16)
    with torch.no_grad():
        mean.module.norm.running_mean.fill_(0.0)
    result = nnclr.evaluate(mean, str(tmp_path / "train"), str(tmp_path / "test"), protocol="linear", epochs=400)
    assert result.value == 1.0


def test_wilson_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_records_are_lines(tmp_path, monkeypatch):
    where = ("d", "t", "f", "g", 1, 2)
    record = Result("m", 0.5, "knn", {}, *where, "e", "name", {}, None, 0, 0.1, {}, (0.4, 0.6), "Wilson")
    assert record.in_words() == "name: knn m 50.0 % (40.0 to 60.0)"
    for _ in range(3):
        append(record, tmp_path / "evaluations.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert lines[0]["interval"] == [0.4, 0.6]
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:10]))  # a disk with that much room
    with pytest.raises(OSError, match="No space left on device"):
        append(record, tmp_path / "evaluations.jsonl")
