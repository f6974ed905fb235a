"""Several processes that compute each pack together give the numbers of one."""

import pytest

from preference_training.core.errors import UserError
from preference_training.distributed.launching import launch
from tests.integration import context_work, sharded_work
from tests.integration.test_sharded_training import ALL, FOUR_BITS, ONE, assert_adapters_equal, assert_equal, number_of

pytestmark = pytest.mark.usefixtures("forked_workers")

MODELS = ["llama", "gemma2", "gemma3_text", "llama4-scaled", "mistral", "deepseek_v3"]


@pytest.fixture
def settings(compose) -> dict:
    """Of two processes for each rank."""
    chosen = "trainer=FSDPTrainer", "trainer.context_parallel_size=2", "model=blank_model", "model.name_or_path=x"
    return compose(*chosen).as_dict()


def test_two_processes_that_share_packs_follow_a_golden_trajectory(settings):
    assert_equal(launch(context_work.follow_one, (settings, number_of(*ONE[0])), 2, None), 1e-5)


@pytest.mark.long
def test_two_processes_that_share_packs_follow_the_golden_trajectories_under_every_sharding(settings):
    results = launch(sharded_work.follow_each_sharding, (settings, [number_of(*one) for one in ALL]), 2, None)
    assert_equal(results, 1e-5)


@pytest.mark.long
def test_two_processes_that_share_packs_train_with_every_kind_of_example_and_average(settings):
    assert_equal(launch(sharded_work.follow_other_losses, (settings, number_of(*ONE[0])), 2, None), 1e-5)


@pytest.mark.long
def test_two_ranks_of_two_processes_and_one_of_four_follow_a_golden_trajectory(settings):
    results = launch(context_work.follow_on_four, (settings, number_of("llama", "dpo", "AdamW", 1)), 4, None)
    assert_equal(results, 1e-5)
    assert results["full"]["beta_DPO/kept_fraction"] == 0


@pytest.mark.parametrize(
    ("names", "seeds"),
    [
        (["gpt_oss"], 2),
        pytest.param(["llama", "gemma2", "gemma3_text", "llama4-scaled", "mistral", "deepseek_v3"], 6, marks=pytest.mark.long),
    ],
    ids=["one", "all"],
)
def test_each_sequence_has_the_log_probs_and_gradients_that_it_has_alone_in_plain_transformers(names, seeds):
    """Windows, chunks, sinks, soft-caps, few key heads, other sizes of values, activations that are computed again."""
    results = launch(context_work.compute_any_trie, (names, 2, seeds), 2, None)
    for name, found in results.items():
        assert found["logps"] <= 1e-4 and found["gradient"] <= 1e-5 and found["cut"], f"{name}: {found}"


@pytest.mark.long
def test_on_three_processes_sequences_have_the_numbers_they_have_alone_where_trees_are_cut_and_where_not():
    found = launch(context_work.compute_any_trie, (["llama"], 3, 6), 3, None)["llama"]
    assert found["logps"] <= 1e-4 and found["gradient"] <= 1e-5 and found["cut"] and found["whole trees"], found


@pytest.mark.long
def test_an_adapter_is_trained_as_in_one_process(settings):
    cases = [{"trainer.sharding": "full"}, {"trainer.sharding": "none"}, FOUR_BITS]
    assert_adapters_equal(cases, launch(sharded_work.follow_adapters, (settings, cases), 2, None))


@pytest.mark.long
def test_held_out_rows_and_log_probs_of_a_reference_are_counted_once(settings):
    results = launch(sharded_work.evaluate_unevenly, (settings, 101), 2, None)
    assert set(results["rows"]) == {101} and results["seen"] == [101, 101]
    assert results["worst"] <= 1e-5 and results["logps"] <= 1e-4


@pytest.mark.long
def test_a_run_resumes_with_other_numbers_of_processes_for_each_rank(settings, tmp_path):
    apart = launch(context_work.resume_elsewhere, (settings, str(tmp_path)), 2, None)
    assert max(apart.values()) <= 1e-5, apart


def test_what_cannot_be_cut_is_refused(compose):
    with pytest.raises(UserError, match=r"prefix_sharing: found off, expected auto or on: trainer.context_parallel_size is 2"):
        compose("trainer=FSDPTrainer", "trainer.context_parallel_size=2", "prefix_sharing=off")
    with pytest.raises(UserError, match=r"trainer.world_size: found 6, expected a multiple of trainer.context_parallel_size"):
        compose("trainer=FSDPTrainer", "trainer.context_parallel_size=4", "trainer.world_size=6", "dry_run=true")
    with pytest.raises(UserError, match=r"trainer.context_parallel_size: this trainer has no such key. It belongs to"):
        compose("trainer=TensorParallelTrainer", "trainer.context_parallel_size=2")
