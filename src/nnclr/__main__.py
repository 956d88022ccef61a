"""`python -m nnclr` is the `nnclr` command."""

import os
import sys

from nnclr.cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # Threads of the communication library may still wait for a process that is gone, and would abort this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
