"""NNCLR: self-supervised vision pre-training with nearest neighbours as positives.

The public names load on first use, so that `import nnclr` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nnclr.distributed import gather
    from nnclr.embed import embed_to_file
    from nnclr.embeddings import open_embeddings
    from nnclr.encoder import Encoder
    from nnclr.evaluation import evaluate
    from nnclr.importers import import_checkpoint
    from nnclr.models.heads import PredictionHead, ProjectionHead
    from nnclr.neighbours import NeighbourIndex
    from nnclr.objectives.nnclr import NNCLR, nnclr_loss
    from nnclr.objectives.objective import Objective, Output
    from nnclr.objectives.simclr import SimCLR, nt_xent_loss
    from nnclr.optim import LARS
    from nnclr.pretrained import open_encoder
    from nnclr.run_folder import Run
    from nnclr.support_set import Neighbours, SupportSet
    from nnclr.training import pretrain

_HOME = {
    "Encoder": "nnclr.encoder",
    "LARS": "nnclr.optim",
    "NNCLR": "nnclr.objectives.nnclr",
    "NeighbourIndex": "nnclr.neighbours",
    "Neighbours": "nnclr.support_set",
    "Objective": "nnclr.objectives.objective",
    "Output": "nnclr.objectives.objective",
    "PredictionHead": "nnclr.models.heads",
    "ProjectionHead": "nnclr.models.heads",
    "Run": "nnclr.run_folder",
    "SimCLR": "nnclr.objectives.simclr",
    "SupportSet": "nnclr.support_set",
    "embed_to_file": "nnclr.embed",
    "evaluate": "nnclr.evaluation",
    "gather": "nnclr.distributed",
    "import_checkpoint": "nnclr.importers",
    "nnclr_loss": "nnclr.objectives.nnclr",
    "nt_xent_loss": "nnclr.objectives.simclr",
    "open_embeddings": "nnclr.embeddings",
    "open_encoder": "nnclr.pretrained",
    "pretrain": "nnclr.training",
}

__all__ = [
    "LARS",
    "NNCLR",
    "Encoder",
    "NeighbourIndex",
    "Neighbours",
    "Objective",
    "Output",
    "PredictionHead",
    "ProjectionHead",
    "Run",
    "SimCLR",
    "SupportSet",
    "embed_to_file",
    "evaluate",
    "gather",
    "import_checkpoint",
    "nnclr_loss",
    "nt_xent_loss",
    "open_embeddings",
    "open_encoder",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nnclr' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
