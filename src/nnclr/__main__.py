"""The `nnclr` command as a process: `python -m nnclr`, and the script that is installed."""

import os
import signal
import sys

from nnclr.interrupt import raise_outside_imports


def command() -> None:
    """Run the command of this process and leave with its exit code."""
    # Not where it is ignored, as in the background of a shell.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, raise_outside_imports)
    from nnclr.cli import main

    code = main()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # All is written, and Python takes a second to leave: a request to stop must not make a failure of it.
        signal.signal(number, signal.SIG_IGN)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads of the communication library may still wait for a process that is gone, and would abort this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
