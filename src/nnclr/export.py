"""An encoder in the form that other tools load, checked with those tools before it gets its name."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from nnclr.checkpoint import sync
from nnclr.encoder import Encoder, on_cpu
from nnclr.errors import InputError, StorageError, first_line
from nnclr.golden import golden_image
from nnclr.model_card import versions, without_paths
from nnclr.models.backbone import without_classifier

FORMATS = ("torchvision", "timm", "huggingface", "onnx")
OPSET = 18  # of ONNX: what PyTorch's exporter writes without converting, and old runtimes read
_PICKLED = (".pth", ".pt")  # files of weights that are no safetensors
_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "aux", "AuxLogits.")
_LARGEST_DIFFERENCE = 1e-5  # of features after loading, in units of the largest one
_LARGEST_ONNX_DIFFERENCE, _SMALLEST_COSINE = 1e-4, 0.9999  # the first absolute, where features are at most 1
_SEEN_DIFFERENCE = 1e-3  # of the pipelines, above one level of a pixel here and there
_NO_LENGTH = 1e-6  # features all zero have no direction
_BATCHES = (1, 3, 32)
_ONNX_BYTES = 2**31 - 2**24  # a file of protocol buffers ends at 2 GiB


def export(
    encoder: Encoder,
    format: str,
    out: str | Path,
    say: Callable[[str], None] = print,
    run: str | Path | None = None,
) -> Path:
    """Write an encoder for other tools; the file is loaded again by those tools before it gets its name.

    Args:
        encoder: its module is not changed.
        format: `torchvision` or `timm`, a file of weights, `.safetensors` or `.pth`; `huggingface`, a folder for timm,
            transformers and `Encoder.from_pretrained`, with a model card; `onnx`, one file.
        out: what to write; it must not be there yet.
        say: is told how it was checked, and the largest difference of features.
        run: the run folder that the encoder comes from, for the model card.

    Returns:
        `out`, as a path.

    Raises:
        InputError: if the format cannot hold this encoder, `out` exists, a library is missing, or the features differ.
        StorageError: if `out` cannot be written.
    """
    out = Path(out)
    refuse_out(format, out)
    writers = {"torchvision": _torchvision, "timm": _timm, "huggingface": _huggingface, "onnx": _onnx}
    encoder = replace(encoder, module=on_cpu(encoder.module).eval(), provenance=without_paths(encoder.provenance))
    temporary = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        said = writers[format](encoder, temporary, out.name, run)
        for path in [*temporary.glob("*"), temporary]:
            sync(path)
        os.rename(temporary, out)
        sync(out.parent)
    except OSError as error:
        raise StorageError(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    for line in said:
        say(f"{out}: {line.replace(repr(out.name), repr(str(out)))}")
    return out


def refuse_out(format: str, out: Path) -> None:
    """Raise the InputError for a format or a name that cannot be written, before an encoder is loaded for it."""
    if format not in FORMATS:
        raise InputError(f"'{format}' is no export format; choose {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise InputError(f"{out} exists and is not overwritten; name another --out, or remove it")
    if format in ("torchvision", "timm") and out.suffix not in (".safetensors", *_PICKLED):
        raise InputError(f"{out} must end in .safetensors or .pth")
    if format == "onnx" and out.suffix != ".onnx":
        raise InputError(f"{out} must end in .onnx")
    if not out.parent.is_dir():
        raise InputError(f"{out} is to be in a folder that does not exist; make {out.parent} first")


def _torchvision(encoder: Encoder, path: Path, title: str, run: str | Path | None) -> list[str]:
    """A state dict that fits torchvision's model, but for the classifier."""
    from torchvision import models

    name = _architecture(encoder, "torchvision")
    if name not in models.list_models(module=models):
        raise InputError(f"torchvision has no architecture '{name}'; export to timm, huggingface or onnx")
    with _quiet():
        stock = models.get_model(name, weights=None)
    state, expected = encoder.module.state_dict(), stock.state_dict()
    absent = expected.keys() - state.keys()
    wrong = [key for key in absent if not key.startswith(_CLASSIFIERS)]
    wrong += [key for key, value in state.items() if key not in expected or expected[key].shape != value.shape]
    if wrong:
        raise InputError(
            f"torchvision's {name} is another network than this one ({len(wrong)} keys differ, for example "
            f"{sorted(wrong)[0]}); export to timm, huggingface or onnx"
        )
    _write_weights(encoder.module, path)
    missing, unexpected = stock.load_state_dict(_read_weights(path), strict=False)
    if set(missing) != absent or unexpected:
        raise InputError(f"the written file does not fit torchvision's {name}; nothing is kept")
    difference = _difference(encoder, without_classifier(stock, name).eval(), "torchvision")
    return [
        f"torchvision's {name} loads it, all keys but the classifier's {len(absent)}; largest difference of features "
        f"{difference:.1e}",
        f"{_preprocessing_in_words(encoder)}; the file holds weights alone, so note these",
    ]


