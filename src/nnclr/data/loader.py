"""Batches of augmented views, each a pure function of (seed, step): order, workers, resume.

There is no loader state to save. Which images step s trains on follows from (seed, epoch, position), how
they are augmented from (seed, epoch, image id, view); so neither the number of workers nor an interruption
can change them.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nnclr import counter
from nnclr.data.augment import Parameters, View, augment, crop_image, draw_parameters, finish
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.errors import DataError

MOST_BAD = 0.001  # share of unreadable images above which a run stops, but never for 10 or fewer
_RESIDENT_BYTES = {"cpu": 4 << 30, "cuda": 20 << 30}
_RESIDENT_PIXELS_CPU = 128  # above this side Pillow's resize in threads is faster than a batched product
_AHEAD = 3  # batches that are decoded before they are asked for


class Batch(NamedTuple):
    """What one training step sees."""

    step: int
    ids: Tensor  # (B,) int64 on the device
    views: list[Tensor]  # a view: (B, 3, s, s) float32 on the device, normalised
    seconds: float  # time the loop waited for it


class Loader(Protocol):
    """Batches of the steps start, start + 1, ..., stop - 1."""

    bad: dict[int, str]
    """Image id -> why it cannot be read; such an image is replaced by another one."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches in order; the views are a pure function of the seed and the step."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which images a step trains on, and how they are augmented."""

    images: int
    batch_size: int
    views: tuple[View, ...]
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the images of the last, short one come up in other epochs."""
        return self.images // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def ids(self, step: int, order: np.ndarray) -> np.ndarray:
        """The (B,) image ids of a step, given its epoch's order."""
        start = step % self.steps_per_epoch * self.batch_size
        return order[start : start + self.batch_size]

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """Another image for a row whose image cannot be read; the same one in every repetition."""
        position = step % self.steps_per_epoch * self.batch_size + row
        return counter.draw(self.seed, self.epoch(step), position, attempt, self.images)

    def orders(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, ids) for each step; an epoch's order is computed once."""
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(start, stop):
            if self.epoch(step) != epoch:
                epoch = self.epoch(step)
                order = counter.permutation(self.seed, epoch, self.images)
            yield step, self.ids(step, order)


def create_loader(source: Source, plan: Plan, device: torch.device, num_workers: int) -> Loader:
    """Keep a small set of equally sized images on the device; decode others in threads, step by step.

    Raises:
        DataError: if too many images cannot be read.
    """
    images, bad = load_resident(source, device, num_workers)
    if images is not None:
        return ResidentLoader(images, bad, plan, device)
    return StreamLoader(source, plan, device, num_workers)


def load_resident(source: Source, device: torch.device, num_workers: int) -> tuple[Tensor | None, dict[int, str]]:
    """All images as one uint8 tensor (n, 3, h, w) on the device, or None where that does not suit them.

    Unreadable images stay black and are named in the second value.
    """
    bad: dict[int, str] = {}
    first = next((image for image in (_read(source, i, bad) for i in range(len(source))) if image is not None), None)
    if first is None:
        raise DataError(f"none of the {len(source)} images of {source.name} can be read: {next(iter(bad.values()))}")
    too_large = len(source) * first.nbytes > _RESIDENT_BYTES[device.type]
    if too_large or (device.type == "cpu" and max(first.shape[:2]) > _RESIDENT_PIXELS_CPU):
        return None, {}
    images = torch.zeros(len(source), 3, *first.shape[:2], dtype=torch.uint8)
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for i, image in enumerate(pool.map(lambda i: _read(source, i, bad), range(len(source)))):
            if image is None:
                continue
            if image.shape != first.shape:
                pool.shutdown(cancel_futures=True)
                return None, {}
            images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: some may not be written
    check_bad(bad, source)
    return images.to(device), bad


def check_bad(bad: dict[int, str], source: Source) -> None:
    """Stop a run whose data is going bad.

    Raises:
        DataError: above max(10, 0.1 %) unreadable images.
    """
    limit = max(10, int(MOST_BAD * len(source)))
    if len(bad) > limit:
        where, why = next(iter(bad.items()))
        raise DataError(
            f"{len(bad)} of the {len(source)} images of {source.name} cannot be read, more than the {limit} that "
            f"are skipped silently; the first is {source.describe(where)} ({why}): remove or repair them"
        )


