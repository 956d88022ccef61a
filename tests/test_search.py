"""`nnclr search`: questions to a file of embeddings, and how the answers look."""

import csv
import io
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from nnclr import cli, search
from nnclr.embed import embed_to_file
from nnclr.embeddings import open_embeddings, write_embeddings
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.neighbours import label_hints, near_duplicates
from nnclr.pretrained import open_encoder
from nnclr.search import run_search, search_file


def quiet(text):
    pass


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("random:small-convnet?size=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder):
    """40 pictures of two classes, one unreadable, one twice, one in the wrong class; and their embeddings."""
    root = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    colours = {"blue": (20, 60, 200), "red": (200, 40, 30)}
    for i in range(40):
        name = sorted(colours)[i % 2]
        (root / "photos" / name).mkdir(parents=True, exist_ok=True)
        shown = "blue" if i == 11 else name
        pixels = np.clip(np.array(colours[shown]) + rng.integers(-60, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "photos" / name / f"{i:02d}.png")
    (root / "photos/blue/06.png").write_bytes(b"broken")
    (root / "photos/red/39.png").write_bytes((root / "photos/red/05.png").read_bytes())
    embed_to_file(encoder, root / "photos", root / "e.parquet", say=quiet)
    return root


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected(opened, query, k, without=()):
    """Ids and similarities by brute force."""
    scores = (unit(opened.vectors) @ unit(query)).astype(np.float32)
    order = [i for i in np.argsort(-scores, kind="stable") if opened.ids[i] not in without][:k]
    return opened.ids[order].tolist(), scores[order]


def compare(found, ids, similarities):
    assert [one.id for one in found] == ids
    np.testing.assert_allclose([one.similarity for one in found], similarities, atol=2e-6)
    assert [one.rank for one in found] == list(range(1, len(ids) + 1))


def test_a_picture_finds_itself_and_then_what_brute_force_finds(folder, encoder):
    opened = open_embeddings(folder / "e.parquet")
    query = folder / "photos/blue/08.png"
    found = search_file(folder / "e.parquet", [query], k=7, say=quiet)
    assert (found[0].path, found[0].label, found[0].query) == ("blue/08.png", "blue", str(query))
    assert found[0].similarity == pytest.approx(1, abs=1e-6)
    vector = encoder.embed(np.array(Image.open(query))[None])[0]
    compare(found, *expected(opened, vector, 7))


def test_several_pictures_and_ids_one_after_the_other(folder, encoder):
    opened = open_embeddings(folder / "e.parquet")
    pictures = [folder / "photos/red/01.png", folder / "photos/blue/02.png"]
    found = search_file(folder / "e.parquet", pictures, [0, 39], k=4, say=quiet)
    names = [*map(str, pictures), "id 0", "id 39"]
    assert [one.query for one in found] == [name for name in names for _ in range(4)]
    for number, picture in enumerate(pictures):
        vector = encoder.embed(np.array(Image.open(picture))[None])[0]
        compare(found[4 * number : 4 * number + 4], *expected(opened, vector, 4))
    for start, i in ((8, 0), (12, 39)):
        vector = opened.vectors[opened.ids.tolist().index(i)]
        compare(found[start : start + 4], *expected(opened, vector, 4, without=[i]))


def test_ids_have_gaps_where_pictures_could_not_be_read(folder):
    opened = open_embeddings(folder / "e.parquet")
    assert 3 not in opened.ids  # blue/06.png
    assert search_file(folder / "e.parquet", ids=[4], k=1)[0].query == "id 4"
    assert opened.names[opened.ids.tolist().index(4)] == "blue/08.png"
    for wrong in (3, 40, -1, 10**12, 10**20, -(10**20)):
        with pytest.raises(InputError, match=rf"has no id {wrong}; its 39 ids go from 0 to 39"):
            search_file(folder / "e.parquet", ids=[wrong])


def test_ids_in_any_order(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    ids = np.random.default_rng(1).permutation(50) * 7
    write_embeddings(tmp_path / "e.npy", vectors, ids, [f"p{i}" for i in ids])
    for i in (0, 7, 343):
        found = search_file(tmp_path / "e.npy", ids=[i], k=3)
        compare(found, *expected(open_embeddings(tmp_path / "e.npy"), vectors[ids.tolist().index(i)], 3, without=[i]))
        assert [one.path for one in found] == [f"p{one.id}" for one in found]


def test_together_is_the_mean_of_the_directions(folder, encoder):
    opened = open_embeddings(folder / "e.parquet")
    picture = folder / "photos/red/01.png"
    found = search_file(folder / "e.parquet", [picture], [2, 30], k=5, together=True, say=quiet)
    rows = [opened.ids.tolist().index(i) for i in (2, 30)]
    vector = encoder.embed(np.array(Image.open(picture))[None])[0]
    vectors = [vector * 1000, *opened.vectors[rows]]  # the length does not count
    compare(found, *expected(opened, unit(vectors).mean(axis=0), 5, without=[2, 30]))
    assert {one.query for one in found} == {f"{picture} + id 2 + id 30"}
    assert len(search_file(folder / "e.parquet", ids=[2, 2, 30], k=100, together=True)) == 37


def test_the_approximate_index_is_kept_beside_the_file(folder):
    pytest.importorskip("faiss")
    said = []
    exact = search_file(folder / "e.parquet", ids=[5], k=3)
    for made in ("built", "read from"):
        assert search_file(folder / "e.parquet", ids=[5], k=3, approximate=True, say=said.append) == exact
        assert said.pop() == (
            f"approximate index {made} {folder}/e.parquet.faiss: it finds 100.0 % of the 10 true neighbours"
        )


def test_more_neighbours_than_rows_are_told_of(folder, tmp_path):
    """All rows are found, as by `NeighbourIndex`, and it is not a secret."""
    said = []
    for question, most in (
        ({"ids": [5]}, 38),
        ({"ids": [5, 7]}, 38),
        ({"ids": [5, 5, 7], "together": True}, 37),
        ({"pictures": [folder / "photos/blue/08.png"]}, 39),
        ({"pictures": [folder / "photos/blue/08.png"], "ids": [5]}, 38),
    ):
        search_file(folder / "e.parquet", **question, k=most, say=said.append)
        assert said == []
        search_file(folder / "e.parquet", **question, k=most + 1, say=said.append)
        line = f"{folder}/e.parquet has {most} rows to find, fewer than -k {most + 1}: all of them are used"
        assert said == [line]
        said.clear()
    run_search(folder / "e.parquet", label_hints=True, k=38, say=said.append)
    assert said == []
    run_search(folder / "e.parquet", label_hints=True, k=99, say=said.append)
    assert "has 38 rows to find, fewer than -k 99" in said[0]
    with pytest.raises(InputError, match="at least one neighbour"):
        run_search(folder / "e.parquet", label_hints=True, k=0)


def test_many_rows_are_told_of_the_approximate_index(folder, monkeypatch):
    said = []
    search_file(folder / "e.parquet", ids=[5], say=said.append)
    monkeypatch.setattr(search, "MANY", 38)
    search_file(folder / "e.parquet", ids=[5], say=said.append)
    assert said == ["comparing with all 39 rows; --approximate is faster, once its index is built"]


def test_only_the_encoder_that_made_the_file(folder, encoder, tmp_path):
    query = [folder / "photos/blue/08.png"]
    search_file(folder / "e.parquet", query, encoder="random:small-convnet?size=16&seed=0", say=quiet)
    with pytest.raises(InputError, match="seed=1 has other weights than those that made"):
        search_file(folder / "e.parquet", query, encoder="random:small-convnet?size=16&seed=1")
    cropped = Encoder(encoder.module, 16, provenance=encoder.provenance, crop_pct=0.5)
    with pytest.raises(InputError, match="another image size, crop or normalisation"):
        search_file(folder / "e.parquet", query, encoder=cropped)


def test_embeddings_of_another_program(folder, encoder, tmp_path):
    opened = open_embeddings(folder / "e.parquet")
    np.save(tmp_path / "v.npy", opened.vectors)
    query = [folder / "photos/blue/08.png"]
    with pytest.raises(InputError, match="does not say which encoder made it; name it by --encoder, or ask by --id"):
        search_file(tmp_path / "v.npy", query)
    said = []
    found = search_file(tmp_path / "v.npy", query, k=2, encoder=encoder, say=said.append)
    assert (found[0].path.endswith("v.npy#3"), found[0].label) == (True, "")
    assert "answers make sense only if it was this one" in said[0]
    with pytest.raises(InputError, match="use one encoder for both"):
        search_file(tmp_path / "v.npy", query, encoder="pixels?size=16", say=quiet)
    write_embeddings(tmp_path / "odd.npy", opened.vectors, opened.ids, opened.names, facts={"encoder": ["rm"]})
    with pytest.raises(InputError, match="does not say which encoder"):
        search_file(tmp_path / "odd.npy", query)


@pytest.mark.parametrize(("content", "reason"), [(b"x", "not an image"), (b"", "not an image"), (None, "unreadable")])
def test_a_query_that_is_no_picture(folder, tmp_path, content, reason):
    if content is not None:
        (tmp_path / "q.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"q\.png cannot be used as a query: {reason}"):
        search_file(folder / "e.parquet", [tmp_path / "q.png"])


def test_table_and_csv_of_answers(folder, tmp_path):
    text = run_search(folder / "e.parquet", ids=[0, 39], k=3, out=tmp_path / "found.csv", say=quiet)
    found = search_file(folder / "e.parquet", ids=[0, 39], k=3)
    lines = text.splitlines()
    assert lines[0] == "id 0"
    assert lines[1].split() == ["rank", "similarity", "id", "label", "path"]
    shown = [line.split() for line in (*lines[2:5], *lines[8:11])]
    assert shown == [[str(f.rank), f"{f.similarity:.4f}", str(f.id), f.label, f.path] for f in found]
    assert lines[-1] == f"all of it: {tmp_path}/found.csv"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert list(rows[0]) == ["query", "rank", "id", "path", "label", "similarity"]
    assert [(r["query"], int(r["rank"]), int(r["id"]), r["path"], r["label"]) for r in rows] == [
        (f.query, f.rank, f.id, f.path, f.label) for f in found
    ]
    assert [float(r["similarity"]) for r in rows] == [f.similarity for f in found]


def test_duplicates(folder, tmp_path):
    opened = open_embeddings(folder / "e.parquet")
    text = run_search(folder / "e.parquet", duplicates=1.0, out=tmp_path / "d.csv", say=quiet)
    lines = text.splitlines()
    assert lines[0] == (
        "at least 1 similar: 1 of all pairs, 2 of 39 rows, in groups: 1; one of each group kept, 1 would go"
    )
    assert [line.split() for line in lines[2:4]] == [
        ["1", "1.0000", "22", "red", "red/05.png"],
        ["1", "1.0000", "39", "red", "red/39.png"],
    ]
    assert (tmp_path / "d.csv").read_text() == (
        "group,id,path,label,other_id,other_path,other_label,similarity\n1,22,red/05.png,red,39,red/39.png,red,1.0\n"
    )
    run_search(folder / "e.parquet", duplicates=0.99, out=tmp_path / "d.csv", say=quiet)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "d.csv").read_text())))
    found = near_duplicates(opened.vectors, 0.99)
    assert len(found.pairs) > 5
    assert [[int(r["id"]), int(r["other_id"])] for r in rows] == opened.ids[found.pairs].tolist()
    for row in rows:
        group = found.groups[int(row["group"]) - 1]
        assert {int(row["id"]), int(row["other_id"])} <= set(opened.ids[group].tolist())
    assert run_search(folder / "e.parquet", ids=[22], k=1).splitlines()[2].split()[1] == "1.0000"


