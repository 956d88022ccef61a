"""All that a run continues from, in memory: what is copied for a checkpoint, and put back from one."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnclr import distributed
from nnclr.errors import NoCheckpointError
from nnclr.objectives import Objective
from nnclr.support_set import SupportSet

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms


@dataclass
class TrainState:
    """All that a run continues from; what is no field of it is derived from the config and the step."""

    backbone: nn.Module
    objective: Objective  # heads and support set
    optimizer: torch.optim.Optimizer
    average: nn.Module | None = None  # the averaged backbone of objectives with a momentum
    undivided: nn.Module | None = None  # where the two are shared out over ranks: the backbone's form, on the CPU
    step: int = 0  # optimiser steps taken; order, augmentation and schedule are functions of it
    notes: dict[str, Any] = field(default_factory=dict)  # small JSON values: alarms, seconds trained

    def tensors(self) -> dict[str, Tensor]:
        """A snapshot on the CPU: later steps do not change it. It takes as much memory as the state itself.

        What is shared out over ranks is not in it; see `whole_shards`.
        """
        state = {name: value for name, value in self._named().items() if not distributed.is_shared_out(value)}
        state["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["rng.cuda"] = torch.cuda.get_rng_state()
        # From a GPU into pinned memory, all copies queued at once and then waited for once.
        tensors = {name: value.detach().to("cpu", non_blocking=True, copy=True) for name, value in state.items()}
        if "rng.cuda" in state:
            torch.cuda.synchronize()
        return tensors

    def trained(self) -> list[Tensor]:
        """Parameters and buffers of all networks that are whole on every rank, not copied."""
        networks = [of for of in (self.backbone, self.objective, self.average) if of is not None]
        tensors = [tensor for of in networks for tensor in (*of.parameters(), *of.buffers())]
        return [tensor for tensor in tensors if not distributed.is_shared_out(tensor)]

    def replicated(self) -> dict[str, Tensor]:
        """What every rank must hold alike, not copied: weights and support set, but not each rank's batch norms."""
        return {
            name: tensor.detach()
            for name, tensor in self._modules().items()
            if not (name.endswith(_STATISTICS) or distributed.is_shared_out(tensor))
        }

    def _named(self) -> dict[str, Tensor]:
        return self._modules() | {f"optimizer.{name}": value for name, value in self._optimizer_tensors().items()}

    def _modules(self) -> dict[str, Tensor]:
        state = {
            **{f"backbone.{name}": value for name, value in self.backbone.state_dict().items()},
            **{f"objective.{name}": value for name, value in self.objective.state_dict().items()},
            **{
                f"average.{name}": value
                for name, value in ({} if self.average is None else self.average.state_dict()).items()
            },
        }
        of_a_rank = tuple(f"{name}." for name in self._shards())
        return {name: value for name, value in state.items() if not name.startswith(of_a_rank)}

    def whole_shards(self) -> dict[str, Tensor]:
        """What is shared out over ranks as one, on rank 0; all ranks call it. To be laid over `tensors`.

        These are support sets, and the backbone, its average and its moments.
        """
        sets = {f"{name}.{key}": t for name, shard in self._shards().items() for key, t in shard.whole_state().items()}
        return sets | self._whole({n: t for n, t in self._named().items() if distributed.is_shared_out(t)})

    @staticmethod
    def _whole(tensors: dict[str, Tensor], everywhere: bool = False) -> dict[str, Tensor]:
        """On the CPU of rank 0, or of all: one tensor at a time, so that no device holds all of them."""
        kept = {}
        for name, value in tensors.items():
            tensor = distributed.whole(value.detach())
            if everywhere or distributed.rank() == 0:
                kept[name] = tensor.to("cpu", copy=True)
        return kept

    def network(self, averaged: bool = False) -> nn.Module:
        """The backbone, or its average if there is one, in one piece: a copy where it is shared out.

        All ranks call it together.
        """
        live = self.average if averaged and self.average is not None else self.backbone
        if self.undivided is None:
            return live
        device = distributed.local(next(live.parameters())).device
        return frozen_copy(self.undivided, self._whole(live.state_dict(), everywhere=True), "").to(device)

    def nbytes(self) -> int:
        """Bytes of a checkpoint, but for its text: also the moments that the optimiser does not have before a step."""
        moments = 2 if "betas" in self.optimizer.defaults else 1
        shards = sum(shard.size * (4 * shard.dim + 16) for shard in self._shards().values())
        modules = sum(value.numel() * value.element_size() for value in self._modules().values())
        return modules + shards + moments * sum(p.numel() * p.element_size() for p in self._parameters())

    def _shards(self) -> dict[str, SupportSet]:
        modules = self.objective.named_modules(prefix="objective")
        return {name: module for name, module in modules if isinstance(module, SupportSet) and module.sharded}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put a snapshot back; the hyper-parameters stay those of the config.

        Raises:
            NoCheckpointError: if a tensor is missing, left over, or of another shape.
        """
        try:
            _load(self.backbone, _below("backbone.", tensors))
            _load(self.objective, _below("objective.", tensors))
            if self.average is not None:
                _load(self.average, _below("average.", tensors))
            parameters = self._parameters()
            saved: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
            for name, value in _below("optimizer.", tensors).items():
                index, key = name.split(".", 1)
                saved[int(index)][key] = _laid_out_as(parameters[int(index)], value)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(
                {"state": {i: state for i, state in saved.items() if state}, "param_groups": groups}
            )
            torch.set_rng_state(tensors["rng.cpu"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise NoCheckpointError(f"the checkpoint does not fit the model: {error}") from error
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{key}": value
            for index, parameter in enumerate(self._parameters())
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Whole tensors into a module that may be shared out over ranks."""
    own = module.state_dict()
    module.load_state_dict({n: distributed.part_like(own[n], t) if n in own else t for n, t in tensors.items()})


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """With the parameter's strides, which fused optimisers take for granted; files hold tensors in the plain order."""
    if value.shape != parameter.shape:
        return value
    if distributed.is_shared_out(parameter):
        return distributed.part_like(parameter, value)
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def frozen_copy(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
    """A copy of a module on the CPU, with the weights of a snapshot.

    Args:
        module: of which the snapshot was taken.
        tensors: the snapshot; the copy takes over its tensors.
        prefix: of the module's names in it.
    """

    def frozen(name: str, value: Tensor) -> Tensor:
        taken = tensors.get(prefix + name)
        return value.detach().to("cpu", copy=True) if taken is None else taken  # not every buffer is part of the state

    memo: dict[int, Any] = {
        id(p): nn.Parameter(frozen(name, p), requires_grad=False)
        for name, p in module.named_parameters(remove_duplicate=False)
    }
    memo |= {id(b): frozen(name, b) for name, b in module.named_buffers(remove_duplicate=False)}
    # What weight and spectral norm compute from parameters is an attribute that cannot be deep-copied.
    attributes = (value for part in module.modules() for value in vars(part).values())
    memo |= {id(value): value.detach().to("cpu", copy=True) for value in attributes if isinstance(value, Tensor)}
    return copy.deepcopy(module, memo).cpu()
