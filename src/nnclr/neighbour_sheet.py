"""The picture of what the look-up returned: fixed queries, and their nearest entries of the support set.

`draw_neighbours` writes a sheet; `read_sheet` takes one apart again, so that a page can set the rows of several side by
side.
"""

import copy
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from nnclr import counter, distributed
from nnclr.checkpoint import write_atomically
from nnclr.data.ahead import Threads
from nnclr.data.augment import eval_image
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.encoder import Encoder
from nnclr.support_set import SupportSet

QUERIES, NEIGHBOURS = 8, 6
_TILE, _GAP, _HEAD = 72, 6, 22
_SAME, _OTHER, _SELF = (46, 139, 87), (200, 80, 60), (150, 150, 150)
_KINDS = {_SAME: "same", _OTHER: "other", _SELF: "self"}
_PITCH = _TILE + 14 + _GAP  # from row to row
_WIDTH = (1 + NEIGHBOURS) * (_TILE + _GAP) + 3 * _GAP


def draw_neighbours(
    path: Path, encoder: Encoder, projector: nn.Module, support_set: SupportSet, source: Source, bad: dict[int, str]
) -> None:
    """A sheet of fixed queries and what `SupportSet.nearest` returns for them, nearest first; all ranks call it.

    With labels a neighbour's frame is green where its label is the query's and red where it is not; grey
    marks an older embedding of the query itself. The figure below each is the cosine similarity.

    Args:
        path: the PNG to write.
        encoder: the backbone that the look-up uses: the averaged one, where there is one.
        projector: likewise.
        support_set: where neighbours are looked up.
        source: the images that were trained on.
        bad: ids of images that cannot be read; they are not asked for.
    """
    order = counter.permutation(0, 0, len(source)).tolist()
    queries = [i for i in order if i not in bad][:QUERIES]
    features = torch.from_numpy(encoder.embed(source.subset(np.array(queries)), num_workers=0)).to(encoder.device)
    try:
        with torch.no_grad():
            embeddings = copy.deepcopy(projector).eval()(features)  # a copy: some layers may be frozen, and stay so
    except Exception:  # noqa: BLE001  (an objective of one's own may use its projector in another way)
        return
    if not isinstance(embeddings, torch.Tensor) or embeddings.shape != (len(queries), support_set.dim):
        return
    found = support_set.nearest(embeddings, k=min(NEIGHBOURS, support_set.size))
    if distributed.rank() != 0:  # they were needed for the look-up
        return
    rows = [
        (query, [(i, s) for i, s in zip(ids, similarities, strict=True) if s > -np.inf and 0 <= i < len(source)])
        for query, ids, similarities in zip(queries, found.ids.tolist(), found.similarities.tolist(), strict=True)
    ]
    sheet = _sheet(source, rows)
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _sheet(source: Source, rows: list[tuple[int, list[tuple[int, float]]]]) -> Image.Image:
    shown = list({i: None for query, neighbours in rows for i in (query, *(i for i, _ in neighbours))})
    with Threads(1) as pool:  # not in this thread: a read that hangs is named
        tiles = dict(zip(shown, pool.map(lambda i: _thumbnail(source, i), shown), strict=True))
    sheet = Image.new("RGB", (_WIDTH, _HEAD + len(rows) * _PITCH + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 5), "query", fill="black")
    draw.text((_TILE + 4 * _GAP, 5), "nearest in the support set", fill="black")
    for row, (query, neighbours) in enumerate(rows):
        y = _HEAD + row * _PITCH
        sheet.paste(tiles[query], (_GAP, y))
        for column, (i, similarity) in enumerate(neighbours):
            x = _tile_x(column)
            sheet.paste(tiles[i], (x, y))
            if i == query:
                colour: tuple[int, int, int] | None = _SELF
            elif source.labels is None:
                colour = None
            else:
                colour = _SAME if source.labels[i] == source.labels[query] else _OTHER
            if colour is not None:
                draw.rectangle((x - 2, y - 2, x + _TILE + 1, y + _TILE + 1), outline=colour, width=3)
            draw.text((x + _TILE // 2 - 10, y + _TILE + 2), f"{similarity:.2f}", fill="black")
    return sheet


def _thumbnail(source: Source, i: int) -> Image.Image:
    try:
        image = Image.fromarray(eval_image(source.read(i), _TILE).transpose(1, 2, 0))
    except BadImage:
        image = Image.new("RGB", (_TILE, _TILE), "black")
    return image


@dataclass(frozen=True)
class SheetRow:
    """A query and its neighbours, cut from a sheet.

    Args:
        query: the tile, RGB.
        neighbours: the tiles with their frames and similarities, RGBA: what was paper is transparent.
        frames: how many neighbours have each frame: `same`, `other`, `self`; empty without labels.
    """

    query: Image.Image
    neighbours: Image.Image
    frames: Counter[str]


def read_sheet(path: Path) -> list[SheetRow]:
    """The rows of a sheet that `draw_neighbours` wrote.

    Raises:
        ValueError: if it is no such sheet.
        OSError: if it cannot be read.
    """
    with Image.open(path, formats=["PNG"]) as opened:
        width, height = opened.size
        count, rest = divmod(height - _HEAD - _GAP, _PITCH)
        if width != _WIDTH or rest or not 1 <= count <= QUERIES:
            raise ValueError(f"{path.name} is no sheet of neighbours")
        pixels = np.asarray(opened.convert("RGB"))
    return [_cut(pixels, row) for row in range(count)]


def _cut(pixels: np.ndarray, row: int) -> SheetRow:
    y, left = _HEAD + row * _PITCH, _tile_x(0) - 2
    strip = pixels[y - 2 : y + _PITCH - 3, left : _tile_x(NEIGHBOURS - 1) + _TILE + 2]
    shown = np.full((*strip.shape[:2], 4), 128, np.uint8)
    shown[..., 3] = 255 - strip.mean(axis=2)  # of the paper: the figures on it, in grey
    frames: Counter[str] = Counter()
    for column in range(NEIGHBOURS):
        x = _tile_x(column) - left
        kind = _KINDS.get(tuple(strip[0, x].tolist()))  # the upper edge of the frame
        margin = 0 if kind is None else 2
        tile = np.s_[2 - margin : 2 + _TILE + margin, x - margin : x + _TILE + margin]
        if kind is not None:
            frames[kind] += 1
        if (strip[tile] < 255).any():  # else there was no neighbour
            shown[tile] = np.dstack([strip[tile], np.full(strip[tile].shape[:2], 255, np.uint8)])
    query = pixels[y : y + _TILE, _GAP : _GAP + _TILE]
    return SheetRow(Image.fromarray(query), Image.fromarray(shown), frames)


def _tile_x(column: int) -> int:
    """Left edge of a neighbour's tile; the query's is at `_GAP`."""
    return (column + 1) * (_TILE + _GAP) + 3 * _GAP
