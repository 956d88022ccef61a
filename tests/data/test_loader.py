import numpy as np
import pytest
import torch
from PIL import Image

from nnclr.data.augment import policy
from nnclr.data.decode import BadImage
from nnclr.data.images import Source, array_source
from nnclr.data.loader import Plan, ResidentLoader, StreamLoader, create_loader
from nnclr.data.source import open_source
from nnclr.errors import DataError

CPU = torch.device("cpu")


def make_plan(n, batch_size=8, seed=0):
    return Plan(n, batch_size, policy("byol", 16), seed)


def pictures(n=30, size=20):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def with_bad(source, bad):
    """The source, with some images that cannot be read."""

    def fetch(i):
        if i in bad:
            raise BadImage("truncated", "cut off")
        return source.read(i)

    return Source(source.name, len(source), fetch, source.title, source.fingerprint)


def same(one, two):
    return (
        one.step == two.step
        and torch.equal(one.ids, two.ids)
        and all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))
    )


def test_an_epoch_shows_each_image_once_and_epochs_differ():
    loader = create_loader(array_source(pictures(32), None), make_plan(32), CPU, 0)
    ids = [batch.ids.tolist() for batch in loader.batches(0, 8)]
    assert sorted(np.concatenate(ids[:4])) == sorted(np.concatenate(ids[4:])) == list(range(32))
    assert ids[:4] != ids[4:]


@pytest.mark.parametrize("start", [1, 3, 5])
@pytest.mark.parametrize("kind", ["resident", "stream 0", "stream 3"])
def test_starting_anywhere_gives_the_same_batches(kind, start):
    source, plan = array_source(pictures(), None), make_plan(30)
    if kind == "resident":
        loader = create_loader(source, plan, CPU, 0)
        assert isinstance(loader, ResidentLoader)
    else:
        loader = StreamLoader(source, plan, CPU, int(kind[-1]))
    whole = list(loader.batches(0, 7))
    part = list(loader.batches(start, 7))
    assert len(part) == 7 - start
    assert all(same(one, two) for one, two in zip(whole[start:], part, strict=True))
    assert not same(whole[0], part[0])


def test_workers_do_not_change_a_bit():
    source, plan = with_bad(array_source(pictures(), None), {4, 17}), make_plan(30)
    runs = [list(StreamLoader(source, plan, CPU, workers).batches(0, 6)) for workers in (0, 1, 4)]
    for other in runs[1:]:
        assert all(same(one, two) for one, two in zip(runs[0], other, strict=True))


def test_bad_images_are_replaced_counted_and_never_shown():
    source, plan = with_bad(array_source(pictures(), None), {4, 17}), make_plan(30)
    resident = create_loader(source, plan, CPU, 2)
    stream = StreamLoader(source, plan, CPU, 2)
    for one, two in zip(resident.batches(0, 9), stream.batches(0, 9), strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        assert not {4, 17} & set(one.ids.tolist())
        for a, b in zip(one.views, two.views, strict=True):
            assert (a - b).abs().mean() < 0.02  # the resident crop is not rounded to whole grey levels
    assert set(resident.bad) == set(stream.bad) == {4, 17}
    assert "truncated" in stream.bad[4]


def test_too_many_bad_images_stop_the_run():
    source, plan = with_bad(array_source(pictures(), None), set(range(11))), make_plan(30)
    with pytest.raises(DataError, match=r"11 of the 30 images.*more than the 10.*array#.*truncated"):
        create_loader(source, plan, CPU, 0)
    with pytest.raises(DataError, match="more than the 10"):
        list(StreamLoader(source, plan, CPU, 2).batches(0, 9))
    with pytest.raises(DataError, match="none of the 30 images"):
        create_loader(with_bad(source, set(range(30))), plan, CPU, 0)


def test_sizes_that_differ_are_streamed(tmp_path):
    for i in range(12):
        Image.fromarray(pictures(1, 18 + i % 2)[0]).save(tmp_path / f"{i}.png")
    source = open_source(tmp_path)
    loader = create_loader(source, make_plan(12, 4), CPU, 1)
    assert isinstance(loader, StreamLoader)
    batches = list(loader.batches(0, 3))
    assert [view.shape for view in batches[0].views] == [(4, 3, 16, 16)] * 2
    large = array_source(np.zeros((4, 200, 200, 3), np.uint8), None)
    assert isinstance(create_loader(large, make_plan(4, 2), CPU, 0), StreamLoader)


def test_no_two_images_of_an_epoch_share_their_crop():
    source, plan = array_source(np.repeat(pictures(1, 64), 64, axis=0), None), make_plan(64, 64)
    views = next(iter(create_loader(source, plan, CPU, 0).batches(0, 1))).views
    assert len({view.numpy().tobytes() for view in views[0]}) == 64
