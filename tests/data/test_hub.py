import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from nnclr.data.decode import BadImage
from nnclr.data.source import open_source
from nnclr.errors import InputError

PICTURES = [np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8) for i in range(12)]
datasets.disable_progress_bars()


def rows(labels=None, **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    values = {"image": [Image.fromarray(p) for p in PICTURES], "label": labels or [0, 1] * 6}
    for name, (feature, column) in columns.items():
        features[name], values[name] = feature, column
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    rows().save_to_disk(tmp_path / "one")
    parts = datasets.DatasetDict({"train": rows(), "test": rows().select(range(4))})
    parts.save_to_disk(tmp_path / "parts")
    return tmp_path


def test_a_folder_of_save_to_disk(saved):
    source = open_source(f"hf:{saved}/one")
    assert len(source) == 12
    for i in range(12):
        np.testing.assert_array_equal(source.read(i), PICTURES[i])
    assert source.labels.tolist() == [0, 1] * 6
    assert source.class_names == ("cat", "dog")
    assert source.describe(3) == f"hf:{saved}/one?split=train#3"
    (saved / "one").rename(saved / "two")
    assert open_source(f"hf:{saved}/two").fingerprint == source.fingerprint


def test_parts(saved):
    assert len(open_source(f"hf:{saved}/parts")) == 12
    assert len(open_source(f"hf:{saved}/parts?split=test")) == 4
    with pytest.raises(InputError, match="has no split 'val'; it has train, test"):
        open_source(f"hf:{saved}/parts?split=val")


def test_rows_in_another_order(tmp_path):
    order = [5, 3, 11, 0]
    rows().select(order).save_to_disk(tmp_path / "some")
    source = open_source(f"hf:{tmp_path}/some")
    for row, i in enumerate(order):
        np.testing.assert_array_equal(source.read(row), PICTURES[i])


def test_columns(tmp_path):
    kinds = datasets.Value("string"), ["x", "y", "z"] * 4
    made = rows(kind=kinds).rename_columns({"image": "photo", "label": "fine"})
    made.save_to_disk(tmp_path / "x")
    source = open_source(f"hf:{tmp_path}/x")  # the only ones of their kind
    np.testing.assert_array_equal(source.read(2), PICTURES[2])
    assert source.class_names == ("cat", "dog")
    by_kind = open_source(f"hf:{tmp_path}/x?image=photo&label=kind")
    assert by_kind.class_names == ("x", "y", "z")
    assert by_kind.fingerprint != source.fingerprint
    assert open_source(f"hf:{tmp_path}/x?label=").labels is None
    for query, words in (
        ("label=colour", "has no column 'colour'; it has photo, fine, kind"),
        ("image=kind", "column 'kind' holds Value.*, not images"),
        ("spilt=train", "'spilt' after the"),
    ):
        with pytest.raises(InputError, match=words):
            open_source(f"hf:{tmp_path}/x?{query}")
    made.remove_columns("photo").save_to_disk(tmp_path / "bare")
    with pytest.raises(InputError, match="has no column of images; it has fine, kind"):
        open_source(f"hf:{tmp_path}/bare")


def test_hidden_labels_are_none(tmp_path):
    rows(labels=[-1] * 12).save_to_disk(tmp_path / "x")
    source = open_source(f"hf:{tmp_path}/x")
    assert source.labels is None
    assert source.unlabelled == "column 'label' is -1 in some rows, which means no label"


def test_a_folder_of_parquet_files(tmp_path):
    for name, some in (("data/train-00000-of-00001", range(12)), ("data/test-00000-of-00001", range(3))):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        rows().select(some).to_parquet(tmp_path / f"x/{name}.parquet")
    source = open_source(f"hf:{tmp_path}/x")
    assert len(source) == 12
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.read(7), PICTURES[7])
    assert len(open_source(f"hf:{tmp_path}/x?split=test")) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither a data set of save_to_disk nor parquet files"):
        open_source(f"hf:{tmp_path}/empty")


