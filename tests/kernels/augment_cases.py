"""The augmentation kernels against the plain functions, in Triton's interpreter.

Not collected by name: `test_augment.py` runs this file in a process of its own, where TRITON_INTERPRET is set before
Triton is imported. What makes the comparison is used on a GPU too (`tests/gpu/test_augment.py`).
"""

from itertools import permutations

import numpy as np
import pytest
import torch
import triton

from nnclr.data import augment as A
from nnclr.kernels import augment_triton as K
from nnclr.kernels import smallest_triton

# Before normalising: float32 sums in another order, amplified by the jitter. In units of the range, as all tolerances.
FLOAT32 = 4e-6
# float16 rounds weights, sums and what is kept between launches, together by about 2^-11, which jitter amplifies up to
# fourfold; bfloat16 then rounds the normalised result by 2^-8 of itself, or 2^-7 where Triton's interpreter cuts off.
ON_THE_WAY, AT_THE_END = 2.0**-9, 2.0**-7 if triton.knobs.runtime.interpret else 2.0**-8


def photos(n, height, width):
    """Smooth colourful uint8 images with some noise."""
    small = torch.rand(n, 3, -(-height // 4), -(-width // 4))
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    return (235 * smooth + 20 * torch.rand(n, 3, height, width)).to(torch.uint8)


def nothing(n, height, width):
    """Parameters that only resize; a case sets what it is about."""
    return A.Parameters(
        boxes=np.tile([0, 0, height, width], (n, 1)),
        flips=np.zeros(n, bool),
        jitter=np.zeros(n, bool),
        factors=np.tile(np.float32([1, 1, 1, 0]), (n, 1)),
        orders=np.tile(np.arange(4), (n, 1)),
        grayscale=np.zeros(n, bool),
        sigmas=np.zeros(n, np.float32),
        solarize=np.zeros(n, bool),
    )


def by_plain_functions(images, parameters, views, whole=False):
    if whole:
        return [A.finish(images, p, view) for p, view in zip(parameters, views, strict=True)]
    cuts = [A.crop(images, p.boxes, p.flips, view.size) for p, view in zip(parameters, views, strict=True)]
    return [A.normalize(A.color(cut, p, view)) for cut, p, view in zip(cuts, parameters, views, strict=True)]


def by_kernels(images, parameters, views, dtype=torch.float32, whole=False):
    made = K.augment_triton(images, parameters, views, A.IMAGENET_MEAN, A.IMAGENET_STD, dtype, whole)
    for tensor, view in zip(made, views, strict=True):
        assert tensor.shape == (len(images), 3, view.size, view.size)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    return made


def differences(made, expected):
    """Largest difference of each view, before normalising."""
    std = torch.tensor(A.IMAGENET_STD)[:, None, None]
    return [float(((a.cpu().float() - b) * std).abs().max()) for a, b in zip(made, expected, strict=True)]


def assert_equal_in_bfloat16(made, expected):
    std = torch.tensor(A.IMAGENET_STD)[:, None, None]
    for a, b in zip(made, expected, strict=True):
        assert ((a.cpu().float() - b).abs() <= ON_THE_WAY / std + AT_THE_END * b.abs()).all()


@pytest.fixture
def tiles(monkeypatch):
    """Tiles, chunks and blocks so small that a tiny view takes several of each."""
    monkeypatch.setattr(K, "_ONE_PROGRAM", 15)
    monkeypatch.setattr(K, "_TILE", (16, 16))
    monkeypatch.setattr(K, "_CHUNK", (16, 16))
    monkeypatch.setattr(K, "_PIXELS", 128)


def set_factor(operation, values):
    def change(p):
        p.jitter[:] = True
        p.factors[:, operation] = values

    return change


CHANGES = {
    "brightness": set_factor(0, [0.4, 1.6]),
    "contrast": set_factor(1, [0.4, 1.6]),
    "saturation": set_factor(2, [0.0, 1.8]),
    "hue": set_factor(3, [-0.5, 0.3]),
    "flip": lambda p: p.flips.__setitem__(0, True),
    "grayscale": lambda p: p.grayscale.__setitem__(0, True),
    "blur": lambda p: p.sigmas.__setitem__(0, 1.3),
    "solarize": lambda p: p.solarize.__setitem__(0, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_operation_alone(change):
    images, views = photos(2, 20, 24), [A.View(16)]
    parameters = nothing(2, 20, 24)
    untouched = by_kernels(images, [parameters], views)
    CHANGES[change](parameters)
    expected = by_plain_functions(images, [parameters], views)
    assert max(differences(by_kernels(images, [parameters], views), expected)) < FLOAT32
    assert max(differences(untouched, expected)) > 0.05  # control: the operation shows


@pytest.mark.parametrize("change", ["contrast", "hue", "flip", "blur"])
def test_operations_in_tiles(change, tiles):
    images, views, parameters = photos(2, 20, 24), [A.View(19)], nothing(2, 20, 24)
    CHANGES[change](parameters)
    expected = by_plain_functions(images, [parameters], views)
    assert max(differences(by_kernels(images, [parameters], views), expected)) < FLOAT32


EDGES = [[0, 0, 1, 1], [28, 36, 1, 1], [0, 0, 29, 37], [28, 0, 1, 37], [0, 36, 29, 1], [3, 5, 26, 2], [9, 1, 4, 33]]


@pytest.mark.parametrize("size", [1, 9, 16])
def test_boxes_at_the_border(size):
    n = len(EDGES)
    images, parameters = photos(n, 29, 37), nothing(n, 29, 37)
    parameters.boxes, parameters.flips = np.array(EDGES), np.arange(n) % 2 == 1
    views = [A.View(size)]
    expected = by_plain_functions(images, [parameters], views)
    assert max(differences(by_kernels(images, [parameters], views), expected)) < FLOAT32
    parameters.boxes[3, 1] += 1
    parameters.boxes[3, 3] -= 1
    if size > 1:  # control: a box that is narrower by a pixel
        assert max(differences(by_kernels(images, [parameters], views), expected)) > 0.01


@pytest.mark.parametrize(("height", "width", "size"), [(90, 70, 19), (11, 13, 33)], ids=["shrinking", "enlarging"])
def test_boxes_in_tiles(height, width, size, tiles):
    images, parameters = photos(3, height, width), nothing(3, height, width)
    parameters.boxes = np.array([[0, 0, height, width], [2, 1, height - 2, 5], [height - 7, width - 9, 7, 9]])
    parameters.flips = np.array([False, True, True])
    views = [A.View(size)]
    expected = by_plain_functions(images, [parameters], views)
    assert max(differences(by_kernels(images, [parameters], views), expected)) < FLOAT32


def all_orders():
    parameters = nothing(24, 16, 16)
    parameters.jitter[:] = True
    parameters.orders = np.array(list(permutations(range(4))))
    parameters.factors = np.random.default_rng(0).uniform([0.5, 0.5, 0.2, -0.3], [1.5, 1.5, 1.8, 0.3], (24, 4))
    parameters.factors = parameters.factors.astype(np.float32)
    return parameters


@pytest.mark.parametrize("blurred", [False, True], ids=["one launch", "three launches"])
def test_all_orders(blurred, monkeypatch):
    images, views, parameters = photos(24, 16, 16), [A.View(16)], all_orders()
    parameters.sigmas[::2] = 0.8 * blurred
    expected = by_plain_functions(images, [parameters], views)
    assert max(differences(by_kernels(images, [parameters], views), expected)) < FLOAT32
    if blurred:
        return
    some, expected = slice(3, 6), [expected[0][3:6]]  # with contrast last or third
    wrong = A.Parameters(*(values[some].copy() for values in vars(parameters).values()))
    wrong.orders = wrong.orders[:, ::-1]  # control: the reverse order
    assert max(differences(by_kernels(images[some], [wrong], views), expected)) > 0.05
    wrong.orders = parameters.orders[some]

    def mean_before_all(*given, rows=K._rows):
        table = rows(*given)
        table[:, K._BEFORE.value] = 0
        return table

    monkeypatch.setattr(K, "_rows", mean_before_all)  # control: the mean of the image that is not changed yet
    assert max(differences(by_kernels(images[some], [wrong], views), expected)) > 0.01


EVERYTHING = {"jitter": 0.8, "saturation": 0.4, "grayscale": 0.3, "blur": 0.5, "solarize": 0.5, "crop_scale": (0.1, 1)}


@pytest.fixture
def guarded(monkeypatch):
    """Results start as NaN, and nothing may be written in front of or behind them."""
    empty, whole = torch.empty, []

    def with_margins(*shape, dtype=torch.float32, device=None, memory_format=torch.contiguous_format):
        like = empty(*shape, device="meta", memory_format=memory_format)
        storage = torch.full((like.numel() + 2048,), torch.nan, dtype=dtype)
        whole.append(storage)
        return storage[1024:-1024].as_strided(like.shape, like.stride(), 1024)

    monkeypatch.setattr(torch, "empty", with_margins)
    yield
    monkeypatch.setattr(torch, "empty", empty)
    assert len(whole) >= 3
    for storage in whole:
        assert storage[:1024].isnan().all()
        assert storage[-1024:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_everything_in_tiles(dtype, tiles, guarded):
    """Views of several sizes, drawn at random; some images of a view are blurred and others are not."""
    views = [A.View(size, **EVERYTHING) for size in (19, 13, 19)]
    images, ids = photos(3, 23, 29), np.arange(3)
    parameters = [A.draw_parameters(view, 4, 0, ids, i, 23, 29) for i, view in enumerate(views)]
    together = A.Parameters.concatenate(parameters)
    for values in (together.flips, together.jitter, together.grayscale, together.sigmas > 0, together.solarize):
        assert 0 < values.sum() < 9
    made, expected = by_kernels(images, parameters, views, dtype), by_plain_functions(images, parameters, views)
    if dtype == torch.float32:
        assert max(differences(made, expected)) < FLOAT32
    else:
        assert_equal_in_bfloat16(made, expected)
        assert max(differences(made, expected)) > FLOAT32  # control: it is not float32


def test_a_view_of_several_tiles_as_they_are_on_a_gpu():
    views = [A.View(70, **EVERYTHING)]
    images, parameters = photos(2, 60, 90), [A.draw_parameters(views[0], 3, 0, np.arange(2), 0, 60, 90)]
    parameters[0].sigmas[:] = [0, 1.7]
    parameters[0].jitter[:] = True
    expected = by_plain_functions(images, parameters, views)
    assert max(differences(by_kernels(images, parameters, views), expected)) < FLOAT32


@pytest.mark.parametrize("blur", [0.0, 0.6])
def test_images_that_are_cut_already(blur):
    views = [A.View(16, **{**EVERYTHING, "blur": blur})]
    images, parameters = photos(4, 16, 16), [A.draw_parameters(views[0], 1, 0, np.arange(4), 0, 50, 60)]
    expected = by_plain_functions(images, parameters, views, whole=True)
    assert max(differences(by_kernels(images, parameters, views, whole=True), expected)) < FLOAT32


def test_amounts_of_zero_are_no_operations():
    views = [A.View(16, jitter=1.0, brightness=0.0, contrast=0.0, hue=0.0)]
    images, parameters = photos(2, 16, 16), nothing(2, 16, 16)
    parameters.jitter[:], parameters.factors[:] = True, [0.5, 0.5, 0.5, 0.2]
    expected = by_plain_functions(images, [parameters], views)
    assert max(differences(by_kernels(images, [parameters], views), expected)) < FLOAT32


def test_the_augmentation_takes_the_kernels_where_there_are_any(monkeypatch):
    images, ids, views = photos(2, 20, 24), np.arange(2), A.policy("byol", 16)
    expected = A.augment(images, ids, views, 0, 0)
    parameters = A.draw_parameters(views[1], 0, 0, ids, 1, 20, 24)
    cut = (A.crop(images, parameters.boxes, parameters.flips, 16) * 255).round().to(torch.uint8)
    finished = A.finish(cut, parameters, views[1])
    assert not expected[0].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(A, "triton_works", lambda device: True)
    made = A.augment(images, ids, views, 0, 0)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in made)
    assert max(differences(made, expected)) < FLOAT32
    assert max(differences([A.finish(cut, parameters, views[1])], [finished])) < FLOAT32
    assert_equal_in_bfloat16(A.augment(images, ids, views, 0, 0, torch.bfloat16), expected)


def test_the_smallest_kernel_runs_and_is_checked(monkeypatch):
    smallest_triton.run_smallest(torch.device("cpu"))
    monkeypatch.setattr(smallest_triton, "_write_one", {(1,): lambda out: None})
    with pytest.raises(RuntimeError, match="without effect"):
        smallest_triton.run_smallest(torch.device("cpu"))
