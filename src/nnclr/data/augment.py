"""Augmentation as batched tensor operations, the same on every device; NVIDIA's have kernels of the same results.

Parameters are drawn on the CPU from (seed, epoch, image id, view), and so do not depend on the batch an image
is in; pixels are worked on where the images are. Operations follow torchvision's float semantics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import permutations
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nnclr import counter
from nnclr.data.one_image import LUMA, OPERATIONS, blur_image, color_image
from nnclr.errors import InputError
from nnclr.kernels.available import triton_works

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_IMAGE = 64  # pixels; up to this size policies take their small-image form
_ORDERS = np.array(list(permutations(range(4))))  # the 24 orders of brightness, contrast, saturation, hue
_TRIES = 10  # of a crop box, as torchvision's RandomResizedCrop
_GRAY = LUMA


@dataclass(frozen=True)
class View:
    """How one view of an image is made; defaults are BYOL's, which NNCLR uses (paper, section 4.1)."""

    size: int  # pixels
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, log-uniform
    flip: float = 0.5  # probability, like the next ones
    jitter: float = 0.8
    brightness: float = 0.4  # factors are drawn from 1 +- this
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shift drawn from +- this, in turns
    grayscale: float = 0.2
    blur: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: float = 0.0
    solarize_threshold: float = 0.5


POLICIES = ("byol", "simclr", "simsiam", "crop-only", "multi-crop")


def policy(
    name: str,
    image_size: int,
    crop_min_scale: float | None = None,
    small_views: int = 6,
    small_view_size: int | None = None,
    small_crop_scale: tuple[float, float] = (0.05, 0.14),
    **given: float | tuple[float, float] | None,
) -> tuple[View, ...]:
    """The views of a named policy, the two large ones first.

    Up to 64 pixels there is no blur and crops cover at least 0.2 of the area, as in public recipes for small
    images.

    Args:
        name: `byol` (view 1 always blurred, view 2 sometimes solarised), `simclr` (both views alike, stronger
            jitter), `simsiam` (both alike, MoCo v2's and SimSiam's jitter and crops), `crop-only` (nothing but
            crops: the paper's claim of robustness), or `multi-crop` (BYOL's two views and small ones in turns).
        image_size: pixels of a large view.
        crop_min_scale: smallest share of the area in a large view, instead of the policy's.
        small_views: number of small views (multi-crop).
        small_view_size: pixels of a small view; default 96 / 224 of the image size.
        small_crop_scale: smallest and largest share of the area in a small view.
        **given: fields of `View` to set in all views, whatever the policy; None leaves the policy's.

    Raises:
        InputError: for an unknown name.
    """
    if name not in POLICIES:
        raise InputError(f"no augmentation is called '{name}'; there are {', '.join(POLICIES)}")
    small = image_size <= SMALL_IMAGE
    least = {"simsiam": 0.2, "multi-crop": 0.14}.get(name, 0.08)
    least = (max(least, 0.2) if small else least) if crop_min_scale is None else crop_min_scale
    base = View(image_size, crop_scale=(least, 1.0))
    if name == "simclr":
        views = [replace(base, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)] * 2
    elif name == "simsiam":
        views = [replace(base, saturation=0.4, blur=0.5)] * 2
    elif name == "crop-only":
        views = [replace(base, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)] * 2
    else:
        views = [replace(base, blur=1.0), replace(base, blur=0.1, solarize=0.2)]
    if name == "multi-crop":
        size = round(image_size * 96 / 224) if small_view_size is None else small_view_size
        views += [replace(views[i % 2], size=size, crop_scale=small_crop_scale) for i in range(small_views)]
    if small:
        views = [replace(view, blur=0.0) for view in views]
    fixed: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    return tuple(replace(view, **fixed) for view in views)


