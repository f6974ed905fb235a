"""A rank of a sharded run that is out of memory keeps in step with the others, and all repeat the step in smaller packs."""

import pytest

from preference_training.core.errors import UserError
from preference_training.distributed.launching import WorkerDiedError, launch
from tests.integration import out_of_memory_work as work

pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.timeout(300)]
SFT, DPO = {"name": "sft"}, {"name": "dpo", "beta": 0.1}
BETA_DPO = {"name": "dpo", "beta": 0.1, "mode_loss": "beta_DPO", "mode_weight": 0.5, "a": 0.6}

# Place, sharding, loss, which calls there fail, other keys.
SHORT = {
    "a block": ("last block", "full", SFT, {}, {}),
    "a gradient, in the second pack": ("first block backward", "full", SFT, {"calls": (1,)}, {}),
}
LONG = {
    "the first block, ZeRO-1": ("first block", "optimizer", DPO, {}, {}),
    "a gradient, data parallel": ("last block backward", "none", DPO, {"calls": (1,)}, {}),
    "the embedding": ("embedding", "full", SFT, {"calls": (1,)}, {}),
    "the embedding's gradient": ("embedding backward", "full", SFT, {}, {}),
    "the head": ("head", "full", DPO, {}, {}),
    "the head's gradient": ("head backward", "grad_op", DPO, {}, {}),
    "the loss": ("loss", "full", DPO, {"calls": (1,)}, {}),
    "the reference": ("reference", "full", DPO, {"calls": (1,)}, {}),
    "gathering weights": ("gathering", "full", SFT, {"calls": (0,)}, {}),
    "gathering weights for a gradient": ("gathering", "full", SFT, {"calls": (1,)}, {}),
    "statistics of all packs": ("last block", "full", BETA_DPO, {"calls": (1,)}, {}),
    "a gradient, with statistics of all packs": ("first block backward", "full", BETA_DPO, {"calls": (0,)}, {}),
    "the first step": ("last block", "full", DPO, {"step": 0}, {}),
    "accumulated gradients": ("first block", "full", DPO, {"calls": (1,)}, {"gradient_accumulation_steps": 2}),
    "accumulated gradients, ZeRO-1": (
        "first block backward",
        "optimizer",
        DPO,
        {"calls": (1,)},
        {"gradient_accumulation_steps": 2},
    ),
    "activation checkpointing": ("last block", "full", SFT, {"calls": (1,)}, {"activation_checkpointing": True}),
    "activation checkpointing, a gradient": ("first block backward", "full", SFT, {}, {"activation_checkpointing": True}),
    # Its second call is in the backward pass.
    "computing activations again": ("last block", "full", SFT, {"calls": (3,)}, {"activation_checkpointing": True}),
    "an adapter": ("last block", "full", DPO, {"calls": (2,)}, {"model.lora.r": 4}),
    "an adapter's gradient": ("first block backward", "full", DPO, {}, {"model.lora.r": 4}),
    "an adapter, data parallel": ("last block backward", "none", DPO, {"step": 0, "calls": (1,)}, {"model.lora.r": 4}),
    "bfloat16": ("first block backward", "full", SFT, {"calls": (1,)}, {"model.fsdp_policy_mp": "bfloat16"}),
    "float16": ("first block backward", "full", SFT, {"calls": (1,)}, {"model.fsdp_policy_mp": "float16"}),
}


@pytest.fixture
def settings(compose) -> dict:
    return compose("trainer=FSDPTrainer", "model=blank_model", "model.name_or_path=x").as_dict()


def test_a_rank_out_of_memory_costs_one_repeated_step_with_the_numbers_of_smaller_packs(settings):
    assert_recovered(launch(work.recover, (settings, SHORT), 2, None))


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_memory_may_run_out_anywhere_in_a_step_under_every_sharding(settings, part):
    assert_recovered(launch(work.recover, (settings, dict(list(LONG.items())[part::4])), 2, None))


@pytest.mark.long
def test_a_step_is_repeated_until_it_fits_and_a_resumed_run_keeps_the_smaller_packs(settings, tmp_path):
    found = launch(work.resume, (settings, str(tmp_path)), 2, None)
    now, resumed, began = found["limits"]
    said = [line.split(";")[0] for line in found["said"] if "memory" in line]
    assert said == ["warning: out of memory on ranks 0, 1"] * 2
    assert now == resumed < 60 and began == 1000


@pytest.mark.long
def test_an_example_that_does_not_fit_alone_is_named(settings):
    with pytest.raises(UserError, match=r"max_length: a single example of \d+ tokens does not fit into the memory of rank 1"):
        launch(work.fail_for_good, (settings, "last block", {"attempts": 20}), 2, None)


@pytest.mark.long
def test_a_rank_that_stops_answering_is_named_with_what_it_last_did():
    with pytest.raises(WorkerDiedError, match=WAITS):
        launch(work.stop_answering, (0.15,), 2, None)


WAITS = r"rank 0 has been in the end of step 7 for \d+ s; not heard of for \d+ s: rank 1 \(last: step 7, pack 1 of 2\)"


def assert_recovered(results: dict) -> None:
    for name, found in results.items():
        limit = found["limits"][0]
        assert found["raised"] == 1, name
        assert found["said"] == [f"warning: out of memory on rank 1; packs are limited to {limit} tokens from now on"], name
        assert set(found["limits"]) == {limit} and limit <= 50, name
        assert found["same"] and found["updates"] == work.STEPS and not found["bad"], name
