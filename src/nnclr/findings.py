"""What a run folder says, in words: read in whatever state it is, judged by its figures, open about what is absent."""

import html
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from nnclr import comparable
from nnclr.blotted import without_secrets
from nnclr.bounded_toml import parse_toml
from nnclr.errors import InputError
from nnclr.progress import duration
from nnclr.run_folder import read_lines

CLEARLY_BELOW = 0.95  # of the chance level: a loss under it is no accident of one batch
SLOW_LOADING = 0.25  # of the step time
Tone = Literal["good", "bad", "plain", "missing"]


@dataclass(frozen=True)
class Finding:
    """One sentence or two, what they are about, and whether that is good news."""

    topic: str
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Record:
    """What could be read of a run folder; `missing` names in sentences what could not."""

    path: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: list[dict[str, float]]  # by step; what is no finite number is left out
    evaluations: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    missing: tuple[str, ...]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a measure, for the lines that have it."""
        return [(int(line["step"]), line[name]) for line in self.metrics if name in line]

    def setting(self, name: str) -> float:
        """A number of the config; NaN where there is none."""
        value = _number(self.config.get(name))
        return math.nan if value is None else value

    @property
    def images(self) -> int | None:
        """Images that were trained on."""
        data = self.environment.get("data")
        count: float | None = _number(data.get("images")) if isinstance(data, dict) else None
        return None if count is None else int(count)

    @property
    def width(self) -> float:
        """Numbers in an embedding; NaN where it is not known."""
        if self.config.get("objective") != "supervised":
            return self.setting("embedding_dim")
        try:  # its embeddings are the backbone's features
            features = _number(json.loads((self.path / "encoder" / "config.json").read_bytes())["num_features"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            features = None
        return math.nan if features is None else features

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run."""
        epochs = self.setting("epochs") + _or(self.setting("extend_epochs"), 0.0)
        batch_size = self.setting("batch_size")
        if self.images is None or not 0 < epochs < 1e9 or not batch_size >= 1:
            return None
        return round(epochs * (self.images // int(batch_size)))

    @property
    def knn(self) -> list[dict[str, Any]]:
        """The online kNN evaluations by step: those of the largest group that can be compared with one another."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in self.evaluations:
            if line["protocol"] == "knn" and line["step"] is not None:
                groups.setdefault(comparable.key(line), []).append(line)
        largest = max(groups.values(), key=len, default=[])
        return sorted({line["step"]: line for line in largest}.values(), key=lambda line: line["step"])


def read_record(run: Path) -> Record:
    """Read a run folder in whatever state it is.

    Raises:
        InputError: if the folder holds no run at all.
    """
    if not (run / "config.toml").is_file():
        raise InputError(f"{run} is no run folder: it holds no config.toml; name the folder that was given as --out")
    missing: list[str] = []
    text = (run / "config.toml").read_bytes().decode("utf-8", "backslashreplace")
    try:
        config = parse_toml(text.encode())
    except ValueError:
        config = {}
        missing.append("config.toml is damaged; it is shown as it is.")
    try:
        environment = json.loads((run / "environment.json").read_bytes())
        if not isinstance(environment, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        environment = {}
        missing.append("environment.json is missing or damaged.")
    metrics = [_numbers(line) for line in _lines(run / "metrics.jsonl", missing) if _is_step(line.get("step"))]
    by_step = {line["step"]: line for line in metrics}
    results = [[_result(line) for line in _lines(run / f"{name}.jsonl", missing)] for name in _RESULT_FILES]
    evaluations, baselines = ([line for line in lines if line is not None] for lines in results)
    bad = _lines(run / "bad_samples.jsonl", missing)
    if not by_step:
        missing.append("There are no metrics: the run has not reached its first log line, or metrics.jsonl is gone.")
    ordered = [by_step[step] for step in sorted(by_step)]
    return Record(run, config, text, environment, ordered, evaluations, baselines, bad, tuple(missing))


_RESULT_FILES = ("evaluations", "baselines")


def _lines(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    lines, damaged = read_lines(path)
    if damaged:
        few, left = ("1 line", "is") if damaged == 1 else (f"{damaged} lines", "are")
        missing.append(f"{few} of {path.name} cannot be read, perhaps cut off by a kill, and {left} left out.")
    return lines


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: number for name, value in line.items() if (number := _number(value)) is not None}


def _result(line: dict[str, Any]) -> dict[str, Any] | None:
    """An evaluation whose fields have the types that are relied on, or None."""
    value, step, interval = _number(line.get("value")), line.get("step"), line.get("interval")
    if value is None or not isinstance(line.get("protocol"), str) or not isinstance(line.get("metric"), str):
        return None
    ends = [_number(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else [None]
    return line | {
        "value": value,
        "step": step if _is_step(step) else None,
        "interval": None if None in ends else ends,
        "parameters": line["parameters"] if isinstance(line.get("parameters"), dict) else {},
    }


# ---- in words ----------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share as `59.3 %`."""
    return f"{100 * share:.1f} %"


def judge(record: Record) -> Finding:
    """The verdict: did it learn? The topic is the headline, the text why."""
    finished = record.total is not None and record.step >= record.total
    learns = "It learned" if finished else "It is learning"
    if not finished and _ended_not_finite(record):
        text = "The loss or a gradient was not finite in too many steps; their batches are in nonfinite/."
        return Finding("It stopped", text, "bad")
    if not record.metrics:
        return Finding("Nothing to judge yet", "No line of metrics was logged.", "missing")
    if collapses(record)[1]:
        return Finding("It has collapsed", "See the warning below; what the encoder gives is of little use.", "bad")
    knn = record.knn
    if len(knn) > 1:
        first, last = knn[0], knn[-1]
        low = last["interval"][0] if last["interval"] else last["value"]
        before = "the untrained network" if first["step"] == 0 else f"step {first['step']}"
        if low > first["value"]:
            return Finding(learns, f"kNN accuracy is above that of {before} by more than its uncertainty.", "good")
        if last["value"] > first["value"]:
            text = f"kNN accuracy is above that of {before}, but by less than its uncertainty."
            return Finding("It is not clear yet", text, "missing")
        if last["interval"] and last["interval"][1] >= 1 and first["value"] >= last["interval"][0]:
            number = last.get("n_test", "the")
            text = f"{before} has {percent(first['value'])} already, of {number} images: too few or too easy to tell"
            return Finding("It cannot be told", f"{text[0].upper()}{text[1:]} by kNN accuracy.", "missing")
        return _no_sign(record, f"kNN accuracy is not above that of {before}")
    recent = recent_losses(record)
    if not recent:
        return Finding(
            "It cannot be told", "There is neither a kNN accuracy nor a chance level of the loss.", "missing"
        )
    if not _below_chance(recent):
        return _no_sign(record, "The loss is not clearly below its chance level")
    text = "The loss is well below its chance level and nothing has collapsed; without labels there is no more to say."
    return Finding(learns, text, "good")


def recent_losses(record: Record) -> list[tuple[float, float]]:
    """Loss and chance level of the later half of the logged steps, at most 20: one alone is that of one batch."""
    both = [(line["loss"], line["loss_chance"]) for line in record.metrics if {"loss", "loss_chance"} <= line.keys()]
    return both[-min(20, math.ceil(len(both) / 2)) :] if both else []


def _below_chance(recent: list[tuple[float, float]]) -> bool:
    losses, chances = zip(*recent, strict=True)
    return fmean(losses) < CLEARLY_BELOW * fmean(chances)


def _ended_not_finite(record: Record) -> bool:
    """Whether the last step that was skipped ended the run, and it has not gone on since."""
    last = max((record.path / "nonfinite").glob("step-*.json"), default=None)
    try:
        found = {} if last is None else json.loads(last.read_bytes())
        return found.get("ended_the_run") is True and int(found["step"]) >= record.step
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _no_sign(record: Record, text: str) -> Finding:
    """The verdict where nothing was learned, which so little training says nothing about."""
    if len(record.metrics) == 1:
        return Finding("It is too early to tell", f"{text}, and only one step was logged.", "missing")
    if record.metrics[-1].get("epoch", 1) < 1:
        return Finding("It is too early to tell", f"{text}, after less than one pass over the images.", "missing")
    return Finding("No sign of learning", f"{text}.", "bad")


def findings(record: Record) -> list[Finding]:
    """All that the figures say, one measure after the other."""
    made = [what(record), _loss(record), *_knn(record), *_neighbours(record), *_spread(record), *_operation(record)]
    return [*made, *(Finding("Damaged or missing", text, "bad") for text in record.missing)]


def collapses(record: Record) -> tuple[list[str], bool]:
    """The warnings that the run gave, from the same figures by the same rule, and whether it has not recovered."""
    from nnclr.health import CollapseMonitor  # here and below: it brings torch, which takes seconds to import

    monitor, warnings = CollapseMonitor(), []
    samples = _or(record.setting("batch_size"), 1)
    dim = _or(record.width, samples)
    for line in record.metrics:
        if {"embedding_std", "rank_me"} <= line.keys():
            warning = monitor.observe(
                step=int(line["step"]),
                std=line["embedding_std"],
                rank=line["rank_me"],
                dim=int(dim),
                samples=int(samples),
                distinct=line.get("distinct_neighbours"),
            )
            warnings += [] if warning is None else [warning]
    return warnings, monitor.low >= monitor.patience


def jumps(record: Record) -> list[str]:
    """The warnings that the run gave of a loss or a gradient far above what was usual."""
    from nnclr.health import jump_monitors

    monitors = jump_monitors()
    said = [
        monitor.observe(int(line["step"]), line[name])
        for line in record.metrics
        for name, monitor in monitors.items()
        if name in line
    ]
    return [warning for warning in said if warning is not None]


def earlier(points: list[tuple[int, float]], show: Callable[[float], str]) -> str:
    """`34.0 % at step 10`: a measure as it was first logged; empty where it was logged once."""
    return f"{show(points[0][1])} at step {points[0][0]:,}" if len(points) > 1 else ""


def took(record: Record) -> str:
    """Time that the logged steps took, in words; empty where it is not known."""
    whole = seconds(record)
    return "" if whole == 0 else "less than a second" if whole < 1 else duration(whole)


def seconds(record: Record) -> float:
    """Time that the logged steps took, without evaluations and checkpoints."""
    steps = [{"images": 0.0}, *record.metrics]
    return sum(
        (line["images"] - before["images"]) / line["images_per_second"]
        for before, line in pairwise(steps)
        if line.get("images_per_second", 0) > 0 and "images" in line and "images" in before
    )


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _or(value: float, default: float) -> float:
    return value if math.isfinite(value) else default


def what(record: Record) -> Finding:
    """What was trained on what, and how far."""
    config, data = record.config, record.environment.get("data")
    name = data.get("name") if isinstance(data, dict) else config.get("data")
    images = "" if record.images is None else f" on {record.images:,} images"
    epochs = record.metrics[-1].get("epoch") if record.metrics else None
    passed = "" if epochs is None else f", {epochs:.3g} epoch{'' if epochs == 1 else 's'}"
    of = "" if record.total is None else f" of {record.total:,}"
    time = f" The steps took {took(record)}." if took(record) else ""
    text = (
        f"{config.get('objective', 'An unknown objective')} trained {config.get('backbone', 'an unknown backbone')}"
        f"{images} of {name or 'unknown data'}: step {record.step:,}{of}{passed}, batch "
        f"{config.get('batch_size', 'unknown')}, {config.get('image_size', '?')} px.{time}"
    )
    if record.total is not None and record.step < record.total:
        return Finding("Training", f"{text} It is not finished: the same command goes on.", "missing")
    return Finding("Training", text)


def _loss(record: Record) -> Finding:
    loss, chance = record.series("loss"), dict(record.series("loss_chance"))
    if not loss:
        return Finding("Loss", "No loss was logged.", "missing")
    step, last = loss[-1]
    text = _joined(f"{last:.3f} at step {step:,}", earlier(loss, "{:.3f}".format))
    if step not in chance:
        return Finding("Loss", f"{text}; this objective has no chance level.", "plain")
    level, recent = chance[step], recent_losses(record)
    below = _below_chance(recent)
    if below != _below_chance(recent[-1:]):
        text += f", {fmean(loss for loss, _ in recent):.3f} on average of the last {len(recent)} that were logged"
    if not below:
        return Finding("Loss", f"{text}. Chance is {level:.3f}: it is no better than guessing.", "bad")
    return Finding("Loss", f"{text}; guessing would give {level:.3f}.", "good")


def _knn(record: Record) -> Iterator[Finding]:
    knn = record.knn
    if not knn:
        if record.setting("evaluate_every_epochs") == 0:
            why = "evaluate_every_epochs is 0"
        elif record.series("neighbour_purity"):
            why = "there are too few images or classes to hold some out, or no labels for the test images"
        else:
            why = "no labels" if record.series("neighbour_similarity") else "no labels, or too few images or classes"
        yield Finding("kNN accuracy", f"Not measured: {why}.", "missing")
        return
    first, last = knn[0], knn[-1]
    interval = "" if last["interval"] is None else f" (95 %: {' to '.join(percent(end) for end in last['interval'])})"
    parameters = ", ".join(
        f"{name} = {last['parameters'][name]}" for name in ("k", "temperature") if name in last["parameters"]
    )
    text = (
        f"{percent(last['value'])}{interval} at step {last['step']:,}, of {last.get('n_test', 'unknown')} images of "
        f"{last.get('test', 'unknown data')}{f', {parameters}' if parameters else ''}."
    )
    tone: Tone = "plain"
    if len(knn) > 1:
        before = "untrained" if first["step"] == 0 else f"at step {first['step']:,}"
        low = last["interval"][0] if last["interval"] else last["value"]
        text = f"{percent(first['value'])} {before}, {text}"
        tone = "good" if low > first["value"] else "plain" if last["value"] > first["value"] else "bad"
    best = max(knn, key=lambda line: line["value"])
    if last["interval"] and best["value"] > last["interval"][1]:
        text += f" It was best at step {best['step']:,}: {percent(best['value'])}."
    yield Finding("kNN accuracy", text, tone)
    for line in same_measure(last, record.baselines):
        text = f"{percent(line['value'])} by {line.get('encoder_name', 'an unnamed encoder')}, the same way"
        if line["value"] < last["value"]:
            yield Finding("Baseline", f"{text}.", "plain")
        elif line["value"] == last["value"]:
            yield Finding("Baseline", f"{text}: as much as the trained encoder.", "plain")
        else:
            yield Finding("Baseline", f"{text}: more than the trained encoder.", "bad")


def same_measure(line: dict[str, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of others that can stand beside one, the latest of each encoder."""
    key = comparable.key(line)
    return list({str(other.get("encoder_name")): other for other in others if comparable.key(other) == key}.values())


def _neighbours(record: Record) -> Iterator[Finding]:
    purity, age = record.series("neighbour_purity"), record.series("neighbour_age")
    similarity, own = record.series("neighbour_similarity"), record.series("own_id_share")
    if not similarity:
        if record.metrics:
            text = f"{record.config.get('objective', 'The objective')} looks up none, so they have no purity or age."
            filled = record.series("support_set_fill")
            if filled and filled[-1][1] > 0:
                text = "The objective does not say which ones it took, so they have no purity or age."
            elif math.isfinite(record.setting("support_set_size")):
                text = "None was looked up in what was logged: the support set is empty at first."
            yield Finding("Neighbours", text, "missing")
        return
    if purity:
        tone: Tone = "good" if purity[-1][1] > purity[0][1] + 0.02 else "plain"
        text = f"{percent(purity[-1][1])} of the neighbours have their query's label"
        yield Finding("Neighbour purity", f"{_joined(text, earlier(purity, percent))}.", tone)
    else:
        yield Finding("Neighbour purity", "Not measured: no labels.", "missing")
    text = _joined(f"{similarity[-1][1]:.2f} (cosine)", earlier(similarity, "{:.2f}".format))
    yield Finding("Neighbour similarity", f"{text}.")
    if age:
        size = record.setting("support_set_size")
        added = record.setting("batch_size") * (2 if record.config.get("enqueue_both_views") is True else 1)
        text = f"{age[-1][1]:.1f} steps on average"
        if math.isfinite(size) and added >= 1:
            text += f"; the support set of {size:,.0f} entries is renewed every {size / added:,.3g} steps"
        yield Finding("Neighbour age", f"{text}.")
    if own:
        often = own[-1][1] > 0.3
        text = f"{percent(own[-1][1])} of the neighbours are an older embedding of the image itself"
        advice = ": they teach little; use a smaller --support-set-size or --exclude-own-id" if often else ""
        yield Finding("Own image", f"{text}{advice}.", "bad" if often else "plain")


def _spread(record: Record) -> Iterator[Finding]:
    rank, std = record.series("rank_me"), record.series("embedding_std")
    most = min(_or(record.width, math.inf), _or(record.setting("batch_size"), math.inf))
    if rank:
        low = math.isfinite(most) and rank[-1][1] < 0.1 * most
        of = f" of at most {most:.0f}" if math.isfinite(most) else ""
        text = _joined(f"{rank[-1][1]:.1f}{of} (width and batch)", earlier(rank, "{:.1f}".format))
        yield Finding(
            "Effective rank", text + (": less than a tenth is used." if low else "."), "bad" if low else "good"
        )
    if std:
        low = std[-1][1] < 0.1
        text = f"{std[-1][1]:.2f}; 1 is spread over the sphere, 0 is a single point."
        yield Finding("Embedding deviation", text, "bad" if low else "plain")
    warnings, now = collapses(record)
    for warning in warnings[:5]:
        text = f"{warning[0].upper()}{warning[1:]}."
        yield Finding("Collapse", text if now else f"{text} It recovered.", "bad")
    if rank and std and not warnings:
        from nnclr.health import CollapseMonitor

        monitor, logged = CollapseMonitor(), min(len(rank), len(std))
        if logged < monitor.warmup + monitor.patience:
            text = f"Too few steps were logged to warn of one: {logged} of {monitor.warmup + monitor.patience}."
            yield Finding("Collapse", text, "missing")
        else:
            yield Finding("Collapse", "No warning in the whole run.", "good")


def _operation(record: Record) -> Iterator[Finding]:
    rate, waiting = record.series("images_per_second"), record.series("data_share")
    if rate:
        yield Finding("Speed", f"{median(value for _, value in rate):,.0f} images a second (median).")
    if waiting:
        share = fmean(value for _, value in waiting)
        text = f"{percent(share)} of the step time was spent waiting for images"
        if share > SLOW_LOADING:
            advice = "more --num-workers, or pictures stored at about twice --image-size, would help"
            yield Finding("Loading", f"{text}: {advice}.", "bad")
        else:
            yield Finding("Loading", f"{text}.", "good")
    skipped = record.series("skipped_steps")
    if skipped and skipped[-1][1]:
        text = f"{skipped[-1][1]:.0f} were skipped, whose loss or gradient was not finite: nonfinite/ describes them."
        yield Finding("Steps", text, "bad")
    for warning in jumps(record)[:5]:
        yield Finding("Jump", f"{warning[0].upper()}{warning[1:]}.", "bad")
    counted = record.series("bad_images")
    bad = len(record.bad) or (int(counted[-1][1]) if counted else 0)
    if bad:
        text = f"{bad:,} cannot be read and were skipped: bad_samples.jsonl lists them."
        yield Finding("Images", text, "bad")
    elif counted:
        yield Finding("Images", "All that came up could be read.", "good")


def escaped(value: Any) -> str:
    """Text from a run as HTML: no markup, no control or direction characters, no secrets."""
    text = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in without_secrets(str(value))
    )
    return html.escape(text)
