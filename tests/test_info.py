"""`nnclr info`, and that what needs no torch does not wait for it."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

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
