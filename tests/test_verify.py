"""`nnclr verify` names what is damaged and nothing else, and touches nothing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import nnclr
from nnclr import cli, embed, plots, report
from nnclr.embeddings import write_embeddings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A run folder with everything that may lie in one."""
    from tests.conftest import TINY

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
    code = cli.main(["verify", str(run)])
    answer = capsys.readouterr()
    assert content(run) == before
    lines = [line.split(None, 1) for line in answer.out.splitlines()]
    fine = [name for verdict, name in lines if verdict == "ok"]
    damaged = dict(name.split(": ", 1) for verdict, name in lines if verdict == "damaged")
    assert len(fine) + len(damaged) == len(lines)
    return code, fine, damaged, answer.err


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


def swapped_mean(path):
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["mean"].reverse()
    path.write_text(json.dumps(config))


# File -> what happens to it, the name under which it is damaged, what is said of it.
DAMAGES = {
    "config.toml": (cut, "config.toml", "cannot be read"),
    "checkpoints/step-00000005/tensors.safetensors": (flip, "checkpoints/step-00000005", "tensors.safetensors is dam"),
    "checkpoints/step-00000003/manifest.json": (os.remove, "checkpoints/step-00000003", "manifest.json is missing"),
    "encoder/model.safetensors": (flip, "encoder", "is not that of step-00000005"),
    "encoder/config.json": (swapped_mean, "encoder", "does not give the features it was saved with"),
    "environment.json": (cut, "environment.json", "cannot be read"),
    "metrics.jsonl": (cut, "metrics.jsonl", "1 of 2 lines cannot be read; the next start drops them"),
    "report.html": (cut, "report.html", "its end is missing"),
    "neighbours/step-00000005.png": (cut, "neighbours/step-00000005.png", "cannot be read"),
    "vectors.npy": (flip, "vectors.npy", "cannot be read"),
    ".photos.npy.parts/0000000020.bin": (flip, ".photos.npy.parts/0000000020.json", "its vectors are not those"),
    ".photos.npy.parts/facts.json": (cut, ".photos.npy.parts/facts.json", "nnclr embed begins anew"),
}


@pytest.mark.parametrize("file", DAMAGES)
def test_what_is_damaged_is_named_and_nothing_else(run, capsys, file):
    damage, name, words = DAMAGES[file]
    damage(run / file)
    code, fine, damaged, said = verify(run, capsys)
    assert code == 83
    assert list(damaged) == [name]
    assert words in damaged[name]
    assert name not in fine
    newest = "step-00000003" if "00000005/" in file else "step-00000005"
    assert f"damaged in {run}: {name}; the next start goes on from checkpoints/{newest}\n" in said


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
