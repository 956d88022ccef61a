"""The single image of a CPU against torchvision, float64 and the batch."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from nnclr.data import augment as A
from nnclr.data import one_image as O
from tests.data.test_augment import photos


def image(size=64):
    torch.manual_seed(0)  # the same picture each time
    picture = photos(1, size - size % 4 + 4, size - size % 4 + 4)[0, :, :size, :size].float() / 255
    picture[:, :4, :4] = 0.5  # gray, black and pure colours: there the hue is undefined, or on an edge
    picture[:, :4, 4:8] = 0.0
    picture[:, 4:8, :4] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    picture[:, 4:8, 4:8] = torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    return picture.contiguous()


def made(operations=(), grayscale=False, sigma=0.0, threshold=None, size=64):
    result = 255 * image(size)
    O.color_image(result, operations, grayscale, sigma, 11, threshold)
    return result / 255


@pytest.mark.parametrize("turns", [*np.linspace(-0.5, 0.5, 25).tolist(), 1 / 3, -1 / 6, 1e-9])
def test_hue(turns):
    torch.testing.assert_close(made([("hue", turns)]), TF.adjust_hue(image(), turns), atol=2e-5, rtol=0)
    if abs(turns) > 0.01:  # control
        assert (made([("hue", turns)]) - image()).abs().max() > 0.01


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.8])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_other_jitter(name, factor):
    theirs = getattr(TF, f"adjust_{name}")(image(), factor)
    torch.testing.assert_close(made([(name, factor)]), theirs, atol=2e-6, rtol=0)
    if factor != 1.0:  # control
        assert (theirs - image()).abs().max() > 0.1


def test_operations_are_done_in_order():
    steps = [("contrast", 1.8), ("hue", 0.3), ("brightness", 0.4), ("saturation", 1.9)]
    one, other = made(steps), made(steps[::-1])
    two = image()
    for name, factor in steps:
        two = getattr(TF, f"adjust_{name}")(two, factor)
    torch.testing.assert_close(one, two, atol=3e-5, rtol=0)
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("size", [30, 64, 67])
@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.0, 9.0])
def test_blur_is_all_taps_up_to_rounding(sigma, size):
    picture = image(size)
    taps = np.exp(-0.5 * (np.arange(-11, 12) / sigma) ** 2)
    taps /= taps.sum()
    exact = np.pad(picture.double().numpy(), ((0, 0), (11, 11), (11, 11)), "reflect")
    for axis in (1, 2):
        exact = np.apply_along_axis(lambda line: np.convolve(line, taps, "valid"), axis, exact)
    assert np.abs(made(sigma=sigma, size=size).numpy() - exact).max() < 5e-7
    fewer = image(size)
    O.blur_image(fewer, sigma, 2)
    assert sigma < 0.5 or np.abs(fewer.numpy() - exact).max() > 1e-4  # control: two taps a side are not enough


def test_grayscale_is_blurred_like_any_other_picture():
    expected = TF.gaussian_blur(TF.rgb_to_grayscale(image(), 3), [23, 23], [1.3, 1.3])
    torch.testing.assert_close(made(grayscale=True, sigma=1.3), expected, atol=1e-6, rtol=0)


def test_solarize():
    torch.testing.assert_close(made(threshold=0.5), TF.solarize(image(), 0.5), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["byol", "simclr", "simsiam"])
def test_one_image_is_that_of_the_batch(name):
    """Each row finished alone, as the threads of a loader do, is the row of the batch up to rounding."""
    n = 48
    crops = photos(n, 72, 72)
    for view in A.policy(name, 72, hue=0.5, solarize=0.3):
        drawn = A.draw_parameters(view, 0, 0, np.arange(n), 0, 72, 72)
        batch = A.finish(crops, drawn, view)
        alone, place = torch.empty_like(batch), torch.empty(1, 3, 72, 72)
        for i in range(n):
            alone[i] = A.finish(crops[i : i + 1], drawn[i : i + 1], view, out=place)[0]
            assert torch.equal(alone[i : i + 1], place)  # made in place
        torch.testing.assert_close(alone, batch, atol=2e-5, rtol=0)
        together = torch.empty_like(batch)
        assert torch.equal(A.finish(crops, drawn, view, out=together), batch)
        assert torch.equal(together, batch)
        other = A.finish(crops, drawn, dataclasses.replace(view, solarize_threshold=0.7))
        assert (other - batch).abs().max() > 0.1  # control
