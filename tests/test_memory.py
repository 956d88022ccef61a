"""What a step needs of the memory, against counting by hand, and what is said where it is not there."""

import os
import warnings

import numpy as np
import pytest
import torch

from nnclr import memory, pretrain
from nnclr.checkpoint import load_latest
from nnclr.models.ema import average_of
from nnclr.objectives import BYOL, NNCLR, MoCoV2, SimCLR
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
    assert memory.measure(state_of(objective()), [SIZE, SIZE], IMAGES).flops == 2 * a_view


def test_fixed_memory_is_that_counted_by_hand():
    """Weights, gradients and two moments of what is trained; averages, counters and batch norms once."""
    convolution = 3 * 9 * WIDTH + WIDTH
    norms = 2 * HIDDEN + DIM  # channels of a projector's three batch norms
    projector = PROJECTOR // 2 + 2 * norms
    predictor = PREDICTOR // 2 + DIM + 2 * HIDDEN
    buffers = {"projector": 4 * 2 * norms + 3 * 8, "predictor": 4 * 2 * HIDDEN + 8}
    trained = 16 * (convolution + projector + predictor) + sum(buffers.values())
    averages = 4 * (convolution + projector) + buffers["projector"]
    assert memory.fixed_memory(state_of(BYOL(WIDTH, DIM, HIDDEN, HIDDEN))) == trained + averages


def test_widths_and_memory_are_those_counted_by_hand(state):
    _, activations, recomputed, width, dim = memory.measure(state, [SIZE, SIZE], IMAGES)
    assert recomputed is None
    assert (width, dim) == (WIDTH, DIM)
    pixels = 2 * 4 * (3 + WIDTH) * SIZE**2  # images and the map behind the ReLU, float32, two views
    assert pixels < activations < 1.6 * pixels


def test_what_exists_by_now_is_counted_with_the_moments_after_a_step():
    state = state_of(SimCLR(WIDTH, DIM, HIDDEN))
    state.optimizer = torch.optim.Adam(state.backbone.parameters())
    before = memory.held_memory(state)
    assert before == sum(t.nbytes for m in (state.backbone, state.objective) for t in m.state_dict().values())
    state.backbone(torch.rand(2, 3, SIZE, SIZE)).sum().backward()
    state.optimizer.step()
    weights = list(state.backbone.parameters())
    assert memory.held_memory(state) == before + sum(2 * w.nbytes + 4 for w in weights)  # and a count of steps each


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
    found, a_map = memory.measure(state, [SIZE, SIZE], IMAGES), 4 * WIDTH * SIZE**2
    # Two views of three blocks with two maps each; those of one are held at a time. Inputs are kept either way.
    assert found.activations - found.recomputed == pytest.approx((2 * 3 - 1) * 2 * a_map)
    assert not any(vars(block)["_forward_hooks"] for block in state.backbone.modules())


def test_measuring_does_not_change_the_state():
    state = state_of(BYOL(WIDTH, DIM, HIDDEN, HIDDEN))
    state.average.append(torch.nn.BatchNorm1d(WIDTH))
    before = state.tensors()
    memory.measure(state, [SIZE, SIZE])
    assert all(torch.equal(before[name], value) for name, value in state.tensors().items() if name != "rng.cpu")
    assert all(p.grad is None for p in (*state.backbone.parameters(), *state.objective.parameters()))


def test_free_memory_counts_what_the_kernel_would_give_back(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    free = memory.free_memory(torch.device("cpu"))  # elsewhere: pages that nothing uses
    assert 0 < free < 2**50
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 85})  # macOS
    assert memory.free_memory(torch.device("cpu")) > free
    monkeypatch.delattr(os, "sysconf_names")
    assert memory.free_memory(torch.device("cpu")) == float("inf")
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    meminfo.write_text("MemTotal:       9000 kB\nMemFree:           10 kB\nMemAvailable:    5000 kB\n")
    assert memory.free_memory(torch.device("cpu")) == 5000 * 1024
    meminfo.write_text("MemTotal:       9000 kB\n")
    assert memory.free_memory(torch.device("cpu")) > 5000 * 1024


LIMITS = {  # of version 2 and version 1: where they are, and the names of limit, use and cache
    "0::/{}": ("", "memory.max", "memory.current", "inactive_file"),
    "7:cpu,memory:/{}": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize(("line", "names"), LIMITS.items(), ids=["v2", "v1"])
def test_free_memory_counts_the_limits_of_control_groups(tmp_path, monkeypatch, line, names):
    """The tightest of a group and those it is in; in a container only the root may be there, under another path."""
    root, limit, use, cache = names
    for name in ("_MEMINFO", "_GROUPS", "_LIMITS"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    (tmp_path / "_MEMINFO").write_text("MemAvailable:    5000 kB\n")

    def free(group):
        (tmp_path / "_GROUPS").write_text("3:cpuset:/\n" + line.format(group) + "\n")
        return memory.free_memory(torch.device("cpu"))

    def limited(group, most, used, cached):
        folder = tmp_path / "_LIMITS" / root / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / use).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"active_file 7\n{cache} {cached}\n")

    assert free("job/step") == 5000 * 1024
    limited("", 4_000_000, 1_000_000, 200_000)
    assert free("job/step") == free("") == 3_200_000
    limited("job", 3_000_000, 1_000_000, 0)
    assert free("job/step") == 2_000_000
    limited("job/step", "max" if line.startswith("0") else 2**63 - 4096, 900_000, 0)
    assert free("job/step") == 2_000_000
    assert free("") == 3_200_000
    limited("job/step", 800_000, 900_000, 0)
    assert free("job/step") == 0
    limited("job/step", "a lot", 900_000, 0)  # what is not known leaves the other limits
    assert free("job/step") == 2_000_000
    limited("job/step", 1_900_000, 900_000, 7)
    (tmp_path / "_LIMITS" / root / "job/step/memory.stat").unlink()
    assert free("job/step") == 1_000_000
    (tmp_path / "_GROUPS").write_text("nonsense\n\n")
    assert memory.free_memory(torch.device("cpu")) == 5000 * 1024
    (tmp_path / "_GROUPS").unlink()
    assert memory.free_memory(torch.device("cpu")) == 5000 * 1024


