"""What a protocol is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from nnclr import counter
from nnclr.data.augment import IMAGENET_MEAN, IMAGENET_STD, View, normalize, policy, upload
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.data.source import open_source, test_split
from nnclr.encoder import Encoder
from nnclr.errors import DataError, InputError, NonFiniteError
from nnclr.evaluation.features import embedded

_HOLD_OUT = 0.1  # share of the data that is scored where there is no test set


@dataclass
class Outcome:
    """A protocol's number and how it came about."""

    metric: str
    value: float  # in [0, 1]
    interval: tuple[float, float] | None  # 95 %
    interval_method: str
    parameters: dict[str, Any]
    train: Source  # what was learned from
    test: Source  # what was scored
    n_train: int
    n_test: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """One evaluation: an encoder, the images, and where to say how far it is."""

    encoder: Encoder
    data: Any
    test: Any
    num_workers: int
    seed: int
    say: Callable[[str], None]
    _known: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # features by data, of this evaluation

    def warn(self, text: str) -> None:
        """Say what may spoil the number, in a line that is known as a warning by its first word."""
        self.say(f"warning: {text}")

    def warn_of_edge(self, validation: dict[str, float]) -> None:
        """Say so where the best of some learning rates is the lowest or the highest, and better than the one beside it.

        Args:
            validation: accuracy on a hold-out by learning rate.
        """
        rates = sorted(validation, key=float)
        for edge, beside, word in ((rates[:1], rates[1:2], "low"), (rates[-1:], rates[-2:-1], "high")):
            if beside and validation[edge[0]] == max(validation.values()) > validation[beside[0]]:
                self.warn(
                    f"the {word}est learning rate that was tried, {edge[0]}, does best on the hold-out: a {word}er one "
                    "may do better (--learning-rates)"
                )

    def split(self) -> tuple[Source, Source]:
        """Images to learn from and images to score; see `split`.

        Raises:
            InputError: if there is one class only, or a class has a single image that would have to be on both sides.
        """
        train, scored = split(self.data, self.test, self.seed)
        _check_classes(train)
        if (train.fingerprint, train.revision) == (scored.fingerprint, scored.revision):
            self.warn(f"the images of {train.name} that are scored are those that were learned from")
        if self.test is None and test_split(self.data) is None:
            held_out = set(np.unique(_labels(scored)).tolist())
            single = [label for label in np.unique(_labels(train)).tolist() if label not in held_out]
            if single:
                name = (train.class_names or ())[single[0]]
                raise InputError(
                    f"class '{name}' of {train.name} has one image, which cannot be learned from and scored at once; "
                    "add images to it, or name a test set by --test"
                )
        return train, scored

    def scored(self) -> Source:
        """Labelled images of a protocol that learns nothing: the test images, or all where there are none."""
        test = open_source(self.test) if self.test is not None else test_split(self.data)
        source = open_source(self.data) if test is None else test
        if source.labels is None:
            raise InputError(no_labels(source))
        _check_classes(source)
        return source

    def readable_rows(self, source: Source, rows: np.ndarray) -> np.ndarray:
        """Those of some rows whose images can be read."""
        bad = np.isnan(self.embedded(source.subset(rows))[:, 0])
        if bad.any():
            self.warn(f"{int(bad.sum())} of {len(rows)} images of {source.name} cannot be read and are left out")
        kept: np.ndarray = rows[~bad]
        return kept

    def embedded(self, source: Source) -> np.ndarray:
        """Features (n, d) float32 of all images; the row of one that cannot be read is NaN."""
        key = source.fingerprint, source.revision  # files of other content may have the same names and sizes
        if key not in self._known:
            self._known[key] = embedded(self.encoder, source, self.num_workers, self.say)
        return self._known[key]

    def features(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, d) float32 and labels (n,) of the images that can be read; (n, c) where labels are many.

        Raises:
            DataError: if no image can be read.
            NonFiniteError: if the features of all images are not finite.
            InputError: if there are no labels.
        """
        labels = source.labels if source.multilabels is None else source.multilabels
        if labels is None:
            raise InputError(no_labels(source))
        vectors, rows = self.readable(source)
        return (vectors, labels) if len(rows) == len(labels) else (vectors, labels[rows])

    def readable(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, d) float32 of the images that can be read, and their rows (n,) in the source.

        Raises:
            DataError: if no image can be read.
            NonFiniteError: if the features of all images are not finite.
        """
        vectors = self.embedded(source)
        rows = np.flatnonzero(np.isfinite(vectors[:, 0]))  # the row of an image that cannot be read is NaN as a whole
        if not len(rows):
            raise none_readable(source) or NonFiniteError(
                f"no image of {source.name} gives finite features: the network has diverged"
            )
        if len(rows) == len(vectors):
            return vectors, rows
        unread = len(vectors) - len(rows)
        self.warn(f"{unread} of {len(source)} images of {source.name} cannot be read and are left out")
        return vectors[rows], rows


