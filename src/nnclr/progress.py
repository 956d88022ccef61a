"""What a person sees of a long run: one line now and then, and a live bar on a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """Seconds as `48 s`, `12 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Reporter:
    """Prints lines; on a terminal a bar with step, rate and time left stands below them.

    Args:
        total: steps of the whole run.
        quiet: print nothing at all.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = None
        if self._console.is_terminal and not quiet:
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

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def metrics_line(step: int, total: int, values: dict[str, Any], seconds_left: float) -> str:
    """One line a person can read: loss beside its chance level, neighbour health, rate and time left."""
    parts = [f"step {step:>5}/{total}", f"loss {values['loss']:.3f} (chance {values['loss_chance']:.2f})"]
    if "neighbour_purity" in values:
        parts.append(f"neighbour purity {100 * values['neighbour_purity']:.0f} %")
    elif "neighbour_similarity" in values:
        parts.append(f"neighbour similarity {values['neighbour_similarity']:.2f}")
    parts += [f"std {values['embedding_std']:.2f}", f"lr {values['learning_rate']:.3g}"]
    parts += [f"{values['images_per_second']:.0f} img/s", f"{duration(seconds_left)} left"]
    if values["data_share"] > 0.25:
        parts.append(f"data: {100 * values['data_share']:.0f} % of step time")
    return "  ".join(parts)
