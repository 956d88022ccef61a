"""A support set of ten million entries that four processes share: time, memory, and whether its answers are right.

Run by hand, on one machine and its CPU:

    python -m benchmarks.support_set_scale                      # 10,000,000 x 64 float32 on 4 ranks
    python -m benchmarks.support_set_scale --size 1000000 --ranks 2

Each rank makes its share of every global batch, gathers the batch and enqueues it, as in training, until the set has
wrapped around. Then all look up 256 queries together. The answers to some are compared with a brute-force search in
float64, block by block, over vectors that are made anew.
"""

import argparse
import resource
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import nnclr
from nnclr.distributed import gather

BATCH, QUERIES, CHECKED, K = 16_384, 256, 16, 5


def main() -> None:
    parser = argparse.ArgumentParser(description="A sharded support set at scale.")
    parser.add_argument("--size", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (args.ranks, args.size, args.dim, folder), nprocs=args.ranks, start_method="spawn")


def rows(batch: int, rank: int, ranks: int, dim: int) -> Tensor:
    """A rank's share of a global batch; made again for the check."""
    return torch.randn(BATCH // ranks, dim, generator=torch.Generator().manual_seed(batch * ranks + rank))


def queries(dim: int) -> Tensor:
    return torch.randn(QUERIES, dim, generator=torch.Generator().manual_seed(2**40))


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(rank: int, ranks: int, size: int, dim: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    empty, batches = peak(), size // BATCH + 2  # more rows than slots: the oldest are overwritten
    made = nnclr.SupportSet(size, dim, shard=True)
    enqueuing = 0.0
    for batch in range(batches):
        z = gather(rows(batch, rank, ranks, dim))
        ids = torch.arange(BATCH) + batch * BATCH
        start = time.perf_counter()
        made.enqueue(z, ids)
        enqueuing += time.perf_counter() - start
    filled = peak()
    own = queries(dim).chunk(ranks)[rank]
    for k in (1, K):
        dist.barrier()
        start = time.perf_counter()
        found = made.nearest(own, k)
        seconds = gather(torch.tensor([time.perf_counter() - start])).max().item()
        if rank == 0:
            print(f"{QUERIES} queries, k = {k}: {seconds:.2f} s", flush=True)
    peaks = gather(torch.tensor([[empty, filled, peak()]])).int().tolist()
    held = sum(part.nbytes for part in (made.vectors, made.ids, made.born)) / 2**20
    ids, similarities = gather(found.ids), gather(found.similarities)
    if rank == 0:
        print(f"{len(made):,} of {size:,} x {dim} entries after {batches} batches of {BATCH:,} on {ranks} ranks")
        print(f"enqueue: {1e3 * enqueuing / batches:.0f} ms a batch; entries held by a rank: {held:.0f} MiB")
        for number, (before, after, most) in enumerate(peaks):
            print(f"rank {number}: peak RSS {most} MiB (before the set {before}, before the look-up {after})")
        compare(ids, similarities, size, dim, ranks, batches)
    dist.barrier()
    dist.destroy_process_group()


def compare(ids: Tensor, similarities: Tensor, size: int, dim: int, ranks: int, batches: int) -> None:
    """The first queries' neighbours against a float64 search over everything that is still in the set."""
    asked = torch.arange(0, QUERIES, QUERIES // CHECKED)
    z = F.normalize(queries(dim)[asked].double(), dim=1)
    best, best_ids = torch.full((CHECKED, K), -torch.inf, dtype=torch.float64), torch.full((CHECKED, K), -1)
    for batch in range(batches):
        entries = torch.cat([rows(batch, rank, ranks, dim) for rank in range(ranks)]).double()
        number = torch.arange(BATCH) + batch * BATCH
        alive = number >= batches * BATCH - size
        scores = z @ F.normalize(entries[alive], dim=1).T
        both = torch.cat([best, scores], 1)
        best, order = both.topk(K, dim=1)
        best_ids = torch.cat([best_ids, number[alive].expand(CHECKED, -1)], 1).gather(1, order)
    same = (ids[asked] == best_ids).float().mean().item()
    error = (similarities[asked].double() - best).abs().max().item()
    print(f"against float64 brute force: {100 * same:.1f} % of {CHECKED} x {K} neighbours equal, error <= {error:.1e}")
    if same < 1 or error > 1e-6:
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
