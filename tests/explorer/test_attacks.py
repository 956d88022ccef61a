"""What a web page, a neighbour on the network or a crafted file may try against the explorer, and what it gets.

Each attack is one request, byte for byte, with the answers that are right. Two controls: the same requests in honest
form succeed, and an explorer without its guard answers many of them wrongly.
"""

import csv
import http.client
import io
import json
import os
import re
import socket
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnclr.explorer.collection import open_collection
from nnclr.explorer.guard import Limits
from nnclr.explorer.server import claim, listen, selection_list
from tests.explorer.conftest import draw_folder, serving

LIMITS = Limits(body_bytes=2**20, head_seconds=4, request_seconds=4)
REFUSED, BAD, ABSENT = {403}, {400}, {404}


@dataclass
class Attack:
    name: str
    right: set = field(default_factory=lambda: REFUSED)
    target: str = "/api/about"
    method: str = "GET"
    host: str | None = "127.0.0.1:{port}"
    headers: tuple = ()
    body: bytes = b""
    version: str = "1.1"
    raw: bytes | None = None

    def request(self, port, session):
        if self.raw is not None:
            return self.raw.replace(b"{port}", str(port).encode()).replace(b"{session}", session.encode())
        lines = [f"{self.method} {self.target} HTTP/{self.version}"]
        lines += [] if self.host is None else [f"Host: {self.host}"]
        lines += ["Connection: close", *self.headers]
        if self.body and not any(line.lower().startswith(("content-length", "transfer")) for line in self.headers):
            lines.append(f"Content-Length: {len(self.body)}")
        text = "\r\n".join(lines).replace("{port}", str(port)).replace("{session}", session)
        return text.encode("latin-1") + b"\r\n\r\n" + self.body


