"""What the source, the pins and a run folder may not hold: found by reading them, without running anything."""

import ast
import json
import os
import random
import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import nnclr
from nnclr.data.shards import shard_source
from nnclr.encoder import _HUB_NAME, Encoder
from nnclr.errors import InputError
from nnclr.pack import pack
from nnclr.run_folder import write_record
from tests.settings import TINY
from tests.test_architecture import SOURCES

ROOT = Path(nnclr.__file__).parents[2]

# Below these versions something is known to be wrong that a hostile file or page can use; each with where that is told.
FLOORS = {
    "torch": ((2, 10), "CVE-2026-24747: memory corruption in weights_only loading"),
    "pillow": ((12, 3), "CVE-2026-59199 and others in decoders"),
    "onnx": ((1, 21), "CVE-2026-27489: external data outside the model's folder"),
    "safetensors": ((0, 8), "earlier ones write in place, and a kill leaves half a file"),
    "starlette": ((1, 1), "CVE-2026-48818: static files outside their folder"),
    "timm": ((1, 0, 31), "earlier ones may unpickle weights of the hub: weights_only was not the default"),
    "datasets": ((4,), "earlier ones may run code of a data set"),
}
NEVER = ("lightning", "pytorch-lightning")  # two releases of 2026 took credentials at import (GHSA-w37p-236h-pfx3)
REMOTE = re.compile(r"trust_remote_code|torch\.hub|hub\.load|load_state_dict_from_url|urlretrieve|urlopen\(")


# ---- F9: code and weights from elsewhere ---------------------------------------------------------------------


def remote(sources):
    """Lines that would fetch code, or anything without https."""
    return [(path, line.strip()) for path, text in sources.items() for line in text.splitlines() if REMOTE.search(line)]


def unpacks(sources):
    """Calls that unpack archives, or join a name from a file to a folder without a look at it."""
    found = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.rpartition(".")[2] in ("extractall", "extract", "unpack_archive", "literal_eval", "import_module"):
                found.append((path, name))
    return found


def test_nothing_is_fetched_that_runs():
    """The one request of our own is for a list of names, by https."""
    assert [path for path, _ in remote(SOURCES)] == ["evaluation/finetune.py"]
    for line in (
        "torch.hub.load('a/b', 'c')",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "urlopen('http://x')",
    ):
        assert remote({"a.py": line}) == [("a.py", line)]


def test_no_archive_is_unpacked_and_no_name_imported():
    """But for one's own objective on the command line, and names that stand in the source."""
    assert set(unpacks(SOURCES)) == {
        ("__init__.py", "import_module"),
        ("objectives/__init__.py", "importlib.import_module"),
        ("tracking.py", "importlib.import_module"),
    }
    for line in ("archive.extractall(p)", "shutil.unpack_archive(p)", "importlib.import_module(name)"):
        assert len(unpacks({"a.py": line})) == 1


# ---- F7: names out of files ----------------------------------------------------------------------------------

PARTS = ("..", ".", "/", "//", "\\", "%2e%2e", "%2f", "\0", "\n", "~", "$HOME", "a", "b.tar", "etc", "passwd", "C:",
         "|", "\x1b[0m", "\u2024\u2024", "\uff0f", "\u202e", "file://", "http://", "*", "{a,b}", "[ab]")  # fmt: skip
CORNERS = ("../x.tar", "/etc/x.tar", "a/../../x.tar", "./x.tar", "x.tar/", "x.tar\n", "x.tar\0", "..tar/x.tar", "", ".",
           "..", "a/b.tar", "\\x.tar", "file:///etc/x.tar", "x.tar#y", "*.tar", "{a,b}.tar", "~/x.tar")  # fmt: skip


def names(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 6))) + rng.choice(["", ".tar", ".npy"]) for _ in range(n)]


@pytest.fixture
def shards(tmp_path):
    pack((np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2), tmp_path / "set", say=str)
    for name in ("x.tar", "x.npy"):  # what a name could lead to outside
        (tmp_path / name).write_bytes(b"outside")
    return tmp_path / "set"


