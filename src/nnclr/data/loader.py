"""Batches of augmented views, each a pure function of (seed, step): order, workers, resume.

There is no loader state to save. Which images step s trains on follows from (seed, epoch, position), how
they are augmented from (seed, epoch, image id, view); so neither the number of workers nor an interruption
can change them.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nnclr import counter
from nnclr.data.ahead import AskedToStop, Threads, ahead, threads_for
from nnclr.data.augment import (
    Parameters,
    View,
    augment,
    crop_image,
    draw_boxes,
    draw_operations,
    finish,
    upload,
)
from nnclr.data.decode import BadImage
from nnclr.data.images import Source
from nnclr.errors import DataError

MOST_BAD = 0.001  # share of unreadable images above which a run stops, but not for 10 or fewer unless they are all
_RESIDENT_BYTES = {"cpu": 4 << 30, "cuda": 20 << 30}
_RESIDENT_PIXELS_CPU = 128  # above this side a resize in threads is faster than a batched product
_REDUCTIONS = (1, 2, 4, 8)  # of the sides, that JPEG decoding offers
_PART = 16  # images that a thread takes at a time
_TOGETHER = 16 << 20  # bytes of decoded images above which a thread cuts them before it decodes more
_AHEAD = {"cpu": 1, "cuda": 3}  # batches that are made before they are asked for


class Batch(NamedTuple):
    """What one training step sees."""

    step: int
    ids: Tensor  # (B,) int64 on the device
    views: list[Tensor]  # a view: (B, 3, s, s) float32 or bfloat16 on the device, normalised
    seconds: float  # time the loop waited for it


class Loader(Protocol):
    """Batches of the steps start, start + 1, ..., stop - 1."""

    bad: dict[int, str]
    """Image id -> why it cannot be read; such an image is replaced by another one."""

    def batches(self, start: int, stop: int, asked: Callable[[], bool] | None = None) -> Iterator[Batch]:
        """Yield the batches in order; the views are a pure function of the seed and the step.

        They end early where `asked` says so while images are waited for.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """Which images a step trains on, and how they are augmented.

    Args:
        images: in the source.
        batch_size: of all ranks together.
        views: how each view is made.
        seed: of the order.
        rank: of this process, which takes that share of every batch.
        ranks: number of processes; it divides the batch size.
        blocks: images in each shard, where the source has them.
        window: shards whose images are mixed.
    """

    images: int
    batch_size: int
    views: tuple[View, ...]
    seed: int
    rank: int = 0
    ranks: int = 1
    blocks: tuple[int, ...] | None = None
    window: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the images of the last, short one come up in other epochs."""
        return self.images // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def ids(self, step: int, order: np.ndarray) -> np.ndarray:
        """This rank's image ids of a step, (B / ranks,), given its epoch's order."""
        start = self._position(step)
        return order[start : start + self.batch_size // self.ranks]

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """Another image for a row whose image cannot be read; the same one in every repetition."""
        return counter.draw(self.seed, self.epoch(step), self._position(step) + row, attempt, self.images)

    def _position(self, step: int) -> int:
        """Where this rank's rows of a step begin in the order of its epoch."""
        share = self.batch_size // self.ranks
        return step % self.steps_per_epoch * self.batch_size + self.rank * share

    def orders(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, ids) for each step; an epoch's order is computed once."""
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(start, stop):
            if self.epoch(step) != epoch:
                epoch = self.epoch(step)
                blocks = (self.images,) if self.blocks is None else self.blocks
                order = counter.block_permutation(self.seed, epoch, blocks, self.window)
            yield step, self.ids(step, order)


