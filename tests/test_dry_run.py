"""What a dry run says, and that it leaves nothing behind."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nnclr import cli, dry_run, memory, neighbour_sheet, training
from nnclr.memory import Measured

FLAGS = "--backbone small-convnet --image-size 16 --device cpu --precision fp32 --dry-run".split()
FLAGS += "--embedding-dim 16 --projector-hidden-dim 32 --predictor-hidden-dim 32".split()


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(70):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(tmp_path / "photos")


@pytest.fixture
def configs(monkeypatch):
    """Those with which the loop is called."""
    seen, train = [], training.train

    def recorded(config, *rest, **options):
        seen.append(config)
        return train(config, *rest, **options)

    monkeypatch.setattr(training, "train", recorded)
    return seen


@pytest.mark.parametrize("extra", [[], ["--augmentation", "multi-crop"], ["--objective", "moco-v3"]])
def test_a_dry_run_tries_two_steps_and_leaves_nothing(photos, tmp_path, monkeypatch, capsys, extra):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS, *extra]) == 0
    said = capsys.readouterr().out
    assert "70 images, 2 steps an epoch, 200 steps" in said
    assert re.search(r"two steps losses \d+\.\d+ and \d+\.\d+, \d+ images/s\n", said)
    assert ("+ (32, 3, 7, 7)" in said) == ("multi-crop" in extra)
    assert list(Path().iterdir()) == []


def test_the_two_steps_neither_evaluate_nor_draw(photos, monkeypatch):
    def refuse(*_):
        raise AssertionError("this takes time that is none of the step's")

    monkeypatch.setattr(neighbour_sheet, "draw_neighbours", refuse)
    monkeypatch.setattr(training.OnlineKNN, "measure", refuse)
    assert cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS]) == 0
    with pytest.raises(AssertionError, match="none of the step's"):  # an ordinary run does
        training.pretrain(photos, Path(photos).parent / "run", backbone="small-convnet", image_size=16, batch_size=32)


def test_the_description_comes_before_the_steps(photos, monkeypatch, capsys):
    """A step that does not fit after all ends in one sentence; another error is not hidden."""
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ):

        def fail(*_, error=error, **__):
            assert "GiB free" in capsys.readouterr().out
            raise error

        monkeypatch.setattr(training, "train", fail)
        assert cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS]) == 0
        assert re.fullmatch(r"two steps failed: memory ran out at batch 32; .*\n", capsys.readouterr().out)
    error = RuntimeError("shapes differ")
    monkeypatch.setattr(training, "train", lambda *_, **__: fail(error=error))
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main(["pretrain", photos, "--batch-size", "32", *FLAGS])


def test_a_batch_that_cannot_fit_is_tried_smaller(photos, configs, monkeypatch, capsys):
    monkeypatch.setattr(memory, "measure", lambda state, sizes: Measured(1e6, 1e6, None, 128, 16))
    monkeypatch.setattr(memory, "fixed_memory", lambda state: 1e6)
    for free, batch in ((90e6, 70), (38e6, 16), (9e6, 2), (5e6, None)):
        configs.clear()
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", *FLAGS]) == 0
        assert [config.batch_size for config in configs] == ([] if batch is None else [batch])
        said = capsys.readouterr().out
        assert ("not even 2 images may fit" in said) == (batch is None)
        # 70 images of two views are 0.43 MB of pixels, of which the loader holds three times as many.
        assert ("use --grad-cache 16 for the same loss in less memory, a smaller" in said) == (batch == 16)
        assert ("use --grad-cache 4 for" in said) == (batch == 2)
        if batch in (2, 16):
            assert f"images/s at batch {batch}\n" in said
            assert said.endswith(f"without evaluations; an estimate from batch {batch}\n")
        elif batch == 70:
            assert said.endswith("without evaluations\n")
    configs.clear()  # 8 images, pixels and the rest are 10.7 MB
    monkeypatch.setattr(memory, "free_memory", lambda device: 12e6)
    assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", "--grad-cache", "8", *FLAGS]) == 0
    assert [config.batch_size for config in configs] == [70]


def test_recomputing_is_named_where_it_fits(photos, configs, monkeypatch, capsys):
    """70 images of 1 MB do not fit into 40 MB; of 0.4 MB they do, of 0.6 MB they do not."""
    monkeypatch.setattr(memory, "fixed_memory", lambda state: 1e6)
    monkeypatch.setattr(memory, "free_memory", lambda device: 40e6)
    for each, extra, named in (
        (4e5, [], True),
        (6e5, [], False),
        (4e5, ["--recompute", "--backbone", "resnet18"], None),
    ):
        monkeypatch.setattr(memory, "measure", lambda state, sizes, each=each: Measured(1e6, 1e6, each, 128, 16))
        configs.clear()
        flags = [*FLAGS, *extra]
        assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", *flags]) == 0
        said = capsys.readouterr().out
        assert ("use --recompute (0.0 GiB) or --grad-cache 32 for the same loss" in said) == (named is True)
        assert ("may not fit" in said) == (named is not None)
        assert [config.batch_size for config in configs] == [70 if named is None else 16]


def test_a_smaller_batch_is_quick_and_its_rate_is_scaled(photos, monkeypatch, capsys):
    """50 GFLOP/s for a minute are 3e12 operations: two steps of 8 images, where memory holds 32."""
    monkeypatch.setattr(memory, "measure", lambda state, sizes: Measured(1.8e11, 1e6, None, 128, 16))
    monkeypatch.setattr(memory, "free_memory", lambda device: 68e6)
    monkeypatch.setattr(memory, "fixed_memory", lambda state: 1e6)
    monkeypatch.setattr(dry_run, "two_steps", lambda config, *_: ([1.0, 2.0], 3.5 * config.batch_size))
    assert cli.main(["pretrain", photos, "--batch-size", "70", "--epochs", "10", "--extend-epochs", "4", *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "1 steps an epoch, 14 steps" in said
    assert "losses 1.000 and 2.000, 28 images/s at batch 8" in said
    assert "about 35 s for 14 epochs" in said  # 14 steps of 70 images


def test_a_mistake_in_the_test_data_is_found(photos, tmp_path, capsys):
    assert cli.main(["pretrain", photos, "--test-data", str(tmp_path / "nowhere"), "--batch-size", "32", *FLAGS]) == 2
    assert "nowhere" in capsys.readouterr().err
