"""Steps whose loss or gradient is not finite: noticed by all ranks, taken back, counted; the end of a run with many."""

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nnclr import distributed
from nnclr.checkpoint import write_atomically
from nnclr.data.loader import Batch
from nnclr.errors import NonFiniteError
from nnclr.objectives.objective import Output
from nnclr.support_set import SupportSet
from nnclr.train_state import TrainState

IN_A_ROW = 4  # steps that are not finite end a run,
SHARE, WINDOW = 0.01, 1000  # and so does a larger share of the last steps, where that is as many

_NOTE = "not_finite"  # in the state's notes: {"steps": ever skipped, "recent": numbers of those in the window}


def skipped_steps(notes: dict[str, Any]) -> int:
    """How many steps of a run were skipped, from the notes of its state."""
    return int(notes.get(_NOTE, {}).get("steps", 0))


def was_skipped(notes: dict[str, Any], number: int) -> bool:
    """Whether the step of this 0-based number, one of the last, was skipped."""
    return number in notes.get(_NOTE, {}).get("recent", [])


def too_many(recent: list[int], number: int) -> bool:
    """Whether a run should end.

    Args:
        recent: the steps among the last `WINDOW` that were not finite, in order; the last of them is `number`.
        number: 0-based.
    """
    if recent[-IN_A_ROW:] == list(range(number - IN_A_ROW + 1, number + 1)):
        return True
    return len(recent) >= IN_A_ROW and len(recent) > SHARE * min(number + 1, WINDOW)


class Undo:
    """Takes back what a step changed, where it was not finite, beside what `optim.guarded_step` leaves alone.

    That is what a forward moves (the statistics of batch norms), the averaged weights, and what the objective's
    `update` writes in place. Of those a copy is kept; support sets are told to take no rows instead, because they are
    large. Nothing waits for the device.

    Args:
        state: what is trained; its tensors stay the same ones.
    """

    def __init__(self, state: TrainState) -> None:
        self._support_sets = [of for of in state.objective.modules() if isinstance(of, SupportSet)]
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)  # by dtype: copied together, in a few launches
        modules = [state.objective] if state.average is None else [state.objective, state.average]
        for tensor in (*state.backbone.buffers(), *(t for of in modules for t in (*of.parameters(), *of.buffers()))):
            tensor = distributed.local(tensor.detach())
            groups[tensor.dtype].append(tensor)
        self._groups = [(live, [torch.empty_like(tensor) for tensor in live]) for live in groups.values()]

    @torch.no_grad()
    def remember(self) -> None:
        """Keep what is there now; call it before the forward."""
        for live, kept in self._groups:
            torch._foreach_copy_(kept, live)

    @contextmanager
    def unless(self, finite: Tensor) -> Iterator[None]:
        """Around the updates that follow the optimiser's step: at the end all is as it was where `finite` is false.

        Args:
            finite: 0-dim bool on the device.
        """
        for support_set in self._support_sets:
            support_set.writable = finite
        try:
            yield
        finally:
            for support_set in self._support_sets:
                support_set.writable = None
        with torch.no_grad():
            for live, kept in self._groups:
                for now, before in zip(live, kept, strict=True):
                    torch.where(finite, now, before, out=now)


