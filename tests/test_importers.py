import argparse
import os
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from nnclr.errors import InputError
from nnclr.importers import import_checkpoint
from nnclr.pretrained import open_encoder


@pytest.fixture(scope="module")
def network():
    """A torchvision ResNet whose statistics are not the initial ones, and its features of two images."""
    torch.manual_seed(0)
    module = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        backbone = nn.Sequential(*list(module.children())[:-1], nn.Flatten()).eval()
        return module.state_dict(), images, backbone(images)


def renamed(state, prefix, drop=("fc.",)):
    return {prefix + key: value for key, value in state.items() if not key.startswith(drop)}


def sequential(state, prefix):
    """The keys of nn.Sequential(*list(resnet.children())[:-1])."""
    number = {name: str(i) for i, (name, _) in enumerate(torchvision.models.resnet18().named_children())}
    return {
        prefix + ".".join([number[key.split(".")[0]], *key.split(".")[1:]]): value
        for key, value in state.items()
        if not key.startswith("fc.")
    }


def noise(state):
    """A momentum copy: the right keys and shapes, and other values."""
    return {key: torch.randn(value.shape) for key, value in state.items()}


HEAD = {"0.weight": torch.ones(4, 512), "0.bias": torch.zeros(4)}
LAYOUTS = {
    "plain": (lambda s: s, "plain torchvision or timm", "fc (2)"),
    "solo-learn": (
        lambda s: {
            "epoch": 3,
            "pytorch-lightning_version": "2.0",
            "state_dict": renamed(s, "backbone.")
            | {f"momentum_backbone.{k}": v for k, v in noise(s).items()}
            | {f"projector.{k}": v for k, v in HEAD.items()}
            | {"classifier.weight": torch.ones(10, 512), "queue": torch.randn(8, 4), "queue_ptr": torch.zeros(1)},
            "optimizer_states": [{"state": {}, "param_groups": []}],
        },
        "solo-learn or lightly in state_dict",
        "projector (2)",
    ),
    "solo-learn's older form": (
        lambda s: {"state_dict": renamed(s, "encoder.") | renamed(noise(s), "momentum_encoder.")},
        "solo-learn's older form",
        "momentum_encoder",
    ),
    "lightly": (
        lambda s: {
            "state_dict": sequential(s, "backbone.")
            | sequential(noise(s), "backbone_momentum.")
            | {f"projection_head.layers.{k}": v for k, v in HEAD.items()}
        },
        "lightly's nn.Sequential in state_dict",
        "projection_head",
    ),
    "MoCo v2": (
        lambda s: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": renamed(noise(s), "module.encoder_k.")
            | renamed(s, "module.encoder_q.")
            | {f"module.encoder_q.fc.{k}": v for k, v in HEAD.items()}
            | {"module.queue": torch.randn(4, 8)},
            "optimizer": {"state": {}},
        },
        "MoCo v1 or v2",
        "queue (1)",
    ),
    "MoCo v3": (
        lambda s: {
            "state_dict": renamed(s, "module.base_encoder.")
            | renamed(noise(s), "module.momentum_encoder.")
            | {f"module.predictor.{k}": v for k, v in HEAD.items()}
        },
        "MoCo v3",
        "predictor",
    ),
    "DINO": (
        lambda s: {
            "student": renamed(noise(s), "module.backbone."),
            "teacher": renamed(s, "backbone.") | {f"head.mlp.{k}": v for k, v in HEAD.items()},
            "args": argparse.Namespace(arch="resnet18"),
        },
        "in teacher",
        "head.mlp (2)",
    ),
    "model": (lambda s: {"model": renamed(s, "module."), "loss": torch.zeros(())}, "DataParallel in model", None),
}


