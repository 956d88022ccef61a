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
    """Measure an encoder on labelled images and print one result record.

    Options below the first six belong to protocols, which are named in brackets; docs/evaluation.md explains them.
    """

    encoder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_OR_ENCODER")]]
    """Run or encoder folder, timm:NAME, torchvision:NAME[?weights=FILE], random:BACKBONE[?size=224], or pixels."""
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Labelled images that the protocol may learn from; for transfer the folder that holds the data sets."""
    protocol: Literal[
        "knn", "linear", "logistic", "finetune", "transfer", "label-free", "retrieval", "few-shot", "label-curve"
    ] = "knn"
    """What is measured."""
    test: str | None = None
    """Labelled images to be scored; else the data's own test split, else a tenth of each class."""
    baselines: bool = False
    """Measure raw pixels and the same architecture untrained as well."""
    out: str | None = None
    """File of result lines to add to; default evaluations.jsonl and baselines.jsonl of a run folder."""
    device: str = "cpu"
    """Where the encoder runs: cpu, cuda or cuda:N."""
    num_workers: int = 2
    """Threads that decode images."""
    seed: int = 0
    """Seed of splits, orders and resampling."""
    k: tuple[int, ...] | None = None
    """Neighbours that vote; several are chosen from by leave-one-out; default 20 (knn)."""
    temperature: tuple[float, ...] | None = None
    """Temperature of the votes, or several; default 0.07 (knn)."""
    augmentation: bool = False
    """Train on random crops and flips instead of on one view (linear)."""
    fraction: float | None = None
    """Share of the labels of each class, for example 0.01 or 0.1; default 1 (finetune)."""
    subset: str | None = None
    """List of image names instead of a fraction: a file, an https address, simclr-1percent or simclr-10percent."""
    epochs: int | None = None
    """Passes over the labelled images (linear, finetune, transfer by finetune)."""
    learning_rates: tuple[float, ...] | None = None
    """Candidates, chosen from on a hold-out (linear, and finetune, there per 256 images)."""
    by: Literal["logistic", "finetune"] | None = None
    """Logistic regression on frozen features, or the whole network (transfer)."""
    sets: tuple[str, ...] | None = None
    """Data sets by key, for example cifar10 pets; default all twelve (transfer)."""
    download: bool = False
    """Fetch what is not there through torchvision (transfer)."""
    shots: tuple[int, ...] | None = None
    """Images to learn from, a class; default 1 5 10 (few-shot)."""
    budgets: tuple[int, ...] | None = None
    """Labels a class; default 1 2 5 10 20 50 100 (label-curve)."""
    repeats: int | None = None
    """Draws of the labelled images; default 3 (label-curve)."""
    from_scratch: bool = True
    """Also train a supervised network from scratch (label-curve)."""