def _read(source: Source, i: int, bad: dict[int, str]) -> np.ndarray | None:
    try:
        return source.read(i)
    except BadImage as error:
        bad[i] = str(error)
        return None


class ResidentLoader:
    """Views cut from images that are all on the device; the CPU only draws parameters.

    Args:
        images: (n, 3, h, w) uint8 on the device.
        bad: unreadable images, by id.
        plan: order and augmentation.
        device: where the views are made.
    """

    def __init__(self, images: Tensor, bad: dict[int, str], plan: Plan, device: torch.device) -> None:
        self.images, self.bad, self.plan, self.device = images, bad, plan, device

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See `Loader.batches`."""
        for step, ids in self.plan.orders(start, stop):
            began = time.perf_counter()
            ids = self._replace_bad(step, ids)
            on_device = torch.from_numpy(ids).to(self.device)
            plan = self.plan
            views = augment(self.images[on_device], ids, plan.views, plan.seed, plan.epoch(step))
            yield Batch(step, on_device, views, time.perf_counter() - began)

    def _replace_bad(self, step: int, ids: np.ndarray) -> np.ndarray:
        if not self.bad:
            return ids
        ids = ids.copy()
        for row in np.flatnonzero(np.isin(ids, list(self.bad))):
            attempt = 0
            while int(ids[row]) in self.bad:
                ids[row] = self.plan.replacement(step, int(row), attempt)
                attempt += 1
        return ids


class _Crops(NamedTuple):
    """One image, cut for every view, and the parameters of what remains to be done to each."""

    id: int
    images: list[np.ndarray]  # a view: (3, s, s) uint8
    parameters: list[Parameters]


class StreamLoader:
    """Images of any size, decoded once and cut for both views by threads; the device does the rest.

    Args:
        source: where the images come from.
        plan: order and augmentation.
        device: where the views are finished.
        num_workers: decoding threads (Pillow works outside the interpreter lock); 0 decodes in the caller.
    """

    def __init__(self, source: Source, plan: Plan, device: torch.device, num_workers: int) -> None:
        self.source, self.plan, self.device, self.num_workers = source, plan, device, num_workers
        self.bad: dict[int, str] = {}

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See `Loader.batches`."""
        if self.num_workers == 0:
            for step, ids in self.plan.orders(start, stop):
                began = time.perf_counter()
                yield self._finish(step, [self._cut(step, row, int(i)) for row, i in enumerate(ids)], began)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="decode")
        try:
            waiting: deque[tuple[int, list[Future[_Crops]]]] = deque()
            orders = self.plan.orders(start, stop)
            for step, ids in orders:
                waiting.append((step, [pool.submit(self._cut, step, r, int(i)) for r, i in enumerate(ids)]))
                if len(waiting) > _AHEAD:
                    yield self._wait(*waiting.popleft())
            while waiting:
                yield self._wait(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, step: int, crops: list[Future[_Crops]]) -> Batch:
        began = time.perf_counter()
        return self._finish(step, [future.result() for future in crops], began)

    def _cut(self, step: int, row: int, i: int) -> _Crops:
        attempt = 0
        while True:
            image = None if i in self.bad else _read(self.source, i, self.bad)
            if image is not None:
                break
            check_bad(dict(self.bad), self.source)
            i = self.plan.replacement(step, row, attempt)
            attempt += 1
        ids, epoch = np.array([i]), self.plan.epoch(step)
        height, width = image.shape[:2]
        parameters = [
            draw_parameters(view, self.plan.seed, epoch, ids, index, height, width)
            for index, view in enumerate(self.plan.views)
        ]
        cut = [
            crop_image(image, p.boxes[0], bool(p.flips[0]), view.size)
            for view, p in zip(self.plan.views, parameters, strict=True)
        ]
        return _Crops(i, cut, parameters)

    def _finish(self, step: int, crops: list[_Crops], began: float) -> Batch:
        views = []
        for index, view in enumerate(self.plan.views):
            images = torch.from_numpy(np.stack([crop.images[index] for crop in crops])).to(self.device)
            parameters = Parameters.concatenate([crop.parameters[index] for crop in crops])
            views.append(finish(images, parameters, view))
        ids = torch.tensor([crop.id for crop in crops], device=self.device)
        return Batch(step, ids, views, time.perf_counter() - began)
