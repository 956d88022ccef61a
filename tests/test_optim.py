import copy

import numpy as np
import pytest
import timm.optim
import torch

import nnclr
from nnclr import optim
from nnclr.models.backbone import create_backbone
from nnclr.optim import create_optimizer, guarded_step, learning_rate, parameter_groups
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


@pytest.fixture(params=["one by one", "without the private kernel", "together"])
def path(request, monkeypatch):
    """The ways LARS goes: tensor by tensor as on a CPU, and in multi-tensor operations as on a device."""
    if request.param == "without the private kernel":
        monkeypatch.setattr(optim, "_sgd_of_one", optim._sgd)
    if request.param == "together":
        monkeypatch.setattr(optim, "_move_one_by_one", optim._move_together)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_lars_against_numpy(path, momentum):
    ours, weights, gradients = run(nnclr.LARS, lr=0.3, momentum=momentum, weight_decay=1e-2)
    buffers = [np.zeros_like(w) for w in weights]
    for step in gradients:
        for i, gradient in enumerate(step):
            decay, trust = (1e-2, 1e-3) if i < 2 else (0.0, None)
            weights[i], buffers[i] = reference.lars_step(weights[i], gradient, buffers[i], 0.3, momentum, decay, trust)
    for one, two in zip(ours, weights, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def lars_move(w, g, decay=1e-4):
    """How far one step with lr 1 moves the weights, float64."""
    parameter = torch.nn.Parameter(w.clone())
    parameter.grad = g
    nnclr.LARS([parameter], lr=1.0, weight_decay=decay).step()
    return w.double() - parameter.detach().double()


def test_the_norm_of_a_sum_that_cancels(path):
    """g = -decay * w plus little: three float32 products hold no digit of ||g + decay * w||, as the control shows."""
    decay = 0.5
    w = torch.randn(300, 40)
    g = -decay * w + 1e-4 * torch.randn(300, 40)
    expected = torch.from_numpy(reference.lars_step(w.double().numpy(), g.double().numpy(), 0, 1, 0, decay, 1e-3)[1])
    assert (lars_move(w, g, decay) - expected).norm() < 1e-3 * expected.norm()
    ww, wg, gg = (float(torch.dot(a.flatten(), b.flatten())) for a, b in ((w, w), (w, g), (g, g)))
    exact = (g.double() + decay * w.double()).square().sum().item()
    assert abs(gg + 2 * decay * wg + decay**2 * ww - exact) > exact


@pytest.mark.parametrize("trust", [1e-3, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lars_of_short_floats(monkeypatch, dtype, trust):
    """Beside weights of full length: torch 2.10's kernel moves the momentum of short ones and leaves them alone."""
    seen, move = [], optim._move

    def noted(weights, gradients, buffers, **options):
        seen.extend(tensor.dtype for tensor in (*weights, *gradients, *buffers))
        move(weights, gradients, buffers, **options)

    monkeypatch.setattr(optim, "_move", noted)
    w, g = torch.randn(64, 9).to(dtype), torch.randn(64, 9).to(dtype)
    expected = g.double() * (1.0 if trust is None else 1e-3 * w.double().norm() / g.double().norm())
    short, full = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.float())
    short.grad, full.grad = g, g.float()
    optimizer = nnclr.LARS(
        [{"params": [short, full], "trust_coefficient": trust}], lr=1.0 if trust is None else 256.0, weight_decay=0.0
    )
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert seen == [torch.float32] * 6
    for parameter, most in ((short, 0.02), (full, 1e-5)):
        moved = w.double() - parameter.detach().double()
        assert (moved - rate * expected).norm() < most * (rate * expected).norm()
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.dtype == parameter.dtype
        assert (momentum.double() - expected).norm() < most * expected.norm()


def strangely_laid_out():
    """Weights in other orders in memory than gradient and loaded momentum, with gaps, and with a stray stride."""
    start = [torch.randn(4, 3, 2, 2) for _ in range(4)]
    parameters = [
        torch.nn.Parameter(start[0].to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.zeros(4, 3, 2, 4)[..., ::2]),
        torch.nn.Parameter(start[2].clone()),
        torch.nn.Parameter(torch.empty_strided((1, 4, 3, 4), (5, 12, 4, 1))),
    ]
    start[3] = start[3].reshape(1, 4, 3, 4)
    for parameter, values in zip(parameters, start, strict=True):
        parameter.data.copy_(values)
    return parameters, [torch.nn.Parameter(values) for values in start]


def steps_of_both(strange, plain):
    """The same three steps on both; the first group's momentum comes from the second's, as out of a file."""
    optimizers = [nnclr.LARS(parameters, lr=1.0, weight_decay=0.1) for parameters in (strange, plain)]
    for step in range(3):
        for i, (one, two) in enumerate(zip(strange, plain, strict=True)):
            two.grad = torch.randn(two.shape, generator=torch.Generator().manual_seed(10 * step + i))
            one.grad = two.grad.to(memory_format=torch.channels_last) if i == 2 else two.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))


