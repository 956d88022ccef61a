"""Packing: killed anywhere and gone on with, the folder is that of one uninterrupted go."""

import io
import json
import os
import random
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image

from nnclr import cli
from nnclr import pack as module
from nnclr.checkpoint import lock
from nnclr.data.decode import BadImage
from nnclr.data.images import Source, array_source
from nnclr.data.source import open_source
from nnclr.errors import DataError, FolderInUseError, InputError, Stopped, StorageError
from nnclr.pack import pack
from tests.alone import alone

SHARD = 20_000  # bytes of a "megabyte" here


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "_MB", SHARD)


def picture(i, width=40, height=30, mode="RGB"):
    noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """40 pictures of two classes in four formats, and three that are none."""
    for i in range(40):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i:02d}.{('png', 'jpg', 'webp', 'bmp')[i % 4]}")
    whole = (tmp_path / "photos/b/21.jpg").read_bytes()
    (tmp_path / "photos/a/00.png").write_bytes(b"no picture")
    (tmp_path / "photos/b/21.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/b/23.bmp").write_bytes(b"")
    return tmp_path / "photos"


def go(data, out, **settings):
    said = []
    pack(data, out, **{"shard_size": 1, "say": said.append, **settings})
    return said


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(folder):
    """Name -> content of everything in the shards, by tarfile."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as opened:
            found |= {member.name: opened.extractfile(member).read() for member in opened}
    return found


def test_files_are_copied_unless_they_are_large_or_odd(tmp_path, photos):
    source = open_source(photos)
    said = go(photos, tmp_path / "out")
    stored, good = members(tmp_path / "out"), [i for i in range(40) if i not in (0, 30, 31)]
    assert source.describe(30) == "b/21.jpg"
    assert source.describe(31) == "b/23.bmp"
    for i in good:
        name = source.describe(i)
        (own,) = [key for key in stored if key.startswith(f"{i:09d}.") and not key.endswith(".cls")]
        if name.endswith("bmp"):
            expected = io.BytesIO()
            picture(int(name[2:4])).save(expected, "JPEG", quality=90)
            assert (own[9:], stored[own]) == (".jpg", expected.getvalue())
        else:
            assert (own[9:], stored[own]) == (name[4:], source.content(i))
        assert stored[f"{i:09d}.cls"] == b"%d" % source.labels[i]
    assert len(stored) == 2 * 37
    lines = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert [(line["id"], line["image"]) for line in lines] == [(0, "a/00.png"), (30, "b/21.jpg"), (31, "b/23.bmp")]
    assert lines[0]["reason"].startswith("not_an_image")
    assert "37 images in" in said[-2]
    assert "3 images could not be read" in said[-1]


def test_shards_are_full_and_the_index_says_what_is_in_them(tmp_path, photos):
    go(photos, tmp_path / "out")
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["images"] == 37
    assert index["class_names"] == ["a", "b"]
    sizes = [entry["bytes"] for entry in index["shards"]]
    assert max(sizes) <= SHARD
    assert min(sizes[:-1]) > SHARD - 8000  # the next picture would not have fitted
    source = open_source(tmp_path / "out")
    assert source.blocks == tuple(entry["images"] for entry in index["shards"])
    assert [source.labels[: source.blocks[0]].min(), source.labels[: source.blocks[0]].max()] == [0, 1]  # shuffled
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as opened:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in opened} == {(0, 0, 0, "", "", 0o644)}


def test_larger_pictures_are_made_smaller_and_smaller_ones_stay(tmp_path):
    (tmp_path / "p").mkdir()
    for name, width, height in (("wide", 90, 30), ("tall", 31, 93), ("small", 20, 10), ("even", 20, 60)):
        picture(1, width, height).save(tmp_path / f"p/{name}.png")
    go(tmp_path / "p", tmp_path / "out", size=20, quality=95)
    source = open_source(tmp_path / "out")
    shapes = {source.describe(i): source.read(i).shape[:2] for i in range(4)}
    assert shapes == {"wide.png": (20, 60), "tall.png": (60, 20), "small.png": (10, 20), "even.png": (60, 20)}
    stored = {source.describe(i): source.content(i) for i in range(4)}
    assert stored["even.png"] == (tmp_path / "p/even.png").read_bytes()
    expected = io.BytesIO()
    picture(1, 90, 30).resize((60, 20), Image.Resampling.BICUBIC).save(expected, "JPEG", quality=95)
    assert stored["wide.png"] == expected.getvalue()
    assert source.labels is None
    assert not any(name.endswith(".cls") for name in members(tmp_path / "out"))


def test_orientation_is_applied_once(tmp_path):
    (tmp_path / "p").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(1, 60, 30).save(tmp_path / "p/x.jpg", exif=exif)
    upright = open_source(tmp_path / "p").read(0)
    assert upright.shape == (60, 30, 3)
    go(tmp_path / "p", tmp_path / "copied")
    go(tmp_path / "p", tmp_path / "reduced", size=15)
    np.testing.assert_array_equal(open_source(tmp_path / "copied").read(0), upright)
    assert open_source(tmp_path / "reduced").read(0).shape == (30, 15, 3)


def test_images_without_files_are_stored_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 9, 8, 3), dtype=np.uint8)
    go(array_source(pixels, np.arange(30) % 3, class_names="xyz"), tmp_path / "out")
    source = open_source(tmp_path / "out")
    for i in range(30):
        original = int(source.describe(i).partition("#")[2])
        np.testing.assert_array_equal(source.read(i), pixels[original])
        assert source.class_names[source.labels[i]] == "xyz"[original % 3]


def test_the_command(tmp_path, photos, capsys):
    command = ["pack", str(photos), str(tmp_path / "out"), "--size", "20", "--shard-size", "1", "--quality", "80"]
    assert cli.main(command) == 0
    assert "37 images in" in capsys.readouterr().out
    go(photos, tmp_path / "same", size=20, quality=80)
    assert files(tmp_path / "out") == files(tmp_path / "same")
    assert cli.main(command) == 0
    assert "is done already" in capsys.readouterr().out
    assert cli.main([*command, "--quality", "81"]) == 2


def test_shards_can_be_packed_again(tmp_path, photos):
    go(photos, tmp_path / "one")
    go(tmp_path / "one", tmp_path / "two", shard_size=2)
    one, two = open_source(tmp_path / "one"), open_source(tmp_path / "two")
    assert len(two.blocks) < len(one.blocks)
    assert sorted(one.content(i) for i in range(37)) == sorted(two.content(i) for i in range(37))
    assert sorted(one.describe(i) for i in range(37)) == sorted(two.describe(i) for i in range(37))
    assert two.class_names == ("a", "b")


# ---- interruptions -----------------------------------------------------------------------------------------


class Die:
    """Calls `act` at the n-th of all events: syncs, renames, removals, before and behind them, and images read."""

    def __init__(self, monkeypatch, at=-1, act=None):
        self.count, self.at, self.act = 0, at, act
        for target, name in (
            (os, "fsync"),
            (module.Path, "replace"),
            (module.shutil, "rmtree"),
            (module._Shard, "add"),
            (module, "_finish"),
        ):
            monkeypatch.setattr(target, name, self.around(getattr(target, name)))

    def around(self, function):
        def counted(*arguments, **keywords):
            self.event()
            result = function(*arguments, **keywords)
            self.event()
            return result

        return counted

    def event(self):
        if self.count == self.at:
            self.act()
        self.count += 1


def in_a_child(action):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@alone
def test_killed_at_many_points(tmp_path, photos, monkeypatch):
    """SIGKILL at 8 random events, each gone on with; the last two killed again and again."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # matters to a power cut only
    with monkeypatch.context() as patch:
        events = Die(patch)
        go(photos, tmp_path / "reference")
    reference, survivors = files(tmp_path / "reference"), 0
    for number, point in enumerate(random.Random(0).sample(range(events.count), 8)):
        out = tmp_path / str(number)

        def killed(out=out, point=point):
            Die(pytest.MonkeyPatch(), point, kill)
            go(photos, out)

        for _ in range(1 if number < 6 else 3):
            assert in_a_child(killed) in (signal.SIGKILL, 0)  # a later go has fewer events
        survivors += len(list((out / ".pack").glob("[0-9]*.json")))
        if not (out / "index.json").exists():
            for data in (out, f"{out}/*.tar"):
                with pytest.raises(InputError, match=r"run the same nnclr pack again|no images found|no file is named"):
                    open_source(data)
        go(photos, out)
        assert files(out) == reference, f"killed at event {point} of {events.count}"
    assert survivors > 8  # the control: the kills fell where something was there to go on with


