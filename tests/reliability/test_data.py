"""Images, folders and shards that are bad, odd or gone: what is skipped, refused and said."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import nnclr
from nnclr import cli, data_check
from nnclr.data import decode, loader
from nnclr.data.decode import BadImage
from nnclr.data.images import Source, array_source
from nnclr.data.source import open_source
from nnclr.errors import DataError, InputError
from tests.data.test_decode import encoded, photo, png_header
from tests.reliability import bad_inputs
from tests.reliability.bad_inputs import failing_storage, locked_folders, spoil_late, write_bad_files, zeros_png
from tests.test_cli import PLAIN

MIB = 600  # of memory for each decoding thread, whatever the files are
GOOD = 16


def hidden(error):
    """An error in one line, for the list of what went wrong."""
    return f"{type(error).__name__}: {error}"


# ---- the bad set -------------------------------------------------------------------------------------------

READ_ALL = """
import json, sys
from tests.reliability.bad_inputs import failing_storage, spoil_late
from tests.reliability.test_data import high_water, loaded

from pathlib import Path
folder, bomb = Path(sys.argv[1]), Path(sys.argv[2])
imported = high_water()
seen, bad = loaded(folder)
peak = high_water()
from nnclr.data import decode
decode.MAX_PIXELS = 10**9  # the control: Pillow lets this one pass
decode.decode(bomb.read_bytes())
print(json.dumps([imported, peak, high_water(), seen, bad]))
"""


def high_water():
    """MiB that this process has had at once."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


