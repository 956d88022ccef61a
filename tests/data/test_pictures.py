"""Pictures that are handed over one by one, against the same pictures in a folder."""

import io
import os

import numpy as np
import pytest
from PIL import Image

import nnclr
from nnclr.data import decode
from nnclr.data.decode import BadImage
from nnclr.data.pictures import file_source
from nnclr.data.source import open_source
from nnclr.errors import InputError


def odd_pictures():
    """Pillow images of many modes and sizes, with the format that stores each as it is."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    clear = Image.fromarray(noise(20, 17)).convert("P")
    clear.info["transparency"] = 3
    return [
        (Image.fromarray(noise(23, 31, 3)), "PNG"),
        (Image.fromarray(noise(31, 23)), "PNG"),
        (Image.fromarray(noise(12, 40, 4), "RGBA"), "PNG"),
        (Image.fromarray(noise(9, 9, 4), "CMYK"), "TIFF"),
        (clear, "PNG"),
        (Image.fromarray(rng.integers(0, 65536, (15, 14)).astype(np.uint16)), "PNG"),
        (Image.fromarray(rng.normal(size=(15, 14)).astype(np.float32)), "TIFF"),
        (Image.fromarray(noise(40, 9) > 127), "PNG"),
    ]


@pytest.fixture
def folder(tmp_path):
    for i, (image, form) in enumerate(odd_pictures()):
        image.save(tmp_path / f"{i}.{form.lower()}", form, **({"transparency": 3} if image.mode == "P" else {}))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3)).save(tmp_path / "9.jpg", exif=turned)
    return tmp_path


def test_pillow_images_are_read_as_their_files(folder):
    files = open_source(folder)
    opened = open_source([Image.open(folder / files.describe(i)) for i in range(len(files))])
    made = open_source([image for image, _ in odd_pictures()])
    assert (len(opened), len(made)) == (9, 8)
    for i in range(9):
        np.testing.assert_array_equal(opened.read(i), files.read(i), err_msg=files.describe(i))
    for i in range(8):
        np.testing.assert_array_equal(made.read(i), files.read(i), err_msg=files.describe(i))
    # The control: the turned one is another picture as Pillow hands it out.
    assert np.asarray(Image.open(folder / "9.jpg")).shape != opened.read(8).shape


def test_an_encoder_takes_whatever_holds_the_pictures(folder):
    encoder = nnclr.open_encoder("random:small-convnet?size=16")
    expected = encoder.embed(folder)
    paths = sorted(folder.iterdir())
    opened = [Image.open(path) for path in paths]
    for data in (opened, tuple(opened), paths, [str(path) for path in paths]):
        np.testing.assert_array_equal(encoder.embed(data), expected)
    for one in (paths[3], str(paths[3]), Image.open(paths[3]), [Image.open(paths[3])]):
        np.testing.assert_allclose(encoder.embed(one), expected[3:4], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"missing\.jpg does not exist"):
        encoder.embed([paths[0], "missing.jpg"])
    backwards = encoder.embed(paths[::-1])
    np.testing.assert_array_equal(backwards[::-1], expected)  # the order is that of the list


def test_a_list_of_paths_with_labels_is_data(folder, tmp_path_factory):
    """As (X, y) of scikit-learn, and `samples` of torchvision's ImageFolder."""
    files, paths = open_source(folder), sorted(map(str, folder.iterdir()))
    names = ["cat", "dog", "cat", "an ox"] * 2 + ["dog"]
    for data in (paths, (paths, names), (folder.glob("*.jpg"), None)):
        if not isinstance(data, list):
            data = (sorted(data[0]), data[1])
        source = open_source(data)
        first = len(files) - len(source)  # the photograph comes last
        for i in range(len(source)):
            np.testing.assert_array_equal(source.read(i), files.read(first + i))
            assert source.describe(i) == paths[first + i]
    source = open_source((paths, names))
    assert source.class_names == ("an ox", "cat", "dog")
    assert [source.class_names[label] for label in source.labels] == names
    assert source.labels.dtype == np.int64
    others = [
        open_source(data).fingerprint
        for data in (paths, (paths, names[::-1]), (paths[::-1], names), (paths[1:], names[1:]))
    ]
    assert len({source.fingerprint, *others}) == 5
    run = nnclr.pretrain(
        (paths, names),
        tmp_path_factory.mktemp("run") / "run",
        backbone="small-convnet",
        image_size=8,
        batch_size=4,
        epochs=1,
        quiet=True,
    )
    assert nnclr.evaluate(run.path, (paths, names), (paths, np.array(names, object)), k=1).value > 0.9
    array = np.zeros((3, 2, 2, 3), np.uint8)
    assert open_source((array, np.array(["b", "a\x1b", "b"]))).class_names == ("a\\x1b", "b")
    assert open_source((list(array), ["b", "a", "b"])).labels.tolist() == [1, 0, 1]
    for wrong in (["a", "b"], ["a", 1, "b"], ["a", None, "b"], "abc", 5):
        with pytest.raises(InputError, match="labels must be 3 whole numbers from 0, or 3 texts"):
            open_source((array, wrong))


