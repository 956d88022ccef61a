"""The training objectives by name: features of the views in, loss out.

`OBJECTIVES` is a plain dict. An objective of your own is a class in NNCLR's shape, named as `MODULE:CLASS`.
"""

import difflib
import importlib

from nnclr.errors import InputError
from nnclr.objectives.all4one import All4One
from nnclr.objectives.barlow_twins import BarlowTwins
from nnclr.objectives.byol import BYOL
from nnclr.objectives.moco import MoCoV2, MoCoV3
from nnclr.objectives.msf import MSF
from nnclr.objectives.nn_byol import NNBYOL, NNSimSiam
from nnclr.objectives.nnclr import NNCLR, nnclr_loss
from nnclr.objectives.objective import Objective, Output, default_of
from nnclr.objectives.simclr import SimCLR, nt_xent_loss
from nnclr.objectives.simsiam import SimSiam
from nnclr.objectives.snclr import SNCLR
from nnclr.objectives.supervised import Supervised
from nnclr.objectives.swav import SwAV

OBJECTIVES: dict[str, type[Objective]] = {
    "nnclr": NNCLR,
    "simclr": SimCLR,
    "moco-v2": MoCoV2,
    "moco-v3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
    "swav": SwAV,
    "barlow-twins": BarlowTwins,
    "supervised": Supervised,
    "msf": MSF,
    "snclr": SNCLR,
    "all4one": All4One,
    "nn-byol": NNBYOL,
    "nn-simsiam": NNSimSiam,
}


_GIVEN: dict[str, type[Objective]] = {}  # classes that were passed in Python, wherever they were defined


def name_of(kind: type[Objective]) -> str:
    """The name by which `find_objective` finds a class from now on in this process.

    Raises:
        InputError: if it is no objective.
    """
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not issubclass(kind, Objective):
        raise InputError(f"{name} is no subclass of nnclr.Objective")
    _GIVEN[name] = kind
    return name


def find_objective(name: str) -> type[Objective]:
    """The class of a shipped name, or of `MODULE:CLASS` on Python's path.

    Raises:
        ValueError: if there is none; the message suggests the nearest shipped one.
    """
    if (known := OBJECTIVES.get(name, _GIVEN.get(name))) is not None:
        return known
    module, _, kind = name.partition(":")
    if kind:
        try:
            found = getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the objective {name} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Objective)):
            raise ValueError(f"{name} is no subclass of nnclr.Objective")
        return found
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no objective is called '{name}'{hint}; there are {', '.join(OBJECTIVES)}, or name MODULE:CLASS")


__all__ = [
    "NNCLR",
    "OBJECTIVES",
    "Objective",
    "Output",
    "SimCLR",
    "default_of",
    "find_objective",
    "name_of",
    "nnclr_loss",
    "nt_xent_loss",
]
