"""What each verb of the `nnclr` command takes; the text under a field is its help. `pretrain` takes those of Config."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


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
    """Where the encoder runs: cpu, cuda, cuda:N or auto."""
    num_workers: int | None = None
    """Threads that decode images; default one a core, up to 8."""
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
class Embed:
    """Write the embeddings of images to a file; the same command goes on after an interruption."""

    encoder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_OR_ENCODER")]]
    """Run or encoder folder, hf:OWNER/NAME, timm:NAME, torchvision:NAME, checkpoint:FILE?backbone=NAME, or pixels."""
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Images; no labels needed."""
    out: str
    """FILE.parquet, or FILE.npy with FILE.ids.csv and FILE.json beside it."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    batch_size: int = 256
    """Images at a time."""
    device: str = "cpu"
    """Where the encoder runs: cpu, cuda, cuda:N or auto."""
    num_workers: int | None = None
    """Threads that decode images; default one a core, up to 8."""


@dataclass(frozen=True)
class Search:
    """Find the images most similar to pictures or to items; near-duplicates; labels that neighbours doubt."""

    embeddings: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="EMBEDDINGS")]]
    """A file that nnclr embed wrote, or any parquet or .npy file of embeddings."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="QUERY_IMAGE")]] = ()
    """Picture files to search for."""
    ids: Annotated[tuple[int, ...], tyro.conf.arg(name="id", metavar="ID")] = ()
    """Items of the file to search for."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Neighbours a query."""
    together: bool = False
    """Search once for the mean of all queries instead of once for each."""
    encoder: str | None = None
    """Encoder of the pictures; default the one that the file names."""
    approximate: bool = False
    """Use an index by faiss, built once and kept beside the file; its recall is reported."""
    duplicates: float | None = None
    """List pairs at least this similar, for example 0.95."""
    label_hints: bool = False
    """List items whose neighbours carry another label."""
    out: str | None = None
    """CSV file for the results."""


@dataclass(frozen=True)
class Explore:
    """Open a local web page: a map of all images, neighbours, search by picture, selections, two encoders compared."""

    embeddings: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="EMBEDDINGS...")]]
    """Files that nnclr embed wrote; those of one encoder are joined, another encoder's is compared."""
    data: str | None = None
    """Where the images are, if they have moved since."""
    encoder: str | None = None
    """Encoder for pictures that are dropped in; default the one that the file names."""
    projection: Literal["umap", "pca"] = "umap"
    """How the map is made."""
    host: str = "127.0.0.1"
    """Address to listen on; another one than this machine's own needs --token."""
    port: int = 8765
    """Port to listen on; 0 takes a free one."""
    token: str | None = None
    """Secret that the page asks for, at least 16 characters."""
    browser: bool = True
    """Open the page."""
    atlas: str | None = None
    """Write a parquet file for Apple's Embedding Atlas instead, and say how to open it."""


@dataclass(frozen=True)
class Export:
    """Write an encoder as other libraries load it, load it there, and say how far the features differ."""

    encoder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_OR_ENCODER")]]
    """Run or encoder folder, hf:OWNER/NAME, timm:NAME, torchvision:NAME, or checkpoint:FILE?backbone=NAME."""
    format: Literal["torchvision", "timm", "huggingface", "onnx"]
    """Who shall load it."""
    out: str
    """File to write; a folder for huggingface."""


@dataclass(frozen=True)
class Report:
    """Write a run as one HTML file that needs nothing else: results, curves, neighbours, map, settings."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Run folder."""
    out: str | None = None
    """File to write; default report.html in the run folder."""


@dataclass(frozen=True)
class Verify:
    """Say of every file of a run folder whether it is as it was written; nothing is changed."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Run folder; it may be training."""


@dataclass(frozen=True)
class Pack:
    """Write images as WebDataset tar shards with an index; the same command goes on after an interruption."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Images; labels are kept."""
    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """Folder for the shards and their index."""
    size: int | None = None
    """Pixels that the shorter side is reduced to; default none."""
    shard_size: int = 256
    """MB of a shard, at most."""
    quality: int = 90
    """JPEG quality of images that are reduced, or whose format is not stored."""


@dataclass(frozen=True)
class Data:
    """Check images before a long run: what is unreadable, double or odd, and whether shards are damaged."""

    action: tyro.conf.Positional[Annotated[Literal["check"], tyro.conf.arg(metavar="check")]]
    """What to do."""
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Images, all of which are read."""
    out: str | None = None
    """JSON file for the whole report."""


@dataclass(frozen=True)
class Info:
    """Show versions and devices; with a run folder or data, what was found there."""

    target: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="RUN_OR_DATA")]] = None
    """Run folder or DATA."""
