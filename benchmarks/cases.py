"""What is measured: for each case the same work done by this package and by others, equal results first.

A side is a function that prepares its inputs and returns the function to time. `check` compares the results of the
sides and says in words how equal they are, or raises. Peers are imported inside, so that a process loads one library.
"""

import importlib.util
import io
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

BATCH, TEMPERATURE = 256, 0.1
STEPS = 128  # with embeddings of their own


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    peer: str  # the side that the goal is a ratio to
    goal: float  # times as fast as the peer
    items: int  # done by one call, for the rate
    unit: str
    sides: dict[str, Callable[[], Callable[[], Any]]]
    check: Callable[[], str]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Look-up, loss and backward of one step.


Pair = list[torch.Tensor]  # of two views, (BATCH, d) each


def _step_inputs(m: int, d: int, crowd: float) -> tuple[torch.Tensor, Iterator[Pair], Pair]:
    """A full support set, the embeddings of step after step, and predictions that ask for their gradient.

    Embeddings are in ten crowds, of about this cosine similarity inside a crowd; 0 for none. Those of two steps differ:
    with copies of its queries in the support set a look-up would have more and more candidates to compare.
    """
    centres = F.normalize(_normal(10, d, seed=7), dim=1)
    spread = (1 / crowd - 1) ** 0.5 if crowd else 1.0

    def drawn(n: int, seed: int) -> torch.Tensor:
        vectors = F.normalize(_normal(n, d, seed=seed), dim=1)
        return spread * vectors + (centres[torch.arange(n) % 10] if crowd else 0.0)

    bank = F.normalize(drawn(m, 0), dim=1)
    steps = [[drawn(BATCH, 100 + 2 * step + i) for i in range(2)] for step in range(STEPS)]
    return bank, itertools.cycle(steps), [_normal(BATCH, d, seed=3 + i).requires_grad_() for i in range(2)]


def _lookup(m: int, d: int, crowd: float = 0.0) -> dict[str, Callable[[], Callable[[], Any]]]:
    def ours() -> Callable[[], Any]:
        import nnclr

        bank, steps, p = _step_inputs(m, d, crowd)
        support_set = nnclr.SupportSet(m, d)
        support_set.enqueue(bank)

        def step() -> Any:
            z = next(steps)
            one, two = support_set.nearest(torch.cat(z)).embeddings[:, 0].chunk(2)
            loss = (nnclr.nnclr_loss(one, p[1], TEMPERATURE) + nnclr.nnclr_loss(two, p[0], TEMPERATURE)) / 2
            loss.backward()
            support_set.enqueue(z[0])
            return one, two, loss

        return step

    def lightly() -> Callable[[], Any]:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import NNMemoryBankModule

        bank, steps, p = _step_inputs(m, d, crowd)
        memory, criterion = NNMemoryBankModule(size=(m, d)), NTXentLoss(temperature=TEMPERATURE)
        memory.bank = bank.clone()

        def step() -> Any:
            z = next(steps)
            two, one = memory(z[1], update=False), memory(z[0], update=True)
            loss = (criterion(one, p[1]) + criterion(two, p[0])) / 2
            loss.backward()
            return one, two, loss

        return step

    def plain() -> Callable[[], Any]:
        bank, steps, p = _step_inputs(m, d, crowd)

        def half(query: torch.Tensor, prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = bank[(F.normalize(query, dim=1) @ bank.T).max(dim=1).indices]
            logits = found @ F.normalize(prediction, dim=1).T / TEMPERATURE
            return found, F.cross_entropy(logits, torch.arange(BATCH))

        place = 0

        def step() -> Any:
            nonlocal place
            z = next(steps)
            (one, first), (two, second) = half(z[0], p[1]), half(z[1], p[0])
            loss = (first + second) / 2
            loss.backward()
            bank[place : place + BATCH] = F.normalize(z[0], dim=1)
            place = (place + BATCH) % m
            return one, two, loss

        return step

    return {"nnclr": ours, "lightly": lightly, "plain PyTorch": plain}


def _lookup_check(m: int, d: int, crowd: float = 0.0) -> Callable[[], str]:
    def check() -> str:
        bank, steps, _ = _step_inputs(m, d, crowd)
        exact = bank[(F.normalize(torch.cat(next(steps)), dim=1).double() @ bank.double().T).argmax(dim=1)]
        found = {name: side()() for name, side in _lookup(m, d, crowd).items()}
        counts = {}
        for name, (one, two, _) in found.items():
            counts[name] = int((torch.cat([one, two]) - exact).abs().amax(dim=1).lt(1e-5).sum())
        if len({*counts.values(), 2 * BATCH}) != 1:
            raise AssertionError(f"neighbours equal to a float64 comparison: {counts} of {2 * BATCH}")
        ours, plain = found["nnclr"][2].item(), found["plain PyTorch"][2].item()
        if abs(ours - plain) > 1e-5:
            raise AssertionError(f"losses {ours} and {plain}")
        return f"all {2 * BATCH} neighbours equal a float64 comparison; loss equal to {abs(ours - plain):.0e}"

    return check


# Views of images that are in memory, and of JPEG files.


def _small_images() -> np.ndarray:
    coarse = torch.rand(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(coarse, (32, 32), mode="bilinear")).to(torch.uint8).numpy()


def _views_ours() -> Callable[[], Any]:
    from nnclr.data.augment import augment, policy

    images, ids, views = torch.from_numpy(_small_images()), np.arange(BATCH), policy("simclr", 32)
    return lambda: augment(images, ids, views, seed=0, epoch=0)


def _views_lightly() -> Callable[[], Any]:
    from lightly.transforms.simclr_transform import SimCLRTransform

    transform = SimCLRTransform(input_size=32, min_scale=0.2, gaussian_blur=0.0)
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in _small_images()]

    def run() -> Any:
        made = [transform(image) for image in images]
        return [torch.stack([views[i] for views in made]) for i in range(2)]

    return run


