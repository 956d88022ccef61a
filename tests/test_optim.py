import numpy as np
import pytest
import timm.optim
import torch

import nnclr
from nnclr.models.backbone import create_backbone
from nnclr.optim import create_optimizer, learning_rate, parameter_groups
from tests import reference


def run(optimizer_class, steps=6, **options):
    """Weights after a few steps on fixed gradients; a matrix, a zero matrix, and a bias without adaptation."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(4, 3)), np.zeros((2, 2)), rng.normal(size=5)]
    gradients = [[rng.normal(size=w.shape) for w in start] for _ in range(steps)]
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in start]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "trust_coefficient": None}]
    optimizer = optimizer_class(groups, **options)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return [p.detach().numpy() for p in parameters], start, gradients


def test_lars_against_numpy():
    ours, weights, gradients = run(nnclr.LARS, lr=0.3, weight_decay=1e-2)
    buffers = [np.zeros_like(w) for w in weights]
    for step in gradients:
        for i, gradient in enumerate(step):
            decay, trust = (1e-2, 1e-3) if i < 2 else (0.0, None)
            weights[i], buffers[i] = reference.lars_step(weights[i], gradient, buffers[i], 0.3, 0.9, decay, trust)
    for one, two in zip(ours, weights, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_timms_lars_is_another_form():
    """It divides by ||g|| + wd ||w||, the paper's by ||g + wd w||; so ours is not redundant."""
    w, g = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[-0.6, 0.8]]).double()
    moved = []
    for optimizer_class, options in ((nnclr.LARS, {}), (timm.optim.Lars, {"trust_coeff": 1e-3})):
        parameter = torch.nn.Parameter(w.clone())
        parameter.grad = g.clone()
        optimizer_class([parameter], lr=1.0, weight_decay=0.1, **options).step()
        moved.append((w - parameter.detach()).norm().item())
    assert moved[0] == pytest.approx(1e-3 * 5, rel=1e-5)  # the paper's step has length eta ||w|| exactly
    assert abs(moved[1] - moved[0]) > 1e-4


def test_parameters_without_gradient_are_left_alone():
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    used.grad = torch.ones(2, 2)
    nnclr.LARS([used, unused], lr=1.0).step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


def test_norms_and_biases_are_excluded():
    model = create_backbone("resnet18", 32)
    decayed, others = parameter_groups([model], 1e-6)
    excluded = {id(p) for p in others["params"]}
    for name, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            is_norm_or_bias = isinstance(module, torch.nn.BatchNorm2d) or kind == "bias"
            assert (id(parameter) in excluded) == is_norm_or_bias, name
    assert decayed["weight_decay"] == 1e-6
    assert (others["weight_decay"], others["trust_coefficient"]) == (0.0, None)


def test_schedule_values():
    def rate(step):
        return learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110)

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == pytest.approx(2.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(1.0)
    assert rate(35) == pytest.approx(1 + np.cos(np.pi / 4))
    assert rate(109) == pytest.approx(2.0 * 0.5 * (1 + np.cos(np.pi * 0.99)))
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=4) == 1.0


def test_optimisers_by_name_have_the_exclusions():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    for name, kind in (("lars", nnclr.LARS), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = create_optimizer(name, [model], weight_decay=0.1, momentum=0.8)
        assert type(optimizer) is kind
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert optimizer.param_groups[0].get("momentum", 0.8) == 0.8
    with pytest.raises(ValueError, match="none of lars, sgd, adamw"):
        create_optimizer("adam", [model], weight_decay=0.1, momentum=0.8)
    with pytest.raises(ValueError, match="momentum=1"):
        nnclr.LARS(model.parameters(), lr=0.1, momentum=1)
