"""Sampled responses: from the model's own distribution, and independent of the other prompts."""

import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

from preference_training.generation import decoding, sampling
from preference_training.generation.sampling import OTHER, POLICY, PromptSeededNoise, Sampler
from preference_training.generation.settings import GenerationSettings
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures.tiny_models import make
from tests.support.files import GOLDEN


@pytest.fixture(scope="module", params=["llama_policy", "gpt_neox"])
def model(request):
    """A golden model."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()


def token_ids(samples) -> list[list[list[int]]]:
    """The samples of each prompt without their log-probs, whose last bits depend on the batch."""
    return [[response.token_ids for response in responses] for responses in samples]


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5], [20, 21, 22, 23], [6, 5, 7], list(range(30, 42))]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=8), st.integers(0, 2**40), st.integers(1, 4))
def test_a_response_depends_only_on_seed_and_prompt(model, tokenizer, prompts, seed, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MAX_CPU_BATCH", at_once)
        together = Sampler(tokenizer, 24, seed).responses(model, prompts)
    for prompt, response in zip(prompts, together, strict=True):
        [alone] = Sampler(tokenizer, 24, seed).responses(model, [prompt])
        assert response == alone


def test_other_seeds_and_other_prompts_give_other_responses(model, tokenizer):
    answers = [tuple(Sampler(tokenizer, 24, seed).responses(model, [[5, 6, 7]])[0]) for seed in range(8)]
    assert len(set(answers)) == 8
    others = Sampler(tokenizer, 24, 0).responses(model, PROMPTS)
    assert len({tuple(answer) for answer in others}) == len(PROMPTS)


def test_a_response_is_limited_by_its_own_prompt_and_ends_with_the_end_of_sequence(model, tokenizer):
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(draw.randint(1, 20))] for _ in range(40)]
    lengths, ended = set(), 0
    for prompt, response in zip(prompts, Sampler(tokenizer, 18, 3).responses(model, prompts), strict=True):
        room = max(1, 18 - len(prompt))
        assert 1 <= len(response) <= room
        assert tokenizer.eos_token_id not in response[:-1]
        assert len(response) == room or response[-1] == tokenizer.eos_token_id
        lengths.add(len(response))
        ended += response[-1] == tokenizer.eos_token_id
    assert len(lengths) > 5


def test_tokens_are_sampled_from_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    rows, steps = 500, 40
    streams = PromptSeededNoise([([number], 0) for number in range(rows)], seed=1)
    drawn = torch.cat([streams(scores.repeat(rows, 1)).argmax(1) for _ in range(steps)])
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = scores.softmax(0)
    # Four standard errors of a share of 20,000 draws.
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / len(drawn)).sqrt()).all()


def test_compared_responses_are_independent():
    """A win rate under a graded judge is that of independent draws; from one stream it leans towards one half."""
    grade = torch.tensor([-1.5, -0.5, 0.0, 0.8, 2.0])
    rows = 20_000
    prompts = [([number], 0) for number in range(rows)]
    # A policy that likes what the judge likes, against one that likes all alike.
    scores = {POLICY: grade, OTHER: torch.zeros(5)}
    drawn = {stream: PromptSeededNoise(prompts, 0, stream)(scores[stream].repeat(rows, 1)).argmax(1) for stream in scores}
    chances = grade.softmax(0)[:, None] * torch.full((5,), 0.2)
    wins = (grade[:, None] > grade).float() + 0.5 * (grade[:, None] == grade)
    expected = (chances * wins).sum().item()
    found, other = grade[drawn[POLICY]], grade[drawn[OTHER]]
    rate = ((found > other).float() + 0.5 * (found == other)).mean().item()
    # Four standard errors of a rate of 20,000 comparisons.
    assert rate == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(rows))
    # From one stream the same draws lean to one half by more than that.
    shared = grade[PromptSeededNoise(prompts, 0)(scores[OTHER].repeat(rows, 1)).argmax(1)]
    assert ((found > shared).float() + 0.5 * (found == shared)).mean().item() < expected - 4 * 0.5 / math.sqrt(rows)


def test_each_stream_is_reproducible(model, tokenizer):
    first, again = (Sampler(tokenizer, 24, 0).responses(model, PROMPTS, OTHER) for _ in range(2))
    assert first == again and first != Sampler(tokenizer, 24, 0).responses(model, PROMPTS)


def test_the_generation_config_is_ignored_and_unchanged(model, tokenizer):
    advised = copy.deepcopy(model)
    advised.generation_config.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=50.0, max_new_tokens=1)
    before = advised.generation_config.to_dict()
    assert Sampler(tokenizer, 24, 0).responses(advised, PROMPTS) == Sampler(tokenizer, 24, 0).responses(model, PROMPTS)
    assert advised.generation_config.to_dict() == before


def test_random_streams_and_the_mode_of_the_model_are_unchanged(model, tokenizer):
    before = torch.get_rng_state()
    model.train()
    Sampler(tokenizer, 24, 0).responses(model, PROMPTS)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()


def test_a_model_with_shared_prefixes_gives_the_same_responses(model, tokenizer):
    sharing = copy.deepcopy(model)
    assert share_prefixes(sharing, "on")
    assert Sampler(tokenizer, 24, 0).responses(sharing, PROMPTS) == Sampler(tokenizer, 24, 0).responses(model, PROMPTS)


def test_texts_have_no_special_tokens_and_no_prompts_give_no_responses(model, tokenizer):
    answers = Sampler(tokenizer, 24, 0).texts(model, PROMPTS)
    assert answers == tokenizer.batch_decode(Sampler(tokenizer, 24, 0).responses(model, PROMPTS), skip_special_tokens=True)
    assert Sampler(tokenizer, 24, 0).texts(model, []) == []


# ---- several samples of a prompt ---------------------------------------------------------------------------------------------


def continued_alone(model, tokenizer, prompt: list[int], number: int, limit: int, seed: int) -> list[int]:
    """A sample drawn token by token from whole sequences, without batch, padding or cache."""
    noise, ids = PromptSeededNoise([(prompt, number)], seed), list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(noise(scores).argmax(1).item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@settings(max_examples=8, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(0, 2**40), st.integers(1, 9))
def test_samples_are_those_of_each_row_alone(model, tokenizer, lengths, number, seed, at_once):
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 200) for _ in range(length)] for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MAX_CPU_BATCH", at_once)
        found = token_ids(Sampler(tokenizer, 36, seed).samples(model, prompts, number))
    for prompt, responses in zip(prompts, found, strict=True):
        limit = 36 - len(prompt)
        assert responses == [continued_alone(model, tokenizer, prompt, k, limit, seed) for k in range(number)]


def test_a_sample_depends_on_its_number_but_not_on_how_many_there_are(model, tokenizer):
    sampler = Sampler(tokenizer, 30, 4)
    many = token_ids(sampler.samples(model, PROMPTS, 6))
    for number in range(1, 6):
        assert token_ids(sampler.samples(model, PROMPTS, number)) == [responses[:number] for responses in many]
    assert [first for first, *_ in many] == sampler.responses(model, PROMPTS)
    assert all(len({tuple(response) for response in responses}) == 6 for responses in many)
    others = token_ids(sampler.samples(model, PROMPTS, 6, OTHER))
    assert not any(one == other for pair in zip(many, others, strict=True) for one, other in zip(*pair, strict=True))


SHAPED = GenerationSettings(temperature=0.5, top_k=20, repetition_penalty=1.2, max_new_tokens=16)


@pytest.mark.parametrize("how", [None, SHAPED])
def test_the_log_prob_of_a_sample_is_the_models_own_whatever_shaped_the_choice(model, tokenizer, how):
    for prompt, responses in zip(PROMPTS, Sampler(tokenizer, 30, 4, settings=how).samples(model, PROMPTS, 3), strict=True):
        for ids, logp in responses:
            with torch.no_grad():
                every = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            predicted = every[len(prompt) - 1 : len(prompt) + len(ids) - 1]
            assert logp == pytest.approx(predicted[range(len(ids)), ids].sum().item(), abs=1e-4)


def test_equal_prompts_have_equal_samples(model, tokenizer):
    first, other, second = Sampler(tokenizer, 24, 0).samples(model, [[5, 6, 7], [8, 9], [5, 6, 7]], 3)
    assert first == second != other
    # Not the same list: a caller may extend one.
    assert first is not second


def test_a_prompt_is_computed_once_for_its_samples_and_ended_rows_are_not_computed(model, tokenizer):
    sampler, prompts = Sampler(tokenizer, 60, 3), [list(range(20, 20 + length)) for length in (20, 30, 40, 50)]
    # The first call of all tries whether the model can.
    sampler.samples(model, prompts, 2)
    sizes = []
    hook = model.register_forward_pre_hook(lambda *call: sizes.append(tuple(call[2]["input_ids"].shape)), with_kwargs=True)
    try:
        found = token_ids(sampler.samples(model, prompts, 8))
    finally:
        hook.remove()
    assert sizes[0] == (4, 50) and all(width == 1 for _, width in sizes[1:])
    # Rows are computed until, at the latest, a quarter of the batch has ended.
    lengths = [len(response) for responses in found for response in responses]
    for step, (rows, _) in enumerate(sizes[1:], start=1):
        assert sum(length > step for length in lengths) <= rows <= 4 / 3 * sum(length > step for length in lengths) + 1
    assert len({rows for rows, _ in sizes}) > 4 and sizes[1][0] == 32 and sizes[-1][0] <= 8


def test_one_response_to_each_prompt_is_what_transformers_decoding_gives(model, tokenizer):
    """To the last bit: scores with noise are compared too, and the batch is whole until the last row has ended."""
    prompts, width = [PROMPTS[1], PROMPTS[3]], 6
    noise = PromptSeededNoise([(prompt, 0) for prompt in prompts], 7)
    expected = model.generate(
        input_ids=torch.tensor([prompts[0], [tokenizer.pad_token_id] * 2 + prompts[1]]),
        attention_mask=torch.tensor([[1] * 6, [0] * 2 + [1] * 4]),
        generation_config=GenerationConfig(), logits_processor=[lambda _, scores: noise(scores)], do_sample=False,
        max_new_tokens=30, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    seen = []
    again = PromptSeededNoise([(prompt, 0) for prompt in prompts], 7)
    ends = decoding.Ends(frozenset({tokenizer.eos_token_id}), tokenizer.pad_token_id)

    def noted(scores, numbers):
        seen.append(again(scores, numbers))
        return seen[-1]

    sampled = decoding.generate(model, prompts, ends, 30, decoding.Decoding(noted, [30, 30], ends))
    found = [response.token_ids for response in sampled]
    rows = expected.sequences[:, width:].tolist()
    end = tokenizer.eos_token_id
    assert found == [row[: row.index(end) + 1] if end in row else row for row in rows]
    assert len(seen) == len(expected.scores)
    for step, (one, other) in enumerate(zip(seen, expected.scores, strict=True)):
        running = [step < len(response) for response in found]
        assert torch.equal(one[running], other[running])


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "qwen3_next", "mamba2", "minimax", "rwkv"])
def test_caches_of_every_kind_are_repeated_or_else_prompts_are(name, tokenizer, tmp_path, capsys):
    """Sliding windows, states and hybrids are repeated; transformers cannot repeat those of MiniMax and RWKV."""
    make(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # Of one length, since RWKV knows no padding; longer than the window of 16.
    prompts = [list(range(start, start + 20)) for start in (40, 70)]
    found = token_ids(Sampler(tokenizer, 40, 1).samples(model, prompts, 3))
    said = capsys.readouterr().out
    assert said.count("computes a prompt for each of its samples anew") == (name in ("minimax", "rwkv"))
    if name != "rwkv":
        assert found == [[continued_alone(model, tokenizer, prompt, k, 20, 1) for k in range(3)] for prompt in prompts]
    assert token_ids(Sampler(tokenizer, 40, 1).samples(model, prompts, 3)) == found
    # It is tried, and said, once.
    assert capsys.readouterr().out == ""


def test_a_cache_whose_rows_mix_is_found(model, tokenizer, monkeypatch):
    """Prompts are repeated where the cache takes every repetition but hands out wrong rows."""
    expected = token_ids(Sampler(tokenizer, 30, 1).samples(model, PROMPTS, 3))
    broken = copy.deepcopy(model)
    monkeypatch.setattr(DynamicLayer, "reorder_cache", lambda layer, rows: (
        setattr(layer, "keys", layer.keys[rows].flip(0)), setattr(layer, "values", layer.values[rows].flip(0))
    ))  # fmt: skip
    ends = decoding.Ends(frozenset({tokenizer.eos_token_id}), tokenizer.pad_token_id)
    assert not decoding.repeats_prompts(broken, ends)
    assert token_ids(Sampler(tokenizer, 30, 1).samples(broken, PROMPTS, 3)) == expected
