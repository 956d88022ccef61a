import os
import signal
import subprocess
import sys
import threading

import pytest

from nnclr.interrupt import StopRequest, raise_outside_imports

TWICE = """
import os, signal, time
from nnclr.interrupt import StopRequest
with StopRequest("finishing") as stop:
    os.kill(os.getpid(), signal.{first})
    print("asked", stop.asked, flush=True)
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGINT)
    print("asked", stop.asked, flush=True)
"""


@pytest.mark.parametrize(("first", "seconds", "code"), [("SIGINT", 0.5, 130), ("SIGTERM", 0.5, 0), ("SIGINT", 0, 0)])
def test_second_ctrl_c_ends_at_once(first, seconds, code):
    """Unless it comes sooner than fingers are: wrappers, such as `timeout`, send the first one twice."""
    program = TWICE.format(first=first, seconds=seconds)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == code
    assert ("nnclr: SIGINT again: leaving at once\n" in answer.stderr) == (code == 130)
    assert answer.stderr.count("press Ctrl-C again") == 1
    assert answer.stdout.startswith(f"asked {first}\n")
    assert ("asked SIGINT\n" in answer.stdout.removeprefix("asked SIGINT\n")) == (code == 0)


NOTED = """
import os, signal, sys, time
from nnclr.interrupt import StopRequest

def note():
    time.sleep(float(sys.argv[1]))
    print("noted", flush=True)

with StopRequest("leaving", note):
    began = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
    print("asked", time.monotonic() - began < 0.2, flush=True)
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(("seconds", "said"), [("0.7", "asked True\nnoted\n"), ("100", "asked True\n")])
def test_a_note_is_taken_and_one_that_hangs_is_not_waited_for(seconds, said):
    command = [sys.executable, "-c", NOTED, seconds]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (answer.returncode, answer.stdout) == (130, said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def enter():
        with StopRequest() as stop:
            seen.append(stop.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]


LATE = """
import atexit, os, signal, sys
from nnclr import __main__
atexit.register(lambda: os.kill(os.getpid(), signal.{name}))
sys.argv = ["nnclr", "--version"]
{leave}
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_the_finished_command_leaves_makes_no_failure_of_it(name):
    def code(leave):
        program = LATE.format(name=name, leave=leave)
        return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode

    assert code("__main__.command()") == 0
    assert code("sys.exit(__main__.main())") == -signal.Signals[name]  # control


SWALLOWING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
except KeyboardInterrupt:  # as extension modules do, which then lack a part of themselves
    pass
"""
IMPORTING = """
import signal, sys
from nnclr.interrupt import raise_outside_imports
if sys.argv[1] == "ours":
    signal.signal(signal.SIGINT, raise_outside_imports)
import swallowing
print("went on", flush=True)
"""


def test_ctrl_c_within_an_import_ends_the_process(tmp_path):
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    for handler, expected in (("ours", (130, "")), ("Python's", (0, "went on\n"))):  # the second is the control
        command = [sys.executable, "-c", IMPORTING, handler]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (answer.returncode, answer.stdout) == expected, answer.stderr
        assert ("nnclr: interrupted while it was loading\n" == answer.stderr) == (handler == "ours")
    with pytest.raises(KeyboardInterrupt):
        raise_outside_imports(signal.SIGINT, sys._getframe())


COMMAND = """
import signal, sys
import nnclr.cli
from nnclr.__main__ import command
signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))
nnclr.cli.main = lambda: print(getattr(signal.getsignal(signal.SIGINT), "__name__", "ignored")) or 0
command()
"""


@pytest.mark.parametrize(
    ("before", "within"), [("default_int_handler", raise_outside_imports.__name__), ("SIG_IGN", "ignored")]
)
def test_the_command_answers_ctrl_c_itself_unless_it_is_ignored(before, within):
    answer = subprocess.run([sys.executable, "-c", COMMAND, before], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout.strip()) == (0, within)
