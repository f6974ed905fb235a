"""Muon, Adafactor, schedule-free optimizers and GaLore, averages of weights, and learning rates of some weights."""

import pytest
import torch

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.resume import resumable
from tests.support.building import weights_of
from tests.training.test_optimization import trainer_of

ALL = [
    ("optimizer=Muon",),
    ("optimizer=Adafactor", "lr=1e-2"),
    ("optimizer=AdamWScheduleFree", "lr_schedule=constant"),
    ("optimizer=SGDScheduleFree", "lr_schedule=constant", "lr=0.1"),
    ("optimizer=GaLore", "++optimizer_kwargs.rank=4", "++optimizer_kwargs.update_proj_gap=2"),
    ("optimizer=AdamW", "ema_decay=0.9"),
    ("optimizer=RMSprop", "ema_decay=0.9"),
    ("optimizer=SGD", "ema_decay=0.9", "lr=0.1"),
    ("optimizer=AdamW8bit", "ema_decay=0.9"),
    ("optimizer=Muon", "ema_decay=0.9", "lr_groups={embed: 0.1}"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", ALL, ids=" ".join)
def test_a_run_resumes_bit_for_bit(compose, tokenizer, tmp_path, settings, dtype):
    overrides = (
        f"model.policy_dtype={dtype}",
        "lr=1e-5",
        "n_epochs=2",
        "lr_schedule=cosine",
        "save_every=4",
        "weight_decay=0.1",
        *settings,
    )
    whole = trainer_of(compose, tokenizer, *overrides, run_dir=tmp_path)
    whole.train()
    resumed = trainer_of(compose, tokenizer, *overrides)
    resumed.continue_from(Checkpoint.read(tmp_path / "step-8"))
    resumed.train()
    later = whole.tracker.lines[len(whole.tracker.lines) - len(resumed.tracker.lines) :]
    assert resumed.tracker.lines == later
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    for one, other in zip(*(each.step.updater.optimizer_state()["state"].values() for each in (whole, resumed)), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
    resumable(tmp_path / "step-4")