def _views_torchvision() -> Callable[[], Any]:
    transform = _torchvision(32, 0.2, blur=False)
    images = list(torch.from_numpy(_small_images()))
    return lambda: [torch.stack([transform(image) for image in images]) for _ in range(2)]


def _views_kornia() -> Callable[[], Any]:
    transform = _kornia(32, 0.2, blur=False)
    images = torch.from_numpy(_small_images())
    return lambda: [transform(images.float() / 255) for _ in range(2)]


def _torchvision(size: int, min_scale: float, blur: bool) -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (min_scale, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            *([v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5)] if blur else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def _kornia(size: int, min_scale: float, blur: bool) -> Callable[[Any], Any]:
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=(min_scale, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5)] if blur else []),
        K.Normalize(mean=torch.tensor([0.485, 0.456, 0.406]), std=torch.tensor([0.229, 0.224, 0.225])),
        same_on_batch=False,
    )


def _moments(sides: dict[str, Callable[[], Callable[[], Any]]], repeats: int) -> str:
    """The views are random: their mean and deviation, over many, must be those of the peer."""
    found = {}
    for name in ("nnclr", "lightly"):
        torch.manual_seed(0)
        run = sides[name]()
        values = torch.cat([torch.cat(list(run())).flatten(1) for _ in range(repeats)])
        found[name] = (values.mean().item(), values.std().item())
    gap = max(abs(a - b) for a, b in zip(found["nnclr"], found["lightly"], strict=True))
    if gap > 0.1:
        raise AssertionError(f"mean and deviation of the views: {found}")
    return f"mean and deviation of the views equal to {gap:.2f} (in deviations of ImageNet's pixels)"


VIEWS = {"nnclr": _views_ours, "lightly": _views_lightly, "torchvision v2": _views_torchvision, "kornia": _views_kornia}
FILES, PHOTOS = 32, 4


