"""Backbones: any timm or torchvision architecture by name, one small network, or a module of your own."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnclr.errors import InputError, first_line

SMALL_IMAGE = 64  # pixels; up to this size a ResNet gets the 3x3 stride-1 stem without max-pool


class SmallConvNet(nn.Module):
    """A residual network of 0.4 million parameters for 32-pixel images, for demos and slow machines.

    Stride-2 stem, then three stages of one basic block each, global average pooling.

    Args:
        width: channels of the first stage; the others have 2x and 4x as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential(
            _BasicBlock(width, width, 1),
            _BasicBlock(width, 2 * width, 2),
            _BasicBlock(2 * width, 4 * width, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) to features (n, 4 * width)."""
        features: Tensor = self.stages(self.stem(images)).mean(dim=(2, 3))
        return features


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


_OURS = {"small-convnet": SmallConvNet}


def create_backbone(name: str, image_size: int, any_size: bool = False) -> nn.Module:
    """Build an untrained backbone that maps images (n, 3, h, w) to pooled features (n, num_features).

    Args:
        name: `small-convnet`; `timm/NAME` or `torchvision/NAME`; or a bare name, looked up in timm first
            (timm and torchvision ResNets are the same network with the same keys).
        image_size: pixels of a training view. Up to 64, ResNets get a 3x3 stride-1 stem and no max-pool.
        any_size: also take images of other sizes (multi-crop); vision transformers then interpolate their positions.

    Raises:
        InputError: if no library knows the name; the message suggests the nearest ones.
    """
    library, _, bare = name.rpartition("/")
    if name in _OURS:
        return _OURS[name]()
    if library in ("", "timm"):
        import timm

        if timm.is_model(bare):
            return _use_small_stem(_timm(bare, image_size, any_size), image_size)
    if library in ("", "torchvision"):
        import torchvision

        if bare in torchvision.models.list_models(module=torchvision.models):
            model = torchvision.models.get_model(bare, weights=None)
            return _use_small_stem(without_classifier(model, bare), image_size)
    raise InputError(_unknown_backbone(name))


def timm_name(name: str) -> str | None:
    """The timm architecture that a backbone name means, or None where it is no timm model."""
    import timm

    library, _, bare = name.rpartition("/")
    return bare if library in ("", "timm") and name not in _OURS and timm.is_model(bare) else None


def feature_dim(backbone: nn.Module, image_size: int) -> int:
    """Width of the features of any module, read off one forward pass in evaluation mode.

    Raises:
        InputError: if the module does not map (1, 3, image_size, image_size) to (1, d).
    """
    parameter = next(backbone.parameters(), torch.zeros(()))
    images = torch.zeros(1, 3, image_size, image_size, device=parameter.device)
    try:
        with evaluation_mode(backbone), torch.no_grad():
            features = backbone(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"the backbone cannot take {image_size} x {image_size} images: {first_line(error)}") from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(
            "the backbone must return one feature vector an image, shape (n, d); "
            f"it returned {getattr(features, 'shape', type(features).__name__)}"
        )
    return features.shape[1]


def class_scores(module: nn.Module) -> str:
    """Words for a model of timm or torchvision that seems to end in its classifier still; empty for others.

    What such a model gives are scores of classes, which make poor features.
    """
    library, head = type(module).__module__.partition(".")[0], None
    if library == "timm":
        head, instead = getattr(module, "get_classifier", lambda: None)(), "num_classes=0"
    elif library == "torchvision":
        name, last = [(name, layer) for name, layer in module.named_modules() if not list(layer.children())][-1]
        head, instead = last if name.startswith(("fc", "classifier", "head")) else None, "nn.Identity() in its place"
    if not isinstance(head, nn.Linear):
        return ""
    return (
        f"the backbone, {type(module).__name__}, seems to end in its classifier and to give {head.out_features} scores "
        f"instead of features; take it away by {instead}"
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Every layer as for evaluation, and then each as it was: some may be frozen while others train."""
    before = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(before[0][1])  # what a module of one's own does beside it
        for layer, training in before:
            layer.training = training


def _timm(name: str, image_size: int, any_size: bool) -> nn.Module:
    import timm

    # Convolutional networks take any size and have neither argument; some transformers lack the first one.
    tries: list[dict[str, Any]] = [{"img_size": image_size}, {}]
    if any_size:
        tries.insert(0, {"img_size": image_size, "dynamic_img_size": True})
    for options in tries[:-1]:
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
            return model
        except TypeError:
            continue
    plain: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return plain


def without_classifier(model: nn.Module, name: str) -> nn.Module:
    """Replace the last linear layer of a torchvision classifier by the identity; drop auxiliary classifiers."""
    if hasattr(model, "aux_logits"):  # GoogLeNet and Inception return a tuple while they train
        model.aux_logits = False  # type: ignore[assignment]  # Module declares its attributes as tensors or modules
        for auxiliary in ("aux1", "aux2", "AuxLogits"):
            setattr(model, auxiliary, None)
    for attribute in ("fc", "classifier", "head", "heads"):
        head = getattr(model, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(model, attribute, nn.Identity())
            return model
        if isinstance(head, nn.Sequential):
            last = [child for child, module in head.named_children() if isinstance(module, nn.Linear)]
            if last:
                setattr(head, last[-1], nn.Identity())
                return model
    raise InputError(f"torchvision/{name} has no classifier to take off; choose another backbone")


def _use_small_stem(model: nn.Module, image_size: int) -> nn.Module:
    """The stem for CIFAR-size images (SimCLR, appendix B.9): 3x3, stride 1, padding 1, no max-pool."""
    conv1 = getattr(model, "conv1", None)
    if image_size > SMALL_IMAGE or not isinstance(conv1, nn.Conv2d) or not hasattr(model, "maxpool"):
        return model
    model.conv1 = nn.Conv2d(3, conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _unknown_backbone(name: str) -> str:
    import timm
    import torchvision

    known = [*_OURS, *timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]
    near = dict.fromkeys(difflib.get_close_matches(name.rpartition("/")[2], known, n=4, cutoff=0.5))
    hint = f"; did you mean {', '.join(near)}?" if near else "; `timm.list_models()` lists what there is"
    return f"no backbone is called '{name}'{hint}"
