"""What is found for processes that are not there is what the same number of real ones hold and send."""

from pathlib import Path

import pytest
import scaling_work
from omegaconf import OmegaConf

from launching import launch
from losses import build_loss
from models import load_tokenizer
from scaling import fake_processes, laid_out, step_costs

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def workers_find_the_modules(monkeypatch):
    """Spawned processes import what is pickled by its module's name."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'integration'}")


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ("trainer=FSDPTrainer", "trainer.sharding=full", "trainer.param_dtype=bfloat16")),
        (2, ("trainer=FSDPTrainer", "trainer.sharding=optimizer")),
        (2, ("trainer=TensorParallelTrainer",)),
        (3, ("trainer=FSDPTrainer", "trainer.sharding=grad_op")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_step_of_real_processes_holds_and_sends_what_was_found_without_them(compose, size, overrides):
    config = compose("loss=dpo", "optimizer=AdamW", f"trainer.nproc_per_node={size}", *overrides)
    real = launch(scaling_work.real_step, (OmegaConf.to_container(config, resolve=True),), size, None)
    tokenizer = load_tokenizer(config.model)
    with fake_processes(size):
        ranks, layout = laid_out(config)
        costs = step_costs(
            config, tokenizer, build_loss("dpo"), True, *scaling_work.pieces_and_step(ranks), ranks=ranks, layout=layout
        )
    assert dict(costs.traffic.sent) == real["sent"] and dict(costs.traffic.calls) == real["calls"]
    assert sum(costs.memory.values()) == pytest.approx(sum(real["memory"].values()), rel=0.01)
    for kind in ("parameters", "optimizer"):
        assert costs.memory[kind] == pytest.approx(real["held"][kind], rel=0.01)
