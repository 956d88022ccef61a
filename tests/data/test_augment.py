"""Each operation against torchvision's on the same parameters; then the chain and the samplers."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from nnclr.data import augment as A
from nnclr.errors import InputError

IDS = np.arange(48)


def photos(n=48, height=40, width=52):
    """Smooth colourful uint8 images: noise at a quarter of the size, enlarged."""
    small = torch.rand(n, 3, height // 4, width // 4)
    return (255 * torch.nn.functional.interpolate(small, (height, width), mode="bilinear")).to(torch.uint8)


def by_torchvision(image, p, i, view):
    """One view of one uint8 image through torchvision, operation by operation, with the drawn parameters."""
    top, left, height, width = (int(v) for v in p.boxes[i])
    size = [view.size, view.size]
    x = TF.resized_crop(image.float() / 255, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True)
    x = x.clamp(0, 1)
    if p.flips[i]:
        x = TF.hflip(x)
    if p.jitter[i]:
        operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for operation in p.orders[i]:
            x = operations[operation](x, float(p.factors[i, operation]))
    if p.grayscale[i]:
        x = TF.rgb_to_grayscale(x, 3)
    if p.sigmas[i] > 0:
        kernel = 2 * max(1, round(view.size * 11 / 224)) + 1
        x = TF.gaussian_blur(x, [kernel, kernel], [float(p.sigmas[i])] * 2)
    if p.solarize[i]:
        x = TF.solarize(x, view.solarize_threshold)
    return TF.normalize(x, A.IMAGENET_MEAN, A.IMAGENET_STD)


def worst(views, images, seed=0, epoch=0):
    """Largest difference to torchvision over all images, views and pixels."""
    made = A.augment(images, IDS, views, seed, epoch)
    error = 0.0
    for index, view in enumerate(views):
        p = A.draw_parameters(view, seed, epoch, IDS, index, *images.shape[2:])
        expected = torch.stack([by_torchvision(images[i], p, i, view) for i in range(len(images))])
        error = max(error, (made[index] - expected).abs().max().item())
    return error


ALWAYS = A.View(
    32, jitter=1.0, saturation=0.4, grayscale=0.5, blur=0.5, solarize=0.5, crop_scale=(0.3, 1.0)
)  # every operation often


@pytest.mark.parametrize(
    "views",
    [A.policy("byol", 32), A.policy("simclr", 32), A.policy("byol", 72), (ALWAYS,)],
    ids=["byol small", "simclr small", "byol", "everything"],
)
def test_whole_chain_is_torchvisions(views):
    # hue divides by small differences of colours: 1e-4 of the normalised range, a fortieth of one grey level
    assert worst(views, photos()) < 2e-4


EDGES = np.array([[0, 0, 1, 1], [39, 51, 1, 1], [0, 0, 40, 52], [39, 0, 1, 52], [0, 51, 40, 1], [3, 5, 36, 2]])


@pytest.mark.parametrize("size", [1, 9, 32, 64])
def test_crop(size):
    images = photos()
    view = A.View(size, crop_scale=(0.05, 1.0), flip=0.0)
    boxes = A.draw_parameters(view, 1, 2, IDS, 0, 40, 52).boxes
    boxes[: len(EDGES)] = EDGES
    made = A.crop(images, boxes, IDS % 2 == 1, size)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = TF.resized_crop(
            images[i].float() / 255, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        expected = TF.hflip(expected) if i % 2 else expected
        torch.testing.assert_close(made[i], expected.clamp(0, 1), atol=1e-5, rtol=0)
    if size == 9:
        image, box = images[2].float() / 255, (0, 0, 40, 52)
        aliased = TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=False)
        assert (made[2] - aliased).abs().max() > 0.05  # control: what a crop without antialiasing would differ by


@pytest.mark.parametrize(
    ("operation", "theirs", "values"),
    [
        (A._brightness, TF.adjust_brightness, (0.2, 1.7)),
        (A._contrast, TF.adjust_contrast, (0.2, 1.7)),
        (A._saturation, TF.adjust_saturation, (0.0, 1.9)),
        (A._hue, TF.adjust_hue, (-0.5, 0.5)),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_jitter_operations(operation, theirs, values):
    images = photos(16).float() / 255
    images[0], images[1] = 0.5, 0.0  # gray and black: hue and saturation are undefined there
    factors = torch.linspace(*values, 16)
    made = operation(images.clone(), factors[:, None, None, None])
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(images, factors, strict=True)])
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)


def test_blur_and_gray():
    images = photos(8, 64, 64).float() / 255
    sigmas = torch.linspace(0.1, 2.0, 8)
    made = A.blur(images, sigmas, 64)
    expected = torch.stack([TF.gaussian_blur(x, [7, 7], [float(s)] * 2) for x, s in zip(images, sigmas, strict=True)])
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(A.gray(images), TF.rgb_to_grayscale(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_solarize(threshold):
    images = photos(8).float() / 255
    images[0, :, :, :4] = threshold  # the threshold itself is inverted
    torch.testing.assert_close(A.solarize(images, threshold), TF.solarize(images, threshold), atol=1e-7, rtol=0)


def test_blur_kernel_is_23_at_224_pixels():
    impulse = torch.zeros(1, 1, 224, 224)
    impulse[0, 0, 112, 112] = 1
    spread = A.blur(impulse, torch.tensor([50.0]), 224)
    assert (spread[0, 0, 112] > 0).sum() == 23


@pytest.mark.parametrize(
    "mutation",
    [
        lambda m: m.setattr(A, "_ORDERS", A._ORDERS[:, ::-1].copy()),
        lambda m: m.setattr(A, "_GRAY", (1 / 3, 1 / 3, 1 / 3)),
        lambda m: m.setattr(A, "_hue", lambda x, t: x),
        lambda m: m.setattr(A, "blur", lambda x, s, size: x),
        lambda m: m.setattr(A, "solarize", lambda x, threshold: x),
    ],
    ids=["reverse order", "gray weights", "no hue", "no blur", "no solarize"],
)
def test_control_a_wrong_operation_is_noticed(monkeypatch, mutation):
    images = photos()
    made = A.augment(images, IDS, (ALWAYS,), 0, 0)[0]
    p = A.draw_parameters(ALWAYS, 0, 0, IDS, 0, 40, 52)
    expected = torch.stack([by_torchvision(images[i], p, i, ALWAYS) for i in range(48)])
    assert (made - expected).abs().max() < 2e-4
    mutation(monkeypatch)
    assert (A.augment(images, IDS, (ALWAYS,), 0, 0)[0] - expected).abs().max() > 1e-2


def test_an_images_views_do_not_depend_on_its_batch():
    images, views = photos(), A.policy("byol", 72)
    whole = A.augment(images, IDS, views, 0, 3)
    chosen = np.array([17, 3, 30])
    for one, two in zip(whole, A.augment(images[chosen], chosen, views, 0, 3), strict=True):
        torch.testing.assert_close(one[chosen], two, atol=1e-5, rtol=0)
    for other in (A.augment(images, IDS, views, 0, 4), A.augment(images, IDS, views, 1, 3)):
        assert (whole[0] - other[0]).abs().mean() > 0.1
    assert (whole[0] - whole[1]).abs().mean() > 0.1


def test_streamed_crops_are_resident_ones_up_to_rounding():
    images, views = photos(48, 90, 120), A.policy("byol", 72)
    for index, view in enumerate(views):
        p = A.draw_parameters(view, 0, 0, IDS, index, 90, 120)
        parts = [A.draw_parameters(view, 0, 0, IDS[i : i + 1], index, 90, 120) for i in range(48)]
        cut = [
            A.crop_image(images[i].permute(1, 2, 0).numpy(), part.boxes[0], bool(part.flips[0]), 72)
            for i, part in enumerate(parts)
        ]
        resident = A.crop(images, p.boxes, p.flips, 72)
        assert (torch.from_numpy(np.stack(cut)) / 255 - resident).abs().max() < 1.5 / 255
        streamed = A.finish(torch.from_numpy(np.stack(cut)), A.Parameters.concatenate(parts), view)
        assert (streamed - A.augment(images, IDS, views, 0, 0)[index]).abs().mean() < 0.01


def test_boxes_are_distributed_as_torchvisions():
    view = A.View(32)
    n = 4000
    boxes = A.draw_parameters(view, 0, 0, np.arange(n), 0, 120, 200).boxes
    image = torch.zeros(3, 120, 200)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for name, one, two in (
        ("area", boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3]),
        ("aspect", boxes[:, 3] / boxes[:, 2], theirs[:, 3] / theirs[:, 2]),
        ("top", boxes[:, 0], theirs[:, 0]),
        ("left", boxes[:, 1], theirs[:, 1]),
    ):
        assert stats.ks_2samp(one, two).pvalue > 1e-3, name
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 120).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 200).all()
    narrower = A.draw_parameters(A.View(32, crop_scale=(0.2, 1.0)), 0, 0, np.arange(n), 0, 120, 200).boxes
    assert stats.ks_2samp(narrower[:, 2] * narrower[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < 1e-6  # control


@pytest.mark.parametrize(("height", "width"), [(1, 500), (500, 1), (10, 300), (301, 10)])
def test_box_where_no_try_fits_is_torchvisions(height, width):
    view = A.View(32, crop_scale=(0.9, 1.0))  # no box of an allowed ratio has that area
    boxes = A.draw_parameters(view, 0, 0, IDS, 0, height, width).boxes
    theirs = RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    assert boxes.tolist() == [list(theirs)] * 48


def test_boxes_of_images_of_different_sizes():
    heights, widths = np.array([30, 400, 1]), np.array([500, 20, 1])
    view, ids = A.View(32), np.array([5, 6, 7])
    together = A.draw_parameters(view, 0, 1, ids, 0, heights, widths).boxes
    alone = [A.draw_parameters(view, 0, 1, ids[i : i + 1], 0, heights[i], widths[i]).boxes[0] for i in range(3)]
    assert (together == np.stack(alone)).all()
    assert (together[:, 0] + together[:, 2] <= heights).all()
    assert (together[:, 1] + together[:, 3] <= widths).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_extreme_shapes(height, width):
    views = A.policy("byol", 16)
    images = torch.full((48, 3, height, width), 200, dtype=torch.uint8)
    assert all(view.isfinite().all() for view in A.augment(images, IDS, views, 0, 0))
    plain = A.eval_image(np.full((height, width, 3), 200, np.uint8), 16)
    assert plain.shape == (3, 16, 16)
    assert (plain == 200).all()


def test_frequencies_and_ranges():
    n = 20_000
    p = A.draw_parameters(A.policy("byol", 224)[1], 0, 0, np.arange(n), 1, 50, 50)
    for share, expected in (
        (p.flips.mean(), 0.5),
        (p.jitter.mean(), 0.8),
        (p.grayscale.mean(), 0.2),
        ((p.sigmas > 0).mean(), 0.1),
        (p.solarize.mean(), 0.2),
    ):
        assert share == pytest.approx(expected, abs=0.012)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        uniform = (p.factors[:, column] - low) / (high - low)
        assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    blurred = p.sigmas[p.sigmas > 0]
    assert stats.kstest((blurred - 0.1) / 1.9, "uniform").pvalue > 1e-3
    orders, counts = np.unique(p.orders, axis=0, return_counts=True)
    assert (np.sort(orders) == np.arange(4)).all()
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


BYOL_JITTER, SIMCLR_JITTER, MOCO_JITTER = (0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1)
BYOL_VIEWS = [(0.08, 1.0, BYOL_JITTER, 1.0, 0.0), (0.08, 1.0, BYOL_JITTER, 0.1, 0.2)]
# Of each view: crop's area, jitter's strength, probabilities of blur and solarisation.
PUBLISHED = {
    ("byol", 224): BYOL_VIEWS,  # Grill et al., table 6
    ("simclr", 224): [(0.08, 1.0, SIMCLR_JITTER, 0.5, 0.0)] * 2,  # Chen et al., appendix A, strength 1
    ("simsiam", 224): [(0.2, 1.0, MOCO_JITTER, 0.5, 0.0)] * 2,  # MoCo v2's
    ("multi-crop", 224): [  # SwAV's sizes and scales on BYOL's two recipes, small views in turns
        *((0.14, *rest) for _, *rest in BYOL_VIEWS),
        *[(0.05, 0.14, BYOL_JITTER, 1.0, 0.0), (0.05, 0.14, BYOL_JITTER, 0.1, 0.2)] * 3,
    ],
    ("byol", 32): [(0.2, 1.0, BYOL_JITTER, 0.0, 0.0), (0.2, 1.0, BYOL_JITTER, 0.0, 0.2)],
    ("simclr", 64): [(0.2, 1.0, SIMCLR_JITTER, 0.0, 0.0)] * 2,
    ("simsiam", 32): [(0.2, 1.0, MOCO_JITTER, 0.0, 0.0)] * 2,
}


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_policies_are_the_published_ones(name, size):
    views = A.policy(name, size)
    assert [
        (*v.crop_scale, (v.brightness, v.contrast, v.saturation, v.hue), v.blur, v.solarize) for v in views
    ] == PUBLISHED[name, size]
    for view in views:
        assert (view.flip, view.jitter, view.grayscale) == (0.5, 0.8, 0.2)
        assert (view.crop_ratio, view.blur_sigma, view.solarize_threshold) == ((3 / 4, 4 / 3), (0.1, 2.0), 0.5)
    assert [view.size for view in views] == [size] * 2 + ([96] * 6 if name == "multi-crop" else [])


def test_policies_can_be_changed():
    small = A.policy("byol", 32, crop_min_scale=0.3, brightness=0.2, hue=0.05)[0]
    assert (small.crop_scale, small.blur, small.brightness, small.hue) == ((0.3, 1.0), 0.0, 0.2, 0.05)
    bare = A.policy("crop-only", 224)
    assert len(bare) == 2
    for view in bare:
        assert (view.flip, view.jitter, view.grayscale, view.blur, view.solarize) == (0, 0, 0, 0, 0)
        assert view.crop_scale == (0.08, 1.0)
    assert all(view.hue == 0.05 for view in A.policy("multi-crop", 224, hue=0.05))
    crops = A.policy("multi-crop", 112, 0.25, small_views=3, small_crop_scale=(0.06, 0.2))
    assert [(view.size, view.crop_scale) for view in crops] == [(112, (0.25, 1.0))] * 2 + [(48, (0.06, 0.2))] * 3
    assert [view.blur for view in crops] == [1.0, 0.1, 1.0, 0.1, 1.0]
    assert A.policy("multi-crop", 224, small_view_size=64)[2].size == 64
    with pytest.raises(InputError, match="there are byol, simclr"):
        A.policy("mocov2", 224)


def by_pillow(image, size, margin=256 / 224):
    """Evaluation preprocessing as users of torchvision write it, on Pillow images."""
    picture = Image.fromarray(image)
    if size <= 64:
        picture = TF.resize(TF.center_crop(picture, min(picture.size)), [size, size], InterpolationMode.BICUBIC)
    else:
        picture = TF.center_crop(TF.resize(picture, round(size * margin), InterpolationMode.BICUBIC), size)
    return np.asarray(picture).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 301), (96, 96), (70, 200)])
@pytest.mark.parametrize("size", [32, 112])
def test_evaluation_view_is_resize_and_centre_crop(height, width, size):
    image = photos(1, height, width)[0].permute(1, 2, 0).numpy()
    image = np.ascontiguousarray(np.pad(image, ((0, height - len(image)), (0, width - image.shape[1]), (0, 0)), "edge"))
    ours = A.eval_image(image, size).astype(int)
    assert np.abs(ours - by_pillow(image, size)).max() <= 1  # Pillow rounds to uint8 in other places
    if size > 64:
        assert np.abs(ours - by_pillow(image, size, margin=1.0)).max() > 20  # control: no margin around the crop


def test_small_images_of_the_right_size_are_left_alone():
    image = photos(1, 32, 32)[0]
    assert (A.eval_image(image.permute(1, 2, 0).numpy(), 32) == image.numpy()).all()


@pytest.mark.parametrize(("size", "crop_pct"), [(96, 0.875), (224, 0.875), (224, 0.9), (200, 0.95)])
def test_evaluation_view_is_that_of_timm(size, crop_pct):
    """Also where size / crop_pct is no whole number: 96 / 0.875 = 109.7 becomes 109 pixels, not 110."""
    image = photos(1, 300, 400)[0].permute(1, 2, 0).numpy()
    transform = timm.data.create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=crop_pct, crop_mode="center"
    )
    transform.transforms = [t for t in transform.transforms if "Normalize" not in type(t).__name__]
    theirs = (transform(Image.fromarray(image)) * 255).round().numpy()
    ours = A.eval_image(image, size, crop_pct).astype(float)
    assert np.abs(ours - theirs).mean() < 1.0
    short = round(size / crop_pct)
    if short != int(size / crop_pct):  # control: rounding to the nearest shows
        other = A.eval_image(image, size, size / short - 1e-7).astype(float)
        assert np.abs(other - theirs).mean() > 2 * np.abs(ours - theirs).mean()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20_000, 1), (1, 20_000)])
def test_evaluation_view_of_extreme_shapes(height, width):
    ramp = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width, 1)
    view = A.eval_image(np.repeat(ramp, 3, 2), 224)
    assert view.shape == (3, 224, 224)
    middle = int(ramp[height // 2, width // 2, 0])
    assert np.abs(view.astype(int) - middle).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_as_on_the_cpu_and_without_waiting():
    images, views = photos(), (*A.policy("byol", 72), ALWAYS)
    expected, there = A.augment(images, IDS, views, 0, 0), images.cuda()
    A.augment(there, IDS, views, 0, 0)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = A.augment(there, IDS, views, 0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, two in zip(made, expected, strict=True):
        assert (one.cpu() - two).abs().max() < 2e-4
