"""The package against an independent float64 NumPy NNCLR; every mutation of the package must be noticed."""

import numpy as np
import pytest
import torch
from torch import nn

import nnclr
from nnclr.objectives import nnclr as module
from nnclr.support_set import SupportSet
from tests import reference

DIM, SIZE, BATCH, STEPS, TEMPERATURE = 6, 37, 8, 50, 0.1


def objective():
    """NNCLR whose heads are fixed matrices, so that NumPy can follow them."""
    torch.manual_seed(3)
    made = nnclr.NNCLR(DIM, embedding_dim=DIM, support_set_size=SIZE, temperature=TEMPERATURE)
    made.projector = nn.Linear(DIM, DIM)
    made.predictor = nn.Linear(DIM, DIM)
    return made


def follow(made):
    """Run 50 steps beside the reference; a description of the first disagreement, or None."""
    rng = np.random.default_rng(5)
    f = made.projector.weight.detach().double().numpy(), made.projector.bias.detach().double().numpy()
    g = made.predictor.weight.detach().double().numpy(), made.predictor.bias.detach().double().numpy()
    queue = reference.Queue(SIZE)
    for step in range(STEPS):
        ids = rng.integers(0, 1000, BATCH)
        x1, x2 = rng.normal(size=(BATCH, DIM)), rng.normal(size=(BATCH, DIM))
        z1, z2 = (x @ f[0].T + f[1] for x in (x1, x2))
        p1, p2 = (z @ g[0].T + g[1] for z in (z1, z2))
        features = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (x1, x2)]
        out = made(features, ids=torch.from_numpy(ids))
        expected = reference.step_loss(queue, z1, z2, p1, p2, TEMPERATURE)
        if abs(out.loss.item() - expected) > 1e-6 * max(1, abs(expected)):
            return f"step {step}: loss {out.loss.item()} instead of {expected}"
        if queue.slots:
            for found, z in zip(out.neighbours, (z1, z2), strict=True):
                best = [queue.slots[s] for s in queue.nearest(z)]
                if found.ids[:, 0].tolist() != [entry[1] for entry in best]:
                    return f"step {step}: another neighbour"
                if found.ages[:, 0].tolist() != [queue.updates - entry[2] for entry in best]:
                    return f"step {step}: another age"
        out.loss.backward()
        problem = wrong_gradient(features[0].grad, out, queue, (x1, z2), f, g)
        if problem:
            return f"step {step}: {problem}"
        made.update(out)
        queue.push(z1, ids)
        table = made.support_set.vectors[: len(queue.slots)].numpy()
        if np.abs(table - np.array([entry[0] for entry in queue.slots])).max() > 1e-6:
            return f"step {step}: another support set"
        if made.support_set.ids[: len(queue.slots)].tolist() != [entry[1] for entry in queue.slots]:
            return f"step {step}: other ids"
    return None


def wrong_gradient(grad, out, queue, values, f, g):
    """Gradient with respect to view 1's features: only through p1 = g(f(x1)), the neighbour of view 2 fixed."""
    x1, z2 = values
    anchors = np.array([queue.slots[s][0] for s in queue.nearest(z2)]) if queue.slots else z2

    def half(x):
        return 0.5 * reference.nnclr_loss(anchors, (x @ f[0].T + f[1]) @ g[0].T + g[1], TEMPERATURE)

    expected = reference.numerical_gradient(half, x1)
    error = np.abs(grad.double().numpy() - expected).max()
    return f"gradient off by {error}" if error > 2e-6 * max(1, np.abs(expected).max()) else None


def test_fifty_steps_agree_with_the_reference():
    assert follow(objective()) is None


# ---- mutations: what others got wrong ----------------------------------------------------------------------


def enqueue_before_look_up(monkeypatch):
    forward = nnclr.NNCLR.forward

    def early(self, features, targets=None, ids=None):
        self.support_set.enqueue(self.projector(features[0]), ids)
        return forward(self, features, targets, ids)

    monkeypatch.setattr(nnclr.NNCLR, "forward", early)
    monkeypatch.setattr(nnclr.NNCLR, "update", lambda self, out: None)


def softmax_of_2n_minus_1(monkeypatch):
    from nnclr.objectives.simclr import nt_xent_loss

    monkeypatch.setattr(module, "nnclr_loss", lambda a, p, t, *_: nt_xent_loss(a, p, t))


def prediction_of_the_own_view(monkeypatch):
    original, calls = module.nnclr_loss, []

    def swapped(neighbours, predictions, temperature, *_):
        calls.append((neighbours, predictions))
        if len(calls) % 2:
            return predictions.sum() * 0  # wait for the other call to see both predictions
        (n1, p2), (n2, p1) = calls[-2:]
        return original(n1, p1, temperature) + original(n2, p2, temperature)

    monkeypatch.setattr(module, "nnclr_loss", swapped)


def gradient_through_the_neighbour(monkeypatch):
    def attached(neighbours, predictions, temperature, *_):
        # keras-io's straight-through anchor: the value of the neighbour, the gradient of the embedding
        a, p = nn.functional.normalize(neighbours, dim=1), nn.functional.normalize(predictions, dim=1)
        a = a + p - p.detach()
        return nn.functional.cross_entropy(a @ p.T / temperature, torch.arange(len(a)))

    monkeypatch.setattr(module, "nnclr_loss", attached)


