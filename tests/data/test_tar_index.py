"""Every byte of a shard is accounted for; Python's tarfile, the control, loses what is behind a damaged header."""

import contextlib
import io
import json
import random
import tarfile

import numpy as np
import pytest
import webdataset

from nnclr.data.tar_index import make_table, members, scan, valid_table
from nnclr.errors import InputError

SAMPLES = 20


def noise(i, size=None):
    return np.random.default_rng(i).bytes(900 + 61 * i if size is None else size)


def shard(samples=SAMPLES, **settings):
    """A shard of `.jpg` and `.cls` as the webdataset library writes it."""
    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0, **settings) as writer:
        for i in range(samples):
            writer.write({"__key__": f"some/where/{i:04d}", "jpg": noise(i), "cls": i % 3})
    return file.getvalue()


def reader(content):
    return lambda offset, size: content[offset : offset + size]


def scanned(content):
    return scan(reader(content), len(content), "x.tar")


def by_tarfile(content, mode="r|"):
    """The members as tarfile streams them, and so webdataset."""
    with tarfile.open(fileobj=io.BytesIO(content), mode=mode) as opened:
        return [(member.name, opened.extractfile(member).read()) for member in opened if member.isreg()]


def archive(*members_, form=tarfile.PAX_FORMAT):
    """A tar file of (name or TarInfo, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        for name, content in members_:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(content) if header.isreg() else header.size
            made.addfile(header, io.BytesIO(content))
    return file.getvalue()


def test_the_table_is_what_the_library_wrote():
    content = shard()
    table, left_out = scanned(content)
    assert left_out == 0
    assert table["label"].tolist() == [b"%d" % (i % 3) for i in range(SAMPLES)]
    assert table["name"].tolist() == [b"some/where/%04d.jpg" % i for i in range(SAMPLES)]
    for i, row in enumerate(table):
        assert content[row["offset"] : row["offset"] + row["size"]] == noise(i)
    assert valid_table(table, len(content))
    assert not valid_table(table, int(table["offset"][-1] + table["size"][-1]) - 1)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form):
    """Long names, names that are no ASCII, links, folders, empty files, every form of header."""
    long = "d/" * 40 + "n" * 60 + ".jpg" if form == tarfile.USTAR_FORMAT else "d/" * 200 + "é" * 120 + ".jpg"
    link, folder, fifo = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("folder.jpg"), tarfile.TarInfo("fifo.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder.type, fifo.type = tarfile.DIRTYPE, tarfile.FIFOTYPE
    content = archive(
        ("a.jpg", noise(1)), (link, b""), (long, noise(2)), (folder, b""), (fifo, b""), ("empty.jpg", b""),
        ("../x.jpg", noise(3, 512)), ("/etc/y.jpg", noise(4, 513)), form=form,
    )  # fmt: skip
    found = [(m.name, content[m.offset : m.offset + m.size]) for m in members(reader(content), len(content), "x.tar")]
    assert found == by_tarfile(content)
    assert len(found) == 5
    assert max(len(name) for name in scanned(content)[0]["name"]) <= 240


def test_pax_sizes_are_followed():
    header = tarfile.TarInfo("large.jpg")
    header.pax_headers = {"size": "700"}
    header.size = 700
    real = archive((header, noise(0, 700)), ("b.jpg", noise(1)))
    position = real.index(b"large.jpg\0")  # the header's own size says 0, the record says 700
    block = bytearray(real[position : position + 512])
    block[124:135] = b"0" * 11
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    content = real[:position] + bytes(block) + real[position + 512 :]
    assert [m.size for m in members(reader(content), len(content), "x.tar")] == [700, len(noise(1))]


def headers(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        return [(member.offset, member.offset_data, member.size) for member in opened]


def cut_in_header(content, place, chance):
    return content[: place[0] + chance.randrange(1, 512)]


def cut_in_data(content, place, chance):
    return content[: place[1] + chance.randrange(place[2])]


def cut_between(content, place, chance):
    return content[: place[0]]


def zeroed(content, place, chance):
    return content[: place[0]] + bytes(512) + content[place[0] + 512 :]


def two_blocks_zeroed(content, place, chance):
    return content[: place[0]] + bytes(1024) + content[place[0] + 1024 :]


def garbage(content, place, chance):
    return content[: place[0]] + chance.randbytes(512) + content[place[0] + 512 :]


def flipped_bit(content, place, chance):
    damaged = bytearray(content)
    byte = place[0] + chance.choice([b for b in range(512) if b not in (154, 155)])  # the checksum's own end
    damaged[byte] ^= 1 << chance.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "lost_in_silence"),
    [
        (cut_in_header, 40),
        (cut_in_data, 0),  # tarfile notices this one
        (cut_between, 40),
        (zeroed, 40),
        (two_blocks_zeroed, 40),
        (garbage, 40),
        (flipped_bit, 35),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_noticed_and_placed(damage, lost_in_silence):
    """40 damaged shards of each kind. The control: in how many of them tarfile ends early and says nothing."""
    whole = shard()
    places, chance, silent = headers(whole), random.Random(0), 0
    for _ in range(40):
        place = chance.choice([p for p in places[1:] if damage is not cut_in_data or p[2] > 100])
        content = damage(whole, place, chance)
        with pytest.raises(InputError, match=r"^x\.tar is damaged at byte \d+: .*; fetch or write") as raised:
            scanned(content)
        assert int(str(raised.value).split("byte ")[1].split(":")[0]) in (place[0], place[0] + 512)
        with contextlib.suppress(tarfile.ReadError, EOFError):
            silent += len(by_tarfile(content)) < 2 * SAMPLES
    assert silent >= lost_in_silence
    assert (silent > 0) == (lost_in_silence > 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "x.tar is damaged at byte 0: it ends there without the end mark"),
        (b"no tar" * 200, "is no tar file, or its first header is damaged"),
        (b"\x1f\x8b" + bytes(600), "is compressed, and no image in it can be found"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed"),
        (shard(2)[:-10240] + bytes(512), "end mark"),  # one zero block where two belong
        (archive(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")), "holds the key a twice"),
        (archive(("a.jpg", b"1"), ("a.png", b"2")), "holds two images with the key a"),
        (archive(("a.jpg", b"1"), ("a.cls", b"x" * 300)), "a.cls holds 300 characters, too many for a label"),
    ],
)
def test_what_is_no_shard_is_named(content, words):
    with pytest.raises(InputError, match=words):
        scanned(content)


def test_sparse_members_are_refused():
    sparse = tarfile.TarInfo("a.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    told = tarfile.TarInfo("b.jpg")
    told.pax_headers = {"GNU.sparse.major": "1"}
    content = sparse.tobuf(tarfile.GNU_FORMAT) + bytes(512 + 1024)
    with pytest.raises(InputError, match="sparse file at byte 0"):
        scanned(content)
    with pytest.raises(InputError, match="sparse file at byte"):
        scanned(archive((told, noise(0))))


@pytest.mark.parametrize(
    "records", [b"x", b"9 path=a\n", b"99999 path=a\n", b"0 path=a\n", b"8 size=x\n", b"-8 path=\n"]
)
def test_pax_records_that_are_none(records):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    content = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + archive(("a.jpg", b"1"))
    if records == b"9 path=a\n":  # the control: these are fine
        assert scanned(content)[0]["name"].tolist() == []
        return
    with pytest.raises(InputError, match="damaged at byte"):
        scanned(content)


def test_hostile_headers_cost_little():
    """A name of a gigabyte, a million pax records, a name of a megabyte for each image."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    with pytest.raises(InputError, match="damaged"):
        scanned(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    records = b"5 a=\n" * 200_000
    header.size = len(records)
    content = header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + archive(("a.jpg", b"1"))
    assert len(scanned(content)[0]) == 1
    table = scanned(archive(("n" * 500_000 + ".jpg", b"1"), ("b.jpg", b"2")))[0]
    assert table.nbytes < 1000
    assert table["name"][0].endswith(b"...")


def test_samples_are_grouped_as_webdataset_does():
    content = archive(
        ("one.two/a.b.jpg", b"no image of a plain kind"),
        ("one.two/c.JPG", b"image"),
        ("one.two/c.json", json.dumps({"label": "cat", "other": 1}).encode()),
        ("d.cls", b" dog \n"),
        ("d.png", b"image"),
        ("d.json", b'{"label": "beaten by .cls"}'),
        ("e.webp", b"image"),
        ("e.json", b"{no json"),
        ("f.txt", b"without an image"),
        ("no-extension", b""),
        ("._g.jpg", b"of a Mac"),
    )
    table, left_out = scanned(content)
    assert table["name"].tolist() == [b"one.two/c.JPG", b"d.png", b"e.webp"]
    assert table["label"].tolist() == [b"cat", b"dog", b""]
    assert left_out == 2
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        names = [{"fname": m.name, "data": b"", "__url__": ""} for m in opened]
    keys = [sample["__key__"] for sample in webdataset.tariterators.group_by_keys(names)]
    assert keys == ["one.two/a", "one.two/c", "d", "e", "f"]


def test_tables_that_are_none():
    table = make_table([], crc32=True)
    assert valid_table(table, 10**6, crc32=True)
    assert not valid_table(table, 10**6)
    for other in (np.zeros(3), np.zeros((2, 2), table.dtype), np.zeros(2, [("offset", "<i8")]), None):
        assert not valid_table(other, 10**6, crc32=True)
    for offset, size in ((0, 1), (512, -1), (512, 2**62), (2**62, 2**62)):
        wrong = np.zeros(1, table.dtype)
        wrong["offset"], wrong["size"] = offset, size
        assert not valid_table(wrong, 10**6, crc32=True)


@pytest.mark.parametrize(
    "content",
    [
        b" " * (1 << 20) + b'{"label": 1}',
        json.dumps({"label": "x" * 241}).encode(),
        b'{"label": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_json_that_is_no_label_is_none(content):
    table, _ = scanned(archive(("a.jpg", b"1"), ("a.json", content), ("b.jpg", b"2"), ("b.json", b'{"label": 7}')))
    assert table["label"].tolist() == [b"", b"7"]
