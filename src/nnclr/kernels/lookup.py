"""Exact nearest-neighbour look-up at the speed of bfloat16 products.

A product of bfloat16 vectors is several times faster than one of float32 vectors, and picks the wrong neighbour where
similarities are close. But its error is bounded, so it can say where the right one must be:

1. The slots are split into groups of 32. For each query and group the largest bfloat16 similarity is kept, and
   nothing else: a 32nd of the n x m matrix, in half the bytes.
2. A slot is among the k best only if its group's maximum reaches the k-th largest maximum less what rounding can do.
3. The few groups that do are compared in float32.

The result is that of a float32 comparison of all slots, whatever the data; the data decides only how long step 3 takes.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # slots
ROUNDING = 2.0**-8  # most by which rounding to bfloat16 moves a number, as a share of it
_SLACK = 2.0**-11  # for vectors whose length is 1 but for rounding, and for float32 sums of up to 2,048 products
_MOST = 16  # a query with more than a 16th of the groups as candidates is compared with all slots instead
_PROBE, _PART = 32, 8  # queries, and the part of the slots, that are tried first
_PAIRS_BYTES = 2**20  # of float32 rows that are compared at a time in step 3: what a core's cache holds

Plain = Callable[[Tensor], tuple[Tensor, Tensor]]


@cache
def bfloat16_is_native(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself: NVIDIA from Ampere on, or AVX-512 or AMX on a CPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def nearest_slots(
    z: Tensor, vectors: Tensor, filled: Tensor, k: int, block: int, plain: Plain
) -> tuple[Tensor, Tensor]:
    """The k slots with the largest cosine similarity to each query, best first, lowest slot first among equals.

    This is the form for a CPU; it waits for the device, `lookup_triton.nearest_slots_triton` does not.

    Args:
        z: (n, d) float32, unit length.
        vectors: (m, d) float32, unit length where filled.
        filled: () int64, slots in use, the first ones; it may be larger than m.
        k: neighbours; missing ones have similarity -inf and any slot.
        block: slots that are multiplied at a time.
        plain: queries -> similarities and slots, by comparing all slots in float32; for queries with very many
            candidates.

    Returns:
        Similarities (n, k) float32 and slots (n, k) int64.
    """
    filled = filled.clamp(max=len(vectors))
    if int(filled) < 2 * k * GROUP:  # so few groups that nearly all are candidates
        return plain(z)
    if len(z) > 2 * _PROBE:
        # Where vectors crowd together nearly all groups are candidates, and asking for them is wasted: try a few
        # queries on a part of the slots, whose maximum is a little lower, so that a little more are candidates.
        probe = torch.arange(0, len(z), len(z) // _PROBE)
        some = max(int(filled) // _PART, 2 * k * _MOST * GROUP)
        maxima = group_maxima(z[probe], vectors[:some], filled.clamp(max=some), block)
        if _heavy(_candidates(maxima, z[probe], k), k).float().mean() > 0.5:
            return plain(z)
    maxima = group_maxima(z, vectors, filled, block)
    candidates = _candidates(maxima, z, k)
    heavy = _heavy(candidates, k)
    similarities = z.new_empty(len(z), k)
    slots = torch.empty(len(z), k, dtype=torch.int64)
    if heavy.any():
        similarities[heavy], slots[heavy] = plain(z[heavy])
    if not heavy.all():
        light = ~heavy
        similarities[light], slots[light] = best_of_groups(z[light], vectors, filled, candidates[light], k)
    return similarities, slots


def _candidates(maxima: Tensor, z: Tensor, k: int) -> Tensor:
    """(n, groups) bool: the groups that may hold one of the k best of a query."""
    kth = maxima.amax(dim=0) if k == 1 else maxima.topk(k, dim=0).values[-1]
    return (maxima >= least_maximum(kth.float(), z)).T


def _heavy(candidates: Tensor, k: int) -> Tensor:
    """(n,) bool: queries with so many candidates that comparing all slots is faster."""
    return candidates.sum(dim=1) > max(candidates.shape[1] // _MOST, k)


def group_maxima(z: Tensor, vectors: Tensor, filled: Tensor, block: int) -> Tensor:
    """Largest bfloat16 similarity (groups, n) bfloat16 of each query with the filled slots of each group."""
    m, n, used = len(vectors), len(z), int(filled)
    block = -(-block // GROUP) * GROUP
    queries = z.T.to(torch.bfloat16).contiguous()
    maxima = torch.full((-(-m // GROUP), n), -torch.inf, dtype=torch.bfloat16)
    for start in range(0, used, block):
        stop = min(start + block, used)
        scores = vectors[start:stop].to(torch.bfloat16) @ queries
        if (stop - start) % GROUP:
            scores = F.pad(scores, (0, 0, 0, -(stop - start) % GROUP), value=-torch.inf)
        first = start // GROUP
        rows = scores.view(-1, GROUP, n)
        torch.amax(rows, dim=1, out=maxima[first : first + len(rows)])
    return maxima


def least_maximum(kth: Tensor, z: Tensor, moved: float | Tensor = ROUNDING) -> Tensor:
    """(n,) float32: what the maximum of a group must reach for the group to hold one of the k best.

    Let e bound the error of a computed similarity before it is rounded: what rounding the query moves (known) plus
    what rounding a slot moves (at most `moved`), both by Cauchy-Schwarz. k groups hold a slot each whose exact
    similarity is at least kth - e less a rounding; a slot among the k best is not below all of these, and is
    computed at least that less e and a rounding again.

    Args:
        kth: (n,) float32, the k-th largest maximum of each query.
        z: (n, d) float32 queries.
        moved: largest length of what rounding takes from a slot; smaller where it is known.
    """
    rounded = z.to(torch.bfloat16).float()
    error = (z - rounded).norm(dim=1) + moved * rounded.norm(dim=1)
    least: Tensor = kth - 2 * error - 2 * ROUNDING * (kth.abs() + 2 * error) - max(_SLACK, z.shape[1] * 2.0**-22)
    return least


def best_of_groups(z: Tensor, vectors: Tensor, filled: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best slots (n, k) of the candidate groups (n, groups) bool, compared in float32."""
    counts = candidates.sum(dim=1)
    query, group = candidates.nonzero(as_tuple=True)  # in the order of queries, then of groups
    place = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    width = max(int(counts.max()), -(-k // GROUP))
    similarities = z.new_full((len(z), width, GROUP), -torch.inf)
    groups = torch.zeros(len(z), width, dtype=torch.int64)
    groups[query, place] = group
    inside = torch.arange(GROUP)
    for pairs in torch.arange(len(query)).split(max(1, _PAIRS_BYTES // (4 * GROUP * z.shape[1]))):
        slots = group[pairs, None] * GROUP + inside
        rows = vectors.index_select(0, slots.flatten().clamp(max=len(vectors) - 1)).view(*slots.shape, -1)
        # The query on the left: with a vector on the right the product takes twice as long.
        found = torch.bmm(z[query[pairs], None], rows.transpose(1, 2))[:, 0]
        similarities[query[pairs], place[pairs]] = found.masked_fill_(slots >= filled, -torch.inf)
    best, index = stable_topk(similarities.flatten(1), k)
    return best, groups.gather(1, index // GROUP) * GROUP + index % GROUP


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first and lowest column first among equals.

    torch.topk leaves the order of ties open, at its boundary too; so its smallest value serves as a
    threshold, and ties at the threshold are admitted by column order.
    """
    if k == 1:
        best, index = scores.max(dim=1, keepdim=True)
        return best, index
    kth = scores.topk(k, dim=1).values[:, -1:]
    above = scores > kth
    ties = (scores == kth) & ((scores == kth).cumsum(1) + above.sum(1, keepdim=True) <= k)
    columns = (above | ties).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)