def batch_tail_dropped(monkeypatch):
    enqueue = SupportSet.enqueue

    def cut(self, z, ids=None):
        room = self.size - int(self.enqueued) % self.size
        enqueue(self, z[:room], None if ids is None else ids[:room])

    monkeypatch.setattr(SupportSet, "enqueue", cut)


def predictions_not_normalised(monkeypatch):
    def raw(neighbours, predictions, temperature, *_):
        a = nn.functional.normalize(neighbours.detach(), dim=1)
        return nn.functional.cross_entropy(a @ predictions.T / temperature, torch.arange(len(a)))

    monkeypatch.setattr(module, "nnclr_loss", raw)


def view_2_enqueued(monkeypatch):
    monkeypatch.setattr(nnclr.NNCLR, "update", lambda self, out: self.support_set.enqueue(out.embeddings[1], out.ids))


def support_set_not_normalised(monkeypatch):
    enqueue = SupportSet.enqueue

    def raw(self, z, ids=None):
        before = int(self.enqueued)
        enqueue(self, z, ids)
        slots = (before + torch.arange(len(z))) % self.size
        self.vectors[slots] = z

    monkeypatch.setattr(SupportSet, "enqueue", raw)


def both_views_enqueued(monkeypatch):
    def update(self, out):
        self.support_set.enqueue(torch.cat(out.embeddings), torch.cat([out.ids, out.ids]))

    monkeypatch.setattr(nnclr.NNCLR, "update", update)


def predictor_left_out(monkeypatch):
    forward = nnclr.NNCLR.forward

    def short(self, *args, **kwargs):
        self.predictor = nn.Identity()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nnclr.NNCLR, "forward", short)


def predictor_takes_normalised_embeddings(monkeypatch):
    forward = nnclr.NNCLR.forward

    def normalised(self, *args, **kwargs):
        hook = self.predictor.register_forward_pre_hook(lambda _, z: nn.functional.normalize(z[0], dim=1))
        out = forward(self, *args, **kwargs)
        hook.remove()
        return out

    monkeypatch.setattr(nnclr.NNCLR, "forward", normalised)


def another_query(monkeypatch):
    nearest = SupportSet.nearest

    def flipped(self, z, *args, **kwargs):
        return nearest(self, z.flip(1), *args, **kwargs)

    monkeypatch.setattr(SupportSet, "nearest", flipped)


def another_temperature(monkeypatch):
    original = module.nnclr_loss
    monkeypatch.setattr(module, "nnclr_loss", lambda a, p, t, *_: original(a, p, 0.101))


@pytest.mark.parametrize(
    "mutation",
    [
        enqueue_before_look_up,
        softmax_of_2n_minus_1,
        prediction_of_the_own_view,
        gradient_through_the_neighbour,
        batch_tail_dropped,
        predictions_not_normalised,
        view_2_enqueued,
        support_set_not_normalised,
        both_views_enqueued,
        predictor_left_out,
        predictor_takes_normalised_embeddings,
        another_query,
        another_temperature,
    ],
    ids=lambda f: f.__name__,
)
def test_mutation_is_noticed(monkeypatch, mutation):
    mutation(monkeypatch)
    assert follow(objective()) is not None


# ---- the loss alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_loss_and_gradient_in_float64(temperature):
    rng = np.random.default_rng(0)
    a, p = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    predictions = torch.tensor(p, requires_grad=True)
    neighbours = torch.tensor(a, requires_grad=True)
    loss = nnclr.nnclr_loss(neighbours, predictions, temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(reference.nnclr_loss(a, p, temperature), rel=1e-12)
    loss.backward()
    expected = reference.numerical_gradient(lambda x: reference.nnclr_loss(a, x, temperature), p)
    np.testing.assert_allclose(predictions.grad.numpy(), expected, atol=1e-7)
    assert neighbours.grad is None


def test_loss_keeps_dtype_and_computes_in_float32():
    a, p = torch.randn(16, 8), torch.randn(16, 8)
    exact = nnclr.nnclr_loss(a.bfloat16().double(), p.bfloat16().double(), 0.1).item()
    with torch.autocast("cpu", torch.bfloat16):
        half = nnclr.nnclr_loss(a.bfloat16(), p.bfloat16(), 0.1)
        full = nnclr.nnclr_loss(a.bfloat16().float(), p.bfloat16().float(), 0.1)
    assert half.dtype == torch.bfloat16
    assert half.item() == torch.tensor(exact).bfloat16().item()
    assert full.item() == pytest.approx(exact, rel=1e-6)


def test_chance_level_is_log_n():
    assert nnclr.nnclr_loss(torch.ones(32, 4), torch.ones(32, 4)).item() == pytest.approx(np.log(32))


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 5, 3)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must both be"):
        nnclr.nnclr_loss(torch.zeros(5, 3), torch.zeros(shape))


