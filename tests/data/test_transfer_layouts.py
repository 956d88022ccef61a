import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from nnclr.data.transfer_sets import TRANSFER_SETS, open_transfer_set
from nnclr.errors import InputError
from tests.data.test_transfer_sets import COUNTS, DRAWN, by_title, parts
from tests.transfer_fixtures import COLOURS, VOC_CLASSES, make_transfer_sets

SINGLE = [key for key in COUNTS if key != "voc2007"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    make_transfer_sets(folder)
    return folder


@pytest.fixture
def copy(root, tmp_path):
    """A function that copies one set to an empty root and gives its folder."""

    def make(key):
        folder = tmp_path / TRANSFER_SETS[key].folders[0]
        shutil.copytree(root / TRANSFER_SETS[key].folders[0], folder)
        return folder

    return make


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- the same labels as torchvision's ----------------------------------------------------------------------


def torchvision_labels(key, root, split):
    """Path below the folder of the set -> label, and the names of the classes, as torchvision reads them."""
    folder = root / TRANSFER_SETS[key].folders[0]
    kinds = {
        "food101": lambda: datasets.Food101(root, split, loader=str),
        "sun397": lambda: datasets.SUN397(root, loader=str),
        "cars": lambda: datasets.StanfordCars(root, split, loader=str),
        "aircraft": lambda: datasets.FGVCAircraft(root, split, loader=str),
        "dtd": lambda: datasets.DTD(root, split, loader=str),
        "flowers102": lambda: datasets.Flowers102(root, split, loader=str),
        "pets": lambda: datasets.OxfordIIITPet(root, "trainval" if split == "train" else split),
    }
    data = kinds[key]()
    pairs = zip(data._images, data._labels, strict=True) if key == "pets" else (data[i] for i in range(len(data)))
    return {str(path).removeprefix(f"{folder}/"): int(label) for path, label in pairs}, data.classes


@pytest.mark.parametrize("key", ["food101", "cars", "aircraft", "dtd", "flowers102", "pets"])
def test_labels_are_those_of_torchvision(root, key, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: True)
    splits = open_transfer_set(key, root)
    if key in DRAWN:
        ours = {"train": by_title(splits.train, splits.val), "test": by_title(splits.test)}
    else:
        ours = {"train": by_title(splits.train), "val": by_title(splits.val), "test": by_title(splits.test)}
    for split, labels in ours.items():
        theirs, classes = torchvision_labels(key, root, split)
        assert labels == theirs
        assert splits.train.class_names == tuple(classes[: len(splits.train.class_names)])


def test_labels_of_sun_are_those_of_torchvision(root):
    """torchvision knows no partition, so it has images that are in none."""
    splits = open_transfer_set("sun397", root)
    ours = by_title(*parts(splits))
    theirs, classes = torchvision_labels("sun397", root, None)
    assert len(theirs) == 51 > len(ours)
    assert ours == {path: theirs[path] for path in ours}
    assert splits.train.class_names == tuple(classes)


def test_labels_of_caltech_are_those_of_torchvision(root):
    """torchvision leaves out the background, which the paper counts."""
    splits = open_transfer_set("caltech101", root)
    data = datasets.Caltech101(root)
    theirs = {
        f"{data.categories[y]}/image_{i:04d}.jpg": data.categories[y] for y, i in zip(data.y, data.index, strict=True)
    }
    ours = {path: splits.train.class_names[label] for path, label in by_title(*parts(splits)).items()}
    assert {path: name for path, name in ours.items() if name != "BACKGROUND_Google"} == theirs


def test_multilabels_of_voc_are_those_of_its_annotations(root):
    """A class is shown by an object that is not difficult; difficult ones alone make it -1."""
    splits = open_transfer_set("voc2007", root)
    assert splits.train.class_names == VOC_CLASSES
    for source, split in zip(parts(splits), ("train", "val", "test"), strict=True):
        data = datasets.VOCDetection(root, year="2007", image_set=split)
        assert len(data) == len(source)
        for i in range(len(data)):
            expected = [0, 0, 0, 0]
            for thing in data[i][1]["annotation"]["object"]:
                c = VOC_CLASSES.index(thing["name"])
                expected[c] = 1 if thing["difficult"] == "0" else expected[c] or -1
            assert source.multilabels[i].tolist() == expected
            assert data.images[i].endswith(source.describe(i))
        assert {-1, 0, 1} == set(source.multilabels.ravel().tolist())
        assert ((source.multilabels == 1).sum(0) >= 4).all()
        assert (source.multilabels == 1).sum(1).max() == 2


def as_python(folder, kind):
    """The binary version of CIFAR as the version that torchvision reads."""
    base = folder.parent / kind.base_folder
    base.mkdir()
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    for name, _ in kind.train_list + kind.test_list:
        rows = np.frombuffer((folder / f"{name}.bin").read_bytes(), np.uint8).reshape(
            -1, 3072 + (2, 1)[key == "labels"]
        )
        entry = {"data": rows[:, -3072:], key: rows[:, -3073].tolist()}
        (base / name).write_bytes(pickle.dumps(entry))
    names = folder / ("batches.meta.txt" if key == "labels" else "fine_label_names.txt")
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names.read_text().split()}))