@dataclass
class Parameters:
    """What is done to each of n images to make one view."""

    boxes: np.ndarray  # (n, 4) int64: top, left, height, width in pixels of the image
    flips: np.ndarray  # (n,) bool
    jitter: np.ndarray  # (n,) bool
    factors: np.ndarray  # (n, 4) float32: brightness, contrast, saturation, hue
    orders: np.ndarray  # (n, 4) int64: the operations in the order they are applied
    grayscale: np.ndarray  # (n,) bool
    sigmas: np.ndarray  # (n,) float32, 0 where there is no blur
    solarize: np.ndarray  # (n,) bool

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The parameters of several batches as one."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, rows: slice) -> Self:
        """The parameters of some of the images."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __setitem__(self, rows: slice, other: Self) -> None:
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)


def draw_parameters(
    view: View,
    seed: int,
    epoch: int,
    ids: np.ndarray,
    view_index: int,
    heights: np.ndarray | int,
    widths: np.ndarray | int,
) -> Parameters:
    """Draw one view's parameters for images of the given ids and sizes, on the CPU."""
    parameters, numbers = draw_operations(view, seed, epoch, ids, view_index)
    parameters.boxes = draw_boxes(view, numbers, heights, widths)
    return parameters


def draw_operations(
    view: View, seed: int, epoch: int, ids: np.ndarray, view_index: int
) -> tuple[Parameters, np.ndarray]:
    """What `draw_parameters` draws, but for the boxes, and the numbers (n, ...) for `draw_boxes`.

    Drawing for a batch takes hardly longer than for one image, and the sizes of images may not be known yet.
    """
    u = counter.uniform(seed, epoch, ids, view_index, 12 + 2 * _TRIES + 2)
    amounts = np.array([view.brightness, view.contrast, view.saturation, view.hue], np.float32)
    centres = np.array([1, 1, 1, 0], np.float32)
    low = np.maximum(centres - amounts, [0, 0, 0, -0.5]).astype(np.float32)
    factors = low + u[:, 2:6] * (centres + amounts - low)
    sigma_low, sigma_high = view.blur_sigma
    parameters = Parameters(
        boxes=np.zeros((len(ids), 4), np.int64),
        flips=u[:, 0] < view.flip,
        jitter=u[:, 1] < view.jitter,
        factors=factors.astype(np.float32),
        orders=_ORDERS[(u[:, 6] * 24).astype(np.int64)],
        grayscale=u[:, 7] < view.grayscale,
        sigmas=np.where(u[:, 8] < view.blur, sigma_low + u[:, 9] * (sigma_high - sigma_low), 0).astype(np.float32),
        solarize=u[:, 10] < view.solarize,
    )
    return parameters, u[:, 12:]


