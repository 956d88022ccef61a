"""W processes with B / W images each are one process with B images. One fat test a world size: starting is slow."""

import copy
import multiprocessing
import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nnclr
from nnclr.distributed import exchange, gather, rank, world_size
from nnclr.errors import ReplicaError
from nnclr.replicas import assert_replicas_equal, state_hash
from tests.objectives.test_methods import METHODS, linear_heads

BATCH, DIM = 12, 6
NEED_EVERYONE = ("barlow-twins", "moco-v2", "moco-v3", "swav", "snclr", "all4one", "nn-byol", "nn-simsiam", "msf")
multiprocessing.set_forkserver_preload(["torch", "timm", "torchvision", "nnclr"])  # import once, not in every process


def data(step):
    rng = np.random.default_rng(step)
    return [torch.from_numpy(rng.normal(size=(BATCH, DIM))).float() for _ in range(2)], torch.arange(BATCH) + 100 * step


OPTIONS = {  # of NNCLR, each on its own
    "kth": {"neighbour": "kth", "neighbour_k": 3},
    "random": {"neighbour": "random", "neighbour_k": 4},
    "soft": {"neighbour": "soft", "neighbour_k": 5},
    "oracle": {"neighbour": "oracle", "labels": torch.arange(1000) % 3},
    "own ids left out": {"exclude_own_id": True},
    "both views": {"enqueue_both_views": True},
    "random replacement": {"replacement": "random"},
    "no predictor": {"use_predictor": False},
    "transposed and decoupled": {"transpose_loss": True, "decoupled_loss": True},
}


def objective(**options):
    torch.manual_seed(0)
    made = nnclr.NNCLR(DIM, DIM, 8, 8, support_set_size=31, **options)
    made.projector = torch.nn.Linear(DIM, DIM)  # no batch norm
    made.predictor = torch.nn.Linear(DIM, DIM) if options.get("use_predictor", True) else made.predictor
    return made


def train(rows, average, **options):
    """Losses, gradients and the support set after 5 steps on these rows of each batch."""
    made, losses, gradients = objective(**options), [], []
    for step in range(5):
        views, ids = data(step)
        made.zero_grad()
        out = made([view[rows] for view in views], ids=ids[rows])
        out.loss.backward()
        for p in made.parameters():
            average(p.grad)
        loss = out.loss.detach().clone()
        average(loss)
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in made.parameters()]))
        made.update(out)
    return losses, torch.stack(gradients), made.support_set


def train_method(name, rows, average):
    """Mean losses, gradients and the whole state of a compared method after 4 steps on these rows."""
    torch.manual_seed(0)
    made, report = linear_heads(METHODS[name][0]()), {"losses": [], "gradients": []}
    for step in range(4):
        (views, ids), (targets, _) = data(step), data(100 + step)
        made.zero_grad()
        out = made([view[rows] for view in views], [target[rows] for target in targets], ids[rows] % 100)
        out.loss.backward()
        loss = out.loss.detach().clone()
        for tensor in [loss, *(p.grad for p in made.parameters() if p.requires_grad)]:
            average(tensor)
        report["losses"].append(loss.item())
        report["gradients"].append(torch.cat([p.grad.flatten() for p in made.parameters() if p.requires_grad]))
        made.update(out)
    return report | {"state": {key: value.clone() for key, value in made.state_dict().items()}}


def average(tensor):
    dist.all_reduce(tensor)
    tensor /= world_size()


def replicated():
    """What every rank holds alike, of all kinds."""
    generator = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randn(300, 300, generator=generator),  # more words than are hashed at a time
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "exact": torch.randn(4, generator=generator, dtype=torch.float64),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0),
    }


def flip(tensor, bit=0):
    """One bit of the last element changed."""
    flat = tensor.view(-1).view(torch.uint8)
    flat[-1] ^= 1 << bit
    return tensor


