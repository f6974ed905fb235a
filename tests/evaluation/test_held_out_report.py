"""The breakdown of held-out metrics, length bias, and the KL divergence to the reference."""

import copy
import json
import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from preference_training.batching.micro_batches import evaluation_prompts
from preference_training.batching.packing import UNLIMITED
from preference_training.data.prompt_table import PromptTable, TablePart
from preference_training.data.rows.templates import user_markers
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.evaluation.breakdown import LENGTH_BOUNDS, ExampleFacts, break_down, interval_metrics, length_bias
from preference_training.evaluation.held_out import HeldOut, kl_estimate, response_batches
from preference_training.evaluation.results_text import format_results
from preference_training.modeling.logprobs import LiveReference
from tests.support.files import GOLDEN


def facts(prompts, lengths, others=None, names=None, turns=None) -> ExampleFacts:
    """Facts of examples whose prompts have as many tokens as their number."""
    count = len(prompts)
    return ExampleFacts(
        names or ["a"] * count,
        numpy.array(prompts),
        numpy.array(prompts) + 1,
        numpy.array(lengths),
        None if others is None else numpy.array(others),
        numpy.array(turns or [1] * count),
    )


def scored(chosen: list[float], rejected: list[float]) -> HeldOut:
    """Held-out scores with these rewards."""
    one, other = torch.tensor(chosen).double(), torch.tensor(rejected).double()
    ties = torch.where(one == other, 0.5, (one > other).double())
    named = {"loss/eval": -one, "rewards_eval/accuracies": ties, "rewards_eval/margins": one - other}
    return HeldOut(named | {"rewards_eval/chosen": one, "rewards_eval/rejected": other}, {}, [])


def test_every_partition_has_each_example_in_one_part():
    found = facts([0, 0, 1, 2, 40], [3, 32, 33, 2000, 64], [1, 1, 1, 1, 1], ["a", "a", "b", "b", "a"], [1, 1, 3, 3, 2])
    parts = found.parts()
    assert parts.keys() == {"data set", "prompt tokens", "response tokens", "turns of the user"}
    for ways in parts.values():
        assert (sum(chosen.astype(int) for chosen in ways.values()) == 1).all()
    assert list(parts["response tokens"]) == ["1-32", "33-64", "1025-"]
    assert list(parts["prompt tokens"]) == ["1-32", "33-64"]
    assert list(parts["turns of the user"]) == ["1", "2", "3"]


def test_the_interval_of_a_loss_that_cannot_be_negative_is_not():
    losses = torch.tensor([0.01, 0.01, 0.02, 3.0]).double()
    names = ["a", "b", "c", "d"]
    low = interval_metrics(HeldOut({"loss/eval": losses}, {}, names))["loss/eval/low"]
    ended = interval_metrics(HeldOut({"loss/eval": losses}, {}, names, {"loss/eval": 0.0}))["loss/eval/low"]
    assert low < 0 == ended
    # A margin may be.
    margins = {"loss/eval": losses, "rewards_eval/margins": losses}
    assert interval_metrics(HeldOut(margins, {}, names, {"loss/eval": 0.0}))["rewards_eval/margins/low"] == low


@given(st.integers(1, 3000))
def test_a_length_is_in_the_part_named_by_its_range(length):
    [name] = facts([0], [length]).parts()["response tokens"]
    low, high = name.split("-")
    assert int(low) <= length <= (int(high) if high else math.inf)
    assert high == "" or int(high) in LENGTH_BOUNDS


