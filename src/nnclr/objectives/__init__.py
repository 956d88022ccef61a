"""The training objectives by name: features of the views in, loss out.

`OBJECTIVES` is a plain dict; an objective of your own is any module with NNCLR's `forward` and `update`.
"""

from torch import nn

from nnclr.objectives.nnclr import NNCLR, Output, nnclr_loss
from nnclr.objectives.simclr import SimCLR, nt_xent_loss

OBJECTIVES: dict[str, type[nn.Module]] = {"nnclr": NNCLR, "simclr": SimCLR}

__all__ = ["NNCLR", "OBJECTIVES", "Output", "SimCLR", "nnclr_loss", "nt_xent_loss"]
