"""Each compared method over several steps against its own float64 NumPy reference: loss, gradients and state."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnclr.models.ema import momentum_at
from nnclr.objectives import NNCLR, OBJECTIVES, SimCLR
from nnclr.objectives.all4one import All4One, centroid_loss
from nnclr.objectives.barlow_twins import BarlowTwins, barlow_twins_loss
from nnclr.objectives.byol import BYOL, byol_loss
from nnclr.objectives.moco import MoCoV2, MoCoV3
from nnclr.objectives.msf import MSF
from nnclr.objectives.nn_byol import NNBYOL, NNSimSiam
from nnclr.objectives.simsiam import SimSiam
from nnclr.objectives.snclr import SNCLR
from nnclr.objectives.supervised import Supervised
from nnclr.objectives.swav import SwAV, sinkhorn
from nnclr.support_set import SupportSet
from tests import reference
from tests.reference import unit

DIM, SIZE, BATCH, STEPS = 6, 19, 8, 6
LABELS = np.arange(100) % 3


def affine(linear):
    weight, bias = (t.detach().double().numpy() for t in (linear.weight, linear.bias))
    return lambda x: x @ weight.T + bias


def linear_heads(made):
    """Heads that NumPy can follow; the averaged ones differ from the others."""
    torch.manual_seed(1)
    width = made.support_set.dim if hasattr(made, "support_set") else DIM
    for name, width_in in (("projector", DIM), ("predictor", width), ("centroid_predictor", width)):
        if hasattr(made, name):
            setattr(made, name, nn.Linear(width_in, width))
    if hasattr(made, "average_projector"):
        made.average_projector = nn.Linear(DIM, width).requires_grad_(False)
    return made


def held(state, name, value):
    """The value when the step was first evaluated: what takes no gradient stays while something else is moved."""
    return state.get("held", {}).setdefault(name, value)


def distance(p, t):
    """Mean squared distance of unit rows."""
    return np.mean(np.sum((unit(p) - unit(t)) ** 2, axis=1))


def softmax_rows(logits, own):
    logits = logits - logits.max(axis=1, keepdims=True)
    return -np.mean(logits[np.arange(len(logits)), own] - np.log(np.exp(logits).sum(axis=1)))


def byol(made, x, targets, ids, state):
    p = [affine(made.predictor)(affine(made.projector)(view)) for view in x]
    t = [affine(made.average_projector)(view) for view in targets]
    return distance(p[0], t[1]) + distance(p[1], t[0])


def simsiam(made, x, targets, ids, state):
    z = [affine(made.projector)(view) for view in x]
    p = [affine(made.predictor)(view) for view in z]
    t = held(state, "targets", z)
    return distance(p[0], t[1]) + distance(p[1], t[0])


def neighbour_targets(state, keys, ids):
    queue = state.setdefault("queue", reference.Queue(SIZE))
    found = [np.array([queue.slots[slot][0] for slot in queue.nearest(key)]) if queue.slots else key for key in keys]
    queue.push(keys[0], ids)
    return found


def nn_byol(made, x, targets, ids, state):
    p = [affine(made.predictor)(affine(made.projector)(view)) for view in x]
    n = neighbour_targets(state, [affine(made.average_projector)(view) for view in targets], ids)
    return distance(p[0], n[1]) + distance(p[1], n[0])


def nn_simsiam(made, x, targets, ids, state):
    z = [affine(made.projector)(view) for view in x]
    p = [affine(made.predictor)(view) for view in z]
    n = held(state, "targets", neighbour_targets(state, z, ids))
    return distance(p[0], n[1]) + distance(p[1], n[0])


def msf(made, x, targets, ids, state):
    queue = state.setdefault("queue", reference.Queue(SIZE))
    p = [affine(made.predictor)(affine(made.projector)(view)) for view in x]
    t = [affine(made.average_projector)(view) for view in targets]
    total = 0.0
    for query, key in ((p[1], t[0]), (p[0], t[1])):
        for row, own in zip(unit(query), unit(key), strict=True):
            near = sorted((entry[0] for entry in queue.slots), key=lambda vector: -(vector @ own))[:2]  # k - 1
            total += np.mean([np.sum((row - vector) ** 2) for vector in [own, *near]]) / BATCH
    queue.push(t[0], ids)
    return total


def moco_v2(made, x, targets, ids, state):
    queue = state.setdefault("queue", reference.Queue(SIZE))
    q, k = unit(affine(made.projector)(x[0])), affine(made.average_projector)(targets[1])
    logits = np.sum(q * unit(k), axis=1, keepdims=True)
    if queue.slots:
        logits = np.concatenate([logits, q @ np.array([entry[0] for entry in queue.slots]).T], axis=1)
    queue.push(k, ids)
    return softmax_rows(logits / 0.2, np.zeros(BATCH, int))


def moco_v3(made, x, targets, ids, state):
    p = [affine(made.predictor)(affine(made.projector)(view)) for view in x]
    t = [affine(made.average_projector)(view) for view in targets]
    one_way = [softmax_rows(unit(p[a]) @ unit(t[1 - a]).T / 0.2, np.arange(BATCH)) for a in range(2)]
    return 2 * 0.2 * sum(one_way)


def barlow(made, x, targets, ids, state):
    z = [affine(made.projector)(view) for view in x]
    z = [(view - view.mean(0)) / view.std(0) for view in z]
    total = 0.0
    for i in range(DIM):
        for j in range(DIM):
            c = np.mean(z[0][:, i] * z[1][:, j])
            total += (1 - c) ** 2 if i == j else 0.0051 * c**2
    return total


def supervised(made, x, targets, ids, state):
    return np.mean([softmax_rows(affine(made.classifier)(view), LABELS[ids]) for view in x])


def plain_sinkhorn(scores):
    q = np.exp(scores / 0.05).T
    q /= q.sum()
    for _ in range(3):
        q = q / q.sum(axis=1, keepdims=True) / len(q)
        q = q / q.sum(axis=0, keepdims=True) / q.shape[1]
    return (q * q.shape[1]).T


def swav(made, x, targets, ids, state):
    prototypes = made.prototypes.weight.detach().double().numpy()
    assert np.allclose(np.linalg.norm(prototypes, axis=1), 1, atol=1e-6)
    z = [unit(affine(made.projector)(view)) for view in x]
    queue = state.setdefault("queue", [[], []])
    codes = []
    for view in range(2):
        rows = np.concatenate([z[view], *queue[view]])[: BATCH + 16] if len(queue[view]) * BATCH >= 16 else z[view]
        codes.append(plain_sinkhorn(rows @ prototypes.T)[:BATCH])
        queue[view].insert(0, z[view])
    codes, losses = held(state, "codes", codes), []
    for large in range(2):
        for view in range(len(z)):
            if view != large:
                logits = z[view] @ prototypes.T / 0.1
                log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                losses.append(-np.mean(np.sum(codes[large] * log_p, axis=1)))
    return np.mean(losses)


def weighted_rows(anchors, weights, predictions, temperature):
    """Mean over i of sum_j w_ij * -log softmax_g(a_ij . p_g / t)[i] / sum_j w_ij."""
    total = 0.0
    for i, (row, row_weights) in enumerate(zip(anchors, weights, strict=True)):
        losses = [softmax_rows((vector @ unit(predictions).T / temperature)[None], [i]) for vector in row]
        total += np.dot(row_weights, losses) / np.sum(row_weights) / BATCH
    return total


def snclr(made, x, targets, ids, state):
    queue = state.setdefault("queue", reference.Queue(SIZE))
    p = [affine(made.predictor)(affine(made.projector)(view)) for view in x]
    t = [affine(made.average_projector)(view) for view in targets]
    total = 0.0
    for key, prediction in ((t[0], p[1]), (t[1], p[0])):
        anchors, weights = [], []
        for own in unit(key):
            near = sorted((entry[0] for entry in queue.slots), key=lambda vector: -(vector @ own))[:4]
            scores = np.exp([vector @ own / 0.1 for vector in near])
            anchors.append([own, *near])
            weights.append([1.0, *(scores / scores.sum() if near else [])])
        total += 0.5 * weighted_rows(anchors, weights, prediction, 0.1)
    queue.push(t[0], ids)
    return total


def transformer_layer(layer):
    """A post-norm transformer encoder layer in NumPy."""
    weights = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        centred /= np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x):
        q, k, v = np.split(x @ weights["self_attn.in_proj_weight"].T + weights["self_attn.in_proj_bias"], 3, axis=-1)
        width = q.shape[-1] // 8
        heads = []
        for head in range(8):
            part = slice(head * width, (head + 1) * width)
            scores = np.exp(q[..., part] @ np.swapaxes(k[..., part], -1, -2) / np.sqrt(width))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        return np.concatenate(heads, -1) @ weights["self_attn.out_proj.weight"].T + weights["self_attn.out_proj.bias"]

    def apply(x):
        x = norm(x + attention(x), "norm1")
        hidden = np.maximum(x @ weights["linear1.weight"].T + weights["linear1.bias"], 0)
        return norm(x + hidden @ weights["linear2.weight"].T + weights["linear2.bias"], "norm2")

    return apply


def all4one(made, x, targets, ids, state):
    queue = state.setdefault("queue", reference.Queue(SIZE))
    z = [affine(made.projector)(view) for view in x]
    p, c = ([affine(head)(view) for view in z] for head in (made.predictor, made.centroid_predictor))
    t = [affine(made.average_projector)(view) for view in targets]
    total = 0.0
    for a in range(2):
        sequences = []
        for own in unit(t[a]):
            near = sorted((entry[0] for entry in queue.slots), key=lambda vector: -(vector @ own))[:3]
            sequences.append([*near, *[own] * (3 - len(near))])
        centroids = transformer_layer(made.mixer)(np.array(sequences))[:, 0]
        first = np.array([sequence[0] for sequence in sequences])
        own = np.arange(BATCH)
        total += 0.25 * softmax_rows(first @ unit(p[1 - a]).T / 0.2, own)
        total += 0.25 * softmax_rows(unit(centroids) @ unit(c[1 - a]).T / 0.2, own)
        one, two = ((view - view.mean(0)) / view.std(0) for view in (t[a], p[1 - a]))
        correlation = one.T @ two / BATCH
        squares = 0.0051 * (correlation**2).sum() + sum((1 - d) ** 2 - 0.0051 * d**2 for d in np.diag(correlation))
        total += 0.5 * 5 * squares / one.shape[1]
    queue.push(t[0], ids)
    return total


METHODS = {
    "byol": (lambda: BYOL(DIM, DIM, 8, 8), byol),
    "simsiam": (lambda: SimSiam(DIM, DIM, 8, 8), simsiam),
    "nn-byol": (lambda: NNBYOL(DIM, DIM, 8, 8, support_set_size=SIZE), nn_byol),
    "nn-simsiam": (lambda: NNSimSiam(DIM, DIM, 8, 8, support_set_size=SIZE), nn_simsiam),
    "msf": (lambda: MSF(DIM, DIM, 8, 8, support_set_size=SIZE, neighbour_k=3), msf),
    "snclr": (lambda: SNCLR(DIM, DIM, 8, 8, support_set_size=SIZE, neighbour_k=4), snclr),
    "all4one": (lambda: All4One(DIM, 8, 8, 8, support_set_size=SIZE, neighbour_k=3), all4one),
    "moco-v2": (lambda: MoCoV2(DIM, DIM, 8, support_set_size=SIZE), moco_v2),
    "moco-v3": (lambda: MoCoV3(DIM, DIM, 8, 8), moco_v3),
    "barlow-twins": (lambda: BarlowTwins(DIM, DIM, 8), barlow),
    "supervised": (lambda: Supervised(DIM, torch.from_numpy(LABELS)), supervised),
    "swav": (lambda: SwAV(DIM, DIM, 8, prototypes=5, swav_queue_size=16), swav),
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_agree_over_several_steps(name):
    torch.manual_seed(0)
    create, expected = METHODS[name]
    made, state, rng = linear_heads(create()), {}, np.random.default_rng(2)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        ids = rng.integers(0, 100, BATCH)
        x, t = ([rng.normal(size=(BATCH, DIM)) for _ in range(2)] for _ in range(2))
        wanted = expected(made, x, t, ids, state)
        features = [torch.tensor(view, dtype=torch.float32, requires_grad=True) for view in x]
        out = made(features, [torch.tensor(view, dtype=torch.float32) for view in t], torch.from_numpy(ids))
        assert out.loss.item() == pytest.approx(wanted, rel=3e-6), len(losses)
        losses.append(wanted)
        optimizer.zero_grad()
        out.loss.backward()
        assert (features[0].grad.abs().max() > 0) == (wanted > 0)  # MoCo v2's first step has no negatives yet
        optimizer.step()
        if made.momentum is not None:
            old = made.average_projector.weight.clone()
            moved = made.momentum * old + (1 - made.momentum) * made.projector.weight.detach()
        made.update(out)
        if made.momentum is not None:
            assert not torch.equal(old, made.average_projector.weight)
            torch.testing.assert_close(made.average_projector.weight, moved)
            assert all(p.grad is None and not p.requires_grad for p in made.average_projector.parameters())
    assert len(set(losses)) == STEPS


def slopes(loss, made, x, rng, epsilon=1e-6):
    """Central differences of loss(x): some entries of each weight of a float64 module, and a direction of each view."""
    for name, weight in made.named_parameters():
        entries = weight.detach().view(-1)
        for index in rng.choice(len(entries), min(6, len(entries)), replace=False) if weight.requires_grad else ():
            kept, sides = entries[index].item(), []
            for value in (kept + epsilon, kept - epsilon):
                entries[index] = value
                sides.append(loss(x))
            entries[index] = kept
            yield name, index, (sides[0] - sides[1]) / (2 * epsilon)
    for view in range(len(x)):
        way = rng.normal(size=x[view].shape)
        up, down = ([*x[:view], x[view] + by * way, *x[view + 1 :]] for by in (epsilon, -epsilon))
        yield view, way, (loss(up) - loss(down)) / (2 * epsilon)


def gradients(name):
    """The package's gradients and the reference's slopes, at a step whose queues are full."""
    create, reference_loss = METHODS[name]
    made, state, rng = linear_heads(create()), {}, np.random.default_rng(4)
    for step in range(4):
        ids = rng.integers(0, 100, BATCH)
        x, t = ([rng.normal(size=(BATCH, DIM)) for _ in range(2)] for _ in range(2))
        views, targets = ([torch.tensor(view, dtype=torch.float32, requires_grad=True) for view in v] for v in (x, t))
        out = made(views, targets, torch.from_numpy(ids))
        if step < 3:  # queues of 16 and 19 are full after three batches of 8
            reference_loss(made, x, t, ids, state)
            made.update(out)
    out.loss.backward()
    assert all(target.grad is None for target in targets)
    exact, constants = copy.deepcopy(made).double(), {}

    def loss(x):
        return reference_loss(exact, x, t, ids, {**copy.deepcopy(state), "held": constants})

    assert loss(x) == pytest.approx(out.loss.item(), rel=3e-6)
    pairs = []
    for where, which, slope in slopes(loss, exact, x, rng):
        if isinstance(where, str):
            gradient = made.get_parameter(where).grad
            ours = 0.0 if gradient is None else gradient.view(-1)[which].item()
        else:
            ours = 0.0 if views[where].grad is None else np.sum(views[where].grad.double().numpy() * which)
        pairs.append((ours, slope))
    return np.array(pairs).T


CLOSE = {"rtol": 1e-4, "atol": 3e-6}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_reference(name):
    ours, expected = gradients(name)
    np.testing.assert_allclose(ours, expected, **CLOSE)
    assert np.abs(expected).max() > 0.1


def plain_log_softmax(x, dim):
    return x - x.logsumexp(dim, keepdim=True).detach()


MUTATIONS = {
    "simsiam": ("nnclr.objectives.simsiam.byol_loss", lambda p, t: 2 - 2 * F.cosine_similarity(p, t).mean()),
    "nn-simsiam": ("nnclr.objectives.nn_byol.byol_loss", lambda p, t: byol_loss(p.detach(), t) + 0 * p.sum()),
    "swav": ("nnclr.objectives.swav.SwAV._codes", lambda *given: CODES(*given) + given[1] - given[1].detach()),
    "snclr": ("torch.nn.functional.log_softmax", plain_log_softmax),
    "all4one": ("nnclr.objectives.all4one.centroid_loss", lambda c, *given: centroid_loss(c.detach(), *given)),
    "barlow-twins": (
        "nnclr.objectives.barlow_twins.barlow_twins_loss",
        lambda a, *b: barlow_twins_loss(a.detach(), *b),
    ),
}
CODES = SwAV._codes


@pytest.mark.parametrize("name", MUTATIONS)
def test_control_a_stopped_or_leaking_gradient_is_noticed(name, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[name])
    assert not np.allclose(*gradients(name), **CLOSE)


AVERAGED = ("byol", "nn-byol", "msf", "snclr", "all4one", "moco-v2", "moco-v3", "nnclr")


@pytest.mark.parametrize("name", AVERAGED)
def test_no_gradient_reaches_averaged_weights_or_targets(name):
    """With the heads as shipped, not the linear ones of this file."""
    made = NNCLR(DIM, DIM, 8, 8, SIZE, ema_momentum=0.9) if name == "nnclr" else METHODS[name][0]()
    for _ in range(4):
        views, targets = ([torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2)] for _ in range(2))
        out = made(views, targets, torch.arange(BATCH))
        out.loss.backward()
        averaged = list(made.average_projector.parameters())
        assert len(averaged) == len(list(made.projector.parameters())) > 0
        assert not any(p.requires_grad for p in averaged)
        assert all(tensor.grad is None for tensor in [*averaged, *targets])
        kept = [*out.embeddings, *out.keep.values(), *out.metrics.values(), *(n.embeddings for n in out.neighbours)]
        assert not any(tensor.requires_grad for tensor in kept)
        made.update(out)
    assert all(p.grad.abs().sum() > 0 for p in made.projector.parameters() if p.ndim > 1)  # control


MOMENTA = {  # published momentum of the averaged weights at the start, and whether it rises to 1
    "byol": (0.996, True),  # Grill et al., section 3.2
    "moco-v2": (0.999, False),  # He et al., section 3.3
    "moco-v3": (0.99, True),  # Chen, Xie and He, section 4.1
    "msf": (0.99, False),  # Koohpayegani et al., section 4
    "snclr": (0.99, True),
    "all4one": (0.99, True),
    "nn-byol": (0.996, True),  # BYOL's
    **dict.fromkeys("nnclr simclr simsiam swav barlow-twins supervised nn-simsiam".split(), (None, False)),
}


def test_momenta_are_the_published_ones():
    shipped = {"nnclr": lambda: NNCLR(DIM, DIM, 8, 8, SIZE), "simclr": lambda: SimCLR(DIM, DIM, 8)}
    shipped |= {name: create for name, (create, _) in METHODS.items()}
    assert {name: (made().momentum, OBJECTIVES[name].momentum_to_one) for name, made in shipped.items()} == MOMENTA
    assert all(type(made()) is OBJECTIVES[name] for name, made in shipped.items())


def test_every_shipped_method_has_a_reference():
    assert {name for name in OBJECTIVES if ":" not in name} - {"nnclr", "simclr"} == set(
        METHODS
    )  # these two have files of their own


def test_msf_with_one_neighbour_is_byol():
    torch.manual_seed(0)
    msf_made, byol_made = (
        linear_heads(MSF(DIM, DIM, 8, 8, 0.9, SIZE, neighbour_k=1)),
        linear_heads(BYOL(DIM, DIM, 8, 8)),
    )
    for step in range(3):
        views = [torch.randn(BATCH, DIM) for _ in range(4)]
        out = msf_made(views[:2], views[2:], torch.arange(BATCH))
        assert out.loss.item() == pytest.approx(byol_made(views[:2], views[2:]).loss.item(), rel=1e-6)
        msf_made.support_set.enqueue(torch.randn(BATCH, DIM), torch.arange(BATCH) + step)


def test_assignments_are_doubly_stochastic():
    codes = sinkhorn(torch.randn(64, 8), epsilon=0.5, iterations=50)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((8,), 8.0), rtol=1e-4, atol=1e-4)
    assert sinkhorn(torch.randn(64, 8) * 100).isfinite().all()


@pytest.mark.parametrize("loss", [byol_loss, barlow_twins_loss])
def test_gradient_against_finite_differences(loss):
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(7, 4)), rng.normal(size=(7, 4))
    x = torch.tensor(one, requires_grad=True)
    y = torch.tensor(two, requires_grad=True)
    loss(x, y).backward()
    expected = reference.numerical_gradient(lambda a: loss(torch.tensor(a), torch.tensor(two)).item(), one)
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-6)
    assert (y.grad is None) == (loss is byol_loss)  # the target of BYOL takes no gradient, Barlow's other view does


def test_momentum_rises_to_one_or_stays():
    values = [momentum_at(step, base=0.99, to_one=True, total_steps=100) for step in (0, 50, 100)]
    assert values == pytest.approx([0.99, 0.995, 1.0])
    assert momentum_at(70, base=0.99, to_one=False, total_steps=100) == 0.99


@pytest.mark.parametrize("name", ["byol", "simsiam", "moco-v2", "moco-v3", "barlow-twins", "msf", "nn-byol", "snclr"])
def test_three_views_are_refused(name):
    made = METHODS[name][0]()
    with pytest.raises(ValueError, match="2 views, got 3"):
        made([torch.randn(BATCH, DIM)] * 3, [torch.randn(BATCH, DIM)] * 2, torch.arange(BATCH))


@pytest.mark.parametrize("name", ["byol", "moco-v2", "moco-v3", "msf", "nn-byol", "snclr"])
def test_targets_are_required(name):
    with pytest.raises(ValueError, match="needs targets"):
        METHODS[name][0]()([torch.randn(BATCH, DIM)] * 2, ids=torch.arange(BATCH))


def test_what_is_shown_as_the_look_up_is_what_each_method_looks_up(monkeypatch):
    """Pictures of neighbours are drawn by it: the averaged projector, where there is one, of the averaged features."""
    asked, nearest = [], SupportSet.nearest

    def listen(self, z, *rest, **options):
        asked.append((z, self))
        return nearest(self, z, *rest, **options)

    monkeypatch.setattr(SupportSet, "nearest", listen)
    with_look_up = set()
    for name, kind in OBJECTIVES.items():
        sizes = {"embedding_dim": 8, "projector_hidden_dim": 8, "predictor_hidden_dim": 8, "support_set_size": 64}
        labels = {"labels": torch.from_numpy(LABELS)} if "labels" in kind.settings else {}
        made = kind(DIM, **{key: size for key, size in sizes.items() if key in kind.settings}, **labels).eval()
        for parameter in made.parameters():  # the averaged ones began as copies of these
            parameter.data += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
        features, targets = ([torch.randn(BATCH, DIM) for _ in range(2)] for _ in range(2))
        asked.clear()
        made(features, targets if made.momentum is not None else None, torch.arange(BATCH))
        shown = made.pictured_look_up()
        assert (shown is None) == (not asked), name
        if shown is not None:
            with_look_up.add(name)
            (queries, support_set), projector = asked[0], shown[0]
            assert support_set is shown[1]
            seen = torch.cat([projector(view) for view in (features if made.momentum is None else targets)])
            torch.testing.assert_close(queries, seen, msg=name)
    assert with_look_up == {"nnclr", "nn-byol", "nn-simsiam", "msf", "snclr", "all4one"}
