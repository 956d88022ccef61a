from dataclasses import replace

import numpy as np
import pytest
from torchvision import datasets

from nnclr.data import transfer_sets
from nnclr.data.decode import decode
from nnclr.data.images import Source
from nnclr.data.transfer_sets import TRANSFER_SETS, Splits, download_transfer_set, open_transfer_set
from nnclr.errors import InputError
from tests.transfer_fixtures import COLOURS, VOC_CLASSES, make_transfer_sets

# train / val / test images of each class in the miniature sets, in the order of the paper's table.
COUNTS = {
    "food101": ([18] * 3, [2] * 3, [8] * 3),
    "cifar10": ([18] * 4, [2] * 4, [5] * 4),
    "cifar100": ([18] * 3, [2] * 3, [5] * 3),
    "birdsnap": ([14, 14, 15], [2, 2, 1], [4] * 3),
    "sun397": ([8] * 3, [2] * 3, [5] * 3),
    "cars": ([12] * 3, [3] * 3, [5] * 3),
    "aircraft": ([6] * 3, [6] * 3, [6] * 3),
    "voc2007": (16, 16, 20),
    "dtd": ([6] * 3, [6] * 3, [6] * 3),
    "pets": ([16] * 3, [4] * 3, [6] * 3),
    "caltech101": ([25, 25, 16], [5, 5, 3], [6, 8, 1]),
    "flowers102": ([5] * 3, [5] * 3, [8] * 3),
}
DRAWN = ["food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars", "pets", "caltech101"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    make_transfer_sets(folder)
    return folder


def parts(splits):
    return splits.train, splits.val, splits.test


def by_title(*sources):
    """Title -> label, one value or a row."""
    found = {}
    for source in sources:
        values = source.labels if source.multilabels is None else source.multilabels
        found |= {source.describe(i): values[i].tolist() for i in range(len(source))}
    return found


# ---- what the paper says -----------------------------------------------------------------------------------


PAPER = """
Food C10 C100 Birdsnap SUN Cars Aircraft VOC07 DTD Pets Caltech Flowers
top1 top1 top1 top1 top1 top1 mean/class 11-pt top1 mean/class mean/class mean/class
76.7 93.7 79.0 61.4 62.5 67.1 64.1 83.0 75.5 91.8 91.3 95.1
75.3 91.3 78.4 57.2 62.2 67.8 60.6 82.5 75.5 90.4 94.2 96.1
72.8 90.5 74.4 42.4 60.6 49.3 49.8 81.4 75.7 84.6 89.3 92.6
72.3 93.6 78.3 53.7 61.9 66.7 61.0 82.8 74.9 91.5 94.5 94.7
101000 60000 60000 49829 39700 16185 10000 9963 5640 7349 9144 8189
101 10 100 500 397 196 100 20 47 37 102 102
"""


def test_figures_are_those_of_the_paper():
    """Its table of transfer results; the last rows are the images and classes that each set is known to have."""
    names, metrics, *results, totals, classes = (line.split() for line in PAPER.strip().splitlines())
    words = {"top1": "top-1 accuracy", "mean/class": "mean per-class accuracy", "11-pt": "11-point mAP"}
    assert list(TRANSFER_SETS) == list(COUNTS)
    for i, (key, known) in enumerate(TRANSFER_SETS.items()):
        assert known.key == key
        assert known.metric == words[metrics[i]], names[i]
        assert (sum(known.sizes), known.classes) == (int(totals[i]), int(classes[i])), names[i]
        assert list(known.published) == ["NNCLR", "BYOL", "SimCLR", "supervised"]
        assert list(known.published.values()) == [float(row[i]) for row in results], names[i]
    assert TRANSFER_SETS["caltech101"].sizes[:2] == (25 * 102, 5 * 102)  # the background is a class
    assert TRANSFER_SETS["sun397"].sizes == (40 * 397, 10 * 397, 50 * 397)
    assert TRANSFER_SETS["pets"].sizes[1] == 20 * 37
    others = ("BYOL", "SimCLR")
    ahead = [all(k.published["NNCLR"] > k.published[name] for name in others) for k in TRANSFER_SETS.values()]
    assert sum(ahead) == 8  # what the paper says of them


@pytest.mark.parametrize("key", DRAWN)
def test_drawn_splits_have_the_published_size_on_full_size_data(key):
    """Class sizes of the real sets where they are equal, else uneven ones of the right sum."""
    known = TRANSFER_SETS[key]
    train, val, test = known.sizes
    if key == "caltech101":
        counts = np.full(102, 31)
        counts[0] += train + val + test - counts.sum()
    else:
        weights = np.random.default_rng(0).uniform(0.8 if (train + val) % known.classes else 1, 1, known.classes)
        counts = np.floor(weights / weights.sum() * (train + val)).astype(int)
        counts[: train + val - counts.sum()] += 1
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(known.classes), counts))
    pool = Source("", len(labels), None, str, "", labels, tuple(map(str, range(known.classes))))
    drawn = transfer_sets._drawn_parts(known, {"train": pool} | ({} if key == "caltech101" else {"test": pool}), 0)
    assert (len(drawn["train"]), len(drawn["val"])) == (train, val)
    taken = np.bincount(drawn["val"].labels)
    if key == "caltech101":
        assert len(drawn["test"]) == test
        assert set(taken) == {5}
    else:
        assert np.abs(taken - counts * val / (train + val)).max() < 1