def test_hints(folder, tmp_path):
    opened = open_embeddings(folder / "e.parquet")
    text = run_search(folder / "e.parquet", label_hints=True, out=tmp_path / "h.csv", say=quiet)
    found = label_hints(opened.vectors, opened.labels)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "h.csv").read_text())))
    assert [int(r["id"]) for r in rows] == opened.ids[found.rows].tolist()
    assert [float(r["share"]) for r in rows] == found.share.tolist()
    assert (rows[0]["path"], rows[0]["label"], rows[0]["suggested"]) == ("red/11.png", "red", "blue")
    assert text.splitlines()[0] == f"{len(rows)} of 39 rows have neighbours of another label: mistakes, or hard cases"
    assert text.splitlines()[2].split() == ["100", "%", "0", "%", rows[0]["id"], "red", "blue", "red/11.png"]


def test_nothing_found(tmp_path):
    write_embeddings(tmp_path / "e.npy", np.eye(4, dtype=np.float32)[:3], np.arange(3), list("abc"), np.zeros(3, int))
    assert run_search(tmp_path / "e.npy", duplicates=0.9) == "no two of 3 are at least 0.9 similar"
    assert run_search(tmp_path / "e.npy", label_hints=True) == "the neighbours of all 3 rows agree with their labels"
    write_embeddings(tmp_path / "one.npy", np.eye(4, dtype=np.float32)[:1], np.arange(1), ["a"])
    assert run_search(tmp_path / "one.npy", ids=[0]) == "nothing found: there is no other row"
    with pytest.raises(InputError, match=r"one\.npy has no labels, so none can be wrong"):
        run_search(tmp_path / "one.npy", label_hints=True)


