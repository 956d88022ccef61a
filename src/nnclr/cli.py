"""The `nnclr` command: one thin function a verb."""

import difflib
import io
import json
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

import nnclr
from nnclr.arguments import parse
from nnclr.errors import DataError, InputError, NNCLRError, Stopped, StorageError, tell
from nnclr.options import (
    Compare,
    Data,
    Demo,
    Embed,
    Evaluate,
    Explore,
    Export,
    Info,
    Pack,
    Report,
    Search,
    Sweep,
    Verify,
)

_WITHOUT_TORCH = ("compare", "data", "info", "pack")  # or what they need of it they load themselves
_LATE = 2.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit codes are listed in docs/exit-codes.md."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may have letters that a terminal or pipe lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _answer(arguments)
        sys.stdout.flush()
    except NNCLRError as error:
        if not error.told:
            tell(f"nnclr: {error}")
        return error.exit_code
    except BrokenPipeError:  # nnclr ... | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it leaves
        return 0
    except KeyboardInterrupt:
        trains = arguments[:1] in (["pretrain"], ["demo"])
        tell(f"nnclr: interrupted before {'there was anything to save' if trains else 'it was done'}")
        return 130
    return code


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"nnclr {nnclr.__version__}")
        return 0
    try:
        _run(arguments[0], arguments[1:])
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One plain line: the place in the source is for those who call the function from Python."""
    tell(f"nnclr: warning: {message}")


def _run(verb: str, arguments: list[str]) -> None:
    verbs: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "demo": (Demo, demo),
        "evaluate": (Evaluate, evaluate),
        "compare": (Compare, compare),
        "sweep": (Sweep, sweep),
        "embed": (Embed, embed),
        "search": (Search, search),
        "explore": (Explore, explore),
        "export": (Export, export),
        "report": (Report, report),
        "verify": (Verify, verify),
        "pack": (Pack, pack),
        "data": (Data, data),
        "info": (Info, info),
    }
    if verb == "pretrain":
        _load_torch()
        pretrain(arguments)
    elif verb in verbs:
        kind, function = verbs[verb]
        options = parse(kind, arguments, verb, description=kind.__doc__)
        if verb not in _WITHOUT_TORCH:
            _load_torch()
        function(options)
    else:
        near = difflib.get_close_matches(verb, ["pretrain", *verbs], n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are pretrain, {', '.join(verbs)}"
        raise InputError(f"'{verb}' is no command; {meant}")


def _load_torch() -> None:
    """Import what takes longest; a person who has waited for it a while is told."""
    if "torch" in sys.modules or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        return
    late = threading.Timer(_LATE, tell, ["nnclr: loading PyTorch, which takes some seconds here"])
    late.daemon = True
    late.start()
    try:
        import torch  # noqa: F401 - so that the rest finds it loaded
    finally:
        late.cancel()


def demo(options: Demo) -> None:
    """`nnclr demo`."""
    from nnclr.demo import run_demo

    run_demo(Path(options.out), options.seed)


_DRY_RUN = "Show what the run would be, try two steps of it, and leave nothing behind; needs no --out."


def pretrain(arguments: list[str]) -> None:
    """`nnclr pretrain`: every flag is a field of `Config`, but for --dry-run."""
    from nnclr.config import Config, load_preset

    @dataclass(frozen=True)
    class Flags(Config):
        dry_run: Annotated[bool, tyro.conf.arg(help=_DRY_RUN)] = False

    dry_run = any(argument.replace("_", "-") == "--dry-run" for argument in arguments)
    preset = _preset(arguments)
    defaults: dict[str, Any] = {"data": tyro.MISSING, "out": tyro.MISSING}
    if preset is not None:
        defaults |= load_preset(preset)
    default = Flags(**defaults | ({"out": "unused"} if dry_run else {}))
    config = parse(
        Flags,
        arguments,
        "pretrain",
        default=default,
        description="Train a backbone without labels; run the same command again to resume.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    if dry_run and not config.dry_run:  # --dry-run False
        raise InputError("--dry-run is there and switched off; leave it out")
    if ":" in config.objective:
        sys.path.insert(0, "")  # MODULE:CLASS may lie in the working directory, as with python -m
    values = {field.name: getattr(config, field.name) for field in fields(Config)}
    given = {name: value for name, value in values.items() if value != getattr(default, name)}
    if config.dry_run:
        _print_dry_run(given)
    else:
        from nnclr.training import pretrain as run_pretrain

        run_pretrain(**given)


def _print_dry_run(given: dict[str, Any]) -> None:
    import torch

    from nnclr.config import make_config
    from nnclr.data.source import open_source, test_split
    from nnclr.dry_run import dry_run
    from nnclr.training import build, make_views, resolve, train

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--dry-run tries one process; start it without torchrun")
    source = open_source(given["data"])
    test = open_source(given["test_data"]) if "test_data" in given else test_split(given["data"])
    config = resolve(make_config(**{"out": "unused"} | given), source)
    state = build(config, torch.device(config.device), labels=source.labels)
    for text in dry_run(config, source, test, state, [view.size for view in make_views(config)], train):
        print(text, flush=True)


_OF_ALL_PROTOCOLS = ("encoder", "data", "protocol", "test", "baselines", "out", "device", "num_workers", "seed")


def evaluate(options: Evaluate) -> None:
    """`nnclr evaluate`: progress on standard error, the result on standard output: words on a terminal, else JSON."""
    from nnclr.device import choose_device
    from nnclr.distributed import process_group, rank
    from nnclr.evaluation import check_parameters
    from nnclr.evaluation import evaluate as run_evaluate
    from nnclr.evaluation.result import Result, append, summary
    from nnclr.pretrained import baselines, open_encoder

    special = [field for field in fields(options) if field.name not in _OF_ALL_PROTOCOLS]
    values = {field.name: getattr(options, field.name) for field in special}
    given = {field.name: values[field.name] for field in special if values[field.name] != field.default}
    check_parameters(options.protocol, given)
    device = choose_device(options.device)
    folder = Path(options.encoder)
    own, others = _result_files(folder, options.out)
    say = _warnings_once(tell)

    def measure(encoder: Any, file: Path | None) -> Result:
        result = run_evaluate(
            encoder,
            options.data,
            options.test,
            protocol=options.protocol,
            num_workers=options.num_workers,
            seed=options.seed,
            say=say if rank() == 0 else None,
            **given,
        )
        if rank() == 0:
            if options.baselines or not sys.stdout.isatty():  # or it would be said twice in a row
                tell(result.in_words())
            if file is not None:
                try:
                    append(result, file)
                except OSError as error:
                    print(json.dumps(asdict(result)))  # hours may be in it
                    raise StorageError(
                        f"the result is printed above, and could not be added to {file}: {error.strerror}"
                    ) from error
        return result

    with process_group(device):
        main = rank() == 0
        encoder = open_encoder(options.encoder, device)
        results = [measure(encoder, own)]
        if options.baselines:
            results += [measure(baseline, others) for baseline in baselines(encoder, options.seed)]
    if not main:
        return
    _show(results, folder if own is not None and options.out is None else None)
    if sys.stdout.isatty():
        kept = dict.fromkeys(file for file in (own, others if options.baselines else None) if file is not None)
        print(*summary(results, list(kept)), sep="\n")
        return
    records = [asdict(result) for result in results]
    print(json.dumps(records if options.baselines else records[0], indent=2))


def _warnings_once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Each distinct warning is said once, however many encoders are measured on the same images."""
    said: set[str] = set()

    def once(text: str) -> None:
        if text.startswith("warning: "):
            if text in said:
                return
            said.add(text)
        say(text)

    return once


