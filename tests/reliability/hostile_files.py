"""Files that were made to do harm, for `test_hostile`: each maker writes one and gives its path.

A payload makes the canary, a file or a folder, when it runs.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image

from nnclr.embeddings import write_embeddings
from nnclr.encoder import Encoder
from nnclr.models.backbone import create_backbone


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Touch(Call):
    """Makes the canary when it is unpickled, without a shell."""

    def __init__(self, canary):
        super().__init__(os.mkdir, str(canary))


class Wakes:
    """Makes the canary when its state is set."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __setstate__(self, state):
        os.mkdir(state["canary"])


class WakesAsModule(torch.nn.Linear):
    def __init__(self, canary):
        super().__init__(1, 1)
        self.canary = str(canary)

    def __setstate__(self, state):
        os.mkdir(state["canary"])


def load_bytes(content):
    """What a user's own class may do when it is unpickled."""
    return torch.load(io.BytesIO(content), weights_only=False)


def small(**more):
    """The weights of a network that opens in milliseconds."""
    return create_backbone("small-convnet", 16).state_dict() | more


# ---- pickles (F1) ------------------------------------------------------------------------------------------


def saved(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def in_a_tar(canary):
    """torch's oldest format, and any other archive that is called a checkpoint."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Touch(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def in_a_zip(canary, *names, compression=zipfile.ZIP_STORED, more=b""):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in names:
            archive.writestr(f"archive/{name}", pickle.dumps(Touch(canary)))
        archive.writestr("archive/version", "3\n")
        if more:
            archive.writestr("archive/data/0", more)
    return file.getvalue()


def zeros_compressed():
    """Weights whose zeros were compressed: 256 MiB in a quarter of one."""
    plain, file = io.BytesIO(saved({"weight": torch.zeros(256)})), io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data/0"):
                with new.open(entry.filename, "w", force_zip64=True) as out:
                    for _ in range(256):
                        out.write(bytes(1 << 20))
            elif entry.filename.endswith("data.pkl"):
                new.writestr(
                    entry.filename, content.replace(b"M\x00\x01", b"J\x00\x00\x00\x04")
                )  # 256 to 2**26 numbers
            else:
                new.writestr(entry.filename, content)
    return file.getvalue()


def legacy_that_claims(numbers):
    """A file of the old format whose tensor is said to be huge."""
    content = saved({"weight": torch.zeros(256)}, zipped=False)
    assert content.count(b"M\x00\x01") >= 2
    return content.replace(b"M\x00\x01", b"\x8a\x06" + numbers.to_bytes(6, "little"))


PICKLES = {
    "system.pt": lambda c: saved(Call(os.system, f"touch {c}")),
    "eval.pth": lambda c: saved({"state_dict": Call(eval, f"open({str(c)!r}, 'w').close()")}),
    "exec.ckpt": lambda c: saved(small(epoch=Call(exec, f"open({str(c)!r}, 'w').close()"))),
    "popen.bin": lambda c: saved(Call(subprocess.check_call, ["touch", str(c)])),
    "nested-bytes.pt": lambda c: saved(Call(torch.storage._load_from_bytes, saved(Touch(c)))),
    "nested-load.pt": lambda c: saved({"model": Call(load_bytes, saved(Touch(c)))}),
    "pickle-loads.ckpt": lambda c: saved(Call(pickle.loads, pickle.dumps(Touch(c)))),
    "old-format.pth": lambda c: saved(small(queue=Touch(c)), zipped=False),
    "old-format.tar": lambda c: saved(Touch(c), zipped=False),
    "setstate.pt": lambda c: saved(Wakes(c)),
    "namespace.pth": lambda c: saved(small(args=argparse.Namespace(lr=Touch(c)))),
    "ordered.pth": lambda c: saved(OrderedDict(model=OrderedDict(weight=Touch(c)))),
    "whole-module.pt": lambda c: saved(WakesAsModule(c)),
    "bare.pt": lambda c: pickle.dumps(Touch(c)),
    "bare-protocol-0.ckpt": lambda c: pickle.dumps(Touch(c), 0),
    "bare-protocol-5.bin": lambda c: pickle.dumps({"state_dict": Touch(c)}, 5),
    "objects.pth": lambda c: pickle.dumps(np.array([Touch(c)], dtype=object)),
    "dotted.pt": lambda c: b"cos\nmkdir\n(V" + str(c).encode() + b"\ntR.",
    "archive.tar": in_a_tar,
    "archive.pth": in_a_tar,
    "handmade.pt": lambda c: in_a_zip(c, "data.pkl"),
    "torchscript.pt": lambda c: in_a_zip(c, "constants.pkl", "data.pkl"),
    "compressed.pt": lambda c: in_a_zip(c, "data.pkl", compression=zipfile.ZIP_DEFLATED, more=bytes(10**6)),
    "packed.pt.gz": lambda c: gzip.compress(pickle.dumps(Touch(c))),
    "seven.pt": lambda c: b"7z\xbc\xaf\x27\x1c" + pickle.dumps(Touch(c)),
    "renamed.safetensors": lambda c: saved(Touch(c)),
    "bomb.pt": lambda c: zeros_compressed(),
    "claims-8-TiB.pth": lambda c: legacy_that_claims(1 << 41),
    "itself.pth": lambda c: saved(endless()),
}  # fmt: skip


def endless():
    """A dictionary that holds itself."""
    content = {"odd": torch.ones(1)}
    content["model"] = content
    return content


# ---- folders of PyTorch's distributed checkpoints (F2) -------------------------------------------------------


def distributed_checkpoint(folder, canary):
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(canary)))
    (folder / "__0_0.distcp").write_bytes(saved(Touch(canary)))
    return folder


# ---- encoder folders: class paths, headers, JSON (F3, F5) ----------------------------------------------------


def encoder_folder(folder):
    Encoder(create_backbone("small-convnet", 16), 16, provenance={"backbone": "small-convnet"}).save_pretrained(folder)
    return folder


def with_config(**changes):
    """An encoder folder whose config.json has other values; a dotted name is one inside."""

    def make(folder, canary):
        path = encoder_folder(folder) / "config.json"
        config = json.loads(path.read_text())
        for name, value in changes.items():
            *parts, last = name.split(".")
            inner = config
            for part in parts:
                inner = inner[part]
            inner[last] = json.loads(json.dumps(value).replace("CANARY", str(canary)))
        path.write_text(json.dumps(config))
        return folder

    return make


def with_text(name, text):
    """An encoder folder with this text for one of its files."""

    def make(folder, canary):
        (encoder_folder(folder) / name).write_text(text)
        return folder

    return make


CLASS_PATHS = {
    "os.system": with_config(**{"nnclr.backbone": "os.system"}),
    "module:os.system": with_config(**{"nnclr.backbone": "module:os.system"}),
    "a call": with_config(**{"nnclr.backbone": "__import__('os').system('touch CANARY')"}),
    "_target_ for a name": with_config(**{"nnclr.backbone": {"_target_": "os.system", "_args_": ["touch CANARY"]}}),
    "timm/hf-hub:": with_config(**{"nnclr.backbone": "timm/hf-hub:evil/model"}),
    "timm/local-dir:": with_config(**{"nnclr.backbone": "timm/local-dir:/tmp"}),
    "torchvision/": with_config(**{"nnclr.backbone": "torchvision/transforms.Compose"}),
    "a path": with_config(**{"nnclr.backbone": "../../../resnet18"}),
    "architecture of timm's": with_config(**{"nnclr": None, "architecture": "os.system"}),
    "arguments of timm's": with_config(
        **{"nnclr": None, "architecture": "test_resnet", "model_args": {"act_layer": "os.system"}}
    ),
    "weights at an address": with_config(
        **{"nnclr": None, "architecture": "test_resnet", "pretrained_cfg.url": "http://127.0.0.1:1/x.pth"}
    ),
}
HARMLESS_CLASS_PATHS = {  # nothing looks at these
    "_target_ beside": with_config(**{"_target_": "os.system", "_args_": ["touch CANARY"], "auto_map": {"A": "x.A"}}),
    "_instantiator": with_config(**{"nnclr.provenance": {"_instantiator": "os.system", "backbone": "small-convnet"}}),
}


def safetensors_file(header, data=b"", claims=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claims is None else claims) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "claims 2^60 bytes of header": safetensors_file({}, claims=2**60),
    "claims 99 MB of header": safetensors_file({}, claims=99_000_000),
    "claims 2^64 - 1": safetensors_file({}, claims=2**64 - 1),
    "empty": b"",
    "seven bytes": b"1234567",
    "no JSON": safetensors_file(b"{not json"),
    "not UTF-8": safetensors_file(b'{"\xff\xfe": 1}'),
    "NaN": safetensors_file(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4)),
    "a list": safetensors_file([1, 2]),
    "depth 100,000": safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "overlap": safetensors_file({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "a hole": safetensors_file({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "behind the end": safetensors_file({"a": tensor([10**9], 0, 4 * 10**9)}, bytes(8)),
    "data left over": safetensors_file({"a": tensor([1], 0, 4)}, bytes(400)),
    "cut": safetensors_file({"a": tensor([100], 0, 400)}, bytes(399)),
    "backwards": safetensors_file({"a": tensor([1], 4, 0)}, bytes(4)),
    "negative": safetensors_file({"a": tensor([-1], 0, 4)}, bytes(4)),
    "a product beyond 64 bits": safetensors_file({"a": tensor([2**40, 2**40], 0, 4)}, bytes(4)),
    "unknown dtype": safetensors_file({"a": tensor([1], 0, 4, "F128")}, bytes(4)),
    "100,000 tensors": safetensors_file({f"t{i}": tensor([0], 0, 0) for i in range(100_000)}),
    "metadata that is none": safetensors_file({"__metadata__": [1], "a": tensor([1], 0, 4)}, bytes(4)),
    "a pickle": pickle.dumps([1]),
}

_MANIFEST = {"format": 1, "step": 1, "files": {"tensors.safetensors": {}, "state.json": {}}}


def run_checkpoints(folder, state, tensors=None, manifest=None):
    """A folder of one checkpoint; its manifest fits whatever is in it, or is the given text."""
    import hashlib

    path = folder / "step-00000001"
    path.mkdir(parents=True)
    files = {
        "tensors.safetensors": safetensors.torch.save({"a": torch.ones(1)}) if tensors is None else tensors,
        "state.json": state.encode(),
    }
    for name, content in files.items():
        (path / name).write_bytes(content)
    told = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
    text = json.dumps({"format": 1, "step": 1, "files": told}) if manifest is None else manifest
    (path / "manifest.json").write_text(text)
    return folder


GOOD_STATE = '{"format": 1, "step": 1}'
CHECKPOINTS = {
    "manifest of depth 100,000": lambda f, c: run_checkpoints(f, GOOD_STATE, manifest="[" * 100_000),
    "manifest that is a list": lambda f, c: run_checkpoints(f, GOOD_STATE, manifest="[]"),
    "manifest of other files": lambda f, c: run_checkpoints(
        f, GOOD_STATE, manifest='{"format": 1, "step": 1, "files": {"../../../etc/passwd": {}, "state.json": {}}}'
    ),
    "manifest with a step of 5,000 digits": lambda f, c: run_checkpoints(
        f, GOOD_STATE, manifest='{"format": 1, "files": {}, "step": ' + "9" * 5000 + "}"
    ),
    "state of depth 100,000": lambda f, c: run_checkpoints(f, '{"a":' * 100_000),
    "state without a step": lambda f, c: run_checkpoints(f, "{}"),
    "state that is a list": lambda f, c: run_checkpoints(f, "[1]"),
    "tensors that are a pickle": lambda f, c: run_checkpoints(f, GOOD_STATE, tensors=saved(Touch(c))),
    "tensors with a header of 2^60": lambda f, c: run_checkpoints(
        f, GOOD_STATE, tensors=HEADERS["claims 2^60 bytes of header"]
    ),
    "a pickle beside the manifest": lambda f, c: with_a_pickle(run_checkpoints(f, GOOD_STATE, manifest="{}"), c),
}


def with_a_pickle(folder, canary):
    for name in ("tensors.pt", "optimizer.bin", ".metadata"):
        (folder / "step-00000001" / name).write_bytes(saved(Touch(canary)))
    return folder


# ---- arrays and tables (F6) ----------------------------------------------------------------------------------


def array_header(shape, descr="<f4", data=bytes(64), text=None):
    text = text or repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + data


def objects(canary):
    file = io.BytesIO()
    np.save(file, np.array([[Touch(canary)]], dtype=object), allow_pickle=True)
    return file.getvalue()


def object_archive(canary, **more):
    file = io.BytesIO()
    np.savez(file, points=np.array([Touch(canary)], dtype=object), key=np.array("x"), **more)
    return file.getvalue()


def zipped_arrays(content, name="points.npy"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w", force_zip64=True) as out:
            for part in content if isinstance(content, list) else [content]:
                out.write(part)
        archive.writestr("key.npy", array_header((), "<U1", b"x\0\0\0"))
    return file.getvalue()


ARRAYS = {
    "objects": objects,
    "a bare pickle": lambda c: pickle.dumps(Touch(c)),
    "an archive with objects": object_archive,
    "an archive that is a bomb": lambda c: zipped_arrays([bytes(1 << 20)] * 160),
    "a trillion rows": lambda c: array_header((10**12, 64)),
    "more rows than addresses": lambda c: array_header((10**30, 2)),
    "negative rows": lambda c: array_header((-4, 2)),
    "a dtype that is an object": lambda c: array_header((2, 2), "|O"),
    "a dtype of 100,000 fields": lambda c: array_header((1,), [(f"f{i}", "<f4") for i in range(100_000)]),
    "a header that is a call": lambda c: array_header(
        None, text=b"{'descr': __import__('os').system('touch ran'), 'fortran_order': False, 'shape': (2, 2)}\n"
    ),
    "a header of 9,000 brackets": lambda c: array_header(None, text=b"(" * 9000 + b")" * 900 + b"\n"),
    "a header of 9,000 signs": lambda c: array_header(None, text=b"-" * 9000 + b"1\n"),
    "a header of 50 MB": lambda c: array_header(None, text=b" " * 50_000_000),
}


def extension_type(path, canary):
    """The form in which Arrow once kept Python's own types: a pickle in the metadata of a column."""
    column = pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2))
    told = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Touch(canary)),
    }
    field = pa.field("embedding", column.type, metadata=told)
    image = pa.field("image", pa.binary(), metadata=told)
    told_pandas = {"pandas": json.dumps({"index_columns": [], "columns": [{"numpy_type": "object"}]})}
    schema = pa.schema([field, image], told_pandas | {"PANDAS_PICKLE": pickle.dumps(Touch(canary))})
    pq.write_table(pa.table([column, pa.array([pickle.dumps(Touch(canary))] * 3)], schema=schema), path)
    return path


