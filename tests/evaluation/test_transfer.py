"""The whole 12-set command on twelve tiny sets in their real layouts."""

import json
import shutil

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import nnclr
from nnclr.cli import main
from nnclr.data.transfer_sets import TRANSFER_SETS, open_transfer_set
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.evaluation import transfer as module
from nnclr.evaluation.transfer import score_of, table
from nnclr.pretrained import open_encoder
from tests.transfer_fixtures import make_transfer_sets


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    make_transfer_sets(folder)
    return folder


def test_the_command_measures_all_twelve(root, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["evaluate", "pixels?size=8", str(root), "--protocol", "transfer", "--out", str(out)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    record = json.loads(output.out)
    assert json.loads(out.read_text()) == record
    rows = record["details"]["sets"]
    assert [row["set"] for row in rows] == list(TRANSFER_SETS)
    assert record["details"]["missing"] == {}
    assert record["metric"] == "mean of 12 of 12 data sets' metrics"
    assert record["value"] == pytest.approx(np.mean([row["value"] for row in rows]))
    assert record["value"] > 0.6  # the colour tells the class
    for row in rows:
        assert row["metric"] == TRANSFER_SETS[row["set"]].metric
        assert row["published"] == TRANSFER_SETS[row["set"]].published
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert row["interval_method"].endswith("Wilson" if row["metric"] == "top-1 accuracy" else "bootstrap")
    assert "| Food-101 | top-1 accuracy |" in output.err
    assert "NNCLR (theirs)" in output.err
    assert "| 76.7 | 75.3 | 72.8 | 72.3 |" in output.err  # the papers' figures of Food-101
    assert main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["details"] == record["details"]


def test_figures_are_those_of_scikit_learn(root):
    encoder = open_encoder("pixels?size=8")
    result = nnclr.evaluate(
        encoder, root, protocol="transfer", sets=("pets", "voc2007", "flowers102"), strengths=(1.0,)
    )
    for row in result.details["sets"]:
        splits = open_transfer_set(row["set"], root)
        own = Encoder(encoder.module, 8, encoder.mean, encoder.std, crop_pct=1.0)
        x = np.concatenate([own.embed(splits.train), own.embed(splits.val)])
        test = own.embed(splits.test)
        if splits.train.multilabels is None:
            y = np.concatenate([splits.train.labels, splits.val.labels])
            model = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(x, y)
            decision = model.decision_function(test)
            scores = decision if decision.ndim == 2 else np.stack([-decision, decision], 1)
            expected = score_of(row["metric"])(scores, splits.test.labels)
        else:
            y = np.concatenate([splits.train.multilabels, splits.val.multilabels])
            columns = []
            for c in range(y.shape[1]):
                counted = y[:, c] >= 0
                model = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(x[counted], y[counted, c])
                columns.append(model.decision_function(test))
            expected = score_of(row["metric"])(np.stack(columns, 1), splits.test.multilabels)
        assert row["value"] == pytest.approx(expected, abs=1e-6), row["set"]


def test_missing_sets_are_named_with_how_to_get_them(root, tmp_path):
    for name in ("dtd", "flowers-102"):
        shutil.copytree(root / name, tmp_path / name)
    said = []
    result = nnclr.evaluate("pixels?size=8", tmp_path, protocol="transfer", strengths=(1.0,), say=said.append)
    assert result.metric == "mean of 2 of 12 data sets' metrics"
    assert len(result.details["missing"]) == 10
    assert sum("is missing and skipped" in line for line in said) == 10
    assert all(str(tmp_path) in why or "http" in why for why in result.details["missing"].values())
    assert "Not there: Birdsnap" in table(result.details, "ours")


def test_images_are_cut_by_the_shorter_side(root, monkeypatch):
    """The protocol's preprocessing, not the encoder's own 256/224."""
    seen = []
    real = Encoder.embed_batches
    monkeypatch.setattr(
        Encoder,
        "embed_batches",
        lambda self, *a, **k: seen.append(self.preprocessing["crop_pct"]) or real(self, *a, **k),
    )
    encoder = open_encoder("random:small-convnet?size=72")
    nnclr.evaluate(encoder, root, protocol="transfer", sets=("dtd",), strengths=(1.0,))
    assert set(seen) == {1.0}
    assert encoder.crop_pct == 0.875


def test_fine_tuning_runs_the_same_sets(root, monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATES", (0.1,))
    options = {"protocol": "transfer", "by": "finetune", "sets": ("cifar100", "voc2007", "pets"), "epochs": 12}
    result = nnclr.evaluate("random:small-convnet?size=24", root, **options)
    rows = {row["set"]: row for row in result.details["sets"]}
    assert rows["cifar100"]["published"] == {"NNCLR": 84.7}
    assert result.value > 0.5
    assert result.value == nnclr.evaluate("random:small-convnet?size=24", root, **options).value


def test_what_cannot_be_measured_is_one_sentence(root, tmp_path):
    for arguments, words in (
        ({"data": tmp_path / "nowhere"}, "is no folder"),
        ({"data": tmp_path}, "none of food101, cifar10, .* is in"),
        ({"data": root, "sets": ("food",)}, "no transfer data set is called 'food'"),
        ({"data": root, "by": "magic"}, "neither logistic nor finetune"),
    ):
        with pytest.raises(InputError, match=words):
            nnclr.evaluate("pixels?size=8", **arguments, protocol="transfer")
    broken = tmp_path / "sets"
    shutil.copytree(root / "dtd", broken / "dtd")
    next((broken / "dtd").rglob("test1.txt")).unlink()
    with pytest.raises(InputError, match="DTD") as caught:
        nnclr.evaluate("pixels?size=8", broken, protocol="transfer")
    assert "\n" not in str(caught.value)


def test_download_that_fails_is_said_and_skipped(root, tmp_path, monkeypatch):
    def refuse(key, folder):
        raise InputError(f"{key} could not be downloaded")

    monkeypatch.setattr(module, "download_transfer_set", refuse)
    shutil.copytree(root / "dtd", tmp_path / "dtd")
    result = nnclr.evaluate(
        "pixels?size=8", tmp_path, protocol="transfer", sets=("dtd", "pets"), download=True, strengths=(1.0,)
    )
    assert result.details["missing"] == {"pets": "pets could not be downloaded"}
