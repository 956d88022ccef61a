"""The layouts in which the authors of the twelve transfer sets publish them, and the plain one, to `Source`s.

What a list names must exist, but it is not opened: pictures that cannot be decoded are found when they are read.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.data.decode import decode, read_file
from nnclr.data.folder import folder_source
from nnclr.data.images import Source, array_source, shown
from nnclr.errors import InputError

SPLITS = ("train", "val", "test")
Parts = dict[str, Source]  # split -> its images; without val or test where the set has none of its own
_Rows = list[tuple[str, Any]]  # path below the folder, and class index or one value a class
_ABSENT = (-1, -1)


def find_reader(key: str, folder: Path) -> Callable[[Path], Parts] | None:
    """What reads this folder: the set's own layout before the plain one, None where it has neither."""
    marks, read = _LAYOUTS[key]
    if any((folder / mark).exists() for mark in marks):
        return read
    is_plain = key != "voc2007" and (folder / "train").is_dir() and (folder / "test").is_dir()
    return _plain if is_plain else None


def expected(key: str) -> str:
    """What a folder of this set would hold, for messages."""
    plain = "" if key == "voc2007" else ", nor train and test with a folder for each class"
    return f"{' or '.join(_LAYOUTS[key][0])}{plain}"


# ---- what all readers share --------------------------------------------------------------------------------


def _listed(folder: Path, classes: list[str], lists: dict[str, _Rows]) -> Parts:
    """Sources of the files that lists name; all of them must exist, below the folder, and in one list only."""
    for split, rows in lists.items():
        if not rows:
            raise InputError(f"its list of {split} images is empty")
    paths = [path for rows in lists.values() for path, _ in sorted(rows)]
    outside = [path for path in paths if os.path.isabs(path) or ".." in path.split("/")]
    if outside:
        raise InputError(f"its lists name {shown(outside[0])}, which lies elsewhere")
    if sum(len({path for path, _ in rows}) for rows in lists.values()) > len(set(paths)):
        raise InputError("its lists share images, so that it would be tested on what it was trained on")
    states = {path: _file_state(folder / path) for path in paths}
    missing = [path for path in paths if states[path] == _ABSENT]
    if missing:
        first = shown(missing[0])
        raise InputError(f"{len(missing)} of its {len(paths)} listed images are missing, the first being {first}")
    return {split: _file_source(folder, classes, sorted(rows), states) for split, rows in lists.items()}


def _file_source(folder: Path, classes: list[str], rows: _Rows, states: dict[str, tuple[int, int]]) -> Source:
    values = np.array([value for _, value in rows], np.int64)
    if values.ndim == 1 and not (values.min() >= 0 and values.max() < len(classes)):
        raise InputError(f"its labels go from {values.min() + 1} to {values.max() + 1}, with {len(classes)} classes")
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for path, value in rows:
        digest.update(os.fsencode(path) + f"\0{states[path][0]}\0{value}\n".encode())

    def fetch(i: int) -> np.ndarray:
        return decode(read_file(os.fsencode(folder / rows[i][0])))

    def title(i: int) -> str:
        return shown(rows[i][0])

    names = tuple(shown(name) for name in classes)
    written = hashlib.sha256(repr([states[path][1] for path, _ in rows]).encode()).hexdigest()
    source = Source(folder.name, len(rows), fetch, title, digest.hexdigest(), class_names=names, revision=written)
    return replace(source, labels=values) if values.ndim == 1 else replace(source, multilabels=values.astype(np.int8))


def _file_state(path: Path) -> tuple[int, int]:
    """Bytes in a regular file and when it was written, in ns."""
    try:
        status = os.stat(path)
    except OSError:
        return _ABSENT
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else _ABSENT


def _need(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"its {shown(path.name)} is missing")
    return path


def _lines(path: Path) -> list[str]:
    text = _need(path).read_text("utf-8", "surrogateescape")
    return [line.strip() for line in text.split("\n") if line.strip()]


def _mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    content: dict[str, Any] = loadmat(_need(path), squeeze_me=True)
    return content


def _numbered(classes: list[str], rows: list[tuple[str, str]]) -> _Rows:
    """Class names to class indices."""
    number = {name: i for i, name in enumerate(classes)}
    for path, name in rows:
        if name not in number:
            raise InputError(f"its lists give {shown(path)} the class '{shown(name)}', which it does not have")
    return [(path, number[name]) for path, name in rows]


# ---- one reader a layout -----------------------------------------------------------------------------------


def _plain(folder: Path) -> Parts:
    """{train,val,test}/CLASS/*.jpg; the classes are those of train."""
    found = {split: folder_source([folder / split]) for split in SPLITS if (folder / split).is_dir()}
    classes = found["train"].class_names
    return {split: _plain_part(part, split, classes) for split, part in found.items()}


