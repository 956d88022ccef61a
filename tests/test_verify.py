"""`nnclr verify` names what is damaged and nothing else, and touches nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import nnclr
from nnclr import cli, embed, plots, report
from nnclr import verify as verifying
from nnclr.embeddings import write_embeddings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A run folder with everything that may lie in one."""
    from tests.settings import TINY

    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda run: None)
        patch.setattr(report, "write_report", lambda run, **_: Path(run))
        nnclr.pretrain(pictures, run, **TINY | {"epochs": 1, "evaluate_every_epochs": 1})
    (run / "report.html").write_text("<html></html>\n")
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    write_embeddings(run / "vectors.npy", vectors, np.arange(40), [f"{i}.png" for i in range(40)])
    folder, facts = run / ".photos.npy.parts", {"dtype": "float32"}
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps(facts))
    parts = embed._Parts(folder, embed._key(facts), 8, np.dtype("float32"))
    parts.write(range(0, 20), vectors[:20], [])
    parts.write(range(20, 41), vectors[20:], [(40, "it is no picture")])
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def verify(run, capsys):
    """Exit code, the names that are fine, the names that are damaged with the reason, and what is said at the end."""
    before = content(run)
    code, said, error = verdicts(run, capsys)
    assert content(run) == before
    lines = [line.split(None, 1) for line in said]
    fine = [name for verdict, name in lines if verdict == "ok"]
    damaged = dict(name.split(": ", 1) for verdict, name in lines if verdict == "damaged")
    assert len(fine) + len(damaged) == len(lines)
    return code, fine, damaged, error


def verdicts(run, capsys):
    """Exit code, the lines, and what is said at the end."""
    code = cli.main(["verify", str(run)])
    answer = capsys.readouterr()
    return code, answer.out.splitlines(), answer.err


def test_every_file_of_a_run_is_looked_at(run, capsys):
    code, fine, damaged, said = verify(run, capsys)
    assert (code, damaged, said) == (0, {}, "")
    assert fine[:4] == ["config.toml", "checkpoints/step-00000005", "checkpoints/step-00000003", "encoder"]
    rest = {"environment.json", "metrics.jsonl", "evaluations.jsonl", "report.html", "vectors.npy", "vectors.ids.csv"}
    rest |= {"vectors.json", ".photos.npy.parts/0000000000.json", ".photos.npy.parts/0000000020.json"}
    assert set(fine[4:]) >= rest
    assert any(name.startswith("neighbours/step-") for name in fine)


def flip(path, where=0.5):
    good = bytearray(path.read_bytes())
    good[int(where * len(good))] ^= 4
    path.write_bytes(good)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_behind_a_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))


def swapped_mean(path):
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["mean"].reverse()
    path.write_text(json.dumps(config))


def without_step(path):
    config = json.loads(path.read_text())
    config["nnclr"]["provenance"]["step"] = None
    path.write_text(json.dumps(config))


def without_meaning(text):
    return lambda path: path.write_text(text)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def longer_header(path):
    """With spaces, which change nothing in what it says."""
    good, most = path.read_bytes(), 3 << 20
    size = int.from_bytes(good[:8], "little")
    path.write_bytes((size + most).to_bytes(8, "little") + good[8 : 8 + size] + b" " * most + good[8 + size :])


def longer_toml(path):
    path.write_bytes(path.read_bytes() + b"#" * 70_000)


