"""What is saved, and how it survives a kill.

A checkpoint is a folder `step-00001000/` with `tensors.safetensors`, `state.json` and `manifest.json` (size
and SHA-256 of the other two). It is written under a temporary name, fsynced file by file, and renamed: a
folder without a manifest that fits does not exist for us. Nothing in it is ever unpickled.

Training waits for the copy of the state alone: `TrainState.tensors` takes it, and a `BackgroundWriter` does the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from nnclr.errors import FolderInUseError, NoCheckpointError, NonFiniteError, StorageError

if TYPE_CHECKING:
    from torch import Tensor  # here and below: what only reads manifests does without torch, which takes seconds

FORMAT = 1
KEEP = 2  # verified checkpoints that stay
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.tmp-.+\.(toml|jsonl?|png|html|safetensors)-\d+")  # of `write_atomically`
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class BackgroundWriter:
    """Does one write at a time in a thread of its own, so that training goes on meanwhile.

    What a write raises, the next call raises, whichever it is. A process that ends waits for the write; one that is
    killed leaves what a kill inside `save` leaves: the earlier checkpoint, or the new one.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begin a write when the one before is done; what it writes must not change any more."""
        self.wait()
        self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Raise what a write that is done has raised; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything submitted is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


@dataclass
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int | None = None) -> Path:
    """Write and verify `folder/step-...`, then delete all but the newest two good ones.

    Args:
        folder: the run's `checkpoints` folder; made if it is not there, but not the run folder.
        step: optimiser steps taken.
        tensors: CPU tensors.
        state: values that JSON can hold.
        keep: step of one more that stays: the one that this process began from.

    Raises:
        NonFiniteError: if a tensor holds a NaN or an infinity: a broken state is not worth keeping.
        StorageError: if the folder cannot be written; older checkpoints stay as they are.
    """
    from safetensors.torch import save_file

    if name := _not_finite(tensors):
        raise NonFiniteError(f"{name} is not finite at step {step}: no checkpoint of it is written")
    final = folder / f"step-{step:08d}"
    if final.exists() and not problem(final):
        return final
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    try:
        if not folder.is_dir():  # a run folder that has vanished is not made anew: a disk may have been detached
            folder.mkdir()
            sync(folder.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # Made contiguous here, in the background, and not when the snapshot is taken.
        plain = {name: value.contiguous() for name, value in tensors.items()}
        save_file(plain, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
        shutil.copymode(temporary / _STATE, temporary / _TENSORS)  # safetensors lets the owner alone read
        files = {name: _fingerprint(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}))
        for name in (_TENSORS, _STATE, _MANIFEST):
            sync(temporary / name)
        sync(temporary)
        if final.exists():  # it failed verification above
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(value.nbytes for value in tensors.values()) >> 20
        raise StorageError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}; it needs about "
            f"{needed + 1} MiB{_free(folder)}, earlier checkpoints are intact"
        ) from error
    _prune(folder, keep)
    return final


def require_room(run: Path, size: int) -> None:
    """Nothing, where all checkpoints of `size` bytes that are ever there at a time fit on the disk.

    These are the ones that stay, the one that a process began from, and the one that is written: as many for a run that
    begins as for one that goes on, so that what could begin can go on.

    Raises:
        StorageError: if they do not: better before the first step than after an hour.
    """
    number = max(1, KEEP + 2 - len(committed(run / "checkpoints")))
    if shutil.disk_usage(run).free < number * size:
        raise StorageError(
            f"room for {number} more checkpoint{'s' * (number > 1)} in {run} takes {(number * size >> 20) + 1} "
            f"MiB{_free(run)}: make room, or choose another --out"
        )


def _free(folder: Path) -> str:
    try:
        return f" and {shutil.disk_usage(folder).free >> 20} MiB are free"
    except OSError:  # it has vanished
        return ""


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that passes its manifest, and a line for each newer one that does not.

    "Newest" is the highest step: clocks and time stamps play no part.

    Raises:
        NoCheckpointError: if there are checkpoints but none passes, or one is from a newer version of this package.
    """
    from safetensors.torch import load_file

    skipped: list[str] = []
    for path in committed(folder):
        reason = problem(path)
        if reason is not None and (newer := _newer_format(path)):
            raise NoCheckpointError(
                f"{path} has format {newer}, from a newer nnclr, and this one reads format {FORMAT}: update nnclr, or "
                "choose another --out"
            )
        if reason is None:
            try:
                tensors, state = load_file(path / _TENSORS), json.loads((path / _STATE).read_text())
                name = _not_finite(tensors)
                if name is None:
                    return Checkpoint(path, state["step"], tensors, state), skipped
                reason = f"{name} is not finite"
            except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
                reason = f"it was not written by nnclr ({type(error).__name__})"  # a manifest fits any files if forged
        skipped.append(f"{path.name} skipped: {reason}")
    if skipped:
        raise NoCheckpointError(
            f"none of the {len(skipped)} checkpoints in {folder} can be used ({skipped[0]}); restore one from "
            "a copy, or choose another --out to start afresh"
        )
    return None, skipped


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that holds a NaN or an infinity: a broken state is neither kept nor gone on from."""
    broken = (name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all())
    return next(broken, None)


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has its size and SHA-256."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads format {FORMAT}"
        if path.name != f"step-{manifest['step']:08d}" or set(manifest["files"]) != {_TENSORS, _STATE}:
            return "its manifest is that of another checkpoint"
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The text of a checkpoint alone, if it is what the manifest says; the tensors are not looked at.

    Raises:
        ValueError, LookupError, TypeError, OSError: if it is not, or cannot be read.
    """
    manifest = json.loads((path / _MANIFEST).read_text())
    if _fingerprint(path / _STATE) != manifest["files"][_STATE]:
        raise ValueError(f"{_STATE} is damaged")
    state: dict[str, Any] = json.loads((path / _STATE).read_text())
    return state


