"""Tests that fork: in a process with threads, as one that has run other tests may be, the child could hang."""

import functools
import os
import subprocess
import sys
from pathlib import Path


def alone(test):
    """Run a test in a fresh interpreter of its own."""

    @functools.wraps(test)
    def run(**fixtures):
        if os.environ.get("NNCLR_TEST_ALONE"):
            test(**fixtures)
            return
        node = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", node]
        environment = {**os.environ, "NNCLR_TEST_ALONE": "1"}
        answer = subprocess.run(
            command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stdout
        assert "1 passed" in answer.stdout

    return run