def worker(number, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world)
    share = BATCH // world
    rows = slice(number * share, (number + 1) * share)
    losses, gradients, support_set = train(rows, average)
    report = {"losses": losses, "gradients": gradients, "state": support_set.state_dict()}

    for name, function in (("nnclr", nnclr.nnclr_loss), ("simclr", nnclr.nt_xent_loss)):
        views, _ = data(7)
        own = views[1][rows].double().requires_grad_()
        function(views[0][rows].double(), own, 0.1).backward()
        report[name] = own.grad

    report["options"] = {}
    for name, options in OPTIONS.items():
        losses, gradients, support_set = train(rows, average, **options)
        report["options"][name] = {"losses": losses, "gradients": gradients, "state": support_set.state_dict()}
    report["methods"] = {name: train_method(name, rows, average) for name in METHODS}
    report["local"] = {}  # control: each rank by itself
    for name in NEED_EVERYONE:
        module = sys.modules[type(METHODS[name][0]()).__module__]
        module.gather, real = lambda x: x.repeat(world, *[1] * (x.ndim - 1)), module.gather
        report["local"][name] = train_method(name, rows, average)
        module.gather = real

    # control: a gather that returns no gradient for the other ranks' losses
    broken = nnclr.objectives.nnclr
    real = broken.gather

    def without_gradient(x):
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x.detach().contiguous())
        parts[number] = x
        return torch.cat(parts)

    broken.gather = without_gradient
    report["gradients without"] = train(rows, average)[1]
    broken.gather = real
    update = nnclr.NNCLR.update  # control: a local queue
    nnclr.NNCLR.update = lambda self, out: self.support_set.enqueue(out.embeddings[0], out.ids)
    report["state local"] = train(rows, average)[2].state_dict()
    nnclr.NNCLR.update = update

    # DDP must not overwrite a support set; a registered buffer, the control, is overwritten by rank 0's
    holder = objective()
    holder.support_set.enqueue(torch.full((3, DIM), float(number + 1)) + torch.eye(DIM)[:3], torch.tensor([number] * 3))
    holder.register_buffer("control", torch.tensor([float(number)]))
    wrapped = torch.nn.parallel.DistributedDataParallel(holder)
    views, ids = data(0)
    for _ in range(2):
        wrapped([view[rows] for view in views], ids=ids[rows])
    report["ddp ids"], report["ddp buffer"] = holder.support_set.ids[:3].tolist(), holder.control.item()

    x = torch.full((2, 2), float(number), requires_grad=True)
    everyone = gather(x)
    (everyone * (rank() + 1)).sum().backward()
    report["gathered"], report["gathered gradient"] = everyone.detach()[::2, 0].tolist(), x.grad
    parts = torch.arange(world * 2).view(world, 2) + 100 * number
    report["exchanged"] = exchange(parts).tolist()

    assert_replicas_equal(replicated())  # silent
    report["replicas"] = {}
    for name in ("weight", "half", "exact", "count", "flags"):
        tensors = replicated()
        if number == 1:
            flip(tensors[name])
        try:
            assert_replicas_equal(tensors)
        except ReplicaError as error:
            report["replicas"][name] = str(error)
    try:  # all different
        assert_replicas_equal({"first": torch.zeros(2), "second": torch.tensor(number), "third": torch.tensor(number)})
    except ReplicaError as error:
        report["replicas"]["all"] = str(error)
    torch.save(report, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    losses, gradients, support_set = train(slice(None), lambda tensor: None)
    expected = copy.deepcopy(support_set.state_dict())
    mp.start_processes(worker, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    reports = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(world)]
    single = {}
    for name, function in (("nnclr", nnclr.nnclr_loss), ("simclr", nnclr.nt_xent_loss)):
        views, _ = data(7)
        predictions = views[1].double().requires_grad_()
        function(views[0].double(), predictions, 0.1).backward()
        single[name] = predictions.grad
    for name in METHODS:
        alone = train_method(name, slice(None), lambda tensor: None)
        for made in (report["methods"][name] for report in reports):
            np.testing.assert_allclose(made["losses"], alone["losses"], rtol=1e-5, atol=1e-6, err_msg=name)
            for own, expected_gradient in zip(made["gradients"], alone["gradients"], strict=True):
                assert (own - expected_gradient).norm() <= 1e-5 * expected_gradient.norm() + 1e-7, name
            for key, value in alone["state"].items():
                torch.testing.assert_close(made["state"][key], value, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
    for name, options in OPTIONS.items():
        alone_losses, alone_gradients, alone_set = train(slice(None), lambda tensor: None, **options)
        for made in (report["options"][name] for report in reports):
            np.testing.assert_allclose(made["losses"], alone_losses, rtol=1e-5, err_msg=name)
            assert (made["gradients"] - alone_gradients).norm() <= 1e-5 * alone_gradients.norm(), name
            for key, value in alone_set.state_dict().items():
                torch.testing.assert_close(made["state"][key], value, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
    for name, made in reports[0]["local"].items():
        alone = reports[0]["methods"][name]
        same = {key: torch.equal(made["state"][key], value) for key, value in alone["state"].items()}
        assert not all(same.values()) or not np.allclose(made["losses"], alone["losses"], rtol=1e-4), name
    for number, report in enumerate(reports):
        np.testing.assert_allclose(report["losses"], losses, rtol=1e-6)
        assert (report["gradients"] - gradients).norm() <= 1e-6 * gradients.norm()
        for name, value in expected.items():
            torch.testing.assert_close(report["state"][name], value, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(report["state"][name], reports[0]["state"][name]) for name in expected)
        share = BATCH // world
        for name, gradient in single.items():
            own = gradient[number * share : (number + 1) * share] * world  # a rank's loss is a mean over its rows
            if name == "nnclr":
                torch.testing.assert_close(report[name], own, rtol=1e-10, atol=1e-13)
        assert report["gathered"] == list(map(float, range(world)))
        assert (report["gathered gradient"] == world * (world + 1) / 2).all()
        assert report["ddp ids"] == [number] * 3
        assert report["ddp buffer"] == 0.0
        assert report["exchanged"] == [
            [2 * number + 100 * other, 2 * number + 1 + 100 * other] for other in range(world)
        ]
        who = "rank 1 differs from the others" if world == 4 else "ranks 0, 1 differ from each other"
        for name in ("weight", "half", "exact", "count", "flags"):
            assert report["replicas"][name].startswith(f"{who} in {name}: the {world} ranks no longer")
        everyone = ", ".join(map(str, range(world)))
        assert report["replicas"]["all"].startswith(f"ranks {everyone} differ from each other in second and 1 more: ")
        # controls
        assert (report["gradients without"] - gradients).norm() > 1e-2 * gradients.norm()
        assert not torch.equal(report["state local"]["ids"], expected["ids"])
    both = torch.cat([report["simclr"] for report in reports]) / world
    torch.testing.assert_close(both, single["simclr"], rtol=1e-10, atol=1e-13)


def test_alone_everything_is_the_identity():
    x = torch.randn(3, 2)
    assert gather(x) is x
    assert (rank(), world_size()) == (0, 1)
    assert exchange(x) is x
    assert_replicas_equal({"x": x})


def test_hash_is_a_weighted_sum_of_words_and_sees_every_bit():
    for name, tensor in replicated().items():
        width = min(tensor.element_size(), 4)
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        words = [int.from_bytes(data[i : i + width], "little", signed=True) for i in range(0, len(data), width)]
        expected = sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**64
        assert state_hash(tensor).item() % 2**64 == expected, name
    x = torch.randn(7, 11)
    kept, seen = x.clone(), {state_hash(x).item()}
    bits = x.view(-1).view(torch.int32)
    for element in range(len(bits)):
        for bit in range(32):
            bits[element] ^= torch.tensor(1 << bit).int()
            seen.add(state_hash(x).item())
            bits[element] ^= torch.tensor(1 << bit).int()
    assert torch.equal(x, kept)
    assert len(seen) == 1 + 77 * 32
    x[[0, 1]] = x[[1, 0]]
    assert state_hash(x).item() not in seen  # control: a plain sum does not see that rows changed places
    assert state_hash(x.T) != state_hash(x)
    assert state_hash(kept.to(memory_format=torch.contiguous_format)) == state_hash(kept.t().contiguous().t())
