"""A rank of a sharded run that is out of memory keeps in step with the others, and all repeat the step in smaller packs."""

import pytest

from preference_training.core.errors import UserError
from preference_training.distributed.launching import launch
from tests.integration import out_of_memory_work as work

pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.timeout(300)]
SFT, DPO = {"name": "sft"}, {"name": "dpo", "beta": 0.1}
BETA_DPO = {"name": "dpo", "beta": 0.1, "mode_loss": "beta_DPO", "mode_weight": 0.5, "a": 0.6}

SHORT = {
    "in a block": ("last block", "full", DPO, {}, {}),
    "in a block's gradient, in the second pack": ("first block backward", "full", SFT, {"calls": (1,)}, {}),
}


@pytest.fixture
def settings(compose) -> dict:
    return compose("trainer=FSDPTrainer", "model=blank_model", "model.name_or_path=x").as_dict()


def test_a_rank_out_of_memory_costs_one_repeated_step_with_the_numbers_of_smaller_packs(settings):
    assert_recovered(launch(work.recover, (settings, SHORT), 2, None))


def assert_recovered(results: dict) -> None:
    for name, found in results.items():
        limit = found["limits"][0]
        assert found["raised"] == 1, name
        assert found["said"] == [f"warning: out of memory on rank 1; packs are limited to {limit} tokens from now on"], name
        assert set(found["limits"]) == {limit} and limit < work.BUDGET, name
        assert found["same"] and found["updates"] == work.STEPS and not found["bad"], name
