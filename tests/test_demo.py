"""The demo itself, whole: the promise of the README's first screen."""

from nnclr.data.photos import PHOTOS, photo_patches
from nnclr.demo import run_demo


def test_demo_learns(tmp_path, capsys, curves):
    run = run_demo(tmp_path / "demo", seed=0)
    knn = [line["value"] for line in run.evaluations]
    purity = [line["neighbour_purity"] for line in run.metrics]
    assert knn[-1] >= knn[0] + 0.10
    assert purity[-1] >= purity[0] + 0.10
    assert len(list((tmp_path / "demo/neighbours").iterdir())) >= 2
    assert (tmp_path / "demo/curves.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert f"kNN accuracy of raw pixels            {100 * RAW_PIXELS:5.1f} %" in said
    assert f"after training           {100 * knn[-1]:5.1f} %" in said


RAW_PIXELS = 0.395  # the data are fixed


def test_train_and_test_patches_share_no_pixel():
    """Patches of the test split lie right of every patch of the train split in the same photograph."""
    train, test = photo_patches("train"), photo_patches("test")
    assert (len(train), len(test)) == (300 * len(PHOTOS), 60 * len(PHOTOS))
    assert train.class_names == test.class_names
    seen = {train.read(i).tobytes() for i in range(len(train))}
    assert not any(test.read(i).tobytes() in seen for i in range(len(test)))
    assert (train.read(7) == photo_patches("train").read(7)).all()
