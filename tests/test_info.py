"""`nnclr info`, and that what needs no torch does not wait for it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import nnclr
from nnclr import cli, info

HEAVY = {"torch", "torchvision", "timm", "numpy", "PIL", "pyarrow", "matplotlib", "skimage", "sklearn"}


def imported(arguments, drivers=()):
    """Heavy modules that a command has loaded at its end, in an interpreter of its own."""
    code = (
        "import contextlib, json, os, sys\n"
        "from nnclr import cli, info\n"
        f"info._DRIVERS, sys.platform = {drivers!r}, 'linux'\n"
        "with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):\n"
        f"    cli.main({arguments!r})\n"
        f"print(json.dumps([name for name in {sorted(HEAVY)} if name in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout))


@pytest.mark.parametrize(
    "command", ["info", "--version", "--help", "search --help", "embed --duplicates", "no-such-command"]
)
def test_what_needs_no_torch_does_not_load_it(command):
    assert imported(command.split()) == set()


def test_torch_is_asked_where_there_may_be_a_gpu():
    """The control of the test above, too."""
    assert "torch" in imported(["info"], drivers=("/",))


def test_a_folder_is_looked_at_without_torch(tmp_path):
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    assert imported(["info", str(tmp_path)]) == {"numpy", "PIL"}
    assert "torch" not in imported(["info", "demo-photos"])


@pytest.mark.parametrize(("late", "terminal", "said"), [(0.1, True, True), (60.0, True, False), (0.1, False, False)])
def test_who_waits_long_for_torch_is_told(tmp_path, late, terminal, said):
    """A torch that takes a second to load; the controls: in time, and where nobody looks."""
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(1)\n")
    code = (
        "import sys\n"
        "from nnclr import cli\n"
        f"cli._LATE, sys.stderr.isatty = {late}, lambda: {terminal}\n"
        "cli._load_torch()\n"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert answer.stderr == ("nnclr: loading PyTorch, which takes some seconds here\n" if said else "")


def lines_of(run, capsys):
    assert cli.main(["info", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:14].strip(): line[14:] for line in lines if not line.startswith(" ")}, lines


def test_a_run_is_told_in_words(tmp_path, pictures, tiny, capsys):
    run = nnclr.pretrain(pictures, tmp_path / "run", **tiny).path
    metrics, evaluations = (
        [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "evaluations")
    )
    last, total = metrics[-1], metrics[-1]["step"]
    assert nnclr.Run(str(run)).metrics == metrics
    told, lines = lines_of(run, capsys)
    assert told["trained"].startswith(f"nnclr trained small-convnet on 120 images of array: step {total} of {total}, ")
    assert told["last metrics"].startswith(f"step {total}: loss {last['loss']:.3f}, chance {last['loss_chance']:.2f}, ")
    low, high = evaluations[-1]["interval"]
    percent = f"{100 * evaluations[-1]['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    assert told["evaluations"].startswith(f"step {total}: knn k=20 T=0.07, top-1 accuracy {percent}, ")
    assert sum("top-1 accuracy" in line for line in lines) == 1  # the latest alone
    assert told["checkpoints"].startswith(f"step {total}")
    assert told["encoder"] == str(run / "encoder")
    assert told["to go on"] == "it is finished; --extend-epochs lengthens it"
    assert lines[lines.index("settings") + 1 :] == [
        f"  {line}" for line in (run / "config.toml").read_text().splitlines()
    ]
    assert not any("{" in line for line in lines)

    others = [{**evaluations[-1], "parameters": {**evaluations[-1]["parameters"], "k": k}} for k in (1, 5, 5)]
    with open(run / "evaluations.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in others))
    odd = {**evaluations[-1], "protocol": "finetune", "parameters": {"fraction": 10**400}}
    finetuned = [{**odd, "parameters": {"fraction": 0.1, "epochs": epochs}, "n_train": 12} for epochs in (1, 2)]
    with open(run / "evaluations.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in [odd, *finetuned]))
    shown = lines_of(run, capsys)[1][6:9]
    assert "finetune, top-1 accuracy" in shown[0]
    assert ["(12 images)" in line and line.endswith(f"(epochs {n})") for n, line in enumerate(shown[1:], 1)] == [
        True
    ] * 2
    assert [f"k={k} " in line for k, line in zip((20, 1, 5), lines_of(run, capsys)[1][3:6], strict=True)] == [True] * 3

    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("\nepochs = ", "\nepochs = 1"))
    assert lines_of(run, capsys)[0]["to go on"] == f"the same command goes on from step {total}"
    newer = f"              so far as it was logged; the newest checkpoint is of step {total}"
    assert newer not in lines_of(run, capsys)[1]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics if line["step"] < total))
    assert newer in lines_of(run, capsys)[1]
    for folder in ("checkpoints", "encoder"):
        shutil.rmtree(run / folder)
    told, _ = lines_of(run, capsys)
    assert (told["checkpoints"], told["encoder"]) == ("none", "none yet")
    assert told["to go on"] == "there is no checkpoint: the same command begins anew"


def test_a_run_of_a_stranger_is_told_without_harm(tmp_path, capsys):
    """Files that are no text, no numbers, or escapes for the terminal."""
    (tmp_path / "config.toml").write_bytes(b'data = "\x1b[31m"\n\xff = [[[\n')
    (tmp_path / "environment.json").write_text("[]")
    result = {"metric": "\x1b[2J", "value": 0.5, "protocol": "knn", "step": "x", "test": ["\x07"], "interval": "wide"}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(result) + "\n[]\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": "low", "rank_me": NaN}\n{"step": "\x1b"}\n')
    told, lines = lines_of(tmp_path, capsys)
    assert "\x1b" not in "".join(lines)
    assert "\x07" not in "".join(lines)
    assert told["last metrics"] == "step 3"
    assert "50.0 %" in told["evaluations"]
    assert told["note"]


def test_what_is_left_out_of_a_folder_is_named(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for i in range(4):
        os.mkfifo(tmp_path / f"pipe{i}.png")
    (tmp_path / "gone.png").symlink_to("nothing")
    assert cli.main(["info", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left out: 4 x not a regular file (pipe0.png, pipe1.png, pipe2.png, ...)" in lines
    assert "left out: 1 x dangling link (gone.png)" in lines


def test_gpus_are_named(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", "Abacus {}".format)
    for drivers, named in ((("/",), ", Abacus 0, Abacus 1\n"), (("/no-such-driver",), " cores\n")):
        monkeypatch.setattr(info, "_DRIVERS", drivers)
        monkeypatch.setattr(sys, "platform", "linux")
        assert cli.main(["info"]) == 0
        out = capsys.readouterr().out
        assert f"torch {importlib.metadata.version('torch')}\n" in out
        assert named in out


def test_every_extra_is_named(capsys):
    assert cli.main(["info"]) == 0
    named = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[2:]}
    provided = set(importlib.metadata.metadata("nnclr").get_all("Provides-Extra"))
    assert named >= provided - {"dev", "docs"}
