import gzip
import hashlib
import os
import shutil
import struct
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nnclr.data import named
from nnclr.data.decode import BadImage
from nnclr.data.images import printable
from nnclr.data.source import open_source, refuse_inside, test_split
from nnclr.errors import InputError
from nnclr.evaluation.task import no_labels
from tests.data.test_decode import encoded


def picture(value=0, size=8):
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value).save(path, "PNG")


# ---- folders -----------------------------------------------------------------------------------------------


def test_order_is_that_of_names_and_images_are_read(tmp_path):
    for i, name in enumerate(["b/2.png", "a/9.png", "b/10.PNG", "a/sub/deep/x.png"]):
        write(tmp_path / name, i)
    source = open_source(tmp_path)
    assert [source.describe(i) for i in range(4)] == ["a/9.png", "a/sub/deep/x.png", "b/10.PNG", "b/2.png"]
    assert [int(source.read(i)[0, 0, 0]) for i in range(4)] == [1, 3, 2, 0]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.class_names == ("a", "b")


def test_labels_are_all_or_none(tmp_path):
    write(tmp_path / "a/1.png")
    write(tmp_path / "b/2.png")
    assert open_source(tmp_path).class_names == ("a", "b")
    write(tmp_path / "3.png")
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.class_names is None


def test_lists_of_folders(tmp_path):
    write(tmp_path / "one/1.png", 1)
    write(tmp_path / "two/1.png", 2)
    source = open_source([tmp_path / "one", tmp_path / "two"])
    assert len(source) == 2
    assert source.describe(0) != source.describe(1)
    assert [int(source.read(i)[0, 0, 0]) for i in range(2)] == [1, 2]


def test_what_is_no_image_is_left_out_and_named(tmp_path):
    with pytest.raises(InputError, match=r"no images found in .*: it is empty"):
        open_source(tmp_path)
    for name in ("a.heic", "b.HEIC", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"it holds 2 \.heic, 1 \.txt; accepted are .*\.png"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "missing")
    with pytest.raises(InputError, match="is a file"):
        open_source(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match=r"1 x not a regular file \(pipe\.jpg\); accepted"):
        open_source(tmp_path)
    write(tmp_path / "good.png")
    source = open_source(tmp_path)
    assert len(source) == 1
    # Of the rest pictures alone are named: beside images they would be missed without a word.
    heic = "unread .heic file"
    assert source.skipped == {"not a regular file": 1, heic: 2}
    assert source.skipped_first == {"not a regular file": ("pipe.jpg",), heic: ("a.heic", "b.HEIC")}
    twice = open_source([tmp_path, tmp_path]).skipped_first
    assert twice == {
        "not a regular file": ("0/pipe.jpg", "1/pipe.jpg"),
        heic: ("0/a.heic", "0/b.HEIC", "1/a.heic"),
    }


def test_links(tmp_path):
    """Loops end, links inside are followed, links out of the folder and dangling ones are not."""
    root = tmp_path / "root"
    write(root / "a/1.png")
    write(tmp_path / "outside/secret.png")
    (root / "a/loop").symlink_to(root)
    (root / "b").symlink_to(root / "a")
    (root / "loop2").symlink_to(root / "a")
    (root / "out").symlink_to(tmp_path / "outside")
    (root / "secret.png").symlink_to(tmp_path / "outside/secret.png")
    (root / "gone.png").symlink_to(root / "missing.png")
    (root / "alias.png").symlink_to(root / "a/1.png")
    source = open_source(root)
    assert [source.describe(i) for i in range(len(source))] == ["a/1.png", "alias.png"] or len(source) == 2
    assert source.skipped == {"link out of the folder": 2, "dangling link": 1}
    assert source.skipped_first == {
        "link out of the folder": ("out", "secret.png"),
        "dangling link": ("gone.png",),
    }


