"""Shards of the webdataset library and of `nnclr pack`, read at random, near and far."""

import gc
import io
import json
import os
import shutil
import sys
import time
import warnings
import zlib

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from nnclr.data import shards
from nnclr.data.augment import policy
from nnclr.data.decode import BadImage, decode
from nnclr.data.loader import Plan, StreamLoader, create_loader
from nnclr.data.shards import indexed_files
from nnclr.data.source import open_source
from nnclr.data.storage import cache_folder
from nnclr.errors import DataError, InputError
from nnclr.pack import pack


def png(i, side=12):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side + i % 3, 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def foreign(tmp_path):
    """Three shards of ten samples as the webdataset library writes them."""
    (tmp_path / "wds").mkdir()
    for number in range(3):
        with webdataset.TarWriter(str(tmp_path / f"wds/x-{number:03d}.tar")) as writer:
            for i in range(10 * number, 10 * number + 10):
                writer.write({"__key__": f"k/{i:04d}", "png": png(i), "cls": i % 4, "json": {"caption": "a"}})
    return tmp_path / "wds"


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    """60 pictures of three classes in a folder, and the same packed in shards of at most 40,000 bytes."""
    root = tmp_path_factory.mktemp("packed")
    for i in range(60):
        folder = root / "photos" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.png").write_bytes(png(i, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["nnclr.pack"], "_MB", 40_000)
        pack(root / "photos", root / "packed", shard_size=1, say=lambda _: None)
    return root


@pytest.fixture
def packed(packed_once, tmp_path):
    shutil.copytree(packed_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "packed"


# ---- shards of others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["*", "braces", "list", "folder", "one"])
def test_shards_of_the_webdataset_library(foreign, form):
    texts = {
        "*": f"{foreign}/x-*.tar",
        "braces": str(foreign / "x-{000..002}.tar"),
        "list": [foreign / f"x-{i:03d}.tar" for i in range(3)],
        "folder": foreign,
        "one": foreign / "x-001.tar",
    }
    source = open_source(texts[form])
    first, n = (10, 10) if form == "one" else (0, 30)
    assert len(source) == n
    assert source.blocks == (10,) * (n // 10)
    assert source.labels.tolist() == [i % 4 for i in range(first, first + n)]
    assert source.class_names == ("0", "1", "2", "3")
    for i in range(n):
        assert source.content(i) == png(first + i)
        np.testing.assert_array_equal(source.read(i), decode(png(first + i)))
    assert source.describe(3) == f"x-00{first // 10}.tar/k/{first + 3:04d}.png"


def test_a_shard_is_gone_through_once(foreign, monkeypatch):
    pattern, passes = f"{foreign}/x-*.tar", []
    real = shards.scan
    monkeypatch.setattr(shards, "scan", lambda *arguments: passes.append(arguments[2]) or real(*arguments))
    first = open_source(pattern)
    assert len(passes) == 3
    again = open_source(pattern)
    assert len(passes) == 3
    assert (again.fingerprint, again.revision) == (first.fingerprint, first.revision)
    assert again.content(17) == png(17)
    table = next(file for file in cache_folder().iterdir() if b"k/0015.png" in file.read_bytes())
    table.write_bytes(table.read_bytes()[:300])  # a damaged one is made anew
    os.utime(foreign / "x-002.tar")  # and that of a shard which was written since
    assert open_source(pattern).fingerprint == first.fingerprint
    assert sorted(passes[3:]) == [f"{foreign}/x-001.tar", f"{foreign}/x-002.tar"]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        ([b"1", b"0", b"3"], [1, 0, 3], ("0", "1", "2", "3")),
        ([b"dog", b"cat", b"dog"], [1, 0, 1], ("cat", "dog")),
        ([b"dog", b"7", b"\xff"], [2, 0, 1], ("7", "\\xff", "dog")),
        ([b"-1", b"2", b"2"], [0, 1, 1], ("-1", "2")),
        ([b"123456789", b"5", b"5"], [0, 1, 1], ("123456789", "5")),
        ([b"123456", b"5", b"5"], [1, 0, 0], ("5", "123456")),
        ([b"99999999999999999999", b"5", b"5"], [1, 0, 0], ("5", "99999999999999999999")),
        ([b"1", None, b"1"], None, None),
        ([None, None, None], None, None),
    ],
)
def test_labels(tmp_path, labels, numbers, names):
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for i, label in enumerate(labels):
            writer.write({"__key__": str(i), "png": png(i)} | ({} if label is None else {"cls": label}))
    source = open_source(tmp_path / "x.tar")
    assert (None if source.labels is None else source.labels.tolist()) == numbers
    assert source.class_names == names


