"""What can go wrong for a user, one class an exit code; the command line prints the message and nothing else."""


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
    """The data cannot be used: too many unreadable images, or the source vanished."""

    exit_code = 81


class NonFiniteError(NNCLRError):
    """The loss or a gradient is not finite; the weights were not updated."""

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


def first_line(error: Exception) -> str:
    """What another library says in the first line of its error, or the error's kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
