"""Whether the ranks of a job still hold the same, compared by hashes of every bit."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from nnclr.distributed import gather, world_size
from nnclr.errors import ReplicaError

_HASHED = 2**16  # words at a time: what a core's cache holds as int64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes of an element


def state_hash(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits, () int64, computed where the tensor is.

    The bits are cut into words, and word i is multiplied by 2 i + 1; the sum wraps around. Odd factors are invertible,
    so any change of one word is seen, and different ones, so words that swap places are too.
    """
    words = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    factors = 2 * torch.arange(_HASHED, device=tensor.device) + 1
    for start in range(0, len(words), _HASHED):
        some = words[start : start + _HASHED].long()
        total += (some * factors[: len(some)]).sum() + 2 * start * some.sum()
    return total


def assert_replicas_equal(tensors: Mapping[str, Tensor]) -> None:
    """Compare by hash what every rank must hold alike; all ranks call it together, and it waits for the device.

    Args:
        tensors: of any dtype, under the same names in the same order on every rank.

    Raises:
        ReplicaError: on every rank if one bit differs on one of them; it names the ranks that are not like most.
    """
    if world_size() == 1 or not tensors:
        return
    device = next(iter(tensors.values())).device
    own = torch.stack([state_hash(tensor).to(device) for tensor in tensors.values()])
    hashes = gather(own[None]).tolist()
    differing = [column for column in range(len(own)) if len({row[column] for row in hashes}) > 1]
    if not differing:
        return
    names = list(tensors)
    seen = [row[differing[0]] for row in hashes]
    (most, count), *others = Counter(seen).most_common()
    alike = count > others[0][1]  # else nobody can tell who is right
    odd = [number for number, value in enumerate(seen) if value != most or not alike]
    whom = f"ranks {', '.join(map(str, odd))} differ" if len(odd) > 1 else f"rank {odd[0]} differs"
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    raise ReplicaError(
        f"{whom} from {'the others' if alike else 'each other'} in {names[differing[0]]}{more}: the {world_size()} "
        "ranks no longer train one model; start again from the last checkpoint, and suspect the device if the same "
        "rank is named twice"
    )
