import dataclasses
import json
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

import nnclr
from nnclr.data.images import array_source
from nnclr.encoder import Encoder
from nnclr.errors import DataError, InputError
from nnclr.evaluation import finetune as module
from nnclr.evaluation.finetune import (
    _loss,
    balanced_rows,
    first_of_each,
    listed_rows,
    read_list,
    train_classifier,
)
from nnclr.evaluation.task import Task, renormalised
from nnclr.pretrained import random_encoder


@pytest.fixture
def encoder():
    return random_encoder("small-convnet", 16)


def task_of(encoder, seed=0):
    return Task(encoder, None, None, 0, seed, lambda text: None)


def test_fine_tuning_learns_and_leaves_the_encoder_alone(encoder, pictures):
    before = encoder.fingerprint
    options = {"protocol": "finetune", "fraction": 0.5, "epochs": 20}
    result = nnclr.evaluate(encoder, pictures, pictures, **options)
    assert result.value > 0.9
    assert encoder.fingerprint == before
    assert not encoder.module.training
    assert (result.n_train, result.parameters["fraction"], result.parameters["epochs"]) == (60, 0.5, 20)
    assert result.parameters["learning_rate"] in result.parameters["learning_rates"]
    assert len(result.parameters["validation"]) == 3
    assert nnclr.evaluate(encoder, pictures, pictures, **options).value == result.value


def test_the_backbone_is_trained_too(encoder, pictures):
    source = array_source(*pictures)
    trained = train_classifier(task_of(encoder), source, 4, 0.1, 2)
    backbone = trained.module[0].state_dict()
    assert any(not torch.equal(value, backbone[name]) for name, value in encoder.module.state_dict().items())
    assert trained.embed(source).shape == (120, 4)


def test_full_batch_without_augmentation_is_plain_sgd(pictures, monkeypatch):
    """The loop against PyTorch written out: Nesterov SGD with a cosine on the cross entropy of a linear network."""
    from nnclr.data.augment import View, normalize

    whole = View(16, (1.0, 1.0), (1.0, 1.0), flip=0, jitter=0, grayscale=0, blur=0)
    monkeypatch.setattr(module, "crop_and_flip", lambda size: whole)
    monkeypatch.setattr(module, "batch_size_for", lambda images: images)
    source = array_source(*pictures)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    encoder = Encoder(backbone, 16)
    ours = train_classifier(task_of(encoder), source, 4, 0.02, 6).embed(source)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.Linear(5, 4))
    model[1].load_state_dict(backbone[1].state_dict())
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    x = normalize(torch.from_numpy(pictures[0]).permute(0, 3, 1, 2).float() / 255)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * 120 / 256, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.from_numpy(pictures[1])).backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours, model(x).detach().numpy(), atol=1e-3)
    assert np.abs(ours).max() > 0.1  # it has moved


def test_other_normalisation_is_applied(encoder, pictures):
    from nnclr.data.augment import normalize

    images = torch.rand(2, 3, 4, 4)
    other = Encoder(encoder.module, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    expected = normalize(images.clone(), other.mean, other.std)
    torch.testing.assert_close(renormalised(normalize(images.clone()), other), expected)
    assert renormalised(images, encoder) is images


def test_several_labels_an_image_and_what_is_not_scored():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    targets = torch.tensor([[1, 0, -1], [-1, 1, 0]], dtype=torch.int8)
    x = logits.numpy().astype(np.float64)
    terms = [
        np.log1p(np.exp(-x[0, 0])),
        np.log1p(np.exp(x[0, 1])),
        np.log1p(np.exp(-x[1, 1])),
        np.log1p(np.exp(x[1, 2])),
    ]
    assert _loss(logits, targets).item() == pytest.approx(np.mean(terms) * 3, rel=1e-6)


def test_shares_are_balanced_seeded_and_nested():
    labels = np.array([0] * 200 + [1] * 100 + [2])
    one, ten = balanced_rows(labels, 0.01, 0), balanced_rows(labels, 0.1, 0)
    assert np.bincount(labels[one]).tolist() == [2, 1, 1]
    assert np.bincount(labels[ten]).tolist() == [20, 10, 1]
    assert set(one) < set(ten)
    assert not np.array_equal(ten, balanced_rows(labels, 0.1, 1))
    assert np.bincount(labels[first_of_each(labels, lambda n: 5, 0)]).tolist() == [5, 5, 1]


def test_lists_of_names(tmp_path, pictures, encoder):
    """SimCLR's lists hold file names; ours may also hold paths."""
    from PIL import Image

    for i, (image, label) in enumerate(zip(*pictures, strict=True)):
        folder = tmp_path / "train" / f"n{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"n{label}_{i}.png")
    listed = tmp_path / "1percent.txt"
    listed.write_text("\n".join([f"n{i % 4}_{i}.png" for i in range(0, 38)] + ["n2/n2_38.png", ""]))
    data = str(tmp_path / "train")
    result = nnclr.evaluate(
        encoder, data, data, protocol="finetune", subset=str(listed), epochs=1, learning_rates=(0.1,)
    )
    assert result.n_train == 39
    assert result.parameters["fraction"] == pytest.approx(39 / 120)
    assert json.loads(result.to_json())["parameters"]["validation"] == {}
    listed.write_text("n0_0.png\nmissing_1.png\nmissing_2.png\n")
    with pytest.raises(
        InputError,
        match=r"2 of 3 listed .* among the 120 of .*train that .*, first missing_1.png",
    ):
        nnclr.evaluate(encoder, data, data, protocol="finetune", subset=str(listed))


def test_a_list_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    def refuse(address, timeout):
        raise urllib.error.URLError(OSError(-2, "no network"))

    monkeypatch.setattr(module.urllib.request, "urlopen", refuse)
    with pytest.raises(
        InputError, match=r"simclr-1percent cannot be read: no network; save it from https://\S+1percent"
    ):
        read_list("simclr-1percent")
    with pytest.raises(InputError, match=r"nothing.txt cannot be read: No such file or directory$"):
        read_list(str(tmp_path / "nothing.txt"))
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(InputError, match=r"picture.txt cannot be read: it is no text$"):
        read_list(str(tmp_path / "picture.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="names no image"):
        read_list(str(tmp_path / "empty.txt"))


def test_fetched_list_is_read(monkeypatch, pictures):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, most):
            return b"array#3\narray#7\n"

    asked = []
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda address, timeout: asked.append(address) or Answer())
    rows = listed_rows(array_source(*pictures), read_list("simclr-10percent"))
    assert rows.tolist() == [3, 7]
    assert asked[0].endswith("imagenet_subsets/10percent.txt")


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1, "x"])
def test_impossible_fractions_are_refused(encoder, pictures, fraction):
    with pytest.raises(InputError, match="above 0"):
        nnclr.evaluate(encoder, pictures, pictures, protocol="finetune", fraction=fraction)


