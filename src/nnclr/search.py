"""`nnclr search`: what is similar to these pictures, what is there twice, which labels look wrong."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from rich.cells import cell_len, set_cell_size

from nnclr.checkpoint import write_atomically
from nnclr.data.images import cell, shown
from nnclr.embeddings import Embeddings, companions, open_embeddings, other_encoder, skipped_list
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.neighbours import Duplicates, Hints, near_duplicates
from nnclr.neighbours import NeighbourIndex as NeighbourIndex  # this is where people look for it
from nnclr.neighbours import label_hints as find_hints

MANY = 2_000_000  # rows above which an approximate search is suggested
_SHOWN = 50  # lines of a table; a file lists all
# Heads of the three tables.
_ANSWERS = ("query", "rank", "id", "path", "label", "similarity")
_DUPLICATES = ("group", "id", "path", "label", "other_id", "other_path", "other_label", "similarity")
_HINTS = ("id", "path", "label", "suggested", "share", "own_share")
_BATCH = 64  # pictures embedded at a time
_NARROW = 12  # columns of a terminal that every column of a table keeps


@dataclass(frozen=True)
class Found:
    """One answer to one query."""

    query: str
    rank: int  # from 1
    id: int
    path: str
    label: str  # empty for none
    similarity: float


def run_search(
    embeddings: str | Path,
    pictures: Sequence[str | Path] = (),
    ids: Sequence[int] = (),
    *,
    k: int = 10,
    together: bool = False,
    encoder: Encoder | str | Path | None = None,
    approximate: bool = False,
    duplicates: float | None = None,
    label_hints: bool = False,
    out: str | Path | None = None,
    width: int | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """All of `nnclr search`: one kind of question to a file of embeddings.

    Args:
        embeddings: a file that `open_embeddings` opens.
        pictures: picture files whose neighbours are asked for.
        ids: ids of rows whose neighbours are asked for.
        k: neighbours; where there are fewer rows, all of them, and `say` is told.
        together: take all pictures and ids as one query.
        encoder: what embeds the pictures, in place of the one that the file names.
        approximate: use an approximate index, kept beside the file.
        duplicates: the least similarity of what counts as the same picture.
        label_hints: list the rows whose neighbours carry another label.
        out: `FILE.csv` for all of the answer; what is returned may be cut.
        width: columns of the terminal that will show the table; what is too long for it loses its middle. None: nothing
            is shortened.
        say: takes lines about the work.

    Returns:
        A table to print.

    Raises:
        InputError: if the question makes no sense, or a file cannot be used; nothing is written.
        StorageError: if a file cannot be written.
    """
    queries = bool(pictures or len(ids))
    if queries + (duplicates is not None) + label_hints != 1:
        raise InputError("ask for one thing: pictures or --id, or --duplicates THRESHOLD, or --label-hints")
    if approximate and duplicates is not None:
        raise InputError("--duplicates compares all pairs, which --approximate cannot; leave one of them out")
    if out is not None:
        _refuse_out(Path(out), Path(embeddings))
    opened = open_embeddings(embeddings)
    if queries:
        answer = _search(opened, pictures, ids, k, together, encoder, approximate, say)
        text, table = results_table(answer, width), results_csv(answer)
    elif duplicates is not None:
        pairs = near_duplicates(opened.vectors, duplicates, say)
        text, table = duplicates_table(opened, pairs, duplicates, width), duplicates_csv(opened, pairs)
    else:
        if opened.labels is None:
            raise InputError(f"{shown(embeddings)} has no labels, so none can be wrong")
        _compare_k(opened, k, len(opened) - 1, say)
        wrong = find_hints(_index(opened, approximate, say), opened.labels, k, say)
        text, table = hints_table(opened, wrong, width), hints_csv(opened, wrong)
    if out is None:
        return text
    write_atomically(Path(out), table.encode())
    return f"{text}\nall of it: {shown(out)}"


def search_file(
    embeddings: str | Path,
    pictures: Sequence[str | Path] = (),
    ids: Sequence[int] = (),
    k: int = 10,
    together: bool = False,
    encoder: Encoder | str | Path | None = None,
    approximate: bool = False,
    say: Callable[[str], None] = print,
) -> list[Found]:
    """The k rows most similar to each picture and to each row with one of the ids, best first.

    A row that was asked by its id is not among its own answers. See `run_search` for the arguments.

    Raises:
        InputError: if there is nothing to ask, a picture cannot be read, an id is not in the file, or the encoder is
            not the one that made the file.
    """
    if not pictures and not len(ids):
        raise InputError("name a picture or an id to search for")
    return _search(open_embeddings(embeddings), pictures, ids, k, together, encoder, approximate, say)


def _search(
    opened: Embeddings,
    pictures: Sequence[str | Path],
    ids: Sequence[int],
    k: int,
    together: bool,
    encoder: Encoder | str | Path | None,
    approximate: bool,
    say: Callable[[str], None],
) -> list[Found]:
    rows = _rows(opened, ids)
    _compare_k(opened, k, len(opened) - (len(set(ids)) if together else min(len(ids), 1)), say)
    asked = [_picture_vectors(opened, pictures, encoder, say)] if pictures else []
    index = _index(opened, approximate, say)
    names = [*map(shown, pictures), *(f"id {i}" for i in ids)]
    if together:
        vectors = np.concatenate([*asked, opened.vectors[rows].astype(np.float32)]).astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        mean = (vectors / np.maximum(norms, np.finfo(np.float64).tiny)).mean(axis=0)
        similarities, indices = index.kneighbors(mean, k + len(set(ids)))
        others = ~np.isin(indices[0], rows)
        return _found(opened, " + ".join(names), similarities[0][others][:k], indices[0][others][:k])
    answers: list[Found] = []
    blocks = [index.kneighbors(asked[0], k)] if pictures else []
    blocks += [index.neighbours_of(rows, k)] if len(rows) else []
    each = ((s, i) for block in blocks for s, i in zip(*block, strict=True))
    for name, (similarities, indices) in zip(names, each, strict=True):
        answers += _found(opened, name, similarities, indices)
    return answers


def _compare_k(opened: Embeddings, k: int, most: int, say: Callable[[str], None]) -> None:
    """Say it where k is more than the rows that can be found, which `NeighbourIndex` then returns all."""
    if k < 1:
        raise InputError(f"-k {k}: ask for at least one neighbour")
    if 0 < most < k:
        say(f"{shown(opened.path)} has {most} rows to find, fewer than -k {k}: all of them are used")


def _found(opened: Embeddings, query: str, similarities: np.ndarray, rows: np.ndarray) -> list[Found]:
    pairs = [(int(row), float(s)) for row, s in zip(rows, similarities, strict=True) if row >= 0]
    return [
        Found(query, rank, int(opened.ids[row]), opened.names[row], opened.label_name(row), similarity)
        for rank, (row, similarity) in enumerate(pairs, 1)
    ]


def _rows(opened: Embeddings, ids: Sequence[int]) -> np.ndarray:
    """Rows of the given ids."""
    order = np.argsort(opened.ids)
    wanted = np.array([i if -(2**63) <= i < 2**63 else -1 for i in ids], np.int64)  # ids are from 0
    place = np.searchsorted(opened.ids, wanted, sorter=order)
    rows = order[np.minimum(place, len(order) - 1)]
    missing = [i for i, found in zip(ids, opened.ids[rows].tolist(), strict=True) if i != found]
    if missing:
        raise InputError(
            f"{shown(opened.path)} has no id {missing[0]}; its {len(opened)} ids go from {opened.ids.min()} to "
            f"{opened.ids.max()}, less the pictures that could not be read"
        )
    return rows


def _picture_vectors(
    opened: Embeddings,
    pictures: Sequence[str | Path],
    encoder: Encoder | str | Path | None,
    say: Callable[[str], None],
) -> np.ndarray:
    """Embeddings (q, d) float32 of picture files by the encoder that made the others."""
    from nnclr.data.decode import BadImage, decode, read_file

    views = []
    made_by = _encoder(opened, encoder, say)
    for picture in pictures:
        try:
            image = decode(read_file(os.fspath(picture)))
        except BadImage as error:
            reason = str(error).replace(error.reason, error.reason.replace("_", " "), 1)
            raise InputError(f"{shown(picture)} cannot be used as a query: {reason}") from error
        views.append(made_by.view(image))
    return np.concatenate([made_by.embed_views(views[i : i + _BATCH]) for i in range(0, len(views), _BATCH)])


def _encoder(opened: Embeddings, spec: Encoder | str | Path | None, say: Callable[[str], None]) -> Encoder:
    """The encoder of a file, or the given one if it is the same.

    Raises:
        InputError: if there is none, or it has other weights or another preprocessing.
    """
    from nnclr.pretrained import open_encoder

    name, facts = shown(opened.path), opened.facts
    named = facts.get("encoder")
    if spec is None and not isinstance(named, str):
        raise InputError(f"{name} does not say which encoder made it; name it by --encoder, or ask by --id")
    encoder = open_encoder(str(named) if spec is None else spec)
    if "encoder_fingerprint" not in facts:
        say(f"{name} does not say which encoder made it: answers make sense only if it was this one")
    elif (differing := other_encoder(facts, encoder)) == "weights":
        raise InputError(
            f"{encoder.name or 'this encoder'} has other weights than those that made {name}; embed the data anew, or "
            "name the encoder that made it by --encoder"
        )
    elif differing == "preprocessing":
        raise InputError(f"{name} was made with another image size, crop or normalisation than this encoder has")
    return encoder


def _index(opened: Embeddings, approximate: bool, say: Callable[[str], None]) -> NeighbourIndex:
    if not approximate:
        if len(opened) > MANY:
            say(f"comparing with all {len(opened):,} rows; --approximate is faster, once its index is built")
        return NeighbourIndex(opened.vectors)
    kept = opened.path.with_name(opened.path.name + ".faiss")
    index = NeighbourIndex(opened.vectors, approximate=True, path=kept)
    made = "built" if index.built else "read from"
    say(f"approximate index {made} {shown(kept)}: it finds {100 * (index.recall or 0):.1f} % of the 10 true neighbours")
    return index


def _refuse_out(out: Path, embeddings: Path) -> None:
    if out.suffix != ".csv" or not out.parent.is_dir() or out.is_dir():
        raise InputError(f"--out {shown(out)} must be a .csv file in a folder that exists")
    own = {*companions(embeddings), skipped_list(embeddings)}
    if os.path.abspath(out) in {os.path.abspath(file) for file in own}:
        raise InputError(f"--out {shown(out)} belongs to the embeddings; choose another name")
    if out.is_file():
        with open(out, "rb") as file:
            head = file.readline(200).decode("utf-8", "replace").strip()
        if head not in {",".join(header) for header in (_ANSWERS, _DUPLICATES, _HINTS)}:
            raise InputError(f"--out {shown(out)} exists and holds no results of a search; choose another name")


def results_table(found: Iterable[Found], width: int | None = None) -> str:
    """Answers as one small table a query; for `width` see `run_search`."""
    queries: dict[str, list[Found]] = {}
    for one in found:
        queries.setdefault(one.query, []).append(one)
    header = ("rank", "similarity", "id", "label", "path")
    blocks = [
        f"{_shortened(query, width or cell_len(query))}\n"
        + _table(header, [(f.rank, f"{f.similarity:.4f}", f.id, f.label, f.path) for f in answers], width)
        for query, answers in queries.items()
    ]
    return "\n\n".join(blocks) or "nothing found: there is no other row"


def results_csv(found: Iterable[Found]) -> str:
    """Answers as CSV: query, rank, id, path, label, similarity."""
    return _csv(_ANSWERS, map(astuple, found))


def duplicates_table(opened: Embeddings, duplicates: Duplicates, threshold: float, width: int | None = None) -> str:
    """Groups of near-duplicates, each with what its rows are and how similar the most similar other one is."""
    if not len(duplicates.pairs):
        return f"no two of {len(opened)} are at least {threshold:g} similar"
    closest: dict[int, float] = {}
    for pair, similarity in zip(duplicates.pairs.tolist(), duplicates.similarities.tolist(), strict=True):
        for row in pair:
            closest[row] = max(closest.get(row, -1.0), similarity)
    rows = [
        (number, f"{closest[row]:.4f}", opened.ids[row], opened.label_name(row), opened.names[row])
        for number, group in enumerate(duplicates.groups, 1)
        for row in group.tolist()
    ]
    groups = len(duplicates.groups)
    return (
        f"at least {threshold:g} similar: {len(duplicates.pairs)} of all pairs, {len(rows)} of {len(opened)} rows, in "
        f"groups: {groups}; one of each group kept, {len(rows) - groups} would go\n"
        + _table(("group", "similarity", "id", "label", "path"), rows, width)
    )


def duplicates_csv(opened: Embeddings, duplicates: Duplicates) -> str:
    """Pairs as CSV: group, id, path, label, other_id, other_path, other_label, similarity."""
    number = {row: n for n, group in enumerate(duplicates.groups, 1) for row in group.tolist()}
    rows = (
        (number[i], *_described(opened, i), *_described(opened, j), similarity)
        for (i, j), similarity in zip(duplicates.pairs.tolist(), duplicates.similarities.tolist(), strict=True)
    )
    return _csv(_DUPLICATES, rows)


def hints_table(opened: Embeddings, hints: Hints, width: int | None = None) -> str:
    """Rows whose neighbours carry another label, the clearest first."""
    if not len(hints.rows):
        return f"the neighbours of all {len(opened)} rows agree with their labels"
    rows = [
        (f"{100 * share:.0f} %", f"{100 * own:.0f} %", i, label, suggested, path)
        for i, path, label, suggested, share, own in _hints(opened, hints)
    ]
    return f"{len(rows)} of {len(opened)} rows have neighbours of another label: mistakes, or hard cases\n" + _table(
        ("share", "own", "id", "label", "neighbours'", "path"), rows, width
    )


def hints_csv(opened: Embeddings, hints: Hints) -> str:
    """Hints as CSV: id, path, label, suggested, share, own_share."""
    return _csv(_HINTS, _hints(opened, hints))


def _hints(opened: Embeddings, hints: Hints) -> Iterable[tuple[int, str, str, str, float, float]]:
    names = opened.class_names or ()
    columns = (hints.rows, hints.suggested, hints.share, hints.own_share)
    for row, suggested, share, own in zip(*(column.tolist() for column in columns), strict=True):
        yield (*_described(opened, row), names[suggested], share, own)


def _described(opened: Embeddings, row: int) -> tuple[int, str, str]:
    return int(opened.ids[row]), opened.names[row], opened.label_name(row)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(cell, row) for row in rows)
    return text.getvalue()


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None) -> str:
    """Columns under each other, numbers to the right; a column without any entry is left out."""
    visible = [[str(value) for value in row] for row in rows[:_SHOWN]]
    columns = [i for i in range(len(header)) if any(row[i] for row in visible)]
    lines = [[line[i] for i in columns] for line in [list(header), *visible]]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _NARROW:
        widths[widths.index(max(widths))] -= 1
    right = [lines[-1][i][:1].isdigit() or lines[-1][i][:2].lstrip("-").isdigit() for i in range(len(columns))]
    right[-1] = False  # the path
    text = "\n".join(
        "  ".join(_placed(value, w, r) for value, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )
    more = len(rows) - len(visible)
    return text + (f"\n... and {more} more: --out FILE.csv lists all" if more else "")


def _placed(text: str, width: int, right: bool) -> str:
    """A text in its column of a table; a letter of some scripts is two columns of a terminal wide."""
    text = _shortened(text, width)
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _shortened(text: str, width: int) -> str:
    """A text that is too long without its middle; more of its end stays, since that is where names of files differ."""
    if cell_len(text) <= width:
        return text
    tail = 2 * width // 3
    return set_cell_size(text, width - 1 - tail).rstrip() + "…" + set_cell_size(text[::-1], tail)[::-1].lstrip()
