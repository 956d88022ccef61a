"""`python -m nnclr` is the `nnclr` command."""

import sys

from nnclr.cli import main

sys.exit(main())
