"""Every method learns: half a minute of the demo's data lifts kNN accuracy above the untrained network's."""

import pytest

import nnclr
from nnclr.objectives import OBJECTIVES

SHIPPED = [name for name in OBJECTIVES if ":" not in name]
SMALL = {"swav": {"prototypes": 100, "swav_queue_size": 512}}  # 3000 prototypes are for a million images


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("objective", SHIPPED)
def test_kNN_ends_above_the_untrained_network(tmp_path, objective):
    options = {"preset": "demo", "epochs": 3, "quiet": True, **SMALL.get(objective, {})}
    run = nnclr.pretrain("demo-photos", tmp_path / "run", objective=objective, **options)
    knn = [line["value"] for line in run.evaluations if line["protocol"] == "knn"]
    print(f"{objective}: {knn[0]:.3f} -> {knn[-1]:.3f}")
    assert knn[-1] > knn[0] + 0.04  # three times the standard error on 1,020 test images
