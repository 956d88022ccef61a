"""`nnclr info`: versions and devices, and what a run folder or a data set holds.

torch takes seconds to import, so that it is left alone where it has nothing to say.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnclr
from nnclr import comparable

if TYPE_CHECKING:
    from nnclr.findings import Record

# What the system shows of a driver for NVIDIA, AMD, or either under Windows; without one torch finds no GPU on Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_EXTRAS = {
    "demo": "skimage",
    "parquet": "pyarrow",
    "hub": "datasets",
    "remote": "fsspec",
    "plot": "matplotlib",
    "transfer": "scipy",
    "index": "faiss",
    "explore": "starlette",
    "onnx": "onnxscript",
    "tensorboard": "tensorboard",
}


def describe(target: str | None) -> Iterator[str]:
    """Lines about this installation, about a run folder, or about DATA.

    Raises:
        InputError: if the target is neither a run nor readable as data.
    """
    if target is None:
        yield from _installation()
    elif (Path(target) / "config.toml").is_file():
        yield from _run(Path(target))
    else:
        yield from _data(target)


def _installation() -> Iterator[str]:
    yield f"nnclr {nnclr.__version__}, Python {platform.python_version()}, torch {version('torch')}"
    yield f"devices: {', '.join([f'cpu with {os.cpu_count()} cores', *_gpus()])}"
    for extra, module in _EXTRAS.items():
        yield f"{extra}: {'installed' if importlib.util.find_spec(module) else f'pip install nnclr[{extra}]'}"


def _gpus() -> list[str]:
    if sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS)):
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _run(path: Path) -> Iterator[str]:
    """What was trained on what, how far, what was measured, and how it goes on; then the settings."""
    from nnclr import findings
    from nnclr.data.images import safe, shown

    record, steps = findings.read_record(path), _checkpoints(path)
    yield f"run           {shown(path)}"
    yield f"trained       {safe(findings.what(record).text)}"
    if steps and steps[0] > record.step:
        yield f"              so far as it was logged; the newest checkpoint is of step {steps[0]:,}"
    yield f"last metrics  {_metrics(record)}"
    for number, line in enumerate(_latest(record.evaluations) or ["none"]):
        yield f"{'' if number else 'evaluations':<14}{line}"
    yield from _kept(record, steps)
    for text in record.missing:
        yield f"note          {safe(text)}"
    yield "settings"
    for text in record.config_text.splitlines():
        yield f"  {safe(text)}"


_SHOWN = {  # of a line of metrics, as people read it
    "loss": "loss {:.3f}",
    "loss_chance": "chance {:.2f}",
    "neighbour_purity": "neighbour purity {:.0%}",
    "neighbour_similarity": "neighbour similarity {:.2f}",
    "embedding_std": "std {:.2f}",
    "rank_me": "RankMe {:.1f}",
    "learning_rate": "lr {:.3g}",
    "images_per_second": "{:.0f} img/s",
    "skipped_steps": "{:.0f} skipped steps",
    "bad_images": "{:.0f} bad images",
}
_MOST = 8  # evaluations


def _metrics(record: "Record") -> str:
    if not record.metrics:
        return "none"
    line = record.metrics[-1]
    quiet = {name for name in ("skipped_steps", "bad_images") if not line.get(name)}
    shown = [form.format(line[name]) for name, form in _SHOWN.items() if name in line and name not in quiet]
    return f"step {int(line['step'])}{': ' if shown else ''}{', '.join(shown)}".replace("%", " %")


def _latest(evaluations: list[dict[str, Any]]) -> list[str]:
    """The latest of each kind, as lines; the last few kinds."""
    from nnclr.data.images import safe

    latest: dict[str, dict[str, Any]] = {}
    for line in evaluations:
        key = comparable.key(line)
        latest.pop(key, None)  # the latest kind comes last
        latest[key] = line
    named: dict[tuple[str, str], list[str]] = {}
    for key, line in latest.items():
        named.setdefault(_named(line), []).append(key)
    apart = {
        key: f" ({text})" if text else ""
        for keys in named.values()
        for key, text in zip(keys, comparable.differences([comparable.asked(latest[k]) for k in keys]), strict=True)
    }
    lines = []
    for key, line in latest.items():
        low_high = (
            "" if line["interval"] is None else " ({:.1f} to {:.1f})".format(*(100 * v for v in line["interval"]))
        )
        step = "" if line["step"] is None else f"step {line['step']}: "
        what, of = _named(line)
        lines.append(safe(f"{step}{what} {100 * line['value']:.1f} %{low_high}, {of}{apart[key]}"))
    return lines[-_MOST:]


def _named(line: dict[str, Any]) -> tuple[str, str]:
    """What was measured, and on what."""
    try:
        what = comparable.title(line)
    except (KeyError, TypeError, ValueError, OverflowError):
        what = f"{line['protocol']}, {line['metric']}"
    return what, f"{line.get('n_test')} images of {line.get('test')}"


def _checkpoints(path: Path) -> list[int]:
    """The steps of a run's whole checkpoints, the newest first."""
    from nnclr.checkpoint import committed

    return [int(path.name[5:]) for path in committed(path / "checkpoints") if (path / "manifest.json").is_file()]


def _kept(record: "Record", steps: list[int]) -> Iterator[str]:
    """Checkpoints and encoder, and what the same command would do."""
    from nnclr.data.images import shown

    folder, encoder = record.path / "checkpoints", record.path / "encoder"
    if steps:
        yield f"checkpoints   {', '.join(f'step {step}' for step in steps)} in {shown(folder)}; nnclr verify reads them"
    else:
        yield "checkpoints   none"
    yield f"encoder       {shown(encoder) if (encoder / 'config.json').is_file() else 'none yet'}"
    if not steps:
        yield "to go on      there is no checkpoint: the same command begins anew"
    elif record.total is not None and steps[0] >= record.total:
        yield "to go on      it is finished; --extend-epochs lengthens it"
    else:
        yield f"to go on      the same command goes on from step {steps[0]}"


def _data(data: str) -> Iterator[str]:
    import numpy as np

    from nnclr.data.source import open_source

    source = open_source(data)
    yield f"{source.name}: {len(source)} images, fingerprint {source.fingerprint[:16]}"
    for reason, count in source.skipped.items():
        first = source.skipped_first.get(reason, ())
        more = ", ..." * (count > len(first))
        yield f"left out: {count} x {reason}" + (f" ({', '.join(first)}{more})" if first else "")
    if source.labels is None or source.class_names is None:
        why = f" ({source.unlabelled})" if source.unlabelled else ""
        yield f"no labels{why}: pre-training needs none, kNN and purity are not measured"
        return
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    for name, count in list(zip(source.class_names, counts, strict=True))[:20]:
        yield f"  {name}: {count}"
    if len(counts) > 20:
        yield f"  ... and {len(counts) - 20} more classes"