def test_samples_without_an_image_are_counted(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "a", "png": png(0)})
        writer.write({"__key__": "b", "txt": "no picture"})
    assert open_source(tmp_path / "x.tar").skipped == {"sample without an image": 1}
    with webdataset.TarWriter(str(tmp_path / "y.tar")) as writer:
        writer.write({"__key__": "b", "txt": "no picture"})
    with pytest.raises(InputError, match=r"no images found in .*y.tar: 1 samples without one"):
        open_source(tmp_path / "y.tar")


def test_images_that_are_none_are_bad_and_nothing_else(foreign):
    path = foreign / "x-000.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x89PNG", b"\x89XXX"))
    source = open_source(path)
    with pytest.raises(BadImage, match="not_an_image"):
        source.read(0)
    os.truncate(path, 3000)
    with pytest.raises(BadImage, match=r"truncated: .*x-000.tar has become shorter"):
        source.read(9)
    path.unlink()
    with pytest.raises(BadImage, match=r"unreadable: .*x-000.tar: No such file"):
        source.read(9)
    path.mkdir()
    with pytest.raises(InputError, match="is no regular file"):
        open_source(path)


def test_mistakes_are_named(foreign, tmp_path):
    for data, words in (
        (f"{foreign}/x-000.tar?label=a", "'label' after the \\? is not understood; expected nothing"),
        ([foreign / "x-000.tar"] * 2, "x-000.tar is named 2 times"),
        (tmp_path / "y.tar", "y.tar does not exist"),
        ("s3://bucket/folder", "no folder of nnclr pack .s3:// needs a library of its own that is not installed; pip"),
        (
            "memory://nothing",
            r"memory://nothing is no folder of nnclr pack .*does not exist.*; name other shards as in memory://nothing/\*",
        ),
    ):
        with pytest.raises(InputError, match=words):
            open_source(data)


# ---- shards of nnclr pack ----------------------------------------------------------------------------------


