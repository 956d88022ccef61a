"""The look-up of `lookup.py` as two Triton kernels: no n x m matrix, nothing waits for the device."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnclr.kernels.lookup import least_maximum

GROUP = 64  # slots; larger than on a CPU: the maxima are written to and read from memory
_QUERIES, _SLOTS, _DEPTH = 128, 128, 64  # one tile of the product
_SCAN = 1024  # maxima that are read at a time
_MOST_PROGRAMS = 65535  # along the second axis of a launch
# Triton's interpreter, in which the tests run, multiplies the bits of bfloat16 numbers as integers; the kernel then
# widens what it has read first, which changes no value.


@triton.jit
def _group_maxima(
    z, vectors, filled, maxima, n, groups, dim,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    used = tl.load(filled)
    scores = tl.zeros((QUERIES, SLOTS), dtype=tl.float32)
    for start in range(0, dim, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a = tl.load(z + query[:, None] * dim + depth, mask=(query[:, None] < n) & (depth < dim), other=0.0)
        at = slot.to(tl.int64)[:, None] * dim + depth
        b = tl.load(vectors + at, mask=(slot[:, None] < used) & (depth < dim), other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        scores = tl.dot(a, tl.trans(b), scores)
    scores = tl.where(slot[None, :] < used, scores, float("-inf"))
    best = tl.max(tl.reshape(scores, (QUERIES, SLOTS // GROUP, GROUP)), axis=2)
    group = tl.program_id(1) * (SLOTS // GROUP) + tl.arange(0, SLOTS // GROUP)
    at = maxima + query.to(tl.int64)[:, None] * groups + group
    tl.store(at, best.to(tl.bfloat16), mask=(query[:, None] < n) & (group < groups))


@triton.jit
def _best_of_groups(
    z, vectors, filled, maxima, thresholds, similarities, slots, groups, dim,
    K: tl.constexpr, GROUP: tl.constexpr, SCAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    used = tl.load(filled)
    least = tl.load(thresholds + query)
    scan = tl.arange(0, SCAN)
    last, last_slot = float("inf"), tl.full((), -1, tl.int64)
    for j in range(K):  # the best after the one found before, in the order of similarity, then of slot
        best, best_slot = float("-inf"), tl.full((), 0, tl.int64)
        for start in range(0, groups, SCAN):
            maximum = tl.load(maxima + query * groups + start + scan, mask=start + scan < groups, other=float("-inf"))
            waiting = ((maximum.to(tl.float32) >= least) & (start + scan < groups)).to(tl.int32)
            while tl.max(waiting, axis=0) > 0:
                which = tl.argmax(waiting, axis=0)
                waiting = tl.where(scan == which, 0, waiting)
                slot = (start + which).to(tl.int64) * GROUP + tl.arange(0, GROUP)
                score = tl.zeros((GROUP,), dtype=tl.float32)
                for depth0 in range(0, dim, DEPTH):
                    depth = depth0 + tl.arange(0, DEPTH)
                    a = tl.load(z + query * dim + depth, mask=depth < dim, other=0.0)
                    inside = (slot[:, None] < used) & (depth < dim)
                    b = tl.load(vectors + slot[:, None] * dim + depth, mask=inside, other=0.0)
                    score += tl.sum(a * b, axis=1)
                after = (score < last) | ((score == last) & (slot > last_slot))
                score = tl.where((slot < used) & after, score, float("-inf"))
                top = tl.max(score, axis=0)
                lowest = tl.min(tl.where(score == top, slot, 2**62), axis=0)
                better = top > best  # groups come in order: among equals the earlier one stays
                best = tl.where(better, top, best)
                best_slot = tl.where(better, lowest, best_slot)
        tl.store(similarities + query * K + j, best)
        tl.store(slots + query * K + j, best_slot)
        last, last_slot = best, best_slot


def nearest_slots_triton(z: Tensor, vectors: Tensor, filled: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `lookup.nearest_slots`; z (n, d), vectors (m, d) float32 and filled () int64 on one CUDA device."""
    if triton.cdiv(len(vectors), _SLOTS) > _MOST_PROGRAMS:
        raise ValueError(f"a support set of {len(vectors)} entries is too large for one device; use several")
    with torch.cuda.device(z.device) if z.is_cuda else nullcontext():  # Triton launches on the current one
        return _launch(z, vectors, filled.clamp(max=len(vectors)), k)


def _launch(z: Tensor, vectors: Tensor, filled: Tensor, k: int) -> tuple[Tensor, Tensor]:
    (n, dim), groups = z.shape, triton.cdiv(len(vectors), GROUP)
    z, vectors = z.contiguous(), vectors.contiguous()
    maxima = torch.empty(n, groups, dtype=torch.bfloat16, device=z.device)
    # Programs that run at the same time share the slots, so that the support set is read once.
    grid = (triton.cdiv(n, _QUERIES), triton.cdiv(len(vectors), _SLOTS))
    _group_maxima[grid](
        z.bfloat16(), vectors.bfloat16(), filled, maxima, n, groups, dim,
        GROUP=GROUP, QUERIES=_QUERIES, SLOTS=_SLOTS, DEPTH=_DEPTH,
        WIDEN=triton.knobs.runtime.interpret, enable_fp_fusion=True,
    )  # fmt: skip
    kth = maxima.amax(dim=1) if k == 1 else maxima.topk(min(k, groups), dim=1).values[:, -1]
    # With fewer groups than k, or fewer filled ones, the threshold is -inf and all groups are candidates.
    thresholds = least_maximum(kth.float(), z) if k <= groups else kth.float().fill_(float("-inf"))
    similarities = torch.empty(n, k, device=z.device)
    slots = torch.empty(n, k, dtype=torch.int64, device=z.device)
    _best_of_groups[(n,)](
        z, vectors, filled, maxima, thresholds, similarities, slots, groups, dim,
        K=k, GROUP=GROUP, SCAN=_SCAN, DEPTH=min(128, triton.next_power_of_2(dim)), enable_fp_fusion=True,
    )  # fmt: skip
    return similarities, slots
