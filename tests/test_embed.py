"""Embedding into a file: killed anywhere and gone on with, it is the file of one uninterrupted go."""

import json
import os
import random
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nnclr import embed, embeddings, progress
from nnclr.checkpoint import lock
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.embed import embed_to_file
from nnclr.embeddings import open_embeddings
from nnclr.encoder import Encoder
from nnclr.errors import DataError, FolderInUseError, InputError, NonFiniteError, Stopped, StorageError
from nnclr.pretrained import open_encoder
from tests.alone import alone

BATCH = 7


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "_PART_ROWS", 14)


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("random:small-convnet?size=16")


@pytest.fixture
def photos(tmp_path):
    """60 pictures of two classes, three of which are none."""
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    whole = (tmp_path / "photos/b/21.png").read_bytes()
    (tmp_path / "photos/a/00.png").write_bytes(b"no picture")
    (tmp_path / "photos/b/21.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/b/23.png").write_bytes(b"")
    return tmp_path / "photos"


def go(encoder, data, out, **settings):
    said = []
    embed_to_file(encoder, data, out, **{"batch_size": BATCH, "say": said.append, **settings})
    return said


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_those_of_the_encoder(tmp_path, encoder, photos, name, dtype):
    said = go(encoder, photos, tmp_path / name, dtype=dtype)
    read = open_embeddings(tmp_path / name, verify=True)
    expected = encoder.embed(photos, batch_size=BATCH)
    good = np.flatnonzero(np.isfinite(expected).all(axis=1))
    assert (len(good), read.ids.tolist()) == (57, good.tolist())
    assert np.array_equal(read.vectors, expected[good].astype(dtype))
    assert read.names[0] == "a/02.png"
    assert [read.label_name(i) for i in range(57)] == [path[0] for path in read.names]
    listed = (tmp_path / f"{name}.skipped.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in listed[1:]] == [["0", "a/00.png"], ["40", "b/21.png"], ["41", "b/23.png"]]
    assert "not_an_image" in listed[1]
    assert "truncated" in listed[2]
    assert any("3 images could not be read" in line and "a/00.png (not_an_image" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_list_of_what_was_skipped_belongs_to_one_file(tmp_path, encoder, photos):
    """Of other images in a file of the same name but for its ending: neither list takes the other's place."""
    go(encoder, photos, tmp_path / "e.parquet")
    listed = (tmp_path / "e.parquet.skipped.csv").read_bytes()
    for bad in ("a/00.png", "b/21.png", "b/23.png"):
        (photos / bad).unlink()
    go(encoder, photos, tmp_path / "e.npy")
    assert (tmp_path / "e.parquet.skipped.csv").read_bytes() == listed
    assert not (tmp_path / "e.npy.skipped.csv").exists()


def test_facts_open_encoder_and_data_again(tmp_path, encoder, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder.save_pretrained(tmp_path / "saved")
    saved = open_encoder("saved")
    go(saved, "photos", "e.parquet")
    go(saved, ["photos/a", "photos/b"], "two.parquet")
    monkeypatch.chdir("/")
    facts = open_embeddings(tmp_path / "e.parquet").facts
    again = open_encoder(facts["encoder"])
    assert again.fingerprint == facts["encoder_fingerprint"] == encoder.fingerprint
    assert again.preprocessing == facts["preprocessing"]
    source = embed.open_source(facts["data"])
    assert (source.fingerprint, len(source), facts["data_name"]) == (facts["data_fingerprint"], 60, "photos")
    assert facts["dtype"] == "float32"
    assert facts["versions"]["torch"] == torch.__version__
    two = open_embeddings(tmp_path / "two.parquet").facts
    assert embed.open_source(two["data"]).fingerprint == two["data_fingerprint"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:local-dir:here", "timm:local-dir:{}/here"),
        ("timm:resnet18", "timm:resnet18"),
        ("torchvision:resnet18?weights=here/w.pth", "torchvision:resnet18?weights={}/here/w.pth"),
        ("checkpoint:here/w.pth?backbone=resnet18&size=64", "checkpoint:{}/here/w.pth?backbone=resnet18&size=64"),
        ("here/p.parquet?split=train", "{}/here/p.parquet?split=train"),
        ("torchvision:cifar10?split=test", "torchvision:cifar10?split=test"),
        ("nowhere", "nowhere"),
    ],
)
def test_names_become_absolute(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("w.pth", "p.parquet"):
        (tmp_path / "here" / name).touch()
    assert embed._absolute(text) == expected.format(tmp_path)


class Die:
    """Calls `act` at the n-th of all events: reads of features, syncs, renames, removals, before and behind them."""

    def __init__(self, monkeypatch, at=-1, act=None):
        self.count, self.at, self.act = 0, at, act
        for target, name in (
            (Encoder, "features"),
            (os, "fsync"),
            (embed.Path, "replace"),
            (embed.shutil, "rmtree"),
            (embed, "_assemble"),
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
    """Run an action in a fork of this process; how the child ended."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("name", "kills"), [("e.parquet", 20), ("e.npy", 10)])
@alone
def test_killed_at_many_points(tmp_path, encoder, photos, name, kills, monkeypatch):
    """SIGKILL at random events in fresh processes, each gone on with; the last ones killed again and again."""
    with monkeypatch.context() as patch:
        events = Die(patch)
        (tmp_path / "reference").mkdir()
        go(encoder, photos, tmp_path / "reference" / name)
    reference = files(tmp_path / "reference")
    points = random.Random(0).sample(range(events.count), kills)
    survivors = 0
    for number, point in enumerate(points):
        out = tmp_path / str(number)
        out.mkdir()

        def killed(out=out, point=point):
            Die(pytest.MonkeyPatch(), point, kill)
            go(encoder, photos, out / name)

        for _ in range(1 if number < kills - 2 else 4):
            assert in_a_child(killed) in (signal.SIGKILL, 0)  # a later go has fewer events
        parts = out / f".{name}.parts"
        survivors += len(list(parts.glob("[0-9]*.json")))
        if (out / name).exists():
            open_embeddings(out / name, verify=True)
        go(encoder, photos, out / name)
        assert files(out) == reference, f"killed at event {point} of {events.count}"
        assert not parts.exists()
    assert survivors > kills  # the control: the kills fell where something was there to go on with


def interrupted(encoder, photos, out, monkeypatch, parts=3):
    """Stopped by Ctrl-C behind some parts."""
    batches = 2 * parts

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        seen = []
        real = Encoder.features

        def features(self, views):
            seen.append(1)
            if len(seen) == batches + 1:
                interrupt()
            return real(self, views)

        patch.setattr(Encoder, "features", features)
        with pytest.raises(Stopped, match="stopped by SIGINT: finished parts are kept, the same command") as raised:
            go(encoder, photos, out)
    assert raised.value.exit_code == 80
    folder = out.with_name(f".{out.name}.parts")
    assert len(list(folder.glob("[0-9]*.json"))) == parts
    return folder


def test_stopped_and_gone_on_with(tmp_path, encoder, photos, monkeypatch):
    go(encoder, photos, tmp_path / "reference.parquet")
    interrupted(encoder, photos, tmp_path / "e.parquet", monkeypatch)
    assert not (tmp_path / "e.parquet").exists()
    events = Die(monkeypatch)
    said = go(encoder, photos, tmp_path / "e.parquet")
    assert said[0] == f"embedding {photos}: 42 of 60 images are there from before"
    assert events.count > 0
    assert (tmp_path / "e.parquet").read_bytes() == (tmp_path / "reference.parquet").read_bytes()


@pytest.mark.parametrize("damage", ["vectors", "cut", "hash", "skipped", "not json", "swapped", "renamed", "gone"])
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control"])
def test_a_damaged_part_is_computed_anew(tmp_path, encoder, photos, monkeypatch, damage, guarded):
    """The control leaves the hash out: then the damage reaches the file, or ends the work in an error."""
    go(encoder, photos, tmp_path / "reference.npy")
    if not guarded:
        monkeypatch.setattr(embed, "_digest", lambda *_: "always right")
    folder = interrupted(encoder, photos, tmp_path / "e.npy", monkeypatch)
    first, second = sorted(folder.glob("*.bin"))[:2]
    record = json.loads(first.with_suffix(".json").read_text())
    assert (record["first"], record["last"], record["skipped"][0][0]) == (0, 13, 0)
    if damage == "vectors":
        content = bytearray(first.read_bytes())
        content[101] ^= 4
        first.write_bytes(content)
    elif damage == "cut":
        first.write_bytes(first.read_bytes()[:-512])
    elif damage == "skipped":
        record["skipped"][0][0] = 1
    elif damage == "hash":
        record["sha256"] = "0" * 64
    elif damage == "swapped":
        content = first.read_bytes(), second.read_bytes()
        first.write_bytes(content[1]), second.write_bytes(content[0])
    elif damage == "gone":
        first.unlink()
    elif damage == "renamed":  # a whole part under another's name
        second, third = sorted(folder.glob("*.bin"))[1:3]
        second.write_bytes(third.read_bytes())
        second.with_suffix(".json").write_bytes(third.with_suffix(".json").read_bytes())
    text = "{" if damage == "not json" else json.dumps(record)
    first.with_suffix(".json").write_text(text)
    try:
        go(encoder, photos, tmp_path / "e.npy")
        same = all(
            (tmp_path / f"e{end}").read_bytes() == (tmp_path / f"reference{end}").read_bytes()
            for end in (".npy", ".ids.csv", ".json", ".npy.skipped.csv")
        )
    except ValueError:
        same = False
    assert same == (guarded or damage in ("hash", "not json", "gone"))


def test_a_part_damaged_between_writing_and_reading(tmp_path, encoder, photos, monkeypatch):
    real = embed._assemble

    def damaged(parts, *rest):
        next(iter(parts.folder.glob("*.bin"))).write_bytes(b"")
        return real(parts, *rest)

    monkeypatch.setattr(embed, "_assemble", damaged)
    with pytest.raises(StorageError, match="was damaged after it was written; run the same command again"):
        go(encoder, photos, tmp_path / "e.npy")
    monkeypatch.setattr(embed, "_assemble", real)
    go(encoder, photos, tmp_path / "e.npy")
    open_embeddings(tmp_path / "e.npy", verify=True)


def test_parts_of_something_else_are_refused(tmp_path, encoder, photos, monkeypatch):
    out = tmp_path / "e.parquet"
    folder = interrupted(encoder, photos, out, monkeypatch)
    before = files(folder)
    other = open_encoder("random:small-convnet?size=16&seed=1")
    cropped = Encoder(encoder.module, 16, provenance=encoder.provenance, crop_pct=0.9)
    for wrong, settings, named in (
        (other, {}, "encoder fingerprint"),
        (cropped, {}, "preprocessing"),
        (encoder, {"dtype": "float16"}, "dtype"),
        (encoder, {"batch_size": 8}, "batch size"),
    ):
        with pytest.raises(InputError, match=rf"holds unfinished parts of something else \(other {named}\); finish"):
            go(wrong, photos, out, **settings)
    (photos / "a/new.png").write_bytes((photos / "a/02.png").read_bytes())
    with pytest.raises(InputError, match="other data fingerprint, data revision"):
        go(encoder, photos, out)
    os.unlink(photos / "a/new.png")
    assert {name: content for name, content in files(folder).items() if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }
    go(encoder, photos, out)


def test_parts_of_another_key_do_not_count(tmp_path, encoder, photos, monkeypatch):
    """Not even with the facts of the folder lost."""
    folder = interrupted(encoder, photos, tmp_path / "e.npy", monkeypatch)
    (folder / "facts.json").write_text("{")
    other = open_encoder("random:small-convnet?size=16&seed=1")
    said = go(other, photos, tmp_path / "e.npy")
    assert not any("from before" in line for line in said)
    go(other, photos, tmp_path / "reference.npy")
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "reference.npy").read_bytes()


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_a_finished_file_is_never_overwritten(tmp_path, encoder, photos, name):
    go(encoder, photos, tmp_path / name)
    before = files(tmp_path)
    said = go(encoder, photos, tmp_path / name)
    assert ["is done already" in line for line in said] == [True]
    other = open_encoder("random:small-convnet?size=16&seed=1")
    for wrong, data in ((other, photos), (encoder, photos / "a")):
        with pytest.raises(InputError, match=r"exists and is not what is asked for \(other .*choose another --out"):
            go(wrong, data, tmp_path / name)
    assert files(tmp_path) == before
    (tmp_path / name).write_bytes(b"something of the user's")
    with pytest.raises(InputError, match=r"is no file of embeddings|is not a readable"):
        go(encoder, photos, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"something of the user's"
    assert not (tmp_path / f".{name}.parts").exists()


@pytest.mark.parametrize("theirs", ["e.json", "e.ids.csv"])
def test_files_beside_the_npy_are_not_overwritten_either(tmp_path, encoder, photos, theirs):
    (tmp_path / theirs).write_text("{}")
    with pytest.raises(InputError, match=f"{theirs} exists, and would be written with e.npy"):
        go(encoder, photos, tmp_path / "e.npy")
    assert (tmp_path / theirs).read_text() == "{}"


def test_two_processes_on_one_file(tmp_path, encoder, photos):
    (tmp_path / ".e.npy.parts").mkdir()
    with lock(tmp_path / ".e.npy.parts"), pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()}"):
        go(encoder, photos, tmp_path / "e.npy")
    go(encoder, photos, tmp_path / "e.npy")


def test_no_readable_image_at_all(tmp_path, encoder):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        (tmp_path / f"photos/{i:02d}.jpg").write_bytes(b"x" * i)
    with pytest.raises(InputError, match=r"none of the 20 images of .* can be read: 00\.jpg \(not_an_image"):
        go(encoder, tmp_path / "photos", tmp_path / "e.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_folder_that_is_gone_is_not_taken_for_bad_images(tmp_path, encoder, monkeypatch):
    """Its images are not written off: nothing is kept of them, and the command finishes when they are back."""
    there = [True]

    def fetch(i):
        if not there[0] and i >= 40:
            raise BadImage("unreadable", "no such file")
        return np.full((16, 16, 3), i % 251, np.uint8)

    source = Source("photos", 300, fetch, str, "0" * 64)
    monkeypatch.setattr(embed, "_PART_ROWS", 2048)
    there[0] = False
    with pytest.raises(DataError, match="260 of 300 images of photos in a row cannot be read; the first is 40 "):
        go(encoder, source, tmp_path / "e.npy")
    assert not (tmp_path / "e.npy").exists()
    there[0] = True
    go(encoder, source, tmp_path / "e.npy")
    assert len(open_embeddings(tmp_path / "e.npy")) == 300
    assert DataError.exit_code == 81


def test_a_part_without_any_readable_image(tmp_path, encoder, photos):
    for path in sorted((photos / "a").iterdir())[:20]:
        path.write_bytes(b"")
    for name in ("e.parquet", "e.npy"):
        go(encoder, photos, tmp_path / name)
        read = open_embeddings(tmp_path / name, verify=True)
        assert (len(read), read.ids[0], read.names[0]) == (38, 20, "a/40.png")


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return images.flatten(1)[:, :8] * self.factor


def test_what_does_not_fit_float16_is_refused(tmp_path):
    images = np.full((20, 8, 8, 3), 100, np.uint8)
    images[13] = 200
    plain = {"image_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    for factor, fits in ((327.59, True), (328, False)):  # 200 times that is 65518 and 65600
        embedder = Encoder(Scaled(factor), **plain)
        if fits:
            go(embedder, images, tmp_path / "e.npy", dtype="float16")
            assert open_embeddings(tmp_path / "e.npy").vectors.max() == 65504
        else:
            with pytest.raises(InputError, match=r"holds 65600 and float16 ends at 65504; use float32"):
                go(embedder, images, tmp_path / "f.npy", dtype="float16")
            go(embedder, images, tmp_path / "f.npy")  # nothing is left that stands in the way
    assert not list(tmp_path.glob(".*"))


def test_an_encoder_that_gives_nan_is_a_failure(tmp_path):
    images = np.full((20, 8, 8, 3), 100, np.uint8)
    with pytest.raises(NonFiniteError, match="not finite for array#0"):
        go(Encoder(Scaled(float("nan")), 8), images, tmp_path / "e.npy")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path, encoder, photos):
    for arguments, message in (
        ({"out": "e.csv"}, "must end in .parquet or .npy"),
        ({"out": "no/e.npy"}, "a folder that exists"),
        ({"dtype": "int8"}, "neither float32 nor float16"),
        ({"batch_size": 0}, "below 1"),
    ):
        with pytest.raises(InputError, match=message):
            go(encoder, photos, tmp_path / arguments.pop("out", "e.npy"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_full_disk(tmp_path, encoder, photos, monkeypatch):
    """Whatever write fails, the parts before it stay, and the same call goes on."""
    go(encoder, photos, tmp_path / "reference.npy")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) in (4, 13, 16):  # inside the parts, the list of what was skipped, and the file itself
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        with pytest.raises(StorageError, match="No space left on device"):
            go(encoder, photos, tmp_path / "e.npy")
        assert not (tmp_path / "e.npy").exists()
    go(encoder, photos, tmp_path / "e.npy")
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "reference.npy").read_bytes()


def test_progress_names_rate_and_time_left(tmp_path, encoder, photos, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    said = go(encoder, photos, tmp_path / "e.parquet")
    assert sum("of 60 images" in line and "img/s" in line and line.endswith("left") for line in said) == 8


class Wide(nn.Module):
    def forward(self, images):
        return images.flatten(1).repeat(1, 64)


@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
def test_memory_is_that_of_a_part(tmp_path, name, monkeypatch):
    """2500 rows of 12 KiB, 29 MiB in all."""
    monkeypatch.setattr(embed, "_PART_ROWS", 128)

    def fetch(i):
        return np.full((4, 4, 3), i % 256, np.uint8)

    source = Source("many", 2500, fetch, str, "f" * 64)
    wide = Encoder(Wide(), 4)
    tracemalloc.start()
    try:
        go(wide, source, tmp_path / name, batch_size=64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        whole = wide.embed(source)  # the control
        assert tracemalloc.get_traced_memory()[1] > 29 * 2**20
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20
    assert np.array_equal(open_embeddings(tmp_path / name).vectors, whole)


def test_parts_do_not_need_each_other(tmp_path, encoder, photos, monkeypatch):
    """Computed in any order, by any process, they are the same: what several ranks will share."""
    source = embed.open_source(photos)
    ranges = embed._ranges(len(source), BATCH)
    assert [row for rows in ranges for row in rows] == list(range(60))
    whole = {}
    for order in (ranges, ranges[::-1]):
        folder = tmp_path / f"{order[0].start}"
        folder.mkdir()
        parts = embed._Parts(folder, "key", encoder.module(torch.zeros(1, 3, 16, 16)).shape[1], np.dtype("float32"))
        embedder = embed._Embedder(encoder, source, BATCH, 1, "float32")
        embed._compute_missing(parts, order, embedder, lambda text: None, embed.StopRequest())
        whole[order[0].start] = files(folder)
    assert whole[0] == whole[ranges[-1].start]
    assert embeddings.FORMAT == 1
