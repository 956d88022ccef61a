"""A support set of which each rank holds a share answers as the whole set in one process does, bit by bit."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nnclr
from nnclr import sharded_support_set, support_set
from nnclr.objectives import MSF, NNBYOL, NNCLR, SNCLR, All4One
from nnclr.objectives.nn_byol import NNSimSiam
from nnclr.sharded_support_set import Found
from tests.objectives.test_methods import linear_heads
from tests.test_support_set import LargestTensor

QUERIES, DIM = 24, 6  # of all ranks together
LABELS = torch.arange(1000) % 4
multiprocessing.set_forkserver_preload(["torch", "timm", "torchvision", "nnclr"])  # import once, not in every process

CASES = {  # size, dim, rows a batch, batches, number of different vectors (None: all), options
    "a rank may hold nothing": (3, 4, 2, 3, None, {}),
    "smaller than a batch": (5, 4, 12, 3, None, {}),
    "no multiple of anything": (37, DIM, 12, 5, None, {"block_size": 4}),
    "duplicates": (101, DIM, 30, 5, 7, {"block_size": 8}),
    "all alike": (64, DIM, 20, 2, 1, {}),
    "random": (37, DIM, 12, 6, None, {"replacement": "random"}),
    "random, smaller than a batch": (5, 4, 12, 3, None, {"replacement": "random"}),
    "random duplicates": (50, DIM, 16, 5, 5, {"replacement": "random", "block_size": 16}),
    "large": (9001, 32, 3000, 4, None, {}),
    "large duplicates": (9001, 32, 3000, 4, 900, {"block_size": 1024}),
    "large and crowded": (9001, 32, 3000, 4, "crowded", {}),
    "half in use": (20_000, 32, 3000, 3, 2000, {}),
}
OBJECTIVES = {
    "nnclr": lambda shard: NNCLR(DIM, DIM, 8, 8, support_set_size=31, shard_support_set=shard),
    "nnclr, many options": lambda shard: NNCLR(
        DIM, DIM, 8, 8, 31, neighbour="random", neighbour_k=4, exclude_own_id=True, enqueue_both_views=True,
        replacement="random", shard_support_set=shard,
    ),
    "nnclr, oracle": lambda shard: NNCLR(
        DIM, DIM, 8, 8, 31, neighbour="oracle", labels=LABELS, shard_support_set=shard
    ),
    "nn-byol": lambda shard: NNBYOL(DIM, DIM, 8, 8, support_set_size=31, shard_support_set=shard),
    "nn-simsiam": lambda shard: NNSimSiam(DIM, DIM, 8, 8, support_set_size=31, shard_support_set=shard),
    "msf": lambda shard: MSF(DIM, DIM, 8, 8, support_set_size=31, shard_support_set=shard),
    "snclr": lambda shard: SNCLR(DIM, DIM, 8, 8, support_set_size=31, neighbour_k=8, shard_support_set=shard),
    "all4one": lambda shard: All4One(DIM, 8, 8, 8, support_set_size=31, shard_support_set=shard),
}  # fmt: skip


def batches(size, dim, rows, count, different, options):
    """Global batches with some rows that are not let in, and ids of which some are unknown."""
    generator = torch.Generator().manual_seed(size + rows)
    pool = torch.randn(different if isinstance(different, int) else rows * count, dim, generator=generator)
    if different == "crowded":  # so that similarities are equal but for rounding
        pool = 1 + 1e-3 * pool
    for _ in range(count):
        z = pool[torch.randint(0, len(pool), (rows,), generator=generator)]
        z[torch.randperm(rows, generator=generator)[: rows // 8]] = torch.nan
        yield z, torch.randint(-1, 60, (rows,), generator=generator)


def look_ups(size):
    """Arguments of `nearest` for the queries of all ranks."""
    ids = torch.arange(QUERIES) % 30
    yield {"k": 1}
    yield {"k": min(5, size)}
    yield {"k": min(3, size), "exclude_ids": ids}
    yield {"k": min(2, size), "labels": LABELS, "query_labels": LABELS[ids]}


def follow(case, number, world, enqueue=lambda made, z, ids: made.enqueue(z, ids)):
    """Feed a whole set and a sharded one: the pairs of answers to this rank's queries, and the sets."""
    size, dim, *_, options = case
    whole, sharded = nnclr.SupportSet(size, dim, **options), nnclr.SupportSet(size, dim, shard=True, **options)
    own = slice(number * QUERIES // world, (number + 1) * QUERIES // world)
    generator, pairs = torch.Generator().manual_seed(5), []
    for z, ids in [(None, None), *batches(*case)]:
        if z is not None:
            whole.enqueue(z, ids)
            enqueue(sharded, z, ids)
        queries = torch.randn(QUERIES, dim, generator=generator)
        if z is not None:  # some queries are entries
            queries[: QUERIES // 2] = z.nan_to_num(1.0)[torch.arange(QUERIES // 2) % len(z)]
        for arguments in look_ups(size):
            mine = {
                name: part[own] if name in ("exclude_ids", "query_labels") else part for name, part in arguments.items()
            }
            expected = whole.nearest(queries, **arguments)
            pairs.append((sharded.nearest(queries[own], **mine), [part[own] for part in expected]))
    return pairs, whole, sharded


def equal(pairs):
    return all(torch.equal(a, b) for found, expected in pairs for a, b in zip(found, expected, strict=True))


def every_case(number, world):
    for name, case in CASES.items():
        pairs, whole, sharded = follow(case, number, world)
        for step, (found, expected) in enumerate(pairs):
            for field, a, b in zip(found._fields, found, expected, strict=True):
                assert torch.equal(a, b), f"{name}: {field} of look-up {step}"
        assert len(sharded) == len(whole)
        for part in ("vectors", "ids", "born"):
            held, share = getattr(sharded, part), getattr(whole, part)[number::world]
            assert torch.equal(held[: len(share)], share), f"{name}: {part}"
            assert len(held) == -(-whole.size // world)
        assert all(torch.equal(getattr(sharded, n), getattr(whole, n)) for n in ("enqueued", "updates", "refused"))


def controls(number, world):
    """What goes wrong in other implementations must not pass."""
    case = CASES["duplicates"]
    share = QUERIES // world
    real = sharded_support_set.best_of_all_ranks

    def local(here, k):
        own = Found(*(part[number * share : (number + 1) * share] for part in here))
        return Found(*(torch.nn.functional.pad(part, (0, k - part.shape[1])) for part in own))

    def highest_slot_first(here, k):
        found = real(here, here.slots.shape[1] * world)
        order = found.similarities.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Found(*(part.flip(1).gather(1, order) for part in found))

    for wrong in (local, highest_slot_first):
        sharded_support_set.best_of_all_ranks = wrong
        assert not equal(follow(case, number, world)[0]), wrong
    sharded_support_set.best_of_all_ranks = real

    def local_batch(made, z, ids):
        rows = slice(number * len(z) // world, (number + 1) * len(z) // world)
        made.enqueue(z[rows], ids[rows])

    assert not equal(follow(case, number, world, local_batch)[0])


def objectives(number, world):
    """Losses, gradients and metrics of training with a sharded set are those with a whole one on each rank."""
    rows = slice(number * QUERIES // world, (number + 1) * QUERIES // world)
    for name, create in OBJECTIVES.items():
        both = []
        for shard in (False, True):
            torch.manual_seed(0)
            both.append(linear_heads(create(shard)))
        assert len(both[1].support_set.vectors) == -(-31 // world)
        for step in range(3):
            generator, outs = torch.Generator().manual_seed(step), []
            views, targets = torch.randn(2, 2, QUERIES, DIM, generator=generator)[:, :, rows]
            ids = torch.randint(0, 40, (QUERIES,), generator=generator)[rows]
            for made in both:
                made.zero_grad()
                outs.append(made(list(views), list(targets), ids))
                outs[-1].loss.backward()
                made.update(outs[-1])
            assert torch.equal(outs[0].loss, outs[1].loss), (name, step)
            for key, value in outs[0].metrics.items():
                assert torch.equal(value, outs[1].metrics[key]) or value.isnan(), (name, key)
            for a, b in zip(*(made.parameters() for made in both), strict=True):
                assert a.grad is None or torch.equal(a.grad, b.grad), name


def worker(number, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world)
    every_case(number, world)
    controls(number, world)
    objectives(number, world)
    dist.destroy_process_group()


def test_alone_a_sharded_set_is_the_whole_set():
    every_case(0, 1)
    objectives(0, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_share_a_set_equal_one_that_holds_it(world, tmp_path):
    mp.start_processes(worker, (world, str(tmp_path)), nprocs=world, start_method="forkserver")


@pytest.fixture
def as_rank(monkeypatch):
    """Support sets of any rank of any number of ranks; enqueueing first in, first out needs no other process."""

    def create(number, world, size=37, dim=DIM, **options):
        monkeypatch.setattr(support_set, "rank", lambda: number)
        monkeypatch.setattr(support_set, "world_size", lambda: world)
        return nnclr.SupportSet(size, dim, shard=True, **options)

    return create


@pytest.mark.parametrize("k", [1, 5])
def test_no_rank_sees_the_whole_set_or_a_matrix_of_queries_and_slots(as_rank, monkeypatch, k):
    n, m, world = 64, 32_768, 4
    for module in (support_set, sharded_support_set):
        monkeypatch.setattr(module, "gather", lambda rows: rows.repeat(world, *[1] * (rows.ndim - 1)))
    monkeypatch.setattr(sharded_support_set, "exchange", lambda parts: parts)
    monkeypatch.setattr(sharded_support_set, "world_size", lambda: world)
    made = as_rank(1, world, m, 64, block_size=256)
    made.enqueue(torch.randn(m, 64))
    with LargestTensor() as largest:
        made.nearest(torch.randn(n, 64), k)
    assert (
        largest.elements == m // world * 64
    )  # its share, seen through a view; all queries and it give 4 times as many
    whole = nnclr.SupportSet(m, 64, block_size=256)  # control
    whole.enqueue(torch.randn(m, 64))
    with LargestTensor() as control:
        whole.nearest(torch.randn(n, 64), k)
    assert control.elements == m * 64


def fed(made):
    for z, ids in batches(*CASES["no multiple of anything"]):
        made.enqueue(z, ids)
    return made


@pytest.mark.parametrize("saved", [1, 2, 4, 5])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shards_are_loaded_by_any_number_of_ranks(as_rank, saved, world):
    states = [fed(as_rank(number, saved)).state_dict() for number in range(saved)]
    assert sum(len(state["ids"]) for state in states) < 37 + saved
    for number in range(world):
        made, expected = as_rank(number, world), fed(as_rank(number, world)).state_dict()
        made.load_shards(iter(states[::-1]))
        assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
        own = as_rank(number, world)
        own.load_state_dict(expected)
        assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())
        if saved == world:
            own = as_rank(number, world)
            own.load_shards([states[number]])
            assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())


@pytest.mark.parametrize("world", [2, 3])
def test_state_of_the_whole_set_loads_into_every_share(as_rank, world):
    whole = fed(as_rank(0, 1)).state_dict()
    for number in range(world):
        own = as_rank(number, world)
        own.load_state_dict(whole)
        expected = fed(as_rank(number, world)).state_dict()
        assert own.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())


def test_shards_that_do_not_belong_together_are_named(as_rank):
    states = [fed(as_rank(number, 3)).state_dict() for number in range(3)]
    with pytest.raises(ValueError, match="in none of the shards"):
        as_rank(0, 2).load_shards(states[:2])
    with pytest.raises(ValueError, match="in none of the shards"):
        as_rank(1, 2, size=38).load_shards(states)
    with pytest.raises(ValueError, match="another support set"):
        as_rank(0, 2, size=36).load_shards(states)
    with pytest.raises(ValueError, match="same step"):
        as_rank(0, 2).load_shards([*states[:2], states[2] | {"updates": states[2]["updates"] + 1}])
    spoiled = states[1]["vectors"].clone()
    spoiled[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        as_rank(1, 3).load_shards([states[1] | {"vectors": spoiled}])
    with pytest.raises(RuntimeError, match=r"slots are those of another rank.*load_shards"):
        as_rank(0, 3).load_state_dict(states[1])
    with pytest.raises(RuntimeError, match=r"Missing key.*slots"):
        as_rank(0, 3).load_state_dict({name: value for name, value in states[0].items() if name != "slots"})
