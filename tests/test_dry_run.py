"""What a dry run says, against counting by hand, and that it leaves nothing behind."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nnclr import cli, dry_run, neighbour_sheet, training
from nnclr.models.ema import average_of
from nnclr.objectives import BYOL, NNCLR, SimCLR
from nnclr.train_state import TrainState

SIZE, WIDTH, DIM, HIDDEN, SUPPORT, IMAGES = 8, 5, 6, 7, 11, 4

# Multiply-adds times 2 of one image.
CONVOLUTION = 2 * 3 * 9 * WIDTH * SIZE**2
PROJECTOR = 2 * (WIDTH * HIDDEN + HIDDEN * HIDDEN + HIDDEN * DIM)
PREDICTOR = 2 * (DIM * HIDDEN + HIDDEN * DIM)
LOOK_UP = 2 * DIM * 32 * 32 // (2 * IMAGES)  # both views at once; so small a product is filled up to 32 x 32
ROW = 2 * DIM * IMAGES  # a row of a similarity matrix of the batch


def state_of(objective):
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, WIDTH, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    average = None if objective.momentum is None else average_of(backbone)
    return TrainState(backbone, objective, torch.optim.SGD(backbone.parameters(), lr=0.1), average)


@pytest.fixture
def state():
    return state_of(SimCLR(WIDTH, DIM, HIDDEN))


def nnclr(ema_momentum):
    return NNCLR(WIDTH, DIM, HIDDEN, HIDDEN, SUPPORT, ema_momentum=ema_momentum)


# The backward pass of a product is two products; the first layer's needs only one, since images take no gradient.
# SimCLR contrasts 4 blocks of the batch with gradient on both sides; NNCLR's anchors take none, so 2 products each.
@pytest.mark.parametrize(
    ("objective", "a_view"),
    [
        (lambda: SimCLR(WIDTH, DIM, HIDDEN), 2 * CONVOLUTION + 3 * PROJECTOR + 2 * 3 * ROW),
        (lambda: nnclr(None), 2 * CONVOLUTION + 3 * (PROJECTOR + PREDICTOR) + 2 * ROW + LOOK_UP),
        (
            lambda: nnclr(0.9),
            2 * CONVOLUTION + 3 * (PROJECTOR + PREDICTOR) + 2 * ROW + LOOK_UP + CONVOLUTION + PROJECTOR,
        ),
        (
            lambda: BYOL(WIDTH, DIM, HIDDEN, HIDDEN),
            2 * CONVOLUTION + 3 * (PROJECTOR + PREDICTOR) + CONVOLUTION + PROJECTOR,
        ),
    ],
    ids=["simclr", "nnclr", "nnclr-ema", "byol"],
)
def test_flops_are_those_counted_by_hand(objective, a_view):
    assert dry_run.measure(state_of(objective()), [SIZE, SIZE], IMAGES).flops == 2 * a_view


def test_fixed_memory_is_that_counted_by_hand():
    """Weights, gradients and two moments of what is trained; averages, counters and batch norms once."""
    convolution = 3 * 9 * WIDTH + WIDTH
    norms = 2 * HIDDEN + DIM  # channels of a projector's three batch norms
    projector = PROJECTOR // 2 + 2 * norms
    predictor = PREDICTOR // 2 + DIM + 2 * HIDDEN
    buffers = {"projector": 4 * 2 * norms + 3 * 8, "predictor": 4 * 2 * HIDDEN + 8}
    trained = 16 * (convolution + projector + predictor) + sum(buffers.values())
    averages = 4 * (convolution + projector) + buffers["projector"]
    assert dry_run.fixed_memory(state_of(BYOL(WIDTH, DIM, HIDDEN, HIDDEN))) == trained + averages


def test_widths_and_memory_are_those_counted_by_hand(state):
    _, activations, recomputed, width, dim = dry_run.measure(state, [SIZE, SIZE], IMAGES)
    assert recomputed is None
    assert (width, dim) == (WIDTH, DIM)
    pixels = 2 * 4 * (3 + WIDTH) * SIZE**2  # images and the map behind the ReLU, float32, two views
    assert pixels < activations < 1.6 * pixels


class Block(torch.nn.Module):
    """Keeps its input and two maps of the same size behind it."""

    def forward(self, x):
        return x + (x * self.weight).exp().sin().cos()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))


def test_memory_of_recomputed_blocks_is_that_counted_by_hand():
    state = state_of(SimCLR(WIDTH, DIM, HIDDEN))
    state.backbone.insert(2, torch.nn.Sequential(*(Block() for _ in range(3))))
    found, a_map = dry_run.measure(state, [SIZE, SIZE], IMAGES), 4 * WIDTH * SIZE**2
    # Two views of three blocks with two maps each; those of one are held at a time. Inputs are kept either way.
    assert found.activations - found.recomputed == pytest.approx((2 * 3 - 1) * 2 * a_map)
    assert not any(vars(block)["_forward_hooks"] for block in state.backbone.modules())


def test_measuring_does_not_change_the_state():
    state = state_of(BYOL(WIDTH, DIM, HIDDEN, HIDDEN))
    state.average.append(torch.nn.BatchNorm1d(WIDTH))
    before = state.tensors()
    dry_run.measure(state, [SIZE, SIZE])
    assert all(torch.equal(before[name], value) for name, value in state.tensors().items() if name != "rng.cpu")
    assert all(p.grad is None for p in (*state.backbone.parameters(), *state.objective.parameters()))


FLAGS = "--backbone small-convnet --image-size 16 --device cpu --precision fp32 --dry-run".split()
FLAGS += "--embedding-dim 16 --projector-hidden-dim 32 --predictor-hidden-dim 32".split()


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(70):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(tmp_path / "photos")


@pytest.fixture
def configs(monkeypatch):
    """Those with which the loop is called."""
    seen, train = [], training.train

    def recorded(config, *rest, **options):
        seen.append(config)
        return train(config, *rest, **options)

    monkeypatch.setattr(training, "train", recorded)
    return seen


@pytest.mark.parametrize("extra", [[], ["--augmentation", "multi-crop"], ["--objective", "moco-v3"]])
def test_a_dry_run_tries_two_steps_and_leaves_nothing(photos, tmp_path, monkeypatch, capsys, extra):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS, *extra]) == 0
    said = capsys.readouterr().out
    assert "70 images, 2 steps an epoch, 200 steps" in said
    assert re.search(r"two steps losses \d+\.\d+ and \d+\.\d+, \d+ images/s\n", said)
    assert ("+ (32, 3, 7, 7)" in said) == ("multi-crop" in extra)
    assert list(Path().iterdir()) == []


def test_the_two_steps_neither_evaluate_nor_draw(photos, monkeypatch):
    def refuse(*_):
        raise AssertionError("this takes time that is none of the step's")

    monkeypatch.setattr(neighbour_sheet, "draw_neighbours", refuse)
    monkeypatch.setattr(training.OnlineKNN, "measure", refuse)
    assert cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS]) == 0
    with pytest.raises(AssertionError, match="none of the step's"):  # an ordinary run does
        training.pretrain(photos, Path(photos).parent / "run", backbone="small-convnet", image_size=16, batch_size=32)


def test_the_description_comes_before_the_steps(photos, monkeypatch, capsys):
    """A step that does not fit after all ends in one sentence; another error is not hidden."""
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ):

        def fail(*_, error=error, **__):
            assert "GiB free" in capsys.readouterr().out
            raise error

        monkeypatch.setattr(training, "train", fail)
        assert cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS]) == 0
        assert re.fullmatch(r"two steps failed: memory ran out at batch 32; .*\n", capsys.readouterr().out)
    error = RuntimeError("shapes differ")
    monkeypatch.setattr(training, "train", lambda *_, **__: fail(error=error))
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS])


def test_a_batch_that_cannot_fit_is_tried_smaller(photos, configs, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "measure", lambda state, sizes: (1e6, 1e6, None, 128, 16))
    monkeypatch.setattr(dry_run, "fixed_memory", lambda state: 1e6)
    for free, batch in ((90e6, 70), (36e6, 16), (6e6, 2), (5e6, None)):
        configs.clear()
        monkeypatch.setattr(dry_run, "free_memory", lambda device, free=free: free)
        assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", *FLAGS]) == 0
        assert [config.batch_size for config in configs] == ([] if batch is None else [batch])
        said = capsys.readouterr().out
        assert ("not even 2 images may fit" in said) == (batch is None)
        # 70 images of two views are 0.43 MB of pixels.
        assert ("use --grad-cache 16 for the same loss in less memory, a smaller" in said) == (batch == 16)
        assert ("use --grad-cache 2 for" in said) == (batch == 2)
        if batch in (2, 16):
            assert f"images/s at batch {batch}\n" in said
            assert said.endswith(f"without evaluations; an estimate from batch {batch}\n")
        elif batch == 70:
            assert said.endswith("without evaluations\n")
    configs.clear()  # 8 images, pixels and the rest are 9.4 MB
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 11e6)
    assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", "--grad-cache", "8", *FLAGS]) == 0
    assert [config.batch_size for config in configs] == [70]


def test_recomputing_is_named_where_it_fits(photos, configs, monkeypatch, capsys):
    """70 images of 1 MB do not fit into 40 MB; of 0.4 MB they do, of 0.6 MB they do not."""
    monkeypatch.setattr(dry_run, "fixed_memory", lambda state: 1e6)
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 40e6)
    for each, extra, named in (
        (4e5, [], True),
        (6e5, [], False),
        (4e5, ["--recompute", "--backbone", "resnet18"], None),
    ):
        monkeypatch.setattr(dry_run, "measure", lambda state, sizes, each=each: (1e6, 1e6, each, 128, 16))
        configs.clear()
        flags = [*FLAGS, *extra]
        assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", *flags]) == 0
        said = capsys.readouterr().out
        assert ("use --recompute (0.0 GiB) or --grad-cache 32 for the same loss" in said) == (named is True)
        assert ("may not fit" in said) == (named is not None)
        assert [config.batch_size for config in configs] == [70 if named is None else 16]


def test_a_smaller_batch_is_quick_and_its_rate_is_scaled(photos, monkeypatch, capsys):
    """50 GFLOP/s for a minute are 3e12 operations: two steps of 8 images, where memory holds 32."""
    monkeypatch.setattr(dry_run, "measure", lambda state, sizes: (1.8e11, 1e6, None, 128, 16))
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 68e6)
    monkeypatch.setattr(dry_run, "fixed_memory", lambda state: 1e6)
    monkeypatch.setattr(dry_run, "two_steps", lambda config, *_: ([1.0, 2.0], 3.5 * config.batch_size))
    assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", "--extend-epochs", "4", *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "1 steps an epoch, 14 steps" in said
    assert "losses 1.000 and 2.000, 28 images/s at batch 8" in said
    assert "about 35 s for 14 epochs" in said  # 14 steps of 70 images


def test_a_mistake_in_the_test_data_is_found(photos, tmp_path, capsys):
    assert cli.main(["pretrain", photos, "--test-data", str(tmp_path / "nowhere"), "--batch-size", "32", *FLAGS]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_free_memory_counts_what_the_kernel_would_give_back(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(dry_run, "_MEMINFO", meminfo)
    free = dry_run.free_memory(torch.device("cpu"))  # elsewhere: pages that nothing uses
    assert 0 < free < 2**50
    meminfo.write_text("MemTotal:       9000 kB\nMemFree:           10 kB\nMemAvailable:    5000 kB\n")
    assert dry_run.free_memory(torch.device("cpu")) == 5000 * 1024
    meminfo.write_text("MemTotal:       9000 kB\n")
    assert dry_run.free_memory(torch.device("cpu")) > 5000 * 1024
