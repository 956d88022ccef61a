import threading

import numpy as np
import pytest
import torch
from PIL import Image

from nnclr.data import loader as loader_module
from nnclr.data.augment import crop_image, draw_parameters, finish, policy
from nnclr.data.decode import BadImage, decode
from nnclr.data.images import Source, array_source
from nnclr.data.loader import Plan, ResidentLoader, StreamLoader, create_loader
from nnclr.data.source import open_source
from nnclr.errors import DataError
from tests.data.test_decode import encoded

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


def test_every_view_is_cut_and_coloured_by_its_own_parameters():
    """Large and small views of a stream, image by image, against the functions that make one view."""
    views = policy("multi-crop", 32, small_views=2, small_view_size=16)
    plan = Plan(9, 4, views, seed=3)
    images = pictures(9, 48)
    for batch in StreamLoader(array_source(images, None), plan, CPU, 2).batches(0, 3):
        ids = batch.ids.numpy()
        assert len(batch.views) == 4
        for index, (view, made) in enumerate(zip(views, batch.views, strict=True)):
            drawn = draw_parameters(view, 3, plan.epoch(batch.step), ids, index, 48, 48)
            for row, i in enumerate(ids):
                cut = crop_image(images[i], drawn.boxes[row], bool(drawn.flips[row]), view.size)
                expected = finish(torch.from_numpy(cut)[None], drawn[row : row + 1], view)
                assert torch.equal(made[row : row + 1], expected)


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


@pytest.mark.timeout(30)
def test_a_few_images_that_are_all_bad_stop_the_run():
    """Ten may be left out, but there has to be another one to take the place of each."""
    few = array_source(pictures(9), None)
    for make in (
        lambda source: create_loader(source, make_plan(9), CPU, 0),
        lambda source: StreamLoader(source, make_plan(9), CPU, 2),
    ):
        with pytest.raises(
            DataError, match=r"none of the 9 images of array can be read.*array#\d \(truncated"
        ) as caught:
            list(make(with_bad(few, set(range(9)))).batches(0, 2))
        assert len(caught.value.bad) == 9
        (batch,) = make(with_bad(few, set(range(8)))).batches(0, 1)
        assert batch.ids.tolist() == [8] * 8


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


# ---- threads and memory of streamed images --------------------------------------------------------------------


def seen_by(source, look):
    """The source, which calls look() in the thread that reads."""

    def fetch(i):
        look()
        return source.read(i)

    return Source(source.name, len(source), fetch, source.title, source.fingerprint)


def test_neither_workers_nor_threads_change_a_bit_of_blurred_views():
    """Large enough that several threads would share an operation."""
    source = array_source(pictures(12, 130), None)
    plan = Plan(12, 6, policy("simclr", 120), 0)
    torch.set_num_threads(2)
    try:
        runs = [list(StreamLoader(source, plan, CPU, workers).batches(0, 2)) for workers in (0, 1, 3)]
    finally:
        torch.set_num_threads(1)
    runs.append(list(StreamLoader(source, plan, CPU, 2).batches(0, 2)))
    for other in runs[1:]:
        assert all(same(one, two) for one, two in zip(runs[0], other, strict=True))


def test_a_decoding_thread_computes_alone_and_no_other_thread_is_changed():
    """PyTorch would otherwise start a team of threads for each of them."""
    counts = []
    torch.set_num_threads(3)
    try:
        source = seen_by(array_source(pictures(), None), lambda: counts.append(torch.get_num_threads()))
        list(StreamLoader(source, make_plan(30), CPU, 2).batches(0, 3))
        assert torch.get_num_threads() == 3
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(1)
    assert counts == [1] * 24
    assert later == [3]


