"""The kNN accuracy that is measured while a run is under way."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from nnclr import counter
from nnclr.data.images import Source
from nnclr.encoder import Encoder
from nnclr.evaluation import evaluate
from nnclr.evaluation.result import Result
from nnclr.evaluation.task import split

_BANK, _QUERIES = 10_000, 2_000  # enough for an error of about one point, at a cost of seconds


@dataclass(frozen=True)
class OnlineKNN:
    """A fixed bank and fixed queries, so that the figures of one run can be compared."""

    bank: Source
    queries: Source
    k: int
    temperature: float
    seed: int
    num_workers: int

    @classmethod
    def create(
        cls, source: Source, test: Source | None, k: int, temperature: float, seed: int, num_workers: int
    ) -> Self | None:
        """Queries come from the test images, or from a tenth of the source where there are none.

        Returns:
            None where there are no labels to measure with, one only, or one image of each.
        """
        if source.labels is None or (test is not None and test.labels is None):
            return None
        bank, queries = split(source, test, seed)
        bank, queries = _sample(bank, _BANK, seed), _sample(queries, _QUERIES, seed)
        if bank.labels is None or len(np.unique(bank.labels)) < 2 or not len(queries):
            return None
        return cls(bank, queries, k, temperature, seed, num_workers)

    @property
    def voters(self) -> int:
        """Neighbours that vote: k, or fewer in a small bank, of which ten images may turn out to be unreadable."""
        return min(self.k, max(1, len(self.bank) - 10))

    def measure(self, encoder: Encoder) -> Result:
        """kNN accuracy of the encoder as it is now."""
        return evaluate(
            encoder,
            self.bank,
            self.queries,
            k=self.voters,
            temperature=self.temperature,
            seed=self.seed,
            num_workers=self.num_workers,
        )


def _sample(source: Source, most: int, seed: int) -> Source:
    if len(source) <= most:
        return source
    return source.subset(np.sort(counter.permutation(seed, 1, len(source))[:most]))
