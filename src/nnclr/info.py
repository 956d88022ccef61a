"""`nnclr info`: versions and devices, and what a run folder or a data set holds.

torch takes seconds to import, so that it is left alone where it has nothing to say.
"""

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import nnclr

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
    from nnclr.data.images import printable, safe
    from nnclr.run_folder import Run

    run = Run(path)
    for text in (path / "config.toml").read_bytes().rstrip(b"\n").split(b"\n"):
        yield printable(text)
    if run.metrics:
        yield "last metrics: " + json.dumps(run.metrics[-1])
    for line in run.evaluations[-3:]:
        if isinstance(line.get("value"), float):
            yield safe(f"step {line.get('step')}: {line.get('protocol')} {line.get('metric')} {line['value']:.4f}")


def _data(data: str) -> Iterator[str]:
    import numpy as np

    from nnclr.data.source import open_source

    source = open_source(data)
    yield f"{source.name}: {len(source)} images, fingerprint {source.fingerprint[:16]}"
    if source.labels is None or source.class_names is None:
        why = f" ({source.unlabelled})" if source.unlabelled else ""
        yield f"no labels{why}: pre-training needs none, kNN and purity are not measured"
        return
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    for name, count in list(zip(source.class_names, counts, strict=True))[:20]:
        yield f"  {name}: {count}"
    if len(counts) > 20:
        yield f"  ... and {len(counts) - 20} more classes"
