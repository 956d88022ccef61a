import numpy as np
import pytest

from nnclr.errors import InputError, StorageError
from nnclr.explorer import projection
from nnclr.explorer.projection import principal, project


def blobs(n=240, groups=4, d=64, noise=0.15, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % groups
    vectors = rng.normal(size=(groups, d))[labels] / np.sqrt(d) + noise * rng.normal(size=(n, d)) / np.sqrt(d)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels


def neighbours(points, k):
    distances = ((points[:, None].astype(np.float64) - points[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1)[:, :k]


def kept(vectors, points, k=15):
    """Share of the k nearest neighbours that are still among the k nearest on the map."""
    before, after = neighbours(vectors, k), neighbours(points, k)
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(before, after, strict=True)])


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    """A UMAP map, the file that it is kept in, and what was said meanwhile."""
    pytest.importorskip("umap")
    said = []
    keep = tmp_path_factory.mktemp("map") / "file.map.npz"
    return project(blobs()[0], keep, say=said.append), keep, said


def test_umap_separates_blobs_and_a_random_map_does_not(mapped):
    vectors, labels = blobs()
    points = mapped[0].points
    assert points.shape == (240, 2)
    assert points.dtype == np.float32
    assert np.abs(points).max() == pytest.approx(1)
    random = np.random.default_rng(1).uniform(-1, 1, points.shape)

    def purity(places):
        return (labels[neighbours(places, 10)] == labels[:, None]).mean()

    assert purity(points) > 0.99
    assert purity(random) < 0.35
    assert kept(vectors, points) > 3 * kept(vectors, random)


def test_clusters_are_the_blobs_and_numbered_by_size():
    vectors, labels = blobs(n=60, groups=12, noise=0.05)
    clusters = projection._clusters(vectors)
    pairs = set(zip(labels.tolist(), clusters.tolist(), strict=True))
    assert len(pairs) == 12  # one cluster a blob
    uneven = np.concatenate(
        [vectors[labels == 0][:2], vectors[labels == 1][:3], np.repeat(vectors[labels == 2][:1], 9, 0)]
    )
    counts = np.bincount(projection._clusters(uneven))
    assert (np.diff(counts) <= 0).all()


def test_a_kept_map_is_used_and_another_is_not(mapped, tmp_path, monkeypatch):
    first, keep, said = mapped
    vectors = blobs()[0]
    assert [line.split(" ")[0] for line in said] == ["computing", "the"]
    computed = []

    def stand_in(values):
        computed.append(len(values))
        return values[:, :2]

    monkeypatch.setattr(projection, "_umap", stand_in)
    said.clear()
    again = project(vectors, keep, say=said.append)
    assert (computed, said) == ([], [])
    assert again.points.tobytes() == first.points.tobytes()
    assert again.clusters.tobytes() == first.clusters.tobytes()

    good, file = keep.read_bytes(), tmp_path / "other.npz"
    changed = vectors.copy()
    changed[7, 3] += 1e-6
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 64
    for content, values in [
        (good, changed),
        (good, vectors[:-1]),
        (good[:-30], vectors),
        (bytes(flipped), vectors),
        (b"", vectors),
        (b"PK\x03\x04 nonsense", vectors),
        (good[:100], vectors),
    ]:
        file.write_bytes(content)
        computed.clear()
        project(values, file, say=said.append)
        assert computed == [len(values)]
        computed.clear()
        project(values, file, say=said.append)  # it was replaced by a good one
        assert computed == []


def test_a_kept_map_cannot_hold_objects_or_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "_umap", lambda values: values[:, :2])
    vectors, file = blobs()[0], tmp_path / "file.npz"
    project(vectors, file, say=lambda line: None)
    with np.load(file) as content:
        key, points = content["key"], content["points"]
    wrong = [
        {"points": np.array([print, 1], object)},
        {"points": np.full((240, 2), np.nan, np.float32)},
        {"points": points.astype(np.float64)},
        {"points": points, "clusters": np.full(240, -5)},
        {"points": points, "clusters": np.zeros(239, np.int64)},
        {"points": points, "more": np.zeros(10**6)},
        {},
    ]
    for parts in wrong:
        np.savez_compressed(file, key=key, **parts)
        assert projection._read(file, str(key), 240) is None
    np.savez_compressed(file, key=key, points=points)
    assert projection._read(file, str(key), 240) is not None


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def refuse(path, content):
        raise StorageError(f"{path} could not be written: Read-only file system")

    monkeypatch.setattr(projection, "_umap", lambda values: values[:, :2])
    monkeypatch.setattr(projection, "write_atomically", refuse)
    said = []
    made = project(blobs()[0], tmp_path / "x.npz", say=said.append)
    assert made.points.shape == (240, 2)
    assert "is not kept" in said[-1]
    assert "Read-only" in said[-1]


def test_the_same_embeddings_give_the_same_map(mapped, tmp_path):
    again = project(blobs()[0], tmp_path / "fresh.npz", say=lambda line: None)
    assert again.points.tobytes() == mapped[0].points.tobytes()
    assert again.clusters.tobytes() == mapped[0].clusters.tobytes()


def test_principal_components_are_those_of_a_full_decomposition():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 30)) * np.geomspace(1, 0.01, 30) + 5
    centred = values - values.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2].T
    expected = centred @ axes
    found = principal(values.astype(np.float32), 2)
    signs = np.sign((expected * found).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=1e-3)
    assert found.tobytes() == principal(values.astype(np.float32), 2).tobytes()


@pytest.mark.parametrize("n", [1, 2, 3, 14])
def test_a_handful_of_pictures_has_a_map(n, tmp_path):
    made = project(blobs(14)[0][:n], tmp_path / "x.npz", say=lambda line: None)
    assert made.points.shape == (n, 2)
    assert np.isfinite(made.points).all()
    assert made.how == "first two principal components"
    assert not (tmp_path / "x.npz").exists()


def test_equal_pictures_and_zeros_have_a_map(tmp_path):
    for vectors in (np.ones((20, 8), np.float32), np.zeros((20, 8), np.float32)):
        made = project(vectors, tmp_path / "x.npz", "pca", say=lambda line: None)
        assert np.isfinite(made.points).all()


def test_without_umap_learn_the_map_is_a_pca_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "_version", lambda package: None)
    said = []
    made = project(blobs()[0], tmp_path / "x.npz", say=said.append)
    assert made.how == "first two principal components"
    assert made.clusters is None
    assert "nnclr[explore]" in said[0]


def test_another_method_is_refused(tmp_path):
    with pytest.raises(InputError, match="'tsne' is none of: umap, pca"):
        project(blobs()[0], tmp_path / "x.npz", "tsne")
