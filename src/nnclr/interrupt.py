"""Stopping on request: the step in progress is finished first."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME = 0.3  # seconds within which a second SIGINT is the first one again: `timeout` and other wrappers send it twice


def raise_outside_imports(number: int, frame: FrameType | None) -> None:
    """Answer SIGINT by KeyboardInterrupt, or within an import by leaving at once with exit code 130.

    Extension modules take the exception for a failure of theirs, or drop it: what they had begun to set up is then
    missing for the rest of the process, or the request is.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(OSError):
                os.write(2, b"nnclr: interrupted while it was loading\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `asked` to their name instead of ending the process.

    A second SIGINT, no sooner than people press Ctrl-C twice, ends it at once with exit code 130. Outside the main
    thread, where Python delivers no signals, nothing is installed.

    Args:
        doing: what is done before the process ends, said on standard error as soon as a signal comes; empty for
            nothing, as in a job where another process says it.
        note: called in a thread of its own when the first signal comes; it may hang, as storage does.
    """

    def __init__(self, doing: str = "", note: Callable[[], None] = lambda: None) -> None:
        self.asked: str | None = None
        self._doing, self._note, self._noted = doing, note, False
        self._interrupted: float | None = None  # when the first SIGINT came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def over(self) -> None:
        """There is nothing left to stop, so that nothing is said any more of a signal."""
        self._doing = ""

    def _take_note(self) -> None:
        self._note()
        self._noted = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted is not None and number == signal.SIGINT:
            if now - self._interrupted < _SAME:
                return
            self._say("SIGINT again: leaving at once")
            until = now + 1.0
            while not self._noted and time.monotonic() < until:
                time.sleep(0.01)
            os._exit(130)
        if self.asked is None:
            _thread.start_new_thread(self._take_note, ())  # threading has locks that the interrupted code may hold
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupted = now
        again = "; press Ctrl-C again to leave at once" if number == signal.SIGINT else ""
        self._say(f"{self.asked}: {self._doing}{again}")

    def _say(self, text: str) -> None:
        """A line past Python's buffers, in whose middle this may be called; below ^C and the bar on a terminal."""
        if self._doing:
            with suppress(OSError):
                start = "\n" if os.isatty(2) else ""
                os.write(2, f"{start}nnclr: {text}\n".encode())
