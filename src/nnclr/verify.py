"""`nnclr verify`: whether every file of a run folder is what was written. It reads everything and writes nothing."""

import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from PIL import Image

from nnclr import checkpoint
from nnclr.bounded_toml import parse_toml
from nnclr.data.images import shown
from nnclr.embed import damaged_parts
from nnclr.embeddings import companions, open_embeddings
from nnclr.encoder import Encoder, read_weights
from nnclr.errors import InputError, NoCheckpointError, StorageError, first_line

_READ = 1 << 20  # bytes at a time
_PAUSE = 0.5  # seconds; a run that is going on replaces the encoder's two files in less
_UNFINISHED = re.compile(r"\.tmp-|\.lock$")
_LARGEST_TEXT = 1 << 20  # bytes of a checkpoint's JSON files
_PARTS = re.compile(r"\..+\.parts")


class Finding(NamedTuple):
    """What is said of one name within the run folder."""

    verdict: str  # ok, damaged, or skipped: it is no file and was not read
    name: str
    words: str = ""


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
    for verdict, name, words in _findings(run):
        say(f"{verdict:8} {name}" + (f": {words}" if words else ""))
        if verdict == "damaged":
            damaged.append(name)
        elif name.startswith("checkpoints/step-"):
            newest, usable = newest or name, usable + 1
    if damaged and usable == 0 and any(name.startswith("checkpoints/step-") for name in damaged):
        raise NoCheckpointError(
            f"no checkpoint in {shown(run)} can be used: restore one from a copy, or choose another --out"
        )
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        after = f"; the next start goes on from {newest}" if newest else ""
        raise StorageError(f"damaged in {shown(run)}: {damaged[0]}{more}{after}")


def _findings(run: Path) -> Iterator[Finding]:
    """What matters most comes first: the settings, the checkpoints from the newest on, the encoder, the rest."""
    yield _judged("config.toml", _trouble(_config, run / "config.toml"))
    for path in checkpoint.committed(run / "checkpoints"):
        trouble = _trouble(_checkpoint, path)
        if path.exists():  # a run that is going on has deleted it meanwhile
            yield _judged(f"checkpoints/{path.name}", trouble)
    if (run / "encoder").is_dir():
        yield _judged("encoder", _encoder_trouble(run))
    for path in sorted(run.rglob("*")):
        name = shown(path.relative_to(run))
        if path.is_dir() and _PARTS.fullmatch(path.name):
            yield from _parts(run, path)
        elif _seen(path.relative_to(run)) or (path.is_dir() and not path.is_symlink()):
            continue
        elif path.is_symlink() or _is_special(path):
            yield Finding("skipped", name, "it is a link" if path.is_symlink() else "it is no regular file")
        else:
            finding = _log(name, path) if path.suffix == ".jsonl" else _judged(name, _trouble(_reader(path), path))
            if path.exists():
                yield finding


def _judged(name: str, trouble: str | None) -> Finding:
    return Finding("ok", name) if trouble is None else Finding("damaged", name, trouble)


def _seen(inner: Path) -> bool:
    """Whether a file is judged elsewhere, or is what an unfinished write left, which no reader looks at."""
    folder = inner.parts[0]
    return (
        inner in (Path("config.toml"), Path("checkpoints"))
        or folder == "encoder"
        or (folder == "checkpoints" and len(inner.parts) > 1 and inner.parts[1].startswith("step-"))
        or any(_UNFINISHED.match(part) or _PARTS.fullmatch(part) for part in inner.parts)
    )


def _trouble(read: Callable[[Path], str | None], path: Path) -> str | None:
    try:
        return read(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename or path).name} is missing"
    except (OSError, ValueError, TypeError, SyntaxError, LookupError, RuntimeError, InputError,
            safetensors.SafetensorError) as error:  # fmt: skip
        return f"it cannot be read ({first_line(error)})"


def _reader(path: Path) -> Callable[[Path], str | None]:
    readers = {".toml": _toml, ".json": _json, ".png": _picture, ".html": _page}
    return readers.get(path.suffix, _embeddings if path.suffix in (".parquet", ".npy") else _bytes)


