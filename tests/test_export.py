import json
import os
import signal
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

from nnclr import cli, pretrained
from nnclr import export as export_module
from nnclr.encoder import Encoder
from nnclr.errors import InputError, StorageError
from nnclr.export import export
from nnclr.models.backbone import create_backbone
from tests.alone import alone

OUT = {"torchvision": "weights.pth", "timm": "weights.safetensors", "huggingface": "folder", "onnx": "model.onnx"}


def made(backbone, size, seed=0, **options):
    """An encoder with statistics as after training."""
    torch.manual_seed(seed)
    module = create_backbone(backbone, size)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.add_(0.2 * torch.rand_like(buffer))
    provenance = {"backbone": backbone, "data": "/home/someone/secret/photos", "step": 30}
    return Encoder(module, size, provenance=provenance, **options)


@pytest.fixture(scope="module")
def resnet18():
    return made("resnet18", 80, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module", params=[("test_resnet", 112), ("timm/test_vit", 112)], ids=["resnet", "vit"])
def tiny(request):
    return made(*request.param, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))


def features(encoder, views):
    with torch.no_grad():
        return encoder.module.eval()(views)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("backbone", ["resnet18", "torchvision/resnet18"])
def test_torchvision_loads_it_strictly(tmp_path, resnet18, backbone, suffix):
    said, path = [], tmp_path / f"weights{suffix}"
    encoder = Encoder(resnet18.module.train(), 80, provenance={"backbone": backbone})
    assert export(encoder, "torchvision", path, said.append) == path
    assert encoder.module.training
    state = safetensors.torch.load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    stock = torchvision.models.resnet18(weights=None)
    missing, unexpected = stock.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    stock.fc = nn.Identity()
    stock.load_state_dict(state)
    views = torch.randn(3, 3, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(views), features(encoder, views), rtol=0, atol=1e-5)
    assert "largest difference of features" in said[0]
    assert "mean [0.485, 0.456, 0.406]" in said[1]  # the file cannot hold it


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_it(tmp_path, tiny, suffix):
    path = tmp_path / f"weights{suffix}"
    said = []
    export(tiny, "timm", path, said.append)
    name = tiny.provenance["backbone"].removeprefix("timm/")
    options = {"img_size": 112} if "vit" in name else {}
    stock = timm.create_model(name, checkpoint_path=str(path), num_classes=0, **options).eval()
    views = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(stock(views), features(tiny, views), rtol=0, atol=1e-5)
    assert ("img_size=112" in said[0]) == ("vit" in name)
    (tmp_path / "other").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # whoever may read files of the user may read it


def test_hugging_face_folder_loads_everywhere(tmp_path, tiny):
    said = []
    folder = export(tiny, "huggingface", tmp_path / "birds", said.append)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    picture = smooth.resize((300, 200), Image.Resampling.BICUBIC)  # 112 / 0.875 is a whole number of pixels
    expected = torch.from_numpy(tiny.embed(np.asarray(picture)[None]))
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(stock))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(stock(transform(picture)[None]), expected, rtol=0, atol=1e-5)
        found = model(**processor(picture, return_tensors="pt")).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    own = Encoder.from_pretrained(folder)
    np.testing.assert_array_equal(own.embed(np.asarray(picture)[None]), expected.numpy())
    assert stock.pretrained_cfg["tag"] == "nnclr"  # never the stock model's
    assert any("AutoModel loads it" in line for line in said)
    for name in ("README.md", "config.json"):
        assert "secret" not in (folder / name).read_text()
        assert str(tmp_path) not in (folder / name).read_text()


def test_a_torchvision_resnet_becomes_timms(tmp_path, resnet18):
    encoder = Encoder(resnet18.module, 80, provenance={"backbone": "torchvision/resnet18"})
    folder = export(encoder, "huggingface", tmp_path / "folder", lambda line: None)
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    views = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(stock(views), features(encoder, views), rtol=0, atol=1e-5)


