"""Work on many images by threads: in order, in bounded memory, and never hanging in silence.

A read can block for ever: a file server that is gone, a disk that dies. No thread can be ended from outside, but who
waits for it can say what it reads, give up, and leave. A stop that is asked for meanwhile is heard where the caller
passes `asked`, as the training of one process does; elsewhere (evaluations, embed, pack, jobs of several processes) it
waits for the read or for the end of patience.
"""

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from nnclr.errors import DataError

SAID_AFTER = 10.0  # seconds that one image may take before its name is said
MOST_SECONDS = 600.0  # and before its storage counts as gone: a server that is started anew is back by then
_SAID_AGAIN = 60.0
_LOOK = 0.5  # seconds between two looks at what takes so long
_PAUSED = 5.0  # seconds between two looks that mean that the whole process was stopped
_LEAVE = 5.0  # seconds that threads have to end; one that hangs is left behind
_AHEAD = 64  # results that wait for their turn

Item = TypeVar("Item")
Result = TypeVar("Result")

_under_way: dict[int, tuple[float, Callable[[], str]]] = {}  # thread -> since when it reads, and the name of what


def threads_for(num_workers: int | None) -> int:
    """Threads that decode: as many as are asked for and at least one; for None one a core, up to eight."""
    return min(8, os.cpu_count() or 1) if num_workers is None else max(num_workers, 1)


class AskedToStop(Exception):
    """A stop was asked for while images were waited for."""


@contextmanager
def reading(name: Callable[[], str]) -> Iterator[None]:
    """While entered, this thread reads what the name says, and who waits for it can tell."""
    thread = threading.get_ident()
    _under_way[thread] = (time.monotonic(), name)
    try:
        yield
    finally:
        _under_way.pop(thread, None)


class Threads:
    """Threads that decode; unlike those of an executor, one that hangs does not keep the program from ending.

    Args:
        count: how many, at least 1.
        start: called in each before its work.
    """

    def __init__(self, count: int, start: Callable[[], object] | None = None) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        arguments = (self._work, start)
        self._threads = [
            threading.Thread(target=_serve, args=arguments, name=f"decode-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Begin function(*arguments) when a thread is free."""
        future: Future[Result] = Future()
        self._work.put((future, lambda: function(*arguments)))
        return future

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Begin all at once, and give the results in order."""
        futures = deque([self.submit(function, item) for item in items])
        return (self.wait_for(futures.popleft()) for _ in range(len(futures)))

    def map_batches(
        self, function: Callable[[Item], Result], batches: Iterable[Iterable[Item]]
    ) -> Iterator[list[Result]]:
        """`map` of one batch after the other; while one is used, the next is under way."""
        waiting: deque[Iterator[Result]] = deque()
        for batch in batches:
            waiting.append(self.map(function, batch))
            if len(waiting) > 1:
                yield list(waiting.popleft())
        while waiting:
            yield list(waiting.popleft())

    def wait_for(self, future: "Future[Result]", asked: Callable[[], bool] | None = None) -> Result:
        """The result of a future of these threads; an image that takes long is named in a warning, again each minute.

        Raises:
            AskedToStop: where `asked` says so before the result is there.
            DataError: if it was waited for one image for ten minutes.
        """
        due, looked = SAID_AFTER, time.monotonic()
        began = looked  # what passed before, perhaps in a process that was stopped, is not held against a read
        while not future.done():
            if asked is not None and asked():
                raise AskedToStop
            now = time.monotonic()
            if now - looked > _PAUSED:  # stopped by a signal, a scheduler or a frozen container, and awake again
                began, due = now, SAID_AFTER
            looked = now
            since, name = self._oldest_read(now)
            seconds = now - max(since, began)
            if seconds > MOST_SECONDS:
                raise DataError(
                    f"{name()} has been read for {seconds:.0f} s without an end: its storage does not answer; run the "
                    "same command again when it does"
                )
            if seconds > due:
                warnings.warn(
                    f"{name()} has been read for {seconds:.0f} s and is not there yet: its storage is slow or gone",
                    stacklevel=2,
                )
                due = seconds + _SAID_AGAIN
            with suppress(TimeoutError):
                future.exception(_LOOK)
        return future.result()

    def _oldest_read(self, now: float) -> tuple[float, Callable[[], str]]:
        """Since when one of these threads reads, and the name of what; threads that others left behind do not count."""
        reads = [read for thread in self._threads if (read := _under_way.get(thread.ident or 0)) is not None]
        return min(reads, key=lambda read: read[0], default=(now, str))

    def close(self) -> None:
        """Forget what has not begun, and wait a little for what has."""
        with suppress(Empty):
            while (job := self._work.get_nowait()) is not None:
                job[0].cancel()
        for _ in self._threads:
            self._work.put(None)
        until = time.monotonic() + _LEAVE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _serve(
    work: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]", start: Callable[[], object] | None
) -> None:
    if start is not None:
        start()
    while (job := work.get()) is not None:
        future, call = job
        del job
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
                future.set_exception(error)
            else:
                del call  # before anybody knows of the result: what it holds may be used again
                future.set_result(result)
                del result
        del future


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """`map(function, items)`, some results ahead: where `Threads.map` would take all items at once."""
    waiting: deque[Future[Result]] = deque()
    with Threads(threads_for(threads)) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _AHEAD:
                yield pool.wait_for(waiting.popleft())
        while waiting:
            yield pool.wait_for(waiting.popleft())
