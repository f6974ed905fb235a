"""The load-balancing loss of mixtures of experts over several processes, and in a run from the command line's configuration."""

import pytest

from preference_training.distributed.launching import launch
from tests.integration import expert_work


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("names", [["qwen3_moe"], pytest.param(["gpt_oss", "deepseek_v3"], marks=pytest.mark.long)], ids=str)
def test_two_processes_have_the_gradient_and_the_numbers_of_one(names, compose):
    settings = compose("trainer=FSDPTrainer", "model=blank_model", "model.name_or_path=x", "loss=simpo").as_dict()
    results = launch(expert_work.gradients_over_processes, (settings, names), 2, None)
    assert len(results) == 2 * len(names)
    for name, found in results.items():
        assert found["gradient"] < 1e-5 and found["numbers"] < 1e-5, (name, found)
        # The load-balancing loss is no small part of what is compared.
        assert found["loss alone"] > 0.01, (name, found)