def test_stopped_and_gone_on_with(tmp_path, photos, monkeypatch):
    go(photos, tmp_path / "reference")
    with monkeypatch.context() as patch:
        Die(patch, 60, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped, match="stopped by SIGINT: finished shards are kept, the same command") as raised:
            go(photos, tmp_path / "out")
    assert raised.value.exit_code == 80
    records = sorted((tmp_path / "out/.pack").glob("[0-9]*.json"))
    assert 0 < len(records) < len(list((tmp_path / "reference").glob("*.tar")))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    with pytest.raises(InputError, match=r"unfinished shards of something else .other size.; finish them"):
        go(photos, tmp_path / "out", size=9)
    damaged = tmp_path / "out/shard-000001.tar"
    os.truncate(damaged, 1000)
    said = go(photos, tmp_path / "out")
    assert "40 images are there from before" in said[0]
    assert files(tmp_path / "out") == files(tmp_path / "reference")
    assert (tmp_path / "out/shard-000000.tar").stat().st_mtime_ns == before[tmp_path / "out/shard-000000.tar"]


def test_a_finished_folder_is_left_as_it_is(tmp_path, photos):
    go(photos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert go(photos, tmp_path / "out") == [
        f"{tmp_path}/out is done already: it holds these images, packed in this way"
    ]
    for settings, words in (
        ({"size": 9}, "other size"),
        ({"shard_size": 2}, "other shard size"),
        ({"quality": 5}, "qual"),
    ):
        with pytest.raises(InputError, match=words):
            go(photos, tmp_path / "out", **settings)
    picture(99).save(photos / "a/99.png")
    with pytest.raises(InputError, match="other data fingerprint, data revision"):
        go(photos, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (photos / "a/99.png").unlink()
    os.truncate(tmp_path / "out/shard-000000.tar", 100)
    with pytest.raises(InputError, match=r"shard-000000.tar is missing or cut"):
        go(photos, tmp_path / "out")


def test_what_is_in_the_way_is_kept(tmp_path, photos):
    before = files(photos)
    with pytest.raises(InputError, match="lies in the images of"):
        go(photos, photos)
    assert files(photos) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; name a folder"):
        go(photos, tmp_path / "file")
    (tmp_path / "busy/.pack").mkdir(parents=True)
    with lock(tmp_path / "busy/.pack"), pytest.raises(FolderInUseError):
        go(photos, tmp_path / "busy")


def test_a_folder_of_another_with_this_name_is_kept(tmp_path, photos):
    for number, name in enumerate((".pack/notes.json", "mine.txt", ".pack/facts.json")):
        out = tmp_path / str(number)
        (out / ".pack").mkdir(parents=True)
        (out / name).write_text("{}")
        (out / ".tmp-mine").write_text("x")
        before = files(out)
        with pytest.raises(InputError, match="is not empty and holds no shards"):
            go(photos, out)
        assert files(out) == before
    (tmp_path / "own/.pack").mkdir(parents=True)  # the control: killed before anything was written, or while it was
    for name in (".lock", "000000.json", "facts.json", ".tmp-facts.json-17"):
        (tmp_path / "own/.pack" / name).write_text("")
    go(photos, tmp_path / "own")
    assert len(open_source(tmp_path / "own")) == 37


def test_the_same_data_by_another_path(tmp_path, photos, monkeypatch):
    go(photos, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert "is done already" in go("photos", tmp_path / "out")[0]
    with monkeypatch.context() as patch:
        Die(patch, 60, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped):
            go(photos, tmp_path / "half")
    assert "are there from before" in go("photos", tmp_path / "half")[0]


def test_a_child_that_fails_is_told_from_one_that_ends():
    assert in_a_child(lambda: None) == 0
    assert in_a_child(lambda: 1 // 0) != 0


@pytest.mark.parametrize("settings", [{"size": 0}, {"shard_size": 0}, {"quality": 101}])
def test_settings_that_cannot_be(tmp_path, photos, settings):
    with pytest.raises(InputError, match="is not between 1 and"):
        go(photos, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_data_that_is_gone(tmp_path):
    """All unreadable: nothing is left behind. Gone in the middle: what is finished stays."""
    gone = [False]

    def fetch(i):
        if gone[0]:
            raise BadImage("unreadable", "Input/output error")
        return np.full((30, 30, 3), i % 256, np.uint8)

    source = Source("s", 400, fetch, lambda i: f"s#{i}", "f" * 64)
    gone[0] = True
    with pytest.raises(InputError, match=r"none of the 60 images of s can be read; the first is s#\d+ .unreadable"):
        go(source.subset(np.arange(60)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    gone[0] = False
    real = module._Shard.add

    def add(self, *arguments):
        real(self, *arguments)
        gone[0] = len(os.listdir(self.path.parent)) > 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Shard, "add", add)
        with pytest.raises(DataError, match=r"101 images of s for one shard cannot be read, and \d+ can"):
            go(source, tmp_path / "out")
    gone[0] = False
    go(source, tmp_path / "out")
    go(source, tmp_path / "reference")
    assert files(tmp_path / "out") == files(tmp_path / "reference")


def test_a_full_disk(tmp_path, photos, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module._Shard, "finish", full)
        with pytest.raises(StorageError, match="No space left on device; finished shards are kept"):
            go(photos, tmp_path / "out")
    go(photos, tmp_path / "out")
    assert len(open_source(tmp_path / "out")) == 37
