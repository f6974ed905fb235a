"""What is found for processes that are not there is what the same number of real ones hold and send."""

import pytest

from preference_training.distributed.launching import launch
from preference_training.dry_run.scaling import fake_placement, fake_processes, step_costs
from preference_training.losses.registry import build_loss
from preference_training.modeling.tokenizer import load_tokenizer
from tests.integration import scaling_work
from trainers import TRAINERS

pytestmark = pytest.mark.usefixtures("forked_workers")
FSDP = "trainer=FSDPTrainer"
MODEL = "model.from_config.num_hidden_layers=2"


def costs_without_them(config):
    """The same step of rank 0, found alone."""
    tokenizer, size = load_tokenizer(config.model), config.trainer.nproc_per_node
    with fake_processes(size):
        placement = fake_placement(TRAINERS[config.trainer.name].placement_class, config, tokenizer)
        return step_costs(placement, build_loss("dpo"), True, *scaling_work.packs_and_step(placement.ranks))


# The settings of a step, by the number of its processes.
CASES = {
    "two ranks": (2, [(FSDP, "trainer.sharding=full", "trainer.param_dtype=bfloat16"), ("trainer=TensorParallelTrainer",)]),
    "two ranks, otherwise": (
        2,
        [
            (FSDP, "trainer.sharding=optimizer"),
            (FSDP, "trainer.sharding=none", "activation_checkpointing=true"),
            (FSDP, "trainer.sharding=full", "activation_checkpointing=selective"),
        ],
    ),
    "two ranks, four bits": (
        2,
        [
            (FSDP, "+adapter=qlora"),
            (FSDP, "+adapter=qlora", "trainer.param_dtype=bfloat16", "model.double_quantization=false"),
        ],
    ),
    "four ranks": (
        4,
        [
            (FSDP, "trainer.sharding=grad_op"),
            (FSDP, "trainer.context_parallel_size=2"),
            ("trainer=TensorParallelTrainer", "trainer.tensor_parallel_size=2"),
        ],
    ),
}


@pytest.mark.parametrize("name", ["two ranks", *(pytest.param(name, marks=pytest.mark.long) for name in list(CASES)[1:])])
def test_a_step_of_real_processes_holds_and_sends_what_was_found_without_them(compose, name):
    size, cases = CASES[name]
    configs = [compose(MODEL, "loss=dpo", "optimizer=AdamW", f"trainer.nproc_per_node={size}", *case) for case in cases]
    settings = [config.as_dict() for config in configs]
    for case, config, real in zip(cases, configs, launch(scaling_work.real_steps, (settings,), size, None), strict=True):
        costs = costs_without_them(config)
        assert dict(costs.traffic.sent) == real["sent"], case
        assert dict(costs.traffic.calls) == real["calls"], case
        assert sum(costs.memory.values()) == pytest.approx(sum(real["memory"].values()), rel=0.01), case
        for kind in ("parameters", "optimizer"):
            assert costs.memory[kind] == pytest.approx(real["held"][kind], rel=0.01), case