def _result_files(folder: Path, out: str | None) -> tuple[Path | None, Path | None]:
    """Where results of the encoder and of baselines are added."""
    if out is not None:
        if Path(out).suffix != ".jsonl" or not Path(out).parent.is_dir() or Path(out).is_dir():
            raise InputError(f"--out {out} must be a .jsonl file in a folder that exists; results are added to it")
        return Path(out), Path(out)
    is_run = (folder / "config.toml").is_file()
    return (folder / "evaluations.jsonl", folder / "baselines.jsonl") if is_run else (None, None)


def _show(results: list[Any], folder: Path | None) -> None:
    """What a protocol has beside its number: a table, a curve."""
    from nnclr.evaluation.transfer import table
    from nnclr.plots import draw_label_curve

    texts = [
        table(result.details, result.encoder_name) if result.protocol == "transfer" else result.details.get("in_words")
        for result in results
    ]
    for text in dict.fromkeys(texts):
        if text is not None:
            tell(text)
    if folder is not None and results[0].protocol == "label-curve":
        draw_label_curve(folder / "label-curve.png", results[0].details["curve"])
        tell(f"curve: {folder / 'label-curve.png'}")


def compare(options: Compare) -> None:
    """`nnclr compare`."""
    from nnclr.compare import compare as make_table

    if not options.runs:
        raise InputError("name at least one run folder, or file of result lines, to compare")
    print(make_table(list(options.runs), None if options.out is None else Path(options.out)), end="")


