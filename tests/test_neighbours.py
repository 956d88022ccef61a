"""Neighbours against double loops and brute force in float64."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nnclr import neighbours
from nnclr.errors import InputError, StorageError
from nnclr.evaluation.knn import nearest_rows
from nnclr.neighbours import NeighbourIndex, label_hints, near_duplicates

faiss = pytest.importorskip("faiss")


def cosine(one, other):
    """One similarity in float64, rounded to float32."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return np.float32(one @ other / lengths) if lengths > 0 else np.float32(0)


def brute_force(features, queries, k):
    """All similarities in float64 rounded to float32; of equal ones the lower row."""
    scores = np.array([[cosine(q, row) for row in features] for q in queries])
    order = np.lexsort((np.broadcast_to(np.arange(len(features)), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def clustered(n=500, d=24, seed=0, centres=12):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(centres, d))[rng.integers(0, centres, n)] + 0.4 * rng.normal(size=(n, d))).astype("f4")


def with_ties(n=300, d=8, seed=0):
    """Few different directions, each many times, also scaled by powers of two, and rows of zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-3, 4, (25, d))[rng.integers(0, 25, n)] * 2.0 ** rng.integers(-2, 3, (n, 1))
    rows[::50] = 0
    return rows.astype(np.float32)


@pytest.fixture(params=[(1024, 4096), (7, 16), (3, 1000)], ids=["one block", "small blocks", "few queries"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(neighbours, "_QUERIES", request.param[0])
    monkeypatch.setattr(neighbours, "_ROWS", request.param[1])
    monkeypatch.setattr(neighbours, "_NUMBERS", 100 * request.param[0])


@pytest.mark.parametrize("kind", ["clustered", "ties", "collapsed", "float16"])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_against_brute_force(blocks, kind, k):
    features = {
        "clustered": clustered(),
        "float16": clustered().astype(np.float16),
        "ties": with_ties(),
        "collapsed": np.repeat(clustered(1), 90, axis=0),
    }[kind]
    queries = np.concatenate([features[:12].astype(np.float32), clustered(8, features.shape[1], seed=5)])
    similarities, rows = NeighbourIndex(features).kneighbors(queries, k)
    expected, order = brute_force(features, queries, k)
    assert (similarities.dtype, rows.dtype) == (np.float32, np.int64)
    assert np.array_equal(rows, order)
    assert np.array_equal(similarities, expected)
    one, _ = NeighbourIndex(features).kneighbors(queries[0], k)
    assert np.array_equal(one[0], similarities[0])


def test_ties_are_what_a_plain_top_k_gets_wrong():
    """The control: float32 and topk give another order, and of rows that are equal other ones."""
    features = with_ties()
    _, rows = nearest_rows(torch.from_numpy(features), torch.from_numpy(features[:12]), 10)
    assert not np.array_equal(rows.numpy(), brute_force(features, features[:12], 10)[1])


def test_what_float32_cannot_tell_apart(blocks):
    """Rows that differ from the query in the 8th digit, in an order that only double precision sees."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=64).astype(np.float32)
    query /= np.linalg.norm(query)
    features = (query + rng.normal(size=(200, 64)) * 2e-4 * rng.random((200, 1))).astype(np.float32)
    similarities, rows = NeighbourIndex(features).kneighbors(query, 25)
    expected, order = brute_force(features, query[None], 25)
    assert np.array_equal(rows, order)
    assert np.array_equal(similarities, expected)
    scores = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ query  # the control
    assert not np.array_equal(np.argsort(-scores, kind="stable")[:25], order[0])


def test_neighbours_of_rows_leave_out_the_row(blocks):
    for features in (clustered(), with_ties()):
        rows = np.array([0, 3, 299, 50])
        similarities, found = NeighbourIndex(features).neighbours_of(rows, 9)
        for row, s, i in zip(rows, similarities, found, strict=True):
            others = np.delete(np.arange(len(features)), row)
            expected, order = brute_force(features[others], features[row][None], 9)
            assert np.array_equal(i, others[order[0]])
            assert np.array_equal(s, expected[0])


def test_more_neighbours_than_rows():
    index = NeighbourIndex(clustered(5))
    assert index.kneighbors(clustered(2), 10)[1].shape == (2, 5)
    assert index.neighbours_of([1], 10)[1].shape == (1, 4)
    assert NeighbourIndex(clustered(1)).neighbours_of([0], 10)[1].shape == (1, 0)


def test_vectors_without_a_direction_and_very_long_ones():
    features = clustered(20)
    features[4] = 0
    features[5] *= 1e28
    features[6] *= 1e-28
    similarities, rows = NeighbourIndex(features).kneighbors(features[[4, 5, 6]], 20)
    plain = clustered(20)
    plain[4] = 0
    expected, order = brute_force(plain, plain[[4, 5, 6]], 20)
    assert np.array_equal(rows, order)
    np.testing.assert_allclose(similarities, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(5), r"of shape \(n, d\)"),
        (np.zeros((0, 5)), r"of shape \(n, d\)"),
        (np.array([["a"]]), r"of shape \(n, d\)"),
        (np.array([[1.0], [np.nan]]), r"1 of the 2 rows of the vectors is not finite \(row 1\).*keep the others"),
        (np.array([[np.inf], [1.0], [np.nan]]), r"2 of the 3 rows of the vectors are not finite \(rows 0, 2\)"),
        (np.array([[1.0], [1e31]]), "row 1 of the vectors is longer than 1e30"),
    ],
)
def test_wrong_vectors(features, message):
    with pytest.raises(InputError, match=message):
        NeighbourIndex(features)


