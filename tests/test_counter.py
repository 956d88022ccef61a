import numpy as np
import pytest
import torch

from nnclr import counter

MASK = 2**64 - 1


def plain_bits(*keys):
    """The same hash with Python's unbounded integers."""
    state = 0
    for key in keys:
        x = ((state ^ (key & MASK)) + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        state = x ^ (x >> 31)
    return state


def test_against_plain_integers():
    ids = np.array([0, 1, 2**40, 17])
    got = counter.uniform(3, 5, ids, 1, 4)
    expected = [[(plain_bits(3, 5, 1, int(i), slot) >> 40) / 2**24 for slot in range(4)] for i in ids]
    assert got.dtype == np.float32
    assert got.tolist() == expected
    assert counter.draw(3, 5, 7, 1, 1000) == plain_bits(3, 5, -2, 7, 1) % 1000
    keys = [plain_bits(9, 2, -1, i) for i in range(50)]
    assert counter.permutation(9, 2, 50).tolist() == sorted(range(50), key=lambda i: keys[i])


def test_frozen_values():
    """A change of these changes every run that is resumed across it."""
    assert counter.permutation(0, 0, 8).tolist() == FROZEN_ORDER
    np.testing.assert_array_equal(counter.uniform(0, 0, np.array([0, 1]), 0, 2), np.array(FROZEN_UNIFORM, np.float32))
    assert [counter.draw(0, 0, 0, attempt, 1000) for attempt in range(4)] == FROZEN_DRAWS


FROZEN_ORDER = [5, 6, 3, 1, 0, 7, 4, 2]
FROZEN_DRAWS = [203, 927, 136, 513]
FROZEN_UNIFORM = [[0.4714103937149048, 0.6477578282356262], [0.17732471227645874, 0.12270677089691162]]


def flips_per_output_bit(hash_):
    """Share of 2,000 ids for which flipping input bit i flips output bit j, (64, 64)."""
    ids = np.arange(2000)
    before, shares = hash_(ids), np.empty((64, 64))
    for bit in range(64):
        changed = before ^ hash_(ids ^ np.array(1 << bit, np.uint64).astype(np.int64))
        shares[bit] = [((changed >> np.uint64(out)) & np.uint64(1)).mean() for out in range(64)]
    return shares


def test_each_bit_of_an_id_flips_half_of_the_bits():
    # 4,096 shares with a standard error of 0.011: five of them
    assert np.abs(flips_per_output_bit(lambda ids: counter.bits(0, 0, 0, ids)) - 0.5).max() < 0.056
    control = flips_per_output_bit(lambda ids: ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    assert np.abs(control - 0.5).max() > 0.4  # one multiplication leaves the low bits alone


def test_values_do_not_depend_on_the_batch():
    ids = np.arange(100)
    whole = counter.uniform(1, 2, ids, 0, 5)
    assert (counter.uniform(1, 2, ids[40:60], 0, 5) == whole[40:60]).all()
    assert (counter.uniform(1, 2, ids, 0, 3) == whole[:, :3]).all()


def test_uniform_and_uncorrelated():
    u = counter.uniform(0, 0, np.arange(20_000), 0, 8)
    counts = np.stack([np.histogram(u[:, slot], 20, (0, 1))[0] for slot in range(8)])
    chi_square = ((counts - 1000) ** 2 / 1000).sum(axis=1)
    assert (chi_square < 45).all()  # 19 degrees of freedom: the 99.9 % point is 43.8
    assert u.min() >= 0
    assert u.max() < 1
    others = {
        "view": counter.uniform(0, 0, np.arange(20_000), 1, 8),
        "epoch": counter.uniform(0, 1, np.arange(20_000), 0, 8),
        "seed": counter.uniform(1, 0, np.arange(20_000), 0, 8),
        "next id": np.roll(u, 1, axis=0),
        "next slot": np.roll(u, 1, axis=1),
    }
    for name, other in others.items():
        correlation = np.corrcoef(u.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 0.01, name  # 160,000 pairs: a standard error of 0.0025
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.035


def test_permutations_are_permutations_and_differ():
    one, two = counter.permutation(0, 0, 1000), counter.permutation(0, 1, 1000)
    assert sorted(one.tolist()) == list(range(1000))
    assert (one == two).mean() < 0.02
    assert (one == counter.permutation(1, 0, 1000)).mean() < 0.02


SIZES = [7, 0, 30, 1, 12, 12, 25, 13, 9, 40]


def plain_block_order(seed, epoch, sizes, window):
    """The definition in whole numbers of Python, one id at a time."""
    blocks = len(sizes)
    ranks = sorted(range(blocks), key=lambda block: plain_bits(seed, epoch, -3, block))
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]

    def place(i):
        return ((ranks.index(block_of[i]) << 32) + (plain_bits(seed, epoch, -1, i) >> 32) * window) % (blocks << 32)

    return sorted(range(sum(sizes)), key=place)


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_block_permutation_against_plain_integers(window):
    for seed, epoch in ((0, 0), (3, 7)):
        order = counter.block_permutation(seed, epoch, SIZES, window)
        assert order.tolist() == plain_block_order(seed, epoch, SIZES, window)


@pytest.mark.parametrize("window", [1, 4, 32])
def test_blocks_are_shuffled_within_their_window(window):
    """Each id once; at any time about `window` of 200 blocks are in use, each for one stretch of the circle."""
    sizes = np.random.default_rng(0).integers(20, 80, 200)
    block_of, n = np.repeat(np.arange(200), sizes), sizes.sum()
    order = counter.block_permutation(1, 2, sizes.tolist(), window)
    assert sorted(order.tolist()) == list(range(n))
    blocks = block_of[order]
    for start in range(0, n - 50, 50):
        assert len(set(blocks[start : start + 50])) <= window + 3  # one ends and another begins every 50 ids
    places = {block: np.flatnonzero(blocks == block) for block in range(200)}
    gaps = np.array([np.diff(np.append(p, p[0] + n)).max() for p in places.values()])  # the rest of the circle
    assert ((n - gaps) < 1.3 * 80 * (window + 1)).all()
    one, other = (counter.block_permutation(1, epoch, sizes.tolist(), window) for epoch in (2, 3))
    assert (one == other).mean() < 0.02
    shuffled = np.mean(np.diff(order) == 1)
    assert shuffled < 0.1  # the control: in the order of the file this is 1


def test_one_window_is_a_permutation_of_all():
    expected = counter.permutation(4, 2, sum(SIZES)).tolist()
    assert counter.block_permutation(4, 2, SIZES, len(SIZES)).tolist() == expected
    assert counter.block_permutation(4, 2, (sum(SIZES),), 1).tolist() == expected
    assert counter.block_permutation(4, 2, SIZES, len(SIZES) - 1).tolist() != expected
    assert counter.block_permutation(0, 0, [2, 3, 3], 2).tolist() == FROZEN_BLOCKS


FROZEN_BLOCKS = [5, 6, 7, 3, 4, 1, 2, 0]


def test_the_hash_on_the_device_has_the_same_bits():
    ids = np.array([0, 1, 2**40, 17, 2**62 + 5])
    for keys in ((3, 5), (0, -1), (2**40, 7)):
        expected = counter.bits(*keys, ids)
        got = counter.bits_on_device(*keys, torch.from_numpy(ids))
        assert (got.numpy().view(np.uint64) == expected).all()
