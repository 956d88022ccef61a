import numpy as np
import pytest
import torch

import nnclr
from tests import reference


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_against_the_double_loop(temperature):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    z1, z2 = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    loss = nnclr.nt_xent_loss(z1, z2, temperature)
    assert loss.item() == pytest.approx(reference.nt_xent(a, b, temperature), rel=1e-12)
    loss.backward()
    first = reference.numerical_gradient(lambda x: reference.nt_xent(x, b, temperature), a)
    second = reference.numerical_gradient(lambda x: reference.nt_xent(a, x, temperature), b)
    np.testing.assert_allclose(z1.grad.numpy(), first, atol=1e-7)
    np.testing.assert_allclose(z2.grad.numpy(), second, atol=1e-7)


def test_simclr_has_nnclrs_projector_and_no_state():
    simclr, ours = nnclr.SimCLR(12, 8, 16), nnclr.NNCLR(12, 8, 16, 16, 10)
    assert str(simclr.projector) == str(ours.projector)
    features = [torch.randn(6, 12) for _ in range(2)]
    out = simclr(features, ids=torch.arange(6))
    before = {name: value.clone() for name, value in simclr.state_dict().items()}
    simclr.update(out)
    assert all(torch.equal(before[name], value) for name, value in simclr.state_dict().items())
    simclr.eval()
    out = simclr(features)
    z = [simclr.projector(view).detach().double().numpy() for view in features]
    assert out.loss.item() == pytest.approx(reference.nt_xent(*z, 0.1), rel=1e-5)
    assert out.metrics["loss_chance"].item() == pytest.approx(np.log(11))
    with pytest.raises(ValueError, match="2 views, got 1"):
        simclr(features[:1])
