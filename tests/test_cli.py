"""The command line as a user meets it: exit codes, one plain sentence, nothing written."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import nnclr
from nnclr import cli, heartbeat
from nnclr.config import Config

FLAGS = (
    "--backbone small-convnet --image-size 16 --batch-size 16 --epochs 2 --embedding-dim 8 --device cpu "
    "--projector-hidden-dim 16 --predictor-hidden-dim 16 --support-set-size 20 --log-every-steps 2 --num-workers 0 "
    "--precision fp32"
).split()
PLAIN = "--backbone small-convnet --image-size 16 --batch-size 16 --device cpu --num-workers 0".split()


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 small pictures in two classes."""
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        colour = (200, 40, 40) if i % 2 else (40, 40, 200)
        noise = rng.integers(-40, 40, (20, 24, 3))
        Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def fails(capsys, tmp_path, code, words, *arguments):
    """The command leaves with this code, one sentence of these words, no traceback, and nothing written."""
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert re.search(words, captured.err), captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("does not exist", ["no-such-folder"]),
        ("no images found .* it is empty", ["empty"]),
        (r"no images found .* it holds 2 \.heic", ["others"]),
        ("no backbone is called 'resnet81'; did you mean .*resnet18", ["photos", "--backbone", "resnet81"]),
        ("batch_size=64 is larger than the data: .* holds 40 images; .* such as 32", ["photos", "--batch-size", "64"]),
        ("temperature=-1.0 must be a finite number above 0", ["photos", "--temperature", "-1"]),
        ("no preset is called 'dem'; did you mean demo", ["photos", "--preset", "dem"]),
        ("cannot take 16 x 16|cannot take", ["photos", "--backbone", "timm/vit_tiny_patch16_224", "--image-size", "9"]),
        ("device=tpu9 cannot be used", ["photos", "--device", "tpu9"]),
        ("no torchvision data set is called 'cifar11'; did you mean cifar10", ["torchvision:cifar11"]),
        ("needs? .*split=|expected split", ["torchvision:mnist?spilt=test"]),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(capsys, monkeypatch, tmp_path, photos, words, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    for name in ("a.heic", "b.HEIC", "c.txt"):
        (tmp_path / "others" / name).write_text("x")
    fails(capsys, tmp_path, 2, words, "pretrain", arguments[0], "--out", "run", *FLAGS, *arguments[1:])


def test_unwritable_out(capsys, tmp_path, photos):
    (tmp_path / "file").write_text("x")
    fails(capsys, tmp_path, 83, "cannot be written", "pretrain", photos, "--out", tmp_path / "file" / "run", *FLAGS)
    fails(capsys, tmp_path, 2, "is a file", "pretrain", photos, "--out", tmp_path / "file", *FLAGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    fails(capsys, tmp_path, 2, "is not empty and holds no run", "pretrain", photos, "--out", tmp_path / "mine", *FLAGS)
    fails(capsys, tmp_path, 2, "lies in the images of", "pretrain", photos, "--out", photos, *FLAGS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--objective swav --support-set-size 100", "support_set_size=100 is no setting of swav; leave it out"),
        ("--objective simclr --neighbour oracle", "neighbour='oracle' is no setting of simclr"),
        ("--objective byol --augmentation multi-crop", "byol takes 2 views, not the 8 of multi-crop"),
        ("--neighbour-k 5", "neighbour_k=5 needs neighbour = kth, random or soft"),
        ("--objective bylo", "no objective is called 'bylo'; did you mean byol?"),
        ("--objective nowhere:Method", "the objective nowhere:Method cannot be imported"),
    ],
)
def test_settings_that_do_not_go_together(capsys, tmp_path, photos, flags, words):
    fails(capsys, tmp_path, 2, words, "pretrain", photos, "--out", tmp_path / "run", *PLAIN, *flags.split())


@pytest.mark.parametrize("flags", ["--neighbour oracle", "--objective supervised"])
def test_labels_that_are_missing(capsys, tmp_path, photos, flags):
    cats = photos / "cats"
    fails(
        capsys, tmp_path, 2, "no labels|have none", "pretrain", cats, "--out", tmp_path / "run", *PLAIN, *flags.split()
    )


def test_half_of_a_launchers_variables(capsys, monkeypatch, tmp_path, photos):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = "WORLD_SIZE is set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start the job with torchrun"
    fails(capsys, tmp_path, 2, said, "pretrain", photos, "--out", tmp_path / "run", *FLAGS)


def test_test_images_of_other_classes_are_refused_before_anything_is_written(capsys, tmp_path, photos):
    others = tmp_path / "others"
    for name in ("birds", "cats"):
        (others / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(others / name / "1.png")
    said = "has classes that .*photos lacks, for example 'birds'"
    fails(capsys, tmp_path, 2, said, "pretrain", photos, "--out", tmp_path / "run", "--test-data", others, *FLAGS)


def test_the_word_of_data_is_named(capsys, tmp_path, photos):
    fails(capsys, tmp_path, 2, "nnclr data must be followed by the word check, not by", "data", photos)
    fails(capsys, tmp_path, 2, "must be followed by the word check, not by chekc", "data", "chekc", photos)


def test_names_that_the_output_cannot_hold_are_escaped(tmp_path, photos):
    (photos / "cats").rename(photos / "cats \N{CAT FACE}")
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "nnclr", "info", str(photos)]
    answer = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr
    assert rb"cats \U0001f431: 20" in answer.stdout


@pytest.mark.parametrize("write", [lambda: cli.main(["trian"]), lambda: heartbeat._leave("rank 1 is gone")])
def test_a_line_of_one_rank_is_one_write(monkeypatch, write):
    """Where Python does not buffer, as in many containers, two writes of one rank let another's line in between."""
    written = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    monkeypatch.setattr("os._exit", lambda code: None)
    write()
    (line,) = filter(None, written)
    assert line.startswith("nnclr: ")
    assert line.endswith("\n")
    written.clear()
    print("nnclr: the control", file=sys.stderr)
    assert len(written) == 2


def test_unknown_command_and_flag(capsys, tmp_path):
    fails(capsys, tmp_path, 2, "'frobnicate' is no command; there are pretrain, demo", "frobnicate")
    fails(capsys, tmp_path, 2, "'trian' is no command; did you mean pretrain?", "trian")
    fails(
        capsys,
        tmp_path,
        2,
        "--epoch is no flag of nnclr pretrain; did you mean --epochs",
        *"pretrain x --epoch 3".split(),
    )


def test_whole_way_of_a_user(capsys, tmp_path, photos):
    """Pre-train, start again, evaluate, look: what the README shows."""
    run = tmp_path / "run"
    command = ["pretrain", str(photos), "--out", str(run), *FLAGS]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "40 images, 2 classes (only to measure)" in said
    assert "online kNN: 4 images, each by the labels of its 20 nearest among 36 others" in said
    assert re.search(r"step +4/4 +loss \d\.\d+ \(chance 2\.77\) +neighbour purity \d+ %", said)
    assert re.search(r"step +0/4 +kNN \d+\.\d %", said)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.toml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints", "encoder"}
    assert sorted(path.name for path in (run / "neighbours").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    with Image.open(run / "neighbours/step-00000004.png") as sheet:
        assert sheet.width > 400

    assert cli.main(command) == 0
    assert "it is finished" in capsys.readouterr().out
    assert cli.main([*command[:-1], "bf16"]) == 2
    assert "precision: 'fp32' there, 'bf16' now" in capsys.readouterr().err

    values = []
    for protocol in ("knn", "knn", "linear"):
        assert cli.main(["evaluate", str(run), str(photos), "--protocol", protocol]) == 0
        values.append(json.loads(capsys.readouterr().out))
    assert values[0]["value"] == values[1]["value"]
    assert values[0]["value"] > 0.7  # red and blue
    assert values[0]["parameters"]["k"] == 20
    assert values[0]["parameters"]["temperature"] == 0.07
    assert (values[0]["n_train"], values[0]["n_test"]) == (36, 4)
    assert values[0]["step"] == 4
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines[-3:]] == ["knn", "knn", "linear"]

    assert cli.main(["info", str(run)]) == 0
    assert 'backbone = "small-convnet"' in capsys.readouterr().out
    assert cli.main(["info", str(photos)]) == 0
    assert "dogs: 20" in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    assert torch.__version__.partition("+")[0] in capsys.readouterr().out
    assert cli.main(["evaluate", str(photos), str(photos)]) == 2
    assert "holds no encoder" in capsys.readouterr().err


def test_nothing_is_left_out_in_silence(capsys, tmp_path, photos):
    whole = (photos / "cats/4.png").read_bytes()
    (photos / "cats/4.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(photos / "dogs/pipe.png")
    assert cli.main(["pretrain", str(photos), "--out", str(tmp_path / "run"), *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "40 images, 2 classes (only to measure), 1 x not a regular file left out (dogs/pipe.png)" in said
    assert "one image cannot be read and was skipped" in said
    listed = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert [(line["image"], line["reason"][:9]) for line in listed] == [("cats/4.png", "truncated")]
    assert nnclr.Run(tmp_path / "run").metrics[-1]["bad_images"] == 1


def test_unlabelled_pictures_have_no_purity(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    run = nnclr.pretrain(
        images, tmp_path / "run", backbone="small-convnet", image_size=16, batch_size=16, epochs=3, quiet=True,
        embedding_dim=8, projector_hidden_dim=16, predictor_hidden_dim=16, log_every_steps=1, device="cpu",
    )  # fmt: skip
    assert run.evaluations == []
    assert all("neighbour_purity" not in line for line in run.metrics)
    assert {"neighbour_similarity", "neighbour_age", "own_id_share", "distinct_neighbours", "support_set_fill",
            "embedding_std", "rank_me", "alignment", "uniformity", "loss_chance"} <= set(run.metrics[-1])  # fmt: skip


def test_encoder_folder_loads_by_timm(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 80, 80, 3), dtype=np.uint8)
    run = nnclr.pretrain(
        images, tmp_path / "run", backbone="timm/vit_tiny_patch16_224", image_size=80, batch_size=4, epochs=1,
        embedding_dim=8, projector_hidden_dim=16, predictor_hidden_dim=16, device="cpu", precision="fp32", quiet=True,
    )  # fmt: skip
    ours = nnclr.Encoder.from_pretrained(run.path)
    theirs = timm.create_model(f"local-dir:{run.path / 'encoder'}", pretrained=True).eval()
    x = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        assert torch.equal(ours.module(x), theirs(x))
    assert tuple(theirs.pretrained_cfg["mean"]) == ours.mean
    assert theirs.pretrained_cfg["tag"] == "nnclr"


SLOW_RUN = """
import numpy as np, sys, torch
torch.set_num_threads(1)
from nnclr import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint_and_code_80(tmp_path, photos, number):
    command = [sys.executable, "-c", SLOW_RUN, "pretrain", str(photos), "--out", str(tmp_path / "run"), *FLAGS]
    command += ["--epochs", "100000", "--evaluate-every-epochs", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 84
    assert f"in use by process {process.pid}" in second.stderr
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 80
    assert f"stopped by {number.name} at step" in err
    step = int(re.search(r"at step (\d+)", err)[1])
    assert (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").exists()


def test_options_of_protocols_are_flags(capsys):
    """Those of the chosen protocol arrive there; those of another one are refused before any work."""
    command = ["evaluate", "random:small-convnet?size=16", "demo-photos"]
    assert (
        cli.main([*command, "--protocol", "linear", "--augmentation", "--epochs", "1", "--learning-rates", "0.1"]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"]["augmentation"] == "random crops and flips"
    assert record["parameters"]["learning_rates"] == [0.1]
    for options, words in (
        (["--protocol", "linear", "--k", "5"], "k is no parameter of linear; it takes augmentation, epochs"),
        (["--protocol", "knn", "--no-from-scratch"], "from_scratch is no parameter of knn; it takes k, temperature"),
        (["--protocol", "label-free", "--device", "nothing"], "device=nothing cannot be used"),
        (["--out", "no/such/folder.jsonl"], "--out no/such/folder.jsonl must be a .jsonl file in a folder that exists"),
    ):
        assert cli.main([*command, *options]) == 2
        assert words in capsys.readouterr().err


def test_every_flag_of_pretrain_is_in_its_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    shown = capsys.readouterr().out
    listed = set(re.findall(r"^\W*(?:-h, )?(--[a-z][a-z-]*)", shown, re.MULTILINE))
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)} - {"--data"}
    assert listed == fields | {"--dry-run", "--help"}
    assert "--config" not in listed  # the control
    assert re.search(r"--dry-run, --no-dry-run +Show what the run would be", shown)
    assert cli.main(["pretrain", "x", "--dry-run", "False"]) == 2
    assert "--dry-run is there and switched off" in capsys.readouterr().err


def test_an_evaluation_is_told_in_words_on_a_terminal_and_as_json_elsewhere(capsys, tmp_path, photos, monkeypatch):
    out = tmp_path / "found.jsonl"
    command = ["evaluate", "random:small-convnet?size=16", str(photos), "--k", "3", "5", "--out", str(out)]
    assert cli.main(command) == 0
    record = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main([*command, "--baselines"]) == 0
    said = capsys.readouterr()
    low, high = (f"{100 * bound:.1f}" for bound in record["interval"])
    lines = said.out.splitlines()
    assert lines[0] == "knn top-1 accuracy, with the 95 % interval over images of the test set, Wilson"
    assert lines[1].split() == [command[1], f"{100 * record['value']:.1f}", "%", low, "to", high]
    assert [line.split()[0] for line in lines[2:4]] == ["pixels?size=16", "random:small-convnet?size=16&seed=0"]
    assert f"learned from  36 images of {photos}" in lines
    assert f"scored        4 images of {photos}" in lines
    assert any(line.startswith(f"protocol      k {record['parameters']['k']}; temperature 0.07; ") for line in lines)
    assert lines[-1] == f"record        {out}"
    assert max(map(len, lines)) < 200
    assert "{" not in said.out
    assert len(out.read_text().splitlines()) == 4
    assert cli.main([*command[:-4], "--k", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "record        not kept; --out FILE.jsonl keeps it"


def test_each_warning_of_an_evaluation_is_said_once(capsys, photos):
    (photos / "cats/0.png").write_bytes(b"no picture")
    command = ["evaluate", "random:small-convnet?size=16", str(photos), "--test", str(photos), "--baselines"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert warned == [
        f"warning: the images of {photos} that are scored are those that were learned from",
        f"warning: 1 of 40 images of {photos} cannot be read and are left out",
    ]
    assert sum(" knn top-1 accuracy " in line for line in lines) == 3  # the control: what differs is said of each


def test_a_line_that_a_kill_has_cut_stops_no_verb(capsys, tmp_path, photos):
    run = tmp_path / "run"
    assert cli.main(["pretrain", str(photos), "--out", str(run), *FLAGS]) == 0
    whole = len(nnclr.Run(run).metrics)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 9, "lo')
    capsys.readouterr()
    assert cli.main(["info", str(run)]) == 0
    assert "last metrics" in capsys.readouterr().out
    assert len(nnclr.Run(run).metrics) == whole
    assert cli.main(["report", str(run)]) == 0
    assert "1 line of metrics.jsonl cannot be read" in (run / "report.html").read_text()


def test_no_verb_overwrites_what_it_did_not_write(capsys, tmp_path, photos):
    """Every --out of another kind than the verb writes is refused, and stays as it was."""
    run, vectors = tmp_path / "run", tmp_path / "e.npy"
    assert cli.main(["pretrain", str(photos), "--out", str(run), *FLAGS]) == 0
    assert cli.main(["embed", "pixels?size=8", str(photos), "--out", str(vectors)]) == 0
    (tmp_path / "notes.csv").write_text("my own table\n")
    (tmp_path / "page.html").write_text("<!doctype html>")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    for words, *arguments in (
        ("must be a .html file", "report", run, "--out", vectors),
        ("must be a .html file", "report", run, "--out", run / "metrics.jsonl"),
        ("belongs to the embeddings", "search", vectors, "--id", "1", "--out", tmp_path / "e.ids.csv"),
        ("holds no results of a search", "search", vectors, "--id", "1", "--out", tmp_path / "notes.csv"),
        ("must be a .jsonl file", "evaluate", run, photos, "--out", tmp_path / "page.html"),
        ("is a file; name a folder", "compare", run, "--out", tmp_path / "notes.csv"),
        ("is no evaluation result", "compare", vectors),
        ("is no port", "explore", vectors, "--port", "99999"),
        ("workers are below 0", "embed", "pixels", photos, "--out", tmp_path / "new.npy", "--num-workers", "-1"),
        ("--extend-epochs lengthens", "pretrain", photos, "--out", run, *FLAGS, "--epochs", "3"),
        ("in a folder that does not exist", "export", run, "--format", "onnx", "--out", tmp_path / "no/x.onnx"),
    ):
        fails(capsys, tmp_path, 2, words, *arguments)
    assert {path: path.read_bytes() for path in before} == before


def test_search_replaces_its_own_results(capsys, tmp_path, photos):
    vectors, found = tmp_path / "e.npy", tmp_path / "found.csv"
    assert cli.main(["embed", "pixels?size=8", str(photos), "--out", str(vectors)]) == 0
    for query in ("1", "2"):
        assert cli.main(["search", str(vectors), "--id", query, "--out", str(found)]) == 0
    assert found.read_text().splitlines()[1].startswith("id 2")
