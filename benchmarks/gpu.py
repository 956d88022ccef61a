"""Speed on one GPU, against peers and against the limits of the device: `benchmarks/gpu.sh`, or

    python -m benchmarks.gpu [CASE...] [--out docs/results/gpu.json] [--tiny]

Each case compares results first, then times: CUDA events around a call after a warm-up, the median and spread of the
repeats, peers in turns with ours. Whole training steps are read off `nnclr.pretrain` itself. `--tiny` runs every case
with small numbers on the CPU, which shows that the runner works and nothing about speed.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SECONDS = 1.0  # of repeats a side
Side = Callable[[], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["*"], help="names or patterns such as 'step-*'; default: all")
    parser.add_argument("--out", type=Path, help="file of the records")
    parser.add_argument("--tiny", action="store_true", help="small numbers on the CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny shows that the runner works without one")
    for pattern in options.cases:
        if not any(fnmatch(name, pattern) for name in CASES):
            parser.error(f"no case is called {pattern}; there are {', '.join(CASES)}")
    names = [name for name in CASES if any(fnmatch(name, pattern) for pattern in options.cases)]
    device = torch.device("cpu" if options.tiny else "cuda")
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name in names:
        began = time.perf_counter()
        try:
            found = CASES[name](device)
        except Exception as error:  # noqa: BLE001  (the other cases are worth their time on the device)
            found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        known[name] = found | {
            "seconds_in_all": round(time.perf_counter() - began, 1),
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({platform.machine()}), tiny",
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        print(json.dumps({name: known[name]}), flush=True)
        if options.out:
            options.out.write_text(json.dumps(known, indent=1) + "\n")
    return int(any("failed" in known[name] for name in names))


def timed(device: torch.device, **sides: Side) -> dict[str, dict[str, float]]:
    """Milliseconds a call of each side: median, lowest and highest of repeats taken in turns; peak memory in MiB."""
    seen: dict[str, list[float]] = {name: [] for name in sides}
    memory = dict.fromkeys(sides, 0.0)
    for side in sides.values():
        for _ in range(3):
            side()
    until = time.perf_counter() + (SECONDS if device.type == "cuda" else 0.1) * len(sides)
    while time.perf_counter() < until or len(next(iter(seen.values()))) < 3:
        for name, side in sides.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                result = side()
                end.record()
                end.synchronize()
                seen[name].append(start.elapsed_time(end))
                memory[name] = max(memory[name], (torch.cuda.max_memory_allocated() - before) / 2**20)
                del result
            else:
                began = time.perf_counter()
                side()
                seen[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: {
            "ms": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
            "repeats": len(times),
            "extra_mib": memory[name],
        }
        for name, times in seen.items()
    }


def limits(device: torch.device) -> dict[str, Any]:
    """What the device itself does: copying memory, and multiplying bfloat16 matrices."""
    n, words = (8192, 2**28) if device.type == "cuda" else (64, 2**12)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    source, target = torch.empty(words, device=device), torch.empty(words, device=device)
    found = timed(device, product=lambda: a @ a, copy=lambda: target.copy_(source))
    return {
        "sides": found,
        "tflops": 2 * n**3 / found["product"]["ms"] / 1e9,
        "gigabytes_a_second": 2 * source.nbytes / found["copy"]["ms"] / 1e6,
    }


def augmentation(device: torch.device) -> dict[str, Any]:
    """256 views of 224 pixels from uint8 images on the device; kornia's chain of the same operations.

    In bfloat16, as a run in bf16 takes them, and in float32.
    """
    from nnclr.data.augment import augment, policy

    n, size = (256, 224) if device.type == "cuda" else (4, 32)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, size * 5 // 4, size * 5 // 4), np.uint8)).to(device)
    ids, views = np.arange(n), policy("simclr", max(size, 96))[:1]
    plain = augment(images.cpu(), ids, views, 0, 0)[0]
    gaps, sides = [], dict[str, Side]()
    for name, dtype in (("nnclr", torch.bfloat16), ("nnclr, float32", torch.float32)):
        gaps.append(float((augment(images, ids, views, 0, 0, dtype)[0].float().cpu() - plain).abs().max()))
        if gaps[-1] > 0.05:
            raise AssertionError(
                f"{name}: the kernels differ from the plain functions by {gaps[-1]:.3f} deviations of ImageNet's pixels"
            )
        sides[name] = partial(augment, images, ids, views, 0, 0, dtype)
    with contextlib.suppress(ImportError):
        from benchmarks.cases import _kornia

        chain = _kornia(max(size, 96), 0.08, blur=True)
        sides["kornia"] = lambda: chain(images.float() / 255)
    return {
        "equal": f"to {gaps[0]:.1e}, in float32 {gaps[1]:.1e}, of the plain functions",
        "sides": timed(device, **sides),
        "goal_ms": 0.4,
    }


def lookup(device: torch.device) -> dict[str, Any]:
    """The nearest of 98,304 x 256 for 8,192 queries, exact; the plain product and its maximum."""
    import nnclr

    n, m, d = (8192, 98_304, 256) if device.type == "cuda" else (64, 512, 32)
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(m, d, generator=generator), dim=1).to(device)
    queries = F.normalize(torch.randn(n, d, generator=generator), dim=1).to(device)
    support_set = nnclr.SupportSet(m, d).to(device)
    support_set.enqueue(vectors, torch.arange(m, device=device))
    found = support_set.nearest(queries).ids[:, 0]
    exact = torch.cat([(part.double() @ vectors.double().T).argmax(dim=1) for part in queries.split(512)])
    half = (queries.bfloat16() @ vectors.bfloat16().T).max(dim=1).indices
    return {
        "equal": f"{int((found == exact).sum())} of {n} equal float64; plain bfloat16 {int((half == exact).sum())}",
        "sides": timed(
            device,
            nnclr=lambda: support_set.nearest(queries),
            plain_bf16=lambda: (queries.bfloat16() @ vectors.bfloat16().T).max(dim=1),
            plain_fp32=lambda: (queries @ vectors.T).max(dim=1),
        ),
        "goal_ms": 1.0,
    }


def lars(device: torch.device) -> dict[str, Any]:
    """An optimiser step of a ResNet-50, and how often it waits for the device."""
    import nnclr
    from nnclr.models.backbone import create_backbone
    from nnclr.optim import parameter_groups

    network = create_backbone("resnet50" if device.type == "cuda" else "small-convnet", 224).to(device)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    sides: dict[str, Side] = {}
    optimizer = nnclr.LARS(parameter_groups([network], 1e-6), lr=0.01)
    sides["nnclr"] = optimizer.step
    with contextlib.suppress(ImportError):
        from lightly.utils.lars import LARS

        peer = LARS([{"params": list(network.parameters())}], lr=0.01)
        sides["lightly"] = peer.step
    waits = {name: waits_of(device, side) for name, side in sides.items()}
    return {"waits": waits, "sides": timed(device, **sides)}


def waits_of(device: torch.device, call: Side) -> int | None:
    """How often a call waits for the device, as torch warns of it; None where there is none."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