def test_one_image_is_not_enough(encoder, pictures):
    one = array_source(pictures[0][:1], pictures[1][:1])
    with pytest.raises(InputError, match="fine-tuning needs two"):
        train_classifier(task_of(encoder), one, 4, 0.1, 1)


def test_a_name_that_several_images_have_is_refused():
    """In folders of classes file names repeat: taking any of them would train on another class without a word."""
    source = dataclasses.replace(array_source(np.zeros((4, 2, 2, 3), np.uint8), [0, 0, 1, 1]), title=TITLES.__getitem__)
    assert listed_rows(source, ["a/1.png", "b/0.png", "own.png"]).tolist() == [1, 2, 3]
    with pytest.raises(
        InputError, match=r"'0.png' is the name of several images of array; list them with their folders"
    ):
        listed_rows(source, ["0.png"])
    with pytest.raises(InputError, match=r"1 of 1 listed images are not among the 4 .* first c/own.png"):
        listed_rows(source, ["c/own.png"])
    alike = dataclasses.replace(source, title=lambda i: "0.png")  # as names in a table may be
    with pytest.raises(InputError, match=r"'0.png' is the name of several images of array; .* a name of its own"):
        listed_rows(alike, ["0.png"])


TITLES = ("a/0.png", "a/1.png", "b/0.png", "b/own.png")


def test_unreadable_images_are_not_counted(tmp_path, encoder, pictures):
    from PIL import Image

    for i, (image, label) in enumerate(zip(*pictures, strict=True)):
        path = tmp_path / str(label) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "0" / "bad.png").write_bytes(b"no picture")
    said = []
    options = {"protocol": "finetune", "epochs": 1, "learning_rates": (0.1,), "say": said.append}
    result = nnclr.evaluate(encoder, str(tmp_path), pictures_of(pictures), **options)
    assert result.n_train == 120
    assert any("1 of 121 images" in line for line in said)


def test_dropout_of_the_network_comes_from_the_seed(pictures):
    """Twice the same, whatever was drawn before; and the caller's numbers are left alone."""
    source = array_source(*pictures)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.Dropout(0.5), nn.Linear(32, 8))
    found = []
    for before in (1, 2):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        found.append(train_classifier(task_of(Encoder(network, 16)), source, 4, 0.1, 2).embed(source))
        assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(*found)
    other = train_classifier(task_of(Encoder(network, 16), seed=1), source, 4, 0.1, 2).embed(source)
    assert not np.array_equal(found[0], other)


@pytest.mark.parametrize("protocol", ["finetune", "knn", "linear"])
def test_unreadable_test_images_are_told_before_training(tmp_path, pictures, encoder, protocol, monkeypatch):
    for label in range(4):
        (tmp_path / str(label)).mkdir()
        (tmp_path / str(label) / "bad.png").write_bytes(b"no picture")
    monkeypatch.setattr(module, "train_classifier", None)
    options = {"epochs": 1} if protocol != "knn" else {}
    with pytest.raises(DataError, match=r"none of the 4 images of .* can be read; the first is 0/bad\.png \(not_an"):
        nnclr.evaluate(encoder, pictures_of(pictures), str(tmp_path), protocol=protocol, **options)


def pictures_of(pictures):
    return array_source(*pictures, name="test", class_names=("0", "1", "2", "3"))
