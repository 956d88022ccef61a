"""A network of which each rank holds a share, against the whole network on every rank: on 4 gloo ranks."""

import copy
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import nnclr
from nnclr import distributed, training
from nnclr.config import make_config
from nnclr.errors import InputError
from nnclr.models.blocks import repeated_blocks
from nnclr.models.ema import update_average
from nnclr.objectives.nnclr import neighbour_metrics
from nnclr.optim import clip, create_optimizer, guarded_step
from nnclr.skipped_steps import norms_of

WORLD, STEPS = 4, 3
multiprocessing.set_forkserver_preload(["torch", "timm", "torchvision", "nnclr"])


def network():
    """Rows that four ranks cannot share out evenly, some of which are fewer than ranks."""
    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=18, depth=3, num_heads=2, num_classes=0)


def views(step, number):
    generator = torch.Generator().manual_seed(100 * step + number)
    return [torch.randn(3, 3, 8, 8, generator=generator) for _ in range(2)]


def train(model, average, call, number):
    """Some AdamW steps with two views, clipping, and one step that is not finite; the norms of gradients on the way."""
    optimizer = create_optimizer("adamw", [model], weight_decay=0.1, momentum=0.9)
    parameters, seen = [p for group in optimizer.param_groups for p in group["params"]], []
    for group in optimizer.param_groups:
        group["lr"], group["eps"] = 0.01, 1e-3
    for step in range(STEPS + 1):
        one, two = (call(view) for view in views(step, number))
        loss = (one * two.flip(0)).mean(1).tanh().mean()
        optimizer.zero_grad()
        loss.backward()
        norms = norms_of([p.grad for p in parameters])
        norm = torch.linalg.vector_norm(norms)
        clip(parameters, 0.5 * norm.item(), norm)
        seen.append(norms)
        guarded_step(optimizer, torch.tensor(step != 1))
        if step != 1:
            update_average(average, model, 0.9)
    return optimizer, torch.stack(seen)


def worker(number, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=WORLD)
    plain = network()
    average = copy.deepcopy(plain)
    replica = distributed.replicate(plain)
    expected_optimizer, expected_norms = train(plain, average, replica, number)

    ours, ours_average = network(), network()
    for module in (ours, ours_average):
        distributed.shard(module, repeated_blocks(module))
    held = sum(distributed.local(p).numel() for p in ours.parameters()) / sum(p.numel() for p in ours.parameters())
    optimizer, norms = train(ours, ours_average, ours, number)
    with torch.no_grad():
        features = ours_average(views(9, number)[0]), average(views(9, number)[0])
    # the order of parameters, by which checkpoints name moments, is that of the plain network
    order = [
        (tuple(p.shape), tuple(q.shape))
        for p, q in zip(parameters_of(optimizer), parameters_of(expected_optimizer), strict=True)
    ]
    report = {
        "held": held,
        "norms": (norms, expected_norms),
        "features": features,
        "weights": pairs(ours.state_dict(), plain.state_dict()),
        "average": pairs(ours_average.state_dict(), average.state_dict()),
        "moments": pairs(moments(optimizer), moments(expected_optimizer)),
        "order": all(one == two for one, two in order),
        "local norms": torch.stack([distributed.local(p).norm() for p in ours.parameters()]),
        "whole norms": torch.stack([p.norm() for p in plain.parameters()]),
    }
    like = next(p for p in ours.parameters() if p.shape[0] == 54)
    again = distributed.part_like(like, torch.arange(54.0)[:, None].expand(54, *like.shape[1:]).reshape(like.shape))
    report["cut again"] = torch.equal(
        distributed.whole(again)[:, 0] if again.ndim > 1 else distributed.whole(again), torch.arange(54.0)
    )
    try:
        distributed.part_like(like, torch.zeros(53, *like.shape[1:]))
    except ValueError as error:
        report["refused"] = str(error)
    report["bf16"], report["kept"] = under_autocast(number)
    scalar = nn.Sequential(nn.Linear(2, 2))
    scalar.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    tied = network()
    tied.blocks[1].attn.proj.weight = tied.blocks[0].attn.proj.weight
    try:
        training.share_out(tied, make_config("data", "out", fsdp=True, optimizer="adamw", image_size=8, device="cpu"))
    except InputError as error:
        report["tied"] = str(error)
    try:
        distributed.shard(scalar, [])
    except InputError as error:
        report["scalar"] = str(error)

    members = torch.tensor([float(number)])
    dist.all_reduce(members, group=distributed.rank_group(2))
    report["group"], everyone = members.item(), torch.tensor([float(number)])
    dist.all_reduce(everyone, group=distributed.rank_group(None))
    report["everyone"] = everyone.item()
    try:
        distributed.shared_batch_norm(nn.BatchNorm1d(2), 3)
    except InputError as error:
        report["odd group"] = str(error)

    # Ranks whose queries have the same neighbours: hubs are few in all of them together.
    support_set = nnclr.SupportSet(4, 3)
    support_set.enqueue(torch.eye(3)[[0, 1, 2]], torch.arange(3))
    nearest = support_set.nearest(torch.eye(3)[:2] + 0.01)
    metrics = neighbour_metrics(nearest, nearest, torch.arange(2))
    report["distinct"] = metrics["distinct_neighbours"].item()
    torch.save(report, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def under_autocast(number):
    """Features by bf16, of the whole network and shared out; and bytes of bf16 weights that wait for the backward."""
    made, kept = [network() for _ in range(3)], {}
    features = {}
    for name, dtype, module in zip(("whole", "own", "bf16"), (None, None, torch.bfloat16), made, strict=True):
        if name != "whole":
            distributed.shard(module, repeated_blocks(module), dtype)
        saved = []
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t),
        ):
            features[name] = module(views(5, number)[0])
        weights = [t for t in saved if t.dtype == torch.bfloat16 and sorted(t.shape) == [18, 72]]
        kept[name] = sum(t.untyped_storage().nbytes() for t in weights)
        features[name].float().square().sum().backward()
    return {name: value.detach().float() for name, value in features.items()}, kept


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def moments(optimizer):
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(parameters_of(optimizer))
        for name, value in optimizer.state[parameter].items()
    }