def by_key(folder):
    """Key -> sample, as the webdataset library reads the shards."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files open
        samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
        gc.collect()
    return samples


def test_the_webdataset_library_reads_what_is_packed(packed, tmp_path):
    photos, source, samples = open_source(tmp_path / "photos"), open_source(packed), by_key(packed)
    assert len(samples) == len(source) == 60
    for i in range(60):
        sample = samples[f"{i:09d}"]
        assert sample["png"] == photos.content(i)
        assert int(sample["cls"]) == photos.labels[i]
    names = [source.describe(i) for i in range(60)]
    assert sorted(names) == [photos.describe(i) for i in range(60)]
    for i in range(60):
        original = next(k for k in range(60) if photos.describe(k) == names[i])
        assert source.content(i) == photos.content(original)
        assert source.labels[i] == photos.labels[original]
    assert source.class_names == ("a", "b", "c")


def test_the_index_changes_neither_images_nor_identity(packed, tmp_path):
    source = open_source(packed)
    pattern = open_source(f"{packed}/*.tar")
    shutil.copytree(packed, tmp_path / "moved")
    (tmp_path / "moved/index.json").unlink()
    bare = open_source(f"{tmp_path}/moved/shard-*.tar")
    assert source.fingerprint == pattern.fingerprint == bare.fingerprint
    assert source.blocks == pattern.blocks == bare.blocks
    assert len(source.blocks) > 4
    assert bare.class_names == ("0", "1", "2")
    assert all(source.content(i) == bare.content(i) for i in range(60))
    part = open_source(f"{packed}/shard-00000[12].tar")
    assert part.content(0) == source.content(source.blocks[0])
    assert part.fingerprint != source.fingerprint


def first_row(packed):
    return np.load(packed / "shard-000001.index.npy")[0]


def damage(packed, kind):
    path = packed / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    index = json.loads((packed / "index.json").read_text())
    if kind == "cut":
        path.write_bytes(content[:-1024])
    elif kind == "gone":
        path.unlink()
    elif kind == "table flipped":
        table = bytearray((packed / "shard-000001.index.npy").read_bytes())
        table[200] ^= 1
        (packed / "shard-000001.index.npy").write_bytes(table)
    elif kind == "table gone":
        (packed / "shard-000001.index.npy").unlink()
    elif kind == "table of another":
        shutil.copy(packed / "shard-000000.index.npy", packed / "shard-000001.index.npy")
    elif kind == "count":
        index["shards"][1]["images"] += 1
    elif kind == "outside":
        index["shards"][1]["file"] = "../packed/shard-000001.tar"
    elif kind == "format":
        index["format"] = 2
    elif kind == "no numbers":
        index["shards"][1]["bytes"] = "many"
    elif kind == "unfinished":
        (packed / ".pack").mkdir()
    (packed / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", r"shard-000001.tar has \d+ bytes, and its index says \d+: it was cut or written anew"),
        ("gone", "shard-000001.tar does not exist"),
        ("table flipped", "shard-000001.index.npy is damaged: it is not the table that index.json describes"),
        ("table gone", "shard-000001.index.npy does not exist"),
        ("table of another", "shard-000001.index.npy is damaged"),
        ("count", "index.json is damaged .its numbers do not add up."),
        ("outside", "index.json is damaged .what it says of ../packed/shard-000001.tar."),
        ("format", "index.json has format 2; this version reads format 1"),
        ("no numbers", "index.json is damaged"),
        ("unfinished", "packed is not packed to its end; run the same nnclr pack again"),
        ("none", None),
    ],
)
def test_damage_is_noticed_at_opening(packed, kind, words):
    damage(packed, kind)
    if words is None:
        assert len(open_source(packed)) == 60
        return
    with pytest.raises(InputError, match=words):
        open_source(packed)


def test_a_flipped_bit_costs_one_image_and_is_named(packed):
    """Without the checksum, the control, a picture with wrong pixels would be trained on."""
    source = open_source(packed)
    row = first_row(packed)
    content = bytearray((packed / "shard-000001.tar").read_bytes())
    offset, size = int(row["offset"]), int(row["size"])
    assert zlib.crc32(content[offset : offset + size]) == row["crc32"]
    content[offset + size // 2] ^= 1
    (packed / "shard-000001.tar").write_bytes(content)
    i = source.blocks[0]
    for opened in (source, open_source(packed)):
        with pytest.raises(BadImage, match=r"damaged since it was packed in .*shard-000001.tar"):
            opened.read(i)
        opened.read(i + 1)
    (packed / "index.json").unlink()
    assert open_source(f"{packed}/*.tar").content(i) != b""


def test_only_shards_of_an_index_have_hashes(packed, foreign):
    assert len(indexed_files(str(packed))) == len(indexed_files(f"{packed}/*.tar")) == len(open_source(packed).blocks)
    assert indexed_files(f"{foreign}/*.tar") == indexed_files(str(foreign)) == indexed_files("demo-photos") == []


# ---- object storage ----------------------------------------------------------------------------------------


@pytest.fixture
def uploaded(packed, foreign):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for folder in (packed, foreign):
        for path in folder.iterdir():
            memory.pipe(f"/bucket/{folder.name}/{path.name}", path.read_bytes())
    yield memory
    memory.store.clear()


def test_object_storage(uploaded, packed, foreign):
    near, far = open_source(packed), open_source("memory://bucket/packed")
    assert far.fingerprint == near.fingerprint
    assert (far.labels == near.labels).all()
    assert far.class_names == near.class_names
    assert all(far.content(i) == near.content(i) for i in range(60))
    with pytest.warns(UserWarning, match="have no index: each is read through once"):
        bare = open_source("memory://bucket/wds/x-{000..002}.tar")
    assert bare.fingerprint == open_source(foreign).fingerprint
    assert bare.content(29) == png(29)
    assert bare.name == "memory://bucket/wds/x-{000..002}.tar"


def test_a_remote_shard_that_is_another_stops_the_run(uploaded):
    content = uploaded.cat("/bucket/packed/shard-000001.tar")
    uploaded.pipe("/bucket/packed/shard-000001.tar", content[:-600] + b"x" + content[-599:])
    source = open_source("memory://bucket/packed")
    plan = Plan(60, 10, policy("byol", 16), 0)
    with pytest.raises(DataError, match=r"shard-000001.tar is not the shard that its index describes"):
        for _ in StreamLoader(source, plan, torch.device("cpu"), 0).batches(0, 60):
            pass


# ---- order -------------------------------------------------------------------------------------------------


def ids_of(source, start, stop, workers=0):
    plan = Plan(len(source), 7, policy("byol", 16), 5)
    loader = create_loader(source, plan, torch.device("cpu"), workers)
    assert isinstance(loader, StreamLoader)
    return [batch.ids.tolist() for batch in loader.batches(start, stop)]


def test_training_reads_few_shards_at_a_time(packed, monkeypatch):
    """Each image once an epoch; a resumed run sees what an uninterrupted one does; 2 shards are mixed, not all."""
    monkeypatch.setattr(shards, "WINDOW_BYTES", 90_000)
    source = open_source(packed)
    assert (source.window, len(source.blocks)) == (2, 12)
    whole = ids_of(source, 0, 16)  # two epochs of 8 batches
    for epoch in (whole[:8], whole[8:]):
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == len(seen) == 56
    assert whole[:8] != whole[8:]
    for start in (3, 8, 11):
        assert ids_of(source, start, 16, workers=2) == whole[start:]
    of_shard = np.repeat(np.arange(12), source.blocks)
    of_a_batch = [len(set(of_shard[batch])) for batch in whole]
    assert max(of_a_batch) <= 4  # two at a time, and a batch is longer than a shard
    monkeypatch.setattr(shards, "WINDOW_BYTES", 1 << 30)  # the control: all shards are mixed
    assert np.mean([len(set(of_shard[batch])) for batch in ids_of(open_source(packed), 0, 8)]) > 5


# ---- indices that cannot be trusted ------------------------------------------------------------------------


def test_packs_that_number_their_classes_differently(tmp_path):
    for pack_name, classes in (("one", "ab"), ("two", "bc")):
        for i in range(6):
            folder = tmp_path / f"{pack_name} photos" / classes[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(png(i))
        pack(tmp_path / f"{pack_name} photos", tmp_path / pack_name, say=lambda _: None)
    source = open_source([tmp_path / "one", tmp_path / "two"])
    assert source.class_names == ("a", "b", "c")
    for i in range(12):
        assert source.describe(i)[0] == "abc"[source.labels[i]]
    (tmp_path / "two/index.json").unlink()
    with pytest.raises(InputError, match=r"two/shard-000000.tar have no names, and those of other shards have"):
        open_source([f"{tmp_path}/one/*.tar", f"{tmp_path}/two/*.tar"])


@pytest.mark.parametrize("name", ["set{1,2}", "set{1..2}", "set[1]"])
def test_a_folder_whose_name_looks_like_a_pattern(foreign, name):
    folder = foreign.rename(foreign.parent / name)
    source = open_source(folder)
    assert len(source) == 30
    assert source.name == f"{folder}/*.tar"


def test_an_index_that_cannot_be_read_is_not_taken_for_none(packed, monkeypatch):
    """Control: JSON of another kind is none, and the shards are read without it."""
    path = packed / "index.json"
    content = path.read_bytes()
    for damaged in (content[:-20], b"", b"\xff" * 50):
        path.write_bytes(damaged)
        for data in (packed, f"{packed}/*.tar"):
            with pytest.raises(InputError, match=r"index.json is damaged: it is no JSON"):
                open_source(data)
    for other in (b"[1, 2]", b'{"images": []}'):
        path.write_bytes(other)
        assert len(open_source(f"{packed}/*.tar")) == 60
    monkeypatch.setattr(shards, "_MOST_INDEX", 1000)
    path.write_bytes(b'{"images": []}' + b" " * 2000)
    assert len(open_source(f"{packed}/*.tar")) == 60
    path.write_bytes(content)
    with pytest.raises(InputError, match="an index has at most"):
        open_source(packed)
    monkeypatch.undo()
    index = json.loads(content)
    index["shards"] = "none"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index.json is damaged; restore it"):
        open_source(packed)


def test_a_remote_index_that_may_not_be_read(uploaded, monkeypatch):
    real, error = type(uploaded).info, [PermissionError("403")]

    def info(self, path, **settings):
        if path.endswith("index.json"):
            raise error[0]
        return real(self, path, **settings)

    monkeypatch.setattr(type(uploaded), "info", info)
    absent, slow = "index.json cannot be read: 403; it is taken to be absent", "have no index: each is read through"
    with pytest.warns(UserWarning, match=absent), pytest.warns(UserWarning, match=slow):
        assert len(open_source("memory://bucket/packed/shard-000001.tar")) > 0
    error[0] = TimeoutError("slow")
    with pytest.raises(InputError, match=r"index.json cannot be read: slow"):
        open_source("memory://bucket/packed/shard-000001.tar")


def test_tables_are_not_kept_open(packed):
    source = open_source(packed)
    with open("/proc/self/maps") as maps:
        assert "index.npy" not in maps.read()
    targets = [
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    ]
    assert not any("index.npy" in target for target in targets)
    assert len(source) == 60


def test_a_remote_table_that_was_repaired(uploaded, packed):
    name = "/bucket/packed/shard-000001.index.npy"
    right = uploaded.cat(name)
    for wrong in (right[:-1] + b"x", right + bytes(1 << 20)):
        uploaded.pipe(name, wrong)
        with pytest.raises(InputError, match=r"shard-000001.index.npy is damaged"):
            open_source("memory://bucket/packed")
    uploaded.pipe(name, right)
    near = open_source(packed)
    assert open_source("memory://bucket/packed").fingerprint == near.fingerprint
    for kept in cache_folder().glob("*.npy"):
        kept.write_bytes(right[:100])  # cut in the cache
    assert open_source("memory://bucket/packed").fingerprint == near.fingerprint
    assert all(len(kept.read_bytes()) > 100 for kept in cache_folder().glob("*.npy"))


def test_no_more_of_a_remote_table_is_fetched_than_it_can_have(uploaded, monkeypatch):
    name, real, fetched = "/bucket/packed/shard-000001.index.npy", type(uploaded).cat_file, []
    uploaded.pipe(name, bytes(1 << 20))

    def cat_file(self, path, start=None, end=None):
        fetched.append(end - start)
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(uploaded), "cat_file", cat_file)
    with pytest.raises(InputError, match=r"shard-000001.index.npy is damaged"):
        open_source("memory://bucket/packed")
    assert max(fetched) < 100_000


def test_an_unwritable_cache(uploaded, packed, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "a file"))
    with pytest.warns(UserWarning, match=r"index.npy is not kept: .*a file/shards: Not a directory"):
        far = open_source("memory://bucket/packed")
    assert far.fingerprint == open_source(packed).fingerprint
    assert far.content(33) == open_source(packed).content(33)


def test_a_flipped_copy_costs_no_image(uploaded, packed):
    near, far = open_source(packed), open_source("memory://bucket/packed")
    n = far.blocks[0]
    for _ in range(3):
        for i in range(n):
            far.content(i)
    for _ in range(200):
        if copies := list(cache_folder().glob("*.copy")):
            break
        time.sleep(0.01)
    content = copies[0].read_bytes()
    copies[0].write_bytes(bytes(byte ^ 1 for byte in content))
    assert all(far.content(i) == near.content(i) for i in range(n))
    assert not copies[0].exists() or copies[0].read_bytes() == content


def test_a_damaged_table_of_the_cache_never_ends_the_run(foreign):
    first = open_source(foreign)
    (kept, *_) = cache_folder().iterdir()
    content = bytearray(kept.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := content.find(mark, place + 1)) >= 0:
            content[place + flags] |= 1  # says that it is encrypted
    kept.write_bytes(content)
    with pytest.raises(RuntimeError, match="encrypted"):
        dict(np.load(kept))
    assert open_source(foreign).fingerprint == first.fingerprint