def _is_special(path: Path) -> bool:
    """Whether it, or what it links to, is a pipe, on which a reader waits for ever, or a device, which has no end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _refuse_special(*paths: Path) -> None:
    for path in paths:
        if _is_special(path):
            raise ValueError(f"{path.name} is no regular file")


def _toml(path: Path) -> None:
    _refuse_special(path)
    parse_toml(path.read_bytes())


def _config(path: Path) -> None:
    """The settings of a run: a file that was cut behind a line can be read, and lacks some of the checkpoint's."""
    _refuse_special(path)
    if lost := sorted(_settings_of_a_checkpoint(path.parent / "checkpoints") - parse_toml(path.read_bytes()).keys()):
        raise ValueError(f"it lacks {lost[0]}, which a checkpoint names: it was cut short")


def _settings_of_a_checkpoint(folder: Path) -> set[str]:
    """Names of the settings in the newest one that has readable ones, but for those that a later start may drop."""
    for path in checkpoint.committed(folder):
        try:
            texts = path / "state.json", path / "manifest.json"
            _refuse_special(*texts)
            if all(text.stat().st_size <= _LARGEST_TEXT for text in texts):
                return parse_toml(checkpoint.read_state(path)["config"].encode()).keys() - {"preset", "test_data"}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # said where the checkpoint itself is judged
    return set()


def _json(path: Path) -> None:
    json.loads(path.read_bytes())


def _log(name: str, path: Path) -> Finding:
    """A .jsonl file: a kill while a line is added leaves the last one without its end, which is no damage."""
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        return Finding("damaged", name, f"it cannot be read ({first_line(error)})")
    cut = last != b"" and not _is_line(last)
    bad = sum(not _is_line(line) for line in lines)
    if bad:
        of = len(lines) + (last != b"")
        return Finding("damaged", name, f"{bad + cut} of {of} lines cannot be read; the next start drops them")
    return Finding("ok", name, "its last line was cut off, as by a kill; the next start drops it" if cut else "")


def _is_line(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _page(path: Path) -> str | None:
    return None if path.read_bytes().rstrip().endswith(b"</html>") else "its end is missing"


def _embeddings(path: Path) -> None:
    _refuse_special(*companions(path))
    open_embeddings(path, verify=True)


def _bytes(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(_READ):
            pass


def _parts(run: Path, folder: Path) -> Iterator[Finding]:
    """The parts of an unfinished file of embeddings."""
    trouble = _trouble(lambda folder: _refuse_special(*folder.iterdir()), folder)
    if trouble is not None:
        yield Finding("damaged", shown(folder.relative_to(run)), trouble)
        return
    for part, trouble in damaged_parts(folder):
        yield _judged(shown(part.relative_to(run)), trouble)


def _checkpoint(path: Path) -> str | None:
    _refuse_special(*path.iterdir())
    return checkpoint.problem(path)


def _encoder_trouble(run: Path) -> str | None:
    """Judged again where something is wrong: in between, a run that is going on may have replaced one of its files."""
    if _trouble(_encoder, run) is None:
        return None
    time.sleep(_PAUSE)
    return _trouble(_encoder, run)


def _encoder(run: Path) -> str | None:
    """The bits of its weights where the checkpoint of its step is there, and the features that were saved with it."""
    folder = run / "encoder"
    _refuse_special(*folder.iterdir())
    config = json.loads((folder / "config.json").read_bytes())
    try:
        ours = config["nnclr"]
        source, backbone = run / "checkpoints" / f"step-{ours['provenance']['step']:08d}", ours["backbone"]
    except (LookupError, TypeError, ValueError):
        raise ValueError("config.json is not that of an encoder of a run") from None
    weights = read_weights(folder / "model.safetensors")
    if _trouble(_checkpoint, source) is None:
        state = read_weights(source / "tensors.safetensors")
        for name, value in weights.items():
            saved = state.get(f"backbone.{name}", value)
            if saved.shape != value.shape or not torch.equal(saved, value):
                return f"{name} is not that of {source.name}; the next checkpoint writes it anew"
    if not str(backbone).startswith("module:"):  # a network of one's own cannot be built from a file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Encoder.from_pretrained(folder)
    return None
