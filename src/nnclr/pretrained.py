"""Encoders by name: our runs, other libraries' models, and the baselines that an encoder has to beat."""

import difflib
import os
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from nnclr.data.source import parse_query
from nnclr.encoder import Encoder
from nnclr.errors import InputError, first_line, tell
from nnclr.importers import import_checkpoint, read_checkpoint
from nnclr.models.backbone import create_backbone, without_classifier

ACCEPTED = (
    "a run or encoder folder, hf:OWNER/NAME, timm:NAME, torchvision:NAME[?weights=FILE], "
    "checkpoint:FILE?backbone=NAME[&size=224&partial=1], random:BACKBONE[?size=224], or pixels"
)

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as the Hub's files with timm's weights are called


class RawPixels(nn.Module):
    """Pixels as features: (n, 3, s, s) to (n, 3 * s * s), minus each image's mean."""

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        flat = images.flatten(1)
        return flat - flat.mean(dim=1, keepdim=True)


def open_encoder(spec: Encoder | str | Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder that a text names.

    Args:
        spec: an `Encoder` (returned as it is); a run or encoder folder; `hf:OWNER/NAME`, an encoder on the Hugging
            Face Hub; `timm:NAME`, timm's pretrained weights with their own preprocessing, also
            `timm:local-dir:FOLDER`; `torchvision:NAME`, torchvision's best weights, or those of a state-dict file by
            `?weights=FILE`; `checkpoint:FILE?backbone=NAME[&size=224&partial=1]`, another library's checkpoint;
            `random:BACKBONE[?size=224&seed=0]`, an untrained network; `pixels[?size=32]`, raw pixels.
        device: where it runs.

    Raises:
        InputError: if it is none of these, or its weights cannot be had.
    """
    if isinstance(spec, Encoder):
        return spec
    if isinstance(spec, nn.Module):
        raise InputError(
            f"a {type(spec).__name__} does not say which images it wants; use nnclr.Encoder(module, image_size=224)"
        )
    text, _, query = str(spec).partition("?")
    library, _, name = text.partition(":")
    if library == "timm" and name:
        parse_query(query, set())
        encoder = _timm(name)
    elif library == "torchvision" and name:
        encoder = _torchvision(name, **parse_query(query, {"weights"}))
    elif library == "random" and name:
        options = _numbers(query, {"size", "seed"})
        encoder = random_encoder(name, options.get("size", 224), options.get("seed", 0))
    elif library == "checkpoint" and name:
        encoder = _checkpoint(name, query)
    elif library == "hf" and name:
        parse_query(query, set())
        return Encoder.from_pretrained(text, device)
    elif text == "pixels" and not Path("pixels").exists():
        encoder = pixel_encoder(_numbers(query, {"size"}).get("size", 32))
    elif not Path(text).exists():
        raise InputError(f"no encoder is called '{spec}'; name {ACCEPTED}")
    else:
        return Encoder.from_pretrained(spec, device)
    encoder.name = str(spec)
    encoder.module.to(device)
    return encoder


def pixel_encoder(image_size: int) -> Encoder:
    """Raw pixels on the scale of 0 to 1, minus each image's mean."""
    return Encoder(RawPixels(), image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), name=f"pixels?size={image_size}")


