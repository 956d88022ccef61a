"""Counter-based randomness: every number is a pure function of what it is for.

There is no generator whose state could be lost, shared or advanced in another order: the value for (seed,
epoch, image, view, slot) is a hash of these, so resume, workers and world size cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import, and the demo's data needs the orders alone
    from torch import Tensor

_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): flips half the bits for each input bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def bits(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys, broadcast against each other, to uint64."""
    state = np.zeros((1,), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mix((state ^ np.atleast_1d(np.asarray(key, np.int64)).astype(np.uint64)) + _GOLDEN)
    return state


def uniform(seed: int, epoch: int, ids: np.ndarray, view: int, slots: int) -> np.ndarray:
    """Uniform numbers for the augmentation of images.

    Args:
        seed: of the run.
        epoch: from 0.
        ids: (n,) int64 image ids.
        view: number of the view.
        slots: numbers needed for each image.

    Returns:
        (n, slots) float32 in [0, 1), multiples of 2**-24.
    """
    keys = bits(seed, epoch, view, np.asarray(ids)[:, None], np.arange(slots)[None, :])
    return (keys >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def step_seed(seed: int, step: int, rank: int) -> int:
    """What torch's generators start a step from on a rank of several: 63 bits."""
    return int(bits(seed, step, rank, -2)[0] >> np.uint64(1))


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch, (n,) int64: the indices sorted by their hash."""
    return np.argsort(bits(seed, epoch, -1, np.arange(n)), kind="stable")


def block_permutation(seed: int, epoch: int, sizes: Sequence[int], window: int) -> np.ndarray:
    """An order of an epoch in which only some blocks of ids, such as shards, are in use at a time.

    The blocks stand on a circle in the order of their hash, and each spreads its ids evenly over the places of the
    `window` blocks that begin with it: where one block ends another begins, and a batch mixes `window` of them. Those
    that began last reach over the end of the circle and are in use at the beginning, too.

    Args:
        seed: of the run.
        epoch: from 0.
        sizes: ids of each block; they are numbered through.
        window: blocks that are mixed; with as many as there are, this is `permutation`.

    Returns:
        (n,) int64, each id once.
    """
    n, blocks = sum(sizes), len(sizes)
    if window >= blocks:
        return permutation(seed, epoch, n)
    rank = np.empty(blocks, np.uint64)
    rank[np.argsort(bits(seed, epoch, -3, np.arange(blocks)), kind="stable")] = np.arange(blocks, dtype=np.uint64)
    shift = np.uint64(32)  # whole numbers: rounding would differ between machines
    place = np.repeat(rank << shift, sizes)
    place += (bits(seed, epoch, -1, np.arange(n)) >> shift) * np.uint64(window)
    return np.argsort(place % (np.uint64(blocks) << shift), kind="stable")


def draw(seed: int, epoch: int, position: int, attempt: int, n: int) -> int:
    """An index below n, for instance of the image that replaces an unreadable one."""
    return int(bits(seed, epoch, -2, position, attempt)[0] % np.uint64(n))


def bits_on_device(*keys: int | Tensor) -> Tensor:
    """The hash of `bits` as int64 tensors (the same 64 bits), wherever the keys are: nothing waits for them.

    Args:
        keys: integers and int64 tensors, broadcast against each other; at least one tensor.
    """
    import torch

    device = next(key.device for key in keys if isinstance(key, torch.Tensor))
    state = torch.zeros(1, dtype=torch.int64, device=device)
    for key in keys:
        state = _mix_on_device((state ^ key) + _signed(_GOLDEN))
    return state


def _mix_on_device(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Right shift that fills with zeros, where torch's fills with the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(value: np.uint64) -> int:
    """The int64 with the bits of a uint64."""
    return int(value.astype(np.int64))
