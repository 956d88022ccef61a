"""The files of a run folder and who writes them when; checkpoints are in checkpoint.py."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nnclr
from nnclr.blotted import command_without_secrets
from nnclr.checkpoint import write_atomically
from nnclr.data.images import Source
from nnclr.errors import (
    DataError,
    InputError,
    NonFiniteError,
    NoProgressError,
    ReplicaError,
    Stopped,
    StorageError,
)

RESTARTS = 3  # from one checkpoint, after which a run is not started again


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that can be read."""
        return read_lines(self.path / "metrics.jsonl")[0]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl that can be read."""
        return read_lines(self.path / "evaluations.jsonl")[0]


def create(run: Path) -> None:
    """Make the folder.

    Raises:
        StorageError: if it cannot be made or written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / f".tmp-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise StorageError(f"--out {run} cannot be written: {error.strerror}; choose another folder") from error


@contextmanager
def attempt(run: Path, step: Callable[[], int]) -> Iterator[None]:
    """Count the starts from one checkpoint that were killed or failed before the next: a step may be poisoned.

    Not counted are a start that was asked to stop, ends whose message says what to repair before the next one, and
    errors before the first step of all, as of an objective that is being written.

    Args:
        run: the run folder, whose lock is held.
        step: gives the step that the run has come to: that of its checkpoint at first, 0 without.

    Raises:
        NoProgressError: if all starts that are granted were made.
    """
    path, first = _attempts(run), step()
    try:
        known = json.loads(path.read_bytes())
        starts = int(known["starts"]) if known["step"] == first else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or cut off by a kill
        starts = 0
    if starts > RESTARTS:
        raise NoProgressError(
            f"{run} was started again {RESTARTS} times from step {first} and never came to its next checkpoint; see "
            f"what those starts ended with, and delete {path} to try once more, perhaps with a smaller "
            "--checkpoint-every-steps"
        )
    write_atomically(path, json.dumps({"step": first, "starts": starts + 1}).encode())
    try:
        yield
    except (Stopped, InputError, DataError, StorageError, NonFiniteError, ReplicaError, KeyboardInterrupt):
        forget_attempts(run)
        raise
    except Exception:
        if step() == 0:
            forget_attempts(run)
        raise
    forget_attempts(run)


def forget_attempts(run: Path) -> None:
    """Count from the beginning again."""
    with suppress(OSError):
        _attempts(run).unlink(missing_ok=True)


def _attempts(run: Path) -> Path:
    return run / "attempts.json"


def write_record(run: Path, config: str, device: str, source: Source) -> None:
    """config.toml and environment.json: what it takes to repeat the run."""
    import torch  # here, because who reads a run folder does not need it

    write_atomically(run / "config.toml", config.encode())
    environment = {
        "nnclr": nnclr.__version__,
        "commit": _commit(),
        "command": command_without_secrets(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "data": {"name": source.name, "images": len(source), "fingerprint": source.fingerprint},
    }
    write_atomically(run / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())


def recorded_data(run: Path) -> dict[str, Any]:
    """What environment.json says of the images; empty where it is missing or damaged."""
    try:
        data = json.loads((run / "environment.json").read_bytes())["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        data = {}
    return data if isinstance(data, dict) else {}


def _commit() -> str | None:
    """The git commit of the package's own checkout, if it is run from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a .jsonl file, and how many of them cannot be read, perhaps cut off by a kill."""
    try:
        texts = path.read_bytes().decode("utf-8", "backslashreplace").splitlines()
    except OSError:
        return [], 0
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines, len(texts) - len(lines)


def forget_later_lines(run: Path, step: int) -> None:
    """Drop lines and files that a killed process wrote after its last checkpoint, since those steps are repeated."""
    for path in (run / "metrics.jsonl", run / "evaluations.jsonl"):
        if path.exists():
            texts = path.read_bytes().decode("utf-8", "backslashreplace").splitlines()
            write_atomically(path, "".join(text + "\n" for text in texts if _is_up_to(step, text)).encode())
    for path in (run / "nonfinite").glob("step-*.json"):
        if not path.stem[5:].isdigit() or int(path.stem[5:]) >= step:
            path.unlink()


def _is_up_to(step: int, text: str) -> bool:
    try:
        line = json.loads(text)
        return bool(line.get("step") is None or line["step"] <= step)
    except (ValueError, AttributeError, TypeError, RecursionError):  # cut off by a kill, or damaged
        return False


@contextmanager
def bad_samples_listed(run: Path, source: Source) -> Iterator[None]:
    """While entered, images that end the run because they cannot be read are listed in bad_samples.jsonl."""
    try:
        yield
    except DataError as error:
        with suppress(OSError):  # the message names the first, and the code stays that of the data
            write_bad_samples(run, error.bad, source)
        forget_attempts(run)  # of all ranks: to the others this one is lost
        raise


def read_bad_samples(run: Path, most: int) -> dict[int, str]:
    """The images that an earlier part of the run skipped, by id.

    More than `most` have ended it. They may be back by now, so their list is removed.
    """
    path = run / "bad_samples.jsonl"
    lines = read_lines(path)[0]
    bad = {line["id"]: str(line.get("reason")) for line in lines if isinstance(line.get("id"), int)}
    if len(bad) > most:
        path.unlink()
        return {}
    return bad


def write_bad_samples(run: Path, bad: dict[int, str], source: Source) -> None:
    """List the images that were skipped, and why."""
    if bad:
        lines = [
            json.dumps({"id": i, "image": source.describe(i), "reason": reason}) + "\n"
            for i, reason in sorted(bad.items())
        ]
        write_atomically(run / "bad_samples.jsonl", "".join(lines).encode())
