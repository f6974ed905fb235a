"""Optimizers that gather what is sharded, and averages of sharded weights: as in one process, and exact when resumed."""

import pytest

from preference_training.distributed.launching import launch
from tests.integration import optimizer_work

CASES = {
    "Muon": {"optimizer": "Muon", "lr": 1e-3},
    "AdamWScheduleFree": {"optimizer": "AdamWScheduleFree", "lr": 1e-3},
    "ema": {"optimizer": "AdamW", "lr": 1e-3, "ema_decay": 0.5, "lr_groups": {"embed": 0.5}},
}


@pytest.mark.long
@pytest.mark.usefixtures("forked_workers")
def test_sharded_weights_are_updated_as_whole_ones_and_continue_exactly(compose, tmp_path):
    settings = compose("trainer=FSDPTrainer", "model=blank_model", "model.name_or_path=x").as_dict()
    results = launch(optimizer_work.train_with, (settings, str(tmp_path), CASES), 2, None)
    for name, found in results.items():
        assert found["cosine"] > 0.999 and found["ratio"] == pytest.approx(1, abs=1e-2), f"{name}: {found}"
        assert found["again"], f"{name}: {found}"
        assert found["held"] == pytest.approx(0.5, abs=0.1), f"{name}: {found}"
