"""What a person sees of a long run: one line now and then, and a live bar on a terminal."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SLOW_DATA = 0.2  # share of the step time spent waiting for batches above which it is said
ESTIMATE_AFTER = 10.0  # seconds without a line of figures
_EVERY = 10.0  # seconds between two lines
_EVERY_OF_MANY = 30.0  # the same in one of many runs
_one_of_many: ContextVar[bool] = ContextVar("one_of_many", default=False)


def duration(seconds: float) -> str:
    """Seconds as `48 s`, `12 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def one_of_many() -> Iterator[None]:
    """While entered, a quiet run still says how far it is: a bar on a terminal, else a line every half minute."""
    token = _one_of_many.set(True)
    try:
        yield
    finally:
        _one_of_many.reset(token)


class Reporter:
    """Prints lines; on a terminal a bar with step, rate and time left stands below them.

    Args:
        total: steps of the whole run.
        quiet: print nothing at all, but for `one_of_many`.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.quiet, self.total = quiet, total
        self._far = quiet and _one_of_many.get()
        self._began: tuple[int, float] | None = None  # step and time at the end of the first step
        self._said = time.perf_counter()
        self._console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = None
        if self._console.is_terminal and (self._far or not quiet):
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self._console.print(text, markup=False)

    def step(self, step: int, description: str) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=description)
        elif self._far:
            self._how_far(step, description)

    def _how_far(self, step: int, description: str) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = step, now
        first, began = self._began
        if now - self._said < _EVERY_OF_MANY or step in (first, self.total):
            return
        left = duration((self.total - step) * (now - began) / (step - first))
        self._console.print(f"  step {step} of {self.total}, {description}, {left} left", markup=False)
        self._said = now

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class Lines:
    """A line every ten seconds of work that goes through images: how many, how fast, how long still.

    Args:
        what: is being done, and to what.
        total: images.
        start: those that were done before.
        say: takes the lines.
    """

    def __init__(self, what: str, total: int, start: int, say: Callable[[str], None]) -> None:
        self.what, self.total, self.start, self.say = what, total, start, say
        self._began = self._said = time.perf_counter()

    def at(self, done: int) -> None:
        """Note that so many images are done, those from before included."""
        now = time.perf_counter()
        if now - self._said > _EVERY and done < self.total:
            rate = (done - self.start) / (now - self._began)
            left = duration((self.total - done) / rate)
            self.say(f"{self.what}: {done} of {self.total} images, {rate:.0f} img/s, {left} left")
            self._said = now


class Window:
    """Time since the last log line; evaluations and checkpoints are counted apart."""

    def __init__(self) -> None:
        self.began, self.steps, self.data, self.aside = time.perf_counter(), 0, 0.0, 0.0

    def add(self, data_seconds: float) -> None:
        """Count a step that waited so long for its batch."""
        self.steps += 1
        self.data += data_seconds

    def exclude(self, seconds: float) -> None:
        """Take time out of the window, and count it apart."""
        self.began += seconds
        self.aside += seconds

    def seconds(self) -> float:
        """Length of the window."""
        return max(time.perf_counter() - self.began, 1e-9)

    def rate(self, batch_size: int) -> float:
        """Images a second."""
        return self.steps * batch_size / self.seconds()

    def data_share(self) -> float:
        """Share of the window spent waiting for batches, in [0, 1]."""
        return min(self.data / self.seconds(), 1.0)

    def aside_share(self) -> float:
        """Share of all time that evaluations and checkpoints took, in [0, 1]."""
        return self.aside / (self.aside + self.seconds())


def slow_data(share: float, workers: int, cores: int) -> str | None:
    """What to do where steps wait for batches; None where they do not.

    Args:
        share: of the step time spent waiting, in [0, 1].
        workers: decoding threads.
        cores: of the machine, for this process.
    """
    if share <= SLOW_DATA:
        return None
    text = f"data: {100 * share:.0f} % of step time with {workers} worker{'' if workers == 1 else 's'}"
    if workers < cores:
        enough = math.ceil(max(workers, 1) / (1 - min(share, 0.875))) + 1
        return f"{text}; try --num-workers {min(enough, cores)}"
    return f"{text}, as many as cores; decoding is the limit: smaller files by `nnclr pack`, or more cores"


def metrics_line(step: int, total: int, values: dict[str, Any], seconds_left: float) -> str:
    """One line a person can read: loss beside its chance level, neighbour health, rate and time left."""
    chance = f" (chance {values['loss_chance']:.2f})" if "loss_chance" in values else ""
    parts = [f"step {step:>5}/{total}", f"loss {values['loss']:.3f}{chance}" if "loss" in values else "skipped"]
    if "neighbour_purity" in values:
        parts.append(f"neighbour purity {100 * values['neighbour_purity']:.0f} %")
    elif "neighbour_similarity" in values:
        parts.append(f"neighbour similarity {values['neighbour_similarity']:.2f}")
    if "embedding_std" in values:
        parts.append(f"std {values['embedding_std']:.2f}")
    parts.append(f"lr {values['learning_rate']:.3g}")
    parts += [f"{values['images_per_second']:.0f} img/s", f"{duration(seconds_left)} left"]
    if values["data_share"] > SLOW_DATA:
        parts.append(f"data: {100 * values['data_share']:.0f} % of step time")
    return "  ".join(parts)