def create_loader(
    source: Source, plan: Plan, device: torch.device, num_workers: int, dtype: torch.dtype = torch.float32
) -> Loader:
    """Keep a small set of equally sized images on the device; decode others in threads, step by step.

    Args:
        source: where the images come from.
        plan: order and augmentation.
        device: where the views are wanted.
        num_workers: threads that decode.
        dtype: of the views; bfloat16 for a network that computes in it, on another device than the CPU.

    Raises:
        DataError: if too many images cannot be read.
    """
    plan = replace(plan, blocks=source.blocks, window=source.window)
    images, bad = load_resident(source, device, num_workers)
    if images is not None:
        return ResidentLoader(images, bad, plan, device, dtype)
    return StreamLoader(source, plan, device, num_workers, dtype)


def load_resident(source: Source, device: torch.device, num_workers: int) -> tuple[Tensor | None, dict[int, str]]:
    """All images as one uint8 tensor (n, 3, h, w) on the device, or None where that does not suit them.

    Unreadable images stay black and are named in the second value.
    """
    bad: dict[int, str] = {}
    with Threads(1) as pool:  # one after the other, but not in this thread: a read that hangs is named
        read = (pool.wait_for(pool.submit(_read, source, i, bad)) for i in range(len(source)))
        first = next((image for image in read if image is not None), None)
    if first is None:
        raise _none_left(bad, source)
    too_large = len(source) * first.nbytes > _RESIDENT_BYTES[device.type]
    if too_large or (device.type == "cpu" and max(first.shape[:2]) > _RESIDENT_PIXELS_CPU):
        return None, {}
    images = torch.zeros(len(source), 3, *first.shape[:2], dtype=torch.uint8)
    for i, image in enumerate(ahead(lambda i: _read(source, i, bad), range(len(source)), num_workers)):
        if image is None:
            continue
        if image.shape != first.shape:
            return None, {}
        images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: some may not be written
    check_bad(bad, source)
    return images.to(device), bad


def most_bad(images: int) -> int:
    """Unreadable images that a run goes on without."""
    return max(10, int(MOST_BAD * images))


def check_bad(bad: dict[int, str], source: Source) -> None:
    """Stop a run whose data is going bad.

    Raises:
        DataError: above max(10, 0.1 %) unreadable images, or if none is left.
    """
    limit = most_bad(len(source))
    if bad and len(bad) == len(source):
        raise _none_left(bad, source)
    if len(bad) > limit:
        where, why = next(iter(bad.items()))
        raise DataError(
            f"at least {len(bad)} of the {len(source)} images of {source.name} cannot be read, more than the {limit} "
            f"that are left out; the first is {source.describe(where)} ({why}): remove or repair those that "
            "nnclr data check lists",
            bad,
        )


def _none_left(bad: dict[int, str], source: Source) -> DataError:
    where, why = next(iter(bad.items()))
    first = f"the first is {source.describe(where)} ({why})"
    return DataError(f"none of the {len(source)} images of {source.name} can be read; {first}", bad)


def _read(
    source: Source, i: int, bad: dict[int, str], reduction: Callable[[int, int], int] | None = None
) -> np.ndarray | None:
    try:
        return source.read(i, reduction)
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
        dtype: of the views.
    """

    def __init__(
        self,
        images: Tensor,
        bad: dict[int, str],
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.images, self.bad, self.plan, self.device, self.dtype = images, bad, plan, device, dtype

    def batches(self, start: int, stop: int, asked: Callable[[], bool] | None = None) -> Iterator[Batch]:
        """See `Loader.batches`; nothing is ever waited for."""
        for step, ids in self.plan.orders(start, stop):
            began = time.perf_counter()
            ids = self._replace_bad(step, ids)
            on_device = upload(ids, self.device)
            plan = self.plan
            views = augment(self.images[on_device], ids, plan.views, plan.seed, plan.epoch(step), self.dtype)
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


@dataclass
class _Work:
    """A batch in the making, whose rows are filled by several threads in any order."""

    step: int
    ids: np.ndarray  # (B,) int64
    drawn: list[tuple[Parameters, np.ndarray]]  # a view: what is done to its images, and the numbers for the boxes
    buffers: list[Tensor]  # a view: (B, 3, s, s)


class _Image(NamedTuple):
    """A decoded image, whose sides may be a half, a quarter or an eighth of what they are in the file."""

    pixels: np.ndarray  # (h, w, 3) uint8
    size: tuple[int, int]  # height and width in the file, which boxes are drawn for
    reduction: int

    def crop(self, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
        """`crop_image` of a box in the file's pixels."""
        if self.reduction > 1:
            first, end = np.round(box[:2] / self.reduction), np.round((box[:2] + box[2:]) / self.reduction)
            end = np.minimum(end, self.pixels.shape[:2])
            box = np.concatenate([first, end - first]).astype(np.int64)
        return crop_image(self.pixels, box, flip, size)


