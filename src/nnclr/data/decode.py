"""Bytes to RGB, safely: what a picture file may be, and what each pixel mode means.

A file is untrusted input. It costs at most its own sample, bounded memory and bounded time; nothing that is
not one of six raster formats is handed to a decoder.
"""

import errno
import io
import os
import re
import stat
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64 * 2**20  # at most 7 bytes each while it is decoded; Pillow's own limit admits images of 1 GB
MAX_PIXELS_WEBP = 28 * 2**20  # 16 bytes each: its library keeps several copies
MAX_BYTES = 100 * 10**6
_STRIP = 1 << 20  # pixels that are made RGB at a time
_ORIENTATIONS = {  # of EXIF: whether rows and columns change places, then the directions to read both in
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
_AS_IT_IS = (False, 1, 1)
_APP1, _START_OF_SCAN = b"\xe1", b"\xda"  # markers of JPEG
_WITHOUT_LENGTH = tuple(bytes([marker]) for marker in (0x00, 0x01, *range(0xD0, 0xDA), 0xFF))  # 0xFF fills up
_SEGMENTS = 512  # a profile of colours takes at most 255
_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as `warnings.filters` has it
_TRIES, _PAUSE = 3, 0.05  # for errors of the storage, which may pass; seconds, doubled each time


class BadImage(Exception):
    """An image that cannot be used; it is skipped, counted and listed.

    Args:
        reason: one word: `not_an_image`, `truncated`, `too_large`, `unsupported_mode` or `unreadable`.
        detail: what exactly is wrong.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read_file(path: str | bytes) -> bytes:
    """The content of a regular file; never waits on a FIFO, follows no device.

    Raises:
        BadImage: `unreadable` if it is no regular file or cannot be read, `too_large` above 100 MB.
    """
    for attempt in range(_TRIES):
        try:
            return _read_once(path)
        except OSError as error:
            if error.errno != errno.EIO or attempt == _TRIES - 1:
                raise BadImage("unreadable", error.strerror or str(error)) from error
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError("the loop returns or raises")


def _read_once(path: str | bytes) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("unreadable", "not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage("too_large", f"{status.st_size >> 20} MiB")
        return file.read()


def decode(data: bytes, reduction: Callable[[int, int], int] | None = None) -> np.ndarray:
    """The first frame of an image file as it is meant to be seen.

    EXIF orientation is applied; transparency is laid on white; CMYK, palettes and 1-bit become RGB; 16-bit
    integers are scaled by their type's range, and 32-bit integers and floats by the image's own minimum and
    maximum (a plain conversion would turn them white).

    Args:
        data: content of a JPEG, PNG, WebP, BMP, TIFF or GIF file.
        reduction: height and width of the upright image -> 1, 2, 4 or 8, by which its sides may be divided (rounded
            up). It is asked before a JPEG is decoded, which then takes less time and memory; other formats ignore it.

    Returns:
        (h, w, 3) uint8.

    Raises:
        BadImage: if it cannot be decoded in full, or has more than 64 Mpx (WebP: 28).
    """
    if len(data) > MAX_BYTES:
        raise BadImage("too_large", f"{len(data) >> 20} MiB")
    plain = _is_plain_jpeg(data)
    try:
        if plain and (pixels := _jpeg(data, None, 1, reduction)) is not None:
            return pixels
        _hush_pillow()
        image = _open(data)
        if not plain and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            pixels = _jpeg(data, image.size, orientation, reduction)
            if pixels is not None:
                return pixels
    except BadImage:
        raise
    except Exception as error:
        raise BadImage("truncated", str(error)[:120]) from error
    pixels, orientation = _loaded(image)
    del image  # before there is a turned copy
    return _upright(pixels, orientation)


def pixels_of(image: Image.Image) -> np.ndarray:
    """A Pillow image as `decode` gives its file: (h, w, 3) uint8.

    Raises:
        BadImage: `truncated` if its file cannot be decoded in full, `too_large`, or `unsupported_mode`.
    """
    _refuse_large(image)
    return _upright(*_loaded(image))


def _loaded(image: Image.Image) -> tuple[np.ndarray, Any]:
    """Its pixels as RGB, and the EXIF orientation."""
    try:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # a TIFF is turned by now, and says so
        return _rgb(image), orientation
    except BadImage:
        raise
    except Exception as error:
        raise BadImage("truncated", str(error)[:120]) from error


def _hush_pillow() -> None:
    """Ignore what Pillow warns of: odd metadata, and sizes below our own limit.

    `warnings.catch_warnings` would do for one thread. Where several enter and leave it, the last one to leave may
    put back what it found when another was in it, and every warning of the process would be ignored from then on.
    """
    if list(warnings.filters[:1]) != [_PILLOW]:
        warnings.filterwarnings("ignore", module=_PILLOW[3].pattern)


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", "more pixels than any photograph") from error
    except Exception as error:
        raise BadImage("not_an_image", f"none of {', '.join(FORMATS)}") from error
    _refuse_large(image)
    return image


def _refuse_large(image: Image.Image) -> None:
    if image.width * image.height > (MAX_PIXELS_WEBP if image.format == "WEBP" else MAX_PIXELS):
        raise BadImage("too_large", f"{image.width} x {image.height} pixels")


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG whose segments in front of the image hold neither EXIF nor XMP, so no orientation.

    Then Pillow need not be asked, which takes time.
    """
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    for _ in range(_SEGMENTS):
        marker = data[at : at + 2]
        if marker[:1] != b"\xff" or marker[1:] in (_APP1, _START_OF_SCAN, *_WITHOUT_LENGTH):
            return marker[1:] == _START_OF_SCAN
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


def _jpeg(
    data: bytes, size: tuple[int, int] | None, orientation: Any, reduction: Callable[[int, int], int] | None
) -> np.ndarray | None:
    """The pixels that Pillow decodes, in half the time; None where anything is odd, for Pillow to judge.

    Args:
        data: content of the file.
        size: width and height that Pillow read, by which the limit of pixels was checked; None where it was not asked.
        orientation: of EXIF.
        reduction: as in `decode`.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if size is None and (height * width > MAX_PIXELS or colors not in ("YCbCr", "RGB", "Gray")):
            return None
        if size not in (None, (width, height)):
            return None
        turned = _ORIENTATIONS.get(orientation, _AS_IT_IS)[0]
        factor = 1 if reduction is None else reduction(*((width, height) if turned else (height, width)))
        while orientation != 1 and (height % factor or width % factor):  # what is rounded up must stay at the end
            factor //= 2
        least = {} if factor == 1 else {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, min_factor=factor, **least)
    except ValueError:  # also for what libjpeg only warns of, such as a missing end
        return None
    return _upright(pixels, orientation)


def _upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """Apply an EXIF orientation; one that is not defined leaves the image as it is."""
    transposed, up, left = _ORIENTATIONS.get(orientation, _AS_IT_IS)
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels[::up, ::left])


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as RGB, a strip at a time: the largest images would take 1 GB and more in floats or two layers."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    boxes = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    extremes = _extremes(image, boxes) if image.mode in ("I", "F") else (0.0, 65535.0)
    rgb = np.empty((height, width, 3), np.uint8)
    for box in boxes:
        rgb[box[1] : box[3]] = _rgb_strip(image if len(boxes) == 1 else image.crop(box), *extremes)
    return rgb


def _rgb_strip(image: Image.Image, low: float, high: float) -> np.ndarray:
    mode = image.mode
    if mode == "RGB":
        return np.asarray(image)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return np.asarray(Image.alpha_composite(white, layers).convert("RGB"))
    if mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"):
        return np.asarray(image.convert("RGB"))
    if not (mode.startswith("I;16") or mode in ("I", "F")):
        raise BadImage("unsupported_mode", mode)
    values = np.asarray(image).astype(np.float64)
    if high == low:  # a constant image becomes mid-gray
        values = np.full_like(values, 0.5)
    else:
        values = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low)
    gray = np.round(255 * values).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _extremes(image: Image.Image, boxes: list[tuple[int, int, int, int]]) -> tuple[float, float]:
    """The finite minimum and maximum."""
    lows, highs = [], []
    for box in boxes:
        values = np.asarray(image.crop(box))
        finite = values[np.isfinite(values)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    if not lows:
        raise BadImage("unsupported_mode", "no finite pixel")
    return min(lows), max(highs)