def test_wrong_number_of_views_is_refused():
    with pytest.raises(ValueError, match="2 views, got 1"):
        objective()([torch.zeros(4, DIM)])


def test_gradient_reaches_all_of_the_heads_and_nothing_else():
    made = nnclr.NNCLR(DIM, DIM, 12, 12, SIZE)
    for _ in range(2):
        features = [torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2)]
        out = made(features, ids=torch.arange(BATCH))
        out.loss.backward()
        made.update(out)
    assert all(view.grad.abs().max() > 0 for view in features)
    assert all(p.grad is not None for p in made.parameters())
    assert not any(t.requires_grad for t in (*out.embeddings, *out.neighbours[0], made.support_set.vectors))


def test_the_encoder_learns_only_through_the_predictions():
    """Cut behind the projector and nothing is left, although neighbours are found with the embeddings."""

    class Cut(nn.Linear):
        def forward(self, z):
            return super().forward(z.detach())

    for predictor, share in ((Cut(DIM, DIM), False), (nn.Linear(DIM, DIM), True)):  # the second is the control
        made = objective()
        made.predictor = predictor
        made.support_set.enqueue(torch.randn(20, DIM), torch.arange(20))
        made([torch.randn(BATCH, DIM), torch.randn(BATCH, DIM)]).loss.backward()
        assert (made.projector.weight.grad is not None) == share
        assert made.predictor.weight.grad.abs().max() > 0


def test_forward_never_writes_the_support_set():
    made = objective()
    made.support_set.enqueue(torch.randn(20, DIM), torch.arange(20))
    before = {name: value.clone() for name, value in made.support_set.state_dict().items()}
    for _ in range(3):
        made([torch.randn(BATCH, DIM), torch.randn(BATCH, DIM)], ids=torch.arange(BATCH))
    assert all(torch.equal(before[name], value) for name, value in made.support_set.state_dict().items())


def test_metrics_against_values_made_by_hand():
    made = objective()
    made.projector = nn.Identity()
    basis = torch.eye(DIM)
    made.support_set.enqueue(basis[:3], torch.tensor([10, 11, 12]))
    made.support_set.enqueue(basis[3:5], torch.tensor([13, 14]))
    view1 = torch.stack([basis[0], basis[0] * 3, basis[3], (basis[1] + basis[2] * 0.1)])
    view2 = torch.stack([basis[0], basis[1], basis[2], basis[4]])
    out = made([view1, view2], ids=torch.tensor([10, 11, 13, 99]))
    cosine = 1 / np.sqrt(1.01)
    assert out.metrics["neighbour_similarity"].item() == pytest.approx((7 + cosine) / 8)
    assert out.metrics["neighbour_age"].item() == pytest.approx(((2 + 2 + 1 + 2) / 4 + (2 + 2 + 2 + 1) / 4) / 2)
    assert out.metrics["own_id_share"].item() == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert out.metrics["distinct_neighbours"].item() == pytest.approx((3 / 4 + 4 / 4) / 2)
    assert out.metrics["support_set_fill"].item() == pytest.approx(5 / SIZE)
    assert out.metrics["loss_chance"].item() == pytest.approx(np.log(4))
    without = made([view1, view2])
    assert "own_id_share" not in without.metrics
    assert "distinct_neighbours" not in without.metrics


def test_entries_without_ids_are_not_told_apart():
    """Each query finds another one; by their ids, which are all unknown, they would be one and the same hub."""
    made = objective()
    made.projector = nn.Identity()
    basis = torch.eye(DIM)[:4]
    for ids, distinct in ((torch.arange(4), 1.0), (None, None)):
        made.support_set.enqueue(basis, ids)
        made.support_set.enqueue(-basis.repeat(SIZE // 4, 1)[: SIZE - 4], torch.arange(SIZE - 4))
        metrics = made([basis, basis], ids=torch.arange(4)).metrics
        assert metrics["neighbour_similarity"] == 1
        assert metrics["distinct_neighbours"].item() == distinct or (
            distinct is None and metrics["distinct_neighbours"].isnan()
        )


def test_queries_that_find_nothing_do_not_hide_a_hub():
    """With labels of which some are not in the set yet: the others all find one entry."""
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    made = nnclr.NNCLR(DIM, DIM, 16, 16, support_set_size=SIZE, neighbour="oracle", labels=labels)
    made.projector = nn.Identity()
    made.support_set.enqueue(torch.eye(DIM)[:1], torch.tensor([0]))
    metrics = made([torch.rand(6, DIM)] * 2, ids=torch.arange(6)).metrics
    assert metrics["distinct_neighbours"].item() == pytest.approx(2 / 6)  # the entry, and that there is none


def test_neighbour_metrics_are_nan_while_the_support_set_is_empty():
    out = objective()([torch.randn(BATCH, DIM), torch.randn(BATCH, DIM)], ids=torch.arange(BATCH))
    unknown = {name for name, value in out.metrics.items() if value.isnan()}
    assert unknown == {"neighbour_similarity", "neighbour_age", "own_id_share", "distinct_neighbours"}
    assert out.metrics["support_set_fill"].item() == 0
    assert out.loss.isfinite()