class StreamLoader:
    """Images of any size, decoded once and cut for all views by threads.

    On a CPU the threads also finish the views, each image while it is in their cache; another device finishes whole
    batches.

    Args:
        source: where the images come from.
        plan: order and augmentation.
        device: where the views are wanted.
        num_workers: threads (what takes time runs outside the interpreter lock); 0 for one that only works while
            the caller waits.
        dtype: of the views; on a CPU float32.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        device: torch.device,
        num_workers: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.plan, self.device, self.num_workers, self.dtype = source, plan, device, num_workers, dtype
        self.bad: dict[int, str] = {}
        self._memory = [_Memory(plan.batch_size // plan.ranks, view.size, device) for view in plan.views]

    def batches(self, start: int, stop: int, asked: Callable[[], bool] | None = None) -> Iterator[Batch]:
        """See `Loader.batches`."""
        most = _AHEAD[self.device.type] if self.num_workers else 0
        pool = _one_thread_each(threads_for(self.num_workers))
        try:
            waiting: deque[tuple[_Work, list[Future[None]]]] = deque()
            for step, ids in self.plan.orders(start, stop):
                work = self._begin(step, ids)
                parts = [range(row, min(row + _PART, len(ids))) for row in range(0, len(ids), _PART)]
                waiting.append((work, [pool.submit(self._fill, work, part) for part in parts]))
                if len(waiting) > most:
                    yield self._wait(pool, *waiting.popleft(), asked)
            while waiting:
                yield self._wait(pool, *waiting.popleft(), asked)
        except AskedToStop:
            return
        finally:
            pool.close()

    def _begin(self, step: int, ids: np.ndarray) -> _Work:
        plan = self.plan
        drawn = [
            draw_operations(view, plan.seed, plan.epoch(step), ids, index) for index, view in enumerate(plan.views)
        ]
        return _Work(step, ids.copy(), drawn, [memory.take() for memory in self._memory])

    def _fill(self, work: _Work, rows: range) -> None:
        """Make some rows of every view."""
        images: dict[int, _Image] = {}
        for row in rows:
            images[row] = self._image(work, row)
            if row == rows[-1] or sum(image.pixels.nbytes for image in images.values()) > _TOGETHER:
                self._cut(work, images)
                images = {}

    def _cut(self, work: _Work, images: dict[int, _Image]) -> None:
        """Make the rows of every view from their images, one kind of work after the other: its code is in the cache."""
        at = slice(min(images), max(images) + 1)
        heights, widths = np.array([image.size for image in images.values()]).T
        views = list(zip(self.plan.views, work.drawn, work.buffers, strict=True))
        for view, (parameters, numbers), _ in views:
            parameters.boxes[at] = draw_boxes(view, numbers[at], heights, widths)
        cut = [
            [
                torch.from_numpy(image.crop(parameters.boxes[row], bool(parameters.flips[row]), view.size))
                for view, (parameters, _), _ in views
            ]
            for row, image in images.items()
        ]
        for row, crops in zip(images, cut, strict=True):
            one = slice(row, row + 1)
            for crop, (view, (parameters, _), buffer) in zip(crops, views, strict=True):
                if buffer.dtype == torch.uint8:
                    buffer[row] = crop
                else:
                    finish(crop[None], parameters[one], view, out=buffer[one])

    def _image(self, work: _Work, row: int) -> _Image:
        """The image of a row, or another one in its place."""
        plan, one, attempt = self.plan, slice(row, row + 1), 0
        while work.ids[row] in self.bad or (image := self._open(work, row)) is None:
            check_bad(dict(self.bad), self.source)
            work.ids[row] = plan.replacement(work.step, row, attempt)
            attempt += 1
            for index, (view, (parameters, numbers)) in enumerate(zip(plan.views, work.drawn, strict=True)):
                parameters[one], numbers[one] = draw_operations(
                    view, plan.seed, plan.epoch(work.step), work.ids[one], index
                )
        return image

    def _open(self, work: _Work, row: int) -> _Image | None:
        sizes = []

        def reduction(height: int, width: int) -> int:
            sizes.append((height, width))
            return self._reduction(work, row, height, width)

        pixels = _read(self.source, int(work.ids[row]), self.bad, reduction)
        if pixels is None:
            return None
        height, width = sizes[0] if sizes else pixels.shape[:2]
        factor = next(f for f in _REDUCTIONS if pixels.shape[:2] == (-(-height // f), -(-width // f)))
        return _Image(pixels, (height, width), factor)

    def _reduction(self, work: _Work, row: int, height: int, width: int) -> int:
        """How much smaller an image may be decoded, so that every crop still has at least the pixels of its view."""
        views = self.plan.views
        if min(height, width) < 2 * min(view.size for view in views):
            return 1
        boxes = [
            draw_boxes(view, numbers[row : row + 1], height, width)[0]
            for view, (_, numbers) in zip(views, work.drawn, strict=True)
        ]
        room = min(min(box[2:]) / view.size for view, box in zip(views, boxes, strict=True))
        return max(factor for factor in _REDUCTIONS if factor <= max(room, 1))

    def _wait(self, pool: Threads, work: _Work, parts: list[Future[None]], asked: Callable[[], bool] | None) -> Batch:
        began = time.perf_counter()
        for part in parts:
            pool.wait_for(part, asked)
        return self._finish(work, began)

    def _finish(self, work: _Work, began: float) -> Batch:
        views = work.buffers
        if self.device.type != "cpu":
            views = [
                finish(buffer.to(self.device, non_blocking=True), parameters, view, self.dtype)
                for buffer, (parameters, _), view in zip(work.buffers, work.drawn, self.plan.views, strict=True)
            ]
        return Batch(work.step, upload(work.ids, self.device), views, time.perf_counter() - began)


class _Memory:
    """Memory for the batches of one view, given out again when nobody looks at its last batch any more.

    Fresh memory comes from the system page by page, which takes a third as long as decoding the images.
    """

    def __init__(self, batch_size: int, size: int, device: torch.device) -> None:
        self._shape, self._device = (batch_size, 3, size, size), device
        self._free: deque[np.ndarray] = deque()

    def take(self) -> Tensor:
        """Views as float32 for a CPU; for another device crops as pinned uint8, copied without waiting."""
        if self._device.type != "cpu":
            # PyTorch keeps pinned memory, and gives it out again only when the copies from it have been made.
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        memory = self._free.popleft() if self._free else np.empty(self._shape, np.float32)
        lent = memory[:]  # all tensors of this batch hold it, and nothing else does
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


def _one_thread_each(workers: int) -> Threads:
    """Threads in which PyTorch uses the one that calls it and no more: there are enough of them."""
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # or the first operation would take the number of threads from elsewhere
        torch.set_num_threads(1)
        started.wait()

    threads = torch.get_num_threads()
    pool = Threads(workers, start)
    started.wait()
    torch.set_num_threads(threads)  # of this thread it has not changed, but for threads that are yet to start
    return pool
