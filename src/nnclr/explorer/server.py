"""The explorer's answers, and the process that gives them.

Pictures are addressed by the number of their row and by nothing else; no path comes in, and only thumbnails that
were drawn anew go out. The page's own files are read once and served from memory.
"""

import asyncio
import csv
import errno
import io
import json
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from nnclr.data.decode import BadImage, decode
from nnclr.data.images import cell
from nnclr.errors import InputError
from nnclr.explorer.collection import Collection
from nnclr.explorer.guard import NOT_AVAILABLE, App, Guard, Limits, error_body, impatient_protocol, is_loopback

MAX_K = 100
SIZES = {"thumbnail": 96, "picture": 512}  # pixels of the longer side
CHANGED = "the file of embeddings was changed or damaged on disk; start nnclr explore again"
_FILTER_LENGTH = 200
_KEPT_BYTES = 64 * 2**20  # of thumbnails
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Explorer:
    """The endpoints of one collection; `app` is the ASGI application, guarded.

    Args:
        collection: what is shown.
        host: the address that is listened on, as the user named it.
        key: the user's --token, or None.
        limits: see the class.
    """

    def __init__(
        self, collection: Collection, host: str = "127.0.0.1", key: str | None = None, limits: Limits | None = None
    ) -> None:
        self.collection, self.limits = collection, limits or Limits()
        self.session = secrets.token_urlsafe(24)
        self._static = _static_files()
        self._thumbnails = _Thumbnails(collection)
        # Decoding and searching do not wait for each other, and each has a fixed share of the machine.
        self._decoders = ThreadPoolExecutor(self.limits.decoders)
        self._searchers = ThreadPoolExecutor(1)
        self._lowered: list[str] | None = None
        self.routes = Starlette(
            routes=[
                Route("/", self.index),
                Route("/static/{name}", self.static),
                Route("/api/about", self.about),
                Route("/api/map/{number:int}", self.map),
                Route("/api/column/{number:int}", self.column),
                Route("/api/item/{row:int}", self.item),
                Route("/api/neighbours/{row:int}", self.neighbours),
                Route("/api/filter", self.filter),
                Route("/api/search", self.search, methods=["POST"]),
                Route("/api/selection", self.selection, methods=["POST"]),
                Route("/{size:str}/{row:int}", self.image),
            ],
            exception_handlers={HTTPException: _refused},
        )
        self.routes.router.redirect_slashes = False
        self.app: App = Guard(self.routes, self.session, host, key, self.limits)

    async def index(self, request: Request) -> Response:
        """The page, with the session's token in it."""
        html = self._static["index.html"][0].replace(b"SESSION_TOKEN", self.session.encode())
        return _fresh(html, _TYPES[".html"])

    async def static(self, request: Request) -> Response:
        """One of the page's files."""
        found = self._static.get(request.path_params["name"])
        if found is None or request.path_params["name"] == "index.html":
            raise HTTPException(404)
        return _fresh(*found)

    async def about(self, request: Request) -> Response:
        """What there is to show, JSON."""
        shown = self._current()
        return _json(
            {
                "title": shown.title,
                "count": len(shown),
                "sides": [{"name": side.name, "how": side.projection.how} for side in shown.sides],
                "columns": [
                    {"name": column.name, "categories": column.categories, "about": column.about}
                    for column in shown.columns
                ],
                "notices": shown.notices,
                "upload": any(side.encoder is not None for side in shown.sides),
                "upload_bytes": self.limits.body_bytes,
                "thumbnails": any(source is not None for source in shown.sources),
                "max_k": MAX_K,
            }
        )

    async def map(self, request: Request) -> Response:
        """Points of one side: float32, little-endian, x and y of each row."""
        side = _at(self._current().sides, request.path_params["number"])
        return _fresh(side.projection.points.astype("<f4").tobytes(), "application/octet-stream")

    async def column(self, request: Request) -> Response:
        """Codes of a column: int32, little-endian."""
        column = _at(self._current().columns, request.path_params["number"])
        return _fresh(column.codes.astype("<i4").tobytes(), "application/octet-stream")

    async def item(self, request: Request) -> Response:
        """Name and categories of a row, JSON."""
        return _json(self._item(_row(self._current(), request)))

    async def neighbours(self, request: Request) -> Response:
        """The nearest rows of a row, by each side, JSON."""
        shown, k = self._current(), _k(request)
        row = _row(shown, request)
        answers = await self._run(self._searchers, lambda: shown.neighbours(row, k))
        return _json({"query": self._item(row), "sides": [self._listed(answer) for answer in answers]})

    async def filter(self, request: Request) -> Response:
        """Rows whose name contains a text, whatever its case: uint32, little-endian."""
        shown, text = self._current(), request.query_params.get("text", "")
        if not 0 < len(text) <= _FILTER_LENGTH:
            raise HTTPException(400)
        rows = await self._run(self._searchers, lambda: self._matching(shown, text.lower()))
        return _fresh(rows.tobytes(), "application/octet-stream")

    async def search(self, request: Request) -> Response:
        """The nearest rows of a picture that is the body of the request, JSON."""
        shown, k = self._current(), _k(request)
        content = await self._body(request)
        try:
            pixels = await self._run(self._decoders, lambda: decode(content))
        except BadImage as error:
            return _error(422, f"the picture cannot be used ({error.reason.replace('_', ' ')})")
        answers = await self._run(self._searchers, lambda: shown.search(pixels, k))
        return _json({"query": None, "sides": [self._listed(answer) for answer in answers]})

    async def selection(self, request: Request) -> Response:
        """A list of the rows in the body (uint32, little-endian), as `?format=csv` or as `txt`: their names alone."""
        shown, form = self._current(), request.query_params.get("format")
        content = await self._body(request)
        if form not in ("csv", "txt") or len(content) % 4:
            raise HTTPException(400)
        rows = np.frombuffer(content, "<u4")
        if rows.size == 0 or rows.max() >= len(shown):
            raise HTTPException(404)
        text = await self._run(self._searchers, lambda: selection_list(shown, rows, form))
        response = _fresh(text.encode(), {"csv": "text/csv", "txt": "text/plain"}[form] + "; charset=utf-8")
        response.headers["content-disposition"] = f'attachment; filename="selection.{form}"'
        return response

    async def image(self, request: Request) -> Response:
        """A row's picture as JPEG, `/thumbnail/ROW` or `/picture/ROW`."""
        size = SIZES.get(request.path_params["size"])
        if size is None:
            raise HTTPException(404)
        row = _row(self._current(), request)
        try:
            jpeg = await self._run(self._decoders, lambda: self._thumbnails.get(row, size))
        except BadImage:
            raise HTTPException(404) from None
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    def _current(self) -> Collection:
        if self.collection.changed():
            raise HTTPException(409, CHANGED)
        return self.collection

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > self.limits.body_bytes:
                    raise HTTPException(413)
        except ClientDisconnect:
            raise HTTPException(400) from None
        return b"".join(parts)

    def _item(self, row: int) -> dict[str, Any]:
        return {"row": row, "name": self.collection.names[row]}

    def _listed(self, answer: tuple[np.ndarray, np.ndarray] | None) -> list[dict[str, Any]] | None:
        if answer is None:
            return None
        pairs = zip(*(values.tolist() for values in answer), strict=True)
        return [{**self._item(row), "similarity": round(similarity, 6)} for similarity, row in pairs]

    def _matching(self, shown: Collection, text: str) -> np.ndarray:
        if self._lowered is None:
            self._lowered = [name.lower() for name in shown.names]
        return np.array([row for row, name in enumerate(self._lowered) if text in name], "<u4")


