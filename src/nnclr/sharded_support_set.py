"""What the ranks tell each other about a support set of which each holds a share: which entries won, and their vectors.

Legend of the shape suffixes: W ranks, N queries of a rank, K neighbours a query, D embedding width. The memory grows
with all ranks' queries, W N D, and with their winners, W N K; nothing here has the size of the set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nnclr.distributed import exchange, gather, world_size


class Found(NamedTuple):
    """The best entries of each query; where one is missing its similarity is -inf and the rest is any entry's."""

    similarities: Tensor  # (n, k) float32
    slots: Tensor  # (n, k) int64, in the whole set
    ids: Tensor  # (n, k) int64
    born: Tensor  # (n, k) int64


def best_first(similarities: Tensor, slots: Tensor) -> Tensor:
    """The order (n, k) of each row of (n, k) entries: largest similarity first, lowest slot first among equals."""
    by_slot = slots.argsort(dim=1)
    by_similarity = similarities.gather(1, by_slot).sort(dim=1, descending=True, stable=True).indices
    return by_slot.gather(1, by_similarity)


def best_of_all_ranks(here: Found, k: int) -> Found:
    """The winners of the whole set for this rank's queries.

    Args:
        here: (W n, k') each: the best of the entries held here for the queries of all ranks, in rank order.
        k: winners a query; all ranks together must have found as many.

    Returns:
        (n, k) each.
    """
    bits = here.similarities.view(torch.int32).long()  # so that all can travel in one tensor
    sent = torch.stack([bits, *here[1:]], dim=2).unflatten(0, (world_size(), -1))
    bits, *rest = exchange(sent).transpose(0, 1).flatten(1, 2).unbind(2)
    found = Found(bits.int().view(torch.float32), *rest)
    order = best_first(found.similarities, found.slots)[:, :k]
    return Found(*(part.gather(1, order) for part in found))


def entries_of_all_ranks(slots: Tensor, vectors: Tensor) -> Tensor:
    """The vectors of slots of the whole set.

    Args:
        slots: (n, k) int64, wanted by this rank.
        vectors: (r, d) held here: row i is slot i W + rank.

    Returns:
        (n, k, d).
    """
    world = world_size()
    wanted, query = gather(slots), torch.arange(len(slots), device=slots.device)
    columns = []
    for column in range(slots.shape[1]):  # one at a time: the memory of K of them would not be bounded by the queries
        sent = vectors[wanted[:, column] // world]  # right where the slot is held here; the asker takes no others
        received = exchange(sent.unflatten(0, (world, -1)))
        columns.append(received[slots[:, column] % world, query])
    return torch.stack(columns, dim=1)
