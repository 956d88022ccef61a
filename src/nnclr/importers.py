"""Checkpoints of other libraries to an `Encoder`: torchvision, timm, solo-learn, lightly, MoCo, DINO, BYOL.

A checkpoint is someone else's file. It is read by torch's weights-only loader or by safetensors, so that nothing in it
runs; there is no other way in.
"""

import argparse
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnclr.encoder import Encoder, read_weights
from nnclr.errors import InputError
from nnclr.models.backbone import create_backbone

# Where a library keeps the backbone, by the prefix of its keys. Momentum copies have prefixes that are not here.
_PREFIXES = {
    "": "plain torchvision or timm",
    "module.": "plain, saved from DataParallel",
    "backbone.": "solo-learn or lightly",
    "module.backbone.": "DINO",
    "encoder.": "solo-learn's older form",
    "model.": "Lightning module around a model",
    "model.backbone.": "Lightning module around a backbone",
    "module.encoder_q.": "MoCo v1 or v2",
    "encoder_q.": "MoCo v1 or v2",
    "module.base_encoder.": "MoCo v3",
    "base_encoder.": "MoCo v3",
    "module.encoder.": "SimSiam or SwAV",
    "online_encoder.": "BYOL",
    "online_encoder.net.": "BYOL",
    "online_network.": "BYOL",
    "online_network.backbone.": "BYOL",
    "student_backbone.": "lightly's DINO, the student",
    "teacher_backbone.": "lightly's DINO, the teacher",
    "teacher.backbone.": "DINO inside a Lightning module",
}
# Dictionaries that hold the weights, in the order of preference: DINO's teacher is the network that is used.
_WRAPPERS = ("state_dict", "model", "teacher", "student", "model_state_dict", "online", "target", "net")
_HEADS = re.compile(
    r"(fc|classifiers?|head|heads|head_dist|linear|last_linear|aux\w*|AuxLogits|proj\w*|pred\w*|prototypes?|queue\w*|"
    r"momentum\w*|\w+_momentum|mlp|norm_pre_head)(\.|$)"
)
_SHOWN = 5  # keys of each kind in a message


@dataclass(frozen=True)
class _Match:
    """One reading of a checkpoint against a backbone."""

    layout: str
    used: dict[str, Tensor]  # by the backbone's names
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]  # name, expected and found shape, in words
    left_out: list[str]  # heads, queues, copies: by the checkpoint's names


