"""A map of a run's images: what its encoder puts beside what, as an SVG element for a page."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from nnclr import counter
from nnclr.data.images import Source
from nnclr.data.source import open_source
from nnclr.encoder import Encoder
from nnclr.errors import NNCLRError
from nnclr.findings import Record, escaped

MOST_IMAGES, MOST_CLASSES = 2_000, 20
_SIZE, _FEWEST = 1_000, 3
# Of middle lightness, so that they stand out from a light page and from a dark one.
_COLOURS = (
    "#3b82f6 #ea7317 #22a559 #d6409f #8b5cf6 #0fa3a3 #c9a20c #e5484d #6b7a8f #7cb518 "
    "#b06f3f #4f6bdb #e88fb4 #2f8f6b #a855c7 #5fb0d6 #f0a35e #8f9e3e #b8526a #7f8ee0"
).split()
_REST = "#8b8f97"


@dataclass(frozen=True)
class RunMap:
    """A drawn map.

    Args:
        svg: the element.
        classes: name, colour and number of images of each class, most frequent first; empty without labels.
        text: what it shows, in a sentence.
    """

    svg: str
    classes: list[tuple[str, str, int]]
    text: str


def draw_map(record: Record) -> RunMap | str:
    """Embed at most 2,000 images of the run's test data, or of its data, and lay them out in two dimensions.

    Returns:
        The map, or a sentence that says why there is none.
    """
    from nnclr.explorer.projection import project

    try:
        encoder = Encoder.from_pretrained(record.path)
        source, held_out = _open(record)
        chosen = np.sort(counter.permutation(0, 0, len(source))[:MOST_IMAGES])
        sample = source.subset(chosen)
        features = encoder.embed(sample)
    except (NNCLRError, OSError) as error:
        return f"There is no map: {error}."
    norms = np.linalg.norm(features, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    if usable.sum() < _FEWEST:
        return "There is no map: too few images have an embedding."
    vectors = (features[usable] / norms[usable, None]).astype(np.float32)
    found = project(vectors, record.path / "map.npz", say=lambda text: None)
    labels = None if sample.labels is None else sample.labels[usable]
    of = "" if len(source) == len(chosen) else f" of {len(source):,}"
    trained = record.environment.get("data")
    same = isinstance(trained, dict) and trained.get("fingerprint") == source.fingerprint
    on = "it was trained on them" if same else "it was not trained on them" if held_out else "they have changed since"
    text = f"{int(usable.sum()):,}{of} images of {source.name} ({on}), by {found.how}."
    classes = [] if labels is None else _classes(labels, source.class_names)
    legend = [(name, colour, count) for _, name, colour, count in classes]
    return RunMap(_scatter(found.points, labels, classes), legend, text)


def _open(record: Record) -> tuple[Source, bool]:
    """The test images, or else those of the training."""
    test, data = record.config.get("test_data"), record.config.get("data")
    if isinstance(test, str):
        with suppress(NNCLRError, OSError):  # the data itself may be there
            return open_source(test), True
    return open_source(str(data)), False


def _classes(labels: np.ndarray, names: tuple[str, ...] | None) -> list[tuple[int, str, str, int]]:
    """Label, name, colour and count, the most frequent first; what has no colour of its own is left out."""
    counts = np.bincount(labels)
    order = [int(i) for i in np.argsort(-counts, kind="stable")[:MOST_CLASSES] if counts[i]]
    return [
        (i, str(i) if names is None else names[i], colour, int(counts[i]))
        for i, colour in zip(order, _COLOURS, strict=False)
    ]


def _scatter(points: np.ndarray, labels: np.ndarray | None, classes: list[tuple[int, str, str, int]]) -> str:
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (_SIZE - 40) / max(float((high - low).max()), 1e-9)
    places = np.rint((points - low) * scale + 20).astype(int)
    width, height = (places.max(axis=0) + 20).tolist()
    radius = 15 if len(points) < 500 else 11
    parts = [f'<g fill="none" stroke-linecap="round" stroke-width="{radius}" stroke-opacity=".8">']
    if labels is None:
        parts.append(_dots(places, height, "var(--series-1)"))
    else:
        parts.append(_dots(places[~np.isin(labels, [label for label, *_ in classes])], height, _REST))
        parts += [_dots(places[labels == label], height, colour) for label, _, colour, _ in classes]
    parts.append("</g>")
    if labels is not None:
        for label, name, _, _ in classes:
            x, y = np.median(places[labels == label], axis=0)
            parts.append(f'<text x="{x:.0f}" y="{height - y:.0f}">{escaped(name)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Map of the embeddings">{"".join(parts)}</svg>'


def _dots(places: np.ndarray, height: int, colour: str) -> str:
    path = "".join(f"M{x} {height - y}h0" for x, y in places.tolist())
    return f'<path stroke="{colour}" d="{path}"/>' if path else ""
