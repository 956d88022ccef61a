"""Parquet of several files and many row groups, near and far; single small files are in test_source.py."""

import io
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nnclr.data import parquet
from nnclr.data.augment import policy
from nnclr.data.decode import BadImage
from nnclr.data.loader import Plan, create_loader
from nnclr.data.source import open_source
from nnclr.errors import InputError


def png(i):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20 + i % 3, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(ids, names=None):
    made = pa.table(
        {
            "image": [{"bytes": png(i), "path": f"p{i}.png"} for i in ids],
            "label": pa.array([i % 3 for i in ids], pa.int64()),
            "split": ["test" if i % 10 == 9 else "train" for i in ids],
        }
    )
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(features)}) if names else made


@pytest.fixture
def folder(tmp_path):
    """Two files of 30 rows in groups of four."""
    (tmp_path / "set").mkdir()
    for number in range(2):
        ids = range(30 * number, 30 * number + 30)
        pq.write_table(table(ids), tmp_path / f"set/train-{number:05d}-of-00002.parquet", row_group_size=4)
    return tmp_path / "set"


@pytest.mark.parametrize("form", ["folder", "*", "braces", "list", "remote"])
def test_many_files(folder, form):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    data = {
        "folder": folder,
        "*": f"{folder}/*.parquet",
        "braces": str(folder / "train-{00000..00001}-of-00002.parquet"),
        "list": sorted(folder.iterdir()),
        "remote": "memory://set/train-*.parquet",
    }[form]
    source = open_source(data)
    assert len(source) == 60
    assert source.blocks == (4, 4, 4, 4, 4, 4, 4, 2) * 2
    assert all(source.content(i) == png(i) for i in range(60))
    assert [source.describe(i) for i in (0, 59)] == ["p0.png", "p59.png"]
    assert source.labels.tolist() == [i % 3 for i in range(60)]
    assert source.fingerprint == open_source(f"{folder}/*.parquet").fingerprint
    memory.store.clear()


def test_rows_are_kept_by_their_columns(folder):
    source = open_source(f"{folder}/*.parquet?split=test")
    kept = [i for i in range(60) if i % 10 == 9]
    assert [source.content(i) for i in range(6)] == [png(i) for i in kept]
    assert sum(source.blocks) == 6
    assert source.labels.tolist() == [i % 3 for i in kept]
    assert [source.describe(i) for i in range(6)] == [f"p{i}.png" for i in kept]
    assert open_source(f"{folder}/*.parquet?label=").labels is None


def test_names_of_classes_come_from_the_metadata(tmp_path):
    pq.write_table(table(range(6), ["ant", "bee", "cat"]), tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet").class_names == ("ant", "bee", "cat")
    pq.write_table(table(range(6), ["too", "few"]), tmp_path / "y.parquet")
    assert open_source(tmp_path / "y.parquet").class_names == ("0", "1", "2")


def test_numbers_that_are_no_class_indices_are_numbered_anew(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [png(0)] * 3, "label": [70_000, 5, 70_000]}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ("5", "70000"))
    monkeypatch.setattr("nnclr.data.parquet.classes_of_numbers", lambda labels: (labels, ("as before",)))
    assert open_source(tmp_path / "x.parquet").fingerprint == source.fingerprint  # over what was given


def test_numbers_that_mean_different_classes_are_refused(tmp_path):
    for name, classes in (("x", ["ant", "bee", "cat"]), ("y", ["bee", "ant", "cat"])):
        pq.write_table(table(range(6), classes), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"y.parquet names the classes of 'label' otherwise than .*x.parquet"):
        open_source(tmp_path)
    assert len(open_source(f"{tmp_path}/*.parquet?label=")) == 12


