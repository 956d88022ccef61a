"""The support set: a first-in first-out set of embeddings, and the nearest-neighbour look-up in it.

Legend of the shape suffixes: N queries, M slots of the support set, K neighbours a query, D embedding width.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnclr import counter, sharded_support_set
from nnclr.distributed import gather, rank, world_size
from nnclr.exact import exact_float32
from nnclr.kernels.available import triton_works
from nnclr.kernels.lookup import bfloat16_is_native, nearest_slots, stable_topk
from nnclr.sharded_support_set import Found, best_first

NO_ID = -1  # an entry whose image is unknown, and the id of a neighbour that does not exist
_LARGE = 2048  # slots from which the look-up by bfloat16 and float32 pays
_PAIRS = 2**32  # of a query and a slot that are compared at a time: 256 MiB of maxima
_SENT = 65_536  # rows that ranks exchange at a time when the set is put together
_NARROW = 32  # rows from which matrix products compute an element in the same way wherever it stands
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

    With `shard`, rank r of W holds the slots r, r + W, r + 2 W, ... and no others, so that every batch spreads evenly,
    and the results are those of the whole set (entries that differ by less than float32 rounding may change places).
    All ranks then call `nearest` and `enqueue` together, `nearest` with as many queries each and `enqueue` with the
    same global batch. `vectors`, `ids`, `born` and `state_dict` are this rank's: each rank saves its own state, and
    `load_shards` restores them on any number of ranks.

    Args:
        size: M, number of entries; any size, it need not be a multiple of the batch.
        dim: D, embedding width.
        block_size: slots compared at a time; a look-up of n queries never makes the n x M matrix: a block of it, and
            on a CPU at most a sixteenth of it (candidates), on a GPU a 64th in bfloat16 and a bfloat16 copy of the set.
        replacement: which entries a full set gives up: `fifo`, the oldest, or `random` (an ablation of the paper).
        shard: keep M / W entries on each of W ranks instead of all on each; the processes must have met before.

    Raises:
        ValueError: if size, dim or block_size is not positive, or the replacement is unknown.
    """

    # R rows are the slots held here, all M without `shard`: slot s is row s // W of rank s % W. Each tensor has one
    # row more: what is not written aims at it (see `enqueue`).
    _vectors: Tensor  # (R + 1, D) float32, unit length where filled
    _ids: Tensor  # (R + 1,) int64
    _born: Tensor  # (R + 1,) int64, value of `updates` when the slot was written
    enqueued: Tensor  # () int64, rows ever accepted; modulo M it is the next slot to write
    updates: Tensor  # () int64, calls of `enqueue`
    refused: Tensor  # () int64, rows without a unit vector (NaN, infinite, zero) that were not let in
    writable: Tensor | None = None  # () bool on the device; where it is false, `enqueue` changes nothing

    def __init__(
        self, size: int, dim: int, block_size: int = 4096, replacement: str = "fifo", shard: bool = False
    ) -> None:
        super().__init__()
        if replacement not in ("fifo", "random"):
            raise ValueError(f"replacement={replacement!r} is neither fifo nor random")
        for name, value in (("size", size), ("dim", dim), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: a support set needs a positive {name}")
        self.size, self.dim, self.block_size, self.replacement = size, dim, block_size, replacement
        self._rank, self._ranks = (rank(), world_size()) if shard else (0, 1)
        self._rows = -(-size // self._ranks)  # as many on each rank; the last may stand for no slot and stay unfilled
        self._vectors = torch.zeros(self._rows + 1, dim)
        self._ids = torch.full((self._rows + 1,), NO_ID)
        self._born = torch.zeros(self._rows + 1, dtype=torch.int64)
        self.enqueued, self.updates, self.refused = (torch.zeros((), dtype=torch.int64) for _ in range(3))

    def __len__(self) -> int:
        """Number of filled slots (waits for the device)."""
        return min(int(self.enqueued), self.size)

    @property
    def vectors(self) -> Tensor:
        """(R, D) float32, unit length where filled, zero elsewhere; a view, not a copy. R = M without `shard`."""
        return self._vectors[: self._rows]

    @property
    def ids(self) -> Tensor:
        """(R,) int64 image ids, -1 where unknown or unfilled; a view."""
        return self._ids[: self._rows]

    @property
    def born(self) -> Tensor:
        """(R,) int64, the number of earlier updates when the slot was written; a view."""
        return self._born[: self._rows]

    @property
    def slots(self) -> Tensor:
        """(R,) int64, the slot of the whole set that each row stands for; -1 for none."""
        slots = torch.arange(self._rows, device=self._ids.device) * self._ranks + self._rank
        return torch.where(slots < self.size, slots, -1)

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
        with exact_float32(z.device):
            z_ND = F.normalize(z.float(), dim=1)
            if self._ranks == 1:
                found = self._search(z_ND, k, exclude_ids, labels, query_labels)
                embeddings = self.vectors[found.slots]
            else:
                excluded = None if exclude_ids is None else gather(exclude_ids)
                wanted = None if query_labels is None else gather(query_labels)
                here = self._search(gather(z_ND), min(k, self._rows), excluded, labels, wanted)
                found = sharded_support_set.best_of_all_ranks(here, k)
                embeddings = sharded_support_set.entries_of_all_ranks(found.slots, self.vectors)
        found_NK = found.similarities.isfinite()
        return Neighbours(
            embeddings=embeddings * found_NK[..., None],
            ids=torch.where(found_NK, found.ids, NO_ID),
            similarities=found.similarities,
            ages=torch.where(found_NK, self.updates - found.born, 0),
        )

    def _search(
        self,
        z_ND: Tensor,
        k: int,
        exclude_ids: Tensor | None,
        labels: Tensor | None,
        query_labels: Tensor | None,
    ) -> Found:
        """The k best entries among the rows held here."""
        if exclude_ids is None and labels is None and self._rows >= _LARGE and _has_fast_form(z_ND.device):
            best_NK, rows_NK = self._compare_candidates(z_ND, k)
        else:
            best_NK, rows_NK = self._compare_all(z_ND, k, exclude_ids, labels, query_labels)
        return Found(best_NK, rows_NK * self._ranks + self._rank, self.ids[rows_NK], self.born[rows_NK])

    @property
    def _filled(self) -> Tensor:
        """() int64, rows in use here, the first ones: slots fill in order 0, 1, 2, ..."""
        return (self.enqueued.clamp(max=self.size) - self._rank + self._ranks - 1) // self._ranks

    def _compare_candidates(self, z_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What `_compare_all` returns, faster: bfloat16 products say which few entries are worth comparing."""
        parts = [self._compare_candidates_of(some, k) for some in z_ND.split(max(1, _PAIRS // self._rows))]
        best, rows = zip(*parts, strict=True)
        return torch.cat(best), torch.cat(rows)

    def _compare_candidates_of(self, z_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if z_ND.device.type == "cuda":
            from nnclr.kernels.lookup_triton import nearest_slots_triton

            return nearest_slots_triton(z_ND, self.vectors, self._filled, k)
        best_NK, rows_NK = nearest_slots(
            z_ND, self.vectors, self._filled, k, self.block_size, lambda some: self._compare_all(some, k)
        )
        # Comparing a few adds up in another order than comparing all; equal entries must stay equal whichever was done.
        same_NK = torch.stack([_pair_products(z_ND, self.vectors[rows]) for rows in rows_NK.unbind(1)], dim=1)
        best_NK = torch.where(best_NK.isfinite(), same_NK, best_NK)
        order = best_first(best_NK, rows_NK)
        return best_NK.gather(1, order), rows_NK.gather(1, order)

    def _compare_all(
        self,
        z_ND: Tensor,
        k: int,
        exclude_ids: Tensor | None = None,
        labels: Tensor | None = None,
        query_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Similarities and rows (n, k) of the best entries, all compared in float32, block by block."""
        best_NK = z_ND.new_full((len(z_ND), 0), -torch.inf)
        rows_NK = torch.zeros(len(z_ND), 0, dtype=torch.int64, device=z_ND.device)
        filled = self._filled
        for start in range(0, self._rows, self.block_size):
            refused = self._refused(start, exclude_ids, labels, query_labels)
            scores, rows = self._best_of_block(z_ND, start, k, filled, refused)
            # Earlier blocks stand first, and a stable sort keeps them first among equals.
            best, order = torch.cat([best_NK, scores], 1).sort(dim=1, descending=True, stable=True)
            best_NK, rows_NK = best[:, :k], torch.cat([rows_NK, rows], 1).gather(1, order[:, :k])
        return best_NK, rows_NK

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

    def _best_of_block(
        self, z_ND: Tensor, start: int, k: int, filled: Tensor, refused: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Similarities and rows (n, min(k, block)) of the best entries among the block's rows."""
        block = self.vectors[start : start + self.block_size]
        # Adding the mask inside the product saves a pass over the scores.
        rows = torch.arange(start, start + len(block), device=z_ND.device)
        scores = _products(z_ND, block, torch.where(rows < filled, 0.0, -torch.inf))
        if refused is not None:
            scores.masked_fill_(refused, -torch.inf)
        best, index = stable_topk(scores, min(k, len(block)))
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
        open_ = torch.ones((), dtype=torch.bool, device=z.device) if self.writable is None else self.writable
        accepted = (z_ND.norm(dim=1) > 0.5) & open_  # unit length but for rounding; false for NaN and for zero
        count = accepted.sum()
        number = accepted.cumsum(0) - 1  # the row is the number-th accepted one of this batch
        written = accepted & (number >= count - self.size)
        if self.replacement == "random":
            slots = self._random_slots(min(len(z), self.size))
            slot = slots[(number - (count - self.size).clamp(min=0)).clamp(0, len(slots) - 1)]
        else:
            slot = (self.enqueued + number) % self.size
        # What is not written here aims at the spare last row: shapes stay fixed and nothing waits.
        target = torch.where(written & (slot % self._ranks == self._rank), slot // self._ranks, self._rows)
        self._vectors.index_copy_(0, target, z_ND)
        self._ids.index_copy_(0, target, ids.to(self._ids))
        self._born.index_copy_(0, target, self.updates.expand(len(z)))
        self.enqueued = self.enqueued + count
        self.updates = self.updates + open_
        self.refused = self.refused + (len(z) - count) * open_

    def _random_slots(self, n: int) -> Tensor:
        """(n,) the slots to write next, n <= M: unfilled ones first, in order, then in a random order.

        It is a function of the number of updates, so that resume and the number of ranks cannot change it.
        """
        slots = self.slots
        turn = counter.bits_on_device(self.updates, slots) & (2**62 - 1)
        turn = torch.where(slots >= self.enqueued, slots - self.size, turn).masked_fill(slots < 0, 2**62)
        turn, rows = turn.topk(min(n, self._rows), largest=False)
        slots = slots[rows]
        if self._ranks > 1:
            turn, slots = gather(turn), gather(slots)
        return slots[turn.argsort()[:n]]

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
        destination.update({prefix + name: getattr(self, name) for name in self._state_names})

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
        whole = self._ranks > 1 and len(state_dict.get(prefix + "ids", ())) == self.size  # see `whole_state`
        for name in self._state_names:
            own, saved = getattr(self, name), state_dict.get(prefix + name)
            if whole:
                saved = own if name == "slots" else self._own_rows(name, saved)
            if saved is None:
                missing_keys.append(prefix + name)
            elif saved.shape != own.shape:
                error_msgs.append(f"{prefix}{name} has shape {tuple(saved.shape)}, here {tuple(own.shape)}")
            elif name == "vectors" and not saved.isfinite().all():
                error_msgs.append(f"{prefix}{name} holds values that are not finite")
            elif name != "slots":
                own.copy_(saved)
            elif not torch.equal(saved.to(own.device), own):
                error_msgs.append(f"{prefix}slots are those of another rank or world size; use load_shards")
        if strict:
            known = {prefix + name for name in self._state_names}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]

    def _own_rows(self, name: str, saved: Tensor | None) -> Tensor | None:
        """What a rank holds of a tensor of the whole set; rows that stand for no slot keep what they have."""
        if saved is None or name not in _ROWS or len(saved) != self.size:
            return saved
        slots = self.slots.to(saved.device)
        own: Tensor = getattr(self, name).to(saved.device, copy=True)
        own[slots >= 0] = saved[slots[slots >= 0]]
        return own

    def whole_state(self) -> dict[str, Tensor]:
        """The state of the whole set on the CPU of rank 0, and nothing elsewhere; with `shard` all ranks call it.

        It loads into sets on any number of ranks, with `shard` or without. Other ranks hold a block of rows beside
        their own at a time.
        """
        if self._ranks == 1:
            return {name: getattr(self, name).detach().to("cpu", copy=True) for name in self._state_names}
        whole = {name: getattr(self, name).detach().to("cpu", copy=True) for name in _COUNTS}
        for name in _ROWS:
            own = getattr(self, name)
            parts = []
            for start in range(0, self._rows, _SENT):
                rows = gather(own[start : start + _SENT][None])  # (W, block, ...): slot by slot in the other order
                if self._rank == 0:
                    parts.append(rows.transpose(0, 1).flatten(0, 1).cpu())
            if self._rank == 0:
                whole[name] = torch.cat(parts)[: self.size]
        return whole if self._rank == 0 else {}

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a share only."""
        return self._ranks > 1

    @property
    def _state_names(self) -> tuple[str, ...]:
        return _ROWS + _COUNTS + (("slots",) if self._ranks > 1 else ())

    def load_shards(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Take what belongs here from the `state_dict` of each rank, saved at the same step by any number of ranks.

        A set that was not sharded is one shard, and a set that is not sharded takes all. States are read one after
        the other: with a generator that opens one file at a time, memory holds one shard beside this rank's own. With
        as many ranks as when they were saved, the rank's own state is enough.

        Args:
            states: in any order.

        Raises:
            ValueError: if entries of this rank are missing, or the states are those of another size or of several
                steps; the set is then of no use.
        """
        present = torch.zeros(self._rows, dtype=torch.bool, device=self._ids.device)
        counts: list[list[int]] = []
        for state in states:
            slots = state["slots"] if "slots" in state else torch.arange(len(state["ids"]))
            if int(slots.max()) >= self.size or state["vectors"].shape[1:] != (self.dim,):
                raise ValueError(f"a shard belongs to another support set than one of {self.size} x {self.dim}")
            index = ((slots >= 0) & (slots % self._ranks == self._rank)).nonzero()[:, 0]
            rows = (slots[index] // self._ranks).to(present.device)
            for name in _ROWS:
                getattr(self, name)[rows] = state[name][index].to(present.device)
            present[rows] = True
            counts.append([int(state[name]) for name in _COUNTS])
        if missing := int((~present & (self.slots >= 0)).sum()):
            raise ValueError(f"{missing} of the {self._rows} entries of rank {self._rank} are in none of the shards")
        if counts.count(counts[0]) < len(counts):
            raise ValueError("the shards were not saved at the same step")
        if not self.vectors.isfinite().all():
            raise ValueError("a shard holds values that are not finite")
        for name, value in zip(_COUNTS, counts[0], strict=True):
            getattr(self, name).fill_(value)


def _products(z_ND: Tensor, vectors_MD: Tensor, mask_M: Tensor) -> Tensor:
    """(n, m) similarities plus the mask, such that a pair's value depends on nothing but the pair.

    A few rows left over at an edge are computed by other routines, which add up in another order: entries that are
    equal would differ, and a part of the set would have another answer than the whole.
    """
    n, m = len(z_ND), len(vectors_MD)
    if n < _NARROW:
        z_ND = F.pad(z_ND, (0, 0, 0, _NARROW - n))
    if m < _NARROW:
        vectors_MD, mask_M = F.pad(vectors_MD, (0, 0, 0, _NARROW - m)), F.pad(mask_M, (0, _NARROW - m))
    return torch.addmm(mask_M, z_ND, vectors_MD.T)[:n, :m]


def _pair_products(z_ND: Tensor, vectors_ND: Tensor) -> Tensor:
    """(n,) what `_products` has on its diagonal, to the bit."""
    tiles = -(-len(z_ND) // _NARROW)
    z, vectors = (
        F.pad(part, (0, 0, 0, tiles * _NARROW - len(part))).view(tiles, _NARROW, -1) for part in (z_ND, vectors_ND)
    )
    return torch.bmm(z, vectors.transpose(1, 2)).diagonal(dim1=1, dim2=2).flatten()[: len(z_ND)]


def _has_fast_form(device: torch.device) -> bool:
    """Whether `_compare_candidates` is to be had on a device and pays there."""
    return triton_works(device) if device.type == "cuda" else bfloat16_is_native(device)
