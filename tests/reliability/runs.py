"""Small runs that something happens to, and the warmed interpreter that forks a child for each of them.

A child costs no import of torch, and is a process of its own: it can be killed, and what is patched in it stays in it.
The run has 20 steps of 5 an epoch, a checkpoint every 3, an evaluation every 10; pictures and report are left out.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.settings import TINY

ROOT = Path(__file__).parents[2]
# Backbone and `quiet` are given with each run.
SETTINGS = {name: value for name, value in TINY.items() if name not in ("backbone", "quiet")} | {"warmup_epochs": 0.4}
TOTAL = 20


class Warm:
    """The interpreter that forks; `run` starts one child and waits for its end."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "tests.reliability.runs"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()

    def run(self, function, *arguments, log=os.devnull, kill_after=None):
        """The exit code of a child, -9 where it was killed.

        Args:
            function: `module:name`; what it returns, if anything, is the exit code, and errors of ours have theirs.
            arguments: that JSON can carry.
            log: file for what the child prints.
            kill_after: seconds.
        """
        print(json.dumps([function, arguments, str(log), kill_after]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())


def serve():
    import torch

    import nnclr

    for name in ("numpy.ma", "PIL.Image", "PIL.PngImagePlugin", "timm", "nnclr.training"):  # all that a run imports
        importlib.import_module(name)
    torch.set_num_threads(1)
    nnclr.LARS([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # the first optimiser imports for seconds
    for line in sys.stdin:
        function, arguments, log, kill_after = json.loads(line)
        child = os.fork()
        if child == 0:
            become(function, arguments, log)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # not yet waited for, so that the number is still its own
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(function, arguments, log):
    """Be the child."""
    from nnclr.errors import NNCLRError

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        module, _, name = function.partition(":")
        code = getattr(importlib.import_module(module), name)(*arguments) or 0
    except NNCLRError as error:
        print(f"nnclr: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:  # noqa: BLE001 - whatever it is, the child must not go on as the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- in the child ------------------------------------------------------------------------------------------


def data():
    """120 pictures of 4 classes."""
    import numpy as np

    rng = np.random.default_rng(0)
    labels = np.arange(120) % 4
    colours, noise = rng.integers(0, 256, (4, 1, 1, 3)), rng.integers(-40, 40, (120, 16, 16, 3))
    return np.clip(colours[labels] + noise, 0, 255).astype(np.uint8), labels


def backbone():
    """With batch norm and dropout, so that statistics and the generator's state matter."""
    import torch

    torch.manual_seed(1)
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2)),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
    )


def train(folder, changes=None, outputs=False):
    """Begin or go on with the run in a folder."""
    import nnclr
    from nnclr import neighbour_sheet, plots, report

    if not outputs:  # pictures take longer than the steps
        plots.draw_curves, report.write_report = lambda run: None, lambda run, **_: Path(run)
        neighbour_sheet.draw_neighbours = lambda *_: None
    nnclr.pretrain(data(), folder, backbone=backbone(), **SETTINGS | (changes or {}))


def after_update(step, act):
    """Do something when the objective has made its last change in a step, counted from 1."""
    import nnclr

    update = nnclr.NNCLR.update

    def updated(self, out):
        update(self, out)
        if int(self.support_set.updates) == step:
            act()

    nnclr.NNCLR.update = updated


def ctrl_c_twice():
    """As a person presses it."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.4)
    os.kill(os.getpid(), signal.SIGINT)


def stop_after(folder, step, changes=None):
    """The run, stopped by SIGTERM in a step."""
    after_update(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(folder, changes)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


# ---- in the test -------------------------------------------------------------------------------------------


def final(folder):
    """Every tensor of the last checkpoint of a whole run: weights, moments, support set, random state."""
    import safetensors.torch

    return safetensors.torch.load_file(Path(folder) / f"checkpoints/step-{TOTAL:08d}/tensors.safetensors")


def same(one, two):
    """Whether two states are equal bit for bit."""
    import torch

    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


if __name__ == "__main__":
    serve()