def test_memory_is_used_again_but_never_under_a_batch_that_is_still_there(monkeypatch):
    source, plan = array_source(pictures(), None), make_plan(30)
    expected = [[view.clone() for view in batch.views] for batch in StreamLoader(source, plan, CPU, 0).batches(0, 9)]
    taken, empty = [], np.empty
    monkeypatch.setattr(np, "empty", lambda *shape, **more: taken.append(shape[0]) or empty(*shape, **more))
    kept = {}
    for batch in StreamLoader(source, plan, CPU, 0).batches(0, 9):
        if batch.step in (1, 4):
            kept[batch.step] = [view[2:5].flip(0) if batch.step == 4 else view.view(-1) for view in batch.views]
        del batch
    assert torch.equal(kept[1][0], expected[1][0].view(-1))
    assert torch.equal(kept[4][1], expected[4][1][2:5].flip(0))
    batch = 2 * [(8, 3, 16, 16)]  # two views
    assert [shape for shape in taken if shape == batch[0]] == 3 * batch  # two that are kept, and one for the others
    taken.clear()
    everything = list(StreamLoader(source, plan, CPU, 0).batches(0, 9))
    assert [shape for shape in taken if shape == batch[0]] == 9 * batch
    assert all(torch.equal(b.views[1], views[1]) for b, views in zip(everything, expected, strict=True))


# ---- JPEG files that are larger than needed -----------------------------------------------------------------


@pytest.fixture
def large_files():
    """12 JPEG files of 300 x 400 pixels, smooth; and what was read of each: the size of the pixels."""
    coarse = np.random.default_rng(1).integers(0, 256, (12, 12, 16, 3), dtype=np.uint8)
    return [
        encoded(Image.fromarray(c).resize((400, 300), Image.Resampling.BICUBIC), "JPEG", quality=95) for c in coarse
    ]


def file_source(files, with_content=True):
    return Source(
        "files",
        len(files),
        lambda i: decode(files[i]),
        str,
        "0" * 64,
        content=files.__getitem__ if with_content else None,
    )


def test_large_files_are_decoded_at_a_fraction(monkeypatch, large_files):
    """Boxes are drawn from the size in the file, every crop keeps at least the pixels of its view."""
    plan, cut = Plan(12, 12, policy("crop-only", 48), 0), []

    def noting(image, box, flip, size):
        assert (box[:2] >= 0).all()
        assert (box[:2] + box[2:] <= image.shape[:2]).all()
        cut.append((image.shape[0], min(box[2:])))
        return crop_image(image, box, flip, size)

    monkeypatch.setattr(loader_module, "crop_image", noting)
    whole = list(StreamLoader(file_source(large_files, False), plan, CPU, 0).batches(0, 3))
    assert {height for height, _ in cut} == {300}
    cut.clear()
    reduced = list(StreamLoader(file_source(large_files), plan, CPU, 0).batches(0, 3))
    assert {75, 150} <= {height for height, _ in cut} <= {75, 150, 300}
    assert min(side for height, side in cut if height < 300) >= 47  # rounded to whole pixels
    grey = 255 * 0.225  # a normalised number in grey levels
    for one, two in zip(whole, reduced, strict=True):
        assert torch.equal(one.ids, two.ids)
        for a, b in zip(one.views, two.views, strict=True):
            assert 0 < (a - b).abs().mean() * grey < 5
            shifted = (a[..., 1:] - a[..., :-1]).abs().mean()
            assert (a - b).abs().mean() < shifted / 2  # control: what one pixel of the view makes


def test_reduced_views_follow_from_seed_epoch_and_image(large_files):
    source = file_source(large_files)
    views = policy("simclr", 32)
    runs = [
        list(StreamLoader(source, Plan(12, size, views, 0), CPU, workers).batches(0, 12 // size))
        for size, workers in ((12, 0), (4, 3))
    ]
    of = [{int(i): view for batch in run for i, view in zip(batch.ids, batch.views[1], strict=True)} for run in runs]
    assert of[0].keys() == of[1].keys() == set(range(12))
    assert all(torch.equal(of[0][i], of[1][i]) for i in range(12))


def test_a_reduced_file_that_is_damaged_is_replaced(large_files):
    bad = [data[: len(data) // 2] if i == 3 else data for i, data in enumerate(large_files)]
    loader = StreamLoader(file_source(bad), Plan(12, 12, policy("simclr", 32), 0), CPU, 1)
    (batch,) = loader.batches(0, 1)
    assert list(loader.bad) == [3]
    assert "truncated" in loader.bad[3]
    assert 3 not in batch.ids.tolist()
    (repaired,) = StreamLoader(file_source(large_files), Plan(12, 12, policy("simclr", 32), 0), CPU, 1).batches(0, 1)
    row = repaired.ids.tolist().index(3)
    taken = int(batch.ids[row])
    other = repaired.ids.tolist().index(taken)
    assert torch.equal(batch.views[0][row], repaired.views[0][other])  # it is augmented as that image is
