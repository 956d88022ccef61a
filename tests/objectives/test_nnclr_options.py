"""Every option of NNCLR over several steps against float64 NumPy, and against the option left out."""

import numpy as np
import pytest
import torch
from torch import nn

import nnclr
from nnclr.counter import bits
from tests import reference

DIM, SIZE, BATCH, STEPS, TEMPERATURE = 6, 37, 8, 12, 0.1
LABELS = np.arange(1000) % 5


def objective(**options):
    torch.manual_seed(3)
    made = nnclr.NNCLR(DIM, DIM, 8, 8, SIZE, TEMPERATURE, **options)
    made.projector = nn.Linear(DIM, DIM)
    if options.get("use_predictor", True):
        made.predictor = nn.Linear(DIM, DIM)
    if made.average_projector is not None:
        made.average_projector = nn.Linear(DIM, DIM).requires_grad_(False)
    return made


def affine(linear):
    weight, bias = (t.detach().double().numpy() for t in (linear.weight, linear.bias))
    return lambda x: x @ weight.T + bias


def softmax_loss(anchors, predictions, transpose=False, decoupled=False):
    """Mean over i of -log softmax with or without the positive below the bar; columns too if transposed."""
    logits = reference.unit(anchors) @ reference.unit(predictions).T / TEMPERATURE
    total = 0.0
    for matrix in [logits, logits.T] if transpose else [logits]:
        for i, row in enumerate(matrix):
            below = np.delete(row, i) if decoupled else row
            total += np.log(np.exp(below).sum()) - row[i]
    return total / len(logits)


def positive(queue, z, ids, view, k=1, neighbour="nearest", exclude_own_id=False):
    """The positive of each row by a loop over all entries."""
    if not queue.slots:
        return z
    chosen = []
    for row, (query, own) in enumerate(zip(reference.unit(z), ids, strict=True)):
        entries = [
            entry
            for entry in queue.slots
            if not (exclude_own_id and entry[1] == own)
            and not (neighbour == "oracle" and LABELS[entry[1]] != LABELS[own])
        ]
        entries = sorted(entries, key=lambda entry: -(entry[0] @ query))[:k]
        if not entries or (neighbour == "kth" and len(entries) < k):
            chosen.append(z[row])
        elif neighbour == "kth":
            chosen.append(entries[-1][0])
        elif neighbour == "random":
            draw = int(bits(queue.updates, view, int(own))[0] & np.uint64(2**62 - 1)) % len(entries)
            chosen.append(entries[draw][0])
        elif neighbour == "soft":
            similarities = np.array([entry[0] @ query for entry in entries]) / TEMPERATURE
            weights = np.exp(similarities - similarities.max())
            chosen.append((weights / weights.sum()) @ np.array([entry[0] for entry in entries]))
        else:
            chosen.append(entries[0][0])
    return np.array(chosen)


def follow(views=2, seed=5, **options):
    """Losses of the package and of the reference over the steps."""
    made = objective(**options, labels=torch.from_numpy(LABELS) if options.get("neighbour") == "oracle" else None)
    momentum = options.get("ema_momentum")
    rng, queue, losses = np.random.default_rng(seed), reference.Queue(SIZE), []
    look_up = {key: options[key] for key in ("neighbour", "exclude_own_id") if key in options}
    loss_options = {
        "transpose": options.get("transpose_loss", False),
        "decoupled": options.get("decoupled_loss", False),
    }
    for _ in range(STEPS):
        ids = rng.integers(0, 40, BATCH)
        x = [rng.normal(size=(BATCH, DIM)) for _ in range(views)]
        z = [affine(made.projector)(view) for view in x]
        p = [affine(made.predictor)(view) for view in z] if options.get("use_predictor", True) else z
        keys = z[:2] if momentum is None else [affine(made.average_projector)(view) for view in x[:2]]
        anchors = [
            positive(queue, key, ids, view, options.get("neighbour_k", 1), **look_up) for view, key in enumerate(keys)
        ]
        pairs = [softmax_loss(anchors[a], p[v], **loss_options) for a in range(2) for v in range(views) if v != a]
        tensors = [torch.tensor(view, dtype=torch.float32) for view in x]
        out = made(tensors, tensors[:2], torch.from_numpy(ids))
        out.loss.backward()
        losses.append((out.loss.item(), float(np.mean(pairs))))
        with torch.no_grad():
            for weight in made.parameters():  # so that averaged weights and weights differ
                weight.add_(0.01 * weight.sign()) if weight.requires_grad else None
        if momentum is not None:
            old = made.average_projector.weight.double().numpy().copy()
            wanted = momentum * old + (1 - momentum) * made.projector.weight.detach().double().numpy()
        made.update(out)
        if momentum is not None:
            np.testing.assert_allclose(made.average_projector.weight.numpy(), wanted, atol=1e-6)
        both = options.get("enqueue_both_views", False)
        queue.push(np.concatenate(keys) if both else keys[0], np.tile(ids, 2) if both else ids)
        table = made.support_set.vectors[: len(queue.slots)].numpy()
        assert np.abs(table - np.array([entry[0] for entry in queue.slots])).max() < 1e-6
    return np.array(losses).T