def test_the_means_of_parts_are_those_of_their_examples():
    held_out = scored([1.0, 2.0, 0.0, 5.0], [0.0, 3.0, 0.0, 1.0])
    result = break_down(held_out, facts([0, 0, 1, 2], [5, 5, 50, 50], [6, 7, 8, 9]))
    assert result["all"]["examples"] == 4 and result["all"]["prompts"] == 3
    # (1 + 0 + 0.5 + 1) / 4 and (1 - 1 + 0 + 4) / 4.
    assert result["all"]["rewards_eval/accuracies"]["mean"] == pytest.approx(0.625)
    assert result["all"]["rewards_eval/margins"]["mean"] == pytest.approx(1.0)
    short, long = result["response tokens"].values()
    assert short["rewards_eval/accuracies"] == {"mean": 0.5, "low": None, "high": None}, "both are of one prompt"
    assert long["rewards_eval/margins"]["mean"] == pytest.approx(2.0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_an_accuracy_of_1_is_not_certain():
    result = break_down(scored([1.0] * 20, [0.0] * 20), facts(range(20), [5] * 20, [6] * 20))
    # Clopper and Pearson's interval of 20 of 20.
    assert result["all"]["rewards_eval/accuracies"]["low"] == pytest.approx(0.025 ** (1 / 20))


def test_sft_has_a_loss_and_no_pair_metrics():
    held_out = HeldOut({"loss/eval": torch.tensor([1.0, 3.0]), "logps_eval/chosen": torch.tensor([-1.0, -3.0])}, {}, [])
    result = break_down(held_out, facts([0, 1], [5, 6]))
    assert result["all"]["loss/eval"]["mean"] == 2
    assert "length_bias" not in result and "rewards_eval/margins" not in result["all"]
    assert any(line.startswith("all") for line in format_results({"held_out": result}))


def test_a_reward_equal_to_the_length_has_full_length_bias():
    lengths, others = [4, 7, 9, 3], [5, 6, 2, 8]
    held_out = scored([float(length) for length in lengths], [float(length) for length in others])
    bias = length_bias(held_out, facts(range(4), lengths, others))
    assert bias["correlation"]["mean"] == pytest.approx(1.0)
    assert bias["longer_preferred"]["by_reward"]["mean"] == 1.0
    # By the label the first and the last pair prefer the shorter response.
    assert bias["longer_preferred"]["by_label"]["mean"] == 0.5
    against = length_bias(scored([-4.0, -7.0, -9.0, -3.0], [-5.0, -6.0, -2.0, -8.0]), facts(range(4), lengths, others))
    assert against["correlation"]["mean"] == pytest.approx(-1.0)
    assert against["longer_preferred"]["by_reward"]["mean"] == 0.0


@given(st.lists(st.tuples(*[st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 99), st.integers(1, 99)]), min_size=2))
def test_the_correlation_is_numpys(rows):
    chosen, rejected, lengths, others = map(list, zip(*rows, strict=True))
    bias = length_bias(scored(chosen, rejected), facts(range(len(rows)), lengths, others))["correlation"]["mean"]
    rewards = numpy.array([*chosen, *rejected])
    if numpy.ptp(rewards) > 1e-3 and numpy.ptp([*lengths, *others]):
        assert bias == pytest.approx(numpy.corrcoef(rewards, [*lengths, *others])[0, 1], abs=1e-6)


def test_constant_rewards_have_no_correlation():
    bias = length_bias(scored([0.0, 0.0], [0.0, 0.0]), facts([0, 1], [4, 5], [6, 5]))
    assert bias["correlation"] == {"mean": None, "low": None, "high": None}
    assert bias["longer_preferred"]["examples"] == 1 and bias["longer_preferred"]["by_reward"]["mean"] == 0.5


# ---- facts of examples ----------------------------------------------------------------------------------------------------


def part(source: str, prompts: list[TokenizedPrompt]) -> TablePart:
    [made] = PromptTable.of(prompts).parts
    return TablePart(source, made.batches, source)


def test_example_facts_are_in_the_order_of_scoring(tokenizer):
    text = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant:"
    prompts = [
        TokenizedPrompt(tokenizer(text).input_ids, [[5, 6], [7], [8, 9, 10]], [(0, 1), (2, 1)]),
        TokenizedPrompt(tokenizer("Name a tree.").input_ids, [[5], [7, 8]], [(0, 1)]),
    ]
    table = PromptTable([part("own, my.jsonl, row", prompts[:1]), part("hh, test prompt", prompts[1:])])
    found = ExampleFacts.of(evaluation_prompts(table, None, seed=0), None, tokenizer)
    order = sorted(range(3), key=lambda k: found.data_sets[k] != "own, my.jsonl")
    assert [found.data_sets[k] for k in order] == ["own, my.jsonl", "own, my.jsonl", "hh"]
    assert found.response_lengths[order].tolist() == [2, 3, 1]
    assert found.other_lengths[order].tolist() == [1, 1, 2]
    assert found.turns[order].tolist() == [2, 2, 1]
    assert found.prompt_lengths[order].tolist() == [len(prompts[0].prompt_ids)] * 2 + [len(prompts[1].prompt_ids)]
    assert len(ExampleFacts.of(evaluation_prompts(table, 2, seed=0), 2, tokenizer).data_sets) == 2


