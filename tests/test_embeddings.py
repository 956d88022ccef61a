"""Files of embeddings: what is written is read, and what is wrong is noticed."""

import binascii
import csv
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nnclr import embeddings
from nnclr.embeddings import header_of, open_embeddings, write_embeddings
from nnclr.errors import InputError, StorageError

NAMES = ["a/1.png", 'a/with, "both".png', "b/ünï.png", "b/\\x41.png"]


def content(n=4, d=5, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    names = [*NAMES, *(f"c/{i}.png" for i in range(n))][:n]
    return rng.normal(size=(n, d)).astype(dtype), np.arange(n) * 3 + 1, names


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip(tmp_path, name, dtype):
    vectors, ids, names = content(dtype=dtype)
    facts = {"encoder": "timm:x", "preprocessing": {"mean": [0.1, 0.2, 0.3]}, "data": None}
    write_embeddings(tmp_path / name, vectors, ids, names, np.array([1, 0, -1, 1]), ["first", "second"], facts)
    read = open_embeddings(tmp_path / name, verify=True)
    assert read.vectors.dtype == dtype
    assert np.array_equal(read.vectors, vectors)
    assert isinstance(read.vectors, np.memmap) == (name == "e.npy")
    assert (read.ids.dtype, read.ids.tolist(), list(read.names)) == (np.int64, ids.tolist(), names)
    assert (read.labels.tolist(), read.class_names) == ([1, 0, -1, 1], ("first", "second"))
    assert [read.label_name(i) for i in range(4)] == ["second", "first", "", "second"]
    assert (read.facts, len(read)) == (facts, 4)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_without_labels_and_facts(tmp_path, name):
    vectors, ids, names = content()
    write_embeddings(tmp_path / name, vectors, ids, names)
    read = open_embeddings(tmp_path / name)
    assert (read.labels, read.class_names, read.facts, read.label_name(0)) == (None, None, {}, "")


def test_the_parquet_as_other_programs_see_it(tmp_path):
    """Columns, types and checksums with pyarrow and binascii alone."""
    vectors, ids, names = content(dtype="float16")
    write_embeddings(tmp_path / "e.parquet", vectors, ids, names, np.array([0, 0, 1, -1]), ["x", "y"], {"encoder": "E"})
    table = pq.read_table(tmp_path / "e.parquet", use_threads=False)
    kinds = {"id": pa.int64(), "path": pa.string(), "label": pa.string(), "checksum": pa.uint32()}
    assert {name: table.schema.field(name).type for name in kinds} == kinds
    assert table.column_names == ["id", "path", "label", "embedding", "checksum"]
    assert pa.types.is_fixed_size_list(table.schema.field("embedding").type)
    assert (table.schema.field("embedding").type.list_size, table["label"].to_pylist()) == (5, ["x", "x", "y", None])
    rows = np.array(table["embedding"].to_pylist(), np.float16)
    assert np.array_equal(rows, vectors)
    for i, path, row, checksum in zip(ids, names, rows, table["checksum"].to_pylist(), strict=True):
        assert checksum == binascii.crc32(struct.pack("<q", i) + path.encode() + struct.pack("<5e", *row))
    assert json.loads(table.schema.metadata[b"nnclr"]) == {"encoder": "E", "class_names": ["x", "y"], "format": 1}


def test_the_npy_as_other_programs_see_it(tmp_path):
    vectors, ids, names = content()
    write_embeddings(tmp_path / "e.npy", vectors, ids, names, np.array([0, 0, 1, -1]), ["x", "y"])
    assert np.array_equal(np.load(tmp_path / "e.npy"), vectors)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "e.ids.csv").read_text())))
    assert [(int(r["id"]), r["path"], r["label"]) for r in rows] == list(
        zip(ids.tolist(), names, ["x", "x", "y", ""], strict=True)
    )
    assert json.loads((tmp_path / "e.json").read_text())["class_names"] == ["x", "y"]


def test_names_that_could_harm_a_terminal_are_escaped(tmp_path):
    vectors, ids, _ = content(2)
    write_embeddings(tmp_path / "e.parquet", vectors, ids, ["a\x1b[2J\n", os.fsdecode(b"\xff.png")])
    assert list(open_embeddings(tmp_path / "e.parquet").names) == ["a\\x1b[2J\\n", "\\xff.png"]


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_every_flipped_bit_of_a_vector_is_noticed(tmp_path, name):
    vectors, ids, names = content(40, 7)
    write_embeddings(tmp_path / name, vectors, ids, names)
    good = (tmp_path / name).read_bytes()
    start = good.index(vectors.tobytes())
    rng = np.random.default_rng(1)
    for place in rng.integers(start, start + vectors.nbytes, 20):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(InputError, match=r"damaged: row|not finite"):
            open_embeddings(tmp_path / name)


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_two_rows_swapped(tmp_path, name):
    """Each vector is whole, but it is another image's."""
    vectors, ids, names = content(40, 7)
    write_embeddings(tmp_path / name, vectors, ids, names)
    swapped = vectors.copy()
    swapped[[3, 5]] = vectors[[5, 3]]
    good = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(good.replace(vectors.tobytes(), swapped.tobytes()))
    with pytest.raises(InputError, match="damaged: row 3 is not what was written"):
        open_embeddings(tmp_path / name)


