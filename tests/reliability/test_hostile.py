"""Files that were made to do harm, each opened by the function that opens such files for a user.

Every file must end in one plain sentence (or be read as the data that it also is), run nothing, and take no more memory
than twice its size and 64 MiB. Controls: the same payloads run where other libraries are told to trust a file, and
where our own guard is taken away.
"""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from nnclr import checkpoint, report
from nnclr.config import from_toml, load_preset
from nnclr.data.decode import BadImage
from nnclr.data.source import open_source
from nnclr.embeddings import open_embeddings
from nnclr.encoder import Encoder
from nnclr.errors import InputError, NNCLRError
from nnclr.explorer import projection
from nnclr.importers import import_checkpoint
from nnclr.info import describe
from nnclr.model_card import _records
from nnclr.objectives import find_objective
from nnclr.pretrained import open_encoder
from nnclr.sweep import read_spec
from tests.reliability import hostile_files as made

SLACK = 64 << 20  # bytes of memory beside twice the file


def as_checkpoint(path):
    return import_checkpoint(path, "small-convnet", 16, say=str)


def as_weights(path):
    return open_encoder(f"torchvision:squeezenet1_1?weights={path}")


def as_images(path):
    source = open_source(str(path))
    for i in range(len(source)):
        with contextlib.suppress(BadImage):
            source.read(i)
        assert source.describe(i).isprintable()
    return source


def as_report(path):
    return report.write_report(path, path / "page.html", with_map=False)


def as_map(path):
    """The explorer's map beside a file of embeddings; one that is none of ours is computed anew."""
    assert projection._read(path, "x", 40) is None


def outcome(way, path, canary):
    """What is wrong about how a file was opened, or None."""
    size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before = memory("VmRSS")
    try:
        way(path)
    except NNCLRError as error:
        if len(str(error)) > 800 or not str(error).isprintable():
            return f"is told of in {len(str(error))} characters: {str(error)[:100]!r}"
    except Exception as error:  # noqa: BLE001 - whatever else it is, it is wrong
        return f"ended in {type(error).__name__}: {error}"
    grown = memory("VmHWM") - before
    if canary.exists() or Path("ran").exists():
        return "was executed"
    return f"took {grown >> 20} MiB" if grown > 2 * size + SLACK else None


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


class Trial:
    """Opens files one after the other, in places of their own."""

    def __init__(self, folder):
        self.folder, self.wrong, self.opened = folder, {}, 0
        self.canary = folder / "canary"

    def path(self, name):
        place = self.folder / str(self.opened)
        place.mkdir()
        self.opened += 1
        return place / name

    def open(self, what, way, path):
        found = outcome(way, path, self.canary)
        if found is not None:
            self.wrong[what, way.__name__] = found
        self.forget()

    def forget(self):
        for path in (self.canary, Path("ran")):
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)

    @property
    def executed(self):
        return [what for what, found in self.wrong.items() if found == "was executed"]


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for way in (as_checkpoint, as_weights, open_encoder, open_source, open_embeddings):  # imports are no file's doing
        with contextlib.suppress(InputError):
            way(tmp_path / "absent.parquet")
    made.saved(made.small())
    return Trial(tmp_path)


def try_pickles(trial):
    for name, content in made.PICKLES.items():
        path = trial.path(name)
        path.write_bytes(content(trial.canary))
        trial.open(name, as_checkpoint, path)
        trial.open(name, open_encoder, path)
        trial.open(name, as_images, path)
    for name in ("eval.pth", "old-format.tar", "archive.tar"):
        path = trial.path(name)
        path.write_bytes(made.PICKLES[name](trial.canary))
        trial.open(name, as_weights, path)
    for name in ("pytorch_model.bin", "model.pth"):  # what timm itself would read
        folder = made.encoder_folder(trial.path("folder"))
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(made.PICKLES["system.pt"](trial.canary))
        trial.open(name, open_encoder, folder)
        trial.open(name, lambda path: open_encoder(f"timm:local-dir:{path}"), folder)


def test_pickles_run_nothing(trial, count):
    try_pickles(trial)
    count("F1", "hostile pickles and archives opened without running anything", trial.opened - len(trial.executed),
          trial.opened)  # fmt: skip
    assert trial.wrong == {}
    assert trial.opened >= 30


def test_without_the_guard_pickles_run(trial, monkeypatch):
    """The control: with a loader that trusts files, most of the same files run."""
    real = torch.load
    trusting = lambda *a, **k: real(*a, **k | {"weights_only": False})  # noqa: E731
    monkeypatch.setattr(torch, "load", trusting)
    ran = set()
    for name, content in made.PICKLES.items():
        if name.startswith(("bomb", "claims")):
            continue
        path = trial.path(name)
        path.write_bytes(content(trial.canary))
        with contextlib.suppress(Exception):
            as_checkpoint(path)
        if trial.canary.exists():
            ran.add(name)
            trial.forget()
    assert len(ran) >= 14, ran
    assert {"system.pt", "nested-bytes.pt", "old-format.pth", "setstate.pt", "handmade.pt"} <= ran


