"""Whole runs and features on a GPU: they repeat, are resumed bit for bit, and agree with the CPU's."""

import numpy as np
import pytest
import safetensors.torch
import torch

import nnclr
from nnclr.recorder import Recorder
from tests.settings import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = {"device": "cuda", "evaluate_every_epochs": 0, "learning_rate": 0.02}


class Enough(Exception):
    """The run is left here."""


def weights(run):
    return safetensors.torch.load_file(run.path / "checkpoints/step-00000020/tensors.safetensors")


@pytest.mark.parametrize("graphs", ["0", "1"], ids=["kernel by kernel", "as it comes"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_resumed_bit_for_bit(pictures, tmp_path, graphs, precision, monkeypatch):
    """Without a switch that this test sets: the run has to set them."""
    monkeypatch.setenv("NNCLR_CUDA_GRAPHS", graphs)
    settings = TINY | CUDA | {"backbone": "resnet18", "image_size": 32, "precision": precision}
    whole = nnclr.pretrain(pictures, tmp_path / "whole", **settings)
    after_step = Recorder.after_step

    def failing(self, *rest):
        after_step(self, *rest)
        if self.state.step == 13:
            raise Enough

    with monkeypatch.context() as once:
        once.setattr(Recorder, "after_step", failing)
        with pytest.raises(Enough):
            nnclr.pretrain(pictures, tmp_path / "twice", **settings)
    twice = nnclr.pretrain(pictures, tmp_path / "twice", **settings)
    expected, found = weights(whole), weights(twice)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    other = weights(nnclr.pretrain(pictures, tmp_path / "other", **settings | {"seed": 1}))
    assert not torch.equal(other["backbone.conv1.weight"], expected["backbone.conv1.weight"])  # control


def test_losses_are_those_of_the_cpu(pictures, tmp_path):
    settings = TINY | {"evaluate_every_epochs": 0, "learning_rate": 0.02}
    here, there = (
        nnclr.pretrain(pictures, tmp_path / device, **settings | {"device": device}).metrics
        for device in ("cpu", "cuda")
    )
    # TF32 rounds to 2^-11 in convolutions, and that grows from step to step.
    assert [line["loss"] for line in there[:3]] == pytest.approx([line["loss"] for line in here[:3]], rel=0.01)


def test_features_are_those_of_the_cpu():
    """In TF32, the default of convolutions on CUDA, they would differ in the fourth digit."""
    encoder = nnclr.open_encoder("random:resnet18?size=64")
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    here = encoder.embed(images)
    encoder.module.cuda()
    there = encoder.embed(images)
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4 * np.abs(here).max())
    assert np.array_equal(there, encoder.embed(images))
