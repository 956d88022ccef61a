"""What the loop asks of a method."""

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from nnclr.errors import InputError
from nnclr.support_set import Neighbours, SupportSet


@dataclass
class Output:
    """What an objective computes from one batch; every tensor but `loss` is detached."""

    loss: Tensor  # () float32, the mean over this rank's rows
    metrics: dict[str, Tensor]  # name -> 0-d tensor on the device, nothing waited for
    embeddings: list[Tensor]  # (n, d) float32 tensors of the first two views, before normalisation
    ids: Tensor | None = None  # (n,) int64 image ids
    neighbours: list[Neighbours] = field(default_factory=list)  # one a large view, k = 1; empty without a look-up
    keep: dict[str, Any] = field(default_factory=dict)  # what else `update` writes


class Objective(nn.Module):
    """A method: everything after the backbone. It is built as `Kind(feature_dim, **settings)`.

    One training step is `out = objective(features, targets, ids)`, `out.loss.backward()`, the optimiser's step,
    `objective.update(out)`. The first call only reads the objective's state, the last one writes it.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of the config that the constructor takes; one that is None there keeps the constructor's default.
    `labels`, an int64 tensor with the label of each image id or None, may be among them."""

    multi_crop: ClassVar[bool] = False
    """Whether small views may follow the two large ones."""

    momentum: float | None = None
    """Momentum of the averaged weights. With a number the loop keeps an averaged backbone, passes its features as
    `targets`, and sets this attribute before each `update`."""

    momentum_to_one: ClassVar[bool] = False
    """Whether the momentum rises to 1 over the run."""

    def forward(self, features: list[Tensor], targets: list[Tensor] | None = None, ids: Tensor | None = None) -> Output:
        """The loss of one batch.

        Args:
            features: a (n, feature_dim) tensor for each view of the same n images, the two large views first.
            targets: features of the large views from the averaged backbone, where `momentum` is set.
            ids: (n,) int64 image ids.
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    def update(self, out: Output) -> None:
        """Write the state; call it after the optimiser's step.

        Parameters and buffers are written in place, and embeddings go into a `SupportSet`: where a step was not
        finite, the loop takes back what happened to those.
        """

    def pictured_look_up(self) -> tuple[nn.Module, SupportSet] | None:
        """The projector for whose embeddings neighbours are looked up, and where; None without a look-up.

        The loop draws pictures of what is found. They are taken by their names: `support_set`, and
        `average_projector` or else `projector`, which maps a backbone's features to embeddings of the set's width;
        where it does something else, nothing is drawn.
        """
        support_set = getattr(self, "support_set", None)
        projector = getattr(self, "average_projector", None) or getattr(self, "projector", None)
        if isinstance(support_set, SupportSet) and isinstance(projector, nn.Module):
            return projector, support_set
        return None


def default_of(kind: type[Objective], name: str) -> Any:
    """Default of a setting: of the constructor, or of the base class's to which `**settings` hand it on.

    Raises:
        InputError: if no constructor takes it.
    """
    for base in kind.__mro__:
        if "__init__" in vars(base) and name in (parameters := inspect.signature(vars(base)["__init__"]).parameters):
            default = parameters[name].default
            return None if default is inspect.Parameter.empty else default
    raise InputError(f"{kind.__qualname__} names the setting {name}, which its constructor does not take")


def two_views(features: list[Tensor], name: str) -> None:
    """Check that there are two views.

    Raises:
        ValueError: if not.
    """
    if len(features) != 2:
        raise ValueError(f"{name} contrasts 2 views, got {len(features)}")


def targets_of(targets: list[Tensor] | None, name: str) -> list[Tensor]:
    """The features of the averaged backbone.

    Raises:
        ValueError: if they are missing.
    """
    if targets is None:
        raise ValueError(f"{name} needs targets: the features of an averaged backbone")
    return targets