def test_a_bomb_is_refused_before_it_is_unpacked(trial, monkeypatch):
    """The control of the bound on memory: a file of a quarter MiB takes 256 where it is not looked at first."""
    path = trial.path("bomb.pt")
    path.write_bytes(made.PICKLES["bomb.pt"](trial.canary))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"would unpack to 256 MiB, and torch.save does not compress"):
        as_checkpoint(path)
    monkeypatch.setattr("nnclr.importers._refuse_bomb", lambda path: None)
    assert outcome(as_checkpoint, path, trial.canary).startswith("took 2")


def test_distributed_checkpoints_are_no_way_in(trial, count):
    for way in (as_checkpoint, Encoder.from_pretrained, as_images, as_report, checkpoint.load_latest):
        folder = made.distributed_checkpoint(trial.path("dcp"), trial.canary)
        trial.open("folder", way, folder)
        trial.open(".metadata", as_checkpoint, folder / ".metadata")
    folder = made.distributed_checkpoint(trial.path("checkpoints") / "step-00000001", trial.canary)
    trial.open("as a checkpoint", checkpoint.load_latest, folder.parent)
    count("F2", "folders with an evil .metadata opened without running it", trial.opened - len(trial.executed),
          trial.opened)  # fmt: skip
    assert trial.wrong == {}
    with contextlib.suppress(Exception):  # the control: PyTorch's own reader unpickles it
        FileSystemReader(folder).read_metadata()
    assert trial.canary.exists()


