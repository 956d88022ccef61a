"""Objectives of one's own, given as classes: what is asked of them, and that they stay out of other runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nnclr
from nnclr import findings, recorder
from nnclr.bounded_toml import parse_toml
from nnclr.errors import InputError
from nnclr.neighbour_sheet import read_sheet
from nnclr.objectives import SimCLR

SETTINGS = {"backbone": "small-convnet", "image_size": 16, "batch_size": 32, "epochs": 1, "device": "cpu"}
SETTINGS |= {"embedding_dim": 16, "projector_hidden_dim": 32, "precision": "fp32", "quiet": True}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3), dtype=np.uint8)


class Greedy(SimCLR):
    """Takes a setting of every run for its own."""

    settings = (*SimCLR.settings, "epochs")

    def __init__(self, *arguments, epochs, **settings):
        super().__init__(*arguments, **settings)


class Wrong(SimCLR):
    """Names a setting that its constructor does not take."""

    settings = (*SimCLR.settings, "neighbour_k")


class Wanting(SimCLR):
    """Likewise of one whose default is the constructor's."""

    settings = (*SimCLR.settings, "ema_momentum")


class Broken(SimCLR):
    """Makes a head from a number too many."""

    def __init__(self, feature_dim, **settings):
        super().__init__(feature_dim, **settings)
        self.predictor = nnclr.PredictionHead(8, 16, 8)


class Unread(SimCLR):
    """Its constructor asks the standard library for nonsense."""

    def __init__(self, feature_dim, **settings):
        super().__init__(feature_dim, **settings)
        json.loads("{")


class Loud(SimCLR):
    """Reports a loss of its own."""

    def forward(self, features, targets=None, ids=None):
        out = super().forward(features, targets, ids)
        out.metrics["loss"] = torch.zeros(())
        return out


def test_a_class_changes_no_later_run(images, tmp_path):
    nnclr.pretrain(images, tmp_path / "greedy", objective=Greedy, **SETTINGS)
    assert nnclr.pretrain(images, tmp_path / "plain", **SETTINGS).metrics


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Wrong, "unexpected keyword argument 'neighbour_k'"),
        (Wanting, "Wanting names the setting ema_momentum, which its constructor does not take"),
        (Broken, r"but 4 were given \(tests.test_own_objective:Broken, test_own_objective.py, line 5\d\)"),
        (Unread, r"\(tests.test_own_objective:Unread, test_own_objective.py, line 60\)"),
        (torch.nn.Linear, r"torch\.nn\.modules\.linear:Linear is no subclass of nnclr\.Objective"),
    ],
)
def test_what_is_no_objective_is_refused_before_anything_is_written(images, tmp_path, kind, words):
    extra = {"neighbour_k": 2} if kind is Wrong else {}
    with pytest.raises(InputError, match=words):
        nnclr.pretrain(images, tmp_path / "run", objective=kind, **SETTINGS, **extra)
    assert not (tmp_path / "run").exists()


class HandedOn(nnclr.NNCLR):
    """Its constructor hands on what it does not name."""

    def __init__(self, feature_dim, **settings):
        super().__init__(feature_dim, **settings)


class AndOn(HandedOn):
    def __init__(self, *arguments, neighbour_k=2, **settings):
        super().__init__(*arguments, neighbour="kth", neighbour_k=neighbour_k, **settings)


AndOn.settings = tuple(name for name in nnclr.NNCLR.settings if name != "neighbour")


def test_defaults_are_those_of_the_class_that_settings_are_handed_on_to(images, tmp_path):
    for kind, default in ((HandedOn, 1), (AndOn, 2)):
        run = nnclr.pretrain(images, tmp_path / kind.__name__, objective=kind, **SETTINGS)
        settings = parse_toml((run.path / "config.toml").read_bytes())
        assert settings["neighbour_k"] == default
        assert settings["support_set_size"] == 32  # half of the images
        assert "ema_momentum" not in settings


def test_a_metric_may_not_replace_one_of_the_loop(images, tmp_path):
    with pytest.raises(
        InputError, match="the metric 'loss' of the objective is one of the loop's; give it another name"
    ):
        nnclr.pretrain(images, tmp_path / "run", objective=Loud, log_every_steps=1, **SETTINGS)


def test_the_report_does_not_call_a_full_support_set_empty():
    """Where an objective fills a support set and does not say which neighbours it took."""

    def said(fill):
        metrics = [{"step": 1, "support_set_fill": fill}]
        (finding,) = findings._neighbours(
            findings.Record(Path("run"), {"support_set_size": 32}, "", {}, metrics, [], [], [], ())
        )
        return finding.text

    assert said(1.0) == "The objective does not say which ones it took, so they have no purity or age."
    assert "the support set is empty at first" in said(0.0)