def test_wrong_queries():
    index = NeighbourIndex(clustered())
    for query, k, message in (
        (np.zeros(7), 3, "the queries have 7 numbers and the rows 24: use one encoder for both"),
        (np.full(24, np.nan), 3, r"1 of the 1 rows of the vectors is not finite"),
        (np.zeros(24), 0, "at least one neighbour"),
    ):
        with pytest.raises(InputError, match=message):
            index.kneighbors(query, k)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_is_that_of_blocks(tmp_path, dtype):
    """60,000 memory-mapped rows of 256 numbers; the control is a float32 copy of them."""
    rng = np.random.default_rng(0)
    features = rng.random((60_000, 256), np.float32).astype(dtype)
    np.save(tmp_path / "v.npy", features)
    queries = features[:8].copy()
    del features
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        NeighbourIndex(mapped).kneighbors(queries, 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        mapped.astype(np.float32)
        assert tracemalloc.get_traced_memory()[1] > 58 * 2**20
    finally:
        tracemalloc.stop()
    assert peak < 25 * 2**20


@pytest.mark.parametrize("kind", ["clustered", "ties"])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_near_duplicates_against_a_double_loop(blocks, kind, threshold):
    features = clustered(150) if kind == "clustered" else with_ties(150)
    features[77] = features[12]
    found = near_duplicates(features, threshold)
    n = len(features)
    pairs = [(i, j, cosine(features[i], features[j])) for i in range(n) for j in range(i + 1, n)]
    pairs = [pair for pair in pairs if pair[2] >= np.float32(threshold)]
    assert (12, 77, 1.0) in pairs
    assert found.pairs.tolist() == [[i, j] for i, j, _ in pairs]
    assert found.similarities.tolist() == [s for _, _, s in pairs]
    graph = coo_array((np.ones(len(pairs)), ([p[0] for p in pairs], [p[1] for p in pairs])), (n, n))
    count, component = connected_components(graph, directed=False)
    groups = [np.flatnonzero(component == c).tolist() for c in range(count)]
    expected = sorted((g for g in groups if len(g) > 1), key=lambda group: (-len(group), group[0]))
    assert [group.tolist() for group in found.groups] == expected


def test_near_duplicates_at_the_threshold_itself(blocks):
    """A pair counts at its own similarity, and no more one float32 above it."""
    features = clustered(60)
    found = near_duplicates(features, 0.6)
    for number in range(0, len(found.pairs), 40):
        value = found.similarities[number]
        expected = found.similarities >= value
        assert near_duplicates(features, float(value)).pairs.tolist() == found.pairs[expected].tolist()
        above = np.nextafter(value, np.float32(2))
        expected[found.similarities == value] = False
        assert near_duplicates(features, float(above)).pairs.tolist() == found.pairs[expected].tolist()


def test_near_duplicates_none_and_too_many(monkeypatch):
    found = near_duplicates(np.eye(5, dtype=np.float32), 0.5)
    assert (found.pairs.shape, found.similarities.shape, found.groups) == ((0, 2), (0,), [])
    monkeypatch.setattr(neighbours, "_MOST_PAIRS", 1000)
    near_duplicates(np.ones((45, 3)), 0.9)  # 990 pairs
    with pytest.raises(InputError, match=r"more than 1,000 pairs are at least 0\.9 similar; ask for a higher"):
        near_duplicates(np.ones((46, 3)), 0.9)  # 1035
    for wrong in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            near_duplicates(np.eye(3), wrong)


def hints_by_a_double_loop(features, labels, k):
    hints = []
    for i in range(len(features)):
        if labels[i] < 0:
            continue
        others = [j for j in range(len(features)) if j != i]
        others.sort(key=lambda j: (-cosine(features[i], features[j]), j))
        votes = [labels[j] for j in others[:k] if labels[j] >= 0]
        counts = {label: votes.count(label) for label in sorted(set(votes))}
        best = max(counts, key=lambda label: (counts[label], -label), default=-1)
        if counts.get(best, 0) > counts.get(labels[i], 0):
            hints.append((i, best, counts[best] / len(votes), counts.get(labels[i], 0) / len(votes)))
    return sorted(hints, key=lambda hint: (-hint[2], hint[3], hint[0]))


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("missing", [False, True])
def test_label_hints_against_a_double_loop(blocks, k, missing):
    rng = np.random.default_rng(0)
    features = clustered(120)
    labels = NeighbourIndex(clustered(12, seed=0)).kneighbors(features, 1)[1][:, 0] % 5
    wrong = rng.choice(120, 15, replace=False)
    labels[wrong] = rng.integers(0, 5, 15)
    if missing:
        labels[rng.choice(120, 60, replace=False)] = -1
    found = label_hints(features, labels, k)
    expected = hints_by_a_double_loop(features, labels.tolist(), k)
    assert len(expected) > 3
    assert list(zip(found.rows, found.suggested, found.share, found.own_share, strict=True)) == expected
    assert (found.rows.dtype, found.suggested.dtype) == (np.int64, np.int64)


def test_label_hints_find_what_was_mislabelled():
    centres = np.eye(4)[np.arange(200) % 4] * 5
    features = centres + 0.3 * np.random.default_rng(0).normal(size=(200, 4))
    labels = np.arange(200) % 4
    assert len(label_hints(features, labels).rows) == 0
    labels[[10, 77]] = [0, 3]
    found = label_hints(features, labels)
    assert (found.rows.tolist(), found.suggested.tolist(), found.share.tolist()) == ([10, 77], [2, 1], [1.0, 1.0])
    with pytest.raises(InputError, match="200 rows need as many whole numbers"):
        label_hints(features, labels[:9])


def test_progress_of_long_comparisons(monkeypatch):
    monkeypatch.setattr(neighbours, "_EVERY", -1.0)
    monkeypatch.setattr(neighbours, "_QUERIES", 100)
    said = []
    near_duplicates(clustered(), 0.99, said.append)
    label_hints(clustered(), np.arange(500) % 3, 3, said.append)
    assert [line.split(",")[0] for line in said] == [
        *(f"comparing: {100 * (1 - (1 - share) ** 2):.0f} %" for share in (0.2, 0.4, 0.6, 0.8)),
        *(f"comparing: {percent} %" for percent in (20, 40, 60, 80)),
    ]


def test_approximate_search_finds_and_scores_like_the_exact_one(tmp_path):
    features = clustered(3000, 16, centres=40)
    exact, index = NeighbourIndex(features), NeighbourIndex(features, approximate=True)
    assert index.recall >= 0.95
    true, found = exact.kneighbors(features, 10), index.kneighbors(features, 10)
    per_row = [len(set(a) & set(b)) / 10 for a, b in zip(true[1].tolist(), found[1].tolist(), strict=True)]
    assert np.mean(per_row) > 0.95
    same = true[1] == found[1]
    assert np.array_equal(found[0][same], true[0][same])
    again = NeighbourIndex(features, approximate=True).kneighbors(features, 10)
    assert np.array_equal(again[1], found[1])


def test_approximate_search_breaks_ties_by_the_row():
    """Where it looks everywhere it is the exact search; faiss alone would give other rows of three equal ones."""
    features = np.tile(clustered(200, 16), (3, 1))
    index = NeighbourIndex(features, approximate=True)
    index._lists.nprobe = index._lists.nlist
    expected = NeighbourIndex(features).kneighbors(features[:50], 10)
    found = index.kneighbors(features[:50], 10)
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])
    unit = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    assert not np.array_equal(index._lists.search(unit[:50], 10)[1], expected[1])  # the control


