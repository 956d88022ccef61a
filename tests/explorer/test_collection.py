import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nnclr import cli, explorer
from nnclr.data.source import open_source
from nnclr.embed import embed_to_file
from nnclr.embeddings import open_embeddings, write_embeddings
from nnclr.errors import InputError
from nnclr.explorer import atlas, collection, explore, projection
from nnclr.explorer.atlas import write_atlas
from nnclr.explorer.collection import open_collection
from nnclr.explorer.server import address_of, claim, thumbnail
from nnclr.pretrained import open_encoder
from tests.explorer.conftest import draw_folder


def quiet(line):
    pass


def opened(*paths, **options):
    return open_collection(list(paths), projection="pca", say=options.pop("say", quiet), **options)


def brute_force(vectors, query, k, leave_out=None):
    """Rows by cosine in float64."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    similarity = unit @ (query / np.linalg.norm(query))
    if leave_out is not None:
        similarity[leave_out] = -np.inf
    return np.argsort(-similarity, kind="stable")[:k]


def test_neighbours_are_those_of_brute_force_for_each_encoder(embedded, two):
    assert [side.name for side in two.sides] == ["pixels?size=8", "pixels?size=4"]
    for path, side in zip(("8.parquet", "4.parquet"), (0, 1), strict=True):
        vectors = open_embeddings(embedded / path).vectors
        for row in (0, 5, 41):
            similarities, rows = two.neighbours(row, 7)[side]
            assert rows.tolist() == brute_force(vectors, vectors[row].astype(np.float64), 7, row).tolist()
            assert (np.diff(similarities) <= 0).all()


def test_a_picture_of_the_collection_finds_itself(two):
    for row in (0, 20):
        for similarities, rows in two.search(two.picture(row), 3):
            assert rows[0] == row
            assert similarities[0] == pytest.approx(1, abs=1e-6)


def test_columns_are_labels_and_clusters(one, pictures_folder):
    assert [column.name for column in one.columns] == ["label", "cluster"]
    label = one.columns[0]
    for row in (0, 30):
        assert one.names[row].startswith(label.categories[label.codes[row]] + "/")
    assert one.notices == ()


def test_files_of_one_encoder_are_joined(embedded, tmp_path):
    other = draw_folder(tmp_path / "more", per_class=2, seed=5)
    embed_to_file(open_encoder("pixels?size=8"), str(other), tmp_path / "more.parquet", say=quiet)
    joined = opened(embedded / "8.parquet", tmp_path / "more.parquet")
    first = len(open_embeddings(embedded / "8.parquet"))
    assert len(joined) == first + 7
    file = next(column for column in joined.columns if column.name == "file")
    assert file.categories == ("8.parquet", "more.parquet")
    assert np.bincount(file.codes).tolist() == [first, 7]
    assert joined.names[first:] == open_embeddings(tmp_path / "more.parquet").names
    row = first + 3
    assert thumbnail(joined.picture(row), 96) == thumbnail(opened(tmp_path / "more.parquet").picture(3), 96)


def test_what_does_not_belong_together_is_refused(embedded, tmp_path):
    other = draw_folder(tmp_path / "more", per_class=2, seed=5)
    embed_to_file(open_encoder("pixels?size=4"), str(other), tmp_path / "more.parquet", say=quiet)
    embed_to_file(open_encoder("pixels?size=2"), str(other), tmp_path / "third.parquet", say=quiet)
    vectors = open_embeddings(embedded / "8.parquet").vectors
    write_embeddings(tmp_path / "plain.npy", vectors, np.arange(len(vectors)), ["x"] * len(vectors))
    good, four = embedded / "8.parquet", open_embeddings(embedded / "4.parquet")
    ids = four.ids + (four.ids == four.ids.max())  # the last row is another picture
    write_embeddings(tmp_path / "shifted.npy", four.vectors, ids, four.names, facts=four.facts)
    for paths, message in [
        ([good, tmp_path / "shifted.npy"], "different encoders and of different pictures"),
        ([], "needs a file"),
        ([good, tmp_path / "more.parquet"], "different encoders and of different pictures"),
        ([good, embedded / "4.parquet", tmp_path / "third.parquet"], "3 encoders"),
        ([good, good], "the same pictures by the same encoder"),
        ([good, tmp_path / "plain.npy"], "can only be explored alone"),
        ([tmp_path / "none.parquet"], "does not exist"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            opened(*paths)
        assert "\n" not in str(caught.value)


def test_pictures_that_changed_are_not_shown(tmp_path):
    folder = draw_folder(tmp_path / "root", per_class=2)
    path = tmp_path / "e.parquet"
    embed_to_file(open_encoder("pixels?size=4"), str(folder), path, say=quiet)
    Image.new("RGB", (90, 90)).save(folder / "ant" / "added.png")
    said = []
    shown = opened(path, say=said.append)
    assert shown.sources == (None,)
    assert "is not the data that was embedded" in shown.notices[0]
    assert said == list(shown.notices)
    (folder / "ant" / "added.png").unlink()
    os.rename(folder, tmp_path / "moved")
    assert "does not exist" in opened(path).notices[0]
    assert opened(path, data=str(tmp_path / "moved")).notices == ()


@pytest.mark.parametrize(
    ("ids", "shown"), [([0, 1, 2], True), ([1, 2, 3], False), ([-1, 1, 2], False), ([2, 1, 0], False)]
)
def test_ids_of_a_file_that_is_not_ours_must_count_these_pictures(tmp_path, ids, shown):
    folder = draw_folder(tmp_path / "root", per_class=2)
    source = open_source(str(folder))
    path = tmp_path / "theirs.parquet"
    write_embeddings(path, np.eye(3, dtype=np.float32), np.array(ids), [source.describe(i) for i in range(3)])
    found = opened(path, data=str(folder))
    assert (found.sources[0] is not None) == shown
    assert bool(found.notices and "is not the data" in found.notices[0]) != shown


def test_search_needs_the_encoder_itself(embedded, tmp_path):
    file = open_embeddings(embedded / "8.parquet")
    path = tmp_path / "e.parquet"
    for facts, asked, message in [
        ({"encoder": None}, None, "had no name"),
        ({"encoder": "pixels?size=16"}, None, "is not the encoder that made"),
        ({"encoder": "/no/such/run"}, None, "no encoder is called"),
        ({"encoder": None}, "random:small-convnet?size=8", "is not the encoder that made"),
        ({"preprocessing": {}}, None, "preprocessing differ"),
        ({"encoder": None}, "pixels?size=8", None),
    ]:
        write_embeddings(path, file.vectors, file.ids, file.names, facts={**file.facts, **facts})
        shown = opened(path, encoder=asked)
        if message is None:
            assert shown.notices == ()
            continue
        assert shown.sides[0].encoder is None
        assert message in shown.notices[0]
        assert shown.search(shown.picture(0), 3) == [None]


def test_an_encoder_that_is_not_used_is_told_of(embedded):
    """On the terminal and on the page; not where it made one of two files."""
    both = [embedded / "8.parquet", embedded / "4.parquet"]
    for paths, asked, wrong in (
        (both[:1], "pixels?size=8", None),
        (both[:1], "pixels?size=4", "8.parquet: its preprocessing differ"),
        (both[:1], "random:small-convnet?size=8", "8.parquet: its weights differ"),
        (both, "pixels?size=4", None),
        (both, "pixels?size=8", None),
        (both, "random:small-convnet?size=8", "8.parquet: its weights differ"),
        (both[:1], "/no/such/run", "no encoder is called '/no/such/run'"),
    ):
        said = []
        shown = opened(*paths, encoder=asked, say=said.append)
        assert said == list(shown.notices)
        assert None not in [side.encoder for side in shown.sides]  # those that the files name
        if wrong is None:
            assert said == []
        else:
            assert len(said) == 1
            assert said[0].startswith("--encoder is not used: ")
            assert wrong in said[0]


def test_what_takes_long_is_said_before_it_begins(embedded, tmp_path, monkeypatch):
    pytest.importorskip("umap")
    said, before = [], []

    def stand_in(vectors):
        before.extend(said)
        return vectors[:, :2]

    monkeypatch.setattr(projection, "_umap", stand_in)
    path = shutil.copy(embedded / "8.parquet", tmp_path)
    open_collection([path], encoder="pixels?size=4", say=said.append)
    assert before[0].startswith("--encoder is not used")
    assert before[1:] == [
        "computing the map of 43 pictures by UMAP; it is done once, and takes about half a minute more while UMAP is "
        "compiled"
    ]
    said.clear()
    before.clear()
    open_collection([path], say=said.append)  # the map is there
    assert (said, before) == ([], [])


def test_atlas_refuses_flags_of_the_page(embedded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(explorer, "write_atlas", lambda *_, **__: (tmp_path / "written").touch())
    command = ["explore", str(embedded / "8.parquet"), "--atlas", str(tmp_path / "a.parquet")]
    for flags in ("--encoder x", "--host ::1", "--port 9999", f"--token {'t' * 20}", "--no-browser"):
        assert cli.main([*command, *flags.split()]) == 2
        said = f"--atlas writes a file and serves no page, on which {flags.split()[0]} has an effect; leave it out"
        assert capsys.readouterr().err == f"nnclr: {said}\n"
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--data", "x", "--projection", "pca"]) == 0  # the control
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_other_weights_are_another_encoder(pictures_folder, tmp_path):
    untrained = "random:small-convnet?size=8&seed={}"
    embed_to_file(open_encoder(untrained.format(0)), str(pictures_folder), tmp_path / "e.npy", say=quiet)
    file = open_embeddings(tmp_path / "e.npy")
    for seed, right in ((0, True), (1, False)):
        facts = {**file.facts, "encoder": untrained.format(seed)}
        write_embeddings(tmp_path / "f.npy", file.vectors, file.ids, file.names, facts=facts)
        assert (opened(tmp_path / "f.npy").sides[0].encoder is not None) == right


def test_thumbnails_fit_and_small_pictures_stay_as_they_are():
    wide = np.zeros((100, 4000, 3), np.uint8)
    sizes = [Image.open(io.BytesIO(thumbnail(pixels, 96))).size for pixels in (wide, wide[:20, :30])]
    assert sizes == [(96, 2), (30, 20)]


def test_ports_and_hosts(embedded):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} is in use.*--port"):
            explore([embedded / "8.parquet"], port=port, open_browser=False, say=quiet)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(InputError, match="a --token is needed"):
            claim(host, 0, None)
    with pytest.raises(InputError, match="at least 16"):
        claim("0.0.0.0", 0, "short")
    with pytest.raises(InputError, match="at least 16"):
        claim("127.0.0.1", 0, "sixteen letters; but not of these")
    with pytest.raises(InputError, match="cannot be listened on"):
        claim("no.such.host.invalid", 0, None)
    opened_sockets = claim("localhost", 0, None)
    ports = {one.getsockname()[1] for one in opened_sockets}
    assert len(ports) == 1
    assert re.fullmatch(r"http://localhost:\d+/", address_of("localhost", opened_sockets[0], None))
    for one in opened_sockets:
        one.close()


def test_nobody_connects_before_the_map_is_ready(embedded, monkeypatch):
    """The port is ours from the beginning, and closed; when its address is said, it answers."""
    seen = []
    real = collection.open_collection

    def connected(port):
        with socket.socket() as visitor:
            return visitor.connect_ex(("127.0.0.1", port)) == 0

    def watched(*arguments):
        seen.append(connected(port))
        with pytest.raises(InputError, match=f"port {port} is in use"):
            claim("127.0.0.1", port, None)
        return real(*arguments)

    def said(text):
        if "pictures at" in text:
            seen.append(connected(port))
            raise KeyboardInterrupt

    (free,) = claim("127.0.0.1", 0, None)
    port = free.getsockname()[1]
    free.close()
    monkeypatch.setattr(collection, "open_collection", watched)
    for _ in range(2):  # the second while the first's connections end
        explore([embedded / "8.parquet"], port=port, projection="pca", open_browser=False, say=said)
    assert seen == [False, True] * 2


@pytest.mark.parametrize("early", [False, True])
def test_ctrl_c_ends_quietly(embedded, early):
    """Also where it comes before the server looks after signals: then its coroutine would never be awaited."""
    before = "import signal, uvicorn; real = uvicorn.Server.serve\n"
    before += "def serve(self, sockets=None):\n"
    before += "    coroutine = real(self, sockets); signal.raise_signal(signal.SIGINT); return coroutine\n"
    before += "uvicorn.Server.serve = serve\n"
    code = (before if early else "") + (
        "import sys; from nnclr.explorer import explore; "
        "explore(sys.argv[1:], port=0, projection='pca', open_browser=False, say=lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, embedded / "8.parquet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "pictures at http://127.0.0.1:" in process.stdout.readline()
    if not early:
        process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out, errors) == (0, "explorer ended\n", "")


def test_atlas_holds_pictures_places_and_true_neighbours(embedded, one, tmp_path):
    import pyarrow.parquet as pq

    said = []
    write_atlas(embedded / "8.parquet", tmp_path / "atlas.parquet", projection="pca", k=5, say=said.append)
    assert said[-1].endswith("atlas.parquet --image image --x x --y y --neighbors neighbors")
    assert [path.name for path in tmp_path.iterdir()] == ["atlas.parquet"]
    rows = pq.read_table(tmp_path / "atlas.parquet").to_pylist()
    assert [row["path"] for row in rows] == list(one.names)
    np.testing.assert_array_equal([[row["x"], row["y"]] for row in rows], one.sides[0].projection.points)
    vectors = open_embeddings(embedded / "8.parquet").vectors.astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in (0, 17):
        assert rows[i]["neighbors"]["ids"] == brute_force(vectors, vectors[i], 5, i).tolist()
        np.testing.assert_allclose(
            rows[i]["neighbors"]["distances"], 1 - unit[rows[i]["neighbors"]["ids"]] @ unit[i], atol=1e-6
        )
        assert Image.open(io.BytesIO(rows[i]["image"]["bytes"])).size == (24, 24)
        assert rows[i]["label"] == one.columns[0].categories[one.columns[0].codes[i]]


def test_atlas_refuses_what_it_would_destroy(embedded, tmp_path, monkeypatch):
    before = (embedded / "8.parquet").read_bytes()
    with pytest.raises(InputError, match="is the file of embeddings itself"):
        write_atlas(embedded / "8.parquet", embedded / "8.parquet")
    assert (embedded / "8.parquet").read_bytes() == before
    (tmp_path / "there.parquet").write_bytes(b"kept")
    shutil.copy(embedded / "8.parquet", tmp_path / "other.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(atlas, "open_collection", None)  # which may take minutes: nothing of it has begun
        for name in ("there.parquet", "other.parquet"):
            kept = (tmp_path / name).read_bytes()
            with pytest.raises(InputError, match=f"{name} exists and is no atlas of nnclr; choose another name"):
                write_atlas(embedded / "8.parquet", tmp_path / name)
            assert (tmp_path / name).read_bytes() == kept
        patch.setattr(atlas.os, "access", lambda path, mode: False)
        with pytest.raises(InputError, match="not yours to write in"):
            write_atlas(embedded / "8.parquet", tmp_path / "new.parquet")
    for _ in range(2):  # the control: an earlier atlas is replaced
        write_atlas(embedded / "8.parquet", tmp_path / "atlas.parquet", projection="pca", say=str)
    with pytest.raises(InputError, match="does not exist"):
        write_atlas(tmp_path / "mistyped.parquet", tmp_path / "atlas.parquet")
    with pytest.raises(InputError, match="in a folder that exists"):
        write_atlas(embedded / "8.parquet", tmp_path / "no" / "x.parquet")
