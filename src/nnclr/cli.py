"""The `nnclr` command: one thin function a verb."""

import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import nnclr
from nnclr.errors import InputError, NNCLRError


@dataclass(frozen=True)
class Demo:
    """Train on patches of real photographs, about a minute on two CPU cores, without network."""

    out: str = "runs/demo"
    """Run folder."""
    seed: int = 0
    """Seed of weights, order and augmentation."""


@dataclass(frozen=True)
class Evaluate:
    """Measure an encoder on labelled images and print one result record."""

    encoder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_OR_ENCODER")]]
    """Run folder, or encoder folder."""
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Labelled images that the protocol may learn from."""
    test: str | None = None
    """Labelled images to be scored; else the data's own test split, else a tenth of the data."""
    protocol: Literal["knn", "linear"] = "knn"
    """knn: weighted vote of the nearest training images; linear: a classifier on frozen features."""
    k: int = 20
    """Neighbours that vote (knn)."""
    temperature: float = 0.07
    """Temperature of the votes (knn)."""
    device: str = "cpu"
    """Where the encoder runs."""
    num_workers: int = 2
    """Threads that decode images."""
    seed: int = 0
    """Seed of splits and of the linear classifier."""


@dataclass(frozen=True)
class Sweep:
    """Train a grid of runs with seeds; one table and plot at the end, and the same command goes on where it was."""

    spec: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SPEC.toml")]]
    """TOML file with data, preset, seeds, [settings] and [grid]; benchmarks/ablations holds the paper's."""
    out: str | None = None
    """Folder of the runs, the table and the plot; default runs/sweep-NAME."""


