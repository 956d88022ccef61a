import pytest
import timm
import torch
import torchvision
from torch import nn

import nnclr
from nnclr.errors import InputError
from nnclr.models.backbone import class_scores, create_backbone, feature_dim, timm_name


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("small-convnet", 32, 128),
        ("resnet18", 32, 512),
        ("timm/vit_tiny_patch16_224", 64, 192),
        ("torchvision/mobilenet_v3_small", 64, 1024),
        ("torchvision/vgg11", 64, 4096),
    ],
)
def test_features_are_one_vector_an_image(name, size, width):
    model = create_backbone(name, size)
    assert feature_dim(model, size) == width
    assert model.training


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_auxiliary_classifiers_are_dropped(name):
    """With them the network returns a tuple while it trains, though one tensor in evaluation mode."""
    raw = torchvision.models.get_model(name.partition("/")[2], weights=None, init_weights=False)
    assert isinstance(raw(torch.zeros(2, 3, 96, 96) if "goog" in name else torch.zeros(2, 3, 299, 299)), tuple)
    model = create_backbone(name, 96)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, feature_dim(model, 96))
    assert not [key for key in model.state_dict() if key.lower().startswith("aux")]


def test_a_bare_resnet_has_torchvisions_keys():
    ours = create_backbone("resnet18", 224).state_dict()
    theirs = torchvision.models.resnet18().state_dict()
    assert set(theirs) - set(ours) == {"fc.weight", "fc.bias"}
    assert set(ours) <= set(theirs)
    assert all(ours[name].shape == theirs[name].shape for name in ours)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_small_images_get_the_small_stem(name):
    small, large = create_backbone(name, 64), create_backbone(name, 65)
    assert small.conv1.weight.shape == (64, 3, 3, 3)
    assert isinstance(small.maxpool, nn.Identity)
    assert large.conv1.weight.shape == (64, 3, 7, 7)
    maps = small.layer1(small.maxpool(small.conv1(torch.zeros(1, 3, 32, 32))))
    assert maps.shape[2:] == (32, 32)  # padding 1: neither 16 x 16 nor 34 x 34


def test_unknown_names_suggest_near_ones():
    with pytest.raises(InputError, match=r"'resnet81'; did you mean .*resnet18"):
        create_backbone("resnet81", 32)
    with pytest.raises(InputError, match=r"'timm/resnett50'; did you mean .*resnet50"):
        create_backbone("timm/resnett50", 32)
    with pytest.raises(InputError, match="list_models"):
        create_backbone("qqqqqqqq", 32)
    with pytest.raises(InputError, match=r"'os\.system'"):
        create_backbone("os.system", 32)


def test_own_modules_are_checked():
    assert feature_dim(nn.Flatten(), 4) == 48
    with pytest.raises(InputError, match=r"one feature vector an image.*3, 4, 4"):
        feature_dim(nn.Identity(), 4)
    with pytest.raises(InputError, match="cannot take 8 x 8 images"):
        feature_dim(nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), 8)


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11", "vit_b_32", "mobilenet_v3_small", "swin_t", "convnext_tiny", "efficientnet_b0"]
)
def test_a_classifier_is_no_backbone(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=768)
        assert "to end in its classifier and to give 768 scores" in class_scores(model)
        head = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
        model.set_submodule(head, nn.Identity())
        assert class_scores(model) == ""
        timms = timm.create_model("vit_tiny_patch16_224", num_classes=192)
        assert "give 192 scores instead of features; take it away by num_classes=0" in class_scores(timms)
        timms.reset_classifier(0)
        assert class_scores(timms) == ""
    assert class_scores(nn.Sequential(nn.Flatten(), nn.Linear(3, 768))) == ""  # whose end may be anything


def test_a_run_on_class_scores_is_told_unless_it_is_quiet(pictures, tiny, tmp_path):
    tiny |= {"backbone": timm.create_model("resnet10t", num_classes=10), "epochs": 0.4}
    nnclr.pretrain(pictures, tmp_path / "quiet", **tiny)
    with pytest.warns(UserWarning, match="the backbone, ResNet, seems to end in its classifier and to give 10 scores"):
        nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"quiet": False})


def test_timm_names():
    assert timm_name("resnet18") == "resnet18"
    assert timm_name("timm/resnet18") == "resnet18"
    assert timm_name("small-convnet") is None
    assert timm_name("torchvision/resnet18") is None


def test_vision_transformers_take_small_views_when_asked():
    torch.manual_seed(0)
    fixed = create_backbone("vit_tiny_patch16_224", 64).eval()
    torch.manual_seed(0)
    flexible = create_backbone("vit_tiny_patch16_224", 64, any_size=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(flexible(x), fixed(x))
        assert flexible(x[..., :32, :32]).shape == (2, 192)
        with pytest.raises(AssertionError):  # control
            fixed(x[..., :32, :32])
    fixed.load_state_dict(flexible.state_dict())  # the saved encoder is the same one