@pytest.mark.parametrize("key", ["cifar10", "cifar100"])
def test_cifar_in_both_versions(root, copy, tmp_path, monkeypatch, key):
    binary, folder = open_transfer_set(key, root), copy(key)
    as_python(folder, {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[key])
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"not found or corrupted.*unpack cifar"):  # its MD5 sum is not the real one
        open_transfer_set(key, tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    python = open_transfer_set(key, tmp_path)
    for ours, theirs in zip(parts(binary), parts(python), strict=True):
        assert by_title(ours) == by_title(theirs)
        assert ours.fingerprint == theirs.fingerprint
        assert ours.class_names == theirs.class_names
        np.testing.assert_array_equal(ours.read(3), theirs.read(3))


def test_fingerprints_follow_content_and_not_place(root, copy, tmp_path):
    folder = copy("dtd")
    here, there = (open_transfer_set("dtd", place) for place in (root, tmp_path))
    assert here.train.fingerprint == there.train.fingerprint
    os.utime(folder / "images/banded/banded_0002.jpg", (0, 0))
    again = open_transfer_set("dtd", tmp_path)
    assert again.train.fingerprint == here.train.fingerprint
    assert again.train.revision != there.train.revision
    assert again.val.revision == there.val.revision
    (folder / "images/banded/banded_0002.jpg").write_bytes(b"of another size")
    changed = open_transfer_set("dtd", tmp_path)
    assert changed.train.fingerprint != here.train.fingerprint
    assert changed.val.fingerprint == here.val.fingerprint
    file = copy("pets") / "annotations/test.txt"
    assert open_transfer_set("pets", tmp_path).test.fingerprint == open_transfer_set("pets", root).test.fingerprint
    edit(file, "Abyssinian_4 1", "Abyssinian_4 2")  # the same file and classes, another label
    assert open_transfer_set("pets", tmp_path).test.fingerprint != open_transfer_set("pets", root).test.fingerprint


# ---- other layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SINGLE)
@pytest.mark.parametrize("with_val", [True, False])
def test_plain_layout(root, tmp_path, key, with_val):
    """Folders of classes, with and without images to validate on."""
    rich, folder = open_transfer_set(key, root), tmp_path / TRANSFER_SETS[key].folders[-1]
    for split, source in zip(("train", "val", "test"), parts(rich), strict=True):
        for i in range(len(source)):
            name = source.class_names[source.labels[i]].replace("/", " ")
            path = folder / (split if with_val or split != "val" else "train") / f"{source.labels[i]} {name}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.read(i)).save(path / f"{split}{i}.png")
    plain = open_transfer_set(key, tmp_path)
    for ours, theirs in zip(parts(plain), parts(rich), strict=True):
        if with_val:
            assert sorted(ours.labels) == sorted(theirs.labels)
        colours = np.array([ours.read(i).mean((0, 1)) for i in range(len(ours))])
        assert ((colours[:, None] - COLOURS) ** 2).sum(2).argmin(1).tolist() == ours.labels.tolist()
        assert ours.class_names == plain.train.class_names
    assert len(by_title(*parts(plain))) == sum(map(len, parts(rich))) == sum(map(len, parts(plain)))
    assert len(plain.test) == len(rich.test)
    train, val, _ = TRANSFER_SETS[key].sizes
    if not with_val:
        assert abs(len(plain.val) - val / (train + val) * (len(plain.val) + len(plain.train))) <= 1


def test_plain_classes_are_those_of_train(tmp_path):
    def write(path, value):
        (tmp_path / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / "pets" / path)

    for i, name in enumerate(("a/1", "a/2", "b/1", "b/2", "c/1", "c/2")):
        write(f"train/{name}.png", i)
    write("test/c/1.png", 100)
    splits = open_transfer_set("pets", tmp_path)
    assert splits.test.labels.tolist() == [2]  # not 0, though it is the only class there
    assert [splits.test.describe(0), splits.test.class_names] == ["test/c/1.png", ("a", "b", "c")]
    assert sorted(splits.val.labels) == [0, 1, 2]  # one each of two, more than a fifth
    write("test/d/1.png", 101)
    with pytest.raises(InputError, match="test folder has a class 'd' that train lacks"):
        open_transfer_set("pets", tmp_path)
    shutil.rmtree(tmp_path / "pets/test/d")
    write("test/1.png", 101)
    with pytest.raises(InputError, match="test folder has images that lie in no folder of a class"):
        open_transfer_set("pets", tmp_path)
    (tmp_path / "pets/test/1.png").unlink()
    for name in "abc":
        (tmp_path / f"pets/train/{name}/2.png").unlink()
    with pytest.raises(InputError, match="no class has the two training images"):
        open_transfer_set("pets", tmp_path)


def test_files_lie_where_others_put_them(root, copy, tmp_path):
    """Partitions in a folder of their own, test labels of cars in devkit, DTD one level up, lists of Food as text."""
    sun, cars, dtd, food = (copy(key) for key in ("sun397", "cars", "dtd", "food101"))
    (sun / "Partitions").mkdir()
    for name in ("Training_01.txt", "Testing_01.txt", "ClassName.txt"):
        (sun / name).rename(sun / "Partitions" / name)
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "devkit/cars_test_annos_withlabels.mat")
    shutil.move(dtd, tmp_path / "up")
    shutil.rmtree(tmp_path / "dtd")
    (tmp_path / "up").rename(tmp_path / "dtd")
    for split in ("train", "test"):
        (food / f"meta/{split}.json").unlink()
    for key in ("sun397", "cars", "dtd", "food101"):
        moved, usual = open_transfer_set(key, tmp_path), open_transfer_set(key, root)
        assert [by_title(part) for part in parts(moved)] == [by_title(part) for part in parts(usual)]
        assert moved.train.class_names == usual.train.class_names