def pairs(ours, expected):
    """Whole tensors of both, by name."""
    assert ours.keys() == expected.keys()
    return {name: (distributed.whole(value), expected[name]) for name, value in ours.items()}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(WORLD)]


def test_training_is_that_of_the_whole_network(reports):
    for report in reports:
        for part in ("weights", "average", "moments"):
            assert len(report[part]) > 30
            ours, expected = (torch.cat([pair[i].flatten() for pair in report[part].values()]) for i in (0, 1))
            assert (ours - expected).norm() <= 1e-5 * expected.norm(), part
        torch.testing.assert_close(*report["norms"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(*report["features"], rtol=1e-4, atol=1e-5)
        assert report["order"]
        steps = [pair[0].item() for name, pair in report["moments"].items() if name.endswith(".step")]
        assert set(steps) == {STEPS}  # one of them was skipped
        # control: the norms of a rank's own parts are others
        assert (report["local norms"] - report["whole norms"]).norm() > 0.1 * report["whole norms"].norm()


def test_each_rank_holds_its_part_alone(reports):
    held = [report["held"] for report in reports]
    assert sum(held) == pytest.approx(1)
    assert max(held) < 0.3
    for report in reports:
        assert report["cut again"]
        assert "a tensor of shape (53" in report["refused"]
        assert report["scalar"].startswith("fsdp=True cannot share out this backbone: ")
        assert report["tied"] == "fsdp=True cannot share out this backbone: two of its layers have the same weights"


def test_under_autocast_no_copies_of_whole_weights_wait_for_the_backward(reports):
    for report in reports:
        whole, own, ours = (report["bf16"][name] for name in ("whole", "own", "bf16"))
        assert (own - whole).norm() <= 1e-2 * whole.norm()
        assert (ours - whole).norm() <= 2e-2 * whole.norm()
        assert report["kept"]["bf16"] == 0
        assert report["kept"]["own"] >= 2 * 3 * 2 * 18 * 72  # the control: both layers of each block's network


def test_groups_of_batch_norms_are_neighbours(reports):
    assert [report["group"] for report in reports] == [1.0, 1.0, 5.0, 5.0]
    assert {report["everyone"] for report in reports} == {6.0}
    assert all("sync_bn_group=3 does not divide the 4 processes" in report["odd group"] for report in reports)


def test_hubs_are_seen_over_all_ranks(reports):
    """Two entries answer the queries of each rank, and of all: 2 of 8, where a rank alone sees 2 of 2."""
    assert {report["distinct"] for report in reports} == {0.25}


def test_alone_nothing_is_shared_out():
    layer = nn.Linear(2, 2)
    assert not distributed.is_shared_out(layer.weight)
    assert distributed.whole(layer.weight) is distributed.local(layer.weight) is layer.weight
    assert distributed.part_like(layer.weight, layer.bias) is layer.bias
    assert distributed.shared_batch_norm(layer, 5) is layer


def test_settings_reach_the_networks(monkeypatch):
    """Backbone and heads have their batch norms in groups; settings that cannot be had are refused when it is built."""
    groups = []
    monkeypatch.setattr(distributed, "shared_batch_norm", lambda module, group: (groups.append(group), module)[1])
    small = {"backbone": "small-convnet", "image_size": 16, "embedding_dim": 8, "support_set_size": 8}
    training.build(make_config("data", "out", sync_bn_group=4, **small), torch.device("cpu"))
    assert groups == [4, 4]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(InputError, match="recompute=True needs a backbone of repeated blocks"):
        training.build(make_config("data", "out", recompute=True, **small), torch.device("cpu"), flat)


def test_batch_norms_of_a_group_share_its_statistics(monkeypatch):
    """SyncBatchNorm computes on CUDA only: that it is given the group is looked at without computing."""
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(distributed, "rank_group", lambda size: ("group", size))
    made = distributed.shared_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2)
    assert isinstance(made[1], nn.SyncBatchNorm)
    assert made[1].process_group == ("group", 2)