def test_recall_is_measured_against_the_exact_search():
    features = np.random.default_rng(0).normal(size=(3000, 32)).astype(np.float32)  # nothing to cluster
    index = NeighbourIndex(features, approximate=True)
    assert NeighbourIndex(features).recall_at(10) == 1
    index._lists.nprobe = 2  # the control: two lists are not enough
    rows = np.sort(np.random.default_rng(0).permutation(3000)[:100])
    true = NeighbourIndex(features).neighbours_of(rows, 10)[1]
    found = index.neighbours_of(rows, 10)[1]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(true.tolist(), found.tolist(), strict=True)]
    assert index.recall_at(10, 100) == pytest.approx(np.mean(shares), abs=1e-9)
    assert index.recall_at(10, 100) < 0.5
    index._lists.nprobe = index._lists.nlist
    assert index.recall_at(10, 100) == 1


def test_an_approximate_search_that_finds_too_few():
    features = clustered(200, 8, centres=4)
    index = NeighbourIndex(features, approximate=True)
    index._lists.nprobe = 1
    similarities, rows = index.kneighbors(features[:5], 200)
    assert (rows == -1).any()
    assert np.array_equal(rows == -1, similarities == -np.inf)
    assert len(label_hints(index, np.arange(200) % 2, 190).rows) >= 0