def import_checkpoint(
    path: str | Path,
    backbone: str,
    image_size: int = 224,
    partial: bool = False,
    say: Callable[[str], None] = print,
) -> Encoder:
    """Another library's checkpoint as an encoder.

    Args:
        path: `.safetensors`, or any suffix for a file of `torch.save`.
        backbone: the architecture: `resnet50`, `timm/NAME`, `torchvision/NAME`, ...
        image_size: pixels; up to 64 a ResNet has the small-image stem.
        partial: take what fits and leave the rest random, saying what; else anything missing, unexpected or of
            another shape is an error.
        say: is told what was recognised, used and left out, and that the preprocessing is assumed.

    Raises:
        InputError: if the file cannot be read without running code from it, or does not fit.
    """
    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what a partial checkpoint leaves random is the same at every opening
        module = create_backbone(backbone, image_size)
    match = _best_match(_state_dicts(read_checkpoint(path)), module, path)
    problems = _problems(match)
    if problems and not partial:
        raise InputError(
            f"{path} ({match.layout}) does not fit {backbone} at {image_size} pixels: {'; '.join(problems)}"
            f"{_hint(match)}; partial=1 takes what fits"
        )
    if not match.used:
        raise InputError(f"{path} holds nothing that fits {backbone}: {'; '.join(problems)}")
    for name, value in match.used.items():
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite; the checkpoint is broken")
    module.load_state_dict(match.used, strict=False)
    say(f"{path.name}: {match.layout}, {len(match.used)} of {len(module.state_dict())} keys of {backbone} used")
    if match.left_out:
        say(f"left out: {_grouped(match.left_out)}")
    for problem in problems:
        say(f"warning: {problem}")
    random = match.missing + [text.partition(" ")[0] for text in match.misshaped]
    if random:
        say(f"warning: these stay random: {', '.join(random)}")
    say("warning: the file tells no preprocessing; ImageNet's mean and std are assumed, change them if it had others")
    name = f"checkpoint:{path}?backbone={backbone}&size={image_size}" + ("&partial=1" if partial else "")
    provenance = {"backbone": backbone, "checkpoint": path.name, "layout": match.layout}
    return Encoder(module.eval(), image_size, provenance=provenance, name=name)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, read without running anything from it.

    Raises:
        InputError: if it is no checkpoint, is damaged, or needs code to be read.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(read_weights(path))
        _refuse_bomb(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # a bag of settings, in many checkpoints
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise InputError(
                f"{path} needs code to be read, {refused[1]}, and was refused: only weights are read. If you trust its "
                "source, save its state_dict alone where it was made, best as .safetensors"
            ) from error
        if type(error).__name__ == "UnpicklingError":
            raise InputError(f"{path} was not written by torch.save, or is damaged") from error
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(f"{path} is no checkpoint that can be read, or is damaged: {reason}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not a dictionary of weights")
    return loaded


def _refuse_bomb(path: Path) -> None:
    """Raise a ValueError for a zip file that unpacks to more than itself: torch.save stores tensors as they are."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked >> 20} MiB, and torch.save does not compress")


def _state_dicts(loaded: dict[str, Any], depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The dictionaries of plain tensors in a checkpoint, with a word on where; the preferred ones first."""
    for name in _WRAPPERS:
        inner = loaded.get(name)
        if isinstance(inner, dict) and depth:  # a hostile file can hold a dictionary that holds itself
            for where, found in _state_dicts(inner, depth - 1):
                yield f" in {name}{where}", found
    tensors = {
        key: value
        for key, value in loaded.items()
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
    }
    if tensors:
        yield "", tensors


def _best_match(found: Iterator[tuple[str, dict[str, Tensor]]], module: nn.Module, path: Path) -> _Match:
    """The reading that fills most of the backbone, the earlier one where two do."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    children = {str(number): name for number, (name, _) in enumerate(module.named_children())}
    matches = []
    for where, tensors in found:
        for prefix, library in _PREFIXES.items():
            if prefix and not any(key.startswith(prefix) for key in tensors):
                continue
            matches.append(_match(tensors, prefix, library + where, expected, {}))
            # lightly's nn.Sequential(*list(resnet.children())[:-1]) has numbers where the network has names
            matches.append(_match(tensors, prefix, f"lightly's nn.Sequential{where}", expected, children))
    if not matches:
        raise InputError(f"{path} holds no weights: no dictionary of tensors is in it")
    return max(matches, key=lambda match: len(match.used) + len(match.misshaped) / 2 - len(match.unexpected) / 1e6)


def _match(
    tensors: dict[str, Tensor], prefix: str, layout: str, expected: dict[str, tuple[int, ...]], names: dict[str, str]
) -> _Match:
    used: dict[str, Tensor] = {}
    unexpected: list[str] = []
    misshaped: list[str] = []
    left_out: list[str] = []
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if names:
            first, _, rest = name.partition(".")
            name = f"{names.get(first, first)}.{rest}"
        if not key.startswith(prefix):
            left_out.append(key)
        elif name not in expected:
            (left_out if _HEADS.match(name) else unexpected).append(key)
        elif tuple(value.shape) != expected[name]:
            misshaped.append(f"{name} (expected {list(expected[name])}, found {list(value.shape)})")
        else:
            used[name] = value
    wrong = {text.partition(" ")[0] for text in misshaped}
    # Counters of batches are absent from old files and play no part in features.
    missing = [name for name in expected if name not in used and name not in wrong and "num_batches" not in name]
    return _Match(layout, used, missing, unexpected, misshaped, left_out)


def _problems(match: _Match) -> list[str]:
    """What does not fit, a phrase a kind."""
    kinds = (("missing", match.missing), ("unexpected", match.unexpected), ("of another shape", match.misshaped))
    return [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for kind, names in kinds
        if names
    ]


def _hint(match: _Match) -> str:
    """What to do about the commonest misfits."""
    for text in match.misshaped:
        if text.startswith("conv1.weight") and "[64, 3, 3, 3]" in text:
            small = text.endswith("found [64, 3, 3, 3])")
            return "; its stem is that of small images: give a size of at most 64" if small else "; give a larger size"
        if text.startswith("pos_embed"):
            return "; it was trained at another image size: give that"
    return ""


def _grouped(keys: list[str]) -> str:
    """`projector (6), queue (1)` for many keys, by the words before the last one."""
    words = [key.removeprefix("module.").split(".") for key in keys]
    counts = Counter(".".join(parts[: max(1, min(2, len(parts) - 1))]) for parts in words)
    if len(counts) > 2 * _SHOWN:
        counts = Counter(parts[0] for parts in words)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
