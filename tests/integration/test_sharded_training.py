"""Sharded trainers on real processes: the same numbers as one process, and what happens when something goes wrong."""

import pytest
from transformers import AutoModelForCausalLM

from preference_training.distributed.launching import launch
from tests.integration import adapter_work, sharded_work
from tests.modeling import test_adapters
from tests.modeling.adapters.test_experts import FAMILIES
from tests.modeling.test_adapters import small
from tests.support.files import GOLDEN

__all__ = ["small"]
pytestmark = pytest.mark.usefixtures("forked_workers")
TRAJECTORIES = sharded_work.TRAJECTORIES


@pytest.fixture
def settings(compose) -> dict:
    return compose("trainer=FSDPTrainer", "model=blank_model", "model.name_or_path=x").as_dict()


def number_of(architecture: str, loss: str, optimizer: str, accumulation: int) -> int:
    """The place of a golden trajectory."""
    wanted = (architecture, loss, optimizer, accumulation)
    found = [
        number
        for number, t in enumerate(TRAJECTORIES)
        if (t["architecture"], t["loss"]["name"], t["optimizer"], t["gradient_accumulation_steps"]) == wanted
    ]
    return found[0]


def assert_equal(results: dict, tolerance: float) -> None:
    """Losses, gradient norms and weights within the relative tolerance, other metrics within ten times as much."""
    for name, worst in results.items():
        for key, difference in worst.items():
            strict = key in ("loss/train", "grad_norm", "weights")
            assert difference <= tolerance * (1 if strict else 10), f"{name}: {key} differs by {difference:.1g}"


# Each under four shardings, and the first in five other ways.
ONE = [("llama", "dpo", "AdamW", 2)]
ALL = [*ONE, ("gpt_neox", "sft", "RMSprop", 1), ("llama", "ipo", "AdamW", 1)]


@pytest.mark.parametrize("wanted", [ONE, pytest.param(ALL[1:], marks=pytest.mark.long)], ids=["one", "others"])
def test_two_ranks_follow_the_golden_trajectories_under_every_sharding(wanted, settings):
    numbers = [number_of(*one) for one in wanted]
    results = launch(sharded_work.follow_each_sharding, (settings, numbers), 2, None)
    assert len(results) == 4 * len(numbers) + 5
    assert_equal(results, 1e-5)


@pytest.mark.parametrize(
    "shardings",
    [["full"], pytest.param(["grad_op", "optimizer", "none"], marks=pytest.mark.long)],
    ids=["full", "others"],
)
def test_two_ranks_measure_one_token_budget_and_train_as_without_a_trial(shardings, settings):
    found = launch(sharded_work.steps_after_a_trial, (settings, shardings), 2, None)
    assert list(found) == shardings
    weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(GOLDEN / "llama").parameters())
    for sharding, result in found.items():
        # Rank 1 has twice the room of rank 0, which decides for both.
        assert len(set(result["limits"])) == 1 and 256 <= result["limits"][0] <= 768, sharding
        assert result["same"], sharding
        # AdamW's two float32 states, of this rank's half of the weights.
        assert result["optimizer"] == pytest.approx(8 * weights / (1 if sharding == "none" else 2), rel=0.01)


@pytest.mark.long
def test_two_ranks_follow_one_process_with_every_kind_of_example_and_average(settings):
    results = launch(sharded_work.follow_other_losses, (settings, number_of("llama", "dpo", "AdamW", 2)), 2, None)
    assert len(results) == len(sharded_work.OTHER_LOSSES)
    assert_equal(results, 1e-5)
    # KTO's are means over the responses that have them, on whatever rank; its KL term is that of both.
    assert {"rewards_train/chosen", "rewards_train/rejected", "rewards_train/margins", "kto/kl"} <= results["kto"].keys()


@pytest.mark.long
def test_two_ranks_that_split_layers_follow_the_golden_trajectories(settings):
    numbers = [number_of("llama", "dpo", "AdamW", 1), number_of("gpt_neox", "dpo", "RMSprop", 2)]
    results = launch(sharded_work.follow_split_layers, (settings, numbers), 2, None)
    assert_equal(results, 1e-4)
    assert results["beta-DPO"]["beta_DPO/beta_used"] <= 1e-6 and results["beta-DPO"]["beta_DPO/kept_fraction"] == 0


@pytest.mark.long
def test_four_ranks_hybrid_tensor_parallel_and_beta_dpo_follow_one_process(settings):
    results = launch(sharded_work.follow_on_four, (settings, number_of("llama", "dpo", "AdamW", 1)), 4, None)
    assert_equal({name: worst for name, worst in results.items() if "tensor" not in name}, 1e-5)
    assert_equal(results, 1e-4)
    for name in ("beta-DPO", "beta-DPO, small packs"):
        assert results[name]["beta_DPO/beta_used"] <= 1e-6 and results[name]["beta_DPO/kept_fraction"] == 0