def _jpegs(count: int = FILES, size: tuple[int, int] = (500, 375)) -> list[bytes]:
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _jpeg(count: int, size: tuple[int, int]) -> dict[str, Callable[[], Callable[[], Any]]]:
    def ours() -> Callable[[], Any]:
        from nnclr.data.augment import policy
        from nnclr.data.decode import decode
        from nnclr.data.images import Source
        from nnclr.data.loader import Plan, create_loader

        files = _jpegs(count, size)
        content = files.__getitem__
        source = Source("files", count, lambda i: decode(content(i)), str, "0" * 64, content=content)
        loader = create_loader(source, Plan(count, count, policy("simclr", 224), seed=0), torch.device("cpu"), 0)
        steps = iter(range(10**9))

        def run() -> Any:
            step = next(steps)
            return [view for batch in loader.batches(step, step + 1) for view in batch.views]

        return run

    def lightly() -> Callable[[], Any]:
        from lightly.transforms.simclr_transform import SimCLRTransform

        transform, files = SimCLRTransform(input_size=224), _jpegs(count, size)

        def run() -> Any:
            made = [transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
            return [torch.stack([views[i] for views in made]) for i in range(2)]

        return run

    def torchvision() -> Callable[[], Any]:
        from torchvision.transforms import v2

        transform, files, to_image = _torchvision(224, 0.08, blur=True), _jpegs(count, size), v2.PILToTensor()

        def run() -> Any:
            images = [to_image(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
            return [torch.stack([transform(image) for image in images]) for _ in range(2)]

        return run

    return {"nnclr": ours, "lightly": lightly, "torchvision v2": torchvision}


JPEG, PHOTO = _jpeg(FILES, (500, 375)), _jpeg(PHOTOS, (3000, 2000))


# One optimiser step of a ResNet-50.


def _resnet50(optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> Callable[[], Any]:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    parameters = list(resnet50(num_classes=1).parameters())
    for i, parameter in enumerate(parameters):
        parameter.grad = 0.01 * _normal(*parameter.shape, seed=i)
    made = optimizer(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-6},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )

    def step() -> Any:
        made.step()
        return parameters

    return step


def _lars_ours() -> Callable[[], Any]:
    import nnclr

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return nnclr.LARS([groups[0], {**groups[1], "trust_coefficient": None}], lr=0.3, momentum=0.9)

    return _resnet50(optimizer)


def _lars_lightly() -> Callable[[], Any]:
    from lightly.utils.lars import LARS

    return _resnet50(lambda groups: LARS(groups, lr=0.3, momentum=0.9))


LARS = {"nnclr": _lars_ours, "lightly": _lars_lightly}


def _lars_check() -> str:
    ours, theirs = _lars_ours(), _lars_lightly()
    for _ in range(3):
        one, two = ours(), theirs()
    gap = max(((a - b).norm() / a.norm()).item() for a, b in zip(one, two, strict=True))
    if gap > 1e-4:  # they divide by |g| + decay * |w| where the paper has |g + decay * w|
        raise AssertionError(f"weights differ by {gap:.1e} after three steps")
    return f"weights equal to {gap:.0e} (relative) after three steps"


# kNN evaluation.


def _features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    centres = _normal(100, 512, seed=9)
    labels = torch.randint(0, 100, (60_000,), generator=torch.Generator().manual_seed(1))
    features = F.normalize(centres[labels] + 2.5 * _normal(60_000, 512, seed=2), dim=1)
    return features[:50_000], labels[:50_000], features[50_000:]


def _knn_ours() -> Callable[[], Any]:
    from nnclr.evaluation.knn import knn_predict

    train, labels, test = _features()
    return lambda: knn_predict(train, labels, test, 100, k=200, temperature=0.1)


def _knn_lightly() -> Callable[[], Any]:
    import lightly

    path = f"{lightly.__path__[0]}/utils/benchmarking/knn.py"  # its package would import Lightning
    spec = importlib.util.spec_from_file_location("lightly_knn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, labels, test = _features()
    bank = train.T.contiguous()

    def run() -> Any:
        return torch.cat([module.knn_predict(rows, bank, labels, 100, 200, 0.1)[:, 0] for rows in test.split(512)])

    return run


KNN = {"nnclr": _knn_ours, "lightly": _knn_lightly}


def _knn_check() -> str:
    same = (_knn_ours()() == _knn_lightly()()).float().mean().item()
    if same < 0.999:
        raise AssertionError(f"{100 * same:.2f} % of the predictions are equal")
    return f"{100 * same:.2f} % of 10,000 predictions equal (lightly adds its votes up in float32)"


# Import.


def _import(name: str) -> Callable[[], Callable[[], Any]]:
    def setup() -> Callable[[], Any]:
        def run() -> None:
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)

        return run

    return setup


IMPORTS = {
    "nnclr": _import("torch, nnclr; nnclr.SupportSet, nnclr.nnclr_loss, nnclr.Encoder"),
    "torch": _import("torch"),
}


CASES = {
    "lookup-large": Case(
        "look-up + loss + backward, batch 256, support set 98,304 x 256", "lightly", 4.0, BATCH, "images",
        _lookup(98_304, 256), _lookup_check(98_304, 256),
    ),
    "lookup-small": Case(
        "look-up + loss + backward, batch 256, support set 16,384 x 128", "lightly", 2.2, BATCH, "images",
        _lookup(16_384, 128), _lookup_check(16_384, 128),
    ),
    "lookup-crowded": Case(
        "the same with ten crowds of embeddings, similarity 0.9 inside", "lightly", 1.0, BATCH, "images",
        _lookup(16_384, 128, 0.9), _lookup_check(16_384, 128, 0.9),
    ),
    "views": Case(
        "two views of 32 x 32 images", "lightly", 10.0, 2 * BATCH, "views", VIEWS, lambda: _moments(VIEWS, 10),
    ),
    "jpeg": Case(
        "JPEG of 500 x 375 to two views of 224 x 224", "lightly", 4.0, FILES, "images", JPEG,
        lambda: _moments(JPEG, 4),
    ),
    "photo": Case(
        "JPEG of 3000 x 2000 to two views of 224 x 224", "lightly", 2.0, PHOTOS, "images", PHOTO,
        lambda: _moments(PHOTO, 80),
    ),
    "lars": Case("LARS step of a ResNet-50", "lightly", 1.5, 1, "steps", LARS, _lars_check),
    "knn": Case("kNN of 10,000 in 50,000 x 512, k = 200", "lightly", 1.7, 10_000, "queries", KNN, _knn_check),
    "import": Case("import", "torch", 1 / 1.3, 1, "imports", IMPORTS, lambda: "nothing to compare"),
}  # fmt: skip


def measure(case: str, side: str, seconds: float) -> dict[str, Any]:
    """CPU seconds of repeated calls, children included, and the memory that the first one takes on top, in MiB.

    At least three calls, or one that is long, after one that warms up.
    """
    run = CASES[case].sides[side]()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of the preparation
    before = _kib("VmRSS")
    run()
    extra = max(_kib("VmHWM") - before, 0) / 1024
    spent: list[float] = []
    while sum(spent) < seconds or (len(spent) < 3 and sum(spent) < 3 * seconds):
        began, children = time.process_time(), _children()
        run()
        spent.append(time.process_time() - began + _children() - children)
    return {"seconds": spent, "extra_mib": extra}


def _children() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _kib(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
