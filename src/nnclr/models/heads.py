"""The projection and the prediction head (NNCLR, section 4.1)."""

from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Three-layer projector f: Linear-BN-ReLU, Linear-BN-ReLU, Linear-BN; no ReLU at the end.

    Args:
        in_dim: width of the backbone's features.
        hidden_dim: width of both hidden layers.
        out_dim: embedding width d.
    """

    def __init__(self, in_dim: int, hidden_dim: int = 2048, out_dim: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden_dim, bias=False),  # a bias before batch norm has no effect
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, out_dim, bias=False),
            nn.BatchNorm1d(out_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, in_dim) to embeddings (n, out_dim), not normalised."""
        embeddings: Tensor = self.layers(features)
        return embeddings


class PredictionHead(nn.Module):
    """Two-layer predictor g: Linear-BN-ReLU, Linear; it takes the embedding before normalisation.

    Args:
        dim: embedding width d, of input and output.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, dim: int = 256, hidden_dim: int = 4096) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (n, dim) to predictions (n, dim), not normalised."""
        predictions: Tensor = self.layers(embeddings)
        return predictions
