"""A stopped run of every release, from which today's version must go on: `python -m tests.legacy 0.1.0` adds one.

Each folder holds the run as it was stopped, and in `expected.json` the losses of the steps that followed.
"""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
STOPPED, TOTAL = 6, 12  # steps


def pictures():
    """32 pictures (12, 12, 3) of integer arithmetic: the same whatever the version of NumPy's generators."""
    number, y, x, channel = np.ogrid[:32, :12, :12, :3]
    return ((37 * number + (y * (number % 5 + 1) + 3 * x) * (channel + 2) * 7) % 256).astype(np.uint8)


def network(seed=0):
    """A small one with batch norm."""
    torch.manual_seed(seed)
    layers = (torch.nn.Conv2d(3, 6, 3, stride=2), torch.nn.BatchNorm2d(6), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def settings():
    """Of every release: names that are not there any more belong in here no more."""
    return {
        "image_size": 12,
        "batch_size": 8,
        "epochs": 3,
        "embedding_dim": 8,
        "projector_hidden_dim": 12,
        "predictor_hidden_dim": 12,
        "support_set_size": 60,
        "ema_momentum": 0.9,
        "optimizer": "adamw",
        "learning_rate": 0.02,
        "precision": "fp32",
        "device": "cpu",
        "num_workers": 0,
        "log_every_steps": 1,
        "evaluate_every_epochs": 0,
        "checkpoint_every_steps": STOPPED,
        "quiet": True,
    }