def test_odd_names(tmp_path):
    names = [b"new\nline.png", b"\xff\xfe.png", "日本.png".encode(), b"-rf.png", b"=cmd().png", b"x" * 251 + b".png"]
    names += [b"\x1b[31mred.png", b"<img onerror=1>.png"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(encoded(picture(9)))
    source = open_source(tmp_path)
    assert len(source) == len(names)
    for i in range(len(source)):
        assert source.read(i)[0, 0, 0] == 9
        assert source.describe(i).isprintable()
        source.describe(i).encode("utf-8")
    assert printable(b"a\nb\xff") == r"a\nb\xff"


def test_fingerprint_follows_the_images_and_not_the_place(tmp_path):
    write(tmp_path / "x/1.png")
    write(tmp_path / "x/2.png")
    first = open_source(tmp_path / "x").fingerprint
    (tmp_path / "x").rename(tmp_path / "y")
    assert open_source(tmp_path / "y").fingerprint == first
    write(tmp_path / "y/3.png")
    more = open_source(tmp_path / "y").fingerprint
    assert more != first
    picture(7, 9).save(tmp_path / "y/3.png")
    assert open_source(tmp_path / "y").fingerprint not in (first, more)


def test_a_file_that_vanishes_is_a_bad_image(tmp_path):
    write(tmp_path / "1.png")
    source = open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(BadImage, match="unreadable"):
        source.read(0)


def test_subset_keeps_images_labels_and_classes(tmp_path):
    for i in range(6):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    source = open_source(tmp_path)
    part = source.subset(np.array([4, 1]))
    assert [int(part.read(i)[0, 0, 0]) for i in range(2)] == [int(source.read(i)[0, 0, 0]) for i in (4, 1)]
    assert part.labels.tolist() == source.labels[[4, 1]].tolist()
    assert part.class_names == source.class_names
    assert part.fingerprint != source.subset(np.array([1, 4])).fingerprint


# ---- arrays ------------------------------------------------------------------------------------------------


def test_arrays_of_every_shape():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    for data in (images, torch.from_numpy(images), torch.from_numpy(images).permute(0, 3, 1, 2)):
        np.testing.assert_array_equal(open_source(data).read(2), images[2])
    for gray in (images[..., 0], images[..., :1]):
        np.testing.assert_array_equal(open_source(gray).read(2), np.repeat(images[2, :, :, :1], 3, 2))
    source = open_source((images, [2, 0, 1, 1, 0]))
    assert source.labels.tolist() == [2, 0, 1, 1, 0]
    assert source.class_names == ("0", "1", "2")
    assert open_source(source) is source
    assert source.fingerprint != open_source(images).fingerprint


def test_numbers_that_are_no_class_indices_are_numbered_anew():
    """Numbers of products would make more classes than there are images; few unused numbers cost nothing."""
    images = np.zeros((4, 2, 2, 3), np.uint8)
    source = open_source((images, np.array([900_000, 3, 3, 1200], np.uint32)))
    assert (source.labels.tolist(), source.labels.dtype) == ([2, 0, 0, 1], np.int64)
    assert source.class_names == ("3", "1200", "900000")
    source = open_source((images, [999, 3, 3, 5]))
    assert source.labels.tolist() == [999, 3, 3, 5]
    assert len(source.class_names) == 1000
    digest = hashlib.sha256(b"(4, 2, 2, 3)" + images.tobytes() + np.array([900_000, 3, 3, 1200]).tobytes())
    assert open_source((images, [900_000, 3, 3, 1200])).fingerprint == digest.hexdigest()  # over what was given
    many = open_source((np.zeros((1201, 1, 1, 3), np.uint8), np.arange(1201)[::-1]))  # as many classes as images
    assert many.labels.tolist() == list(range(1201))[::-1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((3, 8, 8), np.float32), "must be uint8"),
        (np.zeros((3, 8), np.uint8), r"shape \(3, 8\)"),
        (np.zeros((0, 8, 8), np.uint8), r"shape \(0, 8, 8\)"),
        ((np.zeros((3, 8, 8), np.uint8), [0, 1]), "3 whole numbers"),
        ((np.zeros((3, 8, 8), np.uint8), [0, 1, -1]), "3 whole numbers"),
        ((np.zeros((3, 8, 8), np.uint8), [0.5, 1, 1]), "3 whole numbers"),
        (7, "data of type int is none of: a folder"),
        ([], "data of type list is none of: .*; it is empty or of several kinds"),
        (np.zeros((8, 9, 3), np.uint8), r"an array of shape \(8, 9, 3\) looks like one picture, not a stack"),
        (
            np.zeros((3, 8, 9), np.uint8),
            r"\(3, 8, 9\) may be one picture, colours first, or three grey ones; use array\[",
        ),
        ("shards.tar", "shards.tar does not exist"),
    ],
)
def test_what_cannot_be_data_is_named(data, words):
    with pytest.raises(InputError, match=words):
        open_source(data)


# ---- parquet -----------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    rows = [encoded(picture(i)) for i in range(6)]
    table = pa.table(
        {
            "image": [{"bytes": row, "path": f"p{i}.png"} for i, row in enumerate(rows)],
            "plain": rows,
            "label": [0, 1, 2, 0, 1, 2],
            "kind": ["dog", "cat", "dog", "cat", "dog", "cat"],
            "split": ["train"] * 4 + ["test"] * 2,
            "gap": ["x", None, "x", "x", "x", "x"],
        }
    )
    pq.write_table(table, tmp_path / "pictures.parquet")
    return tmp_path / "pictures.parquet"