OPTIONS = [
    {"neighbour": "kth", "neighbour_k": 3},
    {"neighbour": "random", "neighbour_k": 4},
    {"neighbour": "soft", "neighbour_k": 5},
    {"neighbour": "oracle"},
    {"exclude_own_id": True},
    {"enqueue_both_views": True},
    {"use_predictor": False},
    {"transpose_loss": True},
    {"decoupled_loss": True},
    {"ema_momentum": 0.9},
    {"views": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
def test_option_agrees_with_the_reference_and_does_something(options):
    ours, expected = follow(**options)
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    without, _ = follow()
    assert np.abs(ours[6:] - without[6:]).max() > 1e-3


def test_random_replacement_fills_first_and_then_keeps_a_random_sample():
    made = nnclr.SupportSet(10, 2, replacement="random")
    rng, seen = np.random.default_rng(0), []
    for step in range(200):
        ids = torch.arange(4) + 4 * step
        made.enqueue(torch.from_numpy(rng.normal(size=(4, 2))), ids)
        seen.append(made.ids.tolist())
        kept = [i for i in made.ids.tolist() if i >= 0]
        assert len(kept) == min(10, 4 * (step + 1)) == len(set(kept))
        assert set(ids.tolist()) <= set(kept)
    assert seen[1] == [*range(8), -1, -1]
    assert {8, 9, 10, 11} <= set(seen[2])
    ages = np.concatenate([(np.array(row) // 4) for row in seen[50:]]) - np.repeat(np.arange(50, 200), 10)
    assert ages.min() < -6  # first-in first-out would never keep an entry for more than three updates
    assert (
        np.abs(np.bincount(-ages)[:4] / 150 - 4 * 0.6 ** np.arange(4)).max() < 0.15
    )  # each entry survives with 6 / 10
    assert seen == replay()


def replay():
    """The same set once more: replacement is a function of the update, not of torch's generator."""
    torch.manual_seed(77)
    made, rng, seen = nnclr.SupportSet(10, 2, replacement="random"), np.random.default_rng(0), []
    for step in range(200):
        made.enqueue(torch.from_numpy(rng.normal(size=(4, 2))), torch.arange(4) + 4 * step)
        seen.append(made.ids.tolist())
    return seen


def test_random_replacement_of_a_batch_larger_than_the_set_keeps_the_newest():
    made = nnclr.SupportSet(5, 2, replacement="random")
    for start in (0, 100):
        made.enqueue(torch.randn(8, 2), torch.arange(8) + start)
        assert sorted(made.ids.tolist()) == [start + i for i in range(3, 8)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"neighbour": "oracle"}, "no labels"),
        ({"neighbour_k": 3}, "needs neighbour = kth, random or soft"),
        ({"neighbour": "soft", "neighbour_k": 99}, "larger than support_set_size=37"),
        ({"neighbour": "next"}, "is none of nearest"),
        ({"replacement": "lru"}, "neither fifo nor random"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        nnclr.NNCLR(DIM, DIM, 8, 8, SIZE, **options)


def test_with_its_own_view_as_neighbour_nnclr_is_simclr_with_a_predictor():
    """The published identity: NNCLR's loss with NN(z) = z is the cross-view half of the softmax over n terms."""
    made = objective()
    x = [torch.randn(BATCH, DIM) for _ in range(2)]
    empty = made(x, ids=torch.arange(BATCH)).loss  # an empty support set gives the own embedding
    z = [made.projector(view) for view in x]
    made.support_set.enqueue(torch.cat(z), torch.arange(2 * BATCH))
    found = made(x, ids=torch.arange(BATCH))
    assert found.metrics["neighbour_similarity"].item() == pytest.approx(1, abs=1e-6)
    own = [affine(made.projector)(view.double().numpy()) for view in x]
    p = [affine(made.predictor)(view) for view in own]
    both_ways = 0.5 * (softmax_loss(own[0], p[1]) + softmax_loss(own[1], p[0]))
    same_view = 0.5 * (softmax_loss(own[0], p[0]) + softmax_loss(own[1], p[1]))
    for loss in (empty, found.loss):
        assert loss.item() == pytest.approx(both_ways, rel=2e-6)
    assert abs(same_view - both_ways) > 0.1  # control


def test_averaged_weights_of_momentum_zero_are_the_weights(pictures, tmp_path, tiny):
    """The baseline of the momentum ablation is the paper's method, bit for bit, through the whole loop."""
    encoders = [
        nnclr.Encoder.from_pretrained(nnclr.pretrain(pictures, tmp_path / str(momentum), **tiny, **options).path)
        for momentum, options in ((None, {}), (0, {"ema_momentum": 0.0}), (0.5, {"ema_momentum": 0.5}))
    ]
    assert encoders[0].fingerprint == encoders[1].fingerprint
    assert encoders[0].fingerprint != encoders[2].fingerprint  # control


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, np.log(8)),
        ({"transpose_loss": True}, 2 * np.log(8)),
        ({"decoupled_loss": True}, np.log(7)),
        ({"transpose_loss": True, "decoupled_loss": True}, 2 * np.log(7)),
    ],
)
def test_chance_level_is_the_loss_of_predictions_that_say_nothing(options, expected):
    made = nnclr.NNCLR(8, 8, 8, 8, support_set_size=50, **options)
    made.projector, made.predictor = torch.nn.Identity(), torch.nn.Identity()
    made.support_set.enqueue(torch.eye(8))
    out = made([torch.ones(8, 8)] * 2, ids=torch.arange(8))  # every prediction is the same
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    assert out.metrics["loss_chance"].item() == pytest.approx(expected, abs=1e-6)


def test_neighbour_pictures_are_drawn_with_the_weights_of_the_look_up(pictures, tmp_path, tiny, monkeypatch):
    from nnclr import neighbour_sheet

    used, objectives = [], []
    real, look_up = neighbour_sheet.draw_neighbours, nnclr.NNCLR.pictured_look_up

    def spy(path, encoder, *rest):
        used.append(encoder)
        return real(path, encoder, *rest)

    monkeypatch.setattr(neighbour_sheet, "draw_neighbours", spy)
    monkeypatch.setattr(nnclr.NNCLR, "pictured_look_up", lambda self: (objectives.append(self), look_up(self))[1])
    looked_up, nearest = [], nnclr.SupportSet.nearest

    def listen(self, z, k=1, **options):
        looked_up.append(z)
        return nearest(self, z, k, **options)

    monkeypatch.setattr(nnclr.SupportSet, "nearest", listen)
    nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1, "ema_momentum": 0.9})
    encoder, objective = used[-1], objectives[-1]
    queries = looked_up[-1]
    features = torch.from_numpy(encoder.embed(pictures[0]))
    with torch.no_grad():
        averaged = objective.average_projector.eval()(features)
        online = objective.projector.eval()(features)
    distance = [(queries[:, None] - of[None]).norm(dim=2).min(dim=1).values.max() for of in (averaged, online)]
    assert distance[0] < 1e-4
    assert distance[1] > 1e-3  # control
