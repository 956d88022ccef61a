"""Large batches in little memory: the backbone's activations of a few images at a time (gradient caching)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


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
        return nullcontext(), unmoved_statistics(self.backbone)


@contextmanager
def unmoved_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are, whatever passes through."""
    buffers = [buffer for norm in module.modules() if isinstance(norm, _NormBase) for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # not seen by autograd, which has saved the buffer and does not use it


def in_parts(backbone: nn.Module, images: int | None) -> nn.Module:
    """The backbone itself, or in parts of so many images."""
    return backbone if images is None else InParts(backbone, images)
