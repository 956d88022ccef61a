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


def photo(height=54, width=67):
    """Smooth and colourful, so that the pixels of all formats are alike."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


JPEGS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "low quality": {"quality": 12},
    "RGB": {"keep_rgb": True},
}


def by_pillow_alone(data, monkeypatch):
    """What `decode` says without libjpeg-turbo at first hand: pixels, or the reason of a `BadImage`."""
    with monkeypatch.context() as patched:
        patched.setattr(D, "_jpeg", lambda *_: None)
        return decoded(data)


def decoded(data):
    try:
        return decode(data)
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize("kind", [*JPEGS, "gray"])
def test_jpegs_are_what_pillow_decodes(monkeypatch, kind):
    """To the bit: Pillow has the same library, and asks it for the same transform and the same upsampling."""
    data = encoded(photo().convert("L"), "JPEG") if kind == "gray" else encoded(photo(), "JPEG", **JPEGS[kind])
    expected = by_pillow_alone(data, monkeypatch)
    monkeypatch.setattr(D, "_rgb", None)  # Pillow's own way now fails
    np.testing.assert_array_equal(decode(data), expected)
    fast = decode(encoded(photo(), "JPEG", subsampling=2, quality=95))
    assert np.abs(fast.astype(int) - np.asarray(photo())).mean() < 4  # control: it is this picture
    with pytest.raises(BadImage):  # control: others do go Pillow's way
        decode(encoded(photo().convert("CMYK"), "JPEG"))


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_orientation_of_jpegs(monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), "JPEG", exif=exif)
    expected = by_pillow_alone(data, monkeypatch)
    assert expected.shape[:2] == ((67, 54) if orientation in (5, 6, 7, 8) else (54, 67))
    np.testing.assert_array_equal(decode(data), expected)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def test_the_orientation_is_found_wherever_it_stands():
    """In EXIF or XMP, behind other segments: Pillow is asked unless there is neither."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = np.random.default_rng(0).bytes(150_000)  # three segments
    for options in ({"exif": exif}, {"xmp": XMP}, {"icc_profile": profile, "exif": exif}):
        data = encoded(photo(), "JPEG", **options)
        assert decode(data).shape[:2] == (67, 54), options
        behind = data[:2] + b"\xff\xfe\x00\x09comment" + b"\xff\xfe\x00\x02" * 600 + data[2:]
        assert decode(behind).shape[:2] == (67, 54), options
    assert decode(encoded(photo(), "JPEG", icc_profile=profile)).shape[:2] == (54, 67)  # control
    # A byte that fills up in front of the marker of EXIF must not be read as a marker with a length that leads past it.
    data = encoded(photo(), "JPEG", exif=exif)
    at = data.index(b"\xff\xe1")
    size = int.from_bytes(data[at + 2 : at + 4])
    end = at + 2 + size
    past = at + 2 + int.from_bytes(b"\xe1" + data[at + 2 : at + 3])  # the length it would have as a marker
    comment = b"\xff\xfe\xff\xf0" + ((past - end - 5) % 2) * b" " + b"\xff\xda" * 0x7FF7
    filled = data[:at] + b"\xff" + data[at:end] + comment[: 2 + 0xFFF0] + data[end:]
    assert filled[past : past + 2] == b"\xff\xda"
    assert decode(filled).shape[:2] == (67, 54)


def test_a_plain_jpeg_is_decoded_without_pillow(monkeypatch):
    plain, expected = encoded(photo(), "JPEG"), decode(encoded(photo(), "JPEG"))
    huge = bytearray(plain)
    at = huge.index(b"\xff\xc0") + 5
    huge[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(huge)) == "too_large"
    asked = []
    monkeypatch.setattr(D, "_open", lambda data: asked.append(data) or Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(plain), expected)
    assert not asked
    others = [encoded(photo(), "JPEG", xmp=XMP), encoded(photo().convert("CMYK"), "JPEG"), encoded(photo()), plain[:-2]]
    tries, jpeg = [], D._jpeg
    monkeypatch.setattr(D, "_jpeg", lambda data, *rest: (tries.append(data), jpeg(data, *rest))[1])
    for data in others:  # control
        decoded(data)
    assert asked == others
    assert tries == [others[0], others[1], others[3]]  # each once