def test_birdsnap_as_its_own_script_leaves_it(root, copy, tmp_path):
    """Photos under download/, those that are gone in fail.txt; without names of species their numbers do."""
    folder = copy("birdsnap")
    (folder / "download").mkdir()
    (folder / "images").rename(folder / "download/images")
    gone = ["Blue_Jay/1700.jpg", "Snow_Goose/40114.jpg"]  # the second is a test image
    (folder / "download/fail.txt").write_text("".join(f"http://example.org/x.jpg\t{path}\n" for path in gone))
    for path in gone:
        (folder / "download/images" / path).unlink()
    (folder / "species.txt").unlink()
    splits, usual = open_transfer_set("birdsnap", tmp_path), open_transfer_set("birdsnap", root)
    found = by_title(*parts(splits))
    expected = by_title(*parts(usual))
    assert found == {f"download/{path}": c for path, c in expected.items() if path.removeprefix("images/") not in gone}
    assert len(splits.test) == len(usual.test) - 1
    assert splits.train.class_names == ("3", "17", "401")


# ---- what is broken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", TRANSFER_SETS)
def test_other_folders_are_named(tmp_path, key):
    (tmp_path / TRANSFER_SETS[key].folders[0]).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"^{TRANSFER_SETS[key].title} in \S+: it holds no ") as caught:
        open_transfer_set(key, tmp_path)
    assert one_sentence(caught, tmp_path)


def one_sentence(caught, root):
    """One line without a full stop, with the real folder instead of ROOT."""
    text = str(caught.value)
    return "\n" not in text and not re.search(r"\. |\.$|ROOT", text) and str(root) in text.partition(";")[2]