def _plain_part(part: Source, split: str, classes: tuple[str, ...] | None) -> Source:
    if part.labels is None or part.class_names is None or classes is None:
        raise InputError(f"its {split} folder has images that lie in no folder of a class")
    unknown = sorted(set(part.class_names) - set(classes))
    if unknown:
        raise InputError(f"its {split} folder has a class '{unknown[0]}' that train lacks")
    labels = np.array([classes.index(name) for name in part.class_names], np.int64)[part.labels]
    digest = hashlib.sha256("\0".join((part.fingerprint, *classes)).encode())
    return replace(
        part,
        title=lambda i: f"{split}/{part.title(i)}",
        fingerprint=digest.hexdigest(),
        labels=labels,
        class_names=classes,
    )


def _food(folder: Path) -> Parts:
    lists = {}
    for split in ("train", "test"):
        table = folder / "meta" / f"{split}.json"
        if table.is_file():
            lists[split] = [name for names in json.loads(table.read_text("utf-8")).values() for name in names]
        else:
            lists[split] = _lines(table.with_suffix(".txt"))
    classes = sorted({name.split("/")[0] for names in lists.values() for name in names})
    rows = {split: [(f"images/{name}.jpg", name.split("/")[0]) for name in names] for split, names in lists.items()}
    return _listed(folder, classes, {split: _numbered(classes, named) for split, named in rows.items()})


def _cifar(kind: str, folder: Path) -> Parts:
    """The binary version; the one in Python's format is left to torchvision, which compares its MD5 sums first."""
    ten = kind == "CIFAR10"
    names = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
    if not names.is_file():
        from torchvision import datasets

        read = {split: getattr(datasets, kind)(str(folder.parent), train=split == "train") for split in SPLITS[::2]}
        return {
            split: array_source(data.data, np.array(data.targets), f"{kind} {split}", data.classes)
            for split, data in read.items()
        }
    files = {"train": ["train.bin"], "test": ["test.bin"]}
    if ten:
        files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    classes, parts = _lines(names), {}
    for split, paths in files.items():
        rows = np.concatenate([_cifar_rows(folder / path, 3073 if ten else 3074) for path in paths])
        labels = rows[:, -3073].astype(np.int64)  # the last byte before the pixels; CIFAR-100 has a coarse one first
        if labels.max() >= len(classes):
            raise InputError(f"its {split} labels go to {labels.max()}, with {len(classes)} classes")
        parts[split] = array_source(rows[:, -3072:].reshape(-1, 3, 32, 32), labels, f"{kind} {split}", classes)
    return parts


def _cifar_rows(path: Path, width: int) -> np.ndarray:
    content: np.ndarray = np.fromfile(_need(path), np.uint8)
    if content.size == 0 or content.size % width:
        raise InputError(f"its {path.name} has {content.size} bytes, which is no multiple of {width}")
    rows: np.ndarray = content.reshape(-1, width)
    return rows


def _birdsnap(folder: Path) -> Parts:
    header, *table = (line.split("\t") for line in _lines(folder / "images.txt"))
    path, species = header.index("path"), header.index("species_id")
    home = folder if (folder / "images").is_dir() else folder / "download"  # where get_birdsnap.py puts them
    gone = home / "fail.txt"  # lines of URL and path
    failed = {line.split("\t")[-1] for line in _lines(gone)} if gone.is_file() else set()
    ids = sorted({int(row[species]) for row in table})
    names = {}
    if (folder / "species.txt").is_file():
        names = {int(row[0]): row[1] for row in (line.split("\t") for line in _lines(folder / "species.txt")[1:])}
    tested = set(_lines(folder / "test_images.txt")[1:])
    lists: dict[str, _Rows] = {"train": [], "test": []}
    for row in table:
        if row[path] not in failed:
            file = (home / "images" / row[path]).relative_to(folder).as_posix()
            lists["test" if row[path] in tested else "train"].append((file, ids.index(int(row[species]))))
    return _listed(folder, [names.get(i, str(i)) for i in ids], lists)


def _sun(folder: Path) -> Parts:
    """The first of the ten published partitions; lines are like /a/abbey/sun_x.jpg, classes like /a/abbey."""
    lists = folder / "Partitions" if (folder / "Partitions" / "Training_01.txt").is_file() else folder
    names = folder / "ClassName.txt"
    classes = _lines(names if names.is_file() else lists / "ClassName.txt")
    rows = {}
    for split, name in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        lines = _lines(lists / name)
        rows[split] = _numbered(classes, [(line.lstrip("/"), line.rsplit("/", 1)[0]) for line in lines])
    return _listed(folder, [name[3:] for name in classes], rows)