def test_a_long_table_is_cut_and_the_file_is_not(tmp_path):
    vectors = np.ones((90, 3), np.float32)
    write_embeddings(tmp_path / "e.npy", vectors, np.arange(90), [f"p{i}" for i in range(90)])
    text = run_search(tmp_path / "e.npy", ids=[0], k=89, out=tmp_path / "all.csv")
    assert text.splitlines()[-2] == "... and 39 more: --out FILE.csv lists all"
    assert text.splitlines()[1].split() == ["rank", "similarity", "id", "path"]  # nothing has a label
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 90


def test_columns_are_under_each_other(tmp_path):
    write_embeddings(
        tmp_path / "e.npy", np.ones((12, 3), np.float32), np.arange(12) * 1000, [f"p{i}" for i in range(12)]
    )
    lines = run_search(tmp_path / "e.npy", ids=[0], k=11).splitlines()[1:]
    assert len({line.index("p") for line in lines[1:]}) == 1
    assert lines[1].index("1000") == lines[10].index("10000") + 1


def cells(text):
    """Columns of a terminal that a text takes, by the Unicode tables that come with Python."""
    return sum((unicodedata.east_asian_width(c) in "WF") + 1 for c in text if not unicodedata.combining(c))


NAMES = [
    "holiday/2024/a very long name of a picture as cameras and people give them, part 1 of 2.png",
    "holiday/2024/a very long name of a picture as cameras and people give them, part 2 of 2.png",
    "旅行/" + "東京の写真" * 12 + "一.png",
    "旅行/" + "東京の写真" * 12 + "二.png",
    "short.png",
]


