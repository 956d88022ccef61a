"""Operations on a single large image on a CPU, where they take half the time of the same in batches."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_WHITE = 255.0
_WIDEST_SIGMA = 5.5  # taps of a Gaussian further out add up to less than 2^-24 of it


def color_image(
    image: Tensor,
    operations: Sequence[tuple[str, float]],
    grayscale: bool,
    sigma: float,
    half: int,
    threshold: float | None,
) -> None:
    """Jitter, then grayscale, blur and solarise, in place: `augment.color` of one image on a CPU.

    Args:
        image: (3, s, s) float32 from 0 to 255, which spares bytes the pass that makes them numbers up to 1.
        operations: names and factors of the jitter, in order.
        grayscale: whether to take the colour away.
        sigma: of the blur, 0 for none.
        half: taps of the blur on either side, at most.
        threshold: of solarise as a share of white, None for none.
    """
    luma = _luma()
    for name, factor in operations:
        if name == "hue":
            hue_image(image, factor)
            continue
        if name == "brightness":
            image.mul_(factor)
        elif name == "contrast":
            mean = luma.dot(image.mean(dim=(1, 2)))
            image.mul_(factor).add_(mean.mul_(1 - factor))
        else:
            image.lerp_((luma @ image.flatten(1)).view(image.shape[1:]), 1 - factor)
        if factor > 1:  # otherwise the result lies between numbers in [0, 255]
            image.clamp_(0, _WHITE)
    if grayscale:
        image.copy_((luma @ image.flatten(1)).view(image.shape[1:]))
    if sigma > 0:
        blur_image(image, sigma, half, alike=grayscale)
    if threshold is not None:
        # Comparing in place gives zeros and ones at once; a mask of bools takes ten times as long.
        image.lerp_(_WHITE - image, image.clone().ge_(threshold * _WHITE))


@cache
def _luma() -> Tensor:
    return torch.tensor(LUMA)


def hue_image(image: Tensor, turns: float) -> None:
    """Turn the hue of HSV in one image (3, h, w), in place: `augment._hue` with half the work.

    Two sixths of a turn are a change of places of the channels, and a turn the other way is one of green and blue. So
    let it be by t in [0, 1]. Then red is red - green + middle +- (1/2 - t) chroma, clamped, where + stands for hues
    from red over green to cyan, and the others follow by symmetry.
    """
    places = round(3 * turns)
    turn = 6 * turns - 2 * places
    if places:
        image.copy_(image.roll(places, 0))
    red, green, blue = image if turn >= 0 else (image[0], image[2], image[1])
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma, middle, share = high - low, torch.lerp(low, high, 0.5), 0.5 - abs(turn)
    last = red.clone()
    red.sub_(green)
    green.sub_(blue)
    blue.sub_(last)
    sides = image.sign()
    red_side, green_side, blue_side = sides if turn >= 0 else (sides[0], sides[2], sides[1])
    red.addcmul_(green_side, chroma, value=share)
    green.addcmul_(blue_side, chroma, value=share)
    blue.addcmul_(red_side, chroma, value=share)
    image.add_(middle).clamp_(low, high)


def blur_image(image: Tensor, sigma: float, half: int, alike: bool = False) -> None:
    """Blur one square image (3, s, s) by a Gaussian of at most half taps on either side, in place.

    Each axis in turn as sums of rows with weights, which is what an embedding bag is: each number is read from memory
    once, and there are no products with zeros. Taps that add up to less than a rounding error are left out. Of
    channels that are all alike one is blurred.
    """
    half = min(half, max(1, math.ceil(_WIDEST_SIGMA * sigma - 0.5)))
    made = image[:1] if alike else image
    squares, indices, offsets = _reflected(len(made), image.shape[1], half)
    kernel = torch.softmax(squares * (-0.5 / sigma**2), 0)
    weights = kernel.float().repeat(len(offsets))
    for _ in range(2):
        rows = made.reshape(-1, image.shape[1])
        summed = F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights)
        made.copy_(summed.view_as(made).mT)
    if alike:
        image[1:] = made


@cache
def _reflected(planes: int, rows: int, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """The squared distances of the taps; which of stacked planes' rows they are for each row; where each row's begin.

    Planes are reflected at their borders.
    """
    taps = np.arange(-half, half + 1)
    within = np.abs(np.arange(rows)[:, None] + taps)
    within = np.minimum(within, 2 * (rows - 1) - within)
    indices = (rows * np.arange(planes)[:, None, None] + within).flatten()
    return torch.from_numpy(taps**2.0), torch.from_numpy(indices), torch.arange(0, len(indices), len(taps))
