"""Files, folders and shards that are bad on purpose, each beside what has to become of it."""

import io
import os
import socket
import stat
import struct
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from unittest import mock

import numpy as np
from PIL import Image

from nnclr.data.decode import MAX_BYTES
from tests.data.test_decode import encoded, photo, png_header
from tests.data.test_tar_index import archive, shard

# ---- files that the scan takes for images ------------------------------------------------------------------


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def zeros_png(side, channels, rows=None):
    """A PNG of so many zeros, with only some of its rows: kilobytes that want hundreds of megabytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    packer, row = zlib.compressobj(1), bytes(1 + side * channels)
    data = b"".join(packer.compress(row) for _ in range(side if rows is None else rows))
    data += packer.flush() if rows is None else packer.flush(zlib.Z_SYNC_FLUSH)
    end = png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + end


def archive_of_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.txt", "text")
    return file.getvalue()


def jpeg_of_size(width, height):
    """A small JPEG whose header says another size."""
    data = bytearray(encoded(photo(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def float_tiff(value):
    return encoded(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")


def bad_files():
    """File name -> (content, reason for which it is skipped)."""
    picture, rng = photo(), np.random.default_rng(0)
    noisy = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    jpeg, png, gray = encoded(picture, "JPEG"), encoded(noisy), rng.integers(0, 65536, (40, 40), dtype=np.uint16)
    none = {
        "empty.jpg": b"",
        "page.jpg": b"<!doctype html><title>404 Not Found</title>",
        "program.png": b"\x7fELF\x02\x01\x01" + bytes(57),
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "paper.png": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "archive.webp": archive_of_zip(),
        "noise.bmp": rng.bytes(900),
        "notes.tif": "naïve\n".encode(),
        "pixmap.jpg": encoded(picture, "PPM"),
        "icon.png": encoded(picture, "ICO"),
        "targa.png": encoded(picture, "TGA"),
        "jpeg2000.jpg": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(80),
        "photoshop.png": b"8BPS\x00\x01" + bytes(60),
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "start.jpg": b"\xff\xd8\xff\xe0",
        "header.gif": b"GIF89a",
        "riff.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "cut.webp": encoded(noisy, "WEBP")[:-400],
        "tag.tiff": b"II*\x00\xff\xff\xff\xff",
    }
    cut = {
        "two-bytes.jpg": jpeg[:-2],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "progressive.jpg": encoded(picture, "JPEG", progressive=True)[:-300],
        "print.jpg": encoded(picture.convert("CMYK"), "JPEG")[:-300],
        "half.png": png[: len(png) // 2],
        "sum.png": flipped(png, png.index(b"IDAT") + 100),
        "stream.png": b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
        + png_chunk(b"IDAT", b"no zlib stream")
        + png_chunk(b"IEND", b""),
        "deep.png": encoded(Image.fromarray(gray))[:-900],
        "half.gif": encoded(noisy, "GIF")[:-400],
        "moving.gif": encoded(noisy, "GIF", save_all=True, append_images=[picture])[:900],
        "half.bmp": encoded(noisy, "BMP")[:-400],
        "half.tif": encoded(noisy, "TIFF")[:2000],
        "packed.tif": flipped(encoded(noisy, "TIFF", compression="tiff_adobe_deflate"), 60),
        "wide.png": zeros_png(8192, 4, rows=4096),  # at the limit of pixels, and half of them are missing
    }
    large = {
        "square.png": png_header(60_000, 60_000),
        "bomb.png": png_header(14_000, 14_000),
        "warned.png": png_header(12_000, 12_000),
        "silent.png": png_header(9_400, 9_400),  # below Pillow's own limit
        "thin.png": png_header(2**31 - 1, 1),
        "bomb.jpg": jpeg_of_size(65_000, 65_000),
        "bomb.bmp": encoded(picture, "BMP").replace(struct.pack("<ii", 67, 54), struct.pack("<ii", 60_000, 60_000)),
        "bomb.gif": encoded(picture, "GIF").replace(struct.pack("<HH", 67, 54), struct.pack("<HH", 65_000, 65_000)),
        "bomb.webp": encoded(Image.new("RGB", (8192, 8192)), "WEBP", lossless=True, method=0, quality=0),
    }
    values = {"nan.tif": float_tiff(np.nan), "inf.tiff": float_tiff(np.inf)}
    groups = {"not_an_image": none, "truncated": cut, "too_large": large, "unsupported_mode": values}
    return {name: (data, reason) for reason, group in groups.items() for name, data in group.items()}


LATE = ("vanished.png", "pipe.png", "swapped.png", "device.png", "failing.png", "denied.png", "large.png")
"""Good when the folder is scanned, and no longer when they are read; the last one then has grown."""


def write_bad_files(folder, good):
    """All bad files and so many good ones; name -> reason of those that will be bad."""
    folder.mkdir()
    files = bad_files()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    for i in range(good):
        (folder / f"good-{i:03d}.png").write_bytes(encoded(photo(24 + i, 30)))
    for name in LATE:
        (folder / name).write_bytes(encoded(photo(20, 20)))
    late = dict.fromkeys(LATE, "unreadable") | {"large.png": "too_large"}
    return {name: reason for name, (_, reason) in files.items()} | late


def spoil_late(folder):
    """What happens to files between the scan and the reading."""
    for name in ("vanished.png", "pipe.png", "swapped.png", "device.png"):
        (folder / name).unlink()
    os.mkfifo(folder / "pipe.png")
    (folder / "swapped.png").symlink_to("/etc/passwd")
    (folder / "device.png").symlink_to("/dev/zero")
    os.truncate(folder / "large.png", MAX_BYTES + 1)


@contextmanager
def failing_storage():
    """`failing.png` answers EIO, `denied.png` EACCES: the superuser, who may run the tests, reads everything."""
    real = os.open

    def opening(path, *rest, **more):
        for name, number in (("failing.png", 5), ("denied.png", 13)):
            if os.fsencode(path).endswith(os.fsencode(name)):
                raise OSError(number, os.strerror(number), path)
        return real(path, *rest, **more)

    with mock.patch("os.open", opening):
        yield


# ---- what a scan leaves out --------------------------------------------------------------------------------


def left_out_of_a_scan(root, outside):
    """(what, make it, why it is left out); each is made in a folder of its own with one good image."""

    def named_socket():
        place = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(root)  # the path of a socket may have 107 bytes
        try:
            place.bind("socket.png")
        finally:
            os.chdir(here)
            place.close()

    def device():
        os.mknod(root / "null.png", stat.S_IFCHR | 0o600, os.makedev(1, 3))

    yield "a pipe", lambda: os.mkfifo(root / "pipe.png"), "not a regular file"
    yield "a socket", named_socket, "not a regular file"
    if os.geteuid() == 0:
        yield "a device", device, "not a regular file"
    yield "a link to nothing", lambda: (root / "a.png").symlink_to("nothing.png"), "dangling link"
    yield "a link to itself", lambda: (root / "a.png").symlink_to("a.png"), "dangling link"
    yield "a link out", lambda: (root / "a.png").symlink_to(outside / "secret.png"), "link out of the folder"
    yield "a linked folder out", lambda: (root / "a").symlink_to(outside), "link out of the folder"
    yield "a locked folder", lambda: (root / "locked").mkdir(), "unreadable folder"


@contextmanager
def locked_folders():
    """A folder named `locked` may not be listed, not even by the superuser."""
    real = os.scandir

    def listing(path):
        if os.fsencode(path).endswith(b"locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    with mock.patch("os.scandir", listing):
        yield


# ---- folders and shards that are refused -------------------------------------------------------------------


def refused_folders(root):
    """(what, arguments of `nnclr pretrain`, words of the message)."""
    for name in ("empty", "other", "pipes", "few", "classes/a", "classes/b"):
        (root / name).mkdir(parents=True)
    (root / "other/a.heic").write_bytes(b"x")
    os.mkfifo(root / "pipes/a.png")
    for i in range(4):
        (root / f"few/{i}.png").write_bytes(encoded(photo(20, 20)))
    (root / "file.png").write_bytes(encoded(photo(20, 20)))
    yield "an empty folder", [root / "empty"], "it is empty"
    yield "empty classes", [root / "classes"], "it is empty"
    yield "another kind of picture", [root / "other"], r"it holds 1 \.heic; accepted are"
    yield "only pipes", [root / "pipes"], "it holds 1 x not a regular file"
    yield "no folder", [root / "missing"], "does not exist"
    yield "a picture as the folder", [root / "file.png"], "is a file, not a folder"
    yield "a batch larger than the data", [root / "few", "--batch-size", "5"], "batch_size=5 is larger .* 4 images"
    yield "a batch of one", [root / "few", "--batch-size", "1"], "batch_size=1 must be .* at least 2"
    yield "a run among the images", [root / "few", "--out", root / "few/run"], "lies in the images of"


def wrong_labels():
    """(what, images and labels, words of the message)."""
    images = np.zeros((3, 8, 8), np.uint8)
    yield "too few labels", (images, [0, 1]), "3 whole numbers"
    yield "too many labels", (images, [0, 1, 2, 3]), "3 whole numbers"
    yield "a label below 0", (images, [0, 1, -1]), "3 whole numbers"
    yield "labels of which one is no number", (images, [0, "b", 2]), "3 whole numbers"
    yield "half a label", (images, [0.5, 1, 1]), "3 whole numbers"
    yield "a label of a billion", (images, [0, 1, 10**9]), "classes end at 1048575"
    yield "pixels as floats", (images.astype(float), [0, 1, 2]), "must be uint8"


def refused_shards():
    """(what, content of a tar file, words of the message)."""
    whole = shard(6)
    with tarfile.open(fileobj=io.BytesIO(whole)) as opened:
        places = [(member.offset, member.offset_data) for member in opened]
    header, data = places[4]
    sparse = tarfile.TarInfo("a.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    twice = archive(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"))
    yield "no byte", b"", "it ends there without the end mark"
    yield "cut in a header", whole[: header + 100], f"damaged at byte {header}"
    yield "cut in an image", whole[: data + 100], "ends behind the end of the file"
    yield "cut between samples", whole[:header], f"damaged at byte {header}"
    yield "a header of zeros", whole[:header] + bytes(512) + whole[data:], "zeros stand for a header"
    yield "a header of garbage", whole[:header] + b"\xa5" * 512 + whole[data:], "there is no valid header"
    yield "a flipped bit in a header", flipped(whole, header + 20), "there is no valid header"
    yield "a key twice", twice, "holds the key a twice"
    yield "two images of a key", archive(("a.jpg", b"1"), ("a.png", b"2")), "two images with the key a"
    yield "no image", archive(("a.txt", b"1"), ("b.cls", b"2")), "no images found"
    yield "gzip", b"\x1f\x8b\x08" + bytes(600), "is compressed"
    yield "zstd", b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed"
    yield "no tar file", b"no tar" * 200, "is no tar file"
    yield "a sparse member", sparse.tobuf(tarfile.GNU_FORMAT) + bytes(512 + 1024), "sparse file"
    yield "a label that is a book", archive(("a.jpg", b"1"), ("a.cls", b"x" * 300)), "too many for a label"


def odd_shard():
    """A shard whose members are hostile or bad; name as it is shown -> reason, or None for a good image."""
    good = encoded(photo(20, 20))
    link, device = tarfile.TarInfo("link.png"), tarfile.TarInfo("device.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    content = archive(
        ("../../climbing.png", good),
        ("/etc/absolute.png", good),
        ("red\x1b[31m\n.png", good),
        (link, b""),
        (device, b""),
        ("page.png", b"<html>"),
        ("half.jpg", encoded(photo(), "JPEG")[:-300]),
        ("lonely.cls", b"3"),
    )
    large = tarfile.TarInfo("large.png")
    large.size = MAX_BYTES + 1  # of zeros, as a hole
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    expected = {
        "../../climbing.png": None,
        "/etc/absolute.png": None,
        r"red\x1b[31m\n.png": None,
        "page.png": "not_an_image",
        "half.jpg": "truncated",
        "large.png": "too_large",
    }
    return content[:end] + large.tobuf(), end + 512 + -(-large.size // 512) * 512 + 1024, expected
