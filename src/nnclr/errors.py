"""What can go wrong for a user, one class an exit code; the command line prints the message and nothing else."""

import os
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Mapping


class NNCLRError(Exception):
    """A failure whose cause is known: one plain sentence that says what is wrong, where, and what to do.

    `exit_code` is what the `nnclr` command leaves with (the table is in docs/exit-codes.md).
    """

    exit_code = 1
    shared = False  # whether all ranks of the job raise it together
    told = False  # whether another rank says it, so that W ranks do not say it W times


class InputError(NNCLRError):
    """The user's input is wrong; nothing was written."""

    exit_code = 2


class Stopped(NNCLRError):
    """A signal asked the run to stop; a clean checkpoint was written, run the same command again to go on."""

    exit_code = 80


class DataError(NNCLRError):
    """The data cannot be used: too many unreadable images, or the source vanished.

    `bad` holds the images that could not be read, index -> reason, where it is because of them.
    """

    exit_code = 81

    def __init__(self, text: str, bad: Mapping[int, str] | None = None) -> None:
        super().__init__(text)
        self.bad = dict(bad or {})


class NonFiniteError(NNCLRError):
    """The loss or a gradient was not finite in too many steps, none of which changed the weights."""

    exit_code = 82


class ReplicaError(NNCLRError):
    """What every rank must hold alike differs between them."""

    exit_code = 82


class StorageError(NNCLRError):
    """The run folder cannot be written: full, read-only or gone."""

    exit_code = 83


class FolderInUseError(NNCLRError):
    """Another process is training in the same run folder."""

    exit_code = 84


class PeerLostError(NNCLRError):
    """Another process of the job died, froze or ended with an error of its own; start the job again to go on."""

    exit_code = 85


class NoCheckpointError(NNCLRError):
    """Checkpoints exist, but none of them passes its manifest."""

    exit_code = 86


class NoProgressError(NNCLRError):
    """The run was started again and again from one checkpoint and never came to the next one."""

    exit_code = 87


def tell(text: str) -> None:
    """A line on standard error, for people, in one write.

    `print` sends the end of a line apart where Python does not buffer, and the lines of several ranks mix.
    """
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """What another library says in the first line of its error, or the error's kind where it says nothing."""
    text = str(error).strip()
    return textwrap.shorten(text.splitlines()[0], 160, placeholder=" ...") if text else type(error).__name__


def place_outside(error: Exception, name: str) -> str:
    """` (mine:Method, mine.py, line 10)`: the last line of a stranger's own code that led to an error.

    Args:
        error: as it was caught.
        name: MODULE:CLASS of that code; without a colon it is ours, and nothing is said.
    """
    if ":" not in name:
        return ""
    others = [os.path.dirname(__file__), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))]
    known = (*(folder + os.sep for folder in others), "<")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(known)]
    place = f", {os.path.basename(theirs[-1].filename)}, line {theirs[-1].lineno}" if theirs else ""
    return f" ({name}{place})"