# ---- every set, from the miniature -------------------------------------------------------------------------


@pytest.mark.parametrize("key", COUNTS)
def test_every_set_opens(root, key):
    splits = open_transfer_set(key, root)
    assert isinstance(splits, Splits)
    for source, expected, split in zip(parts(splits), COUNTS[key], ("train", "val", "test"), strict=True):
        assert source.name == f"{TRANSFER_SETS[key].title} {split}"
        assert source.class_names == splits.train.class_names
        if key == "voc2007":
            assert source.labels is None
            assert source.multilabels.shape == (expected, 4)
            assert source.multilabels.dtype == np.int8
        else:
            assert source.multilabels is None
            assert source.labels.dtype == np.int64
            assert np.bincount(source.labels).tolist() == expected
            assert len(source.class_names) == len(expected)
        images = [source.read(i) for i in range(len(source))]
        assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in images)
        if key != "voc2007":  # what a picture shows is what its label says
            colours = np.array([image.mean((0, 1)) for image in images])
            nearest = ((colours[:, None] - COLOURS) ** 2).sum(2).argmin(1)
            assert nearest.tolist() == source.labels.tolist()
        else:  # a stripe for each class, also where it is difficult
            edges = np.array([[image[:, :3].mean((0, 1)), image[:, -3:].mean((0, 1))] for image in images])
            nearest = ((edges[:, :, None] - COLOURS) ** 2).sum(3).argmin(2)
            shown = [sorted(set(pair)) for pair in nearest.tolist()]
            assert shown == [np.flatnonzero(row).tolist() for row in source.multilabels]


@pytest.mark.parametrize("key", COUNTS)
def test_splits_share_no_image(root, key):
    sources = parts(open_transfer_set(key, root))
    titles = [{source.describe(i) for i in range(len(source))} for source in sources]
    pixels = [{source.read(i).tobytes() for i in range(len(source))} for source in sources]
    for sets in (titles, pixels):
        assert [len(found) for found in sets] == [len(source) for source in sources]
        assert len(set.union(*sets)) == sum(len(source) for source in sources)
    assert len({source.fingerprint for source in sources}) == 3