def test_names_in_an_index_lead_nowhere(shards, count):
    """Of a shard or its table: whatever is no plain file name of the folder is refused before anything is opened."""
    index = json.loads((shards / "index.json").read_text())
    tried = refused = 0
    for key, name in [(key, name) for key in ("file", "index") for name in (*CORNERS, *names(300))]:
        if re.fullmatch(r"[A-Za-z0-9_.-]+\.(tar|npy)", name):
            continue
        changed = json.loads(json.dumps(index))
        changed["shards"][0][key] = name
        (shards / "index.json").write_text(json.dumps(changed))
        tried += 1
        try:
            shard_source([str(shards)])
        except InputError as error:
            refused += "damaged" in str(error)
    count("F7", "names in an index that would lead out of its folder and were refused", refused, tried)
    assert refused == tried >= 400
    (shards / "index.json").write_text(json.dumps(index))  # the control: the names were what was wrong
    assert len(shard_source([str(shards)])) == 4


def test_names_on_the_hub_are_two_plain_words(count):
    tried = [name for name in (*CORNERS, *names(300, 1)) if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    refused = 0
    for name in tried:
        try:
            Encoder.from_pretrained(f"hf:{name}")
        except InputError as error:
            refused += "is no name on the Hugging Face Hub" in str(error)
    count("F7", "names that are none on the hub and were refused before a request", refused, len(tried))
    assert refused == len(tried) >= 250
    assert not any(_HUB_NAME.fullmatch(name) for name in ("../x", "a/..", ".a/b", "a/b/c", "-a/b", "a/b\n"))
    assert _HUB_NAME.fullmatch("owner/name-1.0_x")


# ---- F10: dependencies ---------------------------------------------------------------------------------------


def version(text):
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split("."))


def pins():
    found = re.findall(r"^([a-z0-9_.-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return [(name, version(text)) for name, text in found]


def bounds():
    """Lower bounds of pyproject.toml, the lowest of each package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [text for some in project["optional-dependencies"].values() for text in some]
    found = {}
    for text in texts:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[.*\])?(?:>=([\d.]+))?", text)
        assert match, text
        if match[1] != "nnclr":
            assert match[2], f"{text} has no lower bound"
            found[match[1]] = min(found.get(match[1], (10**9,)), version(match[2]))
    return found


def too_old(versions):
    """Packages below a floor, and those that may not be there at all."""
    old = [name for name, found in versions if name in FLOORS and found < FLOORS[name][0]]
    return old + [name for name, _ in versions if name in NEVER]


def test_pins_bounds_and_what_is_installed_reach_the_floors(count):
    installed = [(name, version(metadata.version(name))) for name in FLOORS]
    checked = [(where, name) for where in (pins(), bounds().items(), installed) for name, _ in where if name in FLOORS]
    assert len(checked) >= 3 * len(FLOORS)
    old = too_old(pins()) + too_old(bounds().items()) + too_old(installed)
    count("F10", "versions (pinned, lowest allowed, installed) at or above their security floor",
          len(checked) - len(old), len(checked))  # fmt: skip
    assert old == []
    assert too_old([("torch", (2, 9, 1)), ("pillow", (12, 2)), ("onnx", (1, 21)), ("lightning", (2, 6, 2))]) == [
        "torch",
        "pillow",
        "lightning",
    ]
    documented = (ROOT / "docs/dependencies.md").read_text()
    for name in ("torch", "pillow", "onnx", "safetensors", "timm"):
        assert f"{name} >= {'.'.join(map(str, bounds()[name]))}" in documented, name


def unhashed(text):
    """Pins without a SHA-256, and lines that are no pins."""
    blocks = re.split(r"\n(?=\S)", text.strip())
    return [b.splitlines()[0] for b in blocks if not re.match(r"[a-z0-9_.-]+==\S+", b) or "--hash=sha256:" not in b]


def test_every_pin_has_a_hash_and_is_installed_by_it():
    text = (ROOT / "requirements.txt").read_text()
    assert unhashed(text) == []
    assert unhashed("torch==2.10 \\\n    --hash=sha256:aa\npillow==12.3\ngit+https://x/y") == [
        "pillow==12.3",
        "git+https://x/y",
    ]
    made = (ROOT / "Makefile").read_text()
    assert made.count("--require-hashes -r") == 2
    assert not re.search(r"pip install (?!.*(--require-hashes|--no-deps|uv==))", made)


# ---- F11: what listens ---------------------------------------------------------------------------------------

LISTENS = """
import json, os, pathlib, sys
from nnclr import distributed
with distributed.process_group("cpu"):
    distributed.barrier()
    distributed.mean({"x": 1.0})
    own = {os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if
           os.path.islink(f"/proc/self/fd/{number}")}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in
            pathlib.Path(f"/proc/net/{kind}").read_text().splitlines()]
    print(json.dumps([row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]))
    distributed.barrier()
