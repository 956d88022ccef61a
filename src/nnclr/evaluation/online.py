"""The kNN accuracy that is measured while a run is under way."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from nnclr.data import counter
from nnclr.data.source import Source, test_split
from nnclr.encoder import Encoder
from nnclr.evaluation import evaluate
from nnclr.evaluation.result import Result

_BANK, _QUERIES = 10_000, 2_000  # enough for an error of about one point, at a cost of seconds


@dataclass(frozen=True)
class OnlineKNN:
    """A fixed bank and fixed queries, so that the figures of one run can be compared."""

    bank: Source
    queries: Source
    k: int
    temperature: float

    @classmethod
    def create(
        cls, data: Any, source: Source, test: Source | None, k: int, temperature: float, seed: int
    ) -> Self | None:
        """Queries come from the test data, else from the data's own test split, else from a tenth of the data.

        Returns:
            None where there are no labels to measure with.
        """
        if source.labels is None:
            return None
        test = test if test is not None else test_split(data)
        if test is not None and test.labels is not None:
            bank, queries = source, test
        else:
            order = counter.permutation(seed, 0, len(source))
            held_out = max(1, len(source) // 10)
            bank, queries = source.subset(np.sort(order[held_out:])), source.subset(np.sort(order[:held_out]))
        return cls(_sample(bank, _BANK, seed), _sample(queries, _QUERIES, seed), k, temperature)

    def measure(self, encoder: Encoder, step: int, seed: int) -> Result:
        """kNN accuracy of the encoder as it is now."""
        return evaluate(
            encoder, self.bank, self.queries, k=self.k, temperature=self.temperature, step=step, seed=seed
        )


def _sample(source: Source, most: int, seed: int) -> Source:
    if len(source) <= most:
        return source
    return source.subset(np.sort(counter.permutation(seed, 1, len(source))[:most]))