class _Thumbnails:
    """Pictures drawn anew as JPEG; the last ones asked for stay in memory."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, row: int, size: int) -> bytes:
        with self._lock:
            if (row, size) in self._kept:
                self._kept.move_to_end((row, size))
                return self._kept[row, size]
        jpeg = thumbnail(self._collection.picture(row), size)
        with self._lock:
            self._bytes += len(jpeg) - len(self._kept.get((row, size), b""))
            self._kept[row, size] = jpeg
            while self._bytes > _KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return jpeg


def thumbnail(pixels: np.ndarray, size: int) -> bytes:
    """(h, w, 3) uint8 as JPEG whose longer side has at most `size` pixels; nothing of the original file is in it."""
    image = Image.fromarray(pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)
    return file.getvalue()


def selection_list(collection: Collection, rows: np.ndarray, form: str) -> str:
    """Names of rows, one a line (`txt`), or with similar detail a table (`csv`).

    In the table a cell that a spreadsheet would take for a formula starts with an apostrophe.
    """
    if form == "txt":
        return "".join(f"{collection.names[row]}\n" for row in rows)
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["row", "id", "path", *(cell(column.name) for column in collection.columns)])
    for row in rows.tolist():
        codes = [(column, int(column.codes[row])) for column in collection.columns]
        values = [column.categories[code] if code >= 0 else "" for column, code in codes]
        table.writerow([row, int(collection.ids[row]), *map(cell, [collection.names[row], *values])])
    return file.getvalue()


def claim(host: str, port: int, key: str | None) -> list[socket.socket]:
    """Sockets for the addresses of a host, before anything is computed: the port is ours, and nobody can connect yet.

    Raises:
        InputError: if the port is taken or not allowed, the host is unknown, or other machines could connect and
            there is no token.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is no port; choose 0 (any that is free) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} cannot be listened on: {getattr(error, 'strerror', error)}") from error
    addresses = list(dict.fromkeys((family, str(address[0])) for family, *_, address in found))
    if key is None and not all(is_loopback(address) for _, address in addresses):
        example = secrets.token_urlsafe(16)
        raise InputError(f"--host {host} lets other machines in; then a --token is needed, such as --token {example}")
    if key is not None and (len(key) < 16 or not key.replace("-", "").replace("_", "").isalnum() or not key.isascii()):
        raise InputError("--token must be at least 16 letters, digits, - or _")
    sockets: list[socket.socket] = []
    try:
        for family, address in addresses:
            if sockets and port == 0:  # the second family gets the port that the first was given
                port = sockets[0].getsockname()[1]
            sockets.append(_bound(family, address, port))
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise InputError(_why_not(host, port, error)) from error
    return sockets