def test_parquet(parquet):
    source = open_source(parquet)
    assert [int(source.read(i)[0, 0, 0]) for i in range(6)] == list(range(6))
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.describe(3) == "p3.png"
    named_kind = open_source(f"{parquet}?split=test&label=kind&image=plain")
    assert [int(named_kind.read(i)[0, 0, 0]) for i in range(2)] == [4, 5]
    assert [named_kind.class_names[label] for label in named_kind.labels] == ["dog", "cat"]
    assert named_kind.fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?label=colour", "no column 'colour'; it has image, plain, label"),
        ("?split=val", "no row with split=val"),
        ("?image=kind", "holds string, not image bytes"),
        ("?label=gap", "lacks a label in 1 rows"),
        ("?split", "'split' after the \\?"),
    ],
)
def test_parquet_mistakes_are_named(parquet, query, words):
    with pytest.raises(InputError, match=words):
        open_source(f"{parquet}{query}")


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a readable parquet file"):
        open_source(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "y.parquet")


# ---- names -------------------------------------------------------------------------------------------------


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes())


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A copy of Fashion-MNIST as the Debian package lays it out, with 4 and 2 pictures."""
    monkeypatch.setattr(named, "INSTALLED", tmp_path)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for stem, n in (("train", 4), ("t10k", 2)):
        images = np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 4)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(n, dtype=np.uint8)))
    return folder


def test_an_installed_copy_is_found(installed):
    train, test = open_source("torchvision:fashion-mnist"), open_source("torchvision:fashion-mnist?split=test")
    assert (len(train), len(test)) == (4, 2)
    assert train.read(1)[0].tolist() == [[v] * 3 for v in (12, 13, 14, 15)]
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert test_split("torchvision:fashion-mnist").fingerprint == test.fingerprint
    assert test_split("torchvision:fashion-mnist?split=train") is None
    assert test_split("some/folder") is None


@pytest.mark.parametrize(
    "damage",
    [b"", b"no gzip", gzip.compress(b"\0\0\x08\x03" + bytes(12) + b"too much", mtime=0)],
    ids=["empty", "no gzip", "short"],
)
def test_a_damaged_copy_is_named(installed, damage):
    (installed / "train-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(InputError, match="not a readable IDX file"):
        open_source("torchvision:fashion-mnist")


def test_unknown_names_suggest_near_ones(installed):
    with pytest.raises(InputError, match="'fashionmnist'; did you mean fashion-mnist"):
        open_source("torchvision:fashionmnist")
    with pytest.raises(InputError, match="split='val' is neither train nor test"):
        open_source("torchvision:fashion-mnist?split=val")
    with pytest.raises(InputError, match="'spilt'"):
        open_source("torchvision:fashion-mnist?spilt=test")
    with pytest.raises(InputError, match="a split is train or test"):
        open_source("demo-photos?split=val")


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    from torchvision import datasets

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("NNCLR_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(InputError, match=r"could not be downloaded \(no route to host\); put its files there"):
        open_source("torchvision:cifar10")


def test_nothing_is_written_among_the_images(tmp_path):
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for data, out in (("photos", "photos"), ("photos", "photos/run"), ("photos", "link/a/run"), ("link", "photos/x")):
        with pytest.raises(InputError, match="lies in the images of"):
            refuse_inside(str(tmp_path / data), tmp_path / out)
    with pytest.raises(InputError, match="lies in the images of"):
        refuse_inside([tmp_path / "absent", tmp_path / "photos"], str(tmp_path / "photos/run"))
    for data, out in (("photos", "photos2"), ("photos/a", "photos/run"), ("absent", "absent/run")):
        refuse_inside(str(tmp_path / data), tmp_path / out)
    refuse_inside((np.zeros(1), np.zeros(1)), tmp_path)


@pytest.mark.parametrize(
    ("folders", "said"),
    [("Train/cats val/cats", True), ("train val", False), ("train/a b/a", False), ("train/a", False)],
)
def test_splits_that_are_taken_for_classes_are_told(tmp_path, folders, said):
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    words = "Train, val in .* seem to be splits.* give .*/Train as the data and .*/val as the test set"
    with pytest.warns(UserWarning, match=words) if said else nullcontext():
        source = open_source(tmp_path)
    assert source.class_names == tuple(sorted({folder.split("/")[0] for folder in folders.split()}))


def test_pictures_beside_class_folders_are_named_as_what_takes_the_labels(tmp_path):
    for name in ("cats/1.png", "cats/2.png", "dogs/3.png", "loose one.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.unlabelled == "one of 4 images lies in no class folder (loose one.png)"
    assert "has no labels, and evaluation needs them: one of 4 images" in no_labels(source)
    (tmp_path / "loose one.png").unlink()
    assert (open_source(tmp_path).unlabelled, open_source(tmp_path).labels is None) == ("", False)
    shutil.rmtree(tmp_path / "dogs")
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert open_source(tmp_path).unlabelled == ""  # most are in none: that is how they are kept