class StepCheck:
    """Whether each step was finite and whether anybody asked to stop, decided alike on all ranks.

    A step that was not is skipped: `optim.guarded_step` and `Undo` see to it on the device. Here it is counted in the
    notes of the state, and described in `nonfinite/`. On CUDA the answer to a step is read after the next one was
    queued, so that nothing waits for the device; on the CPU it is read at once.

    Args:
        run: where a step that is not finite is described.
        state: after it was restored.
        device: of the run.
    """

    def __init__(self, run: Path, state: TrainState, device: torch.device) -> None:
        self.run, self.lag = run, int(device.type == "cuda")
        self.waiting: deque[_Posted] = deque()
        self._note: dict[str, Any] = state.notes.setdefault(_NOTE, {"steps": 0, "recent": []})
        networks = (("backbone", state.backbone), ("objective", state.objective))
        self._names = {id(p): name for prefix, of in networks for name, p in of.named_parameters(prefix=prefix)}

    def post(self, batch: Batch, out: Output, parameters: list[Tensor], asked: bool) -> tuple[Tensor, Tensor]:
        """Take a step after its backward.

        Args:
            batch: of the step.
            out: its loss, () float32.
            parameters: whose gradients are looked at.
            asked: whether this process was asked to stop.

        Returns:
            Norm of the whole gradient, and whether the step may be taken: 0-dim tensors on the device.
        """
        gradients = {self._names[id(p)]: p.grad for p in parameters if p.grad is not None}
        norms = norms_of(list(gradients.values()))
        norm, loss = torch.linalg.vector_norm(norms), out.loss.detach()
        bad = ~torch.isfinite(loss + norm)
        stop = torch.full((), float(asked), device=norm.device)
        flags = distributed.largest(torch.stack([bad.float(), stop]))
        self.waiting.append(_Posted.of(flags, batch.step, batch.ids, loss, norm, list(gradients), norms))
        return norm, flags[0] == 0

    def read(self, settle: bool = False) -> bool:
        """Whether any rank was asked to stop.

        Args:
            settle: also read the last step, waiting for the device.

        Raises:
            NonFiniteError: on all ranks, if `too_many` steps were not finite.
        """
        asked = False
        while len(self.waiting) > (0 if settle else self.lag):
            step = self.waiting.popleft()
            bad, stop = step.flags()
            if bad:
                self._skipped(step)
            asked |= bool(stop)
        return asked

    def _skipped(self, step: "_Posted") -> None:
        """Count it, and describe it in a file."""
        recent = [number for number in self._note["recent"] if number > step.number - WINDOW] + [step.number]
        self._note["steps"], self._note["recent"] = self._note["steps"] + 1, recent
        losses, norm = distributed.gather(step.loss[None]).tolist(), step.norm.item()
        ids = distributed.gather(step.ids).tolist()
        loss = next((x for x in losses if not math.isfinite(x)), sum(losses) / len(losses))
        end = too_many(recent, step.number)
        if distributed.rank() == 0:
            path = self.run / "nonfinite" / f"step-{step.number:08d}.json"
            path.parent.mkdir(exist_ok=True)
            record = {
                "step": step.number,
                "loss": _plain(loss),
                "grad_norm": _plain(norm),
                "ended_the_run": end,
                "ids": ids,
                "grad_norms": {name: _plain(x) for name, x in zip(step.names, step.norms.tolist(), strict=True)},
            }
            write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        if end:
            raise distributed.told(
                NonFiniteError(
                    f"loss {loss} and gradient norm {norm} at step {step.number} are not both finite, as in "
                    f"{len(recent)} of the last {min(step.number + 1, WINDOW)} steps; none of them changed the weights "
                    f"and the last checkpoint is good: see {self.run / 'nonfinite'}, and start with a lower learning "
                    "rate or --precision fp32 in another --out"
                )
            )


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, (len(tensors),) float32; over all ranks' parts of those that are shared out."""
    of_parts = torch.stack(torch._foreach_norm([distributed.local(tensor) for tensor in tensors]))
    shared = [distributed.is_shared_out(tensor) for tensor in tensors]
    if not any(shared):
        return of_parts
    squares = distributed.gather(of_parts.double().square()[None]).sum(0)  # in float64: a float32 may overflow
    both = zip(shared, squares.sqrt().to(of_parts.dtype).unbind(), of_parts.unbind(), strict=True)
    return torch.stack([over_ranks if cut else own for cut, over_ranks, own in both])


def _plain(value: float) -> float | str:
    """What JSON can hold: its standard has no NaN and no infinity."""
    return value if math.isfinite(value) else repr(value)


@dataclass
class _Posted:
    """A step whose answer is on its way to the host."""

    answer: Tensor  # (2,) float32 on the host: not finite, asked to stop
    arrived: torch.cuda.Event | None
    number: int
    ids: Tensor
    loss: Tensor
    norm: Tensor
    names: list[str]
    norms: Tensor  # of the gradients of these names

    @classmethod
    def of(cls, flags: Tensor, *rest: Any) -> Self:
        if flags.device.type != "cuda":
            return cls(flags, None, *rest)
        answer = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)  # the threads that decode need the cores
        arrived.record()
        return cls(answer, arrived, *rest)

    def flags(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        values: list[float] = self.answer.tolist()
        return values
