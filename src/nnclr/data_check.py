"""`nnclr data check`: what a long run would find in its images, before it is started."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nnclr.checkpoint import write_atomically
from nnclr.data.ahead import ahead
from nnclr.data.decode import FORMATS, BadImage, decode
from nnclr.data.images import Source, safe, shown
from nnclr.data.shards import indexed_files
from nnclr.data.source import open_source
from nnclr.data.storage import sha256_of
from nnclr.errors import DataError, InputError
from nnclr.progress import Lines

_USUAL_MODES = ("RGB", "L")
_SMALL = 32  # pixels of a shorter side below which an image shows little
_LONG = 4  # times the shorter side that the longer one may have
_LISTED = 1000  # names in the report, of each kind
_SHOWN = 3  # names in the table, of each kind
_SORTED = 0.5  # classes in a shard, as a share of those in a fair sample of its size


class _Look(NamedTuple):
    """What was seen of an image that can be read."""

    width: int
    height: int
    mode: str  # of Pillow, before anything is made RGB
    kind: str  # format of its file
    digest: bytes  # of its file, or of its pixels where it has none
    moving: bool = False  # whether there are further frames, which are not looked at


def _is_report(path: Path) -> bool:
    """Whether a file is what `check_data` writes."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and "verdict" in report


def check_data(data: str, out: str | Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Read every image, and list what is wrong, what is double and what is odd.

    Args:
        data: a text that `open_source` takes.
        out: JSON file for the report.
        say: takes the lines of progress.

    Returns:
        The report; "usable" says whether training would go through, and "verdict" what it would leave out, or the
        sentence with which it would stop.

    Raises:
        InputError: if the data cannot be opened, or the report cannot be written there.
    """
    if out is not None and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise InputError(f"--out {shown(out)} must be a file in a folder that exists")
    if out is not None and (Path(out).suffix != ".json" or (Path(out).exists() and not _is_report(Path(out)))):
        raise InputError(f"--out {shown(out)} must be a .json file that is new or an earlier report; name another one")
    source = open_source(data)
    damaged = _damaged_shards(data, say)
    sides, digests = np.zeros((len(source), 2), np.int32), np.zeros((len(source), 16), np.uint8)
    modes, kinds, odd, moving = Counter[str](), Counter[str](), [], []
    bad: dict[int, str] = {}
    lines = Lines(f"checking {source.name}", len(source), 0, say)
    for i, look in enumerate(ahead(lambda i: _look(source, i), range(len(source)))):
        if isinstance(look, str):
            bad[i] = look
        else:
            sides[i], digests[i] = (look.width, look.height), np.frombuffer(look.digest, np.uint8)
            modes[look.mode] += 1
            kinds[look.kind] += 1
            if look.mode not in _USUAL_MODES:
                odd.append(i)
            if look.moving:
                moving.append(i)
        lines.at(i + 1)
    stops = _stops(source, bad, damaged)
    reasons = Counter(why.partition(":")[0] for why in bad.values())
    report = {
        "data": source.name,
        "fingerprint": source.fingerprint,
        "images": len(source),
        "left_out": source.skipped,
        "left_out_first": {reason: list(names) for reason, names in source.skipped_first.items()},
        "unreadable": _listed(source, list(bad), [bad[i] for i in bad]) | {"reasons": dict(reasons.most_common())},
        "duplicates": _duplicates(source, digests, np.flatnonzero(sides[:, 0])),
        "formats": dict(kinds.most_common()),
        "modes": dict(modes.most_common()),
        "odd_modes": _listed(source, odd),
        "animations": _listed(source, moving),
        "sizes": _sizes(source, sides),
        "labels": _labels(source),
        "unlabelled": source.unlabelled,
        "damaged_shards": damaged,
        "usable": stops is None,
        "verdict": _fine(source, bad) if stops is None else stops,
    }
    if out is not None:
        write_atomically(Path(out), (json.dumps(report, indent=1) + "\n").encode())
    return report


def _look(source: Source, i: int) -> _Look | str:
    """What an image is, or why it cannot be read."""
    try:
        if source.content is None:
            pixels = source.read(i)
            return _Look(pixels.shape[1], pixels.shape[0], "RGB", "none", _digest(pixels.tobytes()))
        with source.reading(i):
            content = source.content(i)
        height, width = decode(content).shape[:2]
    except BadImage as error:
        return safe(error)
    except DataError as error:  # of a remote shard: the others are to be looked at, too
        return f"unreadable: {safe(error)}"
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        moving = image.format != "MPO" and getattr(image, "is_animated", False)  # a camera's MPO holds a preview, too
        return _Look(width, height, image.mode, image.format or "", _digest(content), moving)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _damaged_shards(data: str, say: Callable[[str], None]) -> list[str]:
    """What is wrong with which shard, by its SHA-256."""
    damaged = []
    shards = indexed_files(data)
    for number, file in enumerate(shards):
        try:
            if sha256_of(file) != file.sha256:
                damaged.append(f"{file.name}: its SHA-256 is not that of the index")
        except OSError as error:
            damaged.append(f"{file.name}: {error.strerror or error}")
        if number % 100 == 99:
            say(f"checking shards: {number + 1} of {len(shards)}")
    return damaged


def _listed(source: Source, ids: list[int], reasons: list[str] | None = None) -> dict[str, Any]:
    """How many images, and the names of the first ones."""
    names = [source.describe(i) for i in ids[:_LISTED]]
    if reasons is not None:
        names = [f"{name} ({reason})" for name, reason in zip(names, reasons, strict=False)]
    return {"count": len(ids), "first": names}


def _duplicates(source: Source, digests: np.ndarray, readable: np.ndarray) -> dict[str, Any]:
    """Images whose files are equal byte for byte, in groups."""
    keys = np.ascontiguousarray(digests[readable]).view("V16").ravel()
    _, of_group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[of_group] > 1)
    rows = rows[np.argsort(of_group[rows], kind="stable")]
    groups = np.split(readable[rows], np.flatnonzero(np.diff(of_group[rows])) + 1) if len(rows) else []
    groups.sort(key=lambda group: int(group[0]))
    labels = source.labels
    doubted = 0 if labels is None else sum(len(set(labels[group].tolist())) > 1 for group in groups)
    return {
        "groups": len(groups),
        "surplus": len(rows) - len(groups),
        "groups_with_different_labels": doubted,
        "first": [[source.describe(int(i)) for i in group[:20]] for group in groups[:_LISTED]],
    }


def _sizes(source: Source, sides: np.ndarray) -> dict[str, Any]:
    """Smallest and largest image by pixels, and what is unusually small or long."""
    readable = np.flatnonzero(sides[:, 0])
    if len(readable) == 0:
        return {}
    pixels = sides[readable].astype(np.int64).prod(axis=1)
    shorter, longer = sides[readable].min(axis=1), sides[readable].max(axis=1)

    def one(row: int) -> dict[str, Any]:
        width, height = sides[readable[row]].tolist()
        return {"width": width, "height": height, "image": source.describe(int(readable[row]))}

    return {
        "smallest": one(int(pixels.argmin())),
        "largest": one(int(pixels.argmax())),
        "median_shorter_side": int(np.median(shorter)),
        "small": _listed(source, readable[shorter < _SMALL].tolist()),
        "long": _listed(source, readable[longer > _LONG * shorter].tolist()),
    }


def _labels(source: Source) -> dict[str, Any] | None:
    """Images of each class, and the share of classes that a shard has of those that chance would give it."""
    if source.labels is None or source.class_names is None:
        return None
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    told: dict[str, Any] = {"classes": dict(zip(source.class_names, counts.tolist(), strict=True))}
    if source.blocks is not None and source.window < len(source.blocks):
        parts = np.split(source.labels, np.cumsum(source.blocks)[:-1])
        found = sum(len(np.unique(part)) for part in parts)
        fair = sum(float((1 - (1 - counts / counts.sum()) ** len(part)).sum()) for part in parts)
        told["classes_in_a_shard"] = found / fair
    return told


def _fine(source: Source, bad: dict[int, str]) -> str:
    if not bad:
        return "fine"
    return f"usable, but {len(bad)} of the {len(source)} images cannot be read; training leaves them out"


def _stops(source: Source, bad: dict[int, str], damaged: list[str]) -> str | None:
    """With what training would stop."""
    if damaged:
        return (
            f"{len(damaged)} of the shards of {source.name} are damaged, first {damaged[0]}; restore them, or pack the "
            "images into a new folder"
        )
    if not bad:
        return None
    from nnclr.data.loader import check_bad  # it brings torch, which takes seconds to import

    try:
        check_bad(bad, source)
    except DataError as error:
        return str(error)
    return None


# ---- for people --------------------------------------------------------------------------------------------


def in_words(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of a table."""
    bad, double, sizes, labels = (report[key] for key in ("unreadable", "duplicates", "sizes", "labels"))
    yield f"images        {report['images']} in {report['data']}"
    for reason, count in report["left_out"].items():
        yield f"left out      {count} x {reason}"
        if first := report["left_out_first"].get(reason):
            yield from _names({"count": count, "first": first})
    yield f"unreadable    {bad['count']}{_counts(bad['reasons'])}"
    yield from _names(bad)
    yield f"duplicates    {double['surplus']} more than needed, in {double['groups']} groups of equal files"
    if double["groups_with_different_labels"]:
        yield f"              {double['groups_with_different_labels']} of the groups under different labels"
    for group in double["first"][:_SHOWN]:
        yield f"              {' = '.join(group[:_SHOWN])}{' = ...' if len(group) > _SHOWN else ''}"
    yield f"formats      {_counts(report['formats'])}"
    yield f"modes        {_counts(report['modes'])}"
    yield from _names(report["odd_modes"])
    if report["animations"]["count"]:
        yield f"animations    {report['animations']['count']} of several frames, of which the first is used"
        yield from _names(report["animations"])
    if sizes:
        for name in ("smallest", "largest"):
            yield f"{name:<14}{sizes[name]['width']} x {sizes[name]['height']}  {sizes[name]['image']}"
        yield f"median        {sizes['median_shorter_side']} pixels on the shorter side"
        yield f"small         {sizes['small']['count']} below {_SMALL} pixels on the shorter side"
        yield from _names(sizes["small"])
        yield f"long          {sizes['long']['count']} more than {_LONG} times as long as wide"
        yield from _names(sizes["long"])
    yield from _label_lines(labels, report["unlabelled"])
    for shard in report["damaged_shards"]:
        yield f"damaged       {shard}"
    yield f"verdict       {report['verdict']}"


def _label_lines(labels: dict[str, Any] | None, why: str) -> Iterator[str]:
    if labels is None:
        yield f"labels        none{why and f', because {why}'}; pre-training needs none"
        return
    counts = Counter(labels["classes"]).most_common()
    yield f"labels        {len(counts)} classes with {counts[-1][1]} to {counts[0][1]} images"
    for name, count in counts if len(counts) <= 12 else [*counts[:6], ("...", ""), *counts[-5:]]:
        yield f"              {name} {count}".rstrip()
    share = labels.get("classes_in_a_shard", 1.0)
    if share < _SORTED:
        yield (
            f"              the shards are sorted: one holds {100 * share:.0f} % of the classes that chance would give "
            "it; nnclr pack mixes 8 GiB of them at a time"
        )


def _counts(counts: dict[str, int]) -> str:
    return " " + ", ".join(f"{name} {count}" for name, count in counts.items()) if counts else ""


def _names(listed: dict[str, Any]) -> Iterator[str]:
    for name in listed["first"][:_SHOWN]:
        yield f"              {name}"
    if listed["count"] > _SHOWN:
        yield f"              ... and {listed['count'] - _SHOWN} more"
