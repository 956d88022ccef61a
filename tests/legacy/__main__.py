"""Make the stopped run of a release: `python -m tests.legacy VERSION`."""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile

import torch

import nnclr
from nnclr.errors import Stopped
from tests.legacy import FOLDER, STOPPED, network, pictures, settings


def main(version):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):  # no path of a machine is stored
        whole = nnclr.pretrain(pictures(), "whole", backbone=network(), **settings())
        update = nnclr.NNCLR.update

        def stopping(self, out):
            update(self, out)
            if int(self.support_set.updates) == STOPPED:
                os.kill(os.getpid(), signal.SIGTERM)

        nnclr.NNCLR.update = stopping
        try:
            nnclr.pretrain(pictures(), "parts", backbone=network(), **settings())
        except Stopped:
            folder = FOLDER / version
            folder.mkdir()
            shutil.copytree("parts/checkpoints", folder / "checkpoints")
            shutil.copy("parts/config.toml", folder)
        losses = {line["step"]: line["loss"] for line in whole.metrics if line["step"] > STOPPED}
        (folder / "expected.json").write_text(json.dumps({"losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
