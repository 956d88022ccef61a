"""SwAV (Caron et al., NeurIPS 2020): predict the cluster of one view from the other views.

As built: scores of the global batch are balanced together; the queue of earlier embeddings takes part once it is
full; prototypes train from the first step (the published recipe freezes them for an epoch).
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr.distributed import gather, rank
from nnclr.models.heads import ProjectionHead
from nnclr.objectives.objective import Objective, Output

EPSILON, ITERATIONS = 0.05, 3  # published; sharper targets with a smaller epsilon


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """Balanced assignments of rows to prototypes (SwAV, equation 3 and appendix A).

    Args:
        scores: (g, k) similarities.
        epsilon: smoothness of the assignment.
        iterations: of Sinkhorn and Knopp's scaling.

    Returns:
        (g, k) float32; each row sums to 1, and columns to about g / k.
    """
    q = torch.exp((scores.float() - scores.float().max()) / epsilon)
    rows, columns = q.shape
    for _ in range(iterations):
        q = q / (q.sum(dim=0, keepdim=True).clamp(min=1e-30) * columns)
        q = q / (q.sum(dim=1, keepdim=True).clamp(min=1e-30) * rows)
    return q * rows


class SwAV(Objective):
    """Swapped prediction of assignments; codes from the two large views, predicted from every other view.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        temperature: of the softmax; published 0.1.
        prototypes: number of clusters.
        swav_queue_size: earlier embeddings that help to balance small batches; 0 for none.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "embedding_dim",
        "projector_hidden_dim",
        "temperature",
        "prototypes",
        "swav_queue_size",
    )
    multi_crop = True
    queue: Tensor  # (2, queue, d) float32, unit length: embeddings of each large view, newest first
    queued: Tensor  # () int64, embeddings ever written

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        temperature: float = 0.1,
        prototypes: int = 3000,
        swav_queue_size: int = 3840,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.prototypes = nn.Linear(embedding_dim, prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, swav_queue_size, embedding_dim))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        self._full = False
        self._normalise()

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """Cross entropy between swapped assignments (equations 1 and 2); shapes as in `Objective.forward`.

        Raises:
            ValueError: if there are fewer than two views.
        """
        if len(features) < 2:
            raise ValueError(f"SwAV compares at least 2 views, got {len(features)}")
        embeddings = [self.projector(view).float() for view in features]
        with torch.autocast(embeddings[0].device.type, enabled=False):
            z = [F.normalize(view, dim=1) for view in embeddings]
            scores = [self.prototypes(view) for view in z]
            codes = [self._codes(scores[large], large) for large in range(2)]
            losses = [
                -(codes[large] * F.log_softmax(scores[view] / self.temperature, dim=1)).sum(dim=1).mean()
                for large in range(2)
                for view in range(len(z))
                if view != large
            ]
        used = torch.zeros_like(scores[0][0]).index_fill_(0, torch.cat(codes).argmax(dim=1), 1.0).mean()
        metrics = {
            "loss_chance": torch.full((), math.log(self.prototypes.out_features), device=z[0].device),
            "prototypes_used": used,
        }
        return Output(torch.stack(losses).mean(), metrics, [view.detach() for view in embeddings[:2]], ids)

    @torch.no_grad()
    def _codes(self, scores: Tensor, large: int) -> Tensor:
        """(n, k) assignments of this rank's rows, balanced over the global batch and the queue."""
        everyone = gather(scores.detach())
        start = rank() * len(scores)
        if self._queue_is_full():
            everyone = torch.cat([everyone, self.prototypes(self.queue[large])])
        return sinkhorn(everyone)[start : start + len(scores)]

    def _queue_is_full(self) -> bool:
        """Whether the queue takes part; it waits for the device until that is so, and never again."""
        if not self._full and self.queue.shape[1]:
            self._full = int(self.queued) >= self.queue.shape[1]
        return self._full

    @torch.no_grad()
    def update(self, out: Output) -> None:
        """Put the prototypes back on the sphere; enqueue both large views of the global batch."""
        self._normalise()
        if self.queue.shape[1]:
            new = torch.stack([gather(F.normalize(view, dim=1)) for view in out.embeddings])
            self.queue.copy_(torch.cat([new, self.queue], dim=1)[:, : self.queue.shape[1]])
            self.queued += new.shape[1]

    @torch.no_grad()
    def _normalise(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