@pytest.mark.parametrize(
    ("layout", "backbone"),
    [(layout, "resnet18") for layout in LAYOUTS]
    + [(layout, f"{library}/resnet18") for layout in ("plain", "lightly") for library in ("timm", "torchvision")],
)
def test_layouts_give_the_features_of_the_network(tmp_path, network, layout, backbone):
    state, images, expected = network
    make, recognised, left_out = LAYOUTS[layout]
    path, said = tmp_path / "checkpoint.pth", []
    torch.save(make(state), path)
    encoder = import_checkpoint(path, backbone, 80, say=said.append)
    with torch.no_grad():
        assert torch.equal(encoder.module(images), expected)
    assert recognised in said[0]
    assert "120 of 120 keys" in said[0]
    assert left_out is None or left_out in said[1], said
    assert "ImageNet's mean and std are assumed" in said[-1]
    assert encoder.provenance == {"backbone": backbone, "checkpoint": "checkpoint.pth"} | {
        "layout": encoder.provenance["layout"]
    }


def test_safetensors_old_pickles_and_absent_counters(tmp_path, network):
    state, images, expected = network
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=False)
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pth.tar", "w.pt"):
        encoder = import_checkpoint(tmp_path / name, "resnet18", 80, say=lambda line: None)
        with torch.no_grad():
            assert torch.equal(encoder.module(images), expected), name


def test_small_stem_and_vision_transformer(tmp_path):
    small = torchvision.models.resnet18()
    small.conv1, small.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    torch.save({"state_dict": renamed(small.state_dict(), "backbone.")}, tmp_path / "cifar.ckpt")
    encoder = import_checkpoint(tmp_path / "cifar.ckpt", "resnet18", 32, say=lambda line: None)
    images = torch.randn(2, 3, 32, 32)
    small.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(encoder.module(images), small.eval()(images))
    with pytest.raises(
        InputError, match=r"conv1.weight \(expected \[64, 3, 7, 7\], found \[64, 3, 3, 3\]\).*at most 64"
    ):
        import_checkpoint(tmp_path / "cifar.ckpt", "resnet18", 224)
    vit = timm.create_model("test_vit", img_size=96).eval()
    torch.save({"state_dict": {f"module.base_encoder.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "v.pth")
    encoder = import_checkpoint(tmp_path / "v.pth", "test_vit", 96, say=lambda line: None)
    vit.reset_classifier(0)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(encoder.module(images), vit(images))
    with pytest.raises(InputError, match=r"pos_embed .*trained at another image size"):
        import_checkpoint(tmp_path / "v.pth", "test_vit", 160)


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: without(s, "conv1.weight", "bn1.bias"), "2 missing: conv1.weight, bn1.bias; partial=1"),
        (lambda s: s | {"layer5.0.weight": torch.ones(2)}, "1 unexpected: layer5.0.weight;"),
        (
            lambda s: s | {"bn1.bias": torch.ones(3)},
            r"1 of another shape: bn1.bias \(expected \[64\], found \[3\]\)",
        ),
        (lambda s: s | {"bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias holds values that are not finite"),
        (lambda s: timm.create_model("test_vit").state_dict(), r"122 missing|120 missing|\d+ missing: conv1.weight"),
        (lambda s: {"optimizer": {"state": {}}, "epoch": 3}, "holds no weights"),
        (lambda s: [1, 2], "holds a list, not a dictionary"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "another network", "no weights", "list"],
)
def test_what_does_not_fit_is_refused_with_names(tmp_path, network, spoil, words):
    torch.save(spoil(dict(network[0])), tmp_path / "c.pth")
    with pytest.raises(InputError, match=words):
        import_checkpoint(tmp_path / "c.pth", "resnet18", 80)


def test_partial_says_what_stays_random(tmp_path, network):
    state, said = dict(network[0]), []
    state = without(state, "layer4.1.bn2.bias") | {"bn1.bias": torch.ones(3), "odd.weight": torch.ones(1)}
    torch.save(state, tmp_path / "c.pth")
    encoder = import_checkpoint(tmp_path / "c.pth", "resnet18", 80, partial=True, say=said.append)
    assert any("these stay random: layer4.1.bn2.bias, bn1.bias" in line for line in said)
    assert any("1 unexpected: odd.weight" in line for line in said)
    assert torch.equal(encoder.module.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    torch.save({"odd.weight": torch.ones(1)}, tmp_path / "none.pth")
    with pytest.raises(InputError, match="holds nothing that fits"):
        import_checkpoint(tmp_path / "none.pth", "resnet18", 80, partial=True, say=said.append)


def test_what_stays_random_is_the_same_at_every_opening(tmp_path, network):
    torch.save(without(dict(network[0]), "layer4.1.conv2.weight"), tmp_path / "c.pth")
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(import_checkpoint(tmp_path / "c.pth", "resnet18", 80, partial=True, say=str).fingerprint)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(seed))  # the caller's draws
    assert made[0] == made[1]


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class OwnNetwork(nn.Linear):
    pass


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["top", "state_dict", "beside the weights", "nested file"])
@pytest.mark.parametrize("kind", ["os.system", "eval"])
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, network, kind, where, zipped):
    canary = tmp_path / "canary"
    if kind == "eval":
        payload = Payload(eval, f"open({str(canary)!r}, 'w').close()")
    else:
        payload = Payload(os.system, f"touch {canary}")
    inner = tmp_path / "inner.pt"
    torch.save(payload, inner)
    content = {
        "top": payload,
        "state_dict": {"state_dict": payload},
        "beside the weights": dict(network[0]) | {"hyper_parameters": payload},
        "nested file": {"state_dict": Payload(torch.load, str(inner))},
    }[where]
    path = tmp_path / "c.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"needs code to be read, \w+(\.\w+)*, and was refused"):
        import_checkpoint(path, "resnet18", 80)
    assert not canary.exists()
    if kind == "os.system" and where == "top":  # control: the payload does run where code is let in
        torch.load(path, weights_only=False)
        assert canary.exists()