def test_minus_one_is_no_class_where_classes_have_names(tmp_path):
    made = table(range(6), ["ant", "bee", "cat"])
    labels = pa.array([0, -1, 2, 1, -1, 0], pa.int64())
    pq.write_table(made.set_column(1, "label", labels), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert (source.labels, source.class_names) == (None, None)
    assert source.unlabelled == "column 'label' is -1 in some rows, which means no label"
    assert open_source(f"{tmp_path}/x.parquet?label=").unlabelled == ""
    pq.write_table(table(range(6)).set_column(1, "label", labels), tmp_path / "y.parquet")  # any number may be a name
    assert open_source(tmp_path / "y.parquet").class_names == ("-1", "0", "1", "2")


def test_a_folder_of_images_stays_one_beside_a_parquet_file(folder):
    (folder / "x.png").write_bytes(png(0))
    assert open_source(folder).describe(0) == "x.png"


def test_memory_holds_some_row_groups(folder, monkeypatch):
    """Training goes through an order that needs two groups at a time, and reads each about once an epoch."""
    group = open_source(folder)
    abouts = [pq.read_metadata(path) for path in folder.iterdir()]
    largest = max(
        sum(about.row_group(g).column(c).total_uncompressed_size for c in (0, 1)) for about in abouts for g in range(8)
    )
    monkeypatch.setattr(parquet, "MOST_BYTES", 4 * largest)
    source, reads = open_source(folder), []
    assert source.window == 2
    assert group.window > len(group.blocks)  # the control: all of it fits
    real = parquet._Pictures._read
    monkeypatch.setattr(parquet._Pictures, "_read", lambda self, number: reads.append(number) or real(self, number))
    plan = Plan(60, 6, policy("byol", 16), 0)
    loader = create_loader(source, plan, torch.device("cpu"), 2)
    reads.clear()
    seen = [i for batch in loader.batches(0, 10) for i in batch.ids.tolist()]
    assert sorted(seen) == list(range(60))
    assert len(reads) < 2 * 16
    reads.clear()
    for i in np.random.default_rng(0).permutation(60).tolist():  # the control: any order
        source.content(i)
    assert len(reads) > 2.2 * 16


def test_files_that_change_or_vanish(folder):
    source = open_source(folder)
    (folder / "train-00000-of-00002.parquet").write_bytes(b"no")
    with pytest.raises(BadImage, match="unreadable"):
        source.content(0)
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(BadImage, match="unreadable"):
        source.content(5)
    assert source.content(45) == png(45)


def test_identity_follows_the_content(folder, tmp_path):
    before = open_source(folder)
    (folder).rename(tmp_path / "moved")
    moved = open_source(tmp_path / "moved")
    assert moved.fingerprint == before.fingerprint
    pq.write_table(table(range(1, 31)), tmp_path / "moved/train-00000-of-00002.parquet", row_group_size=4)
    assert open_source(tmp_path / "moved").fingerprint != before.fingerprint


def test_files_that_do_not_fit_each_other(folder):
    pq.write_table(pa.table({"image": [1, 2]}), folder / "x.parquet")
    with pytest.raises(InputError, match=r"x.parquet has no column 'label'; it has image"):
        open_source(folder)
    with pytest.raises(InputError, match=r"x.parquet: column 'image' holds int64, not image bytes"):
        open_source(f"{folder}/*.parquet?label=")


def test_small_columns_of_different_types(folder):
    for kind, labels in ((pa.int32(), [7, 8]), (pa.int64(), [7, 8])):
        made = pa.table({"image": [{"bytes": png(i)} for i in (0, 1)], "label": pa.array(labels, kind)})
        pq.write_table(made, folder / "x.parquet")
        source = open_source(folder)
        assert source.labels.tolist()[-2:] == [7, 8]
        assert source.content(61) == png(1)
    pq.write_table(pa.table({"image": [{"bytes": png(0)}], "label": ["dog"]}), folder / "x.parquet")
    with pytest.raises(InputError, match=r"a column of .* is not of one kind in all files"):
        open_source(folder)


def test_rows_cannot_be_chosen_by_a_column_of_lists(folder):
    for column in ([[1], [2]], [{"a": 1}, {"a": 2}]):
        pq.write_table(pa.table({"image": [png(0), png(1)], "odd\x1b": column}), folder / "x.parquet")
        with pytest.raises(InputError, match=r"column 'odd.x1b' holds .*, so no row can be chosen by it"):
            open_source(f"{folder}/x.parquet?odd\x1b=1")


def test_a_name_with_a_dot(folder, monkeypatch):
    pq.write_table(
        table(range(8)).rename_columns(["img.png", "label", "split"]), folder / "x.parquet", row_group_size=4
    )
    monkeypatch.setattr(parquet, "MOST_BYTES", 6000)
    source = open_source(f"{folder}/x.parquet?image=img.png")
    assert source.window == 1  # without the sizes of its groups it would be all
    assert [source.content(i) for i in range(8)] == [png(i) for i in range(8)]


def test_equal_images_that_take_little_in_the_file(folder, monkeypatch):
    """A dictionary holds the image once, and the memory would hold it 400 times."""
    image = np.random.default_rng(0).bytes(50_000)
    pq.write_table(pa.table({"image": [image] * 400}), folder / "x.parquet", row_group_size=200)
    assert (folder / "x.parquet").stat().st_size < 10 * len(image)
    monkeypatch.setattr(parquet, "MOST_BYTES", 15_000_000)
    source = open_source(f"{folder}/x.parquet")
    kept = next(cell.cell_contents for cell in source.content.__closure__ if hasattr(cell.cell_contents, "kept")).kept
    assert [source.content(0), source.content(399)] == [image] * 2
    assert list(kept) == [1]  # each has 10 MB
    monkeypatch.setattr(parquet, "_MOST_GROUP", 5_000_000)
    with pytest.raises(BadImage, match=r"too_large: its row group has more than 0.00466 GiB of images"):
        open_source(f"{folder}/x.parquet").content(0)


def test_remote_errors_that_pass(folder, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/x.parquet", (folder / "train-00000-of-00002.parquet").read_bytes())
    real, failures = type(memory).cat_file, [RuntimeError("throttled")]

    def cat_file(self, *arguments, **settings):
        if failures:
            raise failures.pop()
        return real(self, *arguments, **settings)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    source = open_source("memory://set/x.parquet")
    assert failures == []
    failures += [RuntimeError("throttled")] * 2
    assert source.content(9) == png(9)
    failures += [RuntimeError("throttled")] * 3
    with pytest.raises(BadImage, match="unreadable: throttled"):
        source.content(29)
    failures += [RuntimeError("throttled")] * 3
    with pytest.raises(InputError, match=r"x.parquet is not a readable parquet file: throttled"):
        open_source("memory://set/x.parquet")
    memory.store.clear()