DAMAGES = {
    "no list": ("food101", lambda f: [p.unlink() for p in (f / "meta").glob("test.*")], "its test.txt is missing"),
    "no json": ("food101", lambda f: (f / "meta/train.json").write_text("{"), r"cannot be read \(JSONDecodeError"),
    "images": (
        "food101",
        lambda f: [(f / f"images/waffles/{i}.jpg").unlink() for i in (5002, 1002, 1019)],
        "3 of its 84 listed images are missing, the first being images/waffles/1002.jpg",
    ),
    "a folder": (
        "dtd",
        lambda f: [(f / "images/dotted/dotted_0002.jpg").unlink(), (f / "images/dotted/dotted_0002.jpg").mkdir()],
        "1 of its 54 listed images are missing",
    ),
    "empty list": ("dtd", lambda f: (f / "labels/val1.txt").write_text("\n"), "its list of val images is empty"),
    "outside": (
        "dtd",
        lambda f: edit(f / "labels/val1.txt", "banded/banded", "../../../x"),
        "lists name images/../../../x_0003.jpg, which lies elsewhere",
    ),
    "leak": (
        "dtd",
        lambda f: edit(f / "labels/val1.txt", "banded/banded_0003.jpg", "banded/banded_0002.jpg"),
        "its lists share images",
    ),
    "short batch": (
        "cifar10",
        lambda f: (f / "data_batch_3.bin").write_bytes(b"x" * 3074),
        "data_batch_3.bin has 3074 bytes, which is no multiple of 3073",
    ),
    "no batch": ("cifar10", lambda f: (f / "data_batch_5.bin").unlink(), "its data_batch_5.bin is missing"),
    "few names": (
        "cifar100",
        lambda f: (f / "fine_label_names.txt").write_text("apple\n"),
        "its train labels go to 2, with 1 classes",
    ),
    "no column": (
        "birdsnap",
        lambda f: edit(f / "images.txt", "species_id", "kind"),
        r"cannot be read \(ValueError: 'species_id' is not in list",
    ),
    "no partition": ("sun397", lambda f: (f / "Training_01.txt").unlink(), "its Training_01.txt is missing"),
    "other class": (
        "sun397",
        lambda f: edit(f / "Testing_01.txt", "/a/abbey/", "/a/abbot/"),
        "give a/abbot/sun_aaa0.jpg the class '/a/abbot', which it does not have",
    ),
    "no labels": (
        "cars",
        lambda f: (f / "cars_test_annos_withlabels.mat").unlink(),
        "its cars_test_annos_withlabels.mat is missing",
    ),
    "no mat": ("cars", lambda f: (f / "devkit/cars_meta.mat").write_bytes(b"no"), "it cannot be read"),
    "other names": (
        "aircraft",
        lambda f: (f / "data/variants.txt").write_text("An-12\n"),
        "the class 'Boeing 707-320', which it does not have",
    ),
    "no test truth": ("voc2007", lambda f: (f / "ImageSets/Main/dog_test.txt").unlink(), "its dog_test.txt is missing"),
    "other value": (
        "voc2007",
        lambda f: edit(f / "ImageSets/Main/dog_val.txt", "-1", " 7"),
        r"it cannot be read \(KeyError: '7'",
    ),
    "label 0": (
        "pets",
        lambda f: edit(f / "annotations/test.txt", "Abyssinian_4 1", "Abyssinian_4 0"),
        "it cannot be read|its labels go from 0 to",
    ),
    "flat": (
        "caltech101",
        lambda f: (f / "101_ObjectCategories/accordion/image_0001.jpg").rename(f / "101_ObjectCategories/x.jpg"),
        "images that lie in no folder of a class",
    ),
    "no set ids": ("flowers102", lambda f: (f / "setid.mat").unlink(), "its setid.mat is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_sets_are_one_sentence(copy, tmp_path, damage):
    key, break_it, words = DAMAGES[damage]
    folder = copy(key)
    assert open_transfer_set(key, tmp_path) is not None
    break_it(folder)
    with pytest.raises(InputError, match=words) as caught:
        open_transfer_set(key, tmp_path)
    assert str(caught.value).startswith(f"{TRANSFER_SETS[key].title} in {tmp_path}")
    assert one_sentence(caught, tmp_path)


def test_unreadable_pictures_are_left_to_whoever_reads_them(copy, tmp_path):
    (copy("pets") / "images/Bengal_1.jpg").write_bytes(b"no picture")
    assert len(open_transfer_set("pets", tmp_path).test) == 18


@pytest.mark.parametrize("key", ["cars", "flowers102"])
def test_scipy_is_asked_for_where_it_is_missing(root, monkeypatch, key):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"has \.mat files, which take scipy: pip install 'nnclr\[transfer\]'$"):
        open_transfer_set(key, root)
    assert open_transfer_set("dtd", root) is not None