def long_names(tmp_path, capsys, monkeypatch, terminal, columns):
    labels = np.array([0, 0, 1, 1, 2])
    classes = ["a class whose name is quite long as well, as in ImageNet", "東京", "c"]
    write_embeddings(tmp_path / "e.npy", np.ones((5, 3), np.float32), np.arange(5), NAMES, labels, classes)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert cli.main(["search", str(tmp_path / "e.npy"), "--id", "4", "-k", "4"]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [60, 79, 80, 120])
def test_long_names_lose_their_middle_on_a_terminal(tmp_path, capsys, monkeypatch, columns):
    lines = long_names(tmp_path, capsys, monkeypatch, True, columns)[2:]
    assert len(lines) == 4
    assert max(map(cells, lines)) <= columns
    assert min(map(cells, lines)) >= columns - 4  # no room is wasted, but for what a wide letter needs
    assert [line[-len("1 of 2.png") :] for line in lines[:2]] == ["1 of 2.png", "2 of 2.png"]
    assert [line[-5:] for line in lines[2:]] == ["一.png", "二.png"]
    starts = [min(line.rindex(start) for start in ("hol", "旅") if start in line) for line in lines]
    assert len({cells(line[:start]) for line, start in zip(lines, starts, strict=True)}) == 1
    assert all("…" in line[start:] for line, start in zip(lines, starts, strict=True))


def test_names_are_whole_where_no_terminal_is(tmp_path, capsys, monkeypatch):
    for terminal, columns in ((False, 60), (True, 300)):
        lines = long_names(tmp_path, capsys, monkeypatch, terminal, columns)[2:]
        assert [line.endswith(f"  {name}") for line, name in zip(lines, NAMES, strict=False)] == [True] * 4


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "ask for one thing"),
        ({"ids": [1], "label_hints": True}, "ask for one thing"),
        ({"duplicates": 0.9, "label_hints": True}, "ask for one thing"),
        ({"duplicates": 0.9, "approximate": True}, "compares all pairs"),
        ({"duplicates": 1.5}, "above 0 and at most 1"),
        ({"ids": [1], "k": 0}, "at least one neighbour"),
        ({"ids": [1], "out": "found.txt"}, "must be a .csv file"),
        ({"ids": [1], "out": "no/found.csv"}, "a folder that exists"),
        ({"ids": [1], "out": "e.ids.csv"}, "belongs to the embeddings"),
        ({"ids": [1], "out": "e.parquet.skipped.csv"}, "belongs to the embeddings"),
    ],
)
def test_questions_that_make_no_sense(folder, question, message, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match=message):
        run_search("e.parquet", **question)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_search_file_needs_a_question(folder):
    with pytest.raises(InputError, match="name a picture or an id"):
        search_file(folder / "e.parquet")


def test_pictures_of_any_name_and_mode(folder, tmp_path):
    """Bytes that are no UTF-8 in the name, transparency, 16 bit: read as the embedded ones are."""
    odd = tmp_path / "q\udcff\x1b.png"
    Image.fromarray(np.full((9, 30), 30000, np.uint16)).save(odd)
    Image.new("RGBA", (30, 9), (255, 0, 0, 90)).save(tmp_path / "r.png")
    found = search_file(folder / "e.parquet", [odd, tmp_path / "r.png"], k=1, say=quiet)
    assert found[0].query.endswith("q\\xff\\x1b.png")
    assert len(found) == 2