def test_damaged_jpegs_are_what_pillow_takes_them_for(monkeypatch):
    """The pixels are equal, or the reason why there are none: libjpeg warns where Pillow stops, and the reverse."""
    rng, exif = random.Random(0), Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(photo(), "JPEG", **options) for options in (*JPEGS.values(), {"exif": exif})]
    taken = []
    for number in range(600):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.randrange(1, 4)):
            how, at = rng.randrange(4), rng.randrange(len(data))
            if how == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                del data[at : at + rng.randrange(1, 5)]
            elif how == 2:
                data[at:at] = rng.randbytes(3)
            elif number % 7 == 0:
                del data[at:]
        ours, theirs = decoded(bytes(data)), by_pillow_alone(bytes(data), monkeypatch)
        taken.append(theirs if isinstance(theirs, str) else "pixels")
        np.testing.assert_array_equal(ours, theirs)
    assert {"pixels", "truncated"} <= set(taken)
    assert min(taken.count("pixels"), 600 - taken.count("pixels")) > 50


def test_a_header_that_is_read_in_two_ways_is_left_to_pillow(monkeypatch):
    data = encoded(photo(), "JPEG")
    expected = decode(data)
    monkeypatch.setattr(D.simplejpeg, "decode_jpeg_header", lambda data: (60_000, 60_000, "YCbCr", "420"))
    monkeypatch.setattr(D.simplejpeg, "decode_jpeg", None)
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_reduced_jpegs(orientation, factor):
    exif, asked = Image.Exif(), []
    exif[0x0112] = orientation
    data = encoded(photo(250, 403) if orientation == 1 else photo(240, 400), "JPEG", quality=95, exif=exif)

    def reduction(height, width):
        asked.append((height, width))
        return factor

    whole, reduced = decode(data), decode(data, reduction)
    height, width = whole.shape[:2]
    assert asked == [(height, width)] == [(400, 240) if orientation == 6 else (250, 403)]
    assert reduced.shape == (-(-height // factor), -(-width // factor), 3)
    rows, columns = height // factor, width // factor
    means = whole[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3).mean((1, 3))
    error = np.abs(reduced[:rows, :columns] - means).mean()
    assert error < 3
    if factor > 1:  # control: a picture that lies elsewhere by one pixel
        assert np.abs(reduced[1:rows, :columns] - means[:-1]).mean() > 2 * error


def test_a_turned_jpeg_is_reduced_only_where_its_sides_can_be_divided():
    """What is rounded up would lie at the beginning, and everything else next to its place."""
    exif = Image.Exif()
    exif[0x0112] = 3
    sizes = [decode(encoded(photo(*size), "JPEG", exif=exif), lambda *_: 8).shape[:2] for size in ((80, 84), (81, 80))]
    assert sizes == [(20, 21), (81, 80)]


def test_only_jpegs_are_reduced(monkeypatch):
    def never(height, width):
        raise AssertionError

    for kind in ("PNG", "WEBP", "TIFF"):
        assert decode(encoded(photo(), kind), never).shape == (54, 67, 3)
    data = encoded(photo(), "JPEG")
    assert decoded(data[:-2]) == "truncated"
    with pytest.raises(BadImage, match="truncated"):
        decode(data[:-2], lambda height, width: 2)
    assert decode(encoded(photo().convert("CMYK"), "JPEG"), never).shape == (54, 67, 3)


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for kind in ("GIF", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data).astype(int) - 10).max() <= 3


def test_extreme_shapes():
    for shape in ((1, 1), (1, 5000), (5000, 1)):
        assert decode(encoded(Image.fromarray(np.zeros((*shape, 3), np.uint8)))).shape == (*shape, 3)


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