def assert_adapters_equal(cases: list[dict], results: list[dict], share: float = 0.5) -> None:
    """Log-probs within 1e-6 before training; numbers and weights within 1e-5; rank 0 holds a share of the frozen weights.

    Numbers are within 1e-4 where products are in bfloat16, which rounds to 8 bits at other places of two ranks' packs.
    """
    for case, found in zip(cases, results, strict=True):
        near = 1e-4 if BFLOAT16.items() <= case.items() else 1e-5
        assert found["logps"] <= 1e-6 and found["numbers"] <= near and found["weights"] <= 1e-5, f"{case}: {found}"
        expected = 1.0 if case.get("trainer.sharding") == "none" else share
        assert found["held"] == pytest.approx(expected, rel=0.02), f"{case}: {found}"


FOUR_BITS = {"model.quantization": "nf4"}


def test_an_adapter_over_two_ranks_is_trained_as_on_one(settings):
    kinds = [{"model.lora.use_dora": True}, {"model.lora.init": "pissa", "model.lora.loraplus_lr_ratio": 4.0}]
    whole = {"model.lora.modules_to_save": ["embed_tokens", "norm"]}
    cases = [{"trainer.sharding": "full"}, {"trainer.sharding": "none"}, FOUR_BITS, *kinds, whole]
    assert_adapters_equal(cases, launch(sharded_work.follow_adapters, (settings, cases), 2, None))


def test_an_adapter_that_is_joined_with_its_start_is_saved_by_two_ranks_and_read_by_two_and_by_one(settings, tmp_path):
    found = launch(adapter_work.save_and_resume, (settings, {"model.lora.init": "pissa"}, str(tmp_path)), 2, None)
    # Seven matrices in each of two blocks, an A and a B of each; the first by name is an A of rank 4 + 4.
    assert found["differing"] == [] and found["count"] == 2 * 7 * 2 and found["shape"][0] == 8


WHOLE: dict = {"model.lora.r": None}
TUNED = {
    "Spectrum": WHOLE | {"model.spectrum_share": 0.5},
    "chosen by name": WHOLE | {"model.trainable": [r"layers\.1\.", "norm"], "model.freeze": ["mlp"]},
    "NEFTune": WHOLE | {"model.neftune_alpha": 5.0},
    "NEFTune on chosen weights": WHOLE | {"model.neftune_alpha": 5.0, "model.freeze": ["embed_tokens"]},
    "added tokens": WHOLE | {"model.add_tokens": ["wonderful"], "model.add_special_tokens": ["<tool>"]},
    "added tokens, adapter": {"model.add_tokens": ["wonderful"]},
    "added tokens, whole": {"model.add_tokens": ["wonderful"], "model.lora.modules_to_save": ["embed_tokens", "lm_head"]},
    "DoRA on four bits": FOUR_BITS | {"model.lora.use_dora": True},
    "whole head on four bits": FOUR_BITS | {"model.lora.modules_to_save": ["lm_head"]},
}


def assert_tuned_equal(settings: dict, cases: dict[str, dict], folder) -> None:
    """Each case over two ranks follows one process, and its checkpoint is exact.

    Log-probs agree within 1e-6; loss and gradient norm, sums in another order, within 5e-6 of their size.
    """
    results = launch(adapter_work.follow_and_save, (settings, list(cases.values()), str(folder)), 2, None)
    for name, found in zip(cases, results, strict=True):
        assert found["logps"] <= 1e-6 and found["numbers"] <= 5e-6 and found["weights"] <= 1e-5, f"{name}: {found}"
        assert found["differing"] == [], name


def test_what_is_tuned_in_part_is_trained_over_two_ranks_as_on_one(settings, tmp_path):
    names = ("Spectrum", "NEFTune", "added tokens, whole")
    assert_tuned_equal(settings, {name: TUNED[name] for name in names}, tmp_path)


