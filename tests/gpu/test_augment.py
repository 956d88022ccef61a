"""The augmentation kernels on a device, at the sizes they are made for, against the plain functions on the CPU."""

import numpy as np
import pytest
import torch

from nnclr.data import augment as A

pytest.importorskip("triton")

from tests.kernels.augment_cases import assert_equal_in_bfloat16, differences, photos

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOAT32 = 2.0**-15  # a device's exponential, division and products in parts are a few units in the last place apart
IDS = np.arange(24)
VIEWS = (*A.policy("byol", 224), *A.policy("simclr", 224), A.policy("multi-crop", 224)[2], A.policy("byol", 32)[1])


@pytest.fixture(scope="module")
def images():
    return photos(len(IDS), 256, 300)


@pytest.fixture(scope="module")
def expected(images):
    return A.augment(images, IDS, VIEWS, 0, 0)


def test_float32(images, expected):
    assert A.triton_works(torch.device("cuda"))
    made = A.augment(images.cuda(), IDS, VIEWS, 0, 0)
    assert max(differences(made, expected)) < FLOAT32
    assert min(differences(A.augment(images.cuda(), IDS, VIEWS, 0, 1), expected)) > 0.1  # control: another epoch


def test_bfloat16(images, expected):
    made = A.augment(images.cuda(), IDS, VIEWS, 0, 0, torch.bfloat16)
    assert_equal_in_bfloat16(made, expected)
    assert max(differences(made, expected)) > FLOAT32  # control


@pytest.mark.parametrize("index", [0, 3])
def test_images_that_are_cut_already(images, index):
    view = VIEWS[index]
    parameters = A.draw_parameters(view, 0, 0, IDS, index, 256, 300)
    cut = (A.crop(images, parameters.boxes, parameters.flips, 224) * 255).round().to(torch.uint8)
    expected = [A.finish(cut, parameters, view)]
    assert max(differences([A.finish(cut.cuda(), parameters, view)], expected)) < FLOAT32
    assert_equal_in_bfloat16([A.finish(cut.cuda(), parameters, view, torch.bfloat16)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_repeats_bit_for_bit_and_does_not_wait(images, dtype):
    there = images.cuda()
    first = A.augment(there, IDS, VIEWS, 0, 0, dtype)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = A.augment(there, IDS, VIEWS, 0, 0, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, two in zip(first, second, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one, two)


def test_views_of_more_than_two_thousand_million_numbers():
    """Places in them do not fit in 32 bits: the last image is made as the first one, which is the same."""
    n = 2**31 // (3 * 224 * 224) + 50
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB")
    images = photos(1, 32, 32).cuda().expand(n, -1, -1, -1).contiguous()
    view = A.policy("byol", 224)[0]
    made = A.augment(images, np.zeros(n, np.int64), [view], 0, 0, torch.bfloat16)[0]
    assert torch.equal(made[-1], made[0])