def _newer_format(path: Path) -> int | None:
    """The format of a checkpoint that a newer version wrote; None for one that is damaged, or readable."""
    try:
        formats = {json.loads((path / name).read_text())["format"] for name in (_STATE, _MANIFEST)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # Both files say the same: no flipped bit, and not to be skipped, since those steps would be trained again.
    number = formats.pop() if len(formats) == 1 else None
    return number if isinstance(number, int) and number > FORMAT else None


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders, highest step first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _prune(folder: Path, keep: int | None) -> None:
    good = 0
    for path in committed(folder):
        if good >= KEEP:
            if keep is not None and path.name == f"step-{keep:08d}":
                continue
            # Renamed first, so that a kill inside the deletion leaves no half checkpoint under a good name.
            doomed = path.with_name(f".tmp-old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        elif problem(path) is None:
            good += 1


def clean(run: Path) -> None:
    """Delete what a killed process left half written in a run folder; call it with the lock held.

    Of the files beside the checkpoints only those of the kinds that a run writes: others, as of `nnclr embed`, may be
    another process's that is still writing.
    """
    for path in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in (run, run / "encoder", run / "neighbours", run / "nonfinite"):
        for path in folder.glob(".tmp-*"):
            if _UNFINISHED.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def sync(path: Path) -> None:
    """Have a file or a folder on the disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a reader or a kill sees the old or the new one, never a part.

    Raises:
        StorageError: if it cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} could not be written: {error.strerror or error}") from error


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Own a run folder; the kernel gives the lock back however the process ends.

    Raises:
        FolderInUseError: if another process owns it, with its pid, host and start.
        StorageError: if its file system knows no locks.
    """
    with open(run / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise FolderInUseError(f"{run} is in use by {owner}; wait for it or choose another --out") from None
        except OSError as error:
            raise StorageError(f"the file system of {run} has no locks ({error.strerror}); use another disk") from error
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
