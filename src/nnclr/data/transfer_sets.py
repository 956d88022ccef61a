"""The twelve data sets of the paper's transfer experiments (Dwibedi et al., 2021), read from local folders.

Each is read in the layout its authors publish, with their splits. Where they have no validation split, one is
drawn from the training images: class by class, by a hash of the seed, with the size the paper states.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.counter import permutation
from nnclr.data.images import Source, shown
from nnclr.data.transfer_layouts import SPLITS, Parts, expected, find_reader
from nnclr.errors import InputError

TOP1, PER_CLASS, MAP = "top-1 accuracy", "mean per-class accuracy", "11-point mAP"


@dataclass(frozen=True)
class TransferSet:
    """One of the twelve sets.

    Args:
        key: name on the command line and in files.
        title: name for people.
        metric: "top-1 accuracy", "mean per-class accuracy" or "11-point mAP".
        classes: number of classes.
        sizes: published number of images to train, validate and test.
        folders: names below ROOT under which it is looked for, in this order.
        how: where to get it and what to unpack where; ROOT stands for the folder of all sets.
        published: linear evaluation of ResNet-50 in %, as the paper prints it: NNCLR, BYOL, SimCLR, supervised.
    """

    key: str
    title: str
    metric: str
    classes: int
    sizes: tuple[int, int, int]
    folders: tuple[str, ...]
    how: str
    published: dict[str, float]


@dataclass(frozen=True)
class Splits:
    """The three parts of a set; `class_names` is the same in all, and no file is in two."""

    train: Source
    val: Source
    test: Source


def _paper(*figures: float) -> dict[str, float]:
    return dict(zip(("NNCLR", "BYOL", "SimCLR", "supervised"), figures, strict=True))


_OXFORD, _TORONTO = "https://www.robots.ox.ac.uk/~vgg/data", "https://www.cs.toronto.edu/~kriz/cifar.html"
_TABLE = (
    TransferSet(
        "food101",
        "Food-101",
        TOP1,
        101,
        (68175, 7575, 25250),
        ("food-101", "food101"),
        "unpack food-101.tar.gz of https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101 in ROOT",
        _paper(76.7, 75.3, 72.8, 72.3),
    ),
    TransferSet(
        "cifar10",
        "CIFAR-10",
        TOP1,
        10,
        (45000, 5000, 10000),
        ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10"),
        f"unpack cifar-10-binary.tar.gz of {_TORONTO} in ROOT",
        _paper(93.7, 91.3, 90.5, 93.6),
    ),
    TransferSet(
        "cifar100",
        "CIFAR-100",
        TOP1,
        100,
        (45000, 5000, 10000),
        ("cifar-100-binary", "cifar-100-python", "cifar100"),
        f"unpack cifar-100-binary.tar.gz of {_TORONTO} in ROOT",
        _paper(79.0, 78.4, 74.4, 78.3),
    ),
    TransferSet(
        "birdsnap",
        "Birdsnap",
        TOP1,
        500,
        (42405, 4981, 2443),
        ("birdsnap",),
        "unpack http://thomasberg.org/datasets/birdsnap/1.1/birdsnap.tgz in ROOT and run get_birdsnap.py in "
        "ROOT/birdsnap, which fetches the photos that are still online and lists the others in fail.txt",
        _paper(61.4, 57.2, 42.4, 53.7),
    ),
    TransferSet(
        "sun397",
        "SUN397",
        TOP1,
        397,
        (15880, 3970, 19850),
        ("SUN397", "sun397"),
        "unpack SUN397.tar.gz of https://vision.princeton.edu/projects/2010/SUN in ROOT and its Partitions.zip in "
        "ROOT/SUN397",
        _paper(62.5, 62.2, 60.6, 61.9),
    ),
    TransferSet(
        "cars",
        "Stanford Cars",
        TOP1,
        196,
        (6494, 1650, 8041),
        ("stanford_cars", "cars"),
        "put cars_train, cars_test, devkit and cars_test_annos_withlabels.mat in ROOT/stanford_cars (their own site "
        "is gone; https://github.com/pytorch/vision/issues/7545 names copies)",
        _paper(67.1, 67.8, 49.3, 66.7),
    ),
    TransferSet(
        "aircraft",
        "FGVC Aircraft",
        PER_CLASS,
        100,
        (3334, 3333, 3333),
        ("fgvc-aircraft-2013b", "aircraft"),
        f"unpack fgvc-aircraft-2013b.tar.gz of {_OXFORD}/fgvc-aircraft in ROOT",
        _paper(64.1, 60.6, 49.8, 61.0),
    ),
    TransferSet(
        "voc2007",
        "VOC2007",
        MAP,
        20,
        (2501, 2510, 4952),
        ("VOCdevkit/VOC2007", "VOC2007", "voc2007"),
        "unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007 in ROOT",
        _paper(83.0, 82.5, 81.4, 82.8),
    ),
    TransferSet(
        "dtd",
        "DTD",
        TOP1,
        47,
        (1880, 1880, 1880),
        ("dtd/dtd", "dtd"),
        f"unpack dtd-r1.0.1.tar.gz of {_OXFORD}/dtd in ROOT",
        _paper(75.5, 75.5, 75.7, 74.9),
    ),
    TransferSet(
        "pets",
        "Oxford-IIIT Pets",
        PER_CLASS,
        37,
        (2940, 740, 3669),
        ("oxford-iiit-pet", "pets"),
        f"unpack images.tar.gz and annotations.tar.gz of {_OXFORD}/pets in ROOT/oxford-iiit-pet",
        _paper(91.8, 90.4, 84.6, 91.5),
    ),
    TransferSet(
        "caltech101",
        "Caltech-101",
        PER_CLASS,
        102,
        (2550, 510, 6084),
        ("caltech101", "caltech-101"),
        "unpack caltech-101.zip of https://data.caltech.edu/records/mzrjq-6wc02 and then the "
        "101_ObjectCategories.tar.gz in it, in ROOT/caltech101",
        _paper(91.3, 94.2, 89.3, 94.5),
    ),
    TransferSet(
        "flowers102",
        "Oxford Flowers-102",
        PER_CLASS,
        102,
        (1020, 1020, 6149),
        ("flowers-102", "flowers102"),
        f"unpack 102flowers.tgz of {_OXFORD}/flowers/102 in ROOT/flowers-102 and put imagelabels.mat and setid.mat "
        "beside its jpg folder",
        _paper(95.1, 96.1, 92.6, 94.7),
    ),
)
TRANSFER_SETS = {known.key: known for known in _TABLE}


def open_transfer_set(key: str, root: Path, seed: int = 0) -> Splits | None:
    """The splits of a transfer set, of whatever size it is.

    Beside its own layout, every set but VOC2007 may be `ROOT/NAME/{train,val,test}/CLASS/*.jpg`, where val may be
    absent. A drawn validation split has the published share of the training images, in each class. Caltech-101
    has no split at all: 30 images a class, fewer where none would remain to test, are drawn to train and
    validate. VOC2007 has `multilabels` and no `labels`; -1 there is a class of which the image shows difficult
    objects only. SUN397 and DTD are the first of their ten published partitions.

    Args:
        key: of `TRANSFER_SETS`.
        root: the folder that holds the sets.
        seed: of whatever is drawn.

    Returns:
        The splits, images in the order of their paths (CIFAR: as stored), or None where no folder of it exists.

    Raises:
        InputError: if the key is unknown, or the set is there but incomplete or laid out in another way.
    """
    known = _known(key)
    there = [root / name for name in known.folders if (root / name).is_dir()]
    if not there:
        return None
    folder, read = next(((folder, read) for folder in there if (read := find_reader(key, folder))), (there[0], None))
    try:
        if read is None:
            raise InputError(f"it holds no {expected(key)}")
        parts = _drawn_parts(known, read(folder), seed)
    except ImportError:
        raise InputError(
            f"{known.title} in {shown(folder)} has .mat files, which take scipy: pip install 'nnclr[transfer]'"
        ) from None
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"it cannot be read ({_first_line(error)})"
        how = known.how.replace("ROOT", shown(root))
        raise InputError(f"{known.title} in {shown(folder)}: {reason}; {how}") from error
    return Splits(*(replace(parts[split], name=f"{known.title} {split}") for split in SPLITS))


def download_transfer_set(key: str, root: Path) -> None:
    """Download a set into ROOT through torchvision's class for it.

    Raises:
        InputError: if the key is unknown, torchvision has no such class, or the download fails; the message says
            where the files are to be had.
    """
    from torchvision import datasets

    known = _known(key)
    how = known.how.replace("ROOT", shown(root))
    if key not in _DOWNLOADS:
        raise InputError(f"torchvision does not download {known.title}; {how}")
    try:
        for name, arguments in _DOWNLOADS[key]:
            getattr(datasets, name)(str(root), download=True, **arguments)
        if key == "sun397":  # torchvision leaves out the lists of training and test images
            url, md5 = _SUN_PARTITIONS
            datasets.utils.download_and_extract_archive(url, str(root / "SUN397" / "Partitions"), md5=md5)
    except Exception as error:
        raise InputError(
            f"{known.title} could not be downloaded to {shown(root)} ({_first_line(error)}); {how}"
        ) from error


def _known(key: str) -> TransferSet:
    if key not in TRANSFER_SETS:
        raise InputError(f"no transfer set is called '{key}'; there are {', '.join(TRANSFER_SETS)}")
    return TRANSFER_SETS[key]


def _first_line(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {error}".splitlines()[0][:160])


# ---- splits that are drawn ---------------------------------------------------------------------------------


def _drawn_parts(known: TransferSet, parts: Parts, seed: int) -> Parts:
    """Draw the test and validation images that have no list of their own."""
    if "test" not in parts:
        everything = parts["train"]
        counts = _class_counts(everything)
        taken = _draw(everything, np.minimum(30, counts - 1), seed)
        parts = {"train": everything.subset(np.flatnonzero(taken)), "test": everything.subset(np.flatnonzero(~taken))}
    if "val" not in parts:
        pool = parts["train"]
        train, val, _ = known.sizes
        taken = _draw(pool, _class_shares(_class_counts(pool), val / (train + val)), seed)
        if not taken.any():
            raise InputError("no class has the two training images that it takes to set one aside for validation")
        parts |= {"train": pool.subset(np.flatnonzero(~taken)), "val": pool.subset(np.flatnonzero(taken))}
    return parts


def _class_counts(source: Source) -> np.ndarray:
    assert source.labels is not None
    assert source.class_names is not None
    counts: np.ndarray = np.bincount(source.labels, minlength=len(source.class_names))
    return counts


def _class_shares(counts: np.ndarray, fraction: float) -> np.ndarray:
    """How many of `counts` images to take of each class: a fraction of all, by largest remainders.

    At least one of each class is taken and one left, where it has two.
    """
    total = round(int(counts.sum()) * fraction)
    exact = counts * total / max(counts.sum(), 1)
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    kept: np.ndarray = np.clip(shares, 1, np.maximum(counts - 1, 0))
    return kept


def _draw(source: Source, shares: np.ndarray, seed: int) -> np.ndarray:
    """A mask, (n,) bool, of `shares[c]` images of each class c, chosen by their hash."""
    taken = np.zeros(len(source), bool)
    for c, share in enumerate(shares):
        members = np.flatnonzero(source.labels == c)
        taken[members[permutation(seed, c, len(members))[:share]]] = True
    return taken


# torchvision's classes, and what they are called with.
_DOWNLOADS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "food101": [("Food101", {})],
    "cifar10": [("CIFAR10", {})],
    "cifar100": [("CIFAR100", {})],
    "sun397": [("SUN397", {})],
    "cars": [("StanfordCars", {})],
    "aircraft": [("FGVCAircraft", {})],
    "voc2007": [("VOCDetection", {"year": "2007", "image_set": part}) for part in ("trainval", "test")],
    "dtd": [("DTD", {})],
    "pets": [("OxfordIIITPet", {})],
    "caltech101": [("Caltech101", {})],
    "flowers102": [("Flowers102", {})],
}
_SUN_PARTITIONS = (
    "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
    "29a205c0a0129d21f36cbecfefe81881",
)
