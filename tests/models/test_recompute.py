import copy

import pytest
import torch
from torch import nn

from nnclr.errors import InputError
from nnclr.models.recompute import InBlocks, InParts, check_recompute, in_little_memory
from tests.objectives.test_methods import METHODS, linear_heads

N, WIDTH = 12, 6


def backbone(norm=False, dropout=0.0):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, WIDTH, 3, 2),
        nn.BatchNorm2d(WIDTH) if norm else nn.Identity(),
        nn.GELU(),
        nn.Dropout(dropout),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def step(network, wrapped, objective=None):
    """Gradients of the network, and the features, of a loss over the whole batch."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(N, 3, 9, 9, generator=generator) for _ in range(2)]
    torch.manual_seed(2)
    features = [wrapped(view) for view in views]
    if objective is None:
        z = [nn.functional.normalize(f, dim=1) for f in features]
        loss = nn.functional.cross_entropy(z[0] @ z[1].T / 0.1, torch.arange(N))
    else:
        rows = features, [f.detach().flip(0) for f in features], torch.arange(N)
        with torch.no_grad():
            objective.update(objective(*rows))  # so that queues are not empty
        loss = objective(*rows).loss
    loss.backward()
    return [p.grad.clone() for p in network.parameters()], [f.detach() for f in features]


def distance(ours, theirs):
    one, two = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("images", [1, 5, 12, 100])
def test_gradient_is_that_of_the_whole_batch(images):
    network = backbone()
    other = copy.deepcopy(network)
    expected, features = step(other, other)
    ours, same = step(network, InParts(network, images))
    assert distance(ours, expected) < 1e-6
    torch.testing.assert_close(same, features)


@pytest.mark.parametrize("method", METHODS)
def test_for_every_objective(method):
    network, objective = backbone(), linear_heads(METHODS[method][0]())
    other, other_objective = copy.deepcopy(network), copy.deepcopy(objective)
    expected, _ = step(other, other, other_objective)
    ours, _ = step(network, InParts(network, 5), objective)
    assert distance(ours, expected) < 1e-6
    heads = [[p.grad for p in of.parameters() if p.grad is not None] for of in (objective, other_objective)]
    assert distance(*heads) < 1e-6


def test_dropout_is_replayed():
    """Features and gradient belong together: the gradient is that of the masks that made the features."""
    network = backbone(dropout=0.5)
    ours, features = step(network, InParts(network, 4))
    other = copy.deepcopy(network)
    other.zero_grad()

    def by_hand(view):  # draws the masks in the same order
        return torch.cat([other(part) for part in view.split(4)])

    expected, same = step(other, by_hand)
    torch.testing.assert_close(features, same)
    assert distance(ours, expected) < 1e-6
    torch.manual_seed(3)  # control: other masks
    other.zero_grad()
    (sum(other(torch.randn(N, 3, 9, 9)).square().mean() for _ in range(2))).backward()
    assert distance(ours, [p.grad for p in other.parameters()]) > 1e-2


def test_running_statistics_move_once():
    network = backbone(norm=True)
    other = copy.deepcopy(network)
    step(network, InParts(network, 4))
    step(other, lambda view: torch.cat([other(part) for part in view.split(4)]))
    assert int(network[1].num_batches_tracked) == 6
    torch.testing.assert_close(network[1].running_var, other[1].running_var, rtol=0, atol=0)
    twice = copy.deepcopy(network)  # control: a second computation would move them
    twice(torch.randn(N, 3, 9, 9))
    assert not torch.equal(twice[1].running_var, network[1].running_var)


def kept(wrapped, images):
    """Bytes that autograd saves in the forward, beside the images."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        wrapped(images)
    return sum(sizes.values()) - images.nbytes


def test_memory_is_that_of_a_part():
    images, network = torch.randn(64, 3, 33, 33), backbone()
    assert kept(network, images) > 300_000
    assert kept(InParts(network, 4), images) == 0


class Residual(nn.Module):
    def __init__(self, in_place=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH)
        self.dropout, self.in_place = nn.Dropout(0.3), in_place

    def forward(self, x):
        x = x.relu_() if self.in_place else x.relu()
        return x + self.dropout(self.norm(self.conv(x)))


