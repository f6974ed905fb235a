"""What one of many processes holds and sends: numbers derived here, for eight processes and a model of 0.9M weights."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import UNLIMITED, TokenBudget, iterate_examples, pack_examples
from preference_training.configuration.composition import force_open_sections
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.placement import Sharded
from preference_training.dry_run.scaling import (
    GIB,
    Message,
    StepCosts,
    Traffic,
    describe_traffic,
    fake_placement,
    fake_processes,
    in_device_memory,
    rank_budget,
)
from preference_training.dry_run.scaling import step_costs as step_costs_of
from preference_training.losses.registry import build_loss
from preference_training.modeling.tokenizer import load_tokenizer
from trainers import TRAINERS

F32 = torch.float32
LAYERS = 2
# A block of the tiny model: four projections of 128 x 128, three of 128 x 384, two norms.
BLOCK = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
# What is left: embeddings of 620 tokens, which are the head too, and a norm.
VOCABULARY = 620
ROOT = VOCABULARY * 128 + 128
WEIGHTS = LAYERS * 9 + 2
# Seven metrics, each with the number of examples that have it; two numbers of tokens, whether to stop, whether memory ran
# out. 4 bytes each, added up over eight ranks.
METRICS = 2 * 18 * 4 * 7 // 8


def part(ranks: int) -> int:
    """Bytes of one rank's part of all weights in float32. Rows are dealt out whole: 620 over 8 ranks are 78 on the first."""
    rows = -(-VOCABULARY // ranks)
    return 4 * (LAYERS * BLOCK // ranks + rows * 128 + 128 // ranks)


@pytest.fixture
def tiny(compose):
    """The configuration of the tiny model with two layers."""
    return lambda *overrides: compose(f"model.from_config.num_hidden_layers={LAYERS}", *overrides)


def costs(config, size: int = 8, live: bool = True, packs: int = 1, loss: str = "dpo", together: bool = False) -> StepCosts:
    """Of a step with so many packs, each a micro-batch, or all in one."""
    prompt = TokenizedPrompt(list(range(2, 60)), [list(range(2, 30)), list(range(2, 40))], [(0, 1)])
    pack = pack_examples(list(iterate_examples([prompt] * 4)))
    micro_batch = MicroBatch.of([(prompt, 0)] * 4)
    together_batch = replace(micro_batch, packs=[pack] * packs, num_examples=4 * packs)
    step = [together_batch] if together else [micro_batch] * packs
    mode = {"mode_loss": "beta_DPO"} if loss == "beta_DPO" else {}
    objective = build_loss("dpo" if mode else loss, **mode)
    with fake_processes(size):
        placement = placed(config)
        assert len(placement.tokenizer) == VOCABULARY
        return step_costs_of(placement, objective, live, [pack] * min(2, packs), step)


def placed(config) -> Sharded:
    """The placement of a configuration; inside `fake_processes`."""
    return fake_placement(TRAINERS[config.trainer.name].placement_class, config, load_tokenizer(config.model))


def sent(traffic: Traffic, least: int = 1000) -> dict:
    """Bytes by model, operation and ranks, of everything but single numbers."""
    return {(m.model, m.operation, m.ranks): size for m, size in traffic.sent.items() if size > least}


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def test_muon_gathers_the_update_of_each_hidden_matrix_and_an_average_is_sharded(tiny):
    plain = costs(tiny("trainer=FSDPTrainer", "optimizer=AdamW"))
    found = costs(tiny("trainer=FSDPTrainer", "optimizer=Muon", "ema_decay=0.9"))
    gather = Message("policy", "all-gather", F32, 8)
    # Blocks without their norms; each rank sends its part to the seven others, or as much along a ring.
    assert found.traffic.sent[gather] - plain.traffic.sent[gather] == 4 * LAYERS * (BLOCK - 2 * 128) * 7 // 8
    assert found.memory["averaged weights"] == pytest.approx(part(8), abs=200)


def test_full_sharding_gathers_weights_twice_and_scatters_gradients_once(tiny):
    found = costs(tiny("trainer=FSDPTrainer", "optimizer=AdamW"))
    # Each rank sends its part to the seven others, or as much along a ring: 7/8 of the whole.
    assert found.traffic.sent == {
        Message("policy", "all-gather", F32, 8): 2 * 7 * part(8),
        Message("reference", "all-gather", F32, 8): 7 * part(8),
        Message("policy", "reduce-scatter", F32, 8): 7 * part(8),
        # Beside metrics the norms of all gradients; an all-reduce sends its bytes 2 x 7/8 times.
        Message("policy", "all-reduce", F32, 8): METRICS + 2 * WEIGHTS * 4 * 7 // 8,
    }
    # Two blocks and what is left are one call each; metrics and norms, too.
    assert sorted(found.traffic.calls.values()) == [2, 3, 3, 6]
    # Beside the weights there are the frequencies of the rotary embedding, 16 numbers twice.
    assert found.memory["parameters"] == pytest.approx(part(8), abs=200)
    assert found.memory["reference"] == pytest.approx(part(8), abs=200)
    # Two moments of every weight, and the number of steps of each tensor.
    assert found.memory["optimizer"] == 2 * part(8) + WEIGHTS * 4


@pytest.mark.parametrize(
    ("sharding", "gathers", "scatters"),
    [("full", 2 * 2, 2), ("grad_op", 2, 2), ("optimizer", 1, 1)],
)
def test_the_traffic_of_two_packs_follows_the_sharding(tiny, sharding, gathers, scatters):
    found = costs(tiny("trainer=FSDPTrainer", f"trainer.sharding={sharding}"), live=False, packs=2)
    assert sent(found.traffic) == {
        ("policy", "all-gather", 8): gathers * 7 * part(8),
        ("policy", "reduce-scatter", 8): scatters * 7 * part(8),
    }


def test_copies_add_up_whole_gradients_and_keep_a_second_copy_to_compute_with(tiny):
    found = costs(tiny("trainer=FSDPTrainer", "trainer.sharding=none", "optimizer=AdamW"), live=False)
    assert sent(found.traffic) == {("policy", "all-reduce", 8): 2 * part(1) * 7 // 8 + METRICS}
    assert found.memory["parameters"] == pytest.approx(part(1), abs=200)
    assert found.memory["optimizer"] == 2 * part(1) + WEIGHTS * 4
    assert found.memory["gathered weights"] == part(1)


def test_hybrid_gathers_within_a_machine_and_adds_up_across(tiny):
    found = costs(tiny("trainer=FSDPTrainer", "trainer.sharding=hybrid", "trainer.nproc_per_node=4"), live=False)
    assert sent(found.traffic) == {
        ("policy", "all-gather", 4): 2 * 3 * part(4),
        ("policy", "reduce-scatter", 4): 3 * part(4),
        ("policy", "all-reduce", 2): 2 * part(4) // 2,
    }
    assert found.memory["parameters"] == pytest.approx(part(4), abs=200)


def test_a_context_group_gathers_keys_and_values_and_scatters_their_gradients(tiny):
    alone, found = (costs(tiny("trainer=FSDPTrainer", f"trainer.context_parallel_size={size}")) for size in (1, 4))
    # One prompt of 58 tokens and a response of 38, which begins with the other: 8 slices of 12. Keys and values of 128 numbers.
    of_layer = 2 * 96 * 128 * 4 * 3 // 4
    weights = {key: size for key, size in sent(alone.traffic).items() if key[1] != "all-reduce"}
    assert {key: size for key, size in sent(found.traffic).items() if key[1] != "all-reduce"} == weights | {
        ("policy", "all-gather", 4): LAYERS * of_layer,
        ("reference", "all-gather", 4): LAYERS * of_layer,
        ("policy", "reduce-scatter", 4): LAYERS * of_layer,
    }
    assert found.memory["activations"] < 0.6 * alone.memory["activations"]


def test_weights_are_gathered_in_param_dtype_and_gradients_added_up_in_reduce_dtype(tiny):
    config = tiny("trainer=FSDPTrainer", "model.fsdp_policy_mp=bfloat16")
    traffic = costs(config, live=False).traffic
    assert traffic.sent[Message("policy", "all-gather", torch.bfloat16, 8)] == 2 * 7 * part(8) / 2
    assert traffic.sent[Message("policy", "reduce-scatter", F32, 8)] == 7 * part(8)
    config = config.changed({"trainer.reduce_dtype": None})
    assert costs(config, live=False).traffic.sent[Message("policy", "reduce-scatter", torch.bfloat16, 8)] == 7 * part(8) / 2


def test_quantized_weights_are_gathered_in_their_bytes(tiny):
    found = costs(tiny("trainer=FSDPTrainer", "+adapter=qlora"), live=False)
    # Half a byte for a weight, one for a scale of 64, four for one of 256 scales, tables of 16 and 256 numbers, and an offset;
    # each tensor begins at a multiple of 16 bytes.
    square, wide = (size // 2 + 4 * 16 + size // 64 + 16 + 4 * 256 + 16 for size in (128 * 128, 128 * 384))
    norms, adapter = 2 * 128, 16 * (4 * (128 + 128) + 3 * (128 + 384))
    block = 4 * square + 3 * wide + 4 * (norms + adapter)
    assert found.traffic.sent[Message("policy", "all-gather", torch.uint8, 8)] == 2 * 7 * LAYERS * block // 8
    assert sent(found.traffic)["policy", "reduce-scatter", 8] == 7 * LAYERS * 4 * adapter // 8
    rows = -(-VOCABULARY // 8)
    assert found.memory["parameters"] == pytest.approx(LAYERS * block // 8 + 4 * (rows * 128 + 128 // 8), rel=0.01)


def test_a_reference_that_is_not_resharded_stays_whole_and_is_sent_once(tiny):
    config = tiny("trainer=FSDPTrainer", "trainer.sharding=grad_op")
    with_it, without = costs(config), costs(config, live=False)
    # The first step has gathered it for good, and the steps after that find it.
    assert with_it.traffic.sent == without.traffic.sent
    whole = 4 * (LAYERS * BLOCK + ROOT)
    assert with_it.memory["gathered weights"] - without.memory["gathered weights"] == pytest.approx(whole, rel=0.02)


def test_beta_dpo_gathers_once_more_to_choose_pairs_where_a_micro_batch_has_several_packs(tiny):
    config = tiny("trainer=FSDPTrainer")
    for loss, gathers in (("dpo", 2), ("beta_DPO", 3)):
        traffic = costs(config, live=False, packs=2, loss=loss, together=True).traffic
        assert sent(traffic)["policy", "all-gather", 8] == 2 * gathers * 7 * part(8)


def test_split_layers_add_up_activations_over_the_ranks_that_share_them(tiny):
    config = tiny("trainer=TensorParallelTrainer", "trainer.tensor_parallel_size=2")
    found = costs(config, live=False)
    # Four of eight ranks differ in their data; each has a quarter of a half of what can be split.
    assert found.memory["parameters"] == pytest.approx(part(8), rel=0.02)
    # Sums over the ranks that share a layer, of 128 numbers a token: behind the embeddings once; in a block two forward, and
    # backward the gradients of what went into q, k, v, gate and up; and those of what went into the head, at scored tokens.
    # Over two ranks an all-reduce sends what it adds up. The rest are single numbers.
    # The shorter response is how the longer one begins.
    tokens, scored = 58 + 38, 38
    sums = 128 * 4 * ((1 + LAYERS * (2 + 5)) * tokens + scored)
    assert sent(found.traffic)["policy", "all-reduce", 2] == pytest.approx(sums, abs=200)
    assert sent(found.traffic)["policy", "reduce-scatter", 4] == pytest.approx(3 * part(8), rel=0.02)


@pytest.mark.long
def test_a_7b_model_is_sharded_over_512_ranks_without_their_memory(compose):
    shape = ("hidden_size=4096", "intermediate_size=11008", "num_hidden_layers=32", "num_attention_heads=32")
    more = ("num_key_value_heads=32", "vocab_size=32000", "tie_word_embeddings=false")
    overrides = force_open_sections([f"model.from_config.{text}" for text in (*shape, *more)])
    found = costs(compose("trainer=FSDPTrainer", "optimizer=AdamW", *overrides), 512, live=False, loss="sft")
    # Rows over 512 ranks: 4096 are 8 each; 11008 are 22 on the first, and 32000 are 63.
    share = 4 * (32 * (4 * 8 * 4096 + 2 * 22 * 4096 + 8 * 11008 + 2 * 8) + 2 * 63 * 4096 + 8)
    assert found.memory["parameters"] == pytest.approx(share, abs=3000)
    assert found.memory["optimizer"] == 2 * share + (32 * 9 + 3) * 4
    assert found.traffic.sent[Message("policy", "all-gather", F32, 512)] == 2 * 511 * share


# ---- what is computed at once -----------------------------------------------------------------------------------------------


@pytest.fixture
def budget(tiny):
    """The budget of rank 0 of eight, from overrides."""

    def found(*overrides: str) -> TokenBudget:
        config = tiny("trainer=FSDPTrainer", "trainer.world_size=8", *overrides)
        with fake_processes(8):
            return rank_budget(placed(config))

    return found


def test_a_micro_batch_is_one_pack_where_the_memory_of_devices_is_unknown(budget):
    assert budget() == UNLIMITED
    assert budget("max_tokens_per_microbatch=700") == TokenBudget(700, 700)


def test_the_token_budget_follows_from_the_devices_memory_by_the_runs_own_rule(budget):
    # Half of what weights, gradients and two optimizer states leave, over what a token takes.
    per_token = LAYERS * (16 * 128 + 4 * 384) * 4 + 3 * 4 * VOCABULARY
    fits = int((GIB - 4 * part(8)) / 2 / per_token)
    # Rounded down to two binary digits: 3 * 2**12 is below 14,852, and 2**14 above.
    assert 12288 < fits < 16384 and budget("trainer.device_memory=1") == TokenBudget(12288, 12288)


def test_offloaded_kinds_are_not_counted_as_device_memory(tiny):
    config = tiny("trainer=FSDPTrainer", "trainer.cpu_offload=true")
    memory = costs(config, live=False).memory
    assert memory["parameters"] and in_device_memory(config, memory) == memory["activations"] + memory["gathered weights"]
    config = config.changed({"trainer.cpu_offload": False})
    assert in_device_memory(config, memory) == sum(memory.values())


# ---- the group, and what is said ------------------------------------------------------------------------------------------


def test_the_fake_processes_are_gone_afterwards():
    with pytest.raises(ZeroDivisionError), fake_processes(4):
        assert torch.distributed.get_world_size() == 4
        raise ZeroDivisionError
    assert not torch.distributed.is_initialized()


def test_an_unknown_collective_is_an_error():
    with fake_processes(4), Traffic(), pytest.raises(ValueError, match=r"c10d\.broadcast_\.default is not counted"):
        torch.distributed.broadcast(torch.zeros(3), 0)


def test_traffic_is_listed_largest_first_and_none_is_reported():
    traffic = Traffic()
    assert describe_traffic(traffic, 1) == ["  none"]
    small, large = Message("policy", "all-reduce", F32, 512), Message("reference", "all-gather", torch.bfloat16, 512)
    traffic.sent, traffic.calls = Counter({small: GIB // 2, large: 3 * GIB}), Counter({small: 2, large: 1234})
    title, *lines = describe_traffic(traffic, 2)
    assert "in a step of 2 packs" in title
    assert [line.split() for line in lines] == [
        ["reference", "all-gather", "bfloat16", "over", "512", "ranks", "1,234", "calls", "3.000", "GB"],
        ["policy", "all-reduce", "float32", "over", "512", "ranks", "2", "calls", "0.500", "GB"],
    ]
