"""What a dry run says, against counting by hand, and that it leaves nothing behind."""

import re

import pytest
import torch

from nnclr import cli, dry_run
from nnclr.checkpoint import TrainState
from nnclr.objectives import SimCLR

SIZE, WIDTH, DIM, HIDDEN = 8, 5, 6, 7


@pytest.fixture
def state():
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, WIDTH, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    objective = SimCLR(WIDTH, DIM, HIDDEN)
    return TrainState(backbone, objective, torch.optim.SGD(backbone.parameters(), lr=0.1))


def test_flops_and_widths_are_those_counted_by_hand(state):
    images = 4
    convolution = 2 * 3 * 9 * WIDTH * SIZE**2
    heads = 2 * (WIDTH * HIDDEN + HIDDEN * HIDDEN + HIDDEN * DIM)
    loss = 4 * 2 * images * DIM  # each view against itself and the other view, for one image's row
    flops, activations, width, dim = dry_run.measure(state, [SIZE, SIZE], images)
    assert flops == 3 * (2 * (convolution + heads) + loss)
    assert (width, dim) == (WIDTH, DIM)
    pixels = 2 * 4 * (3 + WIDTH) * SIZE**2  # images and the map behind the ReLU, float32, two views
    assert pixels < activations < 1.6 * pixels


def test_measuring_does_not_change_the_state(state):
    before = {name: value.clone() for name, value in state.objective.state_dict().items()}
    dry_run.measure(state, [SIZE, SIZE])
    assert all(torch.equal(before[name], value) for name, value in state.objective.state_dict().items())


FLAGS = "--backbone small-convnet --image-size 16 --batch-size 64 --device cpu --precision fp32 --dry-run".split()


@pytest.mark.parametrize("extra", [[], ["--augmentation", "multi-crop"], ["--objective", "moco-v3"]])
def test_a_dry_run_tries_two_steps_and_leaves_nothing(tmp_path, monkeypatch, capsys, extra):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "demo-photos", *FLAGS, *extra]) == 0
    said = capsys.readouterr().out
    assert "5100 images, 79 steps an epoch, 7900 steps" in said
    assert re.search(r"two steps losses \d+\.\d+ and \d+\.\d+, \d+ images/s", said)
    assert ("+ (64, 3, 7, 7)" in said) == ("multi-crop" in extra)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_fit_is_not_tried(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 1e6)
    assert cli.main(["pretrain", "demo-photos", *FLAGS]) == 0
    assert "two steps were not tried: they may not fit" in capsys.readouterr().out
