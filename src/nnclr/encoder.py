"""The trained backbone as users hold it: load, embed, save, push.

An encoder folder holds `config.json` and `model.safetensors` in the layout of timm's hub models, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers' `AutoModel` load it where the
backbone is a plain timm architecture. What is ours (image size, preprocessing, provenance) is in there too,
and a golden vector: features of one synthetic picture, with which loading proves that preprocessing and weights
are those that were saved. It lies in the metadata of the weights, so that no kill can part it from them.
"""

import copy
import hashlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nnclr import distributed
from nnclr.checkpoint import write_atomically
from nnclr.data.ahead import Threads, threads_for
from nnclr.data.augment import IMAGENET_MEAN, IMAGENET_STD, eval_image, normalize
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.data.pictures import paths_of_pictures
from nnclr.data.source import open_source
from nnclr.errors import InputError
from nnclr.exact import exact_float32, repeatable_convolutions
from nnclr.golden import compare, golden_image, sample, stored_golden, with_golden
from nnclr.model_card import model_card, without_paths
from nnclr.models.backbone import SMALL_IMAGE, create_backbone, evaluation_mode, feature_dim, timm_name

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"
_LARGEST_SIDE = 2048  # pixels of an image that a config may ask for
_LARGEST_HEADER = 2 << 20  # bytes of a weights file; a network of thousands of tensors has a tenth of it
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class Encoder:
    """A backbone with its preprocessing: images in, one feature vector an image out.

    Args:
        module: any module that maps (n, 3, image_size, image_size) to (n, d).
        image_size: pixels.
        mean: of the input normalisation, per channel, on the scale of 0 to 1.
        std: of the input normalisation.
        provenance: where the weights come from: backbone name, run, step, data.
        crop_pct: the shorter side is resized to image_size / crop_pct and the centre is cut out; default 1 up to
            64 pixels and 224/256 above.
        name: how it was asked for; empty for a module of your own.

    Raises:
        InputError: if the module is none, or the normalisation cannot be computed.
    """

    module: nn.Module = field(repr=False)
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    provenance: dict[str, Any] = field(default_factory=dict)
    crop_pct: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise InputError(f"an encoder holds a network, not {self.module!r}; open_encoder takes names of encoders")
        if self.image_size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"image_size={self.image_size} must be above 0, and mean={self.mean} and std={self.std} three numbers "
                "each, those of std above 0"
            )
        if self.crop_pct is None:
            self.crop_pct = 1.0 if self.image_size <= SMALL_IMAGE else 0.875

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image before the module sees it."""
        return {
            "image_size": self.image_size,
            "crop_pct": self.crop_pct,
            "interpolation": "bicubic",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def device(self) -> torch.device:
        """Where the module's weights are."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and values of all weights, hex."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(name.encode() + str(value.dtype).encode() + str(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def embed(self, data: Any, batch_size: int = 256, num_workers: int | None = None) -> np.ndarray:
        """Features of all images, in evaluation mode and float32 whatever the state of the module.

        Args:
            data: anything `nnclr pretrain` takes, an array of images, Pillow images, a `Source`; also the path of a
                picture, or a list of them.
            batch_size: images at a time.
            num_workers: threads that decode; None for one a core, up to eight.

        Returns:
            (n, d) float32 in the order of the source; the row of an image that cannot be read is NaN.

        Raises:
            InputError: if the data cannot be opened.
        """
        source = open_source(data if (path := paths_of_pictures([data])) is None else path)
        return np.concatenate(list(self.embed_batches(source, batch_size, num_workers)))

    def embed_batches(
        self, source: Source, batch_size: int = 256, num_workers: int | None = None, together: bool = False
    ) -> Iterator[np.ndarray]:
        """The rows of `embed`, (batch, d) float32 at a time.

        Args:
            source: the images.
            batch_size: images at a time.
            num_workers: threads that decode; None for one a core, up to eight.
            together: all ranks of the job call this; each computes its share of the same batches, and yields all.
        """
        rank, ranks = (distributed.rank(), distributed.world_size()) if together else (0, 1)
        starts = [first + rank * batch_size for first in range(0, len(source), ranks * batch_size)]
        shares = [range(start, min(start + batch_size, len(source))) for start in starts]
        with Threads(threads_for(num_workers)) as pool:
            for views in pool.map_batches(lambda i: self._view_of(source, i), shares):
                features = self.embed_views(views) if views else None  # the last batches may be fewer than the ranks
                if together:
                    yield from distributed.all_arrays(features)
                elif features is not None:
                    yield features

    def view(self, image: np.ndarray) -> np.ndarray:
        """What the module sees of an image (h, w, 3) uint8 of any size, before it is normalised: (3, s, s) uint8."""
        return eval_image(image, self.image_size, self.crop_pct)

    def normalized(self, views: np.ndarray) -> Tensor:
        """Views (n, 3, s, s) uint8 as the module takes them, float32 where the module is."""
        return normalize(torch.from_numpy(views).to(self.device).float() / 255, self.mean, self.std)

    def embed_views(self, views: Sequence[np.ndarray | None]) -> np.ndarray:
        """Features (n, d) float32 of views, each (3, s, s) uint8; the row of None is NaN.

        A blank stands in for None, so that a batch keeps its size, and each other row its exact value.
        """
        blank = np.zeros((3, self.image_size, self.image_size), np.uint8)
        filled = np.stack([blank if view is None else view for view in views])
        features: np.ndarray = self.features(self.normalized(filled)).cpu().numpy()
        features[[view is None for view in views]] = np.nan
        return features

    @torch.no_grad()
    def features(self, views: Tensor) -> Tensor:
        """Features (n, d) float32 of normalised images (n, 3, s, s), in evaluation mode and float32."""
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.module))
            if self.device.type != "cpu":
                stack.enter_context(exact_float32(self.device))
                stack.enter_context(repeatable_convolutions())
            elif torch.is_autocast_enabled("cpu"):
                # Only where it is on: who leaves a context of autocast drops the casts of all threads. This may be the
                # thread that writes a checkpoint, whose encoder is on the CPU: a training step would cast its weights
                # again, and add up gradients in another precision.
                stack.enter_context(torch.autocast("cpu", enabled=False))
            features: Tensor = self.module(views.float()).float()
            return features

    def _view_of(self, source: Source, i: int) -> np.ndarray | None:
        try:
            return self.view(source.read(i))
        except BadImage:
            return None

    def golden_features(self) -> np.ndarray:
        """Features (d,) float32 of `golden_image`, through the whole preprocessing, on the CPU.

        Always on the CPU, because convolutions on a GPU round to TF32 unless they are told not to.
        """
        encoder = self if self.device.type == "cpu" else replace(self, module=on_cpu(self.module))
        features: np.ndarray = encoder.embed_views([encoder.view(golden_image())])[0]
        return features

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; each file is replaced as a whole.

        Raises:
            StorageError: if the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        width = feature_dim(self.module, self.image_size)
        # Copies, because the file format has no two names for one tensor.
        weights = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in self.module.state_dict().items()}
        content = safetensors.torch.save(weights, {"format": "pt"})
        golden = self.golden_features()
        if np.isfinite(golden).all():
            content = with_golden(content, golden)
        write_atomically(folder / _WEIGHTS, content)
        write_atomically(folder / _CONFIG, (json.dumps(self._config(width), indent=2) + "\n").encode())

    def push_to_hub(
        self, repo_id: str, private: bool = False, token: str | None = None, run: str | Path | None = None
    ) -> str:
        """Upload the encoder with a model card to the Hugging Face Hub.

        Args:
            repo_id: `owner/name`; made if it is not there.
            private: whether a new repository can be seen by its owner alone.
            token: of the Hub; default the one that `hf auth login` stored.
            run: the run folder whose configuration and evaluations the card lists.

        Returns:
            The address of the repository.

        Raises:
            InputError: if the name is none, or the Hub refuses or cannot be reached.
        """
        import huggingface_hub

        if not _HUB_NAME.fullmatch(repo_id):
            raise InputError(f"'{repo_id}' is no name on the Hugging Face Hub; it has the form owner/name")
        with tempfile.TemporaryDirectory() as folder:
            self.save_with_card(folder, repo_id, run)
            try:
                made = huggingface_hub.HfApi().create_repo(repo_id, token=token, private=private, exist_ok=True)
                huggingface_hub.HfApi().upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message="Encoder, preprocessing, card", token=token
                )
            except Exception as error:
                raise InputError(f"{repo_id} cannot be pushed to the Hugging Face Hub: {_reason(error)}") from error
        return str(made)

    def save_with_card(self, folder: str | Path, title: str, run: str | Path | None = None) -> None:
        """`save_pretrained` for others: with a model card, README.md, and without paths of this machine.

        Raises:
            InputError: if `run` is no run folder.
            StorageError: if the folder cannot be written.
        """
        shared = replace(self, provenance=without_paths(self.provenance))
        shared.save_pretrained(folder)
        config = json.loads((Path(folder) / _CONFIG).read_text())
        write_atomically(Path(folder) / _CARD, model_card(title, config, self.preprocessing, run).encode())

    def _config(self, width: int) -> dict[str, Any]:
        backbone = str(self.provenance.get("backbone", type(self.module).__name__))
        size = self.image_size
        pretrained = {
            "architecture": timm_name(backbone) or backbone,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            "mean": list(self.mean),
            "std": list(self.std),
            "num_classes": 0,
            "pool_size": None,
            "classifier": None,
            "license": None,
            "tag": "nnclr",
        }
        # Vision transformers are built for one size; without it the weights would not fit.
        fixed = getattr(self.module, "pretrained_cfg", {}).get("fixed_input_size", False)
        model_args = {"img_size": size} if fixed else {}
        return {
            "architecture": pretrained["architecture"],
            "model_args": model_args,
            "num_classes": 0,
            "num_features": width,
            "pretrained_cfg": pretrained,
            "nnclr": {"backbone": backbone, "image_size": size, "provenance": self.provenance},
        }

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", module: nn.Module | None = None
    ) -> Self:
        """The encoder of a run folder, of a folder that `save_pretrained` wrote, or of the Hugging Face Hub.

        The features of a synthetic picture are compared with those that were stored with the weights, so that another
        preprocessing or other weights than those that were saved are noticed.

        Args:
            path: a folder, `owner/name` or `hf:owner/name` (which is never taken for a folder). From the Hub only
                config.json and model.safetensors are fetched; code never is. A model that timm wrote loads too.
            device: where it runs.
            module: the network itself, for an encoder of a module of your own; a file cannot name code to run.

        Raises:
            InputError: if there is none, its weights do not fit its architecture, or its features are not those
                that were saved.
        """
        name = _hub_name(path)
        folder = Path(path) if name is None else _download(name)
        if (folder / "encoder" / _CONFIG).is_file():
            folder = folder / "encoder"
        if not (folder / _CONFIG).is_file():
            raise InputError(
                f"{path} holds no encoder: name a run folder with a finished checkpoint, or a folder with "
                f"{_CONFIG} and {_WEIGHTS}, or owner/name on the Hugging Face Hub"
            )
        if not (folder / _WEIGHTS).is_file():
            raise InputError(
                f"{path} holds no {_WEIGHTS}, and weights in other files are not read here; "
                "checkpoint:FILE?backbone=NAME imports them"
            )
        try:
            config = json.loads((folder / _CONFIG).read_text())
            network, settings = _read(config, folder / _WEIGHTS, module)
            encoder = cls(network.eval(), name=str(path) if name is None else f"hf:{name}", **settings)
            stored = stored_golden(folder / _WEIGHTS)
            found = None if stored is None else sample(encoder.golden_features())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
                safetensors.SafetensorError) as error:  # fmt: skip
            raise InputError(f"the encoder in {path} cannot be loaded: {_reason(error)}") from error
        if stored is not None and found is not None:
            compare(found, stored, str(path))
        elif "nnclr" in config:
            warnings.warn(
                f"{path} was saved without a golden vector: that preprocessing and weights belong together "
                "cannot be verified",
                stacklevel=2,
            )
        encoder.module.to(device)
        return encoder


