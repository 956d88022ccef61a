"""Who is answered: everything that stands between the network and the explorer's own code.

The explorer shows private pictures on a port of this machine, and any web page open in the same browser can send
requests there. So a request must name this machine as its host (a name that was rebound to 127.0.0.1 does not), must
not come from another site, must carry the page's token if it is a POST, and must be small and quick. Whatever is
refused gets the same body as what does not exist.
"""

import asyncio
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from uvicorn.protocols.http.h11_impl import H11Protocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

TOKEN_HEADER = "x-nnclr-token"
NOT_AVAILABLE = "not available"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?", re.ASCII)
logger = logging.getLogger("nnclr.explorer")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """What one client may ask for; seconds, bytes and counts."""

    head_bytes: int = 16 * 1024  # request line and headers
    target_bytes: int = 4096  # path and query
    body_bytes: int = 32 * 2**20
    head_seconds: float = 10.0  # from connecting, or the last answer, to the end of the headers
    request_seconds: float = 60.0  # from there to the end of the answer
    connections: int = 400
    decoders: int = 2


class Guard:
    """ASGI middleware in front of everything else.

    Args:
        app: what is protected.
        session: the token that the page sends with each POST.
        host: the address that is listened on, as the user named it.
        key: the user's --token; then every request needs it, first in the query and later as a cookie.
        limits: see the class.
    """

    def __init__(self, app: App, session: str, host: str, key: str | None, limits: Limits) -> None:
        self._app, self._session, self._host, self._key, self._limits = app, session, host, key, limits

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a refusal, or pass the request on under a deadline."""
        if scope["type"] != "http":
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *_encoded(HEADERS)]
            await send(message)

        refused = self._refusal(scope)
        if refused:
            await respond_error(guarded, *refused)
            return
        if self._key is not None and not self._has_cookie(scope):
            await self._let_in(scope, guarded)
            return
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await self._app(scope, receive, guarded)
        except TimeoutError:
            if started:
                raise
            await respond_error(guarded, 408, "too slow")
        except Exception:  # the details are for the terminal, not for the client
            logger.exception("a request to %s failed", scope["path"])
            if not started:
                await respond_error(guarded, 500, "the explorer failed; its terminal says why")

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Status and text for a request that is not passed on."""
        limits, target = self._limits, scope["raw_path"]
        hosts, origins = _all(scope, b"host"), _all(scope, b"origin")
        if len(hosts) != 1 or not allowed_host(hosts[0], self._host) or not target.startswith(b"/"):
            return 403, NOT_AVAILABLE
        if origins and origins != [b"http://" + hosts[0]]:
            return 403, NOT_AVAILABLE
        if any(site not in (b"same-origin", b"none") for site in _all(scope, b"sec-fetch-site")):
            return 403, NOT_AVAILABLE
        if scope["method"] not in ("GET", "HEAD"):
            given = b",".join(_all(scope, TOKEN_HEADER.encode()))
            if not secrets.compare_digest(given, self._session.encode()):
                return 403, NOT_AVAILABLE
        if len(target) + len(scope["query_string"]) > limits.target_bytes:
            return 414, "too long"
        if any(
            len(size) > 12 or not size.isdigit() or int(size) > limits.body_bytes
            for size in _all(scope, b"content-length")
        ):
            return 413, "too large"
        return None

    def _cookie(self, scope: Message) -> str:
        # Cookies are shared by all ports of a host, so the port is in the name.
        return f"nnclr-{scope['server'][1]}"

    def _has_cookie(self, scope: Message) -> bool:
        pairs = b";".join(_all(scope, b"cookie")).split(b";")
        wanted = f"{self._cookie(scope)}={self._key}".encode()
        return any(secrets.compare_digest(pair.strip(), wanted) for pair in pairs)

    async def _let_in(self, scope: Message, send: Send) -> None:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        assert self._key is not None
        if scope["path"] != "/" or not secrets.compare_digest(given.encode(), self._key.encode()):
            await respond_error(send, 403, NOT_AVAILABLE)
            return
        cookie = f"{self._cookie(scope)}={self._key}; Path=/; HttpOnly; SameSite=Strict"
        headers = {"location": "/", "set-cookie": cookie, "cache-control": "no-store", "content-length": "0"}
        await send({"type": "http.response.start", "status": 303, "headers": _encoded(headers)})
        await send({"type": "http.response.body", "body": b""})


def allowed_host(header: bytes, listening: str) -> bool:
    """Whether a Host header names this machine as the user knows it.

    The port is not compared, so that a forwarded port works: which name is used is what tells a rebound one apart.
    """
    match = _HOST.fullmatch(header.decode("latin-1").lower())
    if match is None:
        return False
    name = match[1]
    if name in LOOPBACK_NAMES or name.strip("[]") == listening.lower():
        return True
    if listening in ("0.0.0.0", "::"):  # then every address of the machine; an address cannot be rebound
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True
    return False


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


async def respond_error(send: Send, status: int, text: str) -> None:
    """One shape for every error; the connection is closed, since the request may not have been read to its end."""
    body = error_body(text)
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def error_body(text: str) -> bytes:
    """The body of an error."""
    return json.dumps({"error": text}).encode()


def _all(scope: Message, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def impatient_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with an alarm clock: it has none for clients that send or read nothing.

    A connection has `head_seconds` to send a request; one that is then in the middle of a request has
    `request_seconds` more, and is cut whatever is still buffered for it.
    """

    class Impatient(H11Protocol):  # type: ignore[misc]  # mypy does not look into uvicorn
        _alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._wait(limits.head_seconds, self._head_late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._wait(limits.head_seconds, self._head_late)
            super().on_response_complete()

        def _head_late(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._wait(limits.request_seconds, self.transport.abort)
            else:
                self.transport.abort()

        def _wait(self, seconds: float, then: Callable[[], None]) -> None:
            self._cancel()
            self._alarm = self.loop.call_later(seconds, then)

        def _cancel(self) -> None:
            if self._alarm is not None:
                self._alarm.cancel()

    return Impatient