def random_encoder(backbone: str, image_size: int, seed: int = 0) -> Encoder:
    """An untrained backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create_backbone(backbone, image_size).eval()
    name = f"random:{backbone}?size={image_size}&seed={seed}"
    return Encoder(module, image_size, provenance={"backbone": backbone}, name=name)


def baselines(encoder: Encoder, seed: int = 0) -> list[Encoder]:
    """What an encoder is measured against: its own architecture untrained, and pixels of at most 32 a side."""
    backbone = encoder.provenance.get("backbone")
    made = [pixel_encoder(min(encoder.image_size, 32))]
    if isinstance(backbone, str) and not backbone.startswith("module:"):
        made.append(random_encoder(backbone, encoder.image_size, seed))
    for baseline in made:
        baseline.module.to(encoder.device)
    return made


def _timm(name: str) -> Encoder:
    import timm

    bare = name.partition(".")[0]
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(bare):
        raise InputError(_unknown("timm", name, difflib.get_close_matches(bare, timm.list_models(), n=3)))
    try:
        _refuse_unreachable(name)
        module = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"timm:{name} cannot be loaded: {first_line(error)}") from error
    config = module.pretrained_cfg
    size, provenance = int(config["input_size"][-1]), {"backbone": f"timm/{bare}"}
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Encoder(module, size, mean, std, provenance, float(config.get("crop_pct") or 0.875))


def _refuse_unreachable(name: str) -> None:
    """Ask the Hub once for weights that are not in its cache: its library would go on asking for a minute.

    Raises:
        InputError: if nothing answers.
    """
    import huggingface_hub
    import timm

    if name.startswith("hf-hub:"):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        needed: list[tuple[str, ...]] = [("config.json",), _WEIGHTS]
    else:
        config = None if name.startswith("local-dir:") else timm.get_pretrained_cfg(name)
        repository, revision, needed = getattr(config, "hf_hub_id", None) or "", "", [_WEIGHTS]
        if not repository or "TIMM_USE_OLD_CACHE" in os.environ:
            return

    def is_kept(file: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None), str)

    if all(any(map(is_kept, files)) for files in needed):
        return
    address = huggingface_hub.hf_hub_url(repository, needed[0][0], revision=revision or None)
    try:
        huggingface_hub.get_hf_file_metadata(address)
    except huggingface_hub.errors.HfHubHTTPError:
        return  # it answers; what it lacks is for timm to find out
    except Exception as error:
        is_offline = isinstance(error, huggingface_hub.errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if is_offline else first_line(error)
        raise InputError(
            f"timm:{name} is not in the cache and the Hugging Face Hub cannot be reached ({reason}); run this once "
            f"where it can be, or copy a folder with config.json and model.safetensors of {repository} here and "
            "name timm:local-dir:FOLDER"
        ) from error


def _torchvision(name: str, weights: str | None = None) -> Encoder:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise InputError(_unknown("torchvision", name, difflib.get_close_matches(name, known, n=3)))
    provenance = {"backbone": f"torchvision/{name}"}
    try:
        if weights is None:
            chosen = models.get_model_weights(name)["DEFAULT"]
            module, transform = models.get_model(name, weights=chosen), chosen.transforms()
            size, short = int(transform.crop_size[0]), int(transform.resize_size[0])
            encoder = Encoder(module, size, tuple(transform.mean), tuple(transform.std), provenance, size / short)
        else:
            module = models.get_model(name, weights=None)
            missing, unexpected = module.load_state_dict(read_checkpoint(Path(weights)), strict=False)
            wrong = [key for key in missing if not key.startswith(("fc.", "classifier.", "head"))] + unexpected
            if wrong:
                raise InputError(f"{weights} does not fit torchvision's {name}: {wrong[0]} is missing or unknown")
            encoder = Encoder(module, 224, provenance=provenance)
    except InputError:
        raise
    except URLError as error:
        raise InputError(
            f"torchvision:{name} is not in the cache and its weights cannot be fetched ({error.reason}); run this once "
            f"where they can be, or name torchvision:{name}?weights=FILE"
        ) from error
    except Exception as error:
        raise InputError(f"torchvision:{name} cannot be loaded: {first_line(error)}") from error
    encoder.module = without_classifier(module, name).eval()
    return encoder


def _checkpoint(path: str, query: str) -> Encoder:
    given = parse_query(query, {"backbone", "size", "partial"})
    backbone = given.pop("backbone", None)
    if not backbone:
        raise InputError(f"checkpoint:{path} needs its architecture: checkpoint:{path}?backbone=NAME")
    options = _numbers("&".join(f"{name}={value}" for name, value in given.items()), {"size", "partial"})
    # Standard output may be for a record; what was recognised and left out is for people.
    return import_checkpoint(
        path,
        backbone,
        options.get("size", 224),
        bool(options.get("partial", 0)),
        tell,
    )


def _unknown(library: str, name: str, near: list[str]) -> str:
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"{library} has no model '{name}'{hint}"


def _numbers(query: str, known: set[str]) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in parse_query(query, known).items()}
    except ValueError as error:
        raise InputError(f"'{query}' after the ? must hold whole numbers") from error