def test_any_layout_in_memory(path, monkeypatch):
    strange, plain = strangely_laid_out()
    steps_of_both(strange, plain)
    assert all(torch.allclose(one, two, rtol=1e-5, atol=1e-7) for one, two in zip(strange, plain, strict=True))
    monkeypatch.setattr(optim, "_laid_out_as", lambda other, tensor: tensor)  # control: what torch's kernels do
    strange, plain = strangely_laid_out()
    steps_of_both(strange[:1], plain[:1])
    assert not torch.allclose(strange[0], plain[0], rtol=1e-2)


WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero")


def waits_of_a_step(optimizer):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        guarded_step(optimizer, torch.tensor(True))
    return sum(event.count for event in profile.key_averages() if event.key in WAITS)


def test_a_step_on_a_device_never_waits_for_it(monkeypatch):
    """Nothing is read back in the multi-tensor way; control: on a CPU, where that costs nothing, the norms are."""
    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(6)))
    model(torch.ones(2, 5)).sum().backward()
    optimizer = create_optimizer("lars", [model], weight_decay=0.1, momentum=0.9)
    assert waits_of_a_step(optimizer) >= 6
    monkeypatch.setattr(optim, "_move_one_by_one", optim._move_together)
    assert waits_of_a_step(optimizer) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_gpu_moves_as_a_cpu_and_never_waits(name):
    def trained(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 3))
        model = model.to(device).to(memory_format=torch.channels_last)
        optimizer = create_optimizer(name, [model], weight_decay=0.1, momentum=0.9)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for step in range(4):
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            finite = torch.tensor(step != 2).to(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                guarded_step(optimizer, finite)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for one, two in zip(trained("cuda"), trained("cpu"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def bits(optimizer):
    """Everything that a step could change."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [{name: t.clone() for name, t in optimizer.state[p].items()} for p in parameters]
    return [p.detach().clone() for p in parameters], states


def same_bits(one, two):
    weights = all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    states = zip(one[1], two[1], strict=True)
    return weights and all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in states)


def guarded(name, finite):
    """States of a small model before the first and after each of the steps, which are finite or not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = create_optimizer(name, [model], weight_decay=0.1, momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    seen = [bits(optimizer)]
    good = 0
    for is_finite in finite:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * good + i))
            if not is_finite:
                parameter.grad.flatten()[0] = float("nan")
                parameter.grad.flatten()[1] = float("inf")
        good += is_finite
        guarded_step(optimizer, torch.tensor(is_finite))
        seen.append(bits(optimizer))
    return optimizer, seen


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name, path):
    optimizer, seen = guarded(name, [True, False, True, True])
    assert same_bits(seen[1], seen[2])
    assert not same_bits(seen[2], seen[3])  # control: the others change something
    assert same_bits(seen[-1], guarded(name, [True, True, True])[1][-1])
    if name == "adamw":
        assert {state["step"].item() for state in seen[-1][1]} == {3.0}
    optimizer.param_groups[0]["params"][0].grad[:] = float("nan")
    optimizer.step()  # control: without the guard it breaks the weights
    assert not optimizer.param_groups[0]["params"][0].isfinite().all()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_first_step_that_is_not_finite(name, path):
    """The state is made then, of zeros: torch's own SGD would go on from uninitialised memory."""
    _, seen = guarded(name, [False, True, True])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[1][0], strict=True))
    assert all((value == 0).all() for state in seen[1][1] for value in state.values())
    assert same_bits(seen[-1], guarded(name, [True, True])[1][-1])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_guarded_steps_are_torchs_steps(name):
    seen = guarded(name, [True, True, True])[1]
    plain = [torch.nn.Parameter(p.contiguous()) for p in seen[0][0]]
    groups = [{"params": plain[:1], "weight_decay": 0.1}, {"params": plain[1:], "weight_decay": 0.0}]
    if name == "sgd":
        unfused = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)
    else:
        unfused = torch.optim.AdamW(groups, lr=0.1, foreach=False)
    for step in range(3):
        for i, parameter in enumerate(plain):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i))
        unfused.step()
    for one, two in zip(seen[-1][0], plain, strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-5, atol=1e-6)


def test_found_inf_is_any_number_but_zero(path):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = nnclr.LARS([parameter], lr=1.0)
    for found, stays in ((2.0, True), (float("nan"), True), (0.0, False)):
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert torch.equal(parameter, torch.ones(2, 2)) == stays, found


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