def _timm(encoder: Encoder, path: Path, title: str, run: str | Path | None) -> list[str]:
    """A file for timm's `checkpoint_path`."""
    import timm

    name = _timm_architecture(encoder)
    arguments = _timm_arguments(encoder)
    _write_weights(encoder.module, path)
    try:
        stock = timm.create_model(name, checkpoint_path=str(path), num_classes=0, **arguments).eval()
    except (RuntimeError, TypeError, ValueError) as error:
        raise _other_network(name, error) from error
    difference = _difference(encoder, stock, "timm")
    said = "".join(f", {key}={value}" for key, value in arguments.items())
    return [
        f"timm.create_model('{name}', checkpoint_path='{title}', num_classes=0{said}) loads it; largest difference of "
        f"features {difference:.1e}",
        f"{_preprocessing_in_words(encoder)}; the file holds weights alone, so note these",
    ]


def _huggingface(encoder: Encoder, path: Path, title: str, run: str | Path | None) -> list[str]:
    """A folder in timm's hub layout with a model card."""
    import timm

    name = _timm_architecture(encoder)
    # timm's name also where torchvision's network is the same one: the folder is for timm.
    renamed = replace(encoder, provenance=encoder.provenance | {"backbone": f"timm/{name}"})
    renamed.save_with_card(path, title, run)
    try:
        stock = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    except (RuntimeError, TypeError, ValueError) as error:
        raise _other_network(name, error) from error
    said = [f"timm loads it as local-dir:; largest difference of features {_difference(encoder, stock, 'timm'):.1e}"]
    own = Encoder.from_pretrained(path)
    said.append(f"Encoder.from_pretrained: largest difference {_difference(encoder, own.module, 'nnclr'):.1e}")
    try:
        import transformers
    except ImportError:
        return [*said, "transformers is not installed, so that it loads there was not tried"]
    with _quiet():
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            wrapped = transformers.AutoModel.from_pretrained(path).eval()
            processor = transformers.AutoImageProcessor.from_pretrained(path)
        finally:
            if bars:
                transformers.utils.logging.enable_progress_bar()
    difference = _difference(encoder, lambda views: wrapped(views).pooler_output, "transformers")
    said.append(f"transformers' AutoModel loads it; largest difference of features {difference:.1e}")
    config = processor.data_config
    got = (tuple(config["input_size"][1:]), tuple(config["mean"]), tuple(config["std"]), config["crop_pct"])
    if got != ((encoder.image_size,) * 2, tuple(encoder.mean), tuple(encoder.std), encoder.crop_pct):
        raise InputError(f"transformers' AutoImageProcessor reads another preprocessing, {config}; nothing is kept")
    expected = encoder.golden_features()
    with torch.no_grad():
        found = wrapped(**processor(Image.fromarray(golden_image()), return_tensors="pt")).pooler_output[0].numpy()
    apart = float(abs(found - expected).max() / max(abs(expected).max(), 1e-12))
    said.append(f"from a picture of hard patterns through AutoImageProcessor and AutoModel: difference {apart:.1e}")
    if apart > _SEEN_DIFFERENCE:
        said.append("AutoImageProcessor rounds the size before the crop in another way; on photographs it is much less")
    return said


