import torch
from torch import nn

import nnclr


def kinds(head):
    return [type(layer) for layer in head.layers]


def test_projector_is_the_papers():
    head = nnclr.ProjectionHead(2048)
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
    assert [m.out_features for m in head.layers if isinstance(m, nn.Linear)] == [2048, 2048, 256]
    assert sum(p.numel() for p in head.parameters()) == 2048 * 2048 * 2 + 2048 * 256 + 2 * (2048 + 2048 + 256)
    out = head(torch.randn(64, 2048))
    assert out.shape == (64, 256)
    assert (out < 0).any()  # no ReLU at the end
    assert torch.allclose(out.mean(dim=0), torch.zeros(256), atol=1e-5)  # batch norm at the end


def test_predictor_is_the_papers():
    head = nnclr.PredictionHead()
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [m.out_features for m in head.layers if isinstance(m, nn.Linear)] == [4096, 256]
    assert sum(p.numel() for p in head.parameters()) == 256 * 4096 + 2 * 4096 + 4096 * 256 + 256
    out = head(torch.randn(64, 256))
    assert out.shape == (64, 256)
    assert out.mean(dim=0).abs().max() > 1e-3  # plain linear at the end: the mean is not removed
