"""One record for every number: what was measured, how exactly, and on what."""

import errno
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnclr.data.images import safe, shown

_MANY = 6  # values of a parameter, of which a person sees the smallest and the largest only


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


def summary(results: Sequence[Result], kept: Sequence[Path]) -> Iterator[str]:
    """Results of one protocol on the same images as a block for a terminal; the records say all of it.

    Args:
        results: of the encoder, then of those that it is compared with.
        kept: the files that the records were added to.
    """
    first = results[0]
    over = "" if first.interval is None else f", with the 95 % interval {first.interval_method}"
    yield f"{first.protocol} {first.metric}{over}"
    names = [safe(result.encoder_name) for result in results]
    width = max(map(len, names))
    for name, result in zip(names, results, strict=True):
        interval = "" if result.interval is None else "{:7.1f} to {:.1f}".format(*(100 * v for v in result.interval))
        yield f"  {name:<{width}}  {100 * result.value:5.1f} %{interval}"
    for name, result in zip(names, results, strict=True):
        if further := list(_further(result)):
            yield f"further       {', '.join(further)}" + (f" ({name})" if len(results) > 1 else "")
    learned = f"{first.n_train} images of {safe(first.data)}" if first.n_train else "nothing"
    yield f"learned from  {learned}"
    yield f"scored        {first.n_test} images of {safe(first.test)}"
    for name, result in zip(names, results, strict=True):
        if result is first or result.parameters != first.parameters:
            there = "; ".join(_parameters(result.parameters))
            yield f"{'protocol' if result is first else '':<14}{there}" + ("" if result is first else f" ({name})")
    of_step = "" if first.step is None else f"step {first.step}, "
    crop = first.preprocessing["crop_pct"]
    yield f"encoder       {of_step}{first.preprocessing['image_size']} px, crop {crop:g}, seed {first.seed}"
    yield f"took          {sum(result.seconds for result in results):.1f} s"
    yield f"record        {', '.join(map(shown, kept)) if kept else 'not kept; --out FILE.jsonl keeps it'}"


def _further(result: Result) -> Iterator[str]:
    """The other numbers of a protocol, without lists and tables."""
    for name, value in result.details.items():
        words = name.replace("_", " ")
        if isinstance(value, float):
            yield f"{words} {value:.3g}"
        elif isinstance(value, dict) and isinstance(value.get("value"), float):
            yield f"{words} {100 * value['value']:.1f} %"


def _parameters(parameters: dict[str, Any]) -> Iterator[str]:
    """Name and value of each; long lists by their ends, and not what was measured on the way."""
    for name, value in parameters.items():
        words = name.replace("_", " ")
        if isinstance(value, (list, tuple)) and len(value) > _MANY and all(isinstance(v, (int, float)) for v in value):
            yield f"{len(value)} {words} from {min(value):g} to {max(value):g}"
        elif isinstance(value, (list, tuple)):
            yield f"{words} {', '.join(_plain(one) for one in value) or 'none'}"
        elif value is not None and not isinstance(value, dict):
            yield f"{words} {_plain(value)}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else safe(value)


def append(result: Result, path: Path) -> None:
    """Add a line to a file; one write, so that lines of two processes do not mix.

    Raises:
        OSError: if it cannot be written whole, such as on a disk that is full.
    """
    line = (result.to_json() + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


WILSON = "over images of the test set, Wilson"
BOOTSTRAP = "over images of the test set, bootstrap"


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
