import pytest
import timm
import torchvision
from torch import nn

from nnclr.models.blocks import repeated_blocks


@pytest.mark.parametrize(
    ("make", "kind", "count"),
    [
        (lambda: torchvision.models.resnet18(), "BasicBlock", 8),
        (lambda: timm.create_model("resnet26", num_classes=0), "Bottleneck", 8),
        (lambda: torchvision.models.vit_b_16(), "EncoderBlock", 12),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0), "Block", 12),
        (lambda: timm.create_model("convnext_atto", num_classes=0), "ConvNeXtStage", 4),
    ],
)
def test_blocks_of_known_networks(make, kind, count):
    network = make()
    blocks = repeated_blocks(network)
    assert [type(block).__name__ for block in blocks] == [kind] * count
    inside = {id(part) for block in blocks for part in block.modules()}
    assert sum(id(block) in inside for block in blocks) == count  # each once,
    assert all(sum(part is other for other in network.modules()) == 1 for part in blocks)  # in the network itself


def test_lists_of_other_things_are_no_blocks():
    assert repeated_blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())) == []
    assert repeated_blocks(nn.Sequential(nn.ReLU(), nn.ReLU())) == []
    stages = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])
    assert repeated_blocks(stages) == [*stages[0], *stages[1]]
