"""The training objectives by name: features of the views in, loss out.

`OBJECTIVES` is a plain dict; an objective of your own is any module with NNCLR's `forward` and `update`.
"""

from nnclr.objectives.nnclr import NNCLR, Output, nnclr_loss
from nnclr.objectives.simclr import SimCLR, nt_xent_loss

Objective = NNCLR | SimCLR
OBJECTIVES: dict[str, type[Objective]] = {"nnclr": NNCLR, "simclr": SimCLR}

__all__ = ["NNCLR", "OBJECTIVES", "Objective", "Output", "SimCLR", "nnclr_loss", "nt_xent_loss"]
