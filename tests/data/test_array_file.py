import numpy as np
import pytest
import torch

from nnclr.data import array_file
from nnclr.data.augment import policy
from nnclr.data.images import array_source
from nnclr.data.loader import Plan, StreamLoader, create_loader
from nnclr.data.source import open_source
from nnclr.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 9, 11, 3), dtype=np.uint8)
LABELS = np.arange(20) % 3


@pytest.fixture
def stored(tmp_path):
    np.save(tmp_path / "set.npy", PIXELS)
    return tmp_path / "set.npy"


@pytest.mark.parametrize("form", ["(n, h, w, 3)", "(n, 3, h, w)", "(n, h, w)"])
def test_a_file_is_the_array_in_it(tmp_path, form):
    pixels = {"(n, h, w, 3)": PIXELS, "(n, 3, h, w)": PIXELS.transpose(0, 3, 1, 2), "(n, h, w)": PIXELS[..., 0]}[form]
    np.save(tmp_path / "set.npy", pixels)
    source, array = open_source(str(tmp_path / "set.npy")), array_source(pixels, None)
    assert len(source) == 20
    assert source.labels is None
    assert source.fingerprint == array.fingerprint
    assert source.fingerprint != array_source(pixels[::-1], None).fingerprint
    for i in (0, 19):
        np.testing.assert_array_equal(source.read(i), array.read(i))
        assert source.read(i).flags.writeable
    assert source.describe(3) == f"{tmp_path / 'set.npy'}#3"


def test_it_is_not_read_as_a_whole(stored, monkeypatch):
    """Pixels are read from the file when they are asked for: here, after they were changed in it."""
    source = open_source(stored)
    with open(stored, "r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([255 - PIXELS[-1, -1, -1, -1]]))
    assert source.read(19)[-1, -1, -1] == 255 - PIXELS[-1, -1, -1, -1]
    monkeypatch.setattr(array_file, "_LARGE", 1000)
    with pytest.warns(UserWarning, match=r"set.npy: reading 0 GB once, for its fingerprint"):
        open_source(stored)


def test_labels_lie_beside_it_or_are_named(stored, tmp_path):
    np.save(tmp_path / "other.npy", LABELS[::-1])
    assert open_source(f"{stored}?labels={tmp_path / 'other.npy'}").labels.tolist() == LABELS[::-1].tolist()
    np.save(tmp_path / "set.labels.npy", LABELS.astype(np.uint8))
    source = open_source(stored)
    assert source.labels.tolist() == LABELS.tolist()
    assert source.class_names == ("0", "1", "2")
    assert source.fingerprint == array_source(PIXELS, LABELS).fingerprint != array_source(PIXELS, None).fingerprint
    assert open_source(f"{stored}?labels={tmp_path / 'other.npy'}").labels.tolist() == LABELS[::-1].tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), "must be uint8"),
        (np.zeros((4, 8), np.uint8), r"shape \(4, 8\)"),
        (np.array([None, {}]), "not a readable NumPy file"),
        (b"no array", "not a readable NumPy file"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_set_of_images_is_named(tmp_path, content, words):
    path = tmp_path / "set.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError, match=rf"set\.npy.*{words}"):
        open_source(str(path))


def test_other_mistakes_are_named(stored, tmp_path):
    np.save(tmp_path / "set.labels.npy", LABELS[:-1])
    with pytest.raises(InputError, match="labels must be 20 whole numbers"):
        open_source(stored)
    with pytest.raises(InputError, match=r"missing\.npy does not exist"):
        open_source(f"{stored}?labels={tmp_path / 'missing.npy'}")
    with pytest.raises(InputError, match="expected labels="):
        open_source(f"{stored}?split=train")
    data = stored.read_bytes()
    stored.write_bytes(data[:-100])
    with pytest.raises(InputError, match="not a readable NumPy file"):
        open_source(stored)


def test_views_of_a_file_are_those_of_the_array(tmp_path):
    """Equal sizes, but too large to be kept in the memory of a CPU: cut from the file as they are needed."""
    pixels = np.repeat(np.repeat(PIXELS, 15, axis=1), 15, axis=2)
    np.save(tmp_path / "set.npy", pixels)
    plan, cpu = Plan(20, 10, policy("simclr", 32), 0), torch.device("cpu")
    loaders = [
        create_loader(source, plan, cpu, 2)
        for source in (open_source(tmp_path / "set.npy"), array_source(pixels, None))
    ]
    assert all(isinstance(loader, StreamLoader) for loader in loaders)
    for one, two in zip(*(loader.batches(0, 4) for loader in loaders), strict=True):
        assert torch.equal(one.ids, two.ids)
        assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))