def loaded(folder):
    """What a loader shows in an epoch of a folder whose last images go bad, and why it leaves out which."""
    import torch

    from nnclr.data.augment import policy

    source = open_source(folder)
    spoil_late(folder)
    loader.MOST_BAD = 1.0  # of a run's own limit there is a test of its own
    batches = loader.StreamLoader(source, loader.Plan(len(source), 4, policy("simclr", 16), 0), torch.device("cpu"), 1)
    with failing_storage():
        seen = {source.describe(int(i)) for batch in batches.batches(0, len(source) // 4) for i in batch.ids}
    return sorted(seen), {source.describe(i): why for i, why in batches.bad.items()}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """The folder of all bad files and 16 good ones, and name -> reason."""
    folder = tmp_path_factory.mktemp("bad") / "photos"
    return folder, write_bad_files(folder, GOOD)


def wrong_files(folder, expected, bomb):
    """Files that the loader or `nnclr data check` do not handle as specified, and the memory they took."""
    command = [sys.executable, "-c", READ_ALL, str(folder), str(bomb)]
    root = Path(__file__).parents[2]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=120)
    assert answer.returncode == 0, answer.stderr
    imported, peak, control, seen, bad = json.loads(answer.stdout)
    with failing_storage():
        report = data_check.check_data(str(folder), say=lambda _: None)
    listed = dict(line.rstrip(")").split(" (", 1) for line in report["unreadable"]["first"])
    late = {name for name in bad_inputs.LATE if name not in listed}  # no longer files of the folder
    wrong = []
    for name, reason in expected.items():
        told = [bad.get(name, "nothing")] + ([] if name in late else [listed.get(name, "nothing")])
        if name in seen or any(text.partition(":")[0] != reason for text in told):
            wrong.append(f"{name}: {told} and not {reason}")
    good = [name for name in seen if not name.startswith("good-")]
    return wrong + [f"{name} is shown" for name in good], (imported, peak, control)


def wrong_scans(tmp_path):
    number = 0
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(encoded(photo()))
    while True:
        root = tmp_path / f"scan-{number}"
        root.mkdir()
        (root / "good.png").write_bytes(encoded(photo()))
        kinds = list(bad_inputs.left_out_of_a_scan(root, outside))
        if number == len(kinds):
            return
        what, make, reason = kinds[number]
        make()
        with locked_folders():
            source = open_source(root)
        fine = source.skipped == {reason: 1} and len(source) == 1
        yield what, None if fine else f"{source.skipped} and not {reason}"
        number += 1


def refusal(call, words):
    """None if a call is refused with these words and code 2, else what happens instead."""
    try:
        call()
    except InputError as error:
        return None if re.search(words, str(error)) and error.exit_code == 2 else str(error)
    except Exception as error:  # noqa: BLE001 - anything else is what this looks for
        return hidden(error)
    return "it is taken"


def wrong_folders(tmp_path, capsys):
    (tmp_path / "folders").mkdir()
    for what, arguments, words in bad_inputs.refused_folders(tmp_path / "folders"):
        before = sorted(tmp_path.rglob("*"))
        code = cli.main([str(text) for text in ("pretrain", "--out", tmp_path / "run", *PLAIN, *arguments)])
        said = capsys.readouterr().err
        fine = code == 2 and re.search(words, said) and said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
        yield what, None if fine else f"code {code}, {said}"
    for what, data, words in bad_inputs.wrong_labels():
        yield what, refusal(lambda: open_source(data), words)  # noqa: B023 - called at once


def wrong_shards(tmp_path, capsys):
    for what, content, words in bad_inputs.refused_shards():
        (tmp_path / "x.tar").write_bytes(content)
        code, said = cli.main(["data", "check", str(tmp_path / "x.tar")]), capsys.readouterr().err
        fine = code == 2 and re.search(words, said) and said.count("\n") == 1
        yield what, None if fine else f"code {code}, {said}"
    content, length, expected = bad_inputs.odd_shard()
    (tmp_path / "odd.tar").write_bytes(content)
    os.truncate(tmp_path / "odd.tar", length)
    source = open_source(tmp_path / "odd.tar")
    before = sorted(tmp_path.rglob("*"))
    yield "a label without an image", None if source.skipped == {"sample without an image": 1} else str(source.skipped)
    names = {source.describe(i).removeprefix("odd.tar/"): i for i in range(len(source))}
    yield "links and devices", None if names.keys() == expected.keys() else str(names)
    for name, reason in expected.items():
        try:
            source.read(names[name])
            told = None
        except BadImage as error:
            told = error.reason
        yield name, None if told == reason and sorted(tmp_path.rglob("*")) == before else f"{told} and not {reason}"


def test_every_bad_input_is_handled_as_specified(bad_folder, tmp_path, monkeypatch, capsys, count):
    """Files, folders and shards; and what a process takes for them, beside the control of a limit that is too high."""
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bomb.bin").write_bytes(zeros_png(9800, 3))
    folder, expected = bad_folder
    wrong, (imported, peak, control) = wrong_files(folder, expected, tmp_path / "bomb.bin")
    n = len(expected)
    for part in (wrong_scans(tmp_path), wrong_folders(tmp_path, capsys), wrong_shards(tmp_path, capsys)):
        for what, told in part:
            n += 1
            wrong += [] if told is None else [f"{what}: {told}"]
    count("B1", "bad files, folders and shards handled as specified", n - len(wrong), n)
    count("B4", "MiB that a loader takes for the whole bad set beyond its libraries, at most 600", peak - imported, MIB)
    count("B4", "MiB of that process in all; the second figure is its libraries and tests alone", peak, imported)
    assert not wrong, "\n".join(wrong)
    assert n >= 60
    assert peak - imported <= MIB
    assert control - imported > MIB
    assert not (tmp_path.parent / "climbing.png").exists()


@pytest.mark.parametrize("kind", ["RGBA", "16 bits", "WebP"])
def test_the_largest_images_that_are_taken(kind, tmp_path, count):
    """What was 1 to 2 GB for each of them, when floats and layers were made of all pixels at once."""
    if kind == "RGBA":
        data, side = zeros_png(8192, 4), 8192
    elif kind == "16 bits":
        data, side = encoded(Image.new("I;16", (8192, 8192))), 8192
    else:
        data, side = encoded(Image.new("RGB", (5400, 5400)), "WEBP", lossless=True, method=0, quality=0), 5400
    (tmp_path / "large").write_bytes(data)
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom nnclr.data.decode import decode\n"
        "pixels = decode(Path(sys.argv[1]).read_bytes())\n"
        "print(pixels.shape[0], re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large")]
    height, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    count("B4", f"MiB of a process that decodes the largest image of {kind}, at most 600", peak >> 10, MIB)
    assert height == side
    assert peak >> 10 <= MIB


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16", "F", "I"])
def test_strips_change_no_pixel(mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode in ("F", "I", "I;16"):
        kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
        values = rng.integers(0, 60_000, (37, 23)).astype(kind)
        if mode == "F":
            values[3, 5], values[30, 1] = np.nan, np.inf
        data = encoded(Image.fromarray(values), "TIFF")
    else:
        data = encoded(photo(37, 23).convert(mode), "TIFF")
    whole = decode.decode(data)
    monkeypatch.setattr(decode, "_STRIP", 50)
    np.testing.assert_array_equal(decode.decode(data), whole)
    assert whole.shape == (37, 23, 3)
    if mode == "F":  # control: extremes of a strip are not those of the image
        monkeypatch.setattr(decode, "_extremes", lambda image, boxes: (0.0, 255.0))
        assert (decode.decode(data) != whole).any()


# ---- loops, names, identity --------------------------------------------------------------------------------


def test_loops_of_links_end(tmp_path, count):
    """Two of them, where a walk that follows links goes on without end."""
    root = tmp_path / "root"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(encoded(photo(20, 20)))
        (root / name / "up").symlink_to(root)
    source = open_source(root)
    count("B12", "images of a folder with two loops of links that are listed once", len(source), 6)
    assert sorted(source.describe(i) for i in range(len(source))) == [f"{a}/{i}.png" for a in "ab" for i in range(3)]
    walked = 0
    for *_, files in os.walk(root, followlinks=True):
        walked += len(files)
        if walked > 1000:
            break
    assert walked > 1000


NAMES = [
    b"a b.png",
    b"new\nline.png",
    b"\x1b]0;title\x07\x1b[31mred.png",
    b"\xff\xfe.png",
    "日本.png".encode(),
    "cafe\u0301.png".encode(),
    "caf\u00e9.png".encode(),
    "\u202egnp.exe.png".encode(),
    b"-rf.png",
    b"=cmd()|' '!A0.png",
    b"@sum.png",
    b"<img src=x onerror=alert(1)>.png",
    b"&amp;&.png",
    b"`id`$(id).png",
    b"x" * 251 + b".png",
]


def harmless(text):
    return all(c.isprintable() or c in "\n\r\t" for c in text) and "\x1b" not in text


@pytest.fixture
def odd_names(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i, name in enumerate(NAMES):
        picture = encoded(photo(20 + i, 20))
        for folder in (b"", b"bad ") if i < 10 else (b"",):
            with open(os.path.join(os.fsencode(root), folder + name), "wb") as file:
                file.write(picture if not folder else picture[: len(picture) // 2])
    return root


def test_odd_names_do_no_harm_wherever_they_are_written(odd_names, tmp_path, capfd, count):
    """Terminal, parquet, CSV, JSON and HTML: printable, and whole."""
    source = open_source(odd_names)
    names = [source.describe(i) for i in range(len(source))]
    vectors, table = tmp_path / "e.npy", tmp_path / "e.parquet"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for out in (vectors, table):
            assert cli.main(["embed", "pixels?size=8", str(odd_names), "--out", str(out)]) == 0
        assert cli.main(["search", str(table), "--id", "3", "-k", "30", "--out", str(tmp_path / "found.csv")]) == 0
        assert cli.main(["data", "check", str(odd_names), "--out", str(tmp_path / "report.json")]) == 0
        run = tmp_path / "run"
        settings = {"batch_size": 8, "epochs": 1, "image_size": 16, "backbone": "small-convnet", "device": "cpu"}
        nnclr.pretrain(odd_names, run, embedding_dim=8, projector_hidden_dim=8, predictor_hidden_dim=8, **settings)
        assert cli.main(["pretrain", str(tmp_path / "no\x1b[31m\nfolder"), "--out", str(tmp_path / "other")]) == 2
    said = capfd.readouterr()
    places = {
        "terminal": said.out + said.err,
        "ids of the npy": (tmp_path / "e.ids.csv").read_text(),
        "skipped": (tmp_path / "e.parquet.skipped.csv").read_text(),
        "search": (tmp_path / "found.csv").read_text(),
        "report of data check": (tmp_path / "report.json").read_text(),
        "bad samples": (run / "bad_samples.jsonl").read_text(),
        "page": (run / "report.html").read_text(),
        "parquet": "\n".join(map(str, pq.read_table(table)["path"].to_pylist())),
    }
    wrong = [place for place, text in places.items() if not harmless(text) or "red.png" not in text]
    count("B13", "places where odd names are written without harm", len(places) - len(wrong), len(places))
    assert wrong == []
    good = [name for name in names if not name.startswith("bad ")]
    assert pq.read_table(table)["path"].to_pylist() == good
    for line in places["ids of the npy"].splitlines() + places["skipped"].splitlines():
        assert not re.search(r'(^|,|")[=@]', line.partition(",")[2])  # no formula of a spreadsheet
    assert "<img src" not in places["page"].replace('<img src="data:', "")
    assert not harmless(os.fsdecode(NAMES[2]))  # the control: the name itself


# ---- images that go bad, and that come back ----------------------------------------------------------------


def test_a_vanished_mount_ends_the_run_at_once_and_it_goes_on_when_it_is_back(tmp_path, pictures, tiny, count):
    """Code 81 after eleven reads and not one for each image, the files listed, the checkpoint whole."""
    whole, reads, gone = array_source(pictures[0], None), [], []

    def fetch(i):
        reads.append(i)
        if gone and i >= 12:
            raise BadImage("unreadable", "Stale file handle")
        return np.resize(whole.read(i), (16, 16 + i % 2, 3))  # of two sizes, so that they are read step by step

    source = Source("mount", len(whole), fetch, whole.title, whole.fingerprint)
    settings = tiny | {"checkpoint_every_steps": 1, "evaluate_every_epochs": 0}
    expected = nnclr.pretrain(source, tmp_path / "whole", **settings)

    real = nnclr.training.Recorder.after_step

    def then_unmount(self, *rest):
        real(self, *rest)
        if self.state.step == 7:
            gone.append(True)
            reads.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnclr.training.Recorder, "after_step", then_unmount)
        with pytest.raises(DataError, match=r"at least 11 of the 120 images of mount cannot be read.*Stale") as raised:
            nnclr.pretrain(source, tmp_path / "run", **settings)
    assert raised.value.exit_code == 81
    count("B15", "reads after the mount was gone, of 120 images", len(reads), 120)
    assert len(reads) < 60
    lines = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == 11
    assert all("Stale" in line["reason"] and line["image"] == f"array#{line['id']}" for line in lines)
    gone.clear()
    run = nnclr.pretrain(source, tmp_path / "run", **settings)
    assert not (tmp_path / "run/bad_samples.jsonl").exists()
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in expected.metrics]


def test_too_many_bad_images_at_the_start_are_listed_and_leave_the_folder_free(tmp_path, pictures, tiny):
    images, bad = array_source(pictures[0], None), set(range(20))

    def fetch(i):
        if i in bad:
            raise BadImage("truncated", "cut")
        return images.read(i)

    source = Source("set", len(images), fetch, images.title, images.fingerprint)
    with pytest.raises(DataError, match="20 of the 120 images of set"):
        nnclr.pretrain(source, tmp_path / "run", **tiny)
    lines = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(20))
    bad.clear()
    nnclr.pretrain(source, tmp_path / "run", **tiny)
    assert not (tmp_path / "run/bad_samples.jsonl").exists()  # or all of them would be left out, good as they are


def test_a_flaky_storage_costs_no_image(tmp_path, monkeypatch, count):
    """EIO twice for every file: the third try has it. The control is a single try."""
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(photo(20, 20)))
    real, failures = decode._read_once, {}

    def flaky(path):
        failures[path] = failures.get(path, 0) + 1
        if failures[path] % 3:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(decode, "_read_once", flaky)
    monkeypatch.setattr(decode, "_PAUSE", 0.001)
    source = open_source(tmp_path)
    good = sum(source.read(i).shape == (20, 20, 3) for i in range(12))
    count("B15", "images read at the third try", good, 12)
    assert good == 12
    monkeypatch.setattr(decode, "_TRIES", 1)
    with pytest.raises(BadImage, match="Input/output error"):
        source.read(0)


