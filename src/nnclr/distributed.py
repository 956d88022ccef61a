"""Everything that knows there is more than one process; each function is the identity when there is one."""

import hashlib
import json
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnclr import errors
from nnclr.errors import InputError, NNCLRError, PeerLostError
from nnclr.heartbeat import Heartbeat, die_with_parent

_TIMEOUT = timedelta(seconds=300)  # of a collective; the heartbeat notices lost processes long before
_MEETING = timedelta(seconds=1800)  # that processes wait for each other at the start
_GOODBYE = 10.0  # seconds that taking leave of the others may take

_c10d: Any = dist  # which declares its stores in C++, unseen by type checkers
_meetings: list[Any] = []  # the store of the job that this process is in

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the backward sums every rank's gradient for the rows that came from here.

    A gather that only returns its own slice of the gradient trains another algorithm: this rank's rows are
    negatives in all the other ranks' losses too.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad = grad_outputs[0].clone()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with gradient.

    Args:
        rows: (n, ...) tensor; n is the same on every rank.

    Returns:
        (world_size * n, ...) tensor of the same dtype. The gradient of a row is the sum of the gradients
        it receives on all ranks.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def exchange(parts: Tensor) -> Tensor:
    """Give part r to rank r, and receive one from each.

    Args:
        parts: (world_size, ...) tensor of the same shape on every rank.

    Returns:
        (world_size, ...) tensor: part r is the one that rank r had for this rank.
    """
    if world_size() == 1:
        return parts
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received


def from_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only; every rank gets its result, or raises its error.

    Args:
        function: gives a value that JSON can carry.

    Raises:
        NNCLRError: what the function raised on rank 0, on all ranks.
    """
    if world_size() == 1:
        return function()
    message: dict[str, Any] = {}
    failure: Exception | None = None
    if rank() == 0:
        try:
            message = {"value": function()}
        except Exception as error:  # noqa: BLE001  (whatever it is, the others must not wait for it)
            failure = error
            message = {"error": type(error).__name__, "text": str(error)}
    barrier()  # rank 0 may need longer than a collective waits
    message = broadcast(message)
    if failure is not None:
        raise told(failure) if isinstance(failure, NNCLRError) else failure
    if "error" in message:
        kind = getattr(errors, message["error"], NNCLRError)
        raise told(kind(message["text"]) if issubclass(kind, NNCLRError) else NNCLRError(message["text"]))
    return cast(T, message["value"])


def told(error: NNCLRError) -> NNCLRError:
    """Mark an error that all ranks raise together, so that rank 0 alone says it."""
    error.shared, error.told = True, rank() != 0
    return error


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank; anything that JSON can carry."""
    if world_size() == 1:
        return value
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    length = torch.tensor([len(content)], device=content.device)
    dist.broadcast(length, 0)
    if rank() != 0:
        content = torch.empty(int(length), dtype=torch.uint8, device=content.device)
    dist.broadcast(content, 0)
    return json.loads(content.cpu().numpy().tobytes())


def broadcast_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's CPU tensors on every rank, one after the other."""
    if world_size() == 1:
        return dict(tensors)
    header = broadcast([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()])
    received = {}
    for name, dtype, shape in header:
        tensor = tensors[name] if rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
        on_device = tensor.to(_device())
        dist.broadcast(on_device, 0)
        received[name] = on_device.cpu()
    return received


def all_arrays(array: np.ndarray | None) -> list[np.ndarray]:
    """The float32 arrays (n, d) of all ranks in rank order; d is the same, n may differ; None where a rank has none."""
    if world_size() == 1:
        return [] if array is None else [array]
    shape = torch.tensor([(0, 0) if array is None else array.shape], device=_device())
    shapes = gather(shape).tolist()
    rows, width = max(n for n, _ in shapes), max(d for _, d in shapes)
    padded = torch.zeros(rows, width, device=shape.device)
    if array is not None:
        padded[: len(array)] = torch.from_numpy(array).to(shape.device)
    everyone = gather(padded[None]).cpu().numpy()
    return [everyone[i, :n] for i, (n, d) in enumerate(shapes) if d]


def from_all(value: Any) -> list[Any]:
    """Each rank's value, in rank order, on every rank; anything that JSON can carry."""
    if world_size() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.float32)  # exact, and what is sent
    return [json.loads(text.astype(np.uint8).tobytes()) for text in all_rows(content)]


