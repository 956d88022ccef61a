"""`nnclr explore`: a page on this machine to look at a whole collection of pictures through its embeddings.

`collection.py` opens the files and says what belongs together, `projection.py` makes the map, `server.py` answers the
page in `static/`, and `guard.py` stands in front of it.
"""

import ipaddress
import signal
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnclr.errors import InputError
from nnclr.explorer.atlas import write_atlas

__all__ = ["explore", "write_atlas"]


@contextmanager
def _ends_on_ctrl_c(server: Any) -> Iterator[None]:
    """Ctrl-C asks the server to end, also in the moment before it listens to signals itself."""
    if threading.current_thread() is not threading.main_thread():  # where Python delivers no signals
        yield
        return
    before = signal.signal(signal.SIGINT, server.handle_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def explore(
    embeddings: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    data: Any = None,
    encoder: str | None = None,
    projection: str = "umap",
    open_browser: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the explorer until Ctrl-C.

    Args:
        embeddings: files that `nnclr embed` wrote. Several of one encoder are joined in one map; those of a second
            encoder over the same pictures are compared with the first.
        host: the address to listen on; one that other machines reach needs a token.
        port: 0 takes a free one.
        token: what a browser must bring, once, as `?token=`.
        data: where the pictures are, if not where the files say.
        encoder: an encoder of the files, if it is not where they say.
        projection: `umap`, kept beside the first file, or `pca`.
        open_browser: open the page.
        say: takes lines for people.

    Raises:
        InputError: if the files cannot be opened or do not belong together, the port is taken, other machines could
            connect and there is no token, or starlette and uvicorn are not installed.
    """
    try:
        from nnclr.explorer.server import Explorer, address_of, claim, listen, make_server
    except ImportError as error:
        raise InputError(f"explore needs {error.name}; pip install 'nnclr[explore]'") from None
    from nnclr.explorer.collection import open_collection

    sockets = claim(host, port, token)
    try:
        collection = open_collection(embeddings, data, encoder, projection, say)
        address = address_of(host, sockets[0], token)
        if not all(ipaddress.ip_address(opened.getsockname()[0]).is_loopback for opened in sockets):
            say(
                "warning: other machines can connect, and nothing is encrypted: whoever sees the address below, or "
                "listens on the network, sees the pictures"
            )
        server = make_server(Explorer(collection, host, token))
        with _ends_on_ctrl_c(server):
            listen(sockets, host)
            say(f"{len(collection):,} pictures at {address}  (Ctrl-C ends)")
            if open_browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            server.run(sockets)
        say("explorer ended")
    except KeyboardInterrupt:
        say("explorer ended")
    finally:
        for opened in sockets:
            opened.close()