class Compiled(torch.nn.Module):
    """A backbone that is compiled for training alone, not for what is computed of it in evaluation mode."""

    def __init__(self, module: torch.nn.Module, mode: str) -> None:
        super().__init__()
        self.module = module
        self.compiled = torch.compile(module.forward, mode=mode)  # no module, which would be saved too

    def forward(self, views: torch.Tensor) -> Any:
        """Features (n, d) of views (n, 3, s, s)."""
        return (self.compiled if self.training and torch.is_grad_enabled() else self.module)(views)


def training_step(
    backbone: str, size: int, batch: int, goal: float | None, modes: dict[str, str | None]
) -> Callable[[torch.device], dict[str, Any]]:
    """A whole step of `nnclr.pretrain` with images on the device, in each mode of `_views_a_second`."""

    def case(device: torch.device) -> dict[str, Any]:
        name, pixels, n, steps = (backbone, size, batch, 60) if device.type == "cuda" else ("small-convnet", 16, 8, 6)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (2 * n, pixels, pixels, 3), np.uint8)
        rates: dict[str, list[float] | str] = {}
        said: dict[str, str] = {}
        for variant, mode in modes.items():
            try:
                rates[variant], said[variant] = _views_a_second(images, name, pixels, n, steps, mode)
            except Exception as error:  # noqa: BLE001  (a variant that fails is a result too)
                rates[variant] = f"{type(error).__name__}: {str(error)[:200]}"
        return {"views_a_second": rates, "said": said, "goal": goal}

    return case


def _views_a_second(
    images: np.ndarray, backbone: str, size: int, batch: int, steps: int, mode: str | None
) -> tuple[list[float], str]:
    """Views a second in each window of 10 steps behind the first one, and what the run says of CUDA graphs.

    Args:
        images: (n, s, s, 3) uint8.
        backbone: its name.
        size: pixels of a view.
        batch: images of a step.
        steps: of the run.
        mode: None for the backbone by its name, "" for a module, else one compiled in this mode.
    """
    import nnclr
    from nnclr.models.backbone import create_backbone

    module: Any = backbone
    if mode is not None:
        module = create_backbone(backbone, size)
    if mode:
        module = Compiled(module, mode)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        run = nnclr.pretrain(
            images,
            Path(folder) / "run",
            backbone=module,
            image_size=size,
            batch_size=batch,
            epochs=steps / 2,
            support_set_size=16_384 if steps > 6 else 16,
            log_every_steps=max(steps // 6, 1),
            evaluate_every_epochs=0.0,
            checkpoint_every_steps=10**6,
        )
        said = [line for line in printed.getvalue().splitlines() if "CUDA graphs" in line]
        return [2 * line["images_per_second"] for line in run.metrics[1:]], "".join(said)


# For a module CUDA graphs are not tried, so that it is launched kernel by kernel.
PLAIN: dict[str, str | None] = {"as it comes": None, "kernel by kernel": ""}
COMPILED: dict[str, str | None] = {"compiled": "default"}
CASES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "limits": limits,
    "augmentation": augmentation,
    "lookup": lookup,
    "lars": lars,
    "step-resnet18-32": training_step("resnet18", 32, 1024, 90_000, PLAIN),
    "step-resnet18-32-batch-128": training_step("resnet18", 32, 128, None, PLAIN),  # waits for launches
    "step-resnet50-224": training_step("resnet50", 224, 256, 6_300, PLAIN),
    "step-vit-small-224": training_step("timm/vit_small_patch16_224", 224, 256, 512 / 0.110, PLAIN),
    # These take minutes, most of them to compile, and come last.
    "compiled-resnet50-224": training_step("resnet50", 224, 256, 6_300, COMPILED),
    "compiled-resnet18-32": training_step(
        "resnet18", 32, 1024, 90_000, COMPILED | {"compiled, with graphs": "reduce-overhead"}
    ),
    "compiled-vit-small-224": training_step("timm/vit_small_patch16_224", 224, 256, 512 / 0.110, COMPILED),
}

if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    sys.exit(main())