def on_cpu(module: nn.Module) -> nn.Module:
    """A copy on the CPU that needs no room on the device."""
    moved: dict[int, Any] = {id(p): nn.Parameter(p.detach().cpu(), p.requires_grad) for p in module.parameters()}
    moved |= {id(buffer): buffer.detach().cpu() for buffer in module.buffers()}
    return copy.deepcopy(module, moved).cpu()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a header of a million names is refused before it takes memory.

    Raises:
        ValueError, OSError or safetensors.SafetensorError: if it is none, or damaged.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ValueError(f"{path.name} says that its header has {length} bytes, and that of a network has fewer")
    return safetensors.torch.load_file(path)


def _read(config: dict[str, Any], weights: Path, module: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of an encoder folder, and the other arguments of its `Encoder`.

    What the file says is data: a backbone is looked up among the known architectures and never imported.
    """
    pretrained = config.get("pretrained_cfg", config)
    ours = config.get("nnclr") or _ours_of_timm(config, pretrained)
    backbone, size = ours["backbone"], ours["image_size"]
    mean, std, crop_pct = tuple(pretrained["mean"]), tuple(pretrained["std"]), pretrained["crop_pct"]
    numbers = [*mean, *std, crop_pct]
    if len(mean) != 3 or len(std) != 3 or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"mean, std and crop_pct in {_CONFIG} must be three, three and one number")
    if type(size) is not int or not 0 < size <= _LARGEST_SIDE or min(*std, crop_pct) <= 0:
        raise ValueError(f"image size, std and crop_pct in {_CONFIG} must be above 0, and the size whole")
    if pretrained["input_size"] != [3, size, size]:
        raise ValueError(f"{_CONFIG} gives two image sizes, {size} and {pretrained['input_size']}")
    if "nnclr" in config and (pretrained["interpolation"], pretrained["crop_mode"]) != ("bicubic", "center"):
        raise ValueError(f"its preprocessing was bicubic with a centre crop, and {_CONFIG} gives another one")
    if not isinstance(backbone, str):
        raise ValueError(f"the backbone in {_CONFIG} is no name")
    if backbone.startswith("module:") and module is None:
        raise ValueError(f"its backbone is a module of your own, {backbone[7:]}: build it and give it as module=...")
    state = read_weights(weights)
    if "nnclr" not in config:
        classifiers = pretrained.get("classifier") or []
        heads = tuple(f"{c}." for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
    network = create_backbone(backbone, size) if module is None else module
    network.load_state_dict(state)
    pool = getattr(network, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    if "nnclr" not in config and isinstance(pool, str) and config.get("global_pool", pool) != pool:
        raise ValueError(f"{_CONFIG} pools by {config['global_pool']} where timm's {backbone[5:]} does by {pool}")
    settings = {"image_size": size, "mean": mean, "std": std, "crop_pct": float(crop_pct)}
    return network, settings | {"provenance": ours["provenance"]}


def _ours_of_timm(config: dict[str, Any], pretrained: dict[str, Any]) -> dict[str, Any]:
    """What we need to know of a model that timm or transformers saved."""
    import timm

    arguments = dict(config.get("model_args") or {})
    if not timm.is_model(str(config["architecture"])):
        raise ValueError(f"timm has no architecture '{config['architecture']}'")
    # These change nothing: the size is read elsewhere, the classifier is taken off, the others are written always.
    stock = {"in_chans": 3, "global_pool": config.get("global_pool")}
    set_otherwise = [
        name
        for name, value in arguments.items()
        if name not in ("img_size", "num_classes") and (name not in stock or value != stock[name])
    ]
    if set_otherwise:
        raise ValueError(
            f"{_CONFIG} sets {', '.join(set_otherwise)} for timm's model; open it by timm:local-dir:FOLDER or "
            "timm:hf-hub:OWNER/NAME"
        )
    if pretrained.get("interpolation", "bicubic") != "bicubic" or pretrained.get("crop_mode", "center") != "center":
        warnings.warn(
            f"the model was trained with {pretrained.get('interpolation')} resizing and crop mode "
            f"{pretrained.get('crop_mode')}; here images are resized bicubically and the centre is cut out",
            stacklevel=4,
        )
    backbone = f"timm/{config['architecture']}"
    return {"backbone": backbone, "image_size": pretrained["input_size"][-1], "provenance": {"backbone": backbone}}


def _hub_name(path: str | Path) -> str | None:
    """`owner/name` if the Hub is meant. A folder, or a mistyped name inside a folder that is there, never is."""
    text = str(path)
    if text.startswith("hf:"):
        if not _HUB_NAME.fullmatch(text[3:]):
            raise InputError(f"'{text}' is no name on the Hugging Face Hub; it has the form hf:owner/name")
        return text[3:]
    is_name = isinstance(path, str) and _HUB_NAME.fullmatch(path) is not None
    return text if is_name and not Path(text).exists() and not Path(text).parent.exists() else None


def _download(name: str) -> Path:
    """Config and weights of a model on the Hub, of one commit, in the Hub's own cache; nothing else is fetched."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
    except errors.RepositoryNotFoundError as error:
        reason = "there is no such model, or it is private (log in by `hf auth login`)"
        raise InputError(f"{name} is neither a folder here nor a model on the Hugging Face Hub: {reason}") from error
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise InputError(
            f"{name} is neither a folder here nor in the cache, and the Hugging Face Hub cannot be reached"
        ) from error
    except Exception as error:
        raise InputError(f"{name} cannot be had from the Hugging Face Hub: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    # load_state_dict's second line tells which weight does not fit
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or type(error).__name__