def test_labels_of_one_image_each_only_leave_the_knn_out(images, tmp_path):
    run = nnclr.pretrain((images, np.arange(64)), tmp_path / "run", **SETTINGS)
    assert run.metrics
    assert run.evaluations == []


def test_a_run_of_no_step_is_refused(images, tmp_path):
    with pytest.raises(InputError, match=r"epochs=0\.2 of 2 steps each are less than a step"):
        nnclr.pretrain(images, tmp_path / "run", **SETTINGS | {"epochs": 0.2})
    assert not (tmp_path / "run").exists()
    assert nnclr.pretrain(images, tmp_path / "run", **SETTINGS | {"epochs": 0.3}).metrics[-1]["step"] == 1


def test_a_seed_that_torch_cannot_take_is_refused(images, tmp_path):
    with pytest.raises(InputError, match=r"seed=9223372036854775808 must be below 2\*\*63"):
        nnclr.pretrain(images, tmp_path / "run", **SETTINGS, seed=2**63)


def test_every_name_that_the_loop_writes_is_reserved(images, tmp_path):
    settings = SETTINGS | {"predictor_hidden_dim": 32, "support_set_size": 32, "epochs": 2, "log_every_steps": 1}
    run = nnclr.pretrain((images, np.arange(64) % 2), tmp_path / "run", **settings)
    of_nnclr = {"neighbour_similarity", "neighbour_age", "own_id_share", "distinct_neighbours"}
    of_nnclr |= {"support_set_fill", "loss_chance"}
    assert {name for line in run.metrics for name in line} - of_nnclr == recorder._RESERVED


class Looking(SimCLR):
    """Looks neighbours up; by the names of its parts the loop draws them."""

    width = 16

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.support_set = nnclr.SupportSet(64, self.width)

    def update(self, out):
        self.support_set.enqueue(out.embeddings[0].new_ones(len(out.ids), self.width), out.ids)


class Nameless(Looking):
    """It writes entries without ids."""

    def update(self, out):
        self.support_set.enqueue(out.embeddings[0])


class OtherNumbers(Looking):
    """Its ids are none of the images'."""

    def update(self, out):
        self.support_set.enqueue(out.embeddings[0], out.ids + 1000)


class LookingElsewhere(Looking):
    """What it looks up are no embeddings of its projector."""

    width = 24


class OfPairs(Looking):
    """Its projector takes the features of both views side by side, and gives two things."""

    def __init__(self, feature_dim, **settings):
        super().__init__(2 * feature_dim, **settings)

    def forward(self, features, targets=None, ids=None):
        return super().forward([torch.cat(pair, 1) for pair in (features, features[::-1])], targets, ids)


class Twofold(Looking):
    """Its projector gives two things."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.projector.register_forward_hook(lambda module, given, out: out if module.training else (out, out))


class Frozen(Looking):
    """One layer of its projector stays as in evaluation, and `look_up` is a method of its own."""

    seen: set = set()  # noqa: RUF012  (of the class: a picture takes a copy)

    def forward(self, features, targets=None, ids=None):
        norm = next(layer for layer in self.projector.modules() if isinstance(layer, torch.nn.BatchNorm1d))
        self.seen.add((self.projector.training, norm.training))
        norm.eval()
        return super().forward(features, targets, ids)

    def look_up(self, z, k):
        return self.support_set.nearest(z, k)


def test_neighbours_are_drawn_where_the_projector_leads_to_the_support_set(images, tmp_path):
    def drawn(objective):
        out = tmp_path / objective.__name__
        nnclr.pretrain((images, np.arange(64) % 2), out, objective=objective, evaluate_every_epochs=1, **SETTINGS)
        return [path.name for path in (out / "neighbours").glob("*")]

    assert drawn(Looking) == ["step-00000002.png"]
    assert drawn(Nameless) == drawn(OtherNumbers) == ["step-00000002.png"]
    for kind in (Nameless, OtherNumbers):
        (sheet,) = (tmp_path / kind.__name__ / "neighbours").iterdir()
        assert all(not row.frames for row in read_sheet(sheet))  # whose pictures they are is not known
    assert drawn(LookingElsewhere) == drawn(OfPairs) == drawn(Twofold) == drawn(SimCLR) == []


def test_a_picture_leaves_frozen_layers_as_they_are(images, tmp_path):
    out = tmp_path / "run"
    nnclr.pretrain((images, np.arange(64) % 2), out, objective=Frozen, evaluate_every_epochs=0.5, **SETTINGS)
    assert sorted(path.name for path in (out / "neighbours").glob("*")) == ["step-00000001.png", "step-00000002.png"]
    assert Frozen.seen == {(True, True), (True, False)}  # thawed before the first step, and never again
    Frozen.seen.clear()