def test_the_index_is_kept_and_only_ours_is_read(tmp_path, monkeypatch):
    features = clustered(800, 16)
    path = tmp_path / "v.faiss"
    first = NeighbourIndex(features, approximate=True, path=path)
    second = NeighbourIndex(features, approximate=True, path=path)
    assert (first.built, second.built) == (True, False)
    assert (second.recall, second._lists.nprobe) == (first.recall, first._lists.nprobe)
    assert np.array_equal(second.kneighbors(features, 5)[1], first.kneighbors(features, 5)[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.faiss", "v.faiss.json"]
    good, described = path.read_bytes(), (tmp_path / "v.faiss.json").read_text()

    def never(*_):
        raise AssertionError("faiss was given a file that is not the one we wrote")

    monkeypatch.setattr(faiss, "read_index", never)
    with pytest.raises(AssertionError):  # the control
        NeighbourIndex(features, approximate=True, path=path)
    for content, facts in (
        (good[:-1] + bytes([good[-1] ^ 1]), described),
        (good[:500], described),
        (good, described.replace('"sha256": "', '"sha256": "0')),
        (good, "{"),
        (good, "[" * 100_000),
        (good, "[]"),
        (good, json.dumps({"sha256": json.loads(described)["sha256"]})),
    ):
        path.write_bytes(content)
        (tmp_path / "v.faiss.json").write_text(facts)
        assert NeighbourIndex(features, approximate=True, path=path).built
        assert path.read_bytes() == good
        assert (tmp_path / "v.faiss.json").read_text() == described
    changed = features.copy()
    changed[5, 5] += 1
    assert NeighbourIndex(changed, approximate=True, path=path).built
    assert NeighbourIndex(features.astype(np.float16), approximate=True, path=path).built


def test_an_index_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="the index could not be written to"):
        NeighbourIndex(clustered(), approximate=True, path=tmp_path / "file" / "v.faiss")


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InputError, match=r"needs faiss; pip install 'nnclr\[index\]', or search exactly"):
        NeighbourIndex(clustered(), approximate=True)
