"""A small run for tests/test_torchrun.py, started on every rank: OUT, epochs, and what goes wrong where.

Nothing in it normalises over the batch, so that the number of ranks changes rounding only.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections import Counter

import numpy as np
import torch
from torch import nn

import nnclr
from nnclr import distributed, heartbeat, plots
from nnclr.models import recompute
from nnclr.models.ema import average_of

RANK = int(os.environ.get("RANK", "0"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU())

    def forward(self, x):
        return self.layers(x).mean((2, 3))


def transformer():
    """Three blocks whose rows no three processes can share out evenly, and what is in none of them; dropout is off."""
    from timm.models.vision_transformer import VisionTransformer  # seconds, which most of these jobs need not spend

    return VisionTransformer(img_size=16, patch_size=4, embed_dim=40, depth=3, num_heads=2, num_classes=0)


AT = {}  # step -> what this rank does after it, to the objective


class Plain(nnclr.NNCLR):
    @functools.wraps(nnclr.NNCLR.__init__)
    def __init__(self, feature_dim, **settings):
        super().__init__(feature_dim, **settings)
        self.projector, self.predictor = nn.Linear(feature_dim, 16), nn.Linear(16, 16)
        if self.momentum is not None:
            self.average_projector = average_of(self.projector)
        self.factor = 1.0

    def forward(self, features, targets=None, ids=None):
        out = super().forward(features, targets, ids)
        out.loss = out.loss * self.factor
        return out

    def update(self, out):
        super().update(out)
        AT.get(int(self.support_set.updates), lambda objective: None)(self)


def say(*words, to=sys.stdout):
    """A line in one write: with PYTHONUNBUFFERED `print` makes several, and those of the ranks mix."""
    to.write(" ".join(map(str, words)) + "\n")
    to.flush()


def fail(objective):
    raise nnclr.errors.DataError("the disk of this rank is gone")


def freeze(objective):
    say("freezing", time.time())
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(objective):
    say("dying", time.time())
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(objective):
    os.kill(os.getpid(), signal.SIGTERM)


def flip(objective):
    objective.predictor.weight.data.view(torch.int32)[0, 0] ^= 1


def spoil(objective):
    objective.factor = float("nan")


def terminate_late(objective):
    threading.Timer(2.0, terminate, [objective]).start()


def tell_seed(objective):
    say("seed", RANK, torch.initial_seed())


ACTIONS = {act.__name__: act for act in (fail, freeze, kill, terminate, flip, spoil, terminate_late, tell_seed)}


def slow(seconds, run):
    time.sleep(seconds)


def spied(calls):
    """Count the parts of networks that are shared out, and the blocks that are computed again."""
    shard, forward = distributed.shard, recompute.InBlocks.forward

    def sharing(module, *rest):
        shard(module, *rest)
        parts = [distributed.is_shared_out(p) for p in module.parameters()]
        calls["networks shared out"] += all(parts)
        return module

    def forwarding(self, view):
        calls["recomputed"] += torch.is_grad_enabled()
        return forward(self, view)

    distributed.shard, recompute.InBlocks.forward = sharing, forwarding


def main(out, epochs, *faults):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (240, 16, 16, 3), dtype=np.uint8), np.arange(240) % 4
    settings = {"seed": 0, "support_set_size": 100, "optimizer": "lars", "learning_rate": 1.0}
    seed, times, make = 1, 1, Net
    for fault in faults:  # NAME@RANK:VALUE
        name, _, where = fault.partition("@")
        rank, _, value = where.partition(":")
        if rank not in ("*", str(RANK)) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            continue  # after a restart nothing goes wrong
        if name in ACTIONS:
            AT[int(value)] = ACTIONS[name]
        elif name == "patience":
            heartbeat.PATIENCE = float(value)
        elif name == "weights":
            seed = int(value)
        elif name == "times":
            times = int(value)
        elif name == "slow_report":
            plots.draw_curves = functools.partial(slow, float(value))
        elif name == "transformer":
            make = transformer
            # Its updates are signs of gradients, whose rounding is all that is left of some of them: not with this eps.
            torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-3)
            settings |= {"optimizer": "adamw", "learning_rate": 0.001, "clip_grad_norm": 0.5, "ema_momentum": 0.9}
        else:
            settings[name] = bool(value) if name in ("shard_support_set", "fsdp", "recompute") else int(value)
    calls = Counter()
    spied(calls)
    torch.manual_seed(seed)
    network = make()
    for _ in range(times):
        nnclr.pretrain(
            (images, labels), out, backbone=network, objective=Plain, epochs=float(epochs), batch_size=24,
            image_size=16, embedding_dim=16, precision="fp32", warmup_epochs=0.5,
            evaluate_every_epochs=2.0, log_every_steps=5, checkpoint_every_steps=10, **settings,
        )  # fmt: skip
    say("calls", RANK, sorted(calls.items()))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except nnclr.errors.NNCLRError as error:  # as the command does
        if not error.told:
            say(f"nnclr: {error}", to=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)  # as `python -m nnclr`: threads of the communication library may still wait