@dataclass(frozen=True)
class Compare:
    """One table of what was measured on several runs: the latest figure of each kind, with its interval."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")]]
    """Run folders, or files of result lines."""
    out: str | None = None
    """Folder for compare.md, compare.csv and compare.png."""


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


_EXTRAS = {"demo": "skimage", "parquet": "pyarrow", "plot": "matplotlib", "transfer": "scipy"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit codes are listed in docs/exit-codes.md."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbs: dict[str, Callable[[list[str]], None]] = {
        "demo": demo,
        "pretrain": pretrain,
        "evaluate": evaluate,
        "compare": compare,
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
    from nnclr.data.source import open_source, test_split
    from nnclr.dry_run import dry_run
    from nnclr.training import build, make_views, resolve, train

    source = open_source(given["data"])
    test = open_source(given["test_data"]) if "test_data" in given else test_split(given["data"])
    config = resolve(make_config(**{"out": "unused"} | given), source)
    state = build(config, torch.device(config.device), labels=source.labels)
    for text in dry_run(config, source, test, state, [view.size for view in make_views(config)], train):
        print(text, flush=True)


_OF_ALL_PROTOCOLS = ("encoder", "data", "protocol", "test", "baselines", "out", "device", "num_workers", "seed")


def evaluate(arguments: list[str]) -> None:
    """`nnclr evaluate`: progress on standard error, the records as JSON on standard output."""
    from nnclr.device import choose_device
    from nnclr.evaluation import check_parameters
    from nnclr.evaluation import evaluate as run_evaluate
    from nnclr.evaluation.result import Result, append
    from nnclr.pretrained import baselines, open_encoder

    options = tyro.cli(
        Evaluate,
        args=arguments,
        prog="nnclr evaluate",
        description=Evaluate.__doc__,
    )
    special = [field for field in fields(options) if field.name not in _OF_ALL_PROTOCOLS]
    values = {field.name: getattr(options, field.name) for field in special}
    given = {field.name: values[field.name] for field in special if values[field.name] != field.default}
    check_parameters(options.protocol, given)
    device = choose_device(options.device)
    folder = Path(options.encoder)
    own, others = _result_files(folder, options.out)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def measure(encoder: Any, file: Path | None) -> Result:
        result = run_evaluate(
            encoder,
            options.data,
            options.test,
            protocol=options.protocol,
            num_workers=options.num_workers,
            seed=options.seed,
            say=say,
            **given,
        )
        if file is not None:
            append(result, file)
        say(result.in_words())
        return result

    encoder = open_encoder(options.encoder, device)
    results = [measure(encoder, own)]
    if options.baselines:
        results += [measure(baseline, others) for baseline in baselines(encoder, options.seed)]
    _show(results, folder if own is not None and options.out is None else None, say)
    records = [asdict(result) for result in results]
    print(json.dumps(records if options.baselines else records[0], indent=2))


def _result_files(folder: Path, out: str | None) -> tuple[Path | None, Path | None]:
    """Where results of the encoder and of baselines are added."""
    if out is not None:
        if not Path(out).parent.is_dir() or Path(out).is_dir():
            raise InputError(f"--out {out} must be a file in a folder that exists")
        return Path(out), Path(out)
    is_run = (folder / "config.toml").is_file()
    return (folder / "evaluations.jsonl", folder / "baselines.jsonl") if is_run else (None, None)


def _show(results: list[Any], folder: Path | None, say: Callable[[str], None]) -> None:
    """What a protocol has beside its number: a table, a curve."""
    from nnclr.evaluation.transfer import table
    from nnclr.report import draw_label_curve

    for result in results:
        if result.protocol == "transfer":
            say(table(result.details, result.encoder_name))
        elif result.protocol == "label-curve":
            say(result.details["in_words"])
    if folder is not None and results[0].protocol == "label-curve":
        draw_label_curve(folder / "label-curve.png", results[0].details["curve"])
        say(f"curve: {folder / 'label-curve.png'}")


def compare(arguments: list[str]) -> None:
    """`nnclr compare`."""
    from nnclr.compare import compare as make_table

    options = tyro.cli(Compare, args=arguments, prog="nnclr compare", description=Compare.__doc__)
    if not options.runs:
        raise InputError("name at least one run folder, or file of result lines, to compare")
    print(make_table(list(options.runs), None if options.out is None else Path(options.out)), end="")


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
        for extra, module in _EXTRAS.items():
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
  nnclr evaluate RUN_OR_ENCODER DATA --protocol knn|linear|logistic|finetune|transfer|label-free|retrieval|few-shot|
                 label-curve [--fraction 0.01] [--baselines]
  nnclr compare RUN... [--out DIR]           one table and plot of what was measured
  nnclr sweep SPEC.toml [--out DIR]          a grid of runs with seeds, one table and plot
  nnclr info [RUN|DATA]                      versions and devices; what a run or a data set holds

DATA is a folder of images, FILE.parquet, torchvision:NAME or demo-photos. `nnclr COMMAND --help` explains the flags."""


if __name__ == "__main__":
    sys.exit(main())
