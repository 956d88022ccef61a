import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nnclr
from nnclr import support_set
from nnclr.kernels.lookup import nearest_slots
from tests import reference

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # where a product's bits are known to depend on its place


def filled(size=20, dim=6, n=20, **options):
    made = nnclr.SupportSet(size, dim, **options)
    made.enqueue(torch.randn(n, dim), torch.arange(n))
    return made


@pytest.mark.parametrize("seed", range(12))
def test_fifo_at_any_ratio_of_size_to_batch(seed):
    """Against a list of slots, with batches from 1 row to more than the set."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    ours, queue = nnclr.SupportSet(size, 3), reference.Queue(size)
    for _ in range(25):
        rows = rng.normal(size=(int(rng.integers(1, 60)), 3))
        ids = rng.integers(0, 1000, len(rows))
        ours.enqueue(torch.from_numpy(rows), torch.from_numpy(ids))
        queue.push(rows, ids)
        n = len(queue.slots)
        assert len(ours) == n
        assert ours.ids[:n].tolist() == [entry[1] for entry in queue.slots]
        assert ours.born[:n].tolist() == [entry[2] for entry in queue.slots]
        np.testing.assert_allclose(ours.vectors[:n].numpy(), [entry[0] for entry in queue.slots], atol=1e-6)
        assert ours.fill.item() == pytest.approx(n / size)


@pytest.mark.parametrize("k", [1, 3, 17])
@pytest.mark.parametrize("block_size", [1, 4, 7, 1000])
def test_nearest_is_the_sorted_list_of_all_similarities(k, block_size):
    made = filled(29, 5, 29, block_size=block_size)
    z = torch.randn(11, 5)
    found = made.nearest(z, k)
    similarities = reference.unit(z.double().numpy()) @ made.vectors.double().numpy().T
    expected = np.argsort(-similarities, axis=1)[:, :k]
    assert found.ids.tolist() == made.ids.numpy()[expected].tolist()
    np.testing.assert_allclose(found.similarities.numpy(), np.take_along_axis(similarities, expected, 1), atol=1e-6)
    assert torch.equal(found.embeddings, made.vectors[torch.from_numpy(expected)])
    assert [part.shape for part in found] == [(11, k, 5), (11, k), (11, k), (11, k)]
    assert [part.dtype for part in found] == [torch.float32, torch.int64, torch.float32, torch.int64]


def test_unfilled_slots_are_never_returned():
    made = filled(10, 6, 3)
    found = made.nearest(torch.randn(4, 6), k=5)
    assert found.similarities.isfinite().sum(dim=1).tolist() == [3] * 4
    assert set(found.ids[:, :3].flatten().tolist()) == {0, 1, 2}
    assert (found.ids[:, 3:] == -1).all()
    assert (found.ages[:, 3:] == 0).all()
    assert (found.embeddings[:, 3:] == 0).all()
    empty = nnclr.SupportSet(10, 6).nearest(torch.randn(4, 6))
    assert (empty.similarities == -torch.inf).all()
    assert (empty.ids == -1).all()


def test_control_a_zero_vector_would_be_returned_without_the_mask():
    """All entries point away from the query, so that an unmasked empty slot (similarity 0) would win."""
    made = nnclr.SupportSet(10, 2)
    made.enqueue(torch.tensor([[-1.0, 0.0]] * 3), torch.arange(3))
    assert made.nearest(torch.tensor([[1.0, 0.0]])).similarities.item() == -1
    made.enqueued.fill_(10)  # pretend that all are filled
    assert made.nearest(torch.tensor([[1.0, 0.0]])).similarities.item() == 0


def test_excluded_ids_are_no_candidates():
    made = filled()
    z = made.vectors.clone()
    assert made.nearest(z).ids[:, 0].tolist() == list(range(20))
    found = made.nearest(z, k=19, exclude_ids=torch.arange(20))
    assert not (found.ids == torch.arange(20)[:, None]).any()
    assert found.similarities.isfinite().all()
    made.ids[:5] = -1  # unknown images are no image in particular
    assert made.nearest(z[:5], exclude_ids=torch.full((5,), -1)).similarities.min() > 0.999
    made.ids[:5] = torch.arange(5)
    none_left = made.nearest(z, k=20, exclude_ids=torch.arange(20))
    assert (none_left.ids[:, -1] == -1).all()


def test_age_is_counted_in_updates_and_starts_at_one():
    made = nnclr.SupportSet(6, 2)
    for number in range(3):
        made.enqueue(torch.nn.functional.one_hot(torch.tensor([number % 2]), 2).float(), torch.tensor([number]))
    found = made.nearest(torch.eye(2), k=1)
    assert found.ids[:, 0].tolist() == [0, 1]  # equal entries 0 and 2: the lowest slot
    assert found.ages[:, 0].tolist() == [3, 2]


def test_rows_are_normalised_once_on_entry():
    made = nnclr.SupportSet(4, 2)
    made.enqueue(torch.tensor([[3.0, 4.0], [0.1, 0.0]]))
    assert torch.allclose(made.vectors[:2], torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    assert made.ids[:2].tolist() == [-1, -1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_are_refused_and_counted(value):
    made = nnclr.SupportSet(5, 3)
    rows = torch.randn(4, 3)
    rows[1, 2] = value
    made.enqueue(rows, torch.arange(4))
    assert made.ids[:4].tolist() == [0, 2, 3, -1]
    assert (len(made), made.refused.item()) == (3, 1)
    assert made.vectors.isfinite().all()
    made.enqueue(torch.full((7, 3), value), torch.arange(7))
    assert (len(made), made.refused.item()) == (3, 8)


def test_rows_without_a_direction_are_refused_and_counted():
    """Zero, and lengths outside float32: they normalise to (almost) zero, which beats any negative similarity."""
    made = nnclr.SupportSet(6, 2)
    made.enqueue(torch.tensor([[0.0, 0.0], [1e30, 1e30], [1e-20, 0.0], [-3.0, -4.0], [1e-5, 0.0]]), torch.arange(5))
    assert made.ids[:3].tolist() == [3, 4, -1]
    assert made.refused.item() == 3
    assert made.nearest(torch.tensor([[0.0, 1.0]])).ids.item() == 4
    made.vectors[2], made.enqueued = torch.zeros(2), torch.tensor(3)  # control
    assert made.nearest(torch.tensor([[-1.0, 2.0]])).similarities.item() == 0


def test_of_a_batch_larger_than_the_set_the_newest_accepted_rows_stay():
    rows = torch.randn(11, 3)
    rows[[2, 8, 10]] = torch.nan
    made = nnclr.SupportSet(4, 3)
    made.enqueue(rows, torch.arange(11))
    assert sorted(made.ids.tolist()) == [5, 6, 7, 9]
    assert (made.enqueued.item(), made.refused.item()) == (8, 3)
    made.enqueue(torch.randn(1, 3), torch.tensor([50]))
    assert sorted(made.ids.tolist()) == [6, 7, 9, 50]  # the oldest of them went


def test_control_one_nan_row_would_be_every_querys_neighbour():
    made = filled()
    made.vectors[7] = torch.nan
    similarities = torch.randn(9, 6) @ made.vectors.T
    assert (similarities.argmax(dim=1) == 7).all()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("block_size", [3, 1000])
def test_the_lowest_slot_wins_among_equals(k, block_size):
    made = nnclr.SupportSet(12, 2, block_size=block_size)
    made.enqueue(torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 6), torch.arange(12))
    assert made.nearest(torch.tensor([[2.0, 0.0]]), k).ids[0].tolist() == [1, 3, 5, 7][:k]


def alone_and_together(m, d, n=40):
    """Answers to queries that are asked together, and to each by itself, in sets of duplicates with odd edges."""
    pool = torch.randn(max(m // 3, 1), d)
    z, k = torch.cat([pool[torch.arange(n // 2) % len(pool)], torch.randn(n // 2, d)]), min(4, m)
    together, alone = [], []
    for block_size in (m, 4096):
        made = nnclr.SupportSet(m, d, block_size=block_size)
        made.enqueue(pool[torch.arange(m) % len(pool)], torch.arange(m))
        together.append(made.nearest(z, k))
        alone.append([torch.cat(parts) for parts in zip(*(made.nearest(query[None], k) for query in z), strict=True)])
    return together, alone


@pytest.mark.parametrize(("m", "d"), [(5, 30), (17, 6), (4099, 64)])
def test_an_answer_depends_on_nothing_but_the_query_and_the_entries(m, d, monkeypatch):
    """To the bit: not on the other queries, nor on the blocks."""
    together, alone = alone_and_together(m, d)
    for answer in (*together[1:], *alone):
        assert all(torch.equal(a, b) for a, b in zip(answer, together[0], strict=True))
    if m < 100 and AVX512:  # control: without equal edges
        monkeypatch.setattr(support_set, "_NARROW", 1)
        together, alone = alone_and_together(m, d)
        assert not all(torch.equal(answer[2], together[0].similarities) for answer in (*together, *alone))


@pytest.mark.parametrize("k", [1, 5])
def test_comparing_a_few_and_comparing_all_agree_to_the_bit(k, monkeypatch):
    made = nnclr.SupportSet(6000, 64)
    made.enqueue(torch.randn(2000, 64).repeat(3, 1), torch.arange(6000))  # each three times
    z = torch.cat([made.vectors[:50], torch.randn(50, 64)])
    few = made.nearest(z, k)
    monkeypatch.setattr(support_set, "_LARGE", 6001)
    assert all(torch.equal(a, b) for a, b in zip(few, made.nearest(z, k), strict=True))
    if AVX512:  # control
        z = torch.nn.functional.normalize(z, dim=1)
        raw, _ = nearest_slots(z, made.vectors, made.enqueued, k, 4096, lambda some: made._compare_all(some, k))
        assert not torch.equal(raw, few.similarities)


def test_look_up_is_exact_under_autocast_and_low_matmul_precision():
    """A tight cluster, where scores in bfloat16 tie: they pick other neighbours, ours do not."""
    centre = torch.randn(1, 64)
    made = nnclr.SupportSet(512, 64)
    made.enqueue(centre + 0.15 * torch.randn(512, 64), torch.arange(512))
    z = centre + 0.15 * torch.randn(64, 64)
    exact = (reference.unit(z.double().numpy()) @ made.vectors.double().numpy().T).argmax(axis=1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert made.nearest(z).ids[:, 0].tolist() == exact.tolist()
            half = (torch.nn.functional.normalize(z, dim=1) @ made.vectors.T).argmax(dim=1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (half.numpy() == exact).mean() < 0.7  # the control


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest new tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("d", [4, 64])
def test_memory_is_bounded_by_blocks(k, d):
    """With 4 dimensions nearly all groups are candidates and everything is compared, with 64 few are."""
    n, m = 64, 16_384
    made = nnclr.SupportSet(m, d, block_size=256)
    made.enqueue(torch.randn(m, d))
    with LargestTensor() as largest:
        made.nearest(torch.randn(n, d), k)
    assert largest.elements <= max(m * d, n * m // 4)  # the set itself, seen through a view; the matrix has n x m
    with LargestTensor() as control:
        torch.randn(n, d) @ made.vectors.T
    assert control.elements == n * m


def test_many_queries_of_a_huge_set_are_answered_a_part_at_a_time(monkeypatch):
    """The maxima of groups grow with queries times slots, and are made for a bounded number of both."""
    made, z, asked = filled(5000, 16, 5000), torch.randn(50, 16), []
    expected = made.nearest(z, 3)

    def counted(some, *rest):
        asked.append(len(some))
        return nearest_slots(some, *rest)

    monkeypatch.setattr(support_set, "nearest_slots", counted)
    monkeypatch.setattr(support_set, "bfloat16_is_native", lambda device: True)
    for pairs, parts in ((2**32, [50]), (20 * 5000, [20, 20, 10]), (1, [1] * 50)):
        monkeypatch.setattr(support_set, "_PAIRS", pairs)
        asked.clear()
        assert all(torch.equal(a, b) for a, b in zip(made.nearest(z, 3), expected, strict=True))
        assert asked == parts


def test_reading_and_writing_are_separate():
    made = filled()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    found = made.nearest(torch.randn(5, 6), k=2)
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items())
    copies = [part.clone() for part in found]
    made.enqueue(torch.randn(20, 6), torch.arange(20))
    assert all(torch.equal(a, b) for a, b in zip(copies, found, strict=True))


def test_state_dict_holds_everything_and_is_strict():
    made, other = filled(n=33), nnclr.SupportSet(20, 6)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    rows, z = torch.randn(7, 6), torch.randn(4, 6)
    for one in (made, other):
        one.enqueue(rows, torch.arange(100, 107))
    assert all(torch.equal(a, b) for a, b in zip(made.nearest(z, 3), other.nearest(z, 3), strict=True))
    assert set(made.state_dict()) == {"vectors", "ids", "born", "enqueued", "updates", "refused"}
    for name in made.state_dict():
        partial = {key: value for key, value in made.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            other.load_state_dict(partial)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surprise"):
        other.load_state_dict({**made.state_dict(), "surprise": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="vectors has shape"):
        nnclr.SupportSet(21, 6).load_state_dict(made.state_dict())
    poisoned = {name: value.clone() for name, value in made.state_dict().items()}
    poisoned["vectors"][3, 1] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        other.load_state_dict(poisoned)


def test_it_stays_float32_and_is_no_registered_buffer():
    holder = torch.nn.Sequential(filled())
    assert list(holder.buffers()) == []
    assert holder.bfloat16()[0].vectors.dtype == torch.float32
    assert holder.to("meta")[0].vectors.device.type == "meta"


def test_a_deep_copy_is_independent():
    made = filled()
    twin = copy.deepcopy(made)
    twin.enqueue(torch.randn(5, 6), torch.arange(5))
    assert len(made) == 20
    assert made.updates.item() == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.nearest(torch.zeros(3, 5)), r"shape \(3, 5\)"),
        (lambda s: s.nearest(torch.zeros(3, 6), k=21), "k=21"),
        (lambda s: s.nearest(torch.zeros(3, 6), k=0), "k=0"),
        (lambda s: s.enqueue(torch.zeros(6)), r"shape \(6,\)"),
        (lambda s: s.enqueue(torch.zeros(3, 6), torch.zeros(2)), "ids have shape"),
        (lambda s: nnclr.SupportSet(0, 4), "size=0"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(filled())
