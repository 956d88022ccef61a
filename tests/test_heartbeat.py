import threading
import time

import pytest

from nnclr import heartbeat
from nnclr.heartbeat import Heartbeat


class Store:
    """What the ranks share, in one process; it can break down."""

    def __init__(self):
        self.values, self.broken, self.refused, self.lock = {}, False, 0, threading.Lock()

    def _up(self):
        if self.broken:
            self.refused += 1
            raise RuntimeError("Connection reset by peer\nand a stack")

    def set(self, key, value):
        self._up()
        with self.lock:
            self.values[key] = value.encode()

    def get(self, key):
        self._up()
        return self.values[key]

    def check(self, keys):
        self._up()
        return all(key in self.values for key in keys)


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks that beat every 20 ms and lose patience after 0.3 s, and what each left with."""
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.02)
    monkeypatch.setattr(heartbeat, "_GRACE", 0.1)
    store, left = Store(), {}
    hearts = [
        Heartbeat(store, rank, 3, 0.3, lambda reason, rank=rank: left.update({rank: reason})) for rank in range(3)
    ]
    yield store, hearts, left
    for heart in hearts:
        heart._stop.set()
        heart._thread.join()


def wait_for(condition, seconds=3.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_nobody_leaves_while_all_beat_and_when_they_end(ranks):
    _, hearts, left = ranks
    time.sleep(0.8)
    hearts[1].close()  # done before the others
    time.sleep(0.8)
    assert left == {}


def test_a_silent_rank_ends_all(ranks):
    _, hearts, left = ranks
    hearts[1]._stop.set()  # as if stopped or killed: no beat, no farewell
    assert wait_for(lambda: len(left) == 2)
    assert set(left) == {0, 2}
    assert all(reason.startswith("rank 1 gave no sign for 0 s") for reason in left.values())


def test_a_failure_is_told_to_all_at_once(ranks):
    _, hearts, left = ranks
    hearts[2].close("the disk is full")
    assert wait_for(lambda: len(left) == 2, 0.4)
    assert left == {0: "rank 2: the disk is full", 1: "rank 2: the disk is full"}
    assert hearts[0].cause() == "rank 2: the disk is full"


def test_who_leaves_by_itself_in_time_is_not_pushed(ranks):
    _, hearts, left = ranks
    hearts[2].close("the disk is full")
    hearts[0].close("lost a peer")
    time.sleep(0.4)
    assert set(left) == {1}


def test_a_pause_of_all_is_no_loss(ranks, monkeypatch):
    """As by SIGSTOP to the whole job, after which every clock has jumped."""
    _, _, left = ranks
    clock = time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock() + 100)
    time.sleep(0.3)
    assert left == {}


def test_the_first_cause_stays(ranks):
    _, hearts, _ = ranks
    hearts[2].close("the disk is full")
    hearts[0].close("lost a peer")
    assert hearts[1].cause() == "rank 2: the disk is full"


def test_a_store_that_is_gone(ranks):
    store, hearts, left = ranks
    store.broken = True
    assert wait_for(lambda: len(left) == 3)
    assert "Connection reset by peer" in left[0]
    assert "stack" not in left[0]
    assert hearts[0].cause(0.1) is None
    hearts[0].close("anything")  # and no error


def test_a_store_whose_holder_ends_a_moment_earlier_is_no_loss(ranks, monkeypatch):
    store, hearts, left = ranks
    monkeypatch.setattr(heartbeat, "_INTERVAL", 2.0)
    store.broken = True
    assert wait_for(lambda: store.refused >= 3)  # all have seen it
    for heart in hearts:
        heart.close()
    assert left == {}


def test_without_a_cause_who_fell_silent_is_named(ranks):
    _, hearts, _ = ranks
    hearts[0].patience = hearts[1].patience = 100.0
    hearts[2]._stop.set()
    hearts[2]._thread.join()  # killed: nothing more comes from it
    assert hearts[0].cause(0.3) == "rank 2 gives no sign any more: it was killed or is frozen"
    hearts[2].close()  # control: it has ended, and said so
    assert hearts[0].cause(0.3) is None


def test_no_cause_is_waited_for_a_while(ranks):
    _, hearts, _ = ranks
    assert hearts[0].cause(0.1) is None