"""
LOOPBACK = ("0100007F:", "00000000000000000000000001000000:")


def test_processes_of_one_machine_listen_on_loopback_but_for_pytorchs_meeting_point(count):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", LISTENS], env={**os.environ, **job, "RANK": r, "LOCAL_RANK": r},
                         stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for r in ("0", "1")
    ]  # fmt: skip
    listening = [json.loads(process.communicate(timeout=100)[0].splitlines()[-1]) for process in started]
    ours = [address for some in listening for address in some if not address.endswith(f":{port:04X}")]
    assert len(ours) >= 2
    inside = [address for address in ours if address.startswith(LOOPBACK)]
    count("F11", "listening sockets of a job of two processes that are on loopback", len(inside), len(ours))
    assert inside == ours
    # The control, and the reason for the sentence in SECURITY.md: PyTorch's store takes no address to listen on.
    store = [address for some in listening for address in some if address.endswith(f":{port:04X}")]
    assert store
    assert not any(address.startswith(LOOPBACK) for address in store)
    for page in ("SECURITY.md", "docs/scale.md"):
        assert "listens on every interface" in (ROOT / page).read_text(), page


# ---- F12: secrets --------------------------------------------------------------------------------------------


def holding(folder, text):
    return [path.name for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


def test_no_secret_of_the_environment_or_the_command_line_is_kept(tmp_path, pictures, monkeypatch, count):
    secrets = [f"canary-{i}" for i in range(8)]
    for name, secret in zip(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY"), secrets, strict=False):
        monkeypatch.setenv(name, secret)
    command = ["nnclr", "pretrain", f"https://user:{secrets[3]}@host/set.parquet?token={secrets[4]}&split=train",
               "--hf-token", secrets[5], f"--api-key={secrets[6]}", "--password", secrets[7], "--epochs",
               "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    run = nnclr.pretrain(pictures, tmp_path / "run", **{**TINY, "epochs": 1.0}).path
    kept = [secret for secret in secrets if holding(run, secret.encode())]
    count("F12", "secrets of environment and command line that are not in the run folder", 8 - len(kept), 8)
    assert kept == []
    told = json.loads((run / "environment.json").read_text())["command"]
    assert told[:2] + told[-2:] == ["nnclr", "pretrain", "--epochs", "1"]
    assert "split=train" in told[2]
    assert all(path.stat().st_mode & 0o022 == 0 for path in run.rglob("*"))
    monkeypatch.setattr("nnclr.run_folder.command_without_secrets", list)  # the control
    source = nnclr.data.images.array_source(*pictures)
    write_record(run, "", "cpu", source)
    assert holding(run, secrets[4].encode()) == ["environment.json"]


def test_a_secret_in_the_address_of_the_data_is_blotted_where_it_is_kept(tmp_path, monkeypatch):
    """config.toml and checkpoints name the data; the address that the run was started with is asked for again."""
    from nnclr.config import Config, to_toml

    config = Config(data="s3://key:canary@bucket/x-{0..9}.tar", out="r", test_data="https://h/t.parquet?token=canary")
    text = to_toml(config)
    assert "canary" not in text
    assert tomllib.loads(text)["data"].startswith("s3://")