def residual(**options):
    torch.manual_seed(0)
    stem, blocks = nn.Conv2d(3, WIDTH, 3, 2), nn.Sequential(*(Residual(**options) for _ in range(3)))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("parts", [None, 12])
def test_blocks_are_computed_again_with_the_same_statistics_and_masks(parts):
    """Also inside gradient caching, here in one part: everything is bit for bit that of the plain network."""
    network = residual()
    other = copy.deepcopy(network)
    expected, features = step(other, other)
    ours, same = step(network, in_little_memory(network, parts, recompute=True))
    assert all(torch.equal(one, two) for one, two in zip([*ours, *same], [*expected, *features], strict=True))
    assert all(torch.equal(one, two) for one, two in zip(network.buffers(), other.buffers(), strict=True))
    assert int(network[1][0].norm.num_batches_tracked) == 2  # once a view: the second computation moved nothing
    assert not any("forward" in vars(module) for module in network.modules())  # as it was for everybody else


def test_blocks_keep_their_inputs_alone():
    """One block's activations at a time in the backward; what is kept until then are inputs and the plain rest."""
    images, network = torch.randn(64, 3, 33, 33), residual()
    calls = []
    for block in network[1]:
        block.conv.register_forward_hook(lambda *_: calls.append("forward"))
        block.register_full_backward_hook(lambda *_: calls.append("backward"))
    assert kept(network, images) - kept(InBlocks(network), images) > 3 * 64 * WIDTH * 16 * 16 * 4 * 2
    calls.clear()
    InBlocks(network)(images).sum().backward()
    assert calls == ["forward"] * 3 + ["forward", "backward"] * 3
    calls.clear()
    network(images).sum().backward()
    assert calls == ["forward"] * 3 + ["backward"] * 3  # control
    with torch.no_grad():
        calls.clear()
        InBlocks(network)(images)
    assert calls == ["forward"] * 3


def test_a_trial_leaves_frozen_layers_frozen():
    network = residual().train()
    network[1][0].norm.eval()
    before = [layer.training for layer in network.modules()]
    check_recompute(network, 9)
    assert [layer.training for layer in network.modules()] == before


def test_backbones_whose_blocks_cannot_be_computed_again_are_refused():
    with pytest.raises(InputError, match="recompute=True needs a backbone of repeated blocks, and Sequential has none"):
        InBlocks(backbone())
    with pytest.raises(InputError, match="Residual changes its input in place; use grad_cache"):
        InBlocks(network := residual(in_place=True))(torch.randn(2, 3, 9, 9))
    with pytest.raises(InputError, match="Residual changes its input in place"):  # before anything is written
        check_recompute(network, 9)
    assert network.training
    before = copy.deepcopy(sound := residual()).state_dict()
    check_recompute(sound, 9)
    assert all(torch.equal(value, before[name]) for name, value in sound.state_dict().items())
    assert not any("forward" in vars(module) for module in network.modules())


class Counting(Residual):
    """Moves a buffer of its own that its output depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.mean.lerp_(x.mean(), 0.5)
        return super().forward(x) - self.mean.clone() * x


def test_any_buffer_moves_once_and_a_forward_of_a_blocks_own_stays():
    network = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.Sequential(Counting(), Counting()), nn.Flatten())
    first = network[1][0]
    first.forward = own = lambda x: type(first).forward(first, 2 * x)
    other = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.Sequential(Counting(), Counting()), nn.Flatten())
    other.load_state_dict(network.state_dict())
    second = other[1][0]
    second.forward = lambda x: type(second).forward(second, 2 * x)
    for _ in range(2):
        network.zero_grad()
        other.zero_grad()
        ours, same = step(network, InBlocks(network))
        expected, features = step(other, other)
        assert all(torch.equal(one, two) for one, two in zip([*ours, *same], [*expected, *features], strict=True))
        assert all(torch.equal(one, two) for one, two in zip(network.buffers(), other.buffers(), strict=True))
        assert first.forward is own


def test_nothing_asked_for_is_the_backbone_itself():
    network = residual()
    assert in_little_memory(network, None, recompute=False) is network
    assert isinstance(in_little_memory(network, 4, recompute=False), InParts)
    both = in_little_memory(network, 4, recompute=True)
    assert isinstance(both, InParts)
    assert isinstance(both.backbone, InBlocks)
