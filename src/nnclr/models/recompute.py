"""Large batches in little memory: the backbone's activations of a few images, or of one block, at a time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnclr.errors import InputError
from nnclr.models.backbone import evaluation_mode
from nnclr.models.blocks import repeated_blocks


class InParts(nn.Module):
    """A backbone that keeps no activations: it computes them again in the backward, a part of the batch at a time.

    The loss is that of the whole batch, and its gradient is exact (Gao et al., 2021, "Scaling deep contrastive learning
    batch size under memory limited setup"): memory is that of `images` images, time about a third more. Dropout is
    replayed. Batch norms see one part at a time, so with them the result is not that of the whole batch in one go.

    Args:
        backbone: maps (n, 3, s, s) to (n, d).
        images: of a part.
    """

    def __init__(self, backbone: nn.Module, images: int) -> None:
        super().__init__()
        self.backbone, self.images = backbone, images

    def forward(self, view: Tensor) -> Tensor:
        """Features (n, d) of images (n, 3, s, s)."""
        parts = view.split(self.images)
        if not torch.is_grad_enabled():
            return torch.cat([self.backbone(part) for part in parts])
        features = [
            checkpoint(self.backbone, part, use_reentrant=False, context_fn=self._contexts, determinism_check="none")
            for part in parts
        ]
        return torch.cat(features)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the first computation, and around the second one."""
        return nullcontext(), buffers_as_now(self.backbone)


class InBlocks(nn.Module):
    """A backbone that keeps what goes into each of its blocks, and computes their activations again in the backward.

    The whole batch goes through in one piece (Chen et al., 2016, "Training deep nets with sublinear memory cost"), so
    that all values are those of the plain backbone, batch norms included; time is about a third more.

    Args:
        backbone: maps (n, 3, s, s) to (n, d).

    Raises:
        InputError: if it has no repeated blocks.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self._blocks = backbone, tuple(repeated_blocks(backbone))
        if not self._blocks:
            raise InputError(
                f"recompute=True needs a backbone of repeated blocks, and {type(backbone).__name__} has none; use "
                "grad_cache, which works with any"
            )

    def forward(self, view: Tensor) -> Tensor:
        """Features (n, d) of images (n, 3, s, s)."""
        features: Tensor
        if not torch.is_grad_enabled():
            features = self.backbone(view)
            return features
        try:
            for block in self._blocks:  # for this call only: nobody else who holds the backbone shall notice
                block.forward = _Recomputed(block)  # so that its hooks stay around it
            features = self.backbone(view)
        finally:
            for block in self._blocks:
                wrapped = vars(block).get("forward")
                if isinstance(wrapped, _Recomputed):
                    wrapped.put_back()
        return features


class _Recomputed:
    """The forward of a block, which keeps its arguments alone."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.forward, self._own = block, block.forward, "forward" in vars(block)

    def put_back(self) -> None:
        """Give the block its forward again, of its class or its own."""
        if self._own:
            self.block.forward = self.forward
        else:
            del self.block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = [(value, value._version) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        out = checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)
        if any(value._version != version for value, version in before):
            raise InputError(
                f"recompute=True cannot be used with this backbone: {type(self.block).__name__} changes its input in "
                "place; use grad_cache"
            )
        return out

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), buffers_as_now(self.block)


def buffers_as_now(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which the buffers, such as the running statistics of batch norms, are what they are now.

    Whatever passes through in it, at its end they are again what they were at its beginning.
    """
    return _buffers_as(list(module.buffers()), [buffer.clone() for buffer in module.buffers()])


@contextmanager
def _buffers_as(buffers: list[Tensor], then: list[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in buffers]
    _set(buffers, then)
    try:
        yield
    finally:
        _set(buffers, before)


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)  # not seen by autograd, which has saved the buffer and does not use it


def check_recompute(backbone: nn.Module, size: int) -> None:
    """Try a forward with `recompute`, in evaluation mode, so that nothing is changed.

    Raises:
        InputError: if the backbone has no repeated blocks, or one of them changes its input in place.
    """
    parameter, wrapped = next(backbone.parameters()), InBlocks(backbone)
    with evaluation_mode(backbone), torch.enable_grad():
        wrapped(torch.zeros(1, 3, size, size, device=parameter.device))


def in_little_memory(backbone: nn.Module, images: int | None, recompute: bool) -> nn.Module:
    """The backbone itself, or one that gives the same features and keeps less for the backward.

    Args:
        backbone: maps (n, 3, s, s) to (n, d).
        images: keep the activations of so many at a time, see `InParts`; None for all.
        recompute: keep those of a block at a time, see `InBlocks`.

    Raises:
        InputError: if `recompute` is asked for and the backbone has no repeated blocks.
    """
    kept = InBlocks(backbone) if recompute else backbone
    return kept if images is None else InParts(kept, images)
