"""One record for every number: what was measured, how exactly, and on what."""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Result:
    """A measured value with everything that it depends on."""

    metric: str
    value: float  # in [0, 1]
    protocol: str
    parameters: dict[str, Any]  # every parameter of the protocol
    data: str  # what the protocol learned from
    test: str  # what was scored
    data_fingerprint: str
    test_fingerprint: str
    n_train: int
    n_test: int
    encoder: str  # SHA-256 of the weights
    encoder_name: str  # how the encoder was asked for
    preprocessing: dict[str, Any]  # image size, resize, crop, mean, std
    step: int | None  # training step of the encoder
    seed: int
    seconds: float
    versions: dict[str, str]
    interval: tuple[float, float] | None  # 95 %; None where one number has none
    interval_method: str  # what the interval is over, and how it was made
    details: dict[str, Any] = field(default_factory=dict)  # further numbers of the protocol

    def to_json(self) -> str:
        """The record as one line."""
        return json.dumps(asdict(self))

    def in_words(self) -> str:
        """One line for people: metric, value, interval, protocol, encoder."""
        low_high = "" if self.interval is None else " ({:.1f} to {:.1f})".format(*(100 * v for v in self.interval))
        return f"{self.encoder_name}: {self.protocol} {self.metric} {100 * self.value:.1f} %{low_high}"


def append(result: Result, path: Path) -> None:
    """Add a line to a file; one write, so that lines of two processes do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (result.to_json() + "\n").encode())
    finally:
        os.close(descriptor)


WILSON = "over images of the test set, Wilson"


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent trials (Wilson, 1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))  # rounding apart


def versions() -> dict[str, str]:
    """Versions of what a number can depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "numpy": np.__version__,
    }
