"""TensorBoard, Weights & Biases and MLflow: the lines of metrics.jsonl and evaluations.jsonl, handed on as they come.

The JSONL files are the record and are always written; these are copies, and none of them can stop a run. Projects,
servers and offline modes are set as these tools have it (WANDB_MODE, MLFLOW_TRACKING_URI and their like).
"""

import importlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nnclr.checkpoint import write_atomically
from nnclr.errors import InputError

# Where each is found, a name that a true one has (a folder called wandb can be imported too), how to get it.
_NEEDED = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter", "nnclr[tensorboard]"),
    "wandb": ("wandb", "init", "wandb"),
    "mlflow": ("mlflow", "start_run", "mlflow"),
}


def require(kinds: Sequence[str]) -> None:
    """Nothing, where every library of `log_to` can be imported.

    Raises:
        InputError: naming the first that cannot.
    """
    for kind in kinds:
        module, name, package = _NEEDED[kind]
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            raise InputError(f"log_to={kind} needs {kind}, which is not installed; pip install '{package}'")


class Sink(Protocol):
    """One such tool."""

    def write(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""
        ...

    def close(self, finished: bool) -> None:
        """Write out what is left, and say whether the run reached its end."""
        ...


class Tracker:
    """Hands lines to the tools of `log_to`; one that fails is named once and left out from then on.

    A resumed run repeats the steps after its checkpoint. TensorBoard is told to forget them; the others keep what
    they have: `tracking.json` in the run folder holds the run's id there and the last step that was handed on.

    Args:
        kinds: of `log_to`.
        run: the run folder.
        step: of the checkpoint that is continued; -1 for a fresh run.
        config: settings, for the record.
        say: prints a line.
    """

    def __init__(
        self, kinds: Sequence[str], run: Path, step: int, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self._path, self._say = run / "tracking.json", say
        self._states = _read(self._path)
        self._sinks: dict[str, Sink] = {}
        for kind in kinds:
            with self._guard(kind):
                if kind == "tensorboard":
                    self._sinks[kind] = _TensorBoard(run, step, config)
                    continue
                state = self._states.setdefault(kind, {})
                self._sinks[kind] = _WandB(run, config, state) if kind == "wandb" else _MLflow(run, config, state)
                self._save()

    def metrics(self, line: dict[str, Any]) -> None:
        """Hand on a line of metrics.jsonl: every number under its own name."""
        self._write("metrics", line["step"], {name: value for name, value in line.items() if name != "step"})

    def evaluation(self, line: dict[str, Any]) -> None:
        """Hand on a line of evaluations.jsonl: its value, as `evaluation/PROTOCOL/METRIC`."""
        self._write("evaluations", line["step"], {f"evaluation/{line['protocol']}/{line['metric']}": line["value"]})

    def close(self, finished: bool) -> None:
        """Write out what is left; a run that did not reach its end is not shown as finished."""
        for kind, sink in list(self._sinks.items()):
            with self._guard(kind):
                sink.close(finished)
        self._sinks.clear()

    def _write(self, what: str, step: int, values: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        for kind, sink in list(self._sinks.items()):
            with self._guard(kind):
                state = self._states.get(kind)  # None for TensorBoard
                if state is not None:
                    if step <= state.get(what, -1):
                        continue
                    state[what] = step
                    self._save()  # before it is handed on: a kill in between loses a line and doubles none
                sink.write(numbers, step)

    def _save(self) -> None:
        write_atomically(self._path, (json.dumps(self._states) + "\n").encode())

    @contextmanager
    def _guard(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in there, the training goes on
            self._sinks.pop(kind, None)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._say(f"warning: logging to {kind} failed ({reason}); it gets no more lines, the run folder does")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        states = json.loads(path.read_text())
        return {kind: dict(state) for kind, state in states.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: a new run there
        return {}


class _TensorBoard:
    def __init__(self, run: Path, step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        if step < 0:
            self._writer.add_text("config", "".join(f"    {name} = {value!r}\n" for name, value in config.items()), 0)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, config: dict[str, Any], state: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        state.setdefault("id", secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nnclr"),
            name=os.environ.get("WANDB_NAME", run.name),
            id=state["id"],
            resume="allow",
            dir=str(run),
            config=config,
        )

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    def __init__(self, run: Path, config: dict[str, Any], state: dict[str, Any]) -> None:
        self._mlflow = mlflow = importlib.import_module("mlflow")
        known = state.get("id")
        opened = mlflow.start_run(run_id=known, run_name=run.name if known is None else None, nested=True)
        if known is None:
            state["id"] = opened.info.run_id
            mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def write(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)

    def close(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "KILLED")
