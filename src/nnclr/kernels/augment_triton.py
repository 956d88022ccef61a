"""The augmentation of `data/augment.py` as Triton kernels: all views from a uint8 batch; nothing waits for the device.

A view of up to 64 pixels is made in one launch, by one program an image. A larger one is made in tiles, and takes up to
three launches, since contrast needs the mean of the whole image and the blur needs a pixel's neighbourhood:

1. `_cut` resamples, does the jitter that comes before contrast, and sums its tile for the mean;
2. `_color` does contrast, the rest of the jitter and grayscale, and finishes the images that are not blurred;
3. `_blur` blurs and finishes the others.

Resampling and blur are products with matrices of weights, which are made chunk by chunk: on tensor cores a wide filter
costs little more than a narrow one. For bfloat16 views the factors, and the images between launches, are float16, which
rounds by 2^-12 of the range where the result itself is rounded by up to 2^-9. For float32 views all is float32.
"""

from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# A table in float32 has a row for each image of each view: what is done to it.
_FIELDS = tl.constexpr(24)  # a multiple of 16 bytes, so that every launch sees the same alignment
_BOX = tl.constexpr(0)  # top, left, height, width
_FLIP = tl.constexpr(4)
_BEFORE = tl.constexpr(5)  # how many operations come before contrast; 4 if it is not used
_OPERATIONS = tl.constexpr(6)  # four, by position: brightness, contrast, saturation, hue as 0 to 3; -1 for none
_FACTORS = tl.constexpr(10)  # four, by position
_GRAYSCALE = tl.constexpr(14)
_SIGMA = tl.constexpr(15)
_THRESHOLD = tl.constexpr(16)  # of solarise; infinite where it is not used
_BLURRED = tl.constexpr(17)  # in row j: which row is the j-th that is blurred
_MEAN = tl.constexpr(18)  # three
_SCALE = tl.constexpr(21)  # three, one over the standard deviation

_ONE_PROGRAM = 64  # pixels; a view of up to this size is a single tile
_TILE = (64, 32)  # rows and columns otherwise; from 64 rows on Hopper multiplies at its full speed
_CHUNK = (16, 32)  # source rows and columns at a time: the fewest rows that can be multiplied, bytes read in one go
_PIXELS = 512  # of a program of `_color`: four a thread, few enough to keep many threads going


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _gray(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _hue(red, green, blue, turns):
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    difference = tl.where(high == red, green - blue, tl.where(high == green, blue - red, red - green))
    sector = tl.where(high == red, 0.0, tl.where(high == green, 2.0, 4.0))
    sector += difference / tl.maximum(chroma, 1e-12) + 6 * turns
    sector -= 6 * tl.floor(sector * (1 / 6))
    red = low + chroma * _unit(tl.abs(sector - 3) - 1)
    green = low + chroma * _unit(2 - tl.abs(sector - 2))
    blue = low + chroma * _unit(2 - tl.abs(sector - 4))
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, mean, entry, start, stop):
    """The operations at positions start to stop of the image's own order; all of a program branches alike."""
    for position in range(start, stop):
        operation = tl.load(entry + _OPERATIONS + position)
        factor = tl.load(entry + _FACTORS + position)
        if operation == 3:
            red, green, blue = _hue(red, green, blue, factor)
        elif operation >= 0:
            blend = tl.zeros_like(red)
            if operation == 1:
                blend += (1 - factor) * mean
            elif operation == 2:
                blend += (1 - factor) * _gray(red, green, blue)
            red = _unit(red * factor + blend)
            green = _unit(green * factor + blend)
            blue = _unit(blue * factor + blend)
    return red, green, blue


@triton.jit
def _grayscale(red, green, blue, entry):
    if tl.load(entry + _GRAYSCALE) > 0:
        red = _gray(red, green, blue)
        green, blue = red, red
    return red, green, blue


