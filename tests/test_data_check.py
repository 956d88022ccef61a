"""A folder with planted faults, and what is said of it."""

import io
import json
import os
import time

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from nnclr import cli, data_check
from nnclr.data import shards
from nnclr.data_check import check_data, in_words
from nnclr.errors import InputError
from nnclr.pack import pack


def picture(i, width=40, height=40):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path):
    """50 good pictures of two classes, and one fault of each kind."""
    root = tmp_path / "photos"
    for i in range(50):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i:02d}.png")
    return root


def plant(root):
    whole = (root / "a/00.png").read_bytes()
    (root / "a/empty.png").write_bytes(b"")
    (root / "a/page.jpg").write_text("<html>")
    (root / "b/cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "a/copy.png").write_bytes(whole)
    (root / "b/copy.png").write_bytes(whole)
    (root / "b/again.png").write_bytes((root / "b/01.png").read_bytes())
    picture(60).convert("CMYK").save(root / "a/cmyk.jpg")
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(root / "a/deep.png")
    picture(61, 20, 18).save(root / "a/tiny.png")
    picture(62, 700, 33).save(root / "b/long.png")
    picture(63).save(root / "b/moving.gif", save_all=True, append_images=[picture(64)])
    os.symlink("/etc/passwd", root / "a/link.png")


def test_planted_faults_are_found(photos, tmp_path):
    plant(photos)
    report = check_data(str(photos), tmp_path / "report.json", say=lambda _: None)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 61
    assert report["left_out"] == {"link out of the folder": 1}
    assert report["left_out_first"] == {"link out of the folder": ["a/link.png"]}
    assert report["unreadable"]["count"] == 3
    assert report["unreadable"]["reasons"] == {"not_an_image": 2, "truncated": 1}
    assert report["unreadable"]["first"][0].startswith("a/empty.png (not_an_image")
    double = report["duplicates"]
    assert (double["groups"], double["surplus"], double["groups_with_different_labels"]) == (2, 3, 1)
    assert double["first"] == [["a/00.png", "a/copy.png", "b/copy.png"], ["b/01.png", "b/again.png"]]
    assert report["modes"] == {"RGB": 55, "P": 1, "CMYK": 1, "I;16": 1}
    assert report["formats"] == {"PNG": 56, "JPEG": 1, "GIF": 1}
    assert report["odd_modes"] == {"count": 3, "first": ["a/cmyk.jpg", "a/deep.png", "b/moving.gif"]}
    sizes = report["sizes"]
    assert sizes["smallest"] == {"width": 20, "height": 18, "image": "a/tiny.png"}
    assert sizes["largest"] == {"width": 700, "height": 33, "image": "b/long.png"}
    assert sizes["median_shorter_side"] == 40
    assert sizes["small"] == {"count": 1, "first": ["a/tiny.png"]}
    assert sizes["long"] == {"count": 1, "first": ["b/long.png"]}
    assert report["labels"] == {"classes": {"a": 31, "b": 30}}
    assert report["animations"] == {"count": 1, "first": ["b/moving.gif"]}
    assert report["damaged_shards"] == []
    assert report["usable"]
    assert report["verdict"] == "usable, but 3 of the 61 images cannot be read; training leaves them out"
    words = "\n".join(in_words(report))
    for text in ("61 in", "3 not_an_image 2, truncated 1", "a/00.png = a/copy.png = b/copy.png", "20 x 18  a/tiny.png"):
        assert text in words, text
    assert "1 of the groups under different labels" in words
    assert "left out      1 x link out of the folder\n              a/link.png\nunreadable" in words


def test_the_first_that_are_left_out_are_named(photos, tmp_path):
    """Three of each kind, however many there are; samples of a shard have no name to give."""
    for i in range(5):
        os.mkfifo(photos / f"b/{i}.png")
    os.mkfifo(photos / "b/0\x1b.png")
    os.symlink("nothing", photos / "a/gone.png")
    words = list(in_words(check_data(str(photos), say=lambda _: None)))
    start = words.index("left out      6 x not a regular file")
    named = [line.strip() for line in words[start + 1 : start + 5]]
    assert named == [r"b/0\x1b.png", "b/0.png", "b/1.png", "... and 3 more"]
    assert words[words.index("left out      1 x dangling link") + 1].strip() == "a/gone.png"
    assert "\x1b" not in "".join(words)
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for i in range(9):
            file = io.BytesIO()
            picture(i).save(file, "PNG")
            writer.write({"__key__": str(i), "png" if i else "txt": file.getvalue()})
    words = list(in_words(check_data(str(tmp_path / "x.tar"), say=lambda _: None)))
    assert words[1:3] == ["left out      1 x sample without an image", "unreadable    0"]


def test_clean_data_has_nothing_to_report(photos):
    """The control of the test above."""
    report = check_data(str(photos), say=lambda _: None)
    assert report["unreadable"] == {"count": 0, "first": [], "reasons": {}}
    assert report["duplicates"]["groups"] == report["odd_modes"]["count"] == report["sizes"]["small"]["count"] == 0
    assert report["verdict"] == "fine"


def test_what_training_would_refuse_is_said(photos):
    for i in range(11):
        (photos / f"a/{i}.jpg").write_bytes(b"")
    assert "11 of the 61 images" in check_data(str(photos), say=lambda _: None)["verdict"]
    (photos / "a/0.jpg").unlink()
    report = check_data(str(photos), say=lambda _: None)
    assert report["usable"]  # ten are not too many, and are told of
    assert report["verdict"].startswith("usable, but 10 of the 60 images cannot be read")
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    report = check_data(str(photos), say=lambda _: None)
    assert "none of the 60 images" in report["verdict"]
    assert not report["usable"]
    assert report["sizes"] == {}
    assert list(in_words(report))


def test_damaged_shards_are_named(photos, tmp_path):
    pack(photos, tmp_path / "packed", say=lambda _: None)
    for data in (tmp_path / "packed", tmp_path / "packed/*.tar"):
        assert check_data(str(data), say=lambda _: None)["verdict"] == "fine"
    path = tmp_path / "packed/shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the end mark: no image is harmed, and no decoder would notice
    path.write_bytes(content)
    report = check_data(str(tmp_path / "packed"), say=lambda _: None)
    assert report["unreadable"]["count"] == 0
    assert report["damaged_shards"] == [f"{path}: its SHA-256 is not that of the index"]
    assert report["verdict"].startswith("1 of the shards")
    assert any(line.startswith("damaged") for line in in_words(report))


@pytest.mark.parametrize("shuffled", [False, True])
def test_sorted_shards_are_told_from_shuffled_ones(tmp_path, monkeypatch, shuffled):
    monkeypatch.setattr(shards, "WINDOW_BYTES", 1)
    order = np.random.default_rng(0).permutation(100) if shuffled else np.arange(100)
    for number in range(10):
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for i in order[10 * number : 10 * number + 10].tolist():
                file = io.BytesIO()
                picture(i, 4, 4).save(file, "PNG")
                writer.write({"__key__": str(i), "png": file.getvalue(), "cls": i // 10})
    report = check_data(str(tmp_path / "*.tar"), say=lambda _: None)
    share = report["labels"]["classes_in_a_shard"]
    assert (0.85 < share < 1.15) if shuffled else share < 0.2
    assert any("the shards are sorted" in line for line in in_words(report)) != shuffled


def test_the_command(photos, tmp_path, capsys):
    assert cli.main(["data", "check", str(photos), "--out", str(tmp_path / "r.json")]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith(f"images        50 in {photos}\n")
    assert seen.out.endswith("verdict       fine\n")
    assert seen.err == ""
    for i in range(11):
        (photos / f"a/{i}.jpg").write_bytes(b"")
    assert cli.main(["data", "check", str(photos)]) == 81
    seen = capsys.readouterr()
    assert "unreadable    11 not_an_image 11" in seen.out
    assert seen.err.startswith("nnclr: at least 11 of the 61 images")
    assert cli.main(["data", "look", str(photos)]) == 2
    assert cli.main(["data", "check", str(tmp_path / "nowhere")]) == 2


def test_images_without_files(monkeypatch):
    report = check_data("demo-photos?split=test", say=lambda _: None)
    assert report["images"] == 17 * 60
    assert report["formats"] == {"none": 1020}
    assert len(report["labels"]["classes"]) == 17
    assert any("..." in line for line in in_words(report))


def test_a_report_that_cannot_be_written(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(data_check, "_look", lambda *_: pytest.fail("nothing was to be read"))
    for out in (tmp_path, tmp_path / "nowhere/r.json"):
        with pytest.raises(InputError, match="must be a file in a folder that exists"):
            check_data(str(photos), out)


def test_a_damaged_remote_shard_does_not_end_the_report(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "cache"))
    pack(photos, tmp_path / "packed", say=lambda _: None)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "packed").iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    content = memory.cat("/bucket/shard-000000.tar")
    memory.pipe("/bucket/shard-000000.tar", content[:-1] + b"x")
    source = data_check.open_source("memory://bucket")
    for _ in range(200):  # until the shard was fetched and found wrong
        if isinstance(data_check._look(source, 0), str):
            break
        time.sleep(0.01)
    monkeypatch.setattr(data_check, "open_source", lambda _: source)
    report = check_data("memory://bucket", say=lambda _: None)
    memory.store.clear()
    assert report["unreadable"]["count"] == 50
    assert report["unreadable"]["reasons"] == {"unreadable": 50}
    assert report["verdict"].startswith("1 of the shards")


def test_a_report_replaces_nothing_but_a_report(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "mine.json").write_text("{}")
    for name in ("a.png", "mine.json"):
        with pytest.raises(InputError, match=r"must be a \.json file that is new or an earlier report"):
            check_data(str(tmp_path), tmp_path / name, say=lambda text: None)
    assert (tmp_path / "a.png").read_bytes() == content
    for _ in range(2):
        check_data(str(tmp_path), tmp_path / "report.json", say=lambda text: None)