def png(width, height, pixels=b""):
    """A PNG with a size in its header, whatever is in it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def picture(side=20, **options):
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


HOSTS = [
    "evil.com",
    "evil.com:{port}",
    "EVIL.COM",
    "localhost.evil.com:{port}",
    "127.0.0.1.nip.io:{port}",
    "localhost.:{port}",
    "127.0.0.1.:{port}",
    "localhost@evil.com:{port}",
    "evil.com@localhost:{port}",
    "localhost:{port}@evil.com",
    "localhost:{port}, evil.com",
    "localhost:evil",
    "localhost:",
    "localhost:123456",
    "localhost/evil.com",
    "localhost\\@evil.com",
    "0.0.0.0:{port}",
    "[::]:{port}",
    "[::ffff:127.0.0.1]:{port}",
    "2130706433:{port}",
    "127.1:{port}",
    "192.168.0.1:{port}",
    "xn--localhost:{port}",
    "",
]
TRAVERSALS = [
    "/static/../../../../etc/passwd",
    "/static/..%2f..%2f..%2fetc%2fpasswd",
    "/static/%2e%2e/%2e%2e/etc/passwd",
    "/static/%2e%2e%2fserver.py",
    "/static/..%252f..%252fetc/passwd",
    "/static/%252e%252e%252fserver.py",
    "/static/..\\..\\server.py",
    "/static/..%5c..%5cserver.py",
    "/static/....//....//etc/passwd",
    "/static/..;/server.py",
    "/static//etc/passwd",
    "//etc/passwd",
    "//127.0.0.1/c$/windows/win.ini",
    "/static/app.js%00.png",
    "/static/%00",
    "/static/../static_evil/app.js",
    "/static/.",
    "/static/..",
    "/static/",
    "/static",
    "/static/app.js/",
    "/static/app.js/../index.html",
    "/static/%c0%ae%c0%ae/server.py",
    "/static/%ef%bc%8e%ef%bc%8e/server.py",
    "/static/file:%2f%2f%2fetc%2fpasswd",
    "/static/index.html",
    "/static/twgl.LICENSE",
    "/proc/self/environ",
    "/etc/passwd",
    "/..%2f..%2f/etc/passwd",
    "/thumbnail/..%2f..%2fetc%2fpasswd",
    "/thumbnail/%2fetc%2fpasswd",
    "/picture/../../server.py",
    "/picture/ant/000.png",
    "/.git/config",
    "/%5c%5cserver%5cshare",
]
ROWS = ["-1", "99999999999", "1.5", "0x1", "1e1", "1%00", "%d9%a1", "%20", "1;2", "1%2f2", "NaN", "+1", "1%0d%0aX:1"]
ORIGINS = [
    "http://evil.com",
    "null",
    "http://127.0.0.1:1",
    "https://127.0.0.1:{port}",
    "http://localhost:{port}",
    "http://127.0.0.1:{port}.evil.com",
    "http://127.0.0.1:{port}/",
    "file://",
    "chrome-extension://abcdefghijklmnop",
    "",
]
TOKEN = "X-NNCLR-Token: {session}"
UPLOADS = {
    "nothing": b"",
    "a page": b"<html><script>alert(1)</script></html>",
    "a drawing with a script": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"></svg>',
    "a program": b"\x7fELF" + bytes(200),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
    "a bomb of 60,000 x 60,000": png(60_000, 60_000),
    "a bomb of 12,000 x 12,000": png(12_000, 12_000, zlib.compress(bytes(1000))),
    "a cut JPEG": picture()[:-40],
    "a PNG whose size is a lie": png(20, 20, zlib.compress(b"\0")),
    "a palette without end": b"GIF89a" + bytes(20),
}


def table():
    attacks = [Attack(f"host {host!r}", REFUSED, host=host) for host in HOSTS]
    attacks += [
        Attack("no host, HTTP/1.1", BAD, host=None),
        Attack("no host, HTTP/1.0", host=None, version="1.0"),
        Attack("two hosts", BAD, headers=("Host: evil.com",)),
        Attack("absolute address", target="http://evil.com/api/about"),
        Attack("absolute address of its own", target="http://127.0.0.1:{port}/api/about"),
        Attack("authority only", REFUSED | BAD, target="evil.com:80", method="CONNECT"),
        Attack("asterisk", target="*", method="OPTIONS"),
        Attack("evil host, honest forwarded one", host="evil.com", headers=("X-Forwarded-Host: localhost",)),
        Attack("evil host, static file", host="evil.com", target="/static/app.js"),
        Attack("evil host, the page", host="evil.com", target="/"),
        Attack("evil host, a picture", host="evil.com", target="/picture/0"),
        Attack("evil host, no such page", host="evil.com", target="/nothing"),
        Attack(
            "evil host, POST", host="evil.com", method="POST", target="/api/search", headers=(TOKEN,), body=picture()
        ),
        Attack("evil host, OPTIONS", host="evil.com", method="OPTIONS"),
        Attack("evil host, HEAD", host="evil.com", method="HEAD"),
        Attack(
            "evil host, WebSocket",
            host="evil.com",
            headers=(
                "Upgrade: websocket",
                "Connection: Upgrade",
                "Sec-WebSocket-Key: eHh4",
                "Sec-WebSocket-Version: 13",
            ),
        ),
    ]
    attacks += [Attack(f"origin {origin!r}", headers=(f"Origin: {origin}",)) for origin in ORIGINS]
    attacks += [
        Attack("two origins", headers=("Origin: http://127.0.0.1:{port}", "Origin: http://evil.com")),
        Attack("cross-site picture", target="/picture/0", headers=("Sec-Fetch-Site: cross-site",)),
        Attack("cross-site script", target="/static/app.js", headers=("Sec-Fetch-Site: cross-site",)),
        Attack("cross-site page", target="/", headers=("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate")),
        Attack("same-site data", headers=("Sec-Fetch-Site: same-site",)),
        Attack("unknown site", headers=("Sec-Fetch-Site: sideways",)),
        Attack(
            "preflight", method="OPTIONS", headers=("Origin: http://evil.com", "Access-Control-Request-Method: POST")
        ),
    ]
    posts = {"method": "POST", "target": "/api/search", "body": picture()}
    attacks += [
        Attack("POST without token", **posts),
        Attack("POST with a wrong token", **posts, headers=("X-NNCLR-Token: guess",)),
        Attack("POST with an empty token", **posts, headers=("X-NNCLR-Token: ",)),
        Attack("POST with the token twice", **posts, headers=(TOKEN, TOKEN)),
        Attack("POST with half of the token", **posts, headers=(TOKEN[:-1] + "-",)),
        Attack("POST with the token in the address", **{**posts, "target": "/api/search?token={session}"}),
        Attack("POST with the token as cookie", **posts, headers=("Cookie: token={session}",)),
        Attack("POST from another site with the token", **posts, headers=(TOKEN, "Origin: http://evil.com")),
        Attack("POST of a form", **posts, headers=("Content-Type: application/x-www-form-urlencoded",)),
        Attack("export without token", method="POST", target="/api/selection?format=csv", body=bytes(4)),
        Attack("PUT", method="PUT", target="/api/selection"),
        Attack("DELETE", method="DELETE", target="/picture/0"),
        Attack("TRACE", method="TRACE"),
        Attack("DELETE with token", {405}, method="DELETE", target="/picture/0", headers=(TOKEN,)),
        Attack("POST to a page with token", {405}, method="POST", target="/", headers=(TOKEN,)),
        Attack("GET of a POST", {405}, target="/api/search"),
    ]
    attacks += [Attack(f"path {path}", ABSENT | REFUSED | BAD, path) for path in TRAVERSALS]
    attacks += [Attack(f"row {row}", ABSENT | BAD, f"/thumbnail/{row}") for row in ROWS]
    attacks += [Attack(f"neighbours of {row}", ABSENT | BAD, f"/api/neighbours/{row}") for row in ROWS[:4]]
    attacks += [Attack(f"map {n}", ABSENT, f"/api/map/{n}") for n in (2, -1)]
    attacks += [Attack(f"column {n}", ABSENT, f"/api/column/{n}") for n in (9, -1)]
    attacks += [
        Attack(f"k = {k!r}", BAD, f"/api/neighbours/0?k={k}") for k in ("0", "-1", "101", "1e9", "x", "", "9" * 1000)
    ]
    attacks += [
        Attack(f"upload of {kind}", {422}, "/api/search", "POST", headers=(TOKEN,), body=body)
        for kind, body in UPLOADS.items()
    ]
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    exports = {"method": "POST", "headers": (TOKEN,)}
    attacks += [
        Attack("filter without text", BAD, "/api/filter"),
        Attack("filter of 300 letters", BAD, "/api/filter?text=" + "x" * 300),
        Attack("export as something else", BAD, "/api/selection?format=../../x", body=bytes(4), **exports),
        Attack("export of half a row", BAD, "/api/selection?format=csv", body=bytes(3), **exports),
        Attack("export of a row that is not", ABSENT, "/api/selection?format=csv", body=b"\xff" * 4, **exports),
        Attack("export of nothing", ABSENT, "/api/selection?format=csv", "POST", headers=(TOKEN, "Content-Length: 0")),
        Attack("body announced as 2 GB", {413}, "/api/search", "POST", headers=(TOKEN, "Content-Length: 2000000000")),
        Attack("body of 3 MB in pieces", {413}, "/api/search", "POST", headers=(TOKEN, "Transfer-Encoding: chunked"),
               body=48 * chunk + b"0\r\n\r\n"),
        Attack("negative length", BAD, "/api/search", "POST", headers=(TOKEN, "Content-Length: -1")),
        Attack("two lengths", BAD, "/api/search", "POST", headers=(TOKEN, "Content-Length: 1", "Content-Length: 2")),
        Attack("length in words", BAD, "/api/search", "POST", headers=(TOKEN, "Content-Length: ten")),
        Attack("address of 6 kB", {414}, "/api/filter?text=" + "x" * 6000),
        Attack("address of 1 MB", BAD, "/" + "x" * 10**6),
        Attack("header of 8 MB", BAD, headers=("X: " + "x" * 8 * 10**6,)),
        Attack("100,000 headers", BAD, headers=("X: y",) * 100_000),
        Attack("bare line feeds in a header", BAD, headers=("X: a\rHost: localhost",)),
        Attack("folded host", REFUSED | BAD, host="127.0.0.1\r\n .evil.com"),
        Attack("space before the colon", BAD, headers=("Origin : http://evil.com",)),
        Attack("not HTTP", BAD, raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello TLS\r\n\r\n"),
        Attack("HTTP/0.9", BAD, raw=b"GET /\r\n\r\n"),
        Attack("HTTP/2 preface", REFUSED | BAD, raw=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        Attack("length and chunks at once", REFUSED | BAD, "/api/search", "POST",
               headers=("Content-Length: 4", "Transfer-Encoding: chunked"), body=b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    ]  # fmt: skip
    return attacks


ATTACKS = table()


def send(port, content, wait=10):
    """Everything that the server answers before it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        answer = b""
        with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read everything
            connection.sendall(content)
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        return answer