def sweep(options: Sweep) -> None:
    """`nnclr sweep`."""
    from nnclr.sweep import run_sweep

    spec = Path(options.spec)
    out = Path("runs") / f"sweep-{spec.stem}" if options.out is None else Path(options.out)
    try:
        table = run_sweep(spec, out)
    except KeyboardInterrupt as error:  # between two runs: within one, it answers by itself
        if not out.is_dir():
            raise
        raise Stopped("stopped by SIGINT; finished runs are kept, run the same command again to go on") from error
    print(f"\n{table.read_text()}\n{table}")


def embed(options: Embed) -> None:
    """`nnclr embed`."""
    from nnclr.device import choose_device
    from nnclr.distributed import process_group
    from nnclr.embed import embed_to_file
    from nnclr.pretrained import open_encoder

    device = choose_device(options.device)
    with process_group(device):
        embed_to_file(
            open_encoder(options.encoder, device),
            options.data,
            options.out,
            dtype=options.dtype,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
        )


def search(options: Search) -> None:
    """`nnclr search`."""
    from nnclr.search import run_search

    values = {field.name: getattr(options, field.name) for field in fields(options)}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(run_search(**values, width=width, say=tell))


_OF_THE_PAGE = ("encoder", "host", "port", "token", "browser")


def explore(options: Explore) -> None:
    """`nnclr explore`."""
    from nnclr.explorer import explore as serve
    from nnclr.explorer import write_atlas

    if not options.embeddings:
        raise InputError("name at least one file that nnclr embed wrote")
    if options.atlas is not None:
        if len(options.embeddings) != 1:
            raise InputError("--atlas takes one file of embeddings")
        for field in fields(options):
            if field.name in _OF_THE_PAGE and getattr(options, field.name) != field.default:
                flag = f"--{'no-' if field.default is True else ''}{field.name}"
                raise InputError(
                    f"--atlas writes a file and serves no page, on which {flag} has an effect; leave it out"
                )
        write_atlas(options.embeddings[0], Path(options.atlas), data=options.data, projection=options.projection)
        return
    serve(
        options.embeddings,
        host=options.host,
        port=options.port,
        token=options.token,
        data=options.data,
        encoder=options.encoder,
        projection=options.projection,
        open_browser=options.browser,
    )


def export(options: Export) -> None:
    """`nnclr export`."""
    from nnclr.export import export as write
    from nnclr.export import refuse_out
    from nnclr.pretrained import open_encoder

    refuse_out(options.format, Path(options.out))
    run = options.encoder if (Path(options.encoder) / "config.toml").is_file() else None
    write(open_encoder(options.encoder), options.format, options.out, run=run)


def report(options: Report) -> None:
    """`nnclr report`."""
    from nnclr.report import write_report

    print(write_report(Path(options.run), None if options.out is None else Path(options.out), say=tell))


def verify(options: Verify) -> None:
    """`nnclr verify`."""
    from nnclr.verify import verify as check_files

    check_files(options.run)


def pack(options: Pack) -> None:
    """`nnclr pack`."""
    from nnclr.pack import pack as write_shards

    write_shards(options.data, options.out, size=options.size, shard_size=options.shard_size, quality=options.quality)


def data(options: Data) -> None:
    """`nnclr data check`: progress on standard error, the table on standard output."""
    from nnclr.data_check import check_data, in_words

    report = check_data(options.data, options.out, say=tell)
    for line in in_words(report):
        print(line)
    if not report["usable"]:
        raise DataError(report["verdict"])


def info(options: Info) -> None:
    """`nnclr info`."""
    from nnclr.info import describe

    for line in describe(options.target):
        print(line)


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
  nnclr embed RUN_OR_ENCODER DATA --out FILE.parquet|FILE.npy
  nnclr search EMBEDDINGS QUERY_IMAGE... [-k 10] [--id N] [--duplicates 0.95] [--label-hints]
  nnclr explore EMBEDDINGS...                a local web page: map, neighbours, search by picture
  nnclr export RUN_OR_ENCODER --format torchvision|timm|huggingface|onnx --out PATH
  nnclr report RUN                           one self-contained HTML file
  nnclr verify RUN                           whether checkpoints, encoder and records are as they were written
  nnclr pack DATA OUT [--size PIXELS]        tar shards with an index, for millions of images
  nnclr data check DATA [--out FILE.json]    what is unreadable, double or odd, before a long run
  nnclr info [RUN|DATA]                      versions and devices; what a run or a data set holds

DATA is a folder of images, SHARDS.tar, FILE.parquet, FILE.npy, hf:NAME, torchvision:NAME or demo-photos.
`nnclr COMMAND --help` explains the flags."""


if __name__ == "__main__":
    sys.exit(main())