def none_readable(source: Source) -> DataError | None:
    """The error for images of which the first cannot be read, where none has features; None if it can be."""
    try:
        source.read(0)
    except BadImage as error:
        return DataError(
            f"none of the {len(source)} images of {source.name} can be read; "
            f"the first is {source.describe(0)} ({error})"
        )
    return None


def _check_classes(source: Source) -> None:
    if len(np.unique(_labels(source))) < 2:
        raise InputError(f"all images of {source.name} have the same label; there is nothing to tell apart")


def _labels(source: Source) -> np.ndarray:
    assert source.labels is not None
    return source.labels


def no_labels(source: Source) -> str:
    """The sentence for images without labels."""
    why = source.unlabelled or "one folder a class, or a label column"
    return f"{source.name} has no labels, and evaluation needs them: {why}"


def split(data: Any, test: Any, seed: int) -> tuple[Source, Source]:
    """Images to learn from and images to score.

    Without test images a tenth of each class is held out, at least one image of a class that has two.

    Raises:
        InputError: if either has no labels, or the test set has classes that the other one lacks.
    """
    train = open_source(data)
    scored = open_source(test) if test is not None else test_split(data)
    if train.labels is None:
        raise InputError(no_labels(train))
    if scored is None:
        held_out = balanced_share(train.labels, _HOLD_OUT, seed)
        return train.subset(np.flatnonzero(~held_out)), train.subset(np.flatnonzero(held_out))
    if scored.labels is None:
        raise InputError(no_labels(scored))
    number = {name: i for i, name in enumerate(train.class_names or ())}
    theirs = scored.class_names or ()
    present = {theirs[i] for i in np.unique(scored.labels)}
    known = {name for name, i in number.items() if (train.labels == i).any()}
    unknown = sorted(present - known)
    if unknown:
        raise InputError(f"{scored.name} has classes that {train.name} lacks, for example '{unknown[0]}'")
    # Classes are matched by name: a test set may lack some.
    labels = np.array([number.get(name, -1) for name in theirs])[scored.labels]
    return train, replace(scored, labels=labels, class_names=train.class_names)


def balanced_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: a seeded share of each class, at least one row of a class that has two, none of a single one."""
    rank = counter.bits(seed, -5, np.arange(len(labels)))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        chosen[rows[np.argsort(rank[rows], kind="stable")[:count]]] = True
    return chosen


def crop_and_flip(image_size: int) -> View:
    """The training view of labelled images: flips, and crops of at least 0.08 of the area, 0.2 up to 64 pixels."""
    return policy("crop-only", image_size, flip=0.5)[0]


def renormalised(views: Tensor, encoder: Encoder) -> Tensor:
    """Views that the loader normalised by ImageNet's mean and deviation, by the encoder's own instead."""
    if encoder.mean == IMAGENET_MEAN and encoder.std == IMAGENET_STD:
        return views
    mean, std = upload(np.array([IMAGENET_MEAN, IMAGENET_STD], np.float32), views.device)[:, :, None, None]
    return normalize(views * std + mean, encoder.mean, encoder.std)