@dataclass(frozen=True)
class Info:
    """Show versions and devices; with a run folder or data, what was found there."""

    target: tyro.conf.Positional[str | None] = None
    """Run folder or DATA."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit codes are listed in docs/exit-codes.md."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbs: dict[str, Callable[[list[str]], None]] = {
        "demo": demo,
        "pretrain": pretrain,
        "evaluate": evaluate,
        "sweep": sweep,
        "info": info,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"nnclr {nnclr.__version__}")
        return 0
    try:
        if arguments[0] not in verbs:
            raise InputError(f"'{arguments[0]}' is no command; there are {', '.join(verbs)}")
        verbs[arguments[0]](arguments[1:])
    except NNCLRError as error:
        print(f"nnclr: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nnclr: interrupted before there was anything to save", file=sys.stderr)
        return 130
    return 0


def demo(arguments: list[str]) -> None:
    """`nnclr demo`."""
    from nnclr.demo import run_demo

    options = tyro.cli(Demo, args=arguments, prog="nnclr demo", description=Demo.__doc__)
    run_demo(Path(options.out), options.seed)


def pretrain(arguments: list[str]) -> None:
    """`nnclr pretrain`: every flag is a field of `Config`."""
    from nnclr.config import Config, load_preset
    from nnclr.training import pretrain as run_pretrain

    dry_run = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    preset = _preset(arguments)
    defaults: dict[str, Any] = {"data": tyro.MISSING, "out": tyro.MISSING}
    if preset is not None:
        defaults |= load_preset(preset)
    default = Config(**defaults | ({"out": "unused"} if dry_run else {}))
    config = tyro.cli(
        Config,
        default=default,
        args=arguments,
        prog="nnclr pretrain",
        description="Train a backbone without labels; run the same command again to resume. With --dry-run: show what "
        "the run would be, try two steps of it, and leave nothing behind.",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    if ":" in config.objective:
        sys.path.insert(0, "")  # MODULE:CLASS may lie in the working directory, as with python -m
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    given = {name: value for name, value in values.items() if value != getattr(default, name)}
    if dry_run:
        _print_dry_run(given)
    else:
        run_pretrain(**given)


def _print_dry_run(given: dict[str, Any]) -> None:
    import torch

    from nnclr.config import make_config
    from nnclr.data.source import open_source
    from nnclr.dry_run import dry_run
    from nnclr.training import build, make_views, resolve, train

    source = open_source(given["data"])
    config = resolve(make_config(**{"out": "unused"} | given), source)
    state = build(config, torch.device(config.device), labels=source.labels)
    print(dry_run(config, source, state, [view.size for view in make_views(config)], train))


def evaluate(arguments: list[str]) -> None:
    """`nnclr evaluate`."""
    from nnclr.encoder import Encoder
    from nnclr.evaluation import evaluate as run_evaluate
    from nnclr.evaluation.result import append

    options = tyro.cli(Evaluate, args=arguments, prog="nnclr evaluate", description=Evaluate.__doc__)
    parameters = {"k": options.k, "temperature": options.temperature} if options.protocol == "knn" else {}
    encoder = Encoder.from_pretrained(options.encoder, options.device)
    result = run_evaluate(
        encoder,
        options.data,
        options.test,
        protocol=options.protocol,
        num_workers=options.num_workers,
        seed=options.seed,
        **parameters,
    )
    folder = Path(options.encoder)
    if (folder / "config.toml").is_file():
        append(result, folder / "evaluations.jsonl")
    print(json.dumps(asdict(result), indent=2))


def sweep(arguments: list[str]) -> None:
    """`nnclr sweep`."""
    from nnclr.sweep import run_sweep

    options = tyro.cli(Sweep, args=arguments, prog="nnclr sweep", description=Sweep.__doc__)
    spec = Path(options.spec)
    table = run_sweep(spec, Path("runs") / f"sweep-{spec.stem}" if options.out is None else Path(options.out))
    print(f"\n{table.read_text()}\n{table}")


def info(arguments: list[str]) -> None:
    """`nnclr info`."""
    import torch

    options = tyro.cli(Info, args=arguments, prog="nnclr info", description=Info.__doc__)
    if options.target is None:
        print(f"nnclr {nnclr.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
        print(f"threads {torch.get_num_threads()}, devices {', '.join(_devices())}")
        for extra, module in (("demo", "skimage"), ("parquet", "pyarrow"), ("plot", "matplotlib")):
            print(f"{extra}: {'installed' if importlib.util.find_spec(module) else f'pip install nnclr[{extra}]'}")
    elif (Path(options.target) / "config.toml").is_file():
        _describe_run(Path(options.target))
    else:
        _describe_data(options.target)


def _describe_run(path: Path) -> None:
    from nnclr.run_folder import Run

    run = Run(path)
    print((path / "config.toml").read_text(), end="")
    if run.metrics:
        print("last metrics: " + json.dumps(run.metrics[-1]))
    for line in run.evaluations[-3:]:
        print(f"step {line['step']}: {line['protocol']} {line['metric']} {line['value']:.4f}")


def _describe_data(data: str) -> None:
    import numpy as np

    from nnclr.data.source import open_source

    source = open_source(data)
    print(f"{source.name}: {len(source)} images, fingerprint {source.fingerprint[:16]}")
    if source.labels is None or source.class_names is None:
        print("no labels: pre-training needs none, kNN and purity are not measured")
        return
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    for name, count in list(zip(source.class_names, counts, strict=True))[:20]:
        print(f"  {name}: {count}")


def _devices() -> list[str]:
    import torch

    return ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]


def _preset(arguments: list[str]) -> str | None:
    """The value of --preset, which has to be known before the other flags' defaults are."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--preset="):
            return argument.partition("=")[2]
        if argument == "--preset" and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _usage() -> str:
    return """usage: nnclr COMMAND ...

  nnclr demo                                 about a minute on two CPU cores, shipped images, no network
  nnclr pretrain DATA --out RUN [--preset P] [--epochs N ...] [--dry-run]
  nnclr evaluate RUN_OR_ENCODER DATA --protocol knn|linear
  nnclr sweep SPEC.toml [--out DIR]          a grid of runs with seeds, one table and plot
  nnclr info [RUN|DATA]                      versions and devices; what a run or a data set holds

DATA is a folder of images, FILE.parquet, torchvision:NAME or demo-photos. `nnclr COMMAND --help` explains the flags."""


if __name__ == "__main__":
    sys.exit(main())