def draw_boxes(view: View, numbers: np.ndarray, heights: np.ndarray | int, widths: np.ndarray | int) -> np.ndarray:
    """Crop boxes (n, 4) as torchvision's RandomResizedCrop draws them: the first of ten tries that fits."""
    # For the few images that a thread has at a time, the calls are what takes time, not the numbers.
    u = numbers.astype(np.float64)
    heights, widths = np.broadcast_to(heights, len(u)), np.broadcast_to(widths, len(u))
    (scale_low, scale_high), (log_low, log_high) = view.crop_scale, np.log(view.crop_ratio)
    scales, ratios = u[:, : 2 * _TRIES : 2], u[:, 1 : 2 * _TRIES : 2]
    area = (heights * widths)[:, None] * (scale_low + scales * (scale_high - scale_low))
    ratio = np.exp(log_low + ratios * (log_high - log_low))
    tried_w, tried_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (tried_w > 0) & (tried_w <= widths[:, None]) & (tried_h > 0) & (tried_h <= heights[:, None])
    first = np.arange(len(u)), fits.argmax(axis=1)
    w, h, found = tried_w[first], tried_h[first], fits[first]
    top, left = np.floor(u[:, -2] * (heights - h + 1)), np.floor(u[:, -1] * (widths - w + 1))
    if not found.all():  # the largest centred box of an allowed ratio, where no try fits
        w = np.where(found, w, np.maximum(np.minimum(widths, np.rint(heights * view.crop_ratio[1])), 1))
        h = np.where(found, h, np.maximum(np.minimum(heights, np.rint(widths / view.crop_ratio[0])), 1))
        top, left = np.where(found, top, (heights - h) // 2), np.where(found, left, (widths - w) // 2)
    return np.array([top, left, h, w]).T.astype(np.int64)


def crop(images: Tensor, boxes: np.ndarray, flips: np.ndarray, size: int) -> Tensor:
    """Cut a box out of each image and resize it, antialiased bicubic, as two batched matrix products.

    Args:
        images: (n, 3, h, w) uint8.
        boxes: (n, 4) top, left, height, width.
        flips: (n,) bool, mirrored left to right.
        size: pixels of the result.

    Returns:
        (n, 3, size, size) float32 in [0, 1].
    """
    n, channels, height, width = images.shape
    device = images.device
    rows = _resize_weights(boxes[:, [0, 2]], height, size, device)
    columns = _resize_weights(boxes[:, [1, 3]], width, size, device, flips)
    # Rows first, with the colours side by side: (n, size, h) @ (n, h, 3 * w).
    pixels = rows @ images.transpose(1, 2).reshape(n, height, channels * width).float()
    pixels = pixels.view(n, size * channels, width) @ columns.transpose(1, 2)
    pixels = pixels.view(n, size, channels, size).transpose(1, 2).contiguous()
    return pixels.div_(255).clamp_(0, 1)


def _resize_weights(
    spans: np.ndarray, pixels: int, size: int, device: torch.device, flips: np.ndarray | None = None
) -> Tensor:
    """(n, size, pixels) matrices that resize the spans (start, length), (n, 2), to size pixels.

    Bicubic with a = -0.5, widened by the scale when shrinking (antialias), taps outside the span left out: what
    Pillow and torchvision do.
    """
    # Only the taps an output pixel can have are computed: 4 when enlarging, not all the pixels of the image.
    count = min(pixels, int(np.ceil(4 * max(1.0, spans[:, 1].max(initial=1) / size))))
    first, extent = upload(spans.astype(np.float32), device)[:, :, None, None].unbind(1)
    scale = extent / size
    widen = scale.clamp(min=1)
    out = torch.arange(size, device=device, dtype=torch.float32)[None, :, None]
    if flips is not None:
        flipped = upload(flips.astype(np.float32), device)[:, None, None]
        out = out + flipped * (size - 1 - 2 * out)
    centre = first + (out + 0.5) * scale
    tap = (centre - 2 * widen + 0.5).floor_().clamp_(0, pixels - count) + torch.arange(count, device=device)
    x = ((tap + 0.5 - centre) / widen).abs_()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights *= (tap >= first) & (tap < first + extent)
    weights /= weights.sum(dim=2, keepdim=True)
    return torch.zeros(len(spans), size, pixels, device=device).scatter_(2, tap.long(), weights)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy of host values on the device, without waiting for the work that is queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":  # from pageable memory the copy would wait
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def color(images: Tensor, parameters: Parameters, view: View) -> Tensor:
    """Jitter in each image's own order, then grayscale, blur and solarise, each where it was drawn.

    Args:
        images: (n, 3, s, s) float32 in [0, 1]; changed in place.
        parameters: of the same n images.
        view: for the size of the blur and the threshold of solarise.
    """
    amounts = (view.brightness, view.contrast, view.saturation, view.hue)
    for position in range(4):
        for operation, apply in enumerate((_brightness, _contrast, _saturation, _hue)):
            if amounts[operation] > 0:
                chosen = parameters.jitter & (parameters.orders[:, position] == operation)
                _where(images, chosen, apply, parameters.factors[:, operation])
    _where(images, parameters.grayscale, lambda x, _: gray(x).expand_as(x))
    _where(images, parameters.sigmas > 0, lambda x, sigma: blur(x, sigma.flatten(), view.size), parameters.sigmas)
    _where(images, parameters.solarize, lambda x, _: solarize(x, view.solarize_threshold))
    return images


def _color_one(image: Tensor, parameters: Parameters, view: View) -> None:
    """`color` of one image (3, s, s) float32 from 0 to 255 on a CPU, in place."""
    amounts = (view.brightness, view.contrast, view.saturation, view.hue)
    order = parameters.orders[0].tolist() if parameters.jitter[0] else []
    color_image(
        image,
        [(OPERATIONS[i], float(parameters.factors[0, i])) for i in order if amounts[i] > 0],
        bool(parameters.grayscale[0]),
        float(parameters.sigmas[0]),
        _widest(view.size),
        view.solarize_threshold if parameters.solarize[0] else None,
    )


def _where(
    images: Tensor, chosen: np.ndarray, apply: Callable[[Tensor, Tensor], Tensor], values: np.ndarray | None = None
) -> None:
    """Replace the chosen images by apply(images, values (n, 1, 1, 1)); the choice is known on the host."""
    if chosen.any():
        rows = np.flatnonzero(chosen)
        index = upload(rows, images.device)
        value = index if values is None else upload(values[rows], images.device)
        made = apply(images.index_select(0, index), value[:, None, None, None])
        if images.device.type == "cpu":
            images.numpy()[rows] = made.numpy()  # PyTorch copies number by number, which takes five times as long
        else:
            images.index_copy_(0, index, made)


def gray(images: Tensor) -> Tensor:
    """Luma (n, 1, h, w)."""
    red, green, blue = images.unbind(1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])[:, None]


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = gray(images.mean(dim=(2, 3), keepdim=True))
    return images.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return images.lerp_(gray(images), 1 - factor).clamp_(0, 1)