def _cars(folder: Path) -> Parts:
    devkit, name = folder / "devkit", "cars_test_annos_withlabels.mat"
    annotations = {
        "train": devkit / "cars_train_annos.mat",
        "test": folder / name if (folder / name).is_file() else devkit / name,
    }
    classes = [str(name) for name in np.atleast_1d(_mat(devkit / "cars_meta.mat")["class_names"])]
    lists: dict[str, _Rows] = {}
    for split, file in annotations.items():
        rows = np.atleast_1d(_mat(file)["annotations"])
        lists[split] = [(f"cars_{split}/{row['fname']}", int(row["class"]) - 1) for row in rows]
    return _listed(folder, classes, lists)


def _aircraft(folder: Path) -> Parts:
    classes = _lines(folder / "data" / "variants.txt")
    lists = {}
    for split in SPLITS:
        rows = [line.split(" ", 1) for line in _lines(folder / "data" / f"images_variant_{split}.txt")]
        lists[split] = _numbered(classes, [(f"data/images/{image}.jpg", name) for image, name in rows])
    return _listed(folder, classes, lists)


def _voc(folder: Path) -> Parts:
    """In a class's list, 1 is shown, -1 is not shown, and 0 is shown by difficult objects only."""
    main = folder / "ImageSets" / "Main"
    classes = sorted(path.name.removesuffix("_train.txt") for path in main.glob("*_train.txt"))
    meaning, lists = {"1": 1, "-1": 0, "0": -1}, {}
    for split in SPLITS:
        images = _lines(main / f"{split}.txt")
        columns = []
        for name in classes:
            values = dict(line.split() for line in _lines(main / f"{name}_{split}.txt"))
            columns.append([meaning[values[image]] for image in images])
        rows = np.array(columns).T.tolist()
        lists[split] = [(f"JPEGImages/{image}.jpg", row) for image, row in zip(images, rows, strict=True)]
    return _listed(folder, classes, lists)


def _dtd(folder: Path) -> Parts:
    """The first of the ten published splits."""
    lists = {split: _lines(folder / "labels" / f"{split}1.txt") for split in SPLITS}
    classes = sorted({line.split("/")[0] for lines in lists.values() for line in lines})
    rows = {split: [(f"images/{line}", line.split("/")[0]) for line in lines] for split, lines in lists.items()}
    return _listed(folder, classes, {split: _numbered(classes, named) for split, named in rows.items()})


def _pets(folder: Path) -> Parts:
    names: dict[int, str] = {}
    lists: dict[str, _Rows] = {"train": [], "test": []}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        for line in _lines(folder / "annotations" / file):
            image, label = line.split()[:2]
            names[int(label)] = image.rsplit("_", 1)[0].replace("_", " ").title()
            lists[split].append((f"images/{image}.jpg", int(label) - 1))
    return _listed(folder, [names[i] for i in range(1, len(names) + 1)], lists)


def _caltech(folder: Path) -> Parts:
    """102 folders, of which BACKGROUND_Google is one: the paper's sizes count it."""
    source = folder_source([folder / "101_ObjectCategories"])
    if source.labels is None:
        raise InputError("its 101_ObjectCategories has images that lie in no folder of a class")
    return {"train": source}


def _flowers(folder: Path) -> Parts:
    from torchvision.datasets import Flowers102

    labels = np.atleast_1d(_mat(folder / "imagelabels.mat")["labels"]).astype(np.int64)
    ids = _mat(folder / "setid.mat")
    lists: dict[str, _Rows] = {}
    for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        images = np.atleast_1d(ids[name]).astype(np.int64).tolist()
        lists[split] = [(f"jpg/image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in images]
    return _listed(folder, Flowers102.classes[: labels.max()], lists)


# What shows that a folder has the layout of its authors, and what reads it.
_LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Path], Parts]]] = {
    "food101": (("meta",), _food),
    "cifar10": (("batches.meta.txt", "batches.meta"), partial(_cifar, "CIFAR10")),
    "cifar100": (("fine_label_names.txt", "meta"), partial(_cifar, "CIFAR100")),
    "birdsnap": (("images.txt",), _birdsnap),
    "sun397": (("ClassName.txt", "Partitions"), _sun),
    "cars": (("devkit",), _cars),
    "aircraft": (("data",), _aircraft),
    "voc2007": (("ImageSets",), _voc),
    "dtd": (("labels",), _dtd),
    "pets": (("annotations",), _pets),
    "caltech101": (("101_ObjectCategories",), _caltech),
    "flowers102": (("imagelabels.mat", "setid.mat"), _flowers),
}