def test_whole_modules_and_other_files_are_refused_in_a_sentence(tmp_path, network):
    torch.save(OwnNetwork(2, 2), tmp_path / "module.pth")
    with pytest.raises(InputError, match=r"needs code to be read, tests.test_importers.OwnNetwork"):
        import_checkpoint(tmp_path / "module.pth", "resnet18", 80)
    torch.save(network[0], tmp_path / "good.pth")
    whole = (tmp_path / "good.pth").read_bytes()
    for name, content in (
        ("empty.pth", b""),
        ("cut.pth", whole[: len(whole) // 2]),
        ("text.pth", b"no weights at all"),
        ("renamed.safetensors", whole),
        ("tar.pth", b"inner.txt" + b"\0" * 1000),
        ("header.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            InputError, match=f"{re.escape(name)} (is no checkpoint|was not written by torch.save)"
        ) as e:
            import_checkpoint(tmp_path / name, "resnet18", 80)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="there is no file"):
        import_checkpoint(tmp_path / "absent.pth", "resnet18", 80)
    with pytest.raises(InputError, match="no backbone is called"):
        import_checkpoint(tmp_path / "good.pth", "os.system", 80)
    endless = {"odd": torch.ones(1)}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    with pytest.raises(InputError, match="missing"):
        import_checkpoint(tmp_path / "endless.pth", "resnet18", 80)


def test_checkpoint_by_name(tmp_path, network, capsys):
    state, images, expected = network
    torch.save({"state_dict": renamed(state, "backbone.")}, tmp_path / "c.ckpt")
    spec = f"checkpoint:{tmp_path / 'c.ckpt'}?backbone=timm/resnet18&size=80"
    encoder = open_encoder(spec)
    with torch.no_grad():
        assert torch.equal(encoder.module(images), expected)
    assert (encoder.name, encoder.image_size) == (spec, 80)
    captured = capsys.readouterr()
    assert captured.out == ""  # where a JSON record may go
    assert "solo-learn" in captured.err
    torch.save(without(dict(state), "conv1.weight"), tmp_path / "part.pth")
    assert open_encoder(f"checkpoint:{tmp_path / 'part.pth'}?backbone=resnet18&size=80&partial=1").image_size == 80
    for query, words in (
        ("?backbone=resnet18&size=80", "1 missing"),
        ("?size=80", "backbone="),
        ("?backbone=resnet18&size=big", "whole number"),
        ("?backbone=resnet18&partial=yes", "whole number"),
        ("?backbone=resnet18&colour=1", "'colour' after the"),
    ):
        with pytest.raises(InputError, match=words):
            open_encoder(f"checkpoint:{tmp_path / 'part.pth'}{query}")