SETTINGS = {"backbone": "small-convnet", "image_size": 16, "batch_size": 32, "epochs": 2, "device": "cpu"}
SETTINGS |= {"embedding_dim": 16, "projector_hidden_dim": 32, "predictor_hidden_dim": 32, "precision": "fp32"}


def test_a_run_that_may_not_fit_says_so_and_is_the_same(tmp_path, monkeypatch):
    """The step that is tried for it leaves no trace in the run, neither when it starts nor when it goes on."""
    images = np.random.default_rng(0).integers(0, 255, (70, 16, 16, 3), dtype=np.uint8)

    def run(out, epochs, free):
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pretrain(images, tmp_path / out, **SETTINGS, evaluate_every_epochs=0.0, extend_epochs=epochs - 2)
        return [str(warning.message) for warning in caught if "memory" in str(warning.message)]

    for epochs in (2, 3):
        assert run("roomy", epochs, free=2.0**40) == []
        (said,) = run("tight", epochs, free=2e6)
        assert said.startswith("a step of 32 images may need 0.0 GiB of memory and 0.0 GiB are free: ")
        assert said.endswith("a smaller --batch-size or another --device")
    roomy, tight = (load_latest(tmp_path / out / "checkpoints")[0].tensors for out in ("roomy", "tight"))
    assert roomy.keys() == tight.keys()
    assert all(torch.equal(roomy[name], tight[name]) for name in roomy)


def test_quiet_and_finished_runs_are_not_tried(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (70, 16, 16, 3), dtype=np.uint8)
    tried = []
    monkeypatch.setattr(memory, "shortage", lambda *_: tried.append(1))
    pretrain(images, tmp_path / "run", **SETTINGS, quiet=True)
    pretrain(images, tmp_path / "run", **SETTINGS)
    assert tried == []
    pretrain(images, tmp_path / "run", **SETTINGS, extend_epochs=1)
    assert tried == [1]


class Needy(SimCLR):
    """Wants 16 images at a time, and counts its calls in a buffer that no checkpoint holds."""

    def forward(self, features, targets=None, ids=None):
        self.calls += 1
        if len(features[0]) < 16:
            raise RuntimeError("selected index k out of range")
        return super().forward(features, targets, ids)

    def update(self, out):
        COUNTED.append(self.calls.item())

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.register_buffer("calls", torch.zeros(()), persistent=False)


COUNTED = []


def test_what_cannot_be_tried_is_left_alone(tmp_path, monkeypatch):
    """The step for the estimate must neither end a run that would work nor leave a trace."""
    images = np.random.default_rng(0).integers(0, 255, (70, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e6)
    settings = {name: value for name, value in SETTINGS.items() if name != "predictor_hidden_dim"}
    pretrain(images, tmp_path / "run", objective=Needy, **settings, evaluate_every_epochs=0.0)
    assert COUNTED == [1, 2, 3, 4]


def test_what_a_step_keeps_whatever_the_batch_is_none_of_an_images():
    """MoCo keeps its queue for the backward: 25 MB, which would be 6 MB an image."""
    found = [
        memory.measure(state_of(MoCoV2(WIDTH, DIM, HIDDEN, support_set_size=size)), [SIZE, SIZE])
        for size in (16, 1_000_000)
    ]
    similarities = [4 * rows for rows in (16, 1_000_000)]
    assert found[1].activations - found[0].activations == pytest.approx(similarities[1] - similarities[0], rel=0.01)


def test_a_network_without_weights_is_measured():
    state = state_of(SimCLR(3, DIM, HIDDEN))
    state.backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    assert memory.measure(state, [SIZE, SIZE]).width == 3


def test_a_step_is_tried_only_where_a_greedy_network_would_not_fit(monkeypatch, state):
    """64 images of two views of 8 x 8 pixels are at most 512 MiB of activations, at 64 KiB a pixel.

    Here they are 64 MB, and 0.3 MB of pixels; of 100 MB of weights and the like half exist and are no longer free.
    """

    class config:
        device, batch_size, recompute, grad_cache, fsdp = "cpu", 64, False, None, False

    tried = []
    monkeypatch.setattr(memory, "fixed_memory", lambda state: 100e6)
    monkeypatch.setattr(memory, "held_memory", lambda state: 50e6)
    monkeypatch.setattr(memory, "measure", lambda *_: tried.append(1) or memory.Measured(1.0, 1e6, None, 5, 6))
    for free, trials, fits in ((710e6, 0, True), (700e6, 1, True), (133e6, 2, True), (132e6, 3, False)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert (memory.shortage(config, state, [SIZE, SIZE]) is None) == fits
        assert len(tried) == trials
    config.device = "cuda"  # whose allocator says what is missing
    assert memory.shortage(config, state, [SIZE, SIZE]) is None
