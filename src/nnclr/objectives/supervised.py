"""Supervised training on the same views: the reference that needs all the labels."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr.objectives.objective import Objective, Output


class Supervised(Objective):
    """Softmax cross entropy of a linear classifier, averaged over all views.

    Args:
        feature_dim: width of the backbone's features.
        labels: (images,) int64 label of each image id.

    Raises:
        ValueError: if there are no labels.
    """

    settings: ClassVar[tuple[str, ...]] = ("labels",)
    multi_crop = True
    labels: Tensor

    def __init__(self, feature_dim: int, labels: Tensor | None = None) -> None:
        super().__init__()
        if labels is None:
            raise ValueError("supervised training needs labels, and these images have none")
        self.register_buffer("labels", labels, persistent=False)
        self.classifier = nn.Linear(feature_dim, int(labels.max()) + 1)

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """Cross entropy; shapes as in `Objective.forward`.

        Raises:
            ValueError: without ids.
        """
        if ids is None:
            raise ValueError("supervised training needs ids to know the labels")
        loss = torch.stack(
            [F.cross_entropy(self.classifier(view).float(), self.labels[ids]) for view in features]
        ).mean()
        metrics = {"loss_chance": torch.full((), math.log(self.classifier.out_features), device=loss.device)}
        return Output(loss, metrics, [view.detach().float() for view in features[:2]], ids)
