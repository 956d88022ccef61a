"""The support set: a first-in first-out set of embeddings, and the nearest-neighbour look-up in it.

Legend of the shape suffixes: N queries, M slots of the support set, K neighbours a query, D embedding width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr import counter
from nnclr.kernels.lookup import bfloat16_is_native, nearest_slots, stable_topk

NO_ID = -1  # an entry whose image is unknown, and the id of a neighbour that does not exist
_LARGE = 2048  # slots from which the look-up by bfloat16 and float32 pays
_ROWS = ("vectors", "ids", "born")
_COUNTS = ("enqueued", "updates", "refused")


class Neighbours(NamedTuple):
    """What a look-up returns, best neighbour first.

    Where the support set holds fewer than k admissible entries, the missing neighbours have similarity
    -inf, id -1, age 0 and a zero vector; `similarities.isfinite()` tells them apart.
    """

    embeddings: Tensor  # (n, k, d) float32, unit length
    ids: Tensor  # (n, k) int64, the image an entry came from, -1 if it was enqueued without an id
    similarities: Tensor  # (n, k) float32, cosine
    ages: Tensor  # (n, k) int64, in updates: 1 = enqueued by the latest call of `enqueue`


class SupportSet(nn.Module):
    """FIFO set of l2-normalised embeddings with exact nearest-neighbour search (NNCLR, section 3.1).

    `nearest` only reads and `enqueue` only writes, so that "look up first, enqueue at the end of the step"
    is a fact one can see in the caller. The state is in `state_dict`, moves with `.to(device)`, stays
    float32 whatever the module is cast to, and is deliberately not made of registered buffers: DDP
    broadcasts those from rank 0 before every forward, which would overwrite what the ranks agreed on.

    Nothing here waits for the device: the write position is a tensor, rows are refused by masks.

    Args:
        size: M, number of entries; any size, it need not be a multiple of the batch.
        dim: D, embedding width.
        block_size: slots compared at a time; a look-up of n queries never makes the n x M matrix: a block of it, and
            on a CPU at most a sixteenth of it (candidates), on a GPU a 64th in bfloat16 and a bfloat16 copy of the set.
        replacement: which entries a full set gives up: `fifo`, the oldest, or `random` (an ablation of the paper).

    Raises:
        ValueError: if size, dim or block_size is not positive, or the replacement is unknown.
    """

    # Each has one row more than there are slots: rows that are not written aim at it (see `enqueue`).
    _vectors: Tensor  # (M + 1, D) float32, unit length where filled
    _ids: Tensor  # (M + 1,) int64
    _born: Tensor  # (M + 1,) int64, value of `updates` when the slot was written
    enqueued: Tensor  # () int64, rows ever accepted; modulo M it is the next slot to write
    updates: Tensor  # () int64, calls of `enqueue`
    refused: Tensor  # () int64, rows without a unit vector (NaN, infinite, zero) that were not let in

    def __init__(self, size: int, dim: int, block_size: int = 4096, replacement: str = "fifo") -> None:
        super().__init__()
        if replacement not in ("fifo", "random"):
            raise ValueError(f"replacement={replacement!r} is neither fifo nor random")
        for name, value in (("size", size), ("dim", dim), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: a support set needs a positive {name}")
        self.size, self.dim, self.block_size, self.replacement = size, dim, block_size, replacement
        self._vectors = torch.zeros(size + 1, dim)
        self._ids = torch.full((size + 1,), NO_ID)
        self._born = torch.zeros(size + 1, dtype=torch.int64)
        self.enqueued, self.updates, self.refused = (torch.zeros((), dtype=torch.int64) for _ in range(3))

    def __len__(self) -> int:
        """Number of filled slots (waits for the device)."""
        return min(int(self.enqueued), self.size)

    @property
    def vectors(self) -> Tensor:
        """(M, D) float32, unit length where filled, zero elsewhere; a view, not a copy."""
        return self._vectors[: self.size]

    @property
    def ids(self) -> Tensor:
        """(M,) int64 image ids, -1 where unknown or unfilled; a view."""
        return self._ids[: self.size]

    @property
    def born(self) -> Tensor:
        """(M,) int64, the number of earlier updates when the slot was written; a view."""
        return self._born[: self.size]

    @property
    def fill(self) -> Tensor:
        """Share of filled slots, a float32 scalar in [0, 1] on the device."""
        return (self.enqueued / self.size).clamp(max=1.0)

    @torch.no_grad()
    def nearest(
        self,
        z: Tensor,
        k: int = 1,
        exclude_ids: Tensor | None = None,
        labels: Tensor | None = None,
        query_labels: Tensor | None = None,
    ) -> Neighbours:
        """The k entries with the largest cosine similarity to each query: NN(z, Q) of equation 2.

        Similarities are computed and compared in float32 also under autocast: bfloat16 scores tie, and
        pick another neighbour in up to four of five queries of a tight cluster.

        Args:
            z: (n, d) queries, any float dtype, need not be normalised.
            k: neighbours a query.
            exclude_ids: (n,) int64; entries with this id are no candidates for the query of that row; -1 excludes none.
            labels: (images,) int64 label of each image id; with `query_labels` only entries of the query's label are
                candidates, entries without an id are not (oracle neighbours, for analysis).
            query_labels: (n,) int64.

        Returns:
            Neighbours with fields (n, k, d), (n, k), (n, k), (n, k); no gradient reaches any of them.
            Of equal computed similarities the lowest slot wins.

        Raises:
            ValueError: if z is not (n, d), or k is not in 1..size.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"queries have shape {tuple(z.shape)}; expected (n, {self.dim})")
        if not 1 <= k <= self.size:
            raise ValueError(f"k={k} is not between 1 and the support set's size {self.size}")
        with _exact_float32(z.device):
            z_ND = F.normalize(z.float(), dim=1)
            if exclude_ids is None and labels is None and self.size >= _LARGE and bfloat16_is_native(z.device):
                best_NK, slots_NK = self._compare_candidates(z_ND, k)
            else:
                best_NK, slots_NK = self._compare_all(z_ND, k, exclude_ids, labels, query_labels)
        found_NK = best_NK.isfinite()
        return Neighbours(
            embeddings=self.vectors[slots_NK] * found_NK[..., None],
            ids=torch.where(found_NK, self.ids[slots_NK], NO_ID),
            similarities=best_NK,
            ages=torch.where(found_NK, self.updates - self.born[slots_NK], 0),
        )

    def _compare_candidates(self, z_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What `_compare_all` returns, faster: bfloat16 products say which few entries are worth comparing."""
        if z_ND.device.type == "cuda":
            from nnclr.kernels.lookup_triton import nearest_slots_triton

            return nearest_slots_triton(z_ND, self.vectors, self.enqueued, k)
        return nearest_slots(
            z_ND, self.vectors, self.enqueued, k, self.block_size, lambda some: self._compare_all(some, k)
        )

    def _compare_all(
        self,
        z_ND: Tensor,
        k: int,
        exclude_ids: Tensor | None = None,
        labels: Tensor | None = None,
        query_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Similarities and slots (n, k) of the best entries, all compared in float32, block by block."""
        best_NK = z_ND.new_full((len(z_ND), 0), -torch.inf)
        slots_NK = torch.zeros(len(z_ND), 0, dtype=torch.int64, device=z_ND.device)
        for start in range(0, self.size, self.block_size):
            refused = self._refused(start, exclude_ids, labels, query_labels)
            scores, slots = self._best_of_block(z_ND, start, k, refused)
            # Earlier blocks stand first, and a stable sort keeps them first among equals.
            best, order = torch.cat([best_NK, scores], 1).sort(dim=1, descending=True, stable=True)
            best_NK, slots_NK = best[:, :k], torch.cat([slots_NK, slots], 1).gather(1, order[:, :k])
        return best_NK, slots_NK

    def _refused(
        self, start: int, exclude_ids: Tensor | None, labels: Tensor | None, query_labels: Tensor | None
    ) -> Tensor | None:
        """(n, block) bool, true where an entry is no candidate for a query; None where all are."""
        ids, refused = self.ids[start : start + self.block_size], None
        if exclude_ids is not None:
            refused = (ids == exclude_ids[:, None]) & (exclude_ids[:, None] != NO_ID)
        if labels is not None and query_labels is not None:
            other = (labels[ids.clamp(min=0)] != query_labels[:, None]) | (ids == NO_ID)
            refused = other if refused is None else refused | other
        return refused

    def _best_of_block(self, z_ND: Tensor, start: int, k: int, refused: Tensor | None) -> tuple[Tensor, Tensor]:
        """Similarities and slots (n, min(k, block)) of the best entries among the block's slots."""
        stop = min(start + self.block_size, self.size)
        slots = torch.arange(start, stop, device=z_ND.device)
        # Slots fill in order 0, 1, 2, ...; adding the mask inside the product saves a pass over the scores.
        unfilled = torch.where(slots < self.enqueued, 0.0, -torch.inf)
        scores = torch.addmm(unfilled, z_ND, self.vectors[start:stop].T)
        if refused is not None:
            scores.masked_fill_(refused, -torch.inf)
        best, index = stable_topk(scores, min(k, stop - start))
        return best, index + start

    @torch.no_grad()
    def enqueue(self, z: Tensor, ids: Tensor | None = None) -> None:
        """Write a batch over the oldest entries, in row order, wrapping around the end.

        Rows are normalised here, once. A row that has no unit vector is refused and counted in `refused`.
        With a NaN or an infinity it would be the nearest neighbour of every query; if its length underflows
        or overflows float32, its similarity 0 would beat every negative one. Of a batch larger than the set
        the newest (last) rows stay.

        Args:
            z: (n, d) embeddings, any float dtype.
            ids: (n,) int64 image ids, -1 for unknown; None means all unknown.

        Raises:
            ValueError: if z is not (n, d) or ids is not (n,).
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"embeddings have shape {tuple(z.shape)}; expected (n, {self.dim})")
        if ids is None:
            ids = torch.full((len(z),), NO_ID, device=z.device)
        elif ids.shape != (len(z),):
            raise ValueError(f"ids have shape {tuple(ids.shape)} for {len(z)} embeddings")
        z_ND = F.normalize(z.detach().float(), dim=1)
        accepted = z_ND.norm(dim=1) > 0.5  # unit length but for rounding; false for NaN and for zero
        count = accepted.sum()
        number = accepted.cumsum(0) - 1  # the row is the number-th accepted one of this batch
        written = accepted & (number >= count - self.size)
        if self.replacement == "random":
            slot = self._random_slots()[(number - (count - self.size).clamp(min=0)).clamp(0, self.size - 1)]
        else:
            slot = (self.enqueued + number) % self.size
        # Rows that are not written aim at the spare last row: shapes stay fixed and nothing waits.
        target = torch.where(written, slot, self.size)
        self._vectors.index_copy_(0, target, z_ND)
        self._ids.index_copy_(0, target, ids.to(self._ids))
        self._born.index_copy_(0, target, self.updates.expand(len(z)))
        self.enqueued = self.enqueued + count
        self.updates = self.updates + 1
        self.refused = self.refused + (len(z) - count)

    def _random_slots(self) -> Tensor:
        """(M,) all slots in the order in which to write them: unfilled ones first, then a random order.

        It is a function of the number of updates, so that resume and the number of ranks cannot change it.
        """
        slots = torch.arange(self.size, device=self._vectors.device)
        chance = counter.bits_on_device(self.updates, slots) & (2**62 - 1)
        return torch.where(slots >= self.enqueued, slots - self.size, chance).argsort()

    def extra_repr(self) -> str:
        """Size and width, for `print(module)`."""
        return f"size={self.size}, dim={self.dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)`; ignore a change of dtype, since neighbours are compared in float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # not annotated in torch
        device = fn(self._vectors[:0]).device
        for name in (*("_" + rows for rows in _ROWS), *_COUNTS):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: getattr(self, name) for name in _ROWS + _COUNTS})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _ROWS + _COUNTS:
            own, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is None:
                missing_keys.append(prefix + name)
            elif saved.shape != own.shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(saved.shape)}, here {tuple(own.shape)}")
            elif name == "vectors" and not saved.isfinite().all():
                error_msgs.append(f"{prefix}{name} holds values that are not finite")
            else:
                own.copy_(saved)
        if strict:
            known = {prefix + name for name in _ROWS + _COUNTS}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 or bfloat16 shortcuts inside float32 matrix products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