def cut_first_line(path):
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first[: len(first) // 2], b"\n", *rest]))


# File (and which damage of it) -> what happens to it, the name under which it is damaged, what is said of it.
DAMAGES = {
    "config.toml": (cut, "config.toml", "cannot be read"),
    "config.toml, cut behind a line": (cut_behind_a_line, "config.toml", "it cannot be read (it lacks "),
    "config.toml, too long": (longer_toml, "config.toml", "and a config at most 65536"),
    "config.toml, a pipe": (pipe, "config.toml", "config.toml is no regular file"),
    "config.toml, a device": (endless, "config.toml", "config.toml is no regular file"),
    "checkpoints/step-00000005/manifest.json, a pipe": (pipe, "checkpoints/step-00000005", "is no regular file"),
    "checkpoints/step-00000005/tensors.safetensors, a device": (
        endless, "checkpoints/step-00000005", "tensors.safetensors is no regular file"),
    "checkpoints/step-00000005/tensors.safetensors": (flip, "checkpoints/step-00000005", "tensors.safetensors is dam"),
    "checkpoints/step-00000003/manifest.json": (os.remove, "checkpoints/step-00000003", "manifest.json is missing"),
    "encoder/model.safetensors": (flip, "encoder", "is not that of step-00000005"),
    "encoder/config.json": (swapped_mean, "encoder", "does not give the features it was saved with"),
    "encoder/config.json, a list": (without_meaning("[]"), "encoder", "is not that of an encoder of a run"),
    "encoder/config.json, a number": (without_meaning('{"nnclr": 3}'), "encoder", "is not that of an encoder of a run"),
    "encoder/config.json, no step": (without_step, "encoder", "is not that of an encoder of a run"),
    "encoder/config.json, a pipe": (pipe, "encoder", "config.json is no regular file"),
    "encoder/model.safetensors, a device": (endless, "encoder", "model.safetensors is no regular file"),
    "encoder/model.safetensors, a header without end": (longer_header, "encoder", "(model.safetensors says that"),
    "environment.json": (cut, "environment.json", "cannot be read"),
    "metrics.jsonl": (cut_first_line, "metrics.jsonl", "lines cannot be read; the next start drops them"),
    "report.html": (cut, "report.html", "its end is missing"),
    "neighbours/step-00000005.png": (cut, "neighbours/step-00000005.png", "cannot be read"),
    "vectors.npy": (flip, "vectors.npy", "cannot be read"),
    ".photos.npy.parts/0000000020.bin": (flip, ".photos.npy.parts/0000000020.json", "its vectors are not those"),
    ".photos.npy.parts/facts.json": (cut, ".photos.npy.parts/facts.json", "nnclr embed begins anew"),
    ".photos.npy.parts/0000000020.bin, a pipe": (pipe, ".photos.npy.parts", "0000000020.bin is no regular file"),
}  # fmt: skip


@pytest.mark.parametrize("file", DAMAGES)
def test_what_is_damaged_is_named_and_nothing_else(run, capsys, monkeypatch, file):
    damage, name, words = DAMAGES[file]
    monkeypatch.setattr(verifying, "_PAUSE", 0)
    damage(run / file.partition(",")[0])
    code, fine, damaged, said = verify(run, capsys)
    assert code == 83
    assert list(damaged) == [name]
    assert words in damaged[name]
    assert name not in fine
    newest = "step-00000003" if "00000005/" in file else "step-00000005"
    assert f"damaged in {run}: {name}; the next start goes on from checkpoints/{newest}\n" in said


def test_a_damaged_checkpoint_says_nothing_of_the_settings(run, capsys):
    state = run / "checkpoints/step-00000005/state.json"
    state.write_text(state.read_text().replace("support_set_size", "support_set_sizf"))
    _, fine, damaged, _ = verify(run, capsys)
    assert "config.toml" in fine
    assert list(damaged) == ["checkpoints/step-00000005"]


def test_no_usable_checkpoint_is_code_86(run, capsys):
    for path in run.glob("checkpoints/*/state.json"):
        flip(path)
    code, _, damaged, said = verify(run, capsys)
    assert code == 86
    assert [name for name in damaged if name.startswith("checkpoints/")] == list(damaged)
    assert f"no checkpoint in {run} can be used" in said


def test_what_a_kill_leaves_is_no_damage(run, capsys):
    shutil.copytree(run / "checkpoints/step-00000005", run / "checkpoints/.tmp-6-99")
    cut(run / "checkpoints/.tmp-6-99/tensors.safetensors")
    (run / ".tmp-config.toml-99").write_bytes(b"")
    assert verify(run, capsys)[0] == 0
    shutil.rmtree(run / "checkpoints")  # killed before the first one
    shutil.rmtree(run / "encoder")
    assert verify(run, capsys)[0] == 0


def test_what_is_no_run_is_code_2(tmp_path, capsys):
    code, fine, damaged, said = verify(tmp_path, capsys)
    assert (code, fine, damaged) == (2, [], {})
    assert "is no run folder; name the folder that nnclr pretrain --out made" in said


def test_what_is_no_file_is_named_and_not_read(run, capsys):
    """A reader of the pipe would wait for ever, one of the devices never come to an end."""
    os.mkfifo(run / "pipe.jsonl")
    os.mkfifo(run / "neighbours/pipe")
    (run / "zeros").symlink_to("/dev/zero")
    (run / "nowhere.json").symlink_to("gone")
    (run / "elsewhere").symlink_to(run.parent, target_is_directory=True)
    code, said, error = verdicts(run, capsys)
    assert (code, error) == (0, "")
    assert [line for line in said if not line.startswith("ok ")] == [
        "skipped  elsewhere: it is a link",
        "skipped  neighbours/pipe: it is no regular file",
        "skipped  nowhere.json: it is a link",
        "skipped  pipe.jsonl: it is no regular file",
        "skipped  zeros: it is a link",
    ]


def test_what_belongs_to_embeddings_is_no_pipe(run, capsys):
    pipe(run / "vectors.json")
    code, said, _ = verdicts(run, capsys)
    assert code == 83
    assert "skipped  vectors.json: it is no regular file" in said
    assert "damaged  vectors.npy: it cannot be read (vectors.json is no regular file)" in said


def test_the_encoder_may_be_replaced_between_its_two_files(run, capsys, monkeypatch):
    """Its config is read, then a run that is going on replaces both files, and then the weights are read."""
    path, read = run / "encoder/config.json", verifying.read_weights
    new = path.read_text()
    assert '"step": 5' in new
    reads = []

    def replaced(weights):
        if not reads:
            path.write_text(new)
        reads.append(weights)
        return read(weights)

    monkeypatch.setattr(verifying, "_PAUSE", 0)
    monkeypatch.setattr(verifying, "read_weights", replaced)
    path.write_text(new.replace('"step": 5', '"step": 3'))
    code, said, _ = verdicts(run, capsys)
    assert (code, "ok       encoder" in said) == (0, True)
    assert len(reads) == 4  # twice the weights and a checkpoint
    path.write_text(new.replace('"step": 5', '"step": 3'))
    code, _, damaged, _ = verify(run, capsys)  # the control: it stays so
    assert (code, list(damaged)) == (83, ["encoder"])
    assert "is not that of step-00000003" in damaged["encoder"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_last_line_cut_off_by_a_kill_is_no_damage(run, capsys, name):
    path = run / name
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    code, said, _ = verdicts(run, capsys)
    assert code == 0
    assert f"ok       {name}: its last line was cut off, as by a kill; the next start drops it" in said
    path.write_bytes(path.read_bytes() + b"\n")  # the control: a line that was written to its end
    code, _, damaged, _ = verify(run, capsys)
    assert (code, list(damaged)) == (83, [name])
