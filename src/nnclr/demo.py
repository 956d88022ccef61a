"""`nnclr demo`: the main job on shipped photographs, and the three figures that show what was learned."""

import time
from pathlib import Path

from nnclr.data.source import open_source
from nnclr.evaluation.knn import knn_accuracy
from nnclr.pretrained import pixel_encoder
from nnclr.progress import duration
from nnclr.run_folder import Run
from nnclr.training import pretrain


def run_demo(out: Path, seed: int) -> Run:
    """Pre-train on patches from the left part of each photograph; test on patches from its right part.

    A patch's label is the photograph it comes from. Labels are used only to measure.

    Returns:
        The run, with neighbour sheets in `neighbours/` and `curves.png`.

    Raises:
        InputError: if scikit-image is not installed, or the folder holds another run.
    """
    began = time.perf_counter()
    train, test = open_source("demo-photos"), open_source("demo-photos?split=test")
    print(f"{len(train)} patches to train on, {len(test)} other ones to test; the labels only measure", flush=True)
    assert train.labels is not None
    assert test.labels is not None
    assert train.class_names is not None
    pixels = pixel_encoder(32).embed
    raw = knn_accuracy(pixels(train), train.labels, pixels(test), test.labels, len(train.class_names))
    run = pretrain("demo-photos", out, preset="demo", test_data="demo-photos?split=test", seed=seed)
    knn = [line["value"] for line in run.evaluations if line["protocol"] == "knn"]
    purity = [line["neighbour_purity"] for line in run.metrics if "neighbour_purity" in line]
    sheets = sorted((out / "neighbours").glob("step-*.png"))
    print(
        f"""
kNN accuracy of raw pixels            {100 * raw:5.1f} %
             of the untrained network {100 * knn[0]:5.1f} %
             after training           {100 * knn[-1]:5.1f} %
neighbours from the same photograph   {100 * purity[0]:5.1f} % at first, {100 * purity[-1]:.1f} % at the end
{duration(time.perf_counter() - began)} in all

What the look-up returned, early and late: {sheets[0]}
                                           {sheets[-1]}
Curves: {out / "curves.png"}, all of it on one page: {out / "report.html"}"""
    )
    return run