def all_rows(content: np.ndarray) -> list[np.ndarray]:
    """The float32 vectors of all ranks, whose lengths may differ."""
    return [array[:, 0] for array in all_arrays(content[:, None])]


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors on the device by those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over ranks of each number; the names are the same on every rank. NaN where one of them is NaN."""
    if world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def largest(values: Tensor) -> Tensor:
    """The largest of each element over ranks; nothing waits for the device."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def barrier() -> None:
    """Wait for all ranks, however long one of them takes; a collective would give up after its timeout."""
    if world_size() == 1:
        return
    if not _meetings:  # the group is not ours
        dist.barrier()
        return
    store = _meetings[-1]
    number = store.add(f"barrier/{rank()}", 1)
    keys = [f"barrier/{other}/{number}" for other in range(world_size())]
    store.set(keys[rank()], "here")
    _wait_for(store, keys)
    passed = [f"passed/{other}/{number}" for other in range(1, world_size())]
    if rank() == 0:  # which may hold the store, and leave next: the others would lose it while they look
        _wait_for(store, passed)
    else:
        store.set(passed[rank() - 1], "on")


def _wait_for(store: Any, keys: list[str]) -> None:
    while not store.check(keys):
        time.sleep(0.05)


def agree(facts: Mapping[str, str]) -> None:
    """Compare texts that must be the same on every rank, before anything is done together.

    Raises:
        InputError: on every rank; it names what differs, and where.
    """
    if world_size() == 1:
        return
    hashes = torch.tensor(
        [[int.from_bytes(_digest(text), "little", signed=True) for text in facts.values()]],
        device=_device(),
    )
    everyone = gather(hashes).tolist()
    for column, name in enumerate(facts):
        odd = [number for number, row in enumerate(everyone) if row[column] != everyone[0][column]]
        if odd:
            raise told(
                InputError(
                    f"rank {odd[0]} has another {name} than rank 0; start every process with the same command and the "
                    "same files"
                )
            )


def replicate(module: M) -> M:
    """The module as what to call in training: its gradients are then averaged over ranks during the backward.

    Buffers are each rank's own: a support set is kept equal by its updates, and batch norms outside of CUDA see their
    own rank's rows.
    """
    if world_size() == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    with warnings.catch_warnings():  # the argument has a new name in torch 2.15, which 2.10 does not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        wrapped = nn.parallel.DistributedDataParallel(
            module, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True
        )
    return cast(M, wrapped)  # it is called in the same way


def shared_batch_norm(module: M, group: int | None = None) -> M:
    """Batch norms over the rows of all ranks, where the device can: on CUDA.

    Args:
        module: changed in place, but for one that is a batch norm itself.
        group: ranks that share statistics: each of as many neighbours in rank order; all if None.

    Raises:
        InputError: on all ranks, if they cannot be divided into such groups.
    """
    if world_size() == 1:
        return module
    if group is not None and world_size() % group:
        raise told(InputError(f"sync_bn_group={group} does not divide the {world_size()} processes of the job"))
    if _device().type != "cuda":
        return module
    return cast(M, nn.SyncBatchNorm.convert_sync_batchnorm(module, rank_group(group)))


def rank_group(size: int | None) -> Any:
    """The process group of this rank and its neighbours, `size` in all; all ranks call it, None is all of them."""
    return None if size is None else dist.new_subgroups(size)[0]


# ---- a network of which each rank holds a share: its parameters are DTensors -------------------------------


def shard(module: M, blocks: Iterable[nn.Module], dtype: torch.dtype | None = None) -> M:
    """Share out a network over all ranks (FSDP2), in place: each keeps a part of every parameter, cut along its rows.

    A block's parameters are gathered while it computes; gradients are averaged over ranks, as in `replicate`, and each
    rank is given those of its part.

    Args:
        module: the same on every rank.
        blocks: parts of it that are gathered one after the other; what is in none of them is gathered together.
        dtype: that weights are gathered and computed with; their own if None. Under autocast it must be autocast's: the
            copies that autocast would make of whole weights would stay until the backward.

    Raises:
        InputError: if it has parameters that cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns that features must not be changed in place; nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(_device().type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    try:
        parts: list[nn.Module] = [*blocks, module]
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    except (ValueError, NotImplementedError) as error:
        raise told(InputError(f"fsdp=True cannot share out this backbone: {errors.first_line(error)}")) from error
    return module


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it only."""
    return type(tensor) not in (Tensor, nn.Parameter) and isinstance(tensor, _d_tensor())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is shared out, in the same memory; any other tensor itself."""
    return cast(Any, tensor).to_local() if is_shared_out(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is shared out; all ranks call it together."""
    return cast(Any, tensor).full_tensor() if is_shared_out(tensor) else tensor


def part_like(like: Tensor, tensor: Tensor) -> Tensor:
    """What this rank is to hold of a whole tensor.

    Args:
        like: shared out, or not: then all of it.
        tensor: (n, ...) of the same shape, on any device.

    Raises:
        ValueError: if the shape is another one.
    """
    if not is_shared_out(like):
        return tensor
    if like.shape != tensor.shape:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {tuple(like.shape)} is needed")
    own = [*tensor.chunk(world_size()), *[tensor[:0]] * world_size()][rank()]
    own = own.to(local(like).device, copy=True, memory_format=torch.contiguous_format)
    how, form = cast(Any, like), {"shape": like.shape, "stride": like.stride()}
    return cast(Tensor, _d_tensor().from_local(own, how.device_mesh, how.placements, **form))


