"""The trained backbone as users hold it: load, embed, save.

An encoder folder holds `config.json` and `model.safetensors` in the layout of timm's hub models, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers' `AutoModel` load it where the
backbone is a plain timm architecture. What is ours (image size, preprocessing, provenance) is in there too.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nnclr.checkpoint import write_atomically
from nnclr.data.augment import IMAGENET_MEAN, IMAGENET_STD, eval_image, normalize
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.data.source import open_source
from nnclr.errors import InputError
from nnclr.models.backbone import SMALL_IMAGE, create_backbone, feature_dim, timm_name

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


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
    """

    module: nn.Module
    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    provenance: dict[str, Any] = field(default_factory=dict)
    crop_pct: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
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

    def embed(self, data: Any, batch_size: int = 256, num_workers: int = 2) -> np.ndarray:
        """Features of all images, in evaluation mode and float32 whatever the state of the module.

        Args:
            data: anything `nnclr pretrain` takes, an array of images, or a `Source`.
            batch_size: images at a time.
            num_workers: threads that decode.

        Returns:
            (n, d) float32 in the order of the source; the row of an image that cannot be read is NaN.

        Raises:
            InputError: if the data cannot be opened.
        """
        return np.concatenate(list(self.embed_batches(open_source(data), batch_size, num_workers)))

    def embed_batches(self, source: Source, batch_size: int = 256, num_workers: int = 2) -> Iterator[np.ndarray]:
        """The rows of `embed`, (batch, d) float32 at a time."""
        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            for start in range(0, len(source), batch_size):
                rows = range(start, min(start + batch_size, len(source)))
                decoded = list(pool.map(lambda i: self._image(source, i), rows))
                readable = torch.tensor([image is not None for image in decoded])
                blank = np.zeros((3, self.image_size, self.image_size), np.uint8)
                images = torch.from_numpy(np.stack([blank if i is None else i for i in decoded])).to(self.device)
                features = self.features(normalize(images.float() / 255, self.mean, self.std)).cpu()
                features[~readable] = torch.nan
                yield features.numpy()

    @torch.no_grad()
    def features(self, views: Tensor) -> Tensor:
        """Features (n, d) float32 of normalised images (n, 3, s, s), in evaluation mode and float32."""
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                features: Tensor = self.module(views.float()).float()
                return features
        finally:
            self.module.train(was_training)

    def _image(self, source: Source, i: int) -> np.ndarray | None:
        try:
            return eval_image(source.read(i), self.image_size, self.crop_pct)
        except BadImage:
            return None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; each file is replaced as a whole.

        Raises:
            StorageError: if the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}
        write_atomically(folder / _WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
        write_atomically(folder / _CONFIG, (json.dumps(self._config(), indent=2) + "\n").encode())

    def _config(self) -> dict[str, Any]:
        backbone = str(self.provenance.get("backbone", type(self.module).__name__))
        width = feature_dim(self.module, self.image_size)
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
        model_args = {"img_size": size} if hasattr(self.module, "patch_embed") else {}
        return {
            "architecture": pretrained["architecture"],
            "model_args": model_args,
            "num_classes": 0,
            "num_features": width,
            "pretrained_cfg": pretrained,
            "nnclr": {"backbone": backbone, "image_size": size, "provenance": self.provenance},
        }

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """The encoder of a run folder, or of a folder that `save_pretrained` wrote.

        Raises:
            InputError: if there is none, or its weights do not fit its architecture.
        """
        folder = Path(path)
        if (folder / "encoder" / _CONFIG).is_file():
            folder = folder / "encoder"
        if not (folder / _CONFIG).is_file():
            raise InputError(
                f"{path} holds no encoder: name a run folder with a finished checkpoint, or a folder with "
                f"{_CONFIG} and {_WEIGHTS}"
            )
        try:
            config = json.loads((folder / _CONFIG).read_text())
            ours, pretrained = config["nnclr"], config["pretrained_cfg"]
            module = create_backbone(ours["backbone"], ours["image_size"])
            module.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS))
            encoder = cls(
                module.to(device).eval(),
                ours["image_size"],
                tuple(pretrained["mean"]),
                tuple(pretrained["std"]),
                ours["provenance"],
                float(pretrained["crop_pct"]),
                str(path),
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"the encoder in {folder} cannot be loaded: {reason}") from error
        return encoder
