"""`nnclr verify`: whether every file of a run folder is what was written. It reads everything and writes nothing."""

import json
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from PIL import Image

from nnclr import checkpoint
from nnclr.data.images import shown
from nnclr.embed import damaged_parts
from nnclr.embeddings import open_embeddings
from nnclr.encoder import Encoder
from nnclr.errors import InputError, NoCheckpointError, StorageError, first_line
from nnclr.run_folder import read_lines

Finding = tuple[str, str | None]  # a name within the run folder, and what is wrong with it
_READ = 1 << 20  # bytes at a time
_UNFINISHED = re.compile(r"\.tmp-|\.lock$")
_PARTS = re.compile(r"\..+\.parts")


def verify(run: str | Path, say: Callable[[str], None] = print) -> None:
    """Say of every file of a run folder whether it is as it was written, one line each.

    Checkpoints are compared with their SHA-256, the encoder with the checkpoint of its step and with its golden
    vector; other files are read in their format.

    Args:
        run: the folder; another process may be training in it.
        say: takes the lines.

    Raises:
        InputError: if it is no run folder.
        NoCheckpointError: if there are checkpoints and none of them can be used.
        StorageError: if something else is damaged.
    """
    run = Path(run)
    if not (run / "config.toml").is_file() and not (run / "checkpoints").is_dir():
        raise InputError(f"{shown(run)} is no run folder; name the folder that nnclr pretrain --out made")
    newest, usable, damaged = None, 0, []
    for name, trouble in _findings(run):
        say(f"ok       {name}" if trouble is None else f"damaged  {name}: {trouble}")
        if trouble is not None:
            damaged.append(name)
        elif name.startswith("checkpoints/"):
            newest, usable = newest or name, usable + 1
    if damaged and usable == 0 and any(name.startswith("checkpoints/") for name in damaged):
        raise NoCheckpointError(
            f"no checkpoint in {shown(run)} can be used: restore one from a copy, or choose another --out"
        )
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        after = f"; the next start goes on from {newest}" if newest else ""
        raise StorageError(f"damaged in {shown(run)}: {damaged[0]}{more}{after}")


def _findings(run: Path) -> Iterator[Finding]:
    """What matters most comes first: the settings, the checkpoints from the newest on, the encoder, the rest."""
    yield "config.toml", _trouble(_toml, run / "config.toml")
    for path in checkpoint.committed(run / "checkpoints"):
        trouble = checkpoint.problem(path)
        if path.exists():  # a run that is going on has deleted it meanwhile
            yield f"checkpoints/{path.name}", trouble
    if (run / "encoder").is_dir():
        yield "encoder", _trouble(_encoder, run)
    for path in sorted(run.rglob("*")):
        inner = path.relative_to(run)
        if path.is_dir():
            if _PARTS.fullmatch(path.name):
                yield from ((shown(part.relative_to(run)), trouble) for part, trouble in damaged_parts(path))
        elif not _seen(inner):
            trouble = _trouble(_reader(path), path)
            if path.exists():
                yield shown(inner), trouble


def _seen(inner: Path) -> bool:
    """Whether a file is judged elsewhere, or is what an unfinished write left, which no reader looks at."""
    folder = inner.parts[0]
    return (
        inner == Path("config.toml")
        or folder == "encoder"
        or (folder == "checkpoints" and len(inner.parts) > 1 and inner.parts[1].startswith("step-"))
        or any(_UNFINISHED.match(part) or _PARTS.fullmatch(part) for part in inner.parts)
    )


def _trouble(read: Callable[[Path], str | None], path: Path) -> str | None:
    try:
        return read(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename or path).name} is missing"
    except (OSError, ValueError, SyntaxError, LookupError, RecursionError, RuntimeError, InputError,
            safetensors.SafetensorError) as error:  # fmt: skip
        return f"it cannot be read ({first_line(error)})"


def _reader(path: Path) -> Callable[[Path], str | None]:
    readers = {".toml": _toml, ".json": _json, ".jsonl": _lines, ".png": _picture, ".html": _page}
    return readers.get(path.suffix, _embeddings if path.suffix in (".parquet", ".npy") else _bytes)


def _toml(path: Path) -> None:
    tomllib.loads(path.read_bytes().decode())


def _json(path: Path) -> None:
    json.loads(path.read_bytes())


def _lines(path: Path) -> str | None:
    path.read_bytes()  # where it cannot be read at all, this says why
    lines, bad = read_lines(path)
    return f"{bad} of {len(lines) + bad} lines cannot be read; the next start drops them" if bad else None


def _picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _page(path: Path) -> str | None:
    return None if path.read_bytes().rstrip().endswith(b"</html>") else "its end is missing"


def _embeddings(path: Path) -> None:
    open_embeddings(path, verify=True)


def _bytes(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(_READ):
            pass


def _encoder(run: Path) -> str | None:
    """The bits of its weights where the checkpoint of its step is there, and the features that were saved with it."""
    folder = run / "encoder"
    config = json.loads((folder / "config.json").read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    source = run / "checkpoints" / f"step-{config['nnclr']['provenance']['step']:08d}"
    if checkpoint.problem(source) is None:
        state = safetensors.torch.load_file(source / "tensors.safetensors")
        for name, value in weights.items():
            saved = state.get(f"backbone.{name}", value)
            if saved.shape != value.shape or not torch.equal(saved, value):
                return f"{name} is not that of {source.name}; the next checkpoint writes it anew"
    if not config["nnclr"]["backbone"].startswith("module:"):  # a network of one's own cannot be built from a file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Encoder.from_pretrained(folder)
    return None
