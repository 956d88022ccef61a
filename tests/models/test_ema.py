"""Averaged weights against float64 NumPy; their buffers are their own."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nnclr.models.ema import average_of, averaged_features, momentum_at, update_average


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def changed(module):
    """The module with other weights and other statistics."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape))
    module(3 + 2 * torch.randn(40, 5))
    return module


def snapshot(named):
    return {name: value.detach().double().numpy().copy() for name, value in named}


def test_an_average_starts_as_a_copy_that_takes_no_gradient():
    module = network()
    average = average_of(module)
    for one, two in zip(module.state_dict().values(), average.state_dict().values(), strict=True):
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()
    before = snapshot(average.state_dict().items())
    changed(module)
    for name, value in snapshot(average.state_dict().items()).items():
        np.testing.assert_array_equal(value, before[name])
        assert not np.array_equal(value, module.state_dict()[name].numpy())  # control: each one of them changed
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert type(average) is type(module)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.75, 0.996, 1.0])
def test_parameters_are_averaged_and_nothing_else(momentum):
    module = network()
    average = changed(average_of(module))
    changed(module)
    old, new = (snapshot(of.named_parameters()) for of in (average, module))
    statistics, others = (snapshot(of.named_buffers()) for of in (average, module))
    update_average(average, module, momentum)
    for name, value in snapshot(average.named_parameters()).items():
        np.testing.assert_allclose(value, momentum * old[name] + (1 - momentum) * new[name], rtol=1e-6, atol=1e-6)
        assert momentum not in (0.0, 1.0) or np.array_equal(value, (new, old)[int(momentum)][name])
    for name, value in snapshot(module.named_parameters()).items():
        np.testing.assert_array_equal(value, new[name])
    assert set(statistics) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, value in snapshot(average.named_buffers()).items():
        np.testing.assert_array_equal(value, statistics[name])
    assert not np.allclose(statistics["1.running_mean"], others["1.running_mean"], atol=0.1)  # control


def test_averages_whose_result_is_a_float32_are_exact():
    module, average = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    module.weight.data = torch.tensor([[8.0, -4.0], [0.0, 1.0]])
    average.weight.data = torch.tensor([[4.0, 4.0], [-16.0, 1.0]])
    update_average(average, module, 0.75)
    assert average.weight.tolist() == [[5.0, 2.0], [-12.0, 1.0]]
    update_average(nn.ReLU(), nn.ReLU(), 0.5)  # nothing to average


def test_features_of_the_large_views_with_statistics_of_their_own():
    average = average_of(network())
    views = [torch.randn(16, 5, requires_grad=True) for _ in range(4)]
    made = averaged_features(average, views)
    assert len(made) == 2
    assert not any(features.requires_grad for features in made)
    assert average[1].num_batches_tracked == 2
    hidden = average[0](views[1])
    expected = average[3](((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()).relu())
    torch.testing.assert_close(made[1], expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_momentum_rises_along_half_a_cosine():
    for step in range(0, 1200, 37):
        angle = math.pi * min(step, 1000) / 1000
        expected = 1 - 0.004 * (math.cos(angle) + 1) / 2  # BYOL, section 3.2, with tau_base = 0.996
        assert momentum_at(step, base=0.996, to_one=True, total_steps=1000) == pytest.approx(expected, abs=1e-12)
        assert momentum_at(step, base=0.996, to_one=False, total_steps=1000) == 0.996