@pytest.mark.parametrize("key", DRAWN)
def test_validation_is_drawn_by_seed(root, key):
    first, again, other = (open_transfer_set(key, root, seed) for seed in (0, 0, 1))
    for a, b in zip(parts(first), parts(again), strict=True):
        assert by_title(a) == by_title(b)
        assert a.fingerprint == b.fingerprint
    assert by_title(first.val).keys() != by_title(other.val).keys()
    assert first.val.fingerprint != other.val.fingerprint
    assert np.bincount(first.val.labels).tolist() == np.bincount(other.val.labels).tolist()
    assert by_title(*parts(first)) == by_title(*parts(other))
    if key != "caltech101":
        assert by_title(first.test) == by_title(other.test)


@pytest.mark.parametrize("key", [key for key in COUNTS if key not in DRAWN])
def test_published_validation_knows_no_seed(root, key):
    first, other = (open_transfer_set(key, root, seed) for seed in (0, 1))
    assert by_title(first.val) == by_title(other.val)
    assert first.val.fingerprint == other.val.fingerprint


def test_sources_carry_their_labels_into_subsets(root):
    voc = open_transfer_set("voc2007", root).test
    part = voc.subset([5, 0, 7])
    np.testing.assert_array_equal(part.multilabels, voc.multilabels[[5, 0, 7]])
    assert part.class_names == VOC_CLASSES
    assert open_transfer_set("dtd", root).test.subset([1]).multilabels is None


def test_the_miniature_is_the_same_at_every_call(root, tmp_path):
    make_transfer_sets(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) > 700
    for path in files:
        assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes(), path
        assert b"Created on" not in path.read_bytes()
    make_transfer_sets(tmp_path / "larger", 40)
    assert decode((tmp_path / "larger/dtd/dtd/images/banded/banded_0002.jpg").read_bytes()).shape[0] == 40


# ---- what is not there, and downloads ----------------------------------------------------------------------


def test_absent_sets_are_none(tmp_path):
    for key in TRANSFER_SETS:
        assert open_transfer_set(key, tmp_path) is None
        assert open_transfer_set(key, tmp_path / "missing") is None
    with pytest.raises(InputError, match="no transfer set is called 'imagenet'; there are food101, cifar10"):
        open_transfer_set("imagenet", tmp_path)


def test_downloads_are_torchvisions(tmp_path, monkeypatch):
    calls = []
    kinds = "Food101 CIFAR10 CIFAR100 SUN397 FGVCAircraft VOCDetection DTD OxfordIIITPet Caltech101 Flowers102".split()
    for kind in kinds:
        assert isinstance(getattr(datasets, kind), type)
        monkeypatch.setattr(datasets, kind, lambda root, kind=kind, **words: calls.append((kind, root, words)))
    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", lambda *a, **k: calls.append(("lists", a, k)))
    for key in TRANSFER_SETS.keys() - {"birdsnap", "cars"}:
        download_transfer_set(key, tmp_path)
    assert {kind for kind, *_ in calls} == {*kinds, "lists"}
    assert all(root == str(tmp_path) and words["download"] for kind, root, words in calls if kind != "lists")
    voc = [(words["year"], words["image_set"]) for kind, _, words in calls if kind == "VOCDetection"]
    assert voc == [("2007", "trainval"), ("2007", "test")]
    lists = next(call for call in calls if call[0] == "lists")
    assert lists[1] == (transfer_sets._SUN_PARTITIONS[0], str(tmp_path / "SUN397/Partitions"))
    assert len(lists[2]["md5"]) == 32


def test_failed_downloads_are_one_sentence(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(datasets, "DTD", offline)
    for key, words in (
        ("dtd", r"could not be downloaded to \S+ \(OSError: no route to host\); unpack dtd-r1"),
        ("cars", r"could not be downloaded to \S+ \(ValueError: The original URL is broken.*; put cars_train"),
        ("birdsnap", "torchvision does not download Birdsnap; unpack http"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            download_transfer_set(key, tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no transfer set is called 'mnist'"):
        download_transfer_set("mnist", tmp_path)


def test_multilabels_are_optional():
    plain = Source("", 1, None, str, "")
    assert plain.multilabels is None
    assert replace(plain, multilabels=np.zeros((1, 2), np.int8)).subset([0]).multilabels.shape == (1, 2)
