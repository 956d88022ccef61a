"""Stopping on request: the step in progress is finished first."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `asked` to their name instead of ending the process.

    A second SIGINT ends it at once with exit code 130. Outside the main thread, where Python delivers no
    signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
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
        if self.asked == "SIGINT" and number == signal.SIGINT:
            os._exit(130)
        self.asked = signal.Signals(number).name