@triton.jit
def _finish(red, green, blue, entry, at, inside):
    """Solarise, normalise and store, with the three colours of a pixel side by side."""
    threshold = tl.load(entry + _THRESHOLD)
    red = (tl.where(red >= threshold, 1 - red, red) - tl.load(entry + _MEAN)) * tl.load(entry + _SCALE)
    green = (tl.where(green >= threshold, 1 - green, green) - tl.load(entry + _MEAN + 1)) * tl.load(entry + _SCALE + 1)
    blue = (tl.where(blue >= threshold, 1 - blue, blue) - tl.load(entry + _MEAN + 2)) * tl.load(entry + _SCALE + 2)
    tl.store(at, red.to(at.dtype.element_ty), mask=inside)
    tl.store(at + 1, green.to(at.dtype.element_ty), mask=inside)
    tl.store(at + 2, blue.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _store_planes(red, green, blue, at, area, inside):
    tl.store(at, red.to(at.dtype.element_ty), mask=inside)
    tl.store(at + area, green.to(at.dtype.element_ty), mask=inside)
    tl.store(at + 2 * area, blue.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _load_planes(at, area, inside):
    red = tl.load(at, mask=inside, other=0)
    green = tl.load(at + area, mask=inside, other=0)
    blue = tl.load(at + 2 * area, mask=inside, other=0)
    return red, green, blue


@triton.jit
def _add_product(total, a, b, KIND: tl.constexpr):
    return tl.dot(a.to(KIND), b.to(KIND), total, input_precision="tf32x3")  # of float32; float16 is multiplied as such


@triton.jit
def _add_products(red, green, blue, a, r, g, b, KIND: tl.constexpr):
    return _add_product(red, a, r, KIND), _add_product(green, a, g, KIND), _add_product(blue, a, b, KIND)


@triton.jit
def _bicubic(tap, out, first, extent, size):
    """Weights of source pixels for output pixels, not normalised: those of `augment._resize_weights`."""
    scale = extent / size
    tap = tl.where((tap >= first) & (tap < first + extent), tap + 0.5, 1e6)  # outside the box: too far for a weight
    x = tl.abs((tap - (first + (out + 0.5) * scale)) * (1 / tl.maximum(scale, 1.0)))
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def _reach(out, first, extent, size):
    """The first source pixel with a weight for any of the output pixels, and one past the last."""
    scale = extent / size
    widen = tl.maximum(scale, 1.0)
    start = first + (tl.min(out, axis=0) + 0.5) * scale - 2 * widen + 0.5
    stop = first + (tl.max(out, axis=0) + 0.5) * scale + 2 * widen + 0.5
    return tl.maximum(start, first).to(tl.int32), tl.minimum(stop, first + extent).to(tl.int32)


@triton.jit
def _gaussian(tap, out, sigma, half):
    """Weights of pixels for blurred pixels, not normalised: those of `augment.blur`."""
    distance = tap.to(tl.float32) - out.to(tl.float32)
    x = distance * (1 / sigma)
    return tl.where(tl.abs(distance) <= half, tl.exp2(-0.5 * 1.4426950408889634 * x * x), 0.0)


@triton.jit
def _reflected(place, size):
    """Places in the image for those up to half a kernel outside."""
    place = tl.abs(place)
    return tl.maximum(tl.minimum(place, 2 * (size - 1) - place), 0)


@triton.jit
def _tile(size, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Image, rows, columns, pixel numbers and mask of the program's tile.

    Rows and columns past the border repeat the last one, so that no sum of weights is zero.
    """
    across = tl.cdiv(size, TILE_X)
    tiles = tl.cdiv(size, TILE_Y) * across
    tile = tl.program_id(0) % tiles
    row = tile // across * TILE_Y + tl.arange(0, TILE_Y)
    column = tile % across * TILE_X + tl.arange(0, TILE_X)
    pixel = row[:, None] * size + column[None, :]
    inside = (row[:, None] < size) & (column[None, :] < size)
    return tl.program_id(0) // tiles, tl.minimum(row, size - 1), tl.minimum(column, size - 1), pixel, inside


@triton.jit
def _resample(
    source, entry, row, column, width, plane, size,
    KIND: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CHUNK_Y: tl.constexpr, CHUNK_X: tl.constexpr,
):  # fmt: skip
    y_first, x_first = tl.load(entry + _BOX), tl.load(entry + _BOX + 1)
    y_extent, x_extent = tl.load(entry + _BOX + 2), tl.load(entry + _BOX + 3)
    column += tl.load(entry + _FLIP).to(tl.int32) * (size - 1 - 2 * column)
    y_start, y_stop = _reach(row, y_first, y_extent, size)
    x_start, x_stop = _reach(column, x_first, x_extent, size)
    red = tl.zeros((TILE_Y, TILE_X), dtype=tl.float32)
    green, blue = red, red
    x_weights = tl.zeros((CHUNK_X, TILE_X), dtype=tl.float32)
    for x0 in range(x_start, x_stop, CHUNK_X):
        x = x0 + tl.arange(0, CHUNK_X)
        across = _bicubic(x[:, None], column[None, :], x_first, x_extent, size).to(KIND)
        x_weights += across.to(tl.float32)  # as rounded, so that flat areas stay what they are
        r = tl.zeros((TILE_Y, CHUNK_X), dtype=tl.float32)
        g, b = r, r
        y_weights = tl.zeros((TILE_Y, CHUNK_Y), dtype=tl.float32)
        for y0 in range(y_start, y_stop, CHUNK_Y):
            y = y0 + tl.arange(0, CHUNK_Y)
            down = _bicubic(y[None, :], row[:, None], y_first, y_extent, size).to(KIND)
            y_weights += down.to(tl.float32)
            there = (y[:, None] < y_stop) & (x[None, :] < x_stop)
            near = _load_planes(source + y[:, None] * width + x[None, :], plane, there)
            r, g, b = _add_products(r, g, b, down, near[0], near[1], near[2], KIND)
        share = 1 / (255 * tl.sum(y_weights, axis=1)[:, None])
        red = _add_product(red, r * share, across, KIND)
        green = _add_product(green, g * share, across, KIND)
        blue = _add_product(blue, b * share, across, KIND)
    share = 1 / tl.sum(x_weights, axis=0)[None, :]
    return _unit(red * share), _unit(green * share), _unit(blue * share)


@triton.jit
def _cut(
    images, table, target, sums, n, width, plane, size,
    KIND: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CHUNK_Y: tl.constexpr, CHUNK_X: tl.constexpr,
):  # fmt: skip
    image, row, column, pixel, inside = _tile(size, TILE_Y, TILE_X)
    image = image.to(tl.int64)
    entry, source, area = table + image * _FIELDS, images + image % n * 3 * plane, size * size
    if WHOLE:
        red, green, blue = _load_planes(source + pixel, plane, inside)
        red, green, blue = red.to(tl.float32) / 255, green.to(tl.float32) / 255, blue.to(tl.float32) / 255
    else:
        red, green, blue = _resample(
            source, entry, row, column, width, plane, size, KIND, TILE_Y, TILE_X, CHUNK_Y, CHUNK_X
        )
    before = tl.load(entry + _BEFORE).to(tl.int32)
    red, green, blue = _jitter(red, green, blue, 0.0, entry, 0, before)
    total = tl.sum(tl.sum(tl.where(inside, _gray(red, green, blue), 0.0), axis=1), axis=0)
    if LAST:  # the tile is the image, or nothing asks for the mean
        red, green, blue = _jitter(red, green, blue, total / area, entry, before, 4)
        red, green, blue = _grayscale(red, green, blue, entry)
        _finish(red, green, blue, entry, target + image * 3 * area + pixel * 3, inside)
    else:
        tl.store(sums + tl.program_id(0), total)
        _store_planes(red, green, blue, target + image * 3 * area + pixel, area, inside)


@triton.jit
def _color(kept, table, sums, out, area, tiles, TILES: tl.constexpr, PIXELS: tl.constexpr):
    blocks = tl.cdiv(area, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    entry = table + image * _FIELDS
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < area
    at = kept + image * 3 * area + pixel
    red, green, blue = _load_planes(at, area, inside)
    red, green, blue = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
    tile = tl.arange(0, TILES)
    mean = tl.sum(tl.load(sums + image * tiles + tile, mask=tile < tiles, other=0.0), axis=0) / area
    red, green, blue = _jitter(red, green, blue, mean, entry, tl.load(entry + _BEFORE).to(tl.int32), 4)
    red, green, blue = _grayscale(red, green, blue, entry)
    if tl.load(entry + _SIGMA) > 0:
        _store_planes(red, green, blue, at, area, inside)
    else:
        _finish(red, green, blue, entry, out + image * 3 * area + pixel * 3, inside)


@triton.jit
def _blur(
    kept, table, out, size, half,
    KIND: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CHUNK_Y: tl.constexpr, CHUNK_X: tl.constexpr,
):  # fmt: skip
    blurred, row, column, pixel, inside = _tile(size, TILE_Y, TILE_X)
    image = tl.load(table + blurred * _FIELDS + _BLURRED).to(tl.int64)
    entry, area = table + image * _FIELDS, size * size
    source = kept + image * 3 * area
    sigma = tl.load(entry + _SIGMA)
    y_stop, x_stop = tl.max(row, axis=0) + half + 1, tl.max(column, axis=0) + half + 1
    red = tl.zeros((TILE_Y, TILE_X), dtype=tl.float32)
    green, blue = red, red
    x_weights = tl.zeros((CHUNK_X, TILE_X), dtype=tl.float32)
    for x0 in range(tl.min(column, axis=0) - half, x_stop, CHUNK_X):
        x = x0 + tl.arange(0, CHUNK_X)
        across = _gaussian(x[:, None], column[None, :], sigma, half).to(KIND)
        x_weights += across.to(tl.float32)
        r = tl.zeros((TILE_Y, CHUNK_X), dtype=tl.float32)
        g, b = r, r
        y_weights = tl.zeros((TILE_Y, CHUNK_Y), dtype=tl.float32)
        for y0 in range(tl.min(row, axis=0) - half, y_stop, CHUNK_Y):
            y = y0 + tl.arange(0, CHUNK_Y)
            down = _gaussian(y[None, :], row[:, None], sigma, half).to(KIND)
            y_weights += down.to(tl.float32)
            there = (y[:, None] < y_stop) & (x[None, :] < x_stop)
            at = source + _reflected(y, size)[:, None] * size + _reflected(x, size)[None, :]
            near = _load_planes(at, area, there)
            r, g, b = _add_products(r, g, b, down, near[0], near[1], near[2], KIND)
        share = 1 / tl.sum(y_weights, axis=1)[:, None]
        red = _add_product(red, r * share, across, KIND)
        green = _add_product(green, g * share, across, KIND)
        blue = _add_product(blue, b * share, across, KIND)
    share = 1 / tl.sum(x_weights, axis=0)[None, :]
    _finish(red * share, green * share, blue * share, entry, out + image * 3 * area + pixel * 3, inside)


def augment_triton(
    images: Tensor, parameters, views, mean, std, dtype: torch.dtype = torch.float32, whole: bool = False
) -> list[Tensor]:
    """What `augment.crop`, `color` and `normalize` make of images that are on one CUDA device.

    Args:
        images: (n, 3, h, w) uint8.
        parameters: an `augment.Parameters` for each view, of the n images.
        views: an `augment.View` for each view.
        mean: three numbers, to normalise.
        std: three numbers, likewise.
        dtype: of the views, float32 or bfloat16.
        whole: take images as they are, already cut and flipped.

    Returns:
        A (n, 3, s, s) tensor a view, in channels-last memory.
    """
    tables: dict[int, np.ndarray] = {}  # by size: views of one size are made together
    for view, drawn in zip(views, parameters, strict=True):
        rows = _rows(drawn, view, mean, std)
        tables[view.size] = np.concatenate([tables[view.size], rows]) if view.size in tables else rows
    for rows in tables.values():
        blurred = np.flatnonzero(rows[:, _SIGMA.value] > 0)
        rows[: len(blurred), _BLURRED.value] = blurred
    table = torch.from_numpy(np.concatenate(list(tables.values())))
    if images.is_cuda:  # from pageable memory the copy would wait
        table = table.pin_memory().to(images.device, non_blocking=True)
    parts = table.split([len(rows) for rows in tables.values()])
    with torch.cuda.device(images.device) if images.is_cuda else nullcontext():  # Triton launches on the current one
        made = {
            size: iter(_launch(images.contiguous(), part, rows, size, dtype, whole).split(len(images)))
            for (size, rows), part in zip(tables.items(), parts, strict=True)
        }
    return [next(made[view.size]) for view in views]


def _rows(parameters, view, mean, std) -> np.ndarray:
    """The table (n, _FIELDS) of one view."""
    rows = np.zeros((len(parameters.flips), _FIELDS.value), np.float32)
    amounts = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    used = parameters.jitter[:, None] & (amounts > 0)[parameters.orders]
    contrast = used & (parameters.orders == 1)
    rows[:, _BOX.value : _FLIP.value] = parameters.boxes
    rows[:, _FLIP.value] = parameters.flips
    rows[:, _BEFORE.value] = np.where(contrast.any(axis=1), contrast.argmax(axis=1), 4)
    rows[:, _OPERATIONS.value : _FACTORS.value] = np.where(used, parameters.orders, -1)
    rows[:, _FACTORS.value : _GRAYSCALE.value] = np.take_along_axis(parameters.factors, parameters.orders, axis=1)
    rows[:, _GRAYSCALE.value] = parameters.grayscale
    rows[:, _SIGMA.value] = parameters.sigmas
    rows[:, _THRESHOLD.value] = np.where(parameters.solarize, view.solarize_threshold, np.inf)
    rows[:, _MEAN.value : _SCALE.value], rows[:, _SCALE.value :] = mean, 1 / np.asarray(std)
    return rows


def _launch(images: Tensor, table: Tensor, rows: np.ndarray, size: int, dtype: torch.dtype, whole: bool) -> Tensor:
    """The views (len(rows), 3, size, size) of one size; rows is what is in the table."""
    single = size <= _ONE_PROGRAM
    tile_y, tile_x = (max(16, triton.next_power_of_2(size)),) * 2 if single else _TILE
    tiles = triton.cdiv(size, tile_y) * triton.cdiv(size, tile_x)
    blurred = int((rows[:, _SIGMA.value] > 0).sum())
    last = blurred == 0 and (tiles == 1 or bool((rows[:, _BEFORE.value] == 4).all()))
    precise = dtype == torch.float32
    shape, device = (len(rows), 3, size, size), images.device
    out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    kept = out if last else torch.empty(shape, dtype=torch.float32 if precise else torch.float16, device=device)
    sums = torch.empty(len(rows), tiles, device=device)
    blocks = {
        "KIND": tl.float32 if precise else tl.float16,
        "TILE_Y": tile_y, "TILE_X": tile_x, "CHUNK_Y": _CHUNK[0], "CHUNK_X": _CHUNK[1],
        # A warp multiplies 16 rows. Single bytes cannot be copied ahead, so there is nothing to pipeline.
        "num_warps": tile_y // 16, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    if not precise and not single:
        blocks["maxnreg"] = 168  # of 65,536: three programs fit on a multiprocessor, and hardly any is spilled
    _cut[(sums.numel(),)](
        images, table, kept, sums, len(images), images.shape[3], images.shape[2] * images.shape[3], size,
        WHOLE=whole, LAST=last, **blocks,
    )  # fmt: skip
    if last:
        return out
    _color[(len(rows) * triton.cdiv(size * size, _PIXELS),)](
        kept, table, sums, out, size * size, tiles,
        TILES=triton.next_power_of_2(tiles), PIXELS=_PIXELS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if blurred:
        half = max(1, round(size * 11 / 224))  # as `augment.blur`
        _blur[(blurred * tiles,)](kept, table, out, size, half, **blocks)
    return out
