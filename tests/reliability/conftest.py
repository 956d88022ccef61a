import faulthandler

import pytest

from tests.reliability.runs import Warm

LIMIT = 300  # seconds a test of this folder may take before its process is ended with the stacks of all threads


@pytest.fixture(autouse=True)
def hard_timeout(request):
    """End a test that hangs, also where Python does not run any more; a module says LIMIT for another limit."""
    faulthandler.dump_traceback_later(getattr(request.module, "LIMIT", LIMIT), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def count(record_property):
    """`count("A1", "runs that ended bit for bit alike", passed, of)`: a figure for reliability.json and the page."""

    def write(entry, what, passed, of):
        record_property("reliability", {"entry": entry, "what": what, "passed": int(passed), "of": int(of)})

    return write


@pytest.fixture(scope="session")
def warm():
    """The interpreter that forks a child for each run; see `Warm.run`."""
    with Warm() as server:
        yield server