def _onnx(encoder: Encoder, path: Path, title: str, run: str | Path | None) -> list[str]:
    """One ONNX file with a dynamic batch; input: normalised images."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise InputError(f"export to ONNX needs {error.name}; pip install 'nnclr[onnx]'") from error
    needed = sum(value.nbytes for value in encoder.module.state_dict().values())
    if needed > _ONNX_BYTES:
        raise InputError(f"the weights take {needed / 2**30:.1f} GiB and one ONNX file holds 2; export to huggingface")
    model = _onnx_model(encoder)
    facts = {
        "preprocessing": json.dumps(encoder.preprocessing),
        "provenance": json.dumps(encoder.provenance),
        "versions": json.dumps(versions() | {"onnx": onnx.__version__}),
        "input": "images: float32 (batch, 3, size, size), RGB on 0 to 1, then minus mean and divided by std",
        "opset": str(OPSET),
    }
    onnx.helper.set_model_props(model, {f"nnclr.{name}": text for name, text in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in _BATCHES:
        views = _views(encoder, batch)
        try:
            found = torch.from_numpy(session.run(["features"], {"images": views.numpy()})[0])
        except Exception as error:
            raise InputError(
                f"onnxruntime cannot run a batch of {batch}: {first_line(error)}; nothing is kept"
            ) from error
        expected = encoder.features(views)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        cosines = nn.functional.cosine_similarity(found, expected)
        cosine = float(cosines.where(expected.norm(dim=1) > _NO_LENGTH, 1.0).min())
        if not (difference <= _LARGEST_ONNX_DIFFERENCE and cosine >= _SMALLEST_COSINE):
            raise InputError(
                f"onnxruntime's features differ by {difference:.1e} (allowed {_LARGEST_ONNX_DIFFERENCE:.0e}), cosine "
                f"{cosine:.6f}, at batch {batch}; nothing is kept"
            )
        largest = max(largest, difference)
    return [
        f"ONNX opset {OPSET}, input images (batch, 3, {encoder.image_size}, {encoder.image_size}), preprocessing in "
        f"the metadata; onnxruntime at batch {', '.join(map(str, _BATCHES))}: largest difference {largest:.1e}"
    ]


def _onnx_model(encoder: Encoder) -> Any:
    """The network as an onnx.ModelProto, without what the exporter notes of this machine."""
    example = _views(encoder, 2)
    try:
        with _quiet():
            program = torch.onnx.export(
                encoder.module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None  # it is None for the exporter of old alone
            model = program.model_proto
    except Exception as error:
        raise InputError(f"this network cannot be exported to ONNX: {first_line(error)}") from error
    graph = model.graph
    noted = [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info]
    noted += [part for function in model.functions for part in (function, *function.node, *function.value_info)]
    for part in noted:  # stack traces with the folders of this machine
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def _architecture(encoder: Encoder, library: str) -> str:
    """The bare name of the backbone, if it is a stock one."""
    backbone = str(encoder.provenance.get("backbone", f"module:{type(encoder.module).__name__}"))
    if backbone.startswith("module:") or backbone == "small-convnet":
        name = backbone.removeprefix("module:")
        raise InputError(f"{name} is no architecture of {library}; export to onnx, which holds any network")
    if isinstance(getattr(encoder.module, "maxpool", None), nn.Identity):
        raise InputError(
            f"this {backbone} has the stem for images of at most 64 pixels, which {library}'s has not; export to onnx"
        )
    return backbone.rpartition("/")[2]


def _timm_architecture(encoder: Encoder) -> str:
    import timm

    name = _architecture(encoder, "timm")
    if not timm.is_model(name):
        raise InputError(f"timm has no architecture '{name}'; export to torchvision or onnx")
    return name


def _timm_arguments(encoder: Encoder) -> dict[str, int]:
    """What timm has to be told besides the name: networks for one size, that size."""
    fixed = getattr(encoder.module, "pretrained_cfg", {}).get("fixed_input_size", False)
    return {"img_size": encoder.image_size} if fixed else {}


def _other_network(name: str, error: Exception) -> InputError:
    return InputError(
        f"timm's {name} is another network than this one ({first_line(error)}); export to torchvision or onnx"
    )


def _write_weights(module: nn.Module, path: Path) -> None:
    state = {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}
    if path.suffix in _PICKLED:
        torch.save(state, path)
    else:
        path.write_bytes(safetensors.torch.save(state, {"format": "pt"}))  # save_file lets the owner alone read


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _difference(encoder: Encoder, stock: Callable[[Tensor], Tensor], library: str) -> float:
    """The largest difference of features, in units of the largest one.

    Raises:
        InputError: if it is more than rounding.
    """
    views = _views(encoder, 2)
    expected = encoder.features(views)
    with torch.no_grad():
        found = stock(views)
    if found.shape != expected.shape:
        raise InputError(f"{library} gives features {tuple(found.shape)}, not {tuple(expected.shape)}; nothing is kept")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= _LARGEST_DIFFERENCE:
        raise InputError(f"{library}'s features differ by {difference:.1e} of the largest one; nothing is kept")
    return difference


def _views(encoder: Encoder, count: int) -> Tensor:
    """Normalised images (count, 3, s, s): the golden one, then noise."""
    size = encoder.image_size
    noise = torch.randint(0, 256, (count - 1, 3, size, size), generator=torch.Generator().manual_seed(0))
    return encoder.normalized(np.concatenate([encoder.view(golden_image())[None], noise.numpy().astype(np.uint8)]))


def _preprocessing_in_words(encoder: Encoder) -> str:
    facts = encoder.preprocessing
    return "preprocessing: " + ", ".join(f"{name} {value}" for name, value in facts.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings and log lines of other libraries, meant for their developers, do not reach the user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
