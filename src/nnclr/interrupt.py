"""Stopping on request: the step in progress is finished first."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `asked` to their name instead of ending the process.

    A second SIGINT ends it at once with exit code 130. Outside the main thread, where Python delivers no
    signals, nothing is installed.

    Args:
        doing: what is done before the process ends, said on standard error as soon as a signal comes; empty for
            nothing, as in a job where another process says it.
        leave: called before a second SIGINT ends the process.
    """

    def __init__(self, doing: str = "", leave: Callable[[], None] | None = None) -> None:
        self.asked: str | None = None
        self._doing, self._leave, self._interrupted = doing, leave, False
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            if self._leave is not None:
                self._leave()
            os._exit(130)
        self.asked = signal.Signals(number).name
        self._interrupted |= number == signal.SIGINT
        if self._doing:
            again = "; press Ctrl-C again to leave at once" if number == signal.SIGINT else ""
            # Written past Python's buffers, in whose middle this may be called; below ^C and the bar on a terminal.
            with suppress(OSError):
                start = "\n" if os.isatty(2) else ""
                os.write(2, f"{start}nnclr: {self.asked}: {self._doing}{again}\n".encode())