def test_frames_behind_the_first_are_counted(tmp_path, count):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        (tmp_path / f"moving.{kind.lower()}").write_bytes(moving)
        (tmp_path / f"still.{kind.lower()}").write_bytes(encoded(frames[0], kind))
    report = data_check.check_data(str(tmp_path), say=lambda _: None)
    names = [f"moving.{kind}" for kind in ("gif", "png", "tiff", "webp")]
    count("B8", "animations that nnclr data check names", report["animations"]["count"], 4)
    assert report["animations"] == {"count": 4, "first": names}
    assert any("4 of several frames, of which the first is used" in line for line in data_check.in_words(report))


def test_a_support_set_larger_than_the_data_and_no_multiple_of_the_batch(tmp_path, pictures, tiny, capsys):
    settings = tiny | {"support_set_size": 133, "epochs": 2, "evaluate_every_epochs": 0, "quiet": False}
    run = nnclr.pretrain(pictures[0], tmp_path / "run", **settings)
    assert "the support set is larger than the data" in capsys.readouterr().out
    assert run.metrics[-1]["support_set_fill"] == pytest.approx(1.0)
    nnclr.pretrain(pictures[0], tmp_path / "small", **settings | {"support_set_size": 50})
    assert "larger than the data" not in capsys.readouterr().out


def test_one_bad_image_less_than_the_limit_is_a_warning_and_one_more_is_code_81(tmp_path, capsys):
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(photo(20, 20)))
    for i in range(11):
        (tmp_path / f"bad-{i:02d}.png").write_bytes(png_header(9_400, 9_400))
    assert cli.main(["data", "check", str(tmp_path)]) == 81
    (tmp_path / "bad-00.png").unlink()
    capsys.readouterr()
    began = time.monotonic()
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "verdict       usable, but 10 of the 50 images cannot be read; training leaves them out"
    assert time.monotonic() - began < 10
