import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from nnclr.data import decode as D
from nnclr.data.decode import BadImage, decode, read_file


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height=24, width=36):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 7, y * 10, (x + y) * 4], axis=2).astype(np.uint8)


def reason(data):
    with pytest.raises(BadImage) as raised:
        decode(data)
    return raised.value.reason


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(gradient())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data), gradient())


def test_modes():
    rgb = gradient()
    image = Image.fromarray(rgb)
    np.testing.assert_array_equal(decode(encoded(image)), rgb)
    gray = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray))), np.repeat(gray[..., None], 3, 2))
    black_white = np.where(gray > 100, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(gray > 100)))[..., 0], black_white)
    few = image.quantize(16)
    np.testing.assert_array_equal(decode(encoded(few)), np.asarray(few.convert("RGB")))
    cmyk = image.convert("CMYK")
    np.testing.assert_array_equal(decode(encoded(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))
    assert all(decode(encoded(image.convert(mode), "TIFF")).dtype == np.uint8 for mode in ("1", "L", "P", "RGBA"))


def test_transparency_is_laid_on_white():
    rgba = np.dstack([np.full((4, 4, 3), 100, np.uint8), np.array([[0, 255, 51, 204]] * 4, np.uint8)])
    expected = [255, 100, round(255 * 0.8 + 100 * 0.2), round(255 * 0.2 + 100 * 0.8)]
    for data in (encoded(Image.fromarray(rgba)), encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)):
        assert np.abs(decode(data)[0, :, 0].astype(int) - expected).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    assert decode(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 200, 0]]]
    la = Image.fromarray(np.dstack([np.full((2, 2), 50, np.uint8), np.array([[0, 255]] * 2, np.uint8)]), "LA")
    assert decode(encoded(la))[0, :, 1].tolist() == [255, 50]


def test_16_bit_and_float_do_not_become_white():
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    sixteen = encoded(Image.fromarray(values))
    assert decode(sixteen)[0, :, 0].tolist() == [0, 1, 100, 255]
    with Image.open(io.BytesIO(sixteen)) as image:  # the control: what a plain conversion does
        assert np.asarray(image.convert("L"))[0, 2:].tolist() != [100, 255]
    floats = encoded(Image.fromarray(np.array([[-3.0, 1.0, 5.0]], np.float32)), "TIFF")
    assert decode(floats)[0, :, 0].tolist() == [0, 128, 255]
    integers = encoded(Image.fromarray(np.array([[0, 10**6, 10**8]], np.int32)), "TIFF")
    assert decode(integers)[0, :, 0].tolist() == [0, 3, 255]
    constant = encoded(Image.fromarray(np.full((2, 2), 7.0, np.float32)), "TIFF")
    assert (decode(constant) == 128).all()
    no_number = encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    assert reason(no_number) == "unsupported_mode"


@pytest.mark.parametrize(
    "data", [b"", b"<html><body>not found</body></html>", b"\x7fELF" + bytes(60), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_image_is_refused(data):
    assert reason(data) == "not_an_image"


@pytest.mark.parametrize(("kind", "missing"), [("JPEG", 2), ("JPEG", 400), ("PNG", 400), ("WEBP", 400), ("GIF", 400)])
def test_truncated_files_are_refused(kind, missing):
    """A JPEG without its last two bytes already is: Pillow only says so when it decodes."""
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    assert decode(data).shape == (40, 40, 3)
    assert reason(data[:-missing]) in ("truncated", "not_an_image")
    if kind != "WEBP":  # the control: opening it does not notice
        with Image.open(io.BytesIO(data[:-2])) as image:
            assert image.size == (40, 40)


def png_header(width, height):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize("side", [60_000, 14_000, 9_400])
def test_bombs_are_refused_from_the_header(side):
    """9,400 squared is below Pillow's own limit; no pixel is there to be decoded."""
    assert reason(png_header(side, side)) == "too_large"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(png_header(10_000, 10_000)) == "too_large"
    assert reason(png_header(100, 100)) in ("truncated", "not_an_image")


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for kind in ("GIF", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data).astype(int) - 10).max() <= 3


def test_extreme_shapes():
    for shape in ((1, 1), (1, 5000), (5000, 1)):
        assert decode(encoded(Image.fromarray(np.zeros((*shape, 3), np.uint8)))).shape == (*shape, 3)


def test_fuzz_raises_nothing_but_bad_image():
    rng = random.Random(0)
    picture = Image.fromarray(gradient())
    seeds = [encoded(picture, kind) for kind in D.FORMATS]
    seeds += [encoded(picture.convert(mode)) for mode in ("L", "P", "RGBA", "1")]
    good, reasons = 0, []
    for number in range(300):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.randrange(1, 6)):
            how, at = rng.randrange(3), rng.randrange(len(data))
            if how == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                del data[at:]
                data += b"\0"
            else:
                other = seeds[rng.randrange(len(seeds))]
                data[at : at + 20] = other[:20]
        try:
            made = decode(bytes(data))
            assert made.dtype == np.uint8
            assert made.ndim == 3
            good += 1
        except BadImage as error:
            reasons.append(error.reason)
    assert set(reasons) <= {"not_an_image", "truncated", "too_large", "unsupported_mode"}
    assert min(good, len(reasons)) > 30  # both happen, so the mutations are neither harmless nor hopeless


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    for path in (tmp_path / "x.jpg", tmp_path, tmp_path / "missing.png", "/dev/zero"):
        with pytest.raises(BadImage) as raised:
            read_file(str(path))
        assert raised.value.reason == "unreadable"


def test_errors_of_the_storage_are_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"content")
    real, failures = D._read_once, [2]

    def flaky(path):
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(D, "_read_once", flaky)
    assert read_file(str(tmp_path / "a.png")) == b"content"
    failures[0] = 3
    with pytest.raises(BadImage, match="Input/output error"):
        read_file(str(tmp_path / "a.png"))
