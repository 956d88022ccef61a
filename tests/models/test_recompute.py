import copy

import pytest
import torch
from torch import nn

from nnclr.models.recompute import InParts, in_parts
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


def test_memory_is_that_of_a_part():
    def kept(wrapped):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            wrapped(images)
        return sum(sizes.values()) - images.nbytes

    images, network = torch.randn(64, 3, 33, 33), backbone()
    assert kept(network) > 300_000
    assert kept(InParts(network, 4)) == 0


def test_none_is_the_backbone_itself():
    network = backbone()
    assert in_parts(network, None) is network
    assert isinstance(in_parts(network, 4), InParts)
