"""A sign of life from every process of a job, so that a dead or frozen one ends it within seconds.

A collective alone waits for its timeout, minutes, where a process hangs; on CUDA also where it died.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from nnclr.errors import tell

PATIENCE = 30.0  # seconds without a sign; also long calls that never let another thread run must fit in
_INTERVAL = 1.0
_GRACE = 4.0  # seconds to leave by oneself, perhaps with a checkpoint to finish, once the job is known to end
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
_ENDED, _VERDICT = "ended", "nnclr/verdict"


class Store(Protocol):
    """What of PyTorch's key-value stores is used here."""

    def set(self, key: str, value: str) -> None:
        """Write."""
        ...

    def get(self, key: str) -> bytes:
        """Read; waits for a key that is not there."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are there."""
        ...


class Heartbeat:
    """Beats once a second and watches the next rank; a thread, so that long steps do not stop it.

    Who notices that its neighbour has fallen silent writes a verdict that every rank reads, and all leave.

    Args:
        store: shared by all ranks; used by this object alone.
        rank: of this process.
        world_size: number of processes.
        patience: seconds of silence that count as lost; default `PATIENCE`.
        leave: called with the reason in the watching thread; by default it says so and ends the process with code 85.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        patience: float | None = None,
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self.store, self.rank = store, rank
        self.patience = PATIENCE if patience is None else patience
        self.world_size, self.neighbour = world_size, (rank + 1) % world_size
        self.leave = _leave if leave is None else leave
        self._stop = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def cause(self, wait: float = 2.5 * _INTERVAL) -> str | None:
        """The first cause that any rank gave for the end of the job, waiting a little for it.

        Without one, the ranks that gave no sign meanwhile; None if all did, or the store is gone.
        """
        until = time.monotonic() + wait
        try:
            before = self._beats()
            while time.monotonic() < until:
                if self.store.check([_VERDICT]):
                    return self.store.get(_VERDICT).decode()
                time.sleep(0.05)
            silent = [rank for rank, beat in self._beats().items() if beat == before.get(rank) != _ENDED.encode()]
        except RuntimeError:  # the store is gone with its process
            return None
        return (
            f"rank {', '.join(map(str, silent))} gives no sign any more: it was killed or is frozen" if silent else None
        )

    def _beats(self) -> dict[int, bytes]:
        """The last sign of each rank that has given one."""
        keys = {rank: _key(rank) for rank in range(self.world_size)}
        return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}

    def close(self, failure: str | None = None) -> None:
        """Stop watching; with a failure, tell the others why this rank leaves."""
        self._stop.set()
        self._thread.join(timeout=2 * _INTERVAL)
        try:
            if failure is not None and not self.store.check([_VERDICT]):
                self.store.set(_VERDICT, f"rank {self.rank}: {failure}")
            self.store.set(_key(self.rank), _ENDED)
        except RuntimeError:  # the store is gone with its process: nobody is left to be told
            return

    def _beat(self, count: int) -> None:
        self.store.set(_key(self.rank), str(count))

    def _run(self) -> None:
        count, last, heard = 0, b"", time.monotonic()
        turn = heard
        while not self._stop.wait(_INTERVAL):
            count += 1
            if time.monotonic() - turn > 5 * _INTERVAL:  # the whole machine, or job, was paused
                heard = time.monotonic()
            turn = time.monotonic()
            try:
                self._beat(count)
                if self.store.check([_VERDICT]):
                    verdict = self.store.get(_VERDICT).decode()
                    return None if self._stop.wait(_GRACE) else self.leave(verdict)
                beat = self.store.get(_key(self.neighbour)) if self.store.check([_key(self.neighbour)]) else b""
            except RuntimeError as error:
                if not self._stop.wait(_INTERVAL):  # its holder may end a moment before this rank, which is no loss
                    self.leave(f"the process that the others meet at is gone ({str(error).splitlines()[0][:100]})")
                return None
            if beat != last or beat == _ENDED.encode():
                last, heard = beat, time.monotonic()
            elif time.monotonic() - heard > self.patience:
                reason = f"rank {self.neighbour} gave no sign for {self.patience:.0f} s: it was killed or is frozen"
                self.store.set(_VERDICT, reason)
                return self.leave(reason)
        return None


def _key(rank: int) -> str:
    return f"nnclr/beat/{rank}"


def _leave(reason: str) -> None:
    """End this process at once: the main thread may be in a collective that never returns."""
    tell(f"nnclr: {reason}; start the job again, it goes on from the last checkpoint")
    os._exit(85)


def die_with_parent() -> None:
    """Have the kernel end this process with the launcher's agent, so that none is left behind (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: torchrun then has to end its workers itself
        return