def test_files_that_are_only_named_are_read_from_the_cache_alone(tmp_path, monkeypatch):
    """A data set may name any file of this machine; only what lies where the library keeps its files is opened."""
    (tmp_path / "cache").mkdir()
    for i, name in enumerate(("cache/own.png", "private.png")):
        Image.fromarray(PICTURES[i]).save(tmp_path / name)
    (tmp_path / "cache/link.png").symlink_to(tmp_path / "private.png")
    names = ["cache/own.png", "private.png", "cache/../private.png", "cache/link.png", "cache/gone.png"]
    made = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / name) for name in names]}, features=datasets.Features({"image": datasets.Image()})
    )
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    source = open_source("hf:some/set")
    assert source.describe(0) == f"{tmp_path}/cache/own.png"
    np.testing.assert_array_equal(source.read(0), PICTURES[0])
    for i in range(1, 5):
        with pytest.raises(BadImage, match=r"png is not stored with the data set"):
            source.read(i)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        InputError, match=r"hf:some/set is neither a folder nor in the cache, and the hub cannot be rea"
    ):
        open_source("hf:some/set")

    def unknown(*_, **__):
        raise ValueError("Unknown split \"val\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(InputError, match='hf:some/set cannot be opened: Unknown split "val"'):
        open_source("hf:some/set?split=val")


def test_a_name_on_the_hub(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_source("hf:some/set?config=plain&split=train[:50%]")) == 12
    assert asked == [("some/set", "plain", "train[:50%]")]


def test_libraries_that_are_missing_or_old(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match=r"hf:x needs the datasets library; pip install 'nnclr\[hub\]'"):
            open_source("hf:x")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match="datasets 4 or newer is needed"):
        open_source("hf:x")


@pytest.mark.parametrize("name", ["{}-00000-of-00001", "{}/0000", "cifar_{}", "plain/{}-00000-of-00001"])
def test_a_split_that_a_folder_of_parquet_files_lacks(tmp_path, name):
    """All files instead of it would be the images that were trained on."""
    for split, some in (("train", range(12)), ("test", range(3))):
        path = tmp_path / f"x/{name.format(split)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows().select(some).to_parquet(path)
    assert len(open_source(f"hf:{tmp_path}/x?split=test")) == 3
    with pytest.raises(InputError, match="x has no split 'validation'; it has test, train"):
        open_source(f"hf:{tmp_path}/x?split=validation")
    with pytest.raises(InputError, match="config= chooses among those of a data set on the hub"):
        open_source(f"hf:{tmp_path}/x?config=plain")


def test_a_folder_of_parquet_files_without_splits(tmp_path):
    (tmp_path / "test").mkdir()  # a name above the folder is none of a split
    rows().to_parquet(tmp_path / "test/pictures.parquet")
    assert len(open_source(f"hf:{tmp_path}/test?split=validation")) == 12


@pytest.mark.parametrize("form", ["pandas", "arrow", "numpy", "columns"])
def test_a_format_that_was_saved(tmp_path, monkeypatch, form):
    made = rows()
    made.set_format(**({"columns": ["label"]} if form == "columns" else {"type": form}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    source = open_source("hf:some/set")
    np.testing.assert_array_equal(source.read(3), PICTURES[3])
    assert source.labels.tolist() == [0, 1] * 6


def test_an_empty_set(tmp_path, monkeypatch):
    rows().select([]).save_to_disk(tmp_path / "x")
    with pytest.raises(InputError, match="x cannot be opened: it, or one of its splits, has no rows"):
        open_source(f"hf:{tmp_path}/x")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows().select([]))
    with pytest.raises(InputError, match="holds no images: it has no rows"):
        open_source("hf:some/set")


def test_named_files_in_each_cache_and_in_the_fingerprint(tmp_path, monkeypatch):
    from huggingface_hub import constants

    for place, target, name in (
        ("home", datasets.config, "HF_CACHE_HOME"),
        ("sets", datasets.config, "HF_DATASETS_CACHE"),
        ("hub", constants, "HF_HUB_CACHE"),
    ):
        (tmp_path / place).mkdir()
        Image.fromarray(PICTURES[0]).save(tmp_path / place / "0.png")
        Image.fromarray(PICTURES[1]).save(tmp_path / place / "1.png")
        monkeypatch.setattr(target, name, str(tmp_path / place))

    def opened(*names):
        made = datasets.Dataset.from_dict(
            {"image": [str(tmp_path / n) for n in names]}, features=datasets.Features({"image": datasets.Image()})
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
        return open_source("hf:some/set")

    source = opened("home/0.png", "sets/1.png", "hub/0.png")
    for i, picture in enumerate((0, 1, 0)):
        np.testing.assert_array_equal(source.read(i), PICTURES[picture])
    assert opened("hub/0.png", "hub/1.png", "hub/0.png").fingerprint == source.fingerprint
    assert opened("home/1.png", "sets/1.png", "hub/0.png").fingerprint != source.fingerprint
    (tmp_path / "hub/0.png").write_bytes(b"another")
    assert opened("home/0.png", "sets/1.png", "hub/0.png").fingerprint != source.fingerprint