def test_a_sample_of_checksums_or_all(tmp_path):
    vectors, ids, names = content(3000, 4)
    write_embeddings(tmp_path / "e.npy", vectors, ids, names)
    with open(tmp_path / "e.npy", "r+b") as file:
        file.seek(-4 * 4 * 2, os.SEEK_END)  # the row before the last is not in the sample of 1000
        file.write(np.float32(3).tobytes())
    assert len(open_embeddings(tmp_path / "e.npy")) == 3000
    with pytest.raises(InputError, match="damaged: row 2998"):
        open_embeddings(tmp_path / "e.npy", verify=True)


class Touch:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def hostile(kind, folder):
    """Files called .npy that are something else."""
    header = np.lib.format.header_data_from_array_1_0(np.zeros((2, 2), np.float32))
    out = io.BytesIO()
    if kind == "pickled objects":
        np.save(out, np.array([[Touch(folder / "ran")]], dtype=object), allow_pickle=True)
    elif kind == "a bare pickle":
        out.write(pickle.dumps(Touch(folder / "ran")))
    elif kind == "npz":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", bytes(10**7))
    elif kind in (
        "a trillion rows",
        "more than any address",
        "a negative shape",
        "integers",
        "records",
        "a row",
        "no rows",
    ):
        changed = {
            "a trillion rows": {"shape": (10**12, 64)},
            "more than any address": {"shape": (10**30, 2)},
            "a negative shape": {"shape": (-1, 2)},
            "integers": {"descr": "<i4"},
            "records": {"descr": [("x", "<f4"), ("y", "<f4")]},
            "a row": {"shape": (4,)},
            "no rows": {"shape": (0, 2)},
        }[kind]
        np.lib.format.write_array_header_1_0(out, {**header, **changed})
        out.write(bytes(64))
    elif kind == "a header of code":
        text = b"{'descr': __import__('os').system('touch ran'), 'fortran_order': False, 'shape': (2, 2)}\n"
        out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16))
    elif kind == "cut":
        np.save(out, np.ones((20, 20), np.float32))
        out.truncate(700)
    elif kind == "empty":
        pass
    else:
        out.write(b"this is no array")
    return out.getvalue()


KINDS = """pickled objects|a bare pickle|npz|a trillion rows|more than any address|a negative shape|integers|records|
a row|no rows|a header of code|cut|empty|text""".replace("\n", "").split("|")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_npy(tmp_path, kind, monkeypatch):
    """One sentence, nothing run, nothing allocated; F6 of the fault list."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.npy").write_bytes(hostile(kind, tmp_path))
    with pytest.raises(InputError, match=r"e\.npy (is not a readable|must hold \(n, d\))"):
        open_embeddings(tmp_path / "e.npy")
    assert not (tmp_path / "ran").exists()
    if kind == "pickled objects":  # the control: this one would have run
        np.load(tmp_path / "e.npy", allow_pickle=True)[0, 0].close()
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "twice", "not csv", "facts missing", "facts cut", "facts deep", "classes"]
)
def test_what_lies_beside_the_npy(tmp_path, damage):
    vectors, ids, names = content()
    write_embeddings(tmp_path / "e.npy", vectors, ids, names)
    table, facts = tmp_path / "e.ids.csv", tmp_path / "e.json"
    if damage in ("missing", "facts missing"):
        (table if damage == "missing" else facts).unlink()
    elif damage == "cut":
        table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    elif damage == "twice":
        table.write_text(table.read_text().replace("\n4,", "\n1,"))
    elif damage == "classes":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"class_names": 5}))
        assert header_of(tmp_path / "e.npy") == {}
    elif damage == "not csv":
        table.write_bytes(b"id,path,label,checksum\n1,\xff\xfe,x\n")
    else:
        facts.write_text(facts.read_text()[:10] if damage == "facts cut" else "[" * 100_000)
    with pytest.raises(InputError, match=r"e\.npy.*(missing|cannot be read|holds an id twice)"):
        open_embeddings(tmp_path / "e.npy")


def test_a_plain_npy(tmp_path):
    """Somebody's own vectors, also in double precision and big-endian."""
    vectors = content(6, 3)[0]
    for dtype in ("<f4", "<f2", "<f8", ">f4"):
        np.save(tmp_path / "v.npy", vectors.astype(dtype))
        read = open_embeddings(tmp_path / "v.npy")
        assert read.vectors.dtype == ("float16" if dtype == "<f2" else "float32")
        assert np.array_equal(read.vectors, vectors.astype(dtype).astype(read.vectors.dtype))
        assert (read.ids.tolist(), read.names[2][-7:], read.facts) == (list(range(6)), "v.npy#2", {})
    vectors[4, 1] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    with pytest.raises(InputError, match=r"row 4 of .* is not finite"):
        open_embeddings(tmp_path / "v.npy")