def test_files_of_equal_names_and_sizes_are_told_apart(tmp_path):
    """The splits of a data set, whose pictures are numbered in each of its classes."""
    rng, lists = np.random.default_rng(0), {}
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
                picture.save(tmp_path / split / name / f"{i}.bmp")  # all of one size
        paths = sorted((tmp_path / split).rglob("*.bmp"))
        lists[split] = paths, [path.parent.name for path in paths]
    said = []
    found = nnclr.evaluate("pixels?size=9", lists["train"], lists["test"], k=1, say=said.append)
    one, two = (([np.asarray(Image.open(path)) for path in paths], labels) for paths, labels in lists.values())
    assert found.value == nnclr.evaluate("pixels?size=9", one, two, k=1).value < 1
    assert not said  # that they were the same images
    assert nnclr.evaluate("pixels?size=9", lists["train"], lists["train"], k=1, say=said.append).value == 1
    assert "are those that were learned from" in said[0]
    paths, labels = lists["train"]
    fingerprint = open_source((paths, labels)).fingerprint
    assert fingerprint != open_source((paths[:4], labels[:4])).fingerprint
    others = [labels[::-1], ["a ram" if label == "cat" else label for label in labels], None]
    assert len({fingerprint, *(open_source((paths, other)).fingerprint for other in others)}) == 4
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "train", tmp_path / "elsewhere/there")
    moved = [tmp_path / "elsewhere/there" / path.relative_to(tmp_path / "train") for path in paths]
    assert open_source((moved, labels)).fingerprint == fingerprint
    swapped = [moved[4], *moved[1:4], moved[0], *moved[5:]]  # of one name, in folders of two
    assert open_source((swapped, labels)).fingerprint != fingerprint


class Items:
    """As a data set of PyTorch."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return Image.new("L", (2, 2)), i


def test_arrays_may_differ_in_size():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((8, 9, 3), (7, 5), (4, 4, 1))]
    source = open_source(arrays)
    np.testing.assert_array_equal(source.read(0), arrays[0])
    np.testing.assert_array_equal(source.read(1), np.stack([arrays[1]] * 3, axis=2))
    np.testing.assert_array_equal(source.read(2), np.concatenate([arrays[2]] * 3, axis=2))
    source.read(0)[:] = 0
    assert arrays[0].any()  # what was read is a copy


def test_labels_of_pictures():
    pictures = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    source = open_source((pictures, [0, 1, 1]))
    assert source.labels.tolist() == [0, 1, 1]
    assert source.class_names == ("0", "1")
    with pytest.raises(InputError, match="labels must be 3 whole numbers"):
        open_source((pictures, [0, 1]))
    assert len(open_source((pictures[0], pictures[1]))) == 2  # two pictures, and no pair of images and labels


def test_fingerprints_are_of_what_is_seen(tmp_path):
    def prints(colour, labels=None):
        pictures = [Image.new("RGB", (4, 4), colour), np.zeros((3, 5), np.uint8)]
        return open_source((pictures, labels)).fingerprint

    assert prints("red") == prints("red")
    assert len({prints("red"), prints("blue"), prints("red", [0, 1]), prints("red", [1, 0])}) == 4
    for place, size in (("a", 4), ("b", 4), ("c", 5)):
        (tmp_path / place).mkdir()
        Image.new("RGB", (size, 40)).save(tmp_path / place / "x.bmp")
    same, moved, other = (file_source([str(tmp_path / place / "x.bmp")]).fingerprint for place in "abc")
    assert same == moved != other


def test_damaged_pictures_cost_their_own_row(tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole, "JPEG")
    cut = whole.getvalue()[: len(whole.getvalue()) // 2]
    (tmp_path / "cut.jpg").write_bytes(cut)
    os.mkfifo(tmp_path / "fifo.jpg")
    good = Image.new("RGB", (8, 8), "green")
    good.save(tmp_path / "good.png")
    encoder = nnclr.open_encoder("random:small-convnet?size=16")
    for data in (
        [Image.open(io.BytesIO(cut)), good],
        [tmp_path / "cut.jpg", tmp_path / "good.png"],
        [tmp_path / "fifo.jpg", tmp_path / "good.png"],
    ):
        assert np.isnan(encoder.embed(data)).all(axis=1).tolist() == [True, False]
    with pytest.raises(BadImage, match="truncated"):
        open_source([Image.open(io.BytesIO(cut))]).read(0)


def test_a_picture_in_memory_may_be_no_larger_than_a_file(monkeypatch):
    source = open_source([Image.new("L", (10, 10)), Image.new("L", (10, 11))])
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    assert source.read(0).shape == (10, 10, 3)
    with pytest.raises(BadImage, match="too_large: 10 x 11 pixels"):
        source.read(1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([np.zeros((4, 4, 3), np.float32)], "uint8 from 0 to 255, number 0 is float32"),
        ([Image.new("L", (2, 2)), np.zeros((4, 4, 2), np.uint8)], r"number 1 is \(4, 4, 2\)"),
        ([np.zeros((0, 4), np.uint8)], "number 0 is"),
        ([Image.new("L", (2, 2)), "x.png"], "data of type list is none of: .* a list of Pillow images"),
        ([], "data of type list is none of"),
        (Items(), r"data of type Items is none of: .*; of a data set give its images or their paths, with the labels"),
        (__file__, "is a file, not a folder of images"),
    ],
)
def test_what_is_no_picture_is_refused(data, words):
    with pytest.raises(InputError, match=words):
        open_source(data)