@pytest.mark.long
def test_every_way_to_tune_a_part_is_trained_over_two_ranks_as_on_one(settings, small, monkeypatch, tmp_path):
    monkeypatch.setattr(test_adapters, "SMALL", test_adapters.SMALL | FAMILIES)
    stacked = {"model.lora.target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    experts = {f"experts of {name}": stacked | {"model.name_or_path": str(small(name))} for name in ("gpt_oss", "qwen3_moe")}
    assert_tuned_equal(settings, TUNED | experts, tmp_path)


BFLOAT16 = {"model.policy_dtype": "bfloat16", "model.reference_dtype": "bfloat16"}


@pytest.mark.long
def test_an_adapter_on_four_bits_is_trained_over_two_ranks_as_on_one_however_it_is_sharded(settings):
    other = [
        {"trainer.sharding": "grad_op"},
        {"trainer.sharding": "optimizer"},
        {"trainer.sharding": "none"},
        {"model.double_quantization": False},
        {"activation_checkpointing": True},
        {"trainer.cpu_offload": True},
        BFLOAT16,
    ]
    cases = [FOUR_BITS | each for each in other]
    assert_adapters_equal(cases, launch(sharded_work.follow_adapters, (settings, cases), 2, None))


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "sharding", "share"), [(4, "hybrid", 1 / 2), (4, "full", 1 / 4), (3, "full", 1 / 3)])
def test_an_adapter_on_four_bits_over_more_ranks_is_trained_as_on_one(settings, ranks, sharding, share):
    cases = [FOUR_BITS | {"trainer.sharding": sharding}]
    assert_adapters_equal(cases, launch(sharded_work.follow_adapters, (settings, cases, 2), ranks, None), share)


@pytest.mark.long
@pytest.mark.parametrize("work", [sharded_work.follow_adapters, sharded_work.follow_adapters_before_torch_2_13])
def test_four_bits_are_gathered_as_they_are_where_other_weights_are_cast(settings, work):
    [found] = launch(work, (settings, [FOUR_BITS | {"trainer.param_dtype": "bfloat16"}]), 2, None)
    # bfloat16 has 8 bits: log-probs of some 30 tokens, and a loss that begins at ln 2.
    assert 0 < found["logps"] <= 0.05 and found["numbers"] <= 0.02, found


@pytest.mark.campaign
def test_layers_of_four_bits_are_compiled_with_the_others(settings):
    [found] = launch(sharded_work.follow_adapters, (settings, [FOUR_BITS | {"compile": True}]), 2, None)
    assert found["logps"] <= 1e-4 and found["numbers"] <= 1e-5 and found["weights"] <= 1e-4, found


@pytest.mark.long
def test_a_loss_curve_in_bfloat16_is_within_two_percent_of_float32(settings):
    for name, (short, exact) in launch(sharded_work.follow_in_bfloat16, (settings, 50), 2, None).items():
        assert len(short) == 50 and min(exact) < 0.9 * exact[0], name
        assert max(abs(a - b) / b for a, b in zip(short, exact, strict=True)) <= 0.02, name
        assert short != exact


@pytest.mark.long
def test_master_weights_are_sharded_with_their_weights_and_go_on_exactly(settings, tmp_path):
    results = launch(sharded_work.train_with_masters, (settings, str(tmp_path)), 2, None)
    for name, found in results.items():
        assert found["cosine"] > 0.99 and found["again"], f"{name}: {found}"
        assert found["dtypes"] == ["torch.float32"] and found["sharded"] == [0.5], f"{name}: {found}"


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_held_out_rows_are_scored_once_by_any_number_of_ranks(settings, ranks):
    results = launch(sharded_work.evaluate_unevenly, (settings, 101), ranks, None)
    assert set(results["rows"]) == {101}
    assert results["worst"] <= 1e-5 and results["logps"] <= 1e-4
    assert results["seen"] == [101, 101]


def test_no_rank_writes_into_a_folder_that_the_main_one_is_still_removing(settings, tmp_path):
    (tmp_path / "step-0.partial" / "left").mkdir(parents=True)
    said = launch(sharded_work.write_into_a_folder_that_is_cleared_late, (settings, str(tmp_path)), 2, None)
    assert said == ["left", f"checkpoint: {tmp_path / 'step-0'}"]


def test_machines_that_do_not_share_a_disk_use_the_log_probs_that_the_main_one_keeps(settings, tmp_path):
    results = launch(sharded_work.keep_on_disks_of_their_own, (settings, str(tmp_path)), 2, None)
    assert results == {"apart": [0, 0], "kept": [True, False]}


def test_sharded_weights_are_gathered_once_to_sample_and_each_rank_samples_for_its_prompts(settings):
    results = launch(sharded_work.sample_on_each, (settings,), 2, None)
    for found in results.values():
        assert found["same"] and found["logps"] < 1e-4 and found["shards left"]
    # Half of the four prompts; all of them where the weights fit into no rank's memory.
    assert results["whole"]["rows"] == 4 and results["sharded"]["rows"] == 8
    # A group per block and one for the rest, once; and again for every token.
    assert results["sharded"]["gathers"] > results["whole"]["gathers"] * 5
