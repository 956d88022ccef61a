import contextlib
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from nnclr.embed import embed_to_file
from nnclr.explorer.collection import open_collection
from nnclr.explorer.guard import Limits
from nnclr.explorer.server import Explorer, claim, make_server
from nnclr.pretrained import open_encoder

# Names that someone may have given a file to harm whoever looks at it.
HOSTILE = (
    "<img src=x onerror=alert(1)>.png",
    "\"><script>alert('1')<|script>.png",
    "=cmd('calc').png",
    "-rf.png",
    "new\nline.png",
    "日本語.png",
    "caf\u00e9.png",
    "cafe\u0301.png",
    "x" * 240 + ".png",
)
CLASSES = ("ant", "bee", "<b>cat</b>")
FORMULA = b"\x1b[31mred\xff.png"  # neither printable nor UTF-8


def draw_folder(root, per_class=14, seed=0):
    """Pictures of 24 x 24 in three folders, a colour for each under noise; some have hostile names."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (root / name.replace("/", "|")).mkdir(parents=True)
        colour = 60 + 70 * np.eye(3)[number]
        for i in range(per_class):
            pixels = np.clip(colour + rng.normal(0, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
            hostile = HOSTILE[i] if number == 1 and i < len(HOSTILE) else f"{i:03}.png"
            Image.fromarray(pixels).save(root / name.replace("/", "|") / hostile)
    with open(bytes(root / "ant") + b"/" + FORMULA, "wb") as file:
        Image.fromarray(pixels).save(file, "PNG")
    return root


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory):
    return draw_folder(tmp_path_factory.mktemp("pictures") / "root")


@pytest.fixture(scope="session")
def embedded(pictures_folder, tmp_path_factory):
    """A file of embeddings of the folder for each of two encoders that need no weights."""
    out = tmp_path_factory.mktemp("embedded")
    for size in (4, 8):
        embed_to_file(open_encoder(f"pixels?size={size}"), str(pictures_folder), out / f"{size}.parquet", say=_quiet)
    return out


@contextlib.contextmanager
def serving(collection, guarded=True, limits=None, key=None):
    """An explorer in a thread of this process, on a free port of 127.0.0.1."""
    sockets = claim("127.0.0.1", 0, key)
    explorer = Explorer(collection, "127.0.0.1", key, limits or Limits())
    if not guarded:
        explorer.app = explorer.routes
    server = make_server(explorer)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        explorer.port, explorer.server = sockets[0].getsockname()[1], server
        yield explorer
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def one(embedded):
    return open_collection([embedded / "8.parquet"], projection="pca", say=_quiet)


@pytest.fixture(scope="session")
def two(embedded):
    return open_collection([embedded / "8.parquet", embedded / "4.parquet"], projection="pca", say=_quiet)


def _quiet(line):
    pass