def test_onnx_runs_at_any_batch(tmp_path, tiny, capfd):
    said = []
    path = export(tiny, "onnx", tmp_path / "model.onnx", said.append)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert os.listdir(tmp_path) == ["model.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 18)]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3, 7, 32):
        views = torch.randn(batch, 3, 112, 112)
        found = session.run(None, {"images": views.numpy()})[0]
        np.testing.assert_allclose(found, features(tiny, views).numpy(), rtol=0, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["nnclr.preprocessing"]) == tiny.preprocessing
    assert json.loads(facts["nnclr.provenance"])["data"] == "photos"
    assert facts["nnclr.opset"] == "18"
    content = path.read_bytes()
    for trace in (b"secret", os.fsencode(os.getcwd()), b"site-packages", b".py"):
        assert trace not in content, trace
    assert "batch 1, 3, 32: largest difference" in said[0]


def test_onnx_holds_modules_of_your_own(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    module[1].running_mean.add_(1.0)
    encoder = Encoder(module.train(), 16)  # in training mode dropout and batch statistics would spoil it
    path = export(encoder, "onnx", tmp_path / "m.onnx", lambda line: None)
    views = torch.randn(5, 3, 16, 16)
    found = onnxruntime.InferenceSession(path).run(None, {"images": views.numpy()})[0]
    assert module.training
    np.testing.assert_allclose(found, features(encoder, views).numpy(), atol=1e-5)


class Odd(nn.Module):
    """Its forward pass depends on values: no graph."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.flatten(1) * (self.weight if float(images.mean()) > 0 else 2.0)


@pytest.mark.parametrize(
    ("backbone", "size", "format", "out", "words"),
    [
        ("test_vit", 112, "torchvision", "w.pth", "torchvision has no architecture 'test_vit'"),
        ("torchvision/mobilenet_v3_small", 64, "timm", "w.pth", "timm has no architecture 'mobilenet_v3_small'"),
        ("torchvision/shufflenet_v2_x0_5", 64, "timm", "w.pth", "timm has no architecture 'shufflenet_v2_x0_5'"),
        ("resnet18", 32, "torchvision", "w.pth", "stem for images of at most 64 pixels, which torchvision's has not"),
        ("resnet18", 32, "timm", "w.pth", "stem for images of at most 64 pixels, which timm's has not"),
        ("resnet18", 32, "huggingface", "w", "stem for images of at most 64 pixels"),
        ("small-convnet", 16, "huggingface", "w", "small-convnet is no architecture of timm"),
        ("test_resnet", 112, "timm", "w.bin", "w.bin must end in .safetensors or .pth"),
        ("test_resnet", 112, "tensorflow", "w", "'tensorflow' is no export format; choose torchvision, timm"),
    ],
)
def test_what_a_format_cannot_hold_is_one_sentence(tmp_path, backbone, size, format, out, words):
    encoder = made(backbone, size)
    with pytest.raises(InputError, match=words):
        export(encoder, format, tmp_path / out)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("format", "out"), [("torchvision", "w.pth"), ("timm", "w.pth"), ("huggingface", "w")])
def test_another_network_of_the_same_name_is_refused(tmp_path, format, out):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(InputError, match=r"resnet18 is another network than this one \("):
        export(Encoder(module, 16, provenance={"backbone": "resnet18"}), format, tmp_path / out)
    assert os.listdir(tmp_path) == []


def test_no_graph_no_library_and_too_large_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="this network cannot be exported to ONNX") as caught:
        export(Encoder(Odd(), 8), "onnx", tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(export_module, "_ONNX_BYTES", 10)
    with pytest.raises(InputError, match="one ONNX file holds 2; export to huggingface"):
        export(made("small-convnet", 16), "onnx", tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs onnxscript; pip install 'nnclr\[onnx\]'"):
        export(made("small-convnet", 16), "onnx", tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("format", "out", "words"),
    [
        ("timm", "w.bin", "w.bin must end in .safetensors or .pth"),
        ("torchvision", "w", "w must end in .safetensors or .pth"),
        ("huggingface", "no/folder", "is to be in a folder that does not exist"),
        ("onnx", "there.onnx", "exists and is not overwritten"),
    ],
)
def test_a_wrong_name_is_refused_before_the_encoder_is_loaded(tmp_path, monkeypatch, capsys, format, out, words):
    loaded = []
    monkeypatch.setattr(pretrained, "open_encoder", lambda *_: loaded.append(1) or made("small-convnet", 16))
    (tmp_path / "there.onnx").write_text("mine")
    assert cli.main(["export", "RUN", "--format", format, "--out", str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err
    assert loaded == []
    cli.main(["export", "RUN", "--format", "torchvision", "--out", str(tmp_path / "w.pth")])  # the control
    assert loaded == [1]
    assert os.listdir(tmp_path) == ["there.onnx"]


@pytest.mark.parametrize("format", OUT)
def test_other_features_are_refused_and_leave_nothing(tmp_path, resnet18, monkeypatch, format):
    """The stock library is made to give something else, as a library of another version might."""
    encoder = made("small-convnet", 16) if format == "onnx" else resnet18
    real = Encoder.features
    monkeypatch.setattr(Encoder, "features", lambda self, views: real(self, views) * 1.001 + 0.001)
    with pytest.raises(
        InputError, match=r"features differ by .*nothing is kept|differ by .* at batch 1; nothing is kept"
    ):
        export(encoder, format, tmp_path / OUT[format], lambda line: None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("format", "owner", "name"),
    [
        ("torchvision", os, "rename"),
        ("torchvision", os, "fsync"),
        ("torchvision", export_module, "_difference"),
        ("huggingface", os, "rename"),
        ("huggingface", export_module, "_difference"),
        ("onnx", onnxruntime, "InferenceSession"),
    ],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_a_failure_leaves_nothing(tmp_path, resnet18, monkeypatch, format, owner, name):
    encoder = made("small-convnet", 16) if format == "onnx" else resnet18

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(StorageError, match=r"could not be written: No space left"):
            export(encoder, format, tmp_path / OUT[format], lambda line: None)
    assert os.listdir(tmp_path) == []
    if format == "torchvision":  # control: it was the failure
        export(encoder, format, tmp_path / OUT[format], lambda line: None)
        assert os.listdir(tmp_path) == [OUT[format]]


@pytest.mark.parametrize(
    ("format", "owner", "name"),
    [
        ("torchvision", os, "rename"),
        ("torchvision", torch, "save"),
        ("huggingface", os, "rename"),
        ("huggingface", export_module, "_difference"),
    ],
    ids=lambda p: getattr(p, "__name__", p),
)
@alone
def test_a_kill_leaves_nothing_under_the_name(tmp_path, resnet18, monkeypatch, format, owner, name):
    out = tmp_path / OUT[format]
    child = os.fork()
    if child == 0:
        try:
            setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
            export(resnet18, format, out, lambda line: None)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()
    assert all(left.startswith(".tmp-") for left in os.listdir(tmp_path))
    if format == "torchvision":  # what was left is not in the way
        export(resnet18, format, out, lambda line: None)
        assert out.is_file()


def test_nothing_is_overwritten(tmp_path, resnet18):
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "link.pth").symlink_to(tmp_path / "absent")
    for name in ("there.pth", "link.pth", "."):
        with pytest.raises(InputError, match="exists and is not overwritten"):
            export(resnet18, "torchvision", tmp_path / name)
    assert (tmp_path / "there.pth").read_text() == "mine"
    with pytest.raises(InputError, match="in a folder that does not exist"):
        export(resnet18, "torchvision", tmp_path / "there.pth" / "w.pth")


def test_the_card_tells_data_settings_and_evaluations(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('data = "/home/someone/secret/photos"\nout = "/secret/run"\nepochs = 3\n')
    result = {
        "protocol": "knn", "metric": "top-1", "value": 0.5, "interval": [0.4, 0.625], "test": "/secret/a|b",
        "n_test": 80, "parameters": {"k": 20, "temperature": 0.07},
    }  # fmt: skip
    lines = [json.dumps(result | {"value": 0.25}), json.dumps(result), json.dumps(result | {"protocol": "linear"})]
    (run / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    folder = export(made("test_resnet", 112), "huggingface", tmp_path / "birds", lambda line: None, run=run)
    card = (folder / "README.md").read_text()
    assert "# birds\n" in card
    assert "| knn | top-1 | 50.0 % (40.0 to 62.5) | a\\|b, 80 images | k 20, temperature 0.07 |" in card
    assert "25.0 %" not in card  # the older figure of the same kind
    assert "| linear | top-1 | 50.0 %" in card
    assert "| data | photos |" in card
    assert "| epochs | 3 |" in card
    assert "secret" not in card
    assert f"| torch | {torch.__version__} |" in card
    (run / "config.toml").write_text("no toml")
    with pytest.raises(InputError, match="is no run folder"):
        export(made("test_resnet", 112), "huggingface", tmp_path / "other", lambda line: None, run=run)
    assert sorted(os.listdir(tmp_path)) == ["birds", "run"]