def parsed(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    match = re.match(r"HTTP/1\.1 (\d{3})", lines[0])
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return (int(match[1]) if match else 0), headers, body


def wrong(attack, explorer):
    """What is wrong about the answer to an attack, or None."""
    answer = send(explorer.port, attack.request(explorer.port, explorer.session))
    status, headers, body = parsed(answer)
    if status not in attack.right:
        return f"{attack.name}: answered {status}, right is {attack.right}: {body[:100]!r}"
    if answer.count(b"HTTP/1.1 ") != 1:
        return f"{attack.name}: answered {answer.count(b'HTTP/1.1 ')} times"
    if any(name.startswith("access-control-") for name in headers):
        return f"{attack.name}: allows another site"
    if re.search(rb"Traceback|site-packages|/tmp|/root|/home|\.py|passwd", body):
        return f"{attack.name}: tells what is inside: {body[:200]!r}"
    ours = body != b"Invalid HTTP request received."  # that is no HTTP, and not seen by the guard
    policy = headers.get("content-security-policy", "")
    if ours and (headers.get("x-content-type-options") != "nosniff" or "default-src 'none'" not in policy):
        return f"{attack.name}: answered without the security headers"
    if ours and attack.method != "HEAD" and set(json.loads(body)) != {"error"}:
        return f"{attack.name}: an error of another shape"
    return None


@pytest.fixture(scope="module")
def explorer(two):
    with serving(two, limits=LIMITS) as served:
        yield served


# The entry of the fault list that an attack belongs to, by the beginning of its name; the others are of G7.
ENTRIES = {
    "G2": ("host", "no host", "two hosts", "absolute", "authority", "asterisk", "evil host", "folded host"),
    "G3": ("origin", "two origins", "cross-site", "same-site", "unknown site", "preflight", "POST", "export without",
           "PUT", "DELETE", "TRACE", "GET of"),
    "G4": ("path", "row", "neighbours of", "map", "column", "export as"),
    "G6": ("upload",),
}  # fmt: skip


def entry_of(attack):
    return next((entry for entry, starts in ENTRIES.items() if attack.name.startswith(starts)), "G7")


@pytest.mark.parametrize("entry", [*ENTRIES, "G7"])
def test_attacks_are_answered_as_specified(explorer, entry, record_property):
    attacks = [attack for attack in ATTACKS if entry_of(attack) == entry]
    failed = [found for attack in attacks if (found := wrong(attack, explorer)) is not None]
    figure = {"passed": len(attacks) - len(failed), "of": len(attacks)}
    record_property("reliability", {"entry": entry, "what": "attacks answered as specified", **figure})
    assert failed == []
    assert len(attacks) >= 5


def test_there_are_at_least_eighty_and_all_differ(explorer):
    requests = {attack.request(explorer.port, explorer.session) for attack in ATTACKS}
    assert len(requests) == len(ATTACKS) >= 80


def test_honest_requests_succeed(explorer):
    """The attacks are refused for what is wrong about them, not because everything is."""
    own = ("Origin: http://127.0.0.1:{port}", "Sec-Fetch-Site: same-origin", TOKEN)
    paths = "/ /static/app.js /static/style.css /picture/0 /thumbnail/1 /api/neighbours/0?k=100 /api/map/1"
    honest = [
        Attack(f"host {host}", {200}, host=host) for host in ("127.0.0.1:{port}", "localhost:{port}", "LOCALHOST")
    ]
    honest += [Attack("forwarded port", {200}, host="[::1]:9"), Attack("filter", {200}, "/api/filter?text=0")]
    honest += [Attack(path, {200}, path, headers=own) for path in paths.split()]
    honest += [Attack("typed", {200}, "/", headers=("Sec-Fetch-Site: none",))]
    honest += [Attack("upload", {200}, "/api/search?k=3", "POST", headers=own, body=picture())]
    honest += [Attack("export", {200}, "/api/selection?format=txt", "POST", headers=own, body=bytes(4))]
    for request in honest:
        status, headers, body = parsed(send(explorer.port, request.request(explorer.port, explorer.session)))
        assert status in request.right, (request.name, status, body)
        assert not any(name.startswith("access-control-") for name in headers)


def test_without_the_guard_the_attacks_succeed(two):
    with serving(two, guarded=False, limits=Limits(body_bytes=2**20, head_seconds=0.5, request_seconds=0.5)) as bare:
        failed = [attack.name for attack in ATTACKS if wrong(attack, bare) is not None]
        succeeded = [a for a in ATTACKS if parsed(send(bare.port, a.request(bare.port, bare.session)))[0] == 200]
    assert len(failed) > 90
    assert len(succeeded) > 40
    assert {f"host {host!r}" for host in HOSTS} <= set(failed)
    assert {f"origin {origin!r}" for origin in ORIGINS} <= set(failed)


def test_what_is_refused_looks_like_what_does_not_exist(explorer):
    def answer(**request):
        content = Attack("", **request).request(explorer.port, explorer.session)
        status, headers, body = parsed(send(explorer.port, content))
        return status, sorted(set(headers) - {"date"}), headers["content-type"], body

    refused, absent = answer(host="evil.com", target="/picture/0"), answer(target="/picture/99999")
    assert (refused[0], absent[0]) == (403, 404)
    assert refused[1:] == absent[1:]


def test_names_leave_as_data_and_pictures_drawn_anew(explorer, two):
    page = http_get(explorer, "/")[1]
    assert b"alert" not in page
    assert page.count(b"<script") == 1
    hostile = next(row for row, name in enumerate(two.names) if "onerror" in name)
    headers, content = http_get(explorer, f"/api/item/{hostile}")
    assert headers["content-type"] == "application/json"
    assert "<img src=x onerror" in json.loads(content)["name"]
    for size in ("thumbnail", "picture"):
        headers, content = http_get(explorer, f"/{size}/{hostile}")
        assert headers["content-type"] == "image/jpeg"
        assert max(Image.open(io.BytesIO(content)).size) == 24


def test_what_is_written_in_a_picture_stays_there(tmp_path):
    folder = draw_folder(tmp_path / "root", per_class=2)
    exif = Image.Exif()
    exif[0x010E] = "<script>alert('description')</script>"
    (folder / "ant" / "000.png").unlink()
    (folder / "ant" / "000.jpg").write_bytes(picture(exif=exif, comment=b"<script>comment</script>"))
    collection = embedded_folder(folder, tmp_path)
    row = next(i for i, name in enumerate(collection.names) if name.endswith("000.jpg"))
    with serving(collection) as served:
        assert b"script" in (folder / "ant" / "000.jpg").read_bytes()
        assert b"script" not in http_get(served, f"/picture/{row}")[1]


def test_a_spreadsheet_takes_no_name_for_a_formula(two):
    hostile = ["=cmd('calc')", "+1", "-rf.png", "@SUM(1)", "'quoted", 'a,"b"', "plain.png"]
    named = replace(two, names=[*hostile, *two.names[len(hostile) :]])
    rows = np.arange(len(hostile))
    table = list(csv.reader(io.StringIO(selection_list(named, rows, "csv"))))
    assert [row[2] for row in table[1:]] == ["'=cmd('calc')", "'+1", "'-rf.png", "'@SUM(1)", "''quoted", *hostile[-2:]]
    assert {len(row) for row in table} == {3 + len(two.columns)}
    assert selection_list(named, rows, "txt").splitlines() == hostile  # a list of paths stays one


def test_a_link_swapped_in_after_indexing_is_not_followed(tmp_path):
    """A picture, and a folder of pictures, become links to what lies outside."""
    folder, secret = draw_folder(tmp_path / "root", per_class=3), tmp_path / "secret"
    secret.mkdir()
    for name in ("000.png", "001.png", "002.png"):
        Image.new("RGB", (24, 24), "red").save(secret / name)
    collection = embedded_folder(folder, tmp_path)
    row = {name.split("/")[-1]: i for i, name in enumerate(collection.names) if name.startswith("ant/")}
    moved = next(i for i, name in enumerate(collection.names) if name.startswith("<b>"))
    with serving(collection) as served:
        assert status_of(served, f"/picture/{row['000.png']}") == 200
        (folder / "ant" / "000.png").unlink()
        (folder / "ant" / "000.png").symlink_to(secret / "000.png")
        assert status_of(served, f"/thumbnail/{row['000.png']}") == 404
        cat = next(path for path in folder.iterdir() if path.name.startswith("<b>"))
        cat.rename(tmp_path / "away")
        cat.symlink_to(secret)
        assert status_of(served, f"/thumbnail/{moved}") == 404
        os.unlink(folder / "ant" / "001.png")
        assert status_of(served, f"/thumbnail/{row['001.png']}") == 404
        assert status_of(served, f"/thumbnail/{row['002.png']}") == 200


@pytest.mark.parametrize("damage", ["cut", "replaced", "deleted", "rewritten"])
def test_embeddings_that_change_are_said_and_nothing_breaks(tmp_path, damage):
    folder = draw_folder(tmp_path / "root", per_class=3)
    collection = embedded_folder(folder, tmp_path, "served.npy")  # the form that is mapped into memory
    path = tmp_path / "served.npy"
    with serving(collection) as served:
        assert status_of(served, "/api/neighbours/0") == 200
        if damage == "cut":
            os.truncate(path, 100)
        elif damage == "replaced":
            (tmp_path / "other").write_bytes(b"something else")
            os.replace(tmp_path / "other", path)
        elif damage == "deleted":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        for target in ("/api/neighbours/0", "/api/about", "/picture/0", "/api/map/0"):
            status, _, body = parsed(send(served.port, Attack("", target=target).request(served.port, "")))
            assert status == 409, target
            assert "changed or damaged" in json.loads(body)["error"]
        assert status_of(served, "/") == 200  # the page comes and can say so


def test_two_hundred_slow_clients_do_not_stop_an_honest_one(one):
    """Half of them send nothing, half a line without end; later all of them are gone."""
    with serving(one, limits=Limits(head_seconds=1.5, request_seconds=2)) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
        for connection in idle[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: local")
        started = time.perf_counter()
        assert status_of(served, "/api/neighbours/0") == 200
        assert time.perf_counter() - started < 1
        deadline = time.monotonic() + 6
        while served.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not served.server.server_state.connections
        for connection in idle:
            connection.close()


def test_a_body_that_drips_and_an_answer_that_nobody_reads_end(one):
    with serving(one, limits=Limits(head_seconds=1, request_seconds=1)) as served:
        post = Attack("", target="/api/search", method="POST", headers=(TOKEN, "Content-Length: 999"), body=b"x")
        assert parsed(send(served.port, post.request(served.port, served.session)))[0] == 408
        greedy = socket.socket()
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect(("127.0.0.1", served.port))
        greedy.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                greedy.send(b"GET /static/twgl.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        time.sleep(0.3)
        assert served.server.server_state.connections
        deadline = time.monotonic() + 5
        while served.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not served.server.server_state.connections
        greedy.close()


def test_no_more_pictures_are_decoded_at_once_than_allowed(one, monkeypatch):
    from nnclr.explorer import server

    running, most = [0], [0]

    def slow(content):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(server, "decode", slow)
    with serving(one, limits=Limits(decoders=2)) as served:
        clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(8)]
        post = Attack("", target="/api/search", method="POST", headers=(TOKEN,), body=b"x")
        for client in clients:
            client.sendall(post.request(served.port, served.session))
        assert all(client.recv(65536).startswith(b"HTTP/1.1 200") for client in clients)
        for client in clients:
            client.close()
    assert most[0] == 2


def test_a_failure_of_ours_says_nothing_about_us(one, monkeypatch, caplog):
    with serving(one) as served:
        monkeypatch.setattr(type(one), "neighbours", lambda *_: {}["secret path /home/me"])
        status, headers, body = parsed(
            send(served.port, Attack("", target="/api/neighbours/0").request(served.port, ""))
        )
    assert status == 500
    assert headers["x-frame-options"] == "deny"
    assert b"secret" not in body
    assert "secret path" in caplog.text  # in the terminal


def test_only_loopback_listens(explorer):
    def listening_addresses():
        descriptors = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        inodes = {os.readlink(path) for path in descriptors if os.path.islink(path)}
        rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
        return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]

    addresses = listening_addresses()
    assert f"0100007F:{explorer.port:04X}" in addresses
    assert not [address for address in addresses if not address.startswith(("0100007F:", "0" * 24 + "01000000:"))]
    (everywhere,) = claim("0.0.0.0", 0, "a-token-of-16-letters")
    assert not any(address.startswith("00000000:") for address in listening_addresses())
    listen([everywhere], "0.0.0.0")
    assert any(address.startswith("00000000:") for address in listening_addresses())
    everywhere.close()


def test_with_a_token_nothing_is_shown_to_whoever_lacks_it(one):
    key = "a-token-of-16-letters"
    with serving(one, key=key) as served:
        cookie = f"nnclr-{served.port}={key}"
        for target in ("/", "/?token=wrong", f"/api/about?token={key}", "/picture/0", "/static/app.js"):
            assert status_of(served, target) == 403, target
        assert status_of(served, "/api/about", f"Cookie: nnclr-{served.port}=wrong") == 403
        status, headers, _ = parsed(send(served.port, Attack("", target=f"/?token={key}").request(served.port, "")))
        assert (status, headers["location"]) == (303, "/")
        assert headers["set-cookie"] == f"{cookie}; path=/; httponly; samesite=strict"
        assert status_of(served, "/api/about", f"Cookie: other=1; {cookie}") == 200


def embedded_folder(folder, place, name="served.parquet"):
    from nnclr.embed import embed_to_file
    from nnclr.pretrained import open_encoder

    embed_to_file(open_encoder("pixels?size=4"), str(folder), place / name, say=lambda line: None)
    return open_collection([place / name], projection="pca", say=lambda line: None)


def status_of(served, target, *headers):
    return parsed(send(served.port, Attack("", target=target, headers=headers).request(served.port, served.session)))[0]


def http_get(served, target):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    connection.request("GET", target)
    answer = connection.getresponse()
    assert answer.status == 200
    content = answer.read()
    connection.close()
    return {name.lower(): value for name, value in answer.headers.items()}, content
