"""What the explorer shows: pictures that one or two encoders have embedded, from one or several files."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnclr.data.decode import BadImage
from nnclr.data.images import Source, shown
from nnclr.data.source import open_source
from nnclr.embeddings import Embeddings, companions, open_embeddings, other_encoder
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.explorer.projection import Projection, project
from nnclr.pretrained import open_encoder
from nnclr.search import NeighbourIndex

Say = Callable[[str], None]


@dataclass(frozen=True)
class Column:
    """What the map can be coloured by.

    Args:
        name: for people.
        codes: (n,) int32, index into categories, -1 for none.
        categories: names.
        about: one line: where the column comes from.
    """

    name: str
    codes: np.ndarray
    categories: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Side:
    """One encoder's view of the collection."""

    name: str
    index: NeighbourIndex
    projection: Projection
    encoder: Encoder | None  # None: it cannot be had, so no picture of one's own can be searched


@dataclass(frozen=True)
class Collection:
    """n pictures in the order of the files, with one side for each encoder.

    Args:
        title: for people.
        names: n printable names.
        columns: at least one of label, file and cluster, if there is any.
        sides: one, or two to compare.
        notices: what does not work and why, one sentence each.
        files: the file that each picture's row is in, (n,).
        ids: the picture's index in that file's source, (n,).
        sources: of each file, None where thumbnails are off.
        stamps: of all files that were read, as they were then.
    """

    title: str
    names: Sequence[str]
    columns: tuple[Column, ...]
    sides: tuple[Side, ...]
    notices: tuple[str, ...]
    files: np.ndarray
    ids: np.ndarray
    sources: tuple[Source | None, ...]
    stamps: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def changed(self) -> bool:
        """Whether a file is no longer the one that was read; everything shown is still of that one."""
        return any(_stamp(path) != stamp for path, stamp in self.stamps.items())

    def picture(self, row: int) -> np.ndarray:
        """Picture of a row, (h, w, 3) uint8.

        Raises:
            BadImage: if it cannot be had.
        """
        source = self.sources[int(self.files[row])]
        if source is None:
            raise BadImage("unreadable", "its source is not open")
        return source.read(int(self.ids[row]))

    def neighbours(self, row: int, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each side the k rows nearest to a row, itself left out: similarities (k,) and rows (k,), best first."""
        found = [side.index.neighbours_of([row], k) for side in self.sides]
        return [(similarities[0], rows[0]) for similarities, rows in found]

    def search(self, pixels: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """The same for a picture from outside, (h, w, 3) uint8; None for a side without encoder."""
        answers: list[tuple[np.ndarray, np.ndarray] | None] = []
        for side in self.sides:
            if side.encoder is None:
                answers.append(None)
                continue
            similarities, rows = side.index.kneighbors(side.encoder.embed(pixels[None], num_workers=1), k)
            answers.append((similarities[0], rows[0]))
        return answers


def open_collection(
    paths: Sequence[str | Path],
    data: Any = None,
    encoder: str | None = None,
    projection: str = "umap",
    say: Say = print,
) -> Collection:
    """Open files of embeddings and compute or read their maps.

    Args:
        paths: files of one encoder, joined in one map; or of two, over the same pictures.
        data: where the pictures are, if not where the files say.
        encoder: an encoder of the files, if it is not where they say.
        projection: `umap` or `pca`.
        say: takes lines for people.

    Raises:
        InputError: if a file cannot be opened, or they do not belong together; one sentence says why.
    """
    if not paths:
        raise InputError("explore needs a file of embeddings; `nnclr embed` writes one")
    opened = [open_embeddings(path) for path in paths]
    stamps = {path: _stamp(path) for file in opened for path in _parts(file.path)}
    groups = _grouped(opened)
    notices: list[str] = []
    first = groups[0]
    sources = tuple(_source(file, data, notices) for file in first)
    encoders = _encoders([group[0] for group in groups], encoder, notices)
    for notice in notices:
        say(notice)
    sides = []
    names = _names([_encoder_name(group[0]) for group in groups])
    for files, name, made_by in zip(groups, names, encoders, strict=True):
        vectors = _joined(files)
        lengths = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
        unit = vectors.astype(np.float32) / np.maximum(lengths, 1e-30)
        title = name if len(groups) > 1 else ""
        placed = project(unit, _map_file(files), projection, say, title)
        sides.append(Side(name, NeighbourIndex(vectors), placed, made_by))
    return Collection(
        ", ".join(dict.fromkeys(_title(file) for file in first)),
        [name for file in first for name in file.names],
        tuple([*_labels(first), *_file_column(first), *_cluster_columns(sides)]),
        tuple(sides),
        tuple(notices),
        np.repeat(np.arange(len(first)), [len(file) for file in first]),
        np.concatenate([file.ids for file in first]),
        sources,
        stamps,
    )


def _grouped(files: list[Embeddings]) -> list[list[Embeddings]]:
    """Files by encoder, at most two groups; the second in the order of the first and with the same pictures."""
    groups: dict[Any, list[Embeddings]] = {}
    for file in files:
        print_of = file.facts.get("encoder_fingerprint")
        if print_of is None and len(files) > 1:
            raise InputError(f"{shown(file.path)} does not say which encoder made it, so it can only be explored alone")
        key = (print_of, repr(file.facts.get("preprocessing")), file.vectors.shape[1])
        groups.setdefault(key, []).append(file)
        data = [_data_key(other) for other in groups[key]]
        if data[-1] in data[:-1] and data[-1][0] is not None:
            other = groups[key][data.index(data[-1])]
            raise InputError(f"{shown(other.path)} and {shown(file.path)} hold the same pictures by the same encoder")
    if len(groups) > 2:
        raise InputError(f"the files are of {len(groups)} encoders; explore shows one, or compares two")
    first, *others = groups.values()
    if not others:
        return [first]
    second = {_data_key(file): file for file in others[0]}
    for file in first:
        match = second.get(_data_key(file))
        if match is None or len(others[0]) != len(first) or not np.array_equal(match.ids, file.ids):
            raise InputError(
                f"{shown(file.path)} and {shown(others[0][0].path)} are of different encoders and of different "
                "pictures; to compare two encoders, embed the same data with both"
            )
    return [first, [second[_data_key(file)] for file in first]]


def _data_key(file: Embeddings) -> tuple[Any, int]:
    return file.facts.get("data_fingerprint"), len(file)


def _joined(files: list[Embeddings]) -> np.ndarray:
    """The vectors in memory: a mapped file that is cut while it is served would end the process."""
    if len(files) == 1:
        return np.array(files[0].vectors)
    return np.concatenate([np.asarray(file.vectors, np.float32) for file in files])


def _map_file(files: list[Embeddings]) -> Path:
    path = files[0].path
    more = f".and-{len(files) - 1}-more" if len(files) > 1 else ""
    return path.with_name(f"{path.name}{more}.map.npz")


def _source(file: Embeddings, data: Any, notices: list[str]) -> Source | None:
    """The pictures of a file, or None and a notice if they are not the ones that were embedded."""
    name, wanted = shown(file.path), file.facts.get("data_fingerprint")
    asked = file.facts.get("data") if data is None else data
    if asked is None:
        notices.append(f"No thumbnails: {name} does not say where its pictures are; name them with --data.")
        return None
    try:
        source = open_source(asked)
    except InputError as error:
        notices.append(f"No thumbnails for {name}: {error}.")
        return None
    if wanted not in (None, source.fingerprint) or not _fits(file, source, known=wanted is not None):
        notices.append(
            f"No thumbnails for {name}: {source.name} is not the data that was embedded, pictures were added, removed "
            "or changed since; embed it anew, or name the right data with --data."
        )
        return None
    return source


def _fits(file: Embeddings, source: Source, known: bool) -> bool:
    """Whether the ids of a file count the pictures of a source; in a file that is not ours they may be anything."""
    if int(file.ids.min()) < 0 or int(file.ids.max()) >= len(source):
        return False
    some = np.linspace(0, len(file) - 1, min(len(file), 200)).astype(int).tolist()
    return known or all(source.describe(int(file.ids[row])) == file.names[row] for row in some)


def _encoders(files: list[Embeddings], asked: str | None, notices: list[str]) -> list[Encoder | None]:
    """The encoder of each file: the asked one where it made the file, else the one that the file names; or None."""
    found: list[Encoder | None] = []
    refused: list[str] = []  # why the asked one is not taken
    for file in files:
        named = file.facts.get("encoder")
        encoder, reason = _encoder(file, asked or named)
        if encoder is None and asked and named:
            refused.append(reason)
            encoder, reason = _encoder(file, named)
        if encoder is None:
            known = file.facts.get("encoder_fingerprint") is not None
            remedy = "name the encoder with --encoder" if known else "nnclr embed writes files that do"
            notices.append(f"No search by a picture of your own: {reason}; {remedy}.")
        found.append(encoder)
    if len(refused) == len(files):
        notices.append(f"--encoder is not used: {refused[0]}.")
    return found


def _encoder(file: Embeddings, spec: str | None) -> tuple[Encoder | None, str]:
    """An encoder if it is the one that made a file, else None and why it is not."""
    name = shown(file.path)
    if file.facts.get("encoder_fingerprint") is None:
        return None, f"{name} does not say which encoder made it"
    if not spec:
        return None, "its encoder had no name"
    try:
        encoder = open_encoder(spec)
    except InputError as error:
        return None, str(error)
    differing = other_encoder(file.facts, encoder)
    if differing is None:
        return encoder, ""
    return None, f"{shown(spec)} is not the encoder that made {name}: its {differing} differ"


def _title(file: Embeddings) -> str:
    return os.path.basename(shown(str(file.facts.get("data_name") or file.path.name)).rstrip("/"))


def _encoder_name(file: Embeddings) -> str:
    text = shown(str(file.facts.get("encoder") or file.path.name))
    return text if ":" in text else os.path.basename(text.rstrip("/"))


def _names(names: list[str]) -> list[str]:
    return (
        names
        if len(set(names)) == len(names)
        else [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)]
    )


def _labels(files: list[Embeddings]) -> list[Column]:
    """The classes of all files, joined by name."""
    if all(file.labels is None for file in files):
        return []
    categories = tuple(dict.fromkeys(name for file in files for name in file.class_names or ()))
    number = {name: i for i, name in enumerate(categories)}
    codes = [number.get(file.label_name(row), -1) for file in files for row in range(len(file))]
    return [
        Column("label", np.array(codes, np.int32), categories, "labels of the data; they were not used for the map")
    ]


def _file_column(files: list[Embeddings]) -> list[Column]:
    if len(files) == 1:
        return []
    codes = np.repeat(np.arange(len(files), dtype=np.int32), [len(file) for file in files])
    return [Column("file", codes, tuple(shown(file.path.name) for file in files), "file of embeddings")]


def _cluster_columns(sides: list[Side]) -> list[Column]:
    columns = []
    for side in sides:
        clusters = side.projection.clusters
        if clusters is not None:
            names = tuple(f"cluster {i + 1}" for i in range(int(clusters.max()) + 1))
            name = "cluster" if len(sides) == 1 else f"cluster by {side.name}"
            about = f"k-means, {len(names)} clusters of the embeddings, numbered by size"
            columns.append(Column(name, clusters.astype(np.int32), names, about))
    return columns


def _parts(path: Path) -> list[Path]:
    return [path, *(file for file in companions(path) if path.suffix == ".npy")]


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
