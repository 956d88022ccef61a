"""The files of a run folder and who writes them when; checkpoints are in checkpoint.py."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nnclr
from nnclr.checkpoint import write_atomically
from nnclr.data.images import Source
from nnclr.errors import InputError


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

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
        InputError: if it cannot be made or written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / f".tmp-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {run} cannot be written: {error.strerror}; choose another folder") from error


def write_record(run: Path, config: str, device: str, source: Source) -> None:
    """config.toml and environment.json: what it takes to repeat the run."""
    write_atomically(run / "config.toml", config.encode())
    environment = {
        "nnclr": nnclr.__version__,
        "commit": _commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "data": {"name": source.name, "images": len(source), "fingerprint": source.fingerprint},
    }
    write_atomically(run / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())


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
    """Drop lines that a killed process wrote after its last checkpoint, since those steps are repeated."""
    for path in (run / "metrics.jsonl", run / "evaluations.jsonl"):
        if path.exists():
            kept = [text for text in path.read_text().splitlines() if _is_up_to(step, text)]
            write_atomically(path, "".join(text + "\n" for text in kept).encode())


def _is_up_to(step: int, text: str) -> bool:
    try:
        line = json.loads(text)
    except ValueError:  # cut off by a kill
        return False
    return line.get("step") is None or line["step"] <= step


def read_bad_samples(run: Path) -> dict[int, str]:
    """The images that an earlier part of the run skipped, by id."""
    return {line["id"]: line["reason"] for line in read_lines(run / "bad_samples.jsonl")[0]}


def write_bad_samples(run: Path, bad: dict[int, str], source: Source) -> None:
    """List the images that were skipped, and why."""
    if bad:
        lines = [
            json.dumps({"id": i, "image": source.describe(i), "reason": reason}) + "\n"
            for i, reason in sorted(bad.items())
        ]
        write_atomically(run / "bad_samples.jsonl", "".join(lines).encode())