def _hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV; value and saturation stay.

    Hues are in sixths of a turn from red, and times the chroma, so that nothing is divided: a channel is
    low + clamp(2 chroma - distance, 0, chroma), distance being how far around the circle the hue is from the channel's
    own. No pixel is told apart from others by a comparison: on a CPU, that takes ten times as long as arithmetic.
    """
    red, green, blue = images.split(1, 1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.copysign((green + blue).sub_(red).add_(chroma).sub_(low), green - blue)  # -3 chroma to 3 chroma
    # Of the two places on the line that are the same hue, green and blue take the one that is at most 7 from the
    # turned hue: then the distance is 3 - ||difference| - 3| wherever that matters.
    to_red = 6 * turns
    to_green = to_red + 4 - 6 * (turns >= 0)
    thrice, below = 3 * chroma, low - chroma
    for channel, turned in zip((red, green, blue), (to_red, to_green, to_green - 2), strict=True):
        difference = (chroma * turned).add_(hue).abs_().sub_(thrice).abs_().add_(below)
        torch.clamp(difference, low, high, out=channel)
    return images


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values from the threshold on."""
    # Comparing in place gives zeros and ones at once; on a CPU a mask of bools takes ten times as long.
    inverted: Tensor = torch.lerp(images, 1 - images, images.clone().ge_(threshold))
    return inverted


def _widest(size: int) -> int:
    """Taps of the blur on either side: the kernel spans a tenth of the view (23 at 224)."""
    return max(1, round(size * 11 / 224))