def facts_of_embeddings(text):
    """Embeddings whose facts are a text of somebody else's."""

    def make(path, canary):
        write_embeddings(path, np.ones((3, 2), np.float32), np.arange(3), ["a", "b", "c"])
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"nnclr": text}), path)
        return path

    return make


# ---- shards --------------------------------------------------------------------------------------------------


def picture():
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "PNG")
    return file.getvalue()


def shard(members):
    """A tar file of (TarInfo changes, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for changes, content in members:
            member = tarfile.TarInfo(changes["name"])
            member.size = len(content)
            for name, value in changes.items():
                setattr(member, name, value)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def members_of(canary):
    """What a shard may hold beside pictures: pickles under names that loaders unpickle, ways out, links, devices."""
    evil = pickle.dumps(Touch(canary))
    return {
        "pickles": [({"name": f"a.{kind}"}, evil) for kind in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz")],
        "a pickle for a picture": [({"name": "a.png"}, evil)],
        "a pickle for a label": [({"name": "a.png"}, picture()), ({"name": "a.cls"}, evil)],
        "a name outside": [({"name": "../../out.png"}, picture()), ({"name": "../../out.cls"}, b"1")],
        "an absolute name": [({"name": str(canary) + ".png"}, picture())],
        "a link to a file": [({"name": "a.png", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, b"")],
        "a hard link": [({"name": "a.png", "type": tarfile.LNKTYPE, "linkname": "../../../etc/passwd"}, b"")],
        "devices": [
            ({"name": "a.png", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, b""),
            ({"name": "b.png", "type": tarfile.FIFOTYPE}, b""),
            ({"name": "c.png", "type": tarfile.BLKTYPE}, b""),
        ],
        "a name that runs": [({"name": "$(touch ran);`touch ran`|touch ran.png"}, picture())],
    }


# ---- run folders, recipes, sweeps (F3, F4) -------------------------------------------------------------------

BOMBS = {
    "depth": b"a = " + b"[" * 30_000,
    "tables in tables": b"a = " + b"{a = " * 10_000,
    "a dotted key of 30,000 parts": b"a." * 30_000 + b"a = 1",
    "a dotted table": b"[" + b"a." * 20_000 + b"a]",
    "a number of 5,000 digits": b"seed = " + b"9" * 5000,
    "a megabyte": b"# " + b"x" * 2**20,
    "no UTF-8": b'data = "\xff"',
    "a control character": b'data = "\x00"',
}


def run_folder(folder, text):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_bytes(text)
    for name in ("metrics.jsonl", "evaluations.jsonl", "bad_samples.jsonl"):
        (folder / name).write_text("[" * 100_000 + '\n{"step": ' + "9" * 5000 + '}\n{"step": NaN}\n')
    (folder / "environment.json").write_text('{"a":' * 100_000)
    return folder
