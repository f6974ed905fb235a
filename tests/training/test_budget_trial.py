"""The token budget by measurement: the size that packs on trial give, and a run that is the same with and without a trial."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import TokenBudget
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.core.errors import UserError
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.core.random_streams import random_streams
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import TokenizedPrompt, tokenize_records
from preference_training.distributed.placement import OneProcess
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from preference_training.modeling.token_budget import round_to_two_bits
from preference_training.training import budget_trial
from preference_training.training.assembly import token_budgets
from preference_training.training.budget_trial import (
    RESERVE,
    Measured,
    examples_on_trial,
    largest_limit,
    largest_micro_batch,
    measured_budget,
    optimizer_bytes,
)
from tests.architectures.tiny_models import DENSE
from tests.support.building import build_trainer, take_steps, weights_of
from tests.support.files import GOLDEN
from tests.support.losses import of_every_kind
from tests.support.saved_memory import SavedTensors

CPU = torch.device("cpu")
HUGE = 2**20

# ---- the size ---------------------------------------------------------------------------------------------------------------


def on_trial(bytes_of, room: int, most: int = HUGE, ranks: Ranks = SINGLE_PROCESS, out_of_memory: int = HUGE):
    """The budget for packs that need `bytes_of(tokens)`, and the sizes that were tried."""
    tried = []

    def measure(limit: int) -> Measured | None:
        tried.append(limit)
        return Measured(limit, [bytes_of(limit)]) if limit <= out_of_memory else None

    return largest_limit(measure, [room], most, ranks).limit, tried


def test_the_budget_is_the_largest_number_of_two_bits_that_fits_beside_what_is_fixed():
    # 5,000 + 7 * tokens <= 200,000: 27,857 tokens, and of two bits 24,576 = 3 * 2^13.
    limit, tried = on_trial(lambda tokens: 5_000 + 7 * tokens, 200_000)
    assert limit == 24_576 and tried[-1] == limit
    # From the third pack on a line through two packs says where to go.
    assert tried == [1024, 4096, 16_384, 24_576]


def test_logits_that_stop_growing_do_not_keep_the_budget_small():
    # A chunk of logits grows up to 2,000 tokens: 10 bytes a token there, 2 bytes behind. 20,000 + 2 * tokens <= 100,000.
    limit, _ = on_trial(lambda tokens: 2 * tokens + 10 * min(tokens, 2000), 100_000)
    assert limit == 32_768


def test_a_budget_whose_pack_needs_more_than_the_line_said_becomes_smaller():
    # 1,024 and 4,096 tokens promise 8,192; memory grows faster there.
    limit, tried = on_trial(lambda tokens: tokens + max(0, tokens - 4096), 9_000)
    assert 8192 in tried and limit == tried[-1] == 6144


def test_out_of_memory_on_trial_halves_the_size():
    limit, tried = on_trial(lambda tokens: tokens, HUGE, out_of_memory=5000)
    assert tried == [1024, 4096, 16_384, 8192, 4096] and limit == 4096
    with pytest.raises(UserError, match="out of memory with 64 tokens at once"):
        on_trial(lambda tokens: tokens, HUGE, out_of_memory=10)


def test_no_budget_is_larger_than_a_micro_batch():
    assert on_trial(lambda tokens: tokens, HUGE, most=3072) == (3072, [1024, 3072])
    assert on_trial(lambda tokens: tokens, HUGE, most=768) == (768, [768])


def test_the_smallest_pack_is_the_budget_where_not_even_that_leaves_the_reserve():
    assert on_trial(lambda tokens: 10_000 + tokens, 9_000) == (256, [1024, 512, 256])


def test_all_ranks_take_the_budget_of_the_one_with_the_least_room(monkeypatch):
    # Another rank has room for 3,500 tokens only, whatever this one finds: 3,072 of two bits.
    monkeypatch.setattr(Ranks, "all_reduce_min", lambda self, number: min(number, 3500))
    limit, tried = on_trial(lambda tokens: tokens, HUGE)
    assert (limit, tried) == (3072, [1024, 3072])


def test_the_largest_micro_batch_is_bounded_by_the_longest_prompts_and_the_ranks():
    table = PromptTable.of(TokenizedPrompt([1] * n, [[2], [3]], [(0, 1)], number=n) for n in (10, 20, 98, 198))
    # 200 + 100 tokens; 384 is the next number of two bits.
    assert largest_micro_batch(table, 2) == 384
    # 4 prompts, 334 tokens: two ranks get at most 167 and one prompt, 367.
    assert largest_micro_batch(table, 8, 2) == 384
    assert largest_micro_batch(table, 1) == 256


# ---- packs on trial ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(golden, tokenizer):
    """The golden pairs as prompt tables, by what the examples of a loss are."""
    records = [
        PreferenceRecord(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["chosen"], number, f"row {number}")
        for number, row in enumerate(golden("pairs.json"))
    ]
    found = {kind: list(tokenize_records(records, tokenizer, TokenSettings(kind, 64, 32))) for kind in ("targets", "pairs")}
    return {kind: PromptTable.of(prompts) for kind, prompts in (found | of_every_kind(found["pairs"])).items()}


def model(name: str):
    found = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    attend_over_tries(found)
    return found


class OnGoldenModels(OneProcess):
    """One process, whose reference is a golden model, as in the trainers of these tests."""

    def reference(self, policy) -> LiveReference:
        return LiveReference(model("llama"))


def test_rows_on_trial_have_the_lengths_and_spans_of_the_data_and_hardly_share(tables):
    spans = [[(0, 1), (2, 4)], [(1, 2)]]
    prompt = TokenizedPrompt([5, 6, 7], [[8, 9, 10, 11], [12, 13]], [(0, 1)], spans=spans, weights=[0.5])
    examples = examples_on_trial(PromptTable.of([prompt]), 27)
    assert len(examples) == 3
    for row, number in examples:
        assert number == 0 and [len(row.prompt_ids), *map(len, row.responses)] == [3, 4, 2]
        assert [list(map(tuple, found)) for found in row.spans] == spans and row.weights == [0.5]
        assert {*row.prompt_ids, *row.responses[0], *row.responses[1]} <= set(range(5, 12))
    # A row that is longer than the limit is tried alone.
    assert len(examples_on_trial(PromptTable.of([prompt]), 4)) == 1


SFT, DPO, BCO = {"name": "sft"}, {"name": "dpo", "beta": 0.1}, {"name": "bco", "beta": 0.1}
KTO = {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}


@pytest.mark.parametrize(
    ("loss", "room"),
    [
        *((SFT, 18_000_000), (DPO, 8_000_000)),
        *(pytest.param(loss, 8_000_000, marks=pytest.mark.long) for loss in (SFT, KTO, BCO)),
        *(pytest.param(loss, 18_000_000, marks=pytest.mark.long) for loss in (DPO, KTO, BCO)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else str(value),
)
def test_packs_within_the_budget_leave_the_reserve_by_the_tensors_that_autograd_keeps(
    loss, room, tables, compose, tokenizer, monkeypatch, capsys
):
    built = build_loss(**loss)
    table = tables[built.examples]
    size = int(table.num_examples.sum())
    config = compose(f"batch_size={size}", "optimizer=AdamW")
    placement = OnGoldenModels(config, tokenizer)
    policy = model("llama_policy")
    states = optimizer_bytes(policy, config, [CPU])[0]
    meter = SavedTensors(room + states)
    monkeypatch.setattr(budget_trial, "memory_meter", lambda _: meter)
    budget = measured_budget(placement, policy, built, table, live_reference=True)
    line = capsys.readouterr().out
    assert f"token budget: {budget.limit:,} tokens, measured: a step with " in line and "10% stay free" in line
    # What real steps keep, in packs within that budget, and in packs of the next number of two bits.
    following = round_to_two_bits(budget.limit * 3 // 2)

    def kept(limit: int) -> int:
        iterator = BatchIterator(Schedule(table, size), 1, Packing(TokenBudget(limit, limit)))
        trainer = build_trainer(config, copy.deepcopy(policy), built, LiveReference(model("llama")), tokenizer=tokenizer)
        return meter.peaks(lambda: trainer.step.backward(next(iter(iterator))))[0] + states

    # Rows fill a pack to nine tenths or more, so that the next size may stay a little below the reserve.
    assert kept(budget.limit) <= meter.size * (1 - RESERVE)
    assert "no micro-batch is larger" in line or kept(following) > meter.size * (1 - RESERVE) * 0.9


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        # Of 10 * 10 + 10 weights: RMSprop one state, AdamW two, SGD none; a float32 copy and two float32 states.
        ("RMSprop", torch.float32, 4 * 110),
        ("AdamW", torch.float32, 8 * 110),
        ("SGD", torch.float32, 0),
        ("AdamW", torch.bfloat16, 12 * 110),
    ],
)
def test_the_optimizers_states_are_counted_before_they_exist(optimizer, dtype, expected, compose):
    config = compose(f"optimizer={optimizer}", f"model.policy_dtype={str(dtype).removeprefix('torch.')}", "lr=1e-6")
    assert optimizer_bytes(torch.nn.Linear(10, 10, dtype=dtype), config, [CPU]) == [pytest.approx(expected, abs=2)]


# ---- a run with a trial -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DPO, pytest.param(BCO, marks=pytest.mark.long)], ids=lambda loss: loss["name"])
def test_a_run_is_the_same_bit_for_bit_with_and_without_a_trial(loss, tables, compose, tokenizer, monkeypatch):
    config = compose("batch_size=8", "optimizer=AdamW", "lr=1e-3", "warmup_steps=0")
    results = []
    for with_trial in (False, True):
        torch.manual_seed(3)
        built = build_loss(**loss)
        policy, placement, table = model("llama_policy"), OnGoldenModels(config, tokenizer), tables[built.examples]
        # Dropout draws from the random stream that a trial must not move.
        policy.model.layers[0].mlp.register_forward_hook(
            lambda module, _, output: torch.nn.functional.dropout(output, 0.1, module.training)
        )
        if with_trial:
            monkeypatch.setattr(budget_trial, "memory_meter", lambda _: SavedTensors(10_000_000))
            weights = {name: value.clone() for name, value in policy.state_dict().items()}
            streams, remembered = random_streams(), copy.deepcopy(built.state_dict())
            assert measured_budget(placement, policy, built, table, live_reference=True) is not None
            assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())
            assert str(random_streams()) == str(streams) and str(built.state_dict()) == str(remembered)
            assert all(weight.grad is None for weight in policy.parameters()) and not policy.training
        iterator = BatchIterator(Schedule(table, 8, length=RunLength(n_steps=3)), 1, Packing(TokenBudget(256, 256)))
        trainer = build_trainer(config, policy, built, LiveReference(model("llama")), placement=placement, train=iterator)
        take_steps(trainer)
        found = weights_of(trainer) | {"stream": torch.get_rng_state()}
        moments = [value for values in trainer.step.updater.optimizer.state.values() for value in values.values()]
        results.append(([*found.values(), *moments], str(built.state_dict())))
    (alone, remembered), (after_trial, also_remembered) = results
    assert len(alone) == len(after_trial) and all(map(torch.equal, alone, after_trial))
    assert remembered == also_remembered


def test_a_budget_that_is_given_or_resumed_is_not_measured(tables, compose, tokenizer, monkeypatch):
    policy = model("llama_policy")
    meters = []
    monkeypatch.setattr(budget_trial, "memory_meter", lambda _: meters.append(SavedTensors(10_000_000)) or meters[-1])

    def budgets(config, checkpoint=None):
        prepared = SimpleNamespace(config=config, loss=build_loss("sft"), data=(SimpleNamespace(table=tables["targets"]),))
        return token_budgets(prepared, OneProcess(config, tokenizer), policy, checkpoint, caches_reference=False)

    given = budgets(compose("max_tokens_per_microbatch=77"))
    assert given.now.limit == given.at_start.limit == 77
    state = {"train_batches": {"ranks": 1, "budget": [40, 40, 80, 60]}}
    resumed = budgets(compose(), SimpleNamespace(state=state))
    assert (resumed.now, resumed.at_start) == (TokenBudget(40, 40), TokenBudget(80, 60))
    assert not meters
    # By another number of processes the rows are packed anew.
    other = {"train_batches": state["train_batches"] | {"ranks": 2}}
    assert budgets(compose(), SimpleNamespace(state=other)).now.limit > 80 and len(meters) == 1


def test_without_a_meter_the_estimate_stays(tables, compose, tokenizer):
    config = compose()
    assert (
        measured_budget(OneProcess(config, tokenizer), model("llama_policy"), build_loss("sft"), tables["targets"], False)
        is None
    )


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_a_trial_leaves_no_hooks_on_the_policy(kind, tables, compose, tokenizer, monkeypatch):
    monkeypatch.setattr(budget_trial, "memory_meter", lambda _: SavedTensors(10_000_000))
    sizes = DENSE | ({"num_local_experts": 4} if kind == "mixtral" else {})
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes))
    attend_over_tries(policy)
    modules = list(policy.modules())
    before = [[*module._forward_hooks, *module._forward_pre_hooks] for module in modules]
    config = compose("batch_size=8", "loss=sft", "model.neftune_alpha=5")
    placement = OneProcess(config, tokenizer)
    assert measured_budget(placement, policy, build_loss("sft"), tables["targets"], live_reference=False) is not None
    assert [[*module._forward_hooks, *module._forward_pre_hooks] for module in modules] == before