def blur(images: Tensor, sigmas: Tensor, size: int) -> Tensor:
    """Separable Gaussian blur, reflected at the border; the kernel spans a tenth of the view (23 at 224)."""
    half = _widest(size)
    if images.device.type == "cpu":
        blurred = images.clone()
        for image, sigma in zip(blurred, sigmas.tolist(), strict=True):
            blur_image(image, sigma, half)
        return blurred
    taps = torch.arange(-half, half + 1, device=images.device).float()
    kernels = torch.exp(-0.5 * (taps / sigmas[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    flat = F.pad(images, (half,) * 4, mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernels[:, None, None, :], groups=len(kernels))
    return F.conv2d(flat, kernels[:, None, :, None], groups=len(kernels)).view_as(images)


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel."""
    constants = upload(np.array([mean, std], np.float32), images.device)[:, None, :, None, None]
    return (images - constants[0]).div_(constants[1])


def augment(
    images: Tensor, ids: np.ndarray, views: Sequence[View], seed: int, epoch: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """All views of images that are on the device.

    Args:
        images: (n, 3, h, w) uint8.
        ids: (n,) int64 image ids.
        views: how each view is made.
        seed: of the run.
        epoch: from 0.
        dtype: of the views, float32 or bfloat16.

    Returns:
        A (n, 3, s, s) tensor a view, normalised; where kernels make it, in channels-last memory.
    """
    height, width = images.shape[2:]
    drawn = [draw_parameters(view, seed, epoch, ids, index, height, width) for index, view in enumerate(views)]
    if triton_works(images.device):
        from nnclr.kernels.augment_triton import augment_triton

        return augment_triton(images, drawn, views, IMAGENET_MEAN, IMAGENET_STD, dtype)
    return [
        normalize(color(crop(images, p.boxes, p.flips, view.size), p, view)).to(dtype)
        for p, view in zip(drawn, views, strict=True)
    ]


def crop_image(image: np.ndarray, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """`crop` for one large image: (h, w, 3) uint8 to (3, size, size) uint8, rounded also between its two passes."""
    top, left, height, width = box.tolist()
    # Cropping first keeps the taps inside the box, as `crop` does.
    pixels = image[top : top + height, left : left + width]
    part = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]
    cut = F.interpolate(part, (size, size), mode="bicubic", antialias=True)
    return (cut.flip(3) if flip else cut)[0].contiguous().numpy()


def finish(
    crops: Tensor,
    parameters: Parameters,
    view: View,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Colour and normalise crops (n, 3, s, s) uint8 that were cut with the same parameters; as `augment` otherwise.

    On a CPU the views can be made in place: out is (n, 3, s, s) float32.
    """
    if triton_works(crops.device):
        from nnclr.kernels.augment_triton import augment_triton

        return augment_triton(crops, [parameters], [view], IMAGENET_MEAN, IMAGENET_STD, dtype, whole=True)[0]
    images = crops.float() if out is None else out.copy_(crops)
    if len(images) == 1 and images.device.type == "cpu":
        _color_one(images[0], parameters, view)
        mean, scale = _of_bytes()
        return images.sub_(mean).mul_(scale).to(dtype)
    made = normalize(color(images.mul_(1 / 255), parameters, view))
    return (made if out is None else out.copy_(made)).to(dtype)


@cache
def _of_bytes() -> tuple[Tensor, Tensor]:
    """The mean and inverse deviation of ImageNet's pixels from 0 to 255, (3, 1, 1) each."""
    mean, std = (255 * np.array(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy((1 / std).astype(np.float32))


def eval_image(image: np.ndarray, size: int, crop_pct: float | None = None) -> np.ndarray:
    """The evaluation view of an image: (h, w, 3) uint8 to (3, size, size) uint8, bicubic.

    The shorter side becomes size / crop_pct and the centre is cut out.

    Args:
        image: of any size.
        size: pixels.
        crop_pct: default 1 up to 64 pixels, so that the whole centre square is seen, and 224/256 above.
    """
    height, width = image.shape[:2]
    if crop_pct is None:
        crop_pct = 1.0 if size <= SMALL_IMAGE else 0.875
    if crop_pct == 1.0:
        if height == width == size:
            return np.ascontiguousarray(image.transpose(2, 0, 1))
        side = min(height, width)
        left, top = round((width - side) / 2), round((height - side) / 2)
        # Cropping first, so that no tap reaches beyond the square.
        image = image[top : top + side, left : left + side]
        box: tuple[float, float, float, float] | None = None
    else:
        # The window of the resized image that the centre crop keeps, in pixels of the original: an image of
        # 20000 x 1 is never enlarged as a whole.
        short = math.floor(size / crop_pct + 1e-6)  # as timm and transformers do; 1e-6 for 224 / 0.875
        rows, columns = (max(short, short * side // min(height, width)) for side in (height, width))
        top, left = round((rows - size) / 2), round((columns - size) / 2)
        y, x = height / rows, width / columns
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized).transpose(2, 0, 1).copy()