def _d_tensor() -> Any:
    """The class, which takes a second to import and is needed where there are optimisers, which import it anyway."""
    from torch.distributed.tensor import DTensor

    return DTensor


def _device() -> torch.device:
    """Where collectives take their tensors from."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


# ---- the beginning and the end of a job --------------------------------------------------------------------


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun, or another launcher that sets its variables, has started.

    One process alone, and one whose group exists already, is left as it is. Inside, a rank that dies or freezes ends
    all others with `PeerLostError`, or, where the main thread hangs in a collective, with exit code 85 at once.

    Args:
        device: `cuda` uses NCCL on device LOCAL_RANK, anything else gloo.

    Raises:
        InputError: if the launcher's variables are incomplete.
        PeerLostError: if another process was lost or failed; the message has its cause.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # events, waits and random states are those of the current device
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set without {', '.join(missing)}; start the job with torchrun")
    if device.startswith("cuda:"):
        raise InputError(f"device={device} would put all processes on one device; leave the number out")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):  # nothing else has to reach this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    met, number, size = next(iter(_c10d.rendezvous("env://", timeout=_MEETING)))
    own = _c10d.TCPStore(os.environ["MASTER_ADDR"], _port(met), is_master=False, timeout=_TIMEOUT)
    meeting = _meet(_c10d.PrefixStore("nnclr/meet", own), number, size)
    store = _c10d.PrefixStore(f"nnclr/{meeting}/group", met)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=number, world_size=size, timeout=_TIMEOUT)
    heart = Heartbeat(_c10d.PrefixStore(f"nnclr/{meeting}/heart", own), number, size)
    _meetings.append(_c10d.PrefixStore(f"nnclr/{meeting}/barrier", met))
    failure: str | None = None
    try:
        yield
        barrier()  # rank 0 may hold the store, and writes what the others read next
    except NNCLRError as error:
        failure = None if error.shared else str(error)
        raise
    except RuntimeError as error:  # gloo and NCCL have no kind of their own for a peer that is gone
        failure = f"{type(error).__name__}: {errors.first_line(error)}"
        if "Expected to have finished reduction" in str(error):
            raise InputError(
                "the network has parameters that take no part in the loss, which several processes cannot train; "
                "remove them or set their requires_grad to False"
            ) from error
        if not any(text in str(error) for text in _LOST):
            raise
        cause = heart.cause()
        failure = None  # the first cause is another rank's
        raise PeerLostError(
            f"another process of the job was lost ({cause or errors.first_line(error)}); start the job again, it goes "
            "on from the last checkpoint"
        ) from error
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        _meetings.pop()
        heart.close(failure)
        _take_leave()


_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "timeout", "Broken pipe",
         "remote process", "NCCL", "Connection refused", "Socket closed")  # fmt: skip


def _meet(store: Any, number: int, size: int) -> str:
    """A name that the present processes agree on, and no earlier ones that used the same store.

    A launcher's store outlives its workers, and a process may start several jobs: the addresses of those before are
    still in it. So each rank says hello with a new name, rank 0 lists what it hears, and each answers the list that
    its own name is in; the list that all have answered is the meeting.
    """
    own = uuid.uuid4().hex
    store.set(f"hello/{number}", own)
    until = time.monotonic() + _MEETING.total_seconds()
    while time.monotonic() < until:
        if number == 0:
            keys = [f"hello/{other}" for other in range(size)]
            if store.check(keys):
                names = ",".join(store.get(key).decode() for key in keys)
                store.set("list", names)
                answers = [f"answer/{other}" for other in range(1, size)]
                if store.check(answers) and all(store.get(answer).decode() == names for answer in answers):
                    store.set("agreed", names)
                    return _digest(names).hex()
        elif store.check(["list"]) and own in (names := store.get("list").decode()).split(","):
            store.set(f"answer/{number}", names)
            if store.check(["agreed"]) and store.get("agreed").decode() == names:
                return _digest(names).hex()
        time.sleep(0.02)
    raise PeerLostError(f"not all of the {size} processes came within {_MEETING}; start the job again")


def _port(store: Any) -> int:
    """Where the store listens: a launcher may have chosen another port than MASTER_PORT."""
    inner = store.underlying_store if isinstance(store, _c10d.PrefixStore) else store
    return inner.port if isinstance(inner, _c10d.TCPStore) else int(os.environ["MASTER_PORT"])


def _take_leave() -> None:
    """Destroy the group; a peer that is gone must not keep this process from ending."""
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(_GOODBYE)