def test_the_chunks_of_a_text_are_one_prompt_in_the_results_as_in_the_metrics_of_the_run(tokenizer):
    chunks = [TokenizedPrompt([1], [[5 + k, 6]], [], number=1 + k // 4) for k in range(12)]
    examples = evaluation_prompts(PromptTable([part("texts.txt, test prompt", chunks)]), None, seed=0)
    sources = [prompt.source for prompt in examples]
    losses = torch.tensor([float(source[-1]) for source in sources]).double()
    held_out = HeldOut({"loss/eval": losses}, {}, sources)
    found = break_down(held_out, ExampleFacts.of(examples, None, tokenizer))["all"]
    by_run = interval_metrics(held_out)
    assert found["prompts"] == by_run["counters/held_out_prompts"] == 3
    assert (found["loss/eval"]["low"], found["loss/eval"]["high"]) == (by_run["loss/eval/low"], by_run["loss/eval/high"])


def test_facts_of_a_long_ranking_build_no_pairs(tokenizer, monkeypatch):
    monkeypatch.setattr(TokenizedPrompt, "pairs", property(lambda _: pytest.fail("builds all pairs")))
    ranked = TokenizedPrompt([1], [[5], [6, 7], [8]], [(0, 1, 2), (0, 2)])
    labeled = TokenizedPrompt([1], [[5], [6]], [(0, 1)], labels=[1.0])
    paired, unpaired = (ExampleFacts.of(PromptTable.of([each]), None, tokenizer) for each in (ranked, labeled))
    assert paired.other_lengths.tolist() == [1, 1] and unpaired.other_lengths is None


@pytest.mark.parametrize(
    ("template", "marker"),
    [
        ("{% for m in messages %}{{ '[INST] ' if m.role == 'user' else ' [/INST] ' }}{{ m.content }}{% endfor %}", "[INST]"),
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}", "<|user|>"),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_a_chat_template_reveals_how_user_turns_start(template, marker, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    assert user_markers(chatty) == ["\n\nHuman:", "<|im_start|>user"] + [marker] * bool(marker)


# ---- distance from the reference --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """A policy, and another model."""
    return [
        AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval() for name in ("llama_policy", "llama")
    ]


PROMPTS, RESPONSES = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [[20, 21, 0], [22], [23, 24, 25, 26]]


def test_the_kl_to_itself_is_zero(models):
    estimate, ratios = kl_estimate(models[0], LiveReference(models[0]), response_batches(PROMPTS, RESPONSES, 2, UNLIMITED))
    assert ratios == [0, 0, 0]
    assert estimate["per_answer"] == {"mean": 0, "low": 0, "high": 0} and estimate["tokens"] == 8


def test_the_kl_estimate_is_the_mean_log_ratio_of_the_responses(models):
    def logp(model, prompt, response) -> float:
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(logits[len(prompt) - 1 + k, token].item() for k, token in enumerate(response))

    estimate, ratios = kl_estimate(models[0], LiveReference(models[1]), response_batches(PROMPTS, RESPONSES, 2, UNLIMITED))
    with torch.no_grad():
        expected = [logp(models[0], *row) - logp(models[1], *row) for row in zip(PROMPTS, RESPONSES, strict=True)]
    assert ratios == pytest.approx(expected, abs=1e-4)
    assert estimate["per_answer"]["mean"] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert estimate["per_token"]["mean"] == pytest.approx(sum(expected) / 8, abs=1e-4)