def _bound(family: int, address: str, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind((address, port))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or another process could claim it as well
    except OSError:
        opened.close()
        raise
    return opened


def listen(sockets: list[socket.socket], host: str) -> None:
    """Let connections in on claimed sockets, now that there is something to answer with.

    Raises:
        InputError: if the system no longer allows it.
    """
    for opened in sockets:
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier explorer may end
            opened.listen(128)
        except OSError as error:
            raise InputError(_why_not(host, opened.getsockname()[1], error)) from error


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use, perhaps by another nnclr explore; choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} is not open to you; choose one from 1024 with --port"
    return f"--host {host} --port {port} cannot be listened on: {error.strerror}"


def make_server(explorer: Explorer) -> uvicorn.Server:
    """A server with this explorer's limits; `run(sockets=...)` it."""
    limits = explorer.limits
    config = uvicorn.Config(
        explorer.app,
        http=impatient_protocol(limits),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def address_of(host: str, opened: socket.socket, key: str | None) -> str:
    """What to type into a browser."""
    port = opened.getsockname()[1]
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + ("" if key is None else f"?token={key}")


def _static_files() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("nnclr.explorer") / "static"
    files = [(file.name, file.read_bytes()) for file in folder.iterdir() if file.is_file()]
    kinds = {name: _TYPES.get("." + name.rpartition(".")[2]) for name, _ in files}
    return {name: (content, kind) for name, content in files if (kind := kinds[name]) is not None}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {400: "not understood", 405: "not allowed", 409: CHANGED, 413: "too large"}
    return _error(error.status_code, texts.get(error.status_code, NOT_AVAILABLE))


def _error(status: int, text: str) -> Response:
    # Closed, since the body of the request may not have been read.
    return Response(error_body(text), status, {"connection": "close"}, "application/json")


def _json(content: Any) -> Response:
    return _fresh(json.dumps(content).encode(), "application/json")


def _fresh(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"cache-control": "no-store"})


def _row(collection: Collection, request: Request) -> int:
    row: int = request.path_params["row"]
    if row >= len(collection):
        raise HTTPException(404)
    return row


def _at(items: tuple[Any, ...], number: int) -> Any:
    if number >= len(items):
        raise HTTPException(404)
    return items[number]


def _k(request: Request) -> int:
    text = request.query_params.get("k", "10")
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_K):
        raise HTTPException(400)
    return int(text)
