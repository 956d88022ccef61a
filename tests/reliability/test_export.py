"""Exports and embeddings that are interrupted anywhere, and checkpoints that came with their channels exchanged."""

import os
import random

import pytest
import torch

from nnclr import embed
from nnclr import export as export_module
from nnclr.embeddings import open_embeddings
from nnclr.encoder import Encoder
from nnclr.errors import InputError, StorageError
from nnclr.export import export
from nnclr.models.backbone import create_backbone
from nnclr.pretrained import open_encoder
from tests.test_embed import Die, files, go, kill, photos  # noqa: F401 - a fixture

POINTS = [(torch, "save"), (export_module, "_difference"), (os, "fsync"), (os, "rename")]
ERRORS = [OSError(28, "No space left on device"), OSError(5, "Input/output error"), KeyboardInterrupt(), SystemExit(1)]


def test_an_export_that_is_interrupted_leaves_no_half_file(tmp_path, monkeypatch, count):
    backbone = create_backbone("test_resnet", 112).eval()
    encoder = Encoder(backbone, 112, provenance={"backbone": "test_resnet"})
    tried, left = 0, []
    for owner, name in POINTS:
        for error in ERRORS:
            for behind in (False, True):
                real = getattr(owner, name)

                def interrupted(*arguments, real=real, error=error, behind=behind, **keywords):
                    if behind:
                        real(*arguments, **keywords)
                    raise error

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, interrupted)
                    kind = StorageError if isinstance(error, OSError) else type(error)
                    with pytest.raises(kind):
                        export(encoder, "timm", tmp_path / "w.pth", str)
                tried += 1
                found = os.listdir(tmp_path)
                if (name, behind) == ("rename", True):  # by then it is whole, and has its name
                    assert found == ["w.pth"]
                    assert torch.load(tmp_path / "w.pth", weights_only=True).keys() == backbone.state_dict().keys()
                    (tmp_path / "w.pth").unlink()
                elif found:
                    left.append((name, error, found))
    count("H2", "interrupted exports that left nothing but a whole file", tried - len(left), tried)
    assert left == []
    export(encoder, "timm", tmp_path / "w.pth", str)  # the control: without an error there is one
    assert os.listdir(tmp_path) == ["w.pth"]


def embed_until(folder, name, at):
    """In a child: embed, and be killed at an event."""
    embed._PART_ROWS = 14
    Die(pytest.MonkeyPatch(), at, kill)
    go(open_encoder("random:small-convnet?size=16"), f"{folder}/photos", f"{folder}/{name}")


def test_embeddings_survive_twenty_kills_byte_for_byte(tmp_path, photos, warm, monkeypatch, count):  # noqa: F811
    monkeypatch.setattr(embed, "_PART_ROWS", 14)
    encoder = open_encoder("random:small-convnet?size=16")
    with monkeypatch.context() as patch:
        events = Die(patch)
        go(encoder, photos, tmp_path / "e.parquet")
    reference, alike, parts = files(tmp_path), 0, 0
    for point in random.Random(1).sample(range(events.count), 20):
        (tmp_path / "e.parquet").unlink(missing_ok=True)
        (tmp_path / "e.parquet.skipped.csv").unlink(missing_ok=True)
        assert warm.run("tests.reliability.test_export:embed_until", str(tmp_path), "e.parquet", point) == -9
        parts += len(list((tmp_path / ".e.parquet.parts").glob("[0-9]*.json")))
        go(encoder, photos, tmp_path / "e.parquet")
        open_embeddings(tmp_path / "e.parquet", verify=True)
        alike += files(tmp_path) == reference
    count("H3", "kills after which the same command gave the same bytes", alike, 20)
    assert alike == 20
    assert parts > 20  # the control: the kills fell where something was there to go on with


@pytest.mark.parametrize(("backbone", "size"), [("small-convnet", 32), ("test_resnet", 112), ("timm/test_vit", 96)])
def test_any_other_order_of_channels_is_detected(tmp_path, backbone, size, monkeypatch, count):
    """In the pictures, in mean and std, or in the weights: each of the five other orders of three channels."""
    Encoder(create_backbone(backbone, size).eval(), size, provenance={"backbone": backbone}).save_pretrained(tmp_path)
    Encoder.from_pretrained(tmp_path)  # the control
    real, detected = Encoder.view, 0
    orders = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for order in orders:
        monkeypatch.setattr(Encoder, "view", lambda self, image, order=order: real(self, image)[list(order)].copy())
        with pytest.raises(InputError, match="do not match"):
            Encoder.from_pretrained(tmp_path)
        detected += 1
    count("H5", f"orders of channels that are not those of {backbone}, detected", detected, len(orders))
