"""Sampled responses: from the model's own distribution, and independent of the other prompts."""

import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from preference_training.generation import sampling
from preference_training.generation.sampling import OTHER, POLICY, PromptSeededNoise, Sampler
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.support.files import GOLDEN


@pytest.fixture(scope="module", params=["llama_policy", "gpt_neox"])
def model(request):
    """A golden model."""
    return AutoModelForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()


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
