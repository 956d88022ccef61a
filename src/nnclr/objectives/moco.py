"""MoCo: keys of an averaged network; v2 contrasts with a queue of them, v3 with those of the batch.

MoCo v2: Chen et al., 2020 (arXiv 2003.04297); v3: Chen, Xie and He, ICCV 2021. On NNCLR's projector.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nnclr.distributed import gather, rank
from nnclr.models.ema import average_of, update_average
from nnclr.models.heads import PredictionHead, ProjectionHead
from nnclr.objectives.objective import Objective, Output, targets_of, two_views
from nnclr.support_set import SupportSet


class MoCoV2(Objective):
    """Queries of view 1 against the key of view 2 and a queue of earlier keys.

    One direction, as published: the queue is as long as the support set and filled the same way. Entries are
    negatives here; those not yet filled are left out, so that the very first step has loss 0.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        temperature: of the softmax; published 0.2.
        ema_momentum: of the averaged weights.
        support_set_size: length of the queue; published 65536.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "embedding_dim",
        "projector_hidden_dim",
        "temperature",
        "ema_momentum",
        "support_set_size",
    )

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        temperature: float = 0.2,
        ema_momentum: float = 0.999,
        support_set_size: int = 65_536,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, ema_momentum
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.average_projector = average_of(self.projector)
        self.queue = SupportSet(support_set_size, embedding_dim)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """InfoNCE (equation 1); shapes as in `Objective.forward`."""
        two_views(features, "MoCoV2")
        z1, z2 = (self.projector(view).float() for view in features)  # view 2 only for its batch norms and health
        with torch.no_grad():
            keys = self.average_projector(targets_of(targets, "MoCoV2")[1]).float()
        with torch.autocast(z1.device.type, enabled=False):
            q_ND, k_ND = F.normalize(z1, dim=1), F.normalize(keys, dim=1)
            slots_M = torch.arange(self.queue.size, device=z1.device)
            unfilled_M = torch.where(slots_M < self.queue.enqueued, 0.0, -torch.inf)
            positive_N1 = (q_ND * k_ND).sum(dim=1, keepdim=True)
            logits = torch.cat([positive_N1, torch.addmm(unfilled_M, q_ND, self.queue.vectors.T)], dim=1)
            loss = F.cross_entropy(logits / self.temperature, torch.zeros_like(slots_M[:1]).expand(len(q_ND)))
        candidates = 1 + self.queue.enqueued.clamp(max=self.queue.size)
        metrics = {"loss_chance": candidates.float().log(), "support_set_fill": self.queue.fill}
        return Output(loss, metrics, [z1.detach(), z2.detach()], ids, keep={"keys": keys})

    def update(self, out: Output) -> None:
        """Enqueue the keys of the global batch; move the averaged projector."""
        self.queue.enqueue(gather(out.keep["keys"]), None if out.ids is None else gather(out.ids))
        if self.momentum is not None:
            update_average(self.average_projector, self.projector, self.momentum)


class MoCoV3(Objective):
    """Predictions of each view against the averaged network's keys of the other view of the global batch.

    Args:
        feature_dim: width of the backbone's features.
        embedding_dim: d.
        projector_hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor.
        temperature: of the softmax; published 1.0 for ResNet-50, 0.2 for ViT.
        ema_momentum: of the averaged weights at the start; it rises to 1 over the run.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "embedding_dim",
        "projector_hidden_dim",
        "predictor_hidden_dim",
        "temperature",
        "ema_momentum",
    )
    momentum_to_one = True

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int = 256,
        projector_hidden_dim: int = 2048,
        predictor_hidden_dim: int = 4096,
        temperature: float = 0.2,
        ema_momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, ema_momentum
        self.projector = ProjectionHead(feature_dim, projector_hidden_dim, embedding_dim)
        self.predictor = PredictionHead(embedding_dim, predictor_hidden_dim)
        self.average_projector = average_of(self.projector)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The symmetric loss (algorithm 1); shapes as in `Objective.forward`."""
        two_views(features, "MoCoV3")
        p1, p2 = (self.predictor(self.projector(view)).float() for view in features)
        with torch.no_grad():
            t1, t2 = (self.average_projector(view).float() for view in targets_of(targets, "MoCoV3"))
        loss = self._contrast(p1, t2) + self._contrast(p2, t1)
        chance = torch.full((), float(len(gather(p1.detach()))), device=loss.device).log()
        return Output(loss, {"loss_chance": 4 * self.temperature * chance}, [t1, t2], ids)

    def _contrast(self, predictions: Tensor, keys: Tensor) -> Tensor:
        with torch.autocast(predictions.device.type, enabled=False):
            keys_GD = gather(F.normalize(keys, dim=1))
            own_N = torch.arange(len(keys), device=keys.device) + rank() * len(keys)
            logits_NG = F.normalize(predictions, dim=1) @ keys_GD.T / self.temperature
            return 2 * self.temperature * F.cross_entropy(logits_NG, own_N)

    def update(self, out: Output) -> None:
        """Move the averaged projector."""
        if self.momentum is not None:
            update_average(self.average_projector, self.projector, self.momentum)