@pytest.mark.parametrize("kind", ["list of double", "large list", "fixed float", "fixed half"])
def test_parquet_of_another_program(tmp_path, kind):
    vectors = content(5000, 3)[0]
    value = {"list of double": pa.float64(), "fixed half": pa.float16()}.get(kind, pa.float32())
    types = {"large list": pa.large_list(value), "list of double": pa.list_(value)}
    rows = [list(row) for row in (vectors.astype(np.float16) if kind == "fixed half" else vectors)]
    columns = {
        "file_name": [f"{i}.jpg" for i in range(5000)],
        "label": [7 if i % 2 else 3 for i in range(5000)],
        "embedding": pa.array(rows, types.get(kind, pa.list_(value, 3))),
    }
    pq.write_table(pa.table(columns), tmp_path / "theirs.parquet")
    read = open_embeddings(tmp_path / "theirs.parquet", verify=True)
    assert np.array_equal(read.vectors, vectors.astype(np.float16) if kind == "fixed half" else vectors)
    assert (read.names[4999], read.ids[4999], read.facts) == ("4999.jpg", 4999, {})
    assert (read.class_names, read.labels[:3].tolist()) == (("3", "7"), [0, 1, 0])


def table_of(rows, kind=None, **columns):
    return pa.table({**columns, "embedding": pa.array(rows, kind)})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of([[1.0, 2.0], [3.0]]), "differ in length"),
        (table_of([[1.0, 2.0], None]), "differ in length"),
        (table_of([None, None], pa.list_(pa.float32())), "differ in length"),
        (table_of([[1.0, None]]), "row 0 of .* is not finite"),
        (table_of([[1.0, float("inf")]]), "row 0 of .* is not finite"),
        (table_of([["a", "b"]]), "holds list<.*>, not lists of float32"),
        (table_of([1.0, 2.0]), "holds double, not lists of float32"),
        (table_of([], pa.list_(pa.float32())), "holds no embeddings"),
        (table_of([[1.0], [2.0]], id=[5, 5]), "holds an id twice"),
        (pa.table({"vector": [[1.0]]}), "has no column 'embedding'; it has vector"),
        (table_of([[1.0]]).replace_schema_metadata({"nnclr": "{}"}), "its facts are not those of format 1"),
        (table_of([[1.0]]).replace_schema_metadata({"nnclr": "[" * 9999}), "is not a readable file of embeddings"),
    ],
)
def test_parquet_that_is_refused(tmp_path, table, message):
    pq.write_table(table, tmp_path / "e.parquet")
    with pytest.raises(InputError, match=message):
        open_embeddings(tmp_path / "e.parquet")


def test_parquet_cut_anywhere(tmp_path):
    vectors, ids, names = content(30, 9)
    write_embeddings(tmp_path / "e.parquet", vectors, ids, names)
    good = (tmp_path / "e.parquet").read_bytes()
    for length in np.linspace(0, len(good) - 1, 25).astype(int):
        (tmp_path / "e.parquet").write_bytes(good[:length])
        with pytest.raises(InputError, match="is not a readable file of embeddings"):
            open_embeddings(tmp_path / "e.parquet")


def test_more_than_the_memory_is_refused_before_it_is_taken(tmp_path, monkeypatch):
    write_embeddings(tmp_path / "e.parquet", *content())
    monkeypatch.setattr(embeddings.os, "sysconf", lambda name: 8)  # 64 bytes of memory for 80 of vectors
    monkeypatch.setattr(embeddings.np, "empty", lambda shape, dtype: np.zeros(shape, dtype) if 0 in shape else 1 / 0)
    with pytest.raises(InputError, match=r"of memory .*\.npy, which is read from the disk"):
        open_embeddings(tmp_path / "e.parquet")


def test_wrong_names_and_arrays(tmp_path):
    vectors, ids, names = content()
    for path, message in (("e.csv", "must end in .parquet or .npy"), ("no/e.npy", "a folder that exists")):
        with pytest.raises(InputError, match=message):
            write_embeddings(tmp_path / path, vectors, ids, names)
        with pytest.raises(InputError, match=r"must end in|does not exist"):
            open_embeddings(tmp_path / path)
    bad = vectors.copy()
    bad[2] = np.nan
    for arguments, message in (
        ((vectors.astype(float), ids, names), "float32 or float16, these are"),
        ((vectors[0], ids, names), "must be \\(n, d\\)"),
        ((vectors, ids[:3], names), "4 embeddings need 4 names"),
        ((vectors, ids * 0, names), "different whole numbers"),
        ((vectors, ids, names, np.array([0, 1, 2, 9]), ["x", "y", "z"]), "label 9 has no name"),
        ((bad, ids, names), "row 2 of the array is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            write_embeddings(tmp_path / "e.parquet", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name, monkeypatch):
    vectors, ids, names = content()
    write_embeddings(tmp_path / name, vectors, ids, names)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings, "sync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_embeddings(tmp_path / name, vectors + 1, ids, names)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