def test_class_paths_are_data(trial, count, monkeypatch):
    for name, make in (made.CLASS_PATHS | made.HARMLESS_CLASS_PATHS).items():
        folder = make(trial.path("encoder"), trial.canary)
        trial.open(name, Encoder.from_pretrained, folder)
        if name in made.CLASS_PATHS and name != "weights at an address":
            with pytest.raises(InputError):
                Encoder.from_pretrained(folder)
    for kind in ("_instantiator", "_target_", "datamodule_cls"):  # beside the weights of a Lightning checkpoint
        path = trial.path("lightning.ckpt")
        told = {kind: "os.system", "_args_": ["touch ran"]}
        torch.save({"state_dict": made.small(), "hyper_parameters": told, "callbacks": {"os.system": {}}}, path)
        trial.open(kind, as_checkpoint, path)
    # A module on Python's path whose import makes the canary, named as the objective of a run that came from elsewhere.
    Path("evil_module.py").write_text(f"open({str(trial.canary)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    text = b'data = "x"\nout = "y"\nobjective = "evil_module:Thing"\nbackbone = "evil_module.Thing"\n'
    ways = (as_report, lambda run: list(describe(str(run))), _records)
    for way in (*ways, lambda run: from_toml((run / "config.toml").read_bytes(), "it")):
        trial.open("objective", way, made.run_folder(trial.path("run"), text))
    count("F3", "class paths in files that were imported or called", trial.opened - len(trial.executed), trial.opened)
    assert trial.wrong == {}
    assert "evil_module" not in sys.modules
    with pytest.raises(ValueError, match="cannot be imported"):  # the control: on the command line it is a user's wish
        find_objective("evil_module:Thing")
    assert trial.canary.exists()


def test_headers_and_manifests_are_bounded(trial, count):
    for name, content in made.HEADERS.items():
        path = trial.path("w.safetensors")
        path.write_bytes(content)
        trial.open(name, as_checkpoint, path)
        folder = made.encoder_folder(trial.path("encoder"))
        (folder / "model.safetensors").write_bytes(content)
        trial.open(name, Encoder.from_pretrained, folder)
        with pytest.raises(InputError):
            Encoder.from_pretrained(folder)
    for name, make in made.CHECKPOINTS.items():
        folder = make(trial.path("checkpoints"), trial.canary)
        trial.open(name, checkpoint.load_latest, folder)
        with pytest.raises(NNCLRError, match=r"none of the 1 checkpoints"):
            checkpoint.load_latest(folder)
    for text in ("[" * 100_000, '{"a":' * 100_000, "NaN", '{"nnclr": ' + "9" * 5000 + "}"):
        trial.open(text[:9], Encoder.from_pretrained, made.with_text("config.json", text)(trial.path("e"), None))
    count("F5", "hostile headers, manifests and JSON ending in one sentence and bounded memory",
          trial.opened - len(trial.wrong), trial.opened)  # fmt: skip
    assert trial.wrong == {}
    good = made.run_checkpoints(trial.path("checkpoints"), made.GOOD_STATE)  # the control: it is the damage
    assert checkpoint.load_latest(good)[0].step == 1


def test_arrays_and_tables_run_nothing_and_are_measured_first(trial, count):
    for name, content in made.ARRAYS.items():
        for way, file in ((open_embeddings, "e.npy"), (as_images, "images.npy")):
            path = trial.path(file)
            path.write_bytes(content(trial.canary))
            trial.open(name, way, path)
            with pytest.raises(InputError):
                way(path)
    for name in ("objects", "an archive with objects", "a trillion rows", "negative rows"):
        images = trial.path("images.npy")
        np.save(images, np.zeros((2, 8, 8, 3), np.uint8))
        images.with_suffix(".labels.npy").write_bytes(made.ARRAYS[name](trial.canary))
        trial.open(f"labels: {name}", as_images, images)
    for name in ("an archive with objects", "an archive that is a bomb", "more rows than addresses", "a trillion rows"):
        path = trial.path("e.parquet.map.npz")
        content = made.ARRAYS[name](trial.canary)
        path.write_bytes(made.zipped_arrays(content) if "rows" in name else content)
        trial.open(f"map: {name}", as_map, path)
    for way in (open_embeddings, as_images):
        trial.open("extension type", way, made.extension_type(trial.path("e.parquet"), trial.canary))
    for text in ("[" * 100_000, "{}", '{"format": ' + "9" * 5000 + "}", '{"format": 1, "class_names": 5}'):
        trial.open(text[:9], open_embeddings, made.facts_of_embeddings(text)(trial.path("e.parquet"), None))
    count("F6", "hostile arrays and tables opened without running anything, memory bounded",
          trial.opened - len(trial.wrong), trial.opened)  # fmt: skip
    assert trial.wrong == {}
    with contextlib.suppress(Exception):  # the control: these run where pickles are allowed
        np.load(io.BytesIO(made.objects(trial.canary)), allow_pickle=True)
    assert trial.canary.exists()


def test_shards_are_read_and_never_unpacked(trial, count):
    for name, members in made.members_of(trial.canary).items():
        path = trial.path("shard.tar")
        path.write_bytes(made.shard([*members, ({"name": "good.png"}, made.picture()), ({"name": "good.cls"}, b"0")]))
        before = sorted(trial.folder.rglob("*"))
        trial.open(name, as_images, path)
        left = {file for file in sorted(trial.folder.rglob("*")) if file not in before and "cache" not in file.parts}
        assert left == set(), name
    count("F7", "shards with pickles, ways out, links and devices from which nothing came", trial.opened
          - len(trial.wrong), trial.opened)  # fmt: skip
    assert trial.wrong == {}


@pytest.mark.parametrize("name", made.BOMBS)
def test_hostile_toml_is_one_sentence(trial, name):
    """Of a recipe, a sweep, a run: within a second and little memory, whatever it is made of."""
    text = made.BOMBS[name]
    path = trial.path("recipe.toml")
    path.write_bytes(text)
    for way in (lambda p: load_preset(str(p)), read_spec):
        trial.open(name, way, path)
        with pytest.raises(InputError):
            way(path)
    run = made.run_folder(trial.path("run"), text)
    trial.open(name, as_report, run)
    trial.open(name, lambda run: list(describe(str(run))), run)
    trial.open(name, _records, run)
    assert trial.wrong == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate = 1e-3", 0.001),
        ("learning_rate = 1\nlearning_rate = 2", "Cannot overwrite a value"),
        ("seed = 010", "not valid TOML"),
        ("flip = on", "not valid TOML"),
        ("learning_rate = 12:30:00", "must be a number"),
        ("learning_rate = true", "must be a number"),
        ("learning_rate = '1'", "must be a number"),
        ("seed = 1.0", "must be a whole number"),
        ("learning_rat = 1", "no setting is called 'learning_rat'; did you mean learning_rate"),
        ("seed = !!python/object/apply:os.system ['touch ran']", "not valid TOML"),
        ("[learning_rate]\nx = 1", "must be a number"),
        ("learning_rate = nan", "must be a finite number"),
    ],
)
def test_a_setting_is_what_it_says_or_an_error(tmp_path, text, expected, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = f'data = "x"\nout = "y"\n{text}\n'.encode()
    if isinstance(expected, float):
        assert from_toml(whole, "it").learning_rate == expected
        return
    with pytest.raises(InputError, match=expected):
        from_toml(whole, "it")
    assert not Path("ran").exists()


def test_an_onnx_file_is_never_read(tmp_path):
    """There is no way in for one: no external data of it can point anywhere."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07\x12\x04evil")
    for way in (open_encoder, as_checkpoint, as_images, open_embeddings, Encoder.from_pretrained):
        with pytest.raises(InputError):
            way(path)
