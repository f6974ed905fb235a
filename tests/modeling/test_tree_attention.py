"""Computing a prompt once for all its responses changes no number: values and gradients against padded rows, on every
architecture that can take part; and those that cannot say so and are computed correctly all the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.packing import TokenBudget, build_packs, iterate_examples, pack_examples
from preference_training.batching.tries import TrieLayout, build_trie
from preference_training.core.errors import UserError
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import response_scores, trie_scores
from preference_training.modeling.prefix_sharing import scoring_head
from preference_training.modeling.prefix_sharing.block_attention import attention_by_blocks
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import (
    TREE_ATTENTION,
    _attention_by_branches,
    causal_mask,
    register_tree_attention,
)
from tests.support.files import GOLDEN
from tests.support.random_tries import padded_scores

# Wide enough for rotary embeddings, small enough for hundreds of forwards; texts are longer than the windows.
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 600, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 600}
WINDOWED = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "gpt2": GPT2_LIKE, "gpt_neox": {}, "llama": {}, "mistral": {"sliding_window": 5}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma2": WINDOWED, "gemma3_text": WINDOWED, "phi3": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "olmo2": {},
    "smollm3": {}, "stablelm": {}, "gpt_oss": WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
OUTSIDERS = {
    "bloom": {"n_layer": 2, "n_head": 4}, "gptj": {**GPT2_LIKE, "rotary_dim": 4}, "mamba": {"state_size": 4},
}  # fmt: skip


def make(model_type: str, **changes) -> nn.Module:
    """A small model with weights large enough that attention matters."""
    torch.manual_seed(0)
    values = {**SIZES, **ARCHITECTURES.get(model_type, OUTSIDERS.get(model_type, {})), **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.08)
    return model


def prompts_of(shapes: list[tuple[int, tuple[int, ...]]]) -> list[TokenizedPrompt]:
    """Random prompts of the given lengths with responses of the given lengths, the first of which wins every pair."""
    draw = torch.Generator().manual_seed(1)
    tokens = lambda count: torch.randint(3, 97, (count,), generator=draw).tolist()  # noqa: E731
    return [
        TokenizedPrompt(tokens(prompt), [tokens(length) for length in lengths], [(0, k) for k in range(1, len(lengths))])
        for prompt, lengths in shapes
    ]


SHAPES = [(7, (9, 1, 12)), (1, (3, 4)), (20, (6, 31, 2, 2, 9))]


def gradients(compute, model, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs and the gradient of a weighted sum of them in every weight."""
    logps = compute(model, batch)
    weights = torch.linspace(-1, 2, len(logps))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return logps.detach(), torch.autograd.grad((logps * weights).sum(), trained, allow_unused=True)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_trees_equal_padded_rows_in_values_and_gradients(model_type):
    model = make(model_type)
    batch = pack_examples(list(iterate_examples(prompts_of(SHAPES))))
    expected, expected_gradients = gradients(padded_scores, model, batch)
    assert share_prefixes(model, "on")
    found, found_gradients = gradients(trie_scores, model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for (name, _), one, other in zip(model.named_parameters(), found_gradients, expected_gradients, strict=True):
        if one is not None:
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-6, name


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt2"])
def test_log_probs_over_512_tokens_agree_to_1e_minus_4(model_type):
    model = make(model_type)
    batch = pack_examples(list(iterate_examples(prompts_of([(300, (212, 150)), (100, (412, 200))]))))
    with torch.no_grad():
        expected = padded_scores(model, batch)
        share_prefixes(model, "on")
        # Beside the 1e-4, one step to the neighbouring float32: the sums are up to 2,000 nats.
        torch.testing.assert_close(trie_scores(model, batch), expected, rtol=1.2e-7, atol=1e-4)


@pytest.mark.parametrize("model_type", OUTSIDERS)
def test_a_model_that_cannot_share_prefixes_says_so_and_uses_padded_rows(model_type, capsys):
    model = make(model_type)
    batch = pack_examples(list(iterate_examples(prompts_of(SHAPES))))
    with torch.no_grad():
        expected = padded_scores(copy.deepcopy(model), batch)
        assert not share_prefixes(model, "auto")
        assert torch.equal(response_scores(model, batch), expected)
        plain = [
            model(torch.tensor([prompt.prompt_ids + response])).logits[0].log_softmax(-1)[len(prompt.prompt_ids) - 1 : -1]
            .gather(1, torch.tensor(response)[:, None]).sum()
            for prompt in prompts_of(SHAPES)
            for response in prompt.responses
        ]  # fmt: skip
    torch.testing.assert_close(expected, torch.stack(plain), rtol=1e-5, atol=1e-4)
    line = capsys.readouterr().out
    assert line.startswith("prefix sharing: off, using padded rows: ") and line.count("\n") == 1
    with pytest.raises(UserError, match=r"prefix_sharing: found on, but \w+ cannot: "):
        share_prefixes(model, "on")


def test_a_model_that_ignores_positions_fails_the_proof():
    model = make("llama")
    inner = model.model.rotary_emb.forward
    # As if it counted packed tokens, whatever positions it is given.
    model.model.rotary_emb.forward = lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None].expand(x.shape[0], -1))
    with pytest.raises(UserError, match="log-probs would be wrong by"):
        share_prefixes(model, "on")


def test_off_leaves_the_model_as_it_is():
    model = make("llama")
    assert not share_prefixes(model, "off")
    assert model.config._attn_implementation == "sdpa" and type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_generation_and_plain_forwards_are_those_of_the_untouched_model(model_type):
    untouched, model = make(model_type), make(model_type)
    share_prefixes(model, "on")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    arguments = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**arguments), untouched.generate(**arguments))
    torch.testing.assert_close(model(ids).logits, untouched(ids).logits)


# ---- any tree, any order, any cut -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """A padded and a sharing llama with a window, of the same weights."""
    padded, sharing = make("mistral"), make("mistral")
    share_prefixes(sharing, "on")
    return padded, sharing


shapes = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=9).map(tuple)), min_size=1, max_size=4
)


budgets = st.builds(TokenBudget, limit=st.integers(1, 80), soft_limit=st.integers(1, 80))


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, data=st.data())
def test_any_trees_in_any_order_cut_anyhow_have_the_log_probs_of_padded_rows(models, shapes, data):
    padded, sharing = models
    prompts = prompts_of(shapes)
    rows = 0
    for index, prompt in enumerate(prompts):
        object.__setattr__(prompt, "first_row", rows)
        rows += len(prompts[index].responses)
    examples = data.draw(st.permutations(list(iterate_examples(prompts))))
    with torch.no_grad():
        expected = padded_scores(padded, pack_examples(list(iterate_examples(prompts))))
        for batch in build_packs(examples, data.draw(budgets)):
            torch.testing.assert_close(trie_scores(sharing, batch), expected[batch.response_rows], rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(shapes=shapes, budget=st.integers(1, 60))
def test_the_gradient_of_a_loss_does_not_depend_on_the_cut(models, shapes, budget):
    _, model = models
    examples = [example for example in iterate_examples(prompts_of(shapes)) if example[0].examples]
    if not examples:
        return
    loss = build_loss("dpo", beta=0.1)

    def gradient(batches) -> torch.Tensor:
        total = sum(
            loss(logps := trie_scores(model, batch), torch.zeros_like(logps), batch.examples).losses.sum() for batch in batches
        )
        return torch.autograd.grad(total, model.get_input_embeddings().weight)[0]

    whole, packs = gradient([pack_examples(examples)]), gradient(build_packs(examples, TokenBudget(budget, budget)))
    assert (whole - packs).norm() <= 1e-4 * whole.norm() + 1e-6


def test_the_pairs_of_a_prompt_stay_together_up_to_the_limit_and_prompts_up_to_the_soft_limit():
    prompts = prompts_of([(10, (5, 5, 5, 5)), (4, (3, 3)), (4, (3, 3)), (4, (3, 3))])
    packs = build_packs(list(iterate_examples(prompts)), TokenBudget(limit=40, soft_limit=20))
    # 10 + 4 * 5 tokens, of which two responses begin with the same one.
    assert [len(pack.input_ids) for pack in packs] == [29, 20, 10]


def test_the_soft_limit_rises_with_what_prompts_share():
    system = list(range(3, 23))
    prompts = [TokenizedPrompt([*system, number], [[50, 2], [60, 2]], [(0, 1)]) for number in range(70, 90)]
    packs = build_packs(list(iterate_examples(prompts)), TokenBudget(limit=200, soft_limit=20))
    # 20 shared tokens, and of each prompt five: at most 20 + 4 * 20 in a pack.
    assert [len(pack.input_ids) for pack in packs] == [100, 40]
    packs = build_packs(list(iterate_examples(prompts)), TokenBudget(limit=70, soft_limit=20))
    assert [len(pack.input_ids) for pack in packs] == [70, 70]


def test_packs_keep_within_the_budget_and_share_prompts_within_them():
    prompts = prompts_of([(10, (5, 5, 5, 5)), (40, (3, 3))])
    packs = build_packs(list(iterate_examples(prompts)), TokenBudget(25, 25))
    # Prompt 10 + 5 + 5, then + 4 for a second pair, which begins like the first. The third pair needs its prompt again, and
    # the last one is too long by itself.
    assert [len(pack.input_ids) for pack in packs] == [24, 20, 46]
    assert [pack.num_examples for pack in packs] == [2, 1, 1]


# ---- the head -------------------------------------------------------------------------------------------------------------


def test_a_head_in_chunks_gives_the_values_and_gradients_of_a_whole_one(monkeypatch):
    model = make("llama")
    share_prefixes(model, "on")
    assert type(model.lm_head) is ScoringHead
    batch = pack_examples(list(iterate_examples(prompts_of(SHAPES))))
    whole, whole_gradients = gradients(trie_scores, model, batch)
    monkeypatch.setattr(scoring_head, "MAX_LOGITS_BYTES", 8 * 97 * 10)  # ten tokens at once
    packs, pack_gradients = gradients(trie_scores, model, batch)
    torch.testing.assert_close(packs, whole)
    for one, other in zip(pack_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_more_logits_exist_at_once_than_a_chunk_holds(monkeypatch):
    model = make("llama")
    share_prefixes(model, "on")
    largest = []
    usual = scoring_head.score_tokens
    monkeypatch.setattr(scoring_head, "MAX_LOGITS_BYTES", 8 * 97 * 10)
    monkeypatch.setattr(
        scoring_head, "score_tokens", lambda logits, *rest: (largest.append(len(logits)), usual(logits, *rest))[1]
    )
    trie_scores(model, pack_examples(list(iterate_examples(prompts_of(SHAPES))))).sum().backward()
    assert max(largest) == 10


def test_a_model_that_changes_its_logits_keeps_its_own_head():
    model = make("gemma2")
    share_prefixes(model, "on")
    assert type(model.get_output_embeddings()) is nn.Linear and model.config._attn_implementation == TREE_ATTENTION


def test_a_copy_of_a_sharing_model_has_weights_of_its_own():
    model = make("llama")
    share_prefixes(model, "on")
    twin = copy.deepcopy(model)
    batch = pack_examples(list(iterate_examples(prompts_of(SHAPES))))
    with torch.no_grad():
        before = trie_scores(twin, batch)
        for weight in model.parameters():
            weight.mul_(2)
        assert torch.equal(trie_scores(twin, batch), before)
        assert not torch.allclose(trie_scores(model, batch), before)


# ---- attention itself -----------------------------------------------------------------------------------------------------


def a_trie():
    """Two trees: one with branches at two depths, and a single sequence."""
    first = [1] * 9
    trie, _ = build_trie([[*first, 2, 2], [*first, 2, 3, 3, 3], [*first, 4], [5] * 7], [0, 0, 0, 1])
    assert [branch.own for branch in trie.branches] == [11, 3, 1, 7]
    return TrieLayout(trie, torch.device("cpu"))


def test_a_long_branch_after_few_shared_tokens_attends_as_the_mask_says():
    first = [1] * 100
    trie, _ = build_trie([[*first, 2, 2], [*first, *[3] * 600]], [0, 0])
    assert [branch.own for branch in trie.branches] == [102, 600]
    layout, index, draw = TrieLayout(trie, torch.device("cpu")), torch.arange(702), torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 702, 16, generator=draw)
    key, value = torch.randn(2, 1, 2, 702, 16, generator=draw)
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / 4).masked_fill(
        ~layout.may_attend(index[:, None], index[None, :]), -torch.inf
    )
    expected = scores.softmax(-1) @ value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(_attention_by_branches(query, key, value, layout, Rules()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_both_kernels_give_the_attention_that_the_mask_says(window, chunk, softcap, sinks):
    layout, draw = a_trie(), torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 22, 16, generator=draw)
    key, value = torch.randn(2, 1, 2, 22, 16, generator=draw)
    sink = torch.randn(4, generator=draw) if sinks else None
    # The definition, in full: scores, soft-cap, mask, and a softmax with one more score for the sink.
    index = torch.arange(22)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.may_attend(index[:, None], index[None, :], window, chunk), -torch.inf)
    total = scores.exp().sum(-1, keepdim=True) + (0 if sink is None else sink.exp()[None, :, None, None])
    expected = scores.exp() / total @ value.repeat_interleave(2, dim=1)
    rules = Rules(0.3, window, chunk, softcap, sink)
    # FlexAttention runs here without being compiled: the same mask and index arithmetic as on a GPU.
    for attend in (_attention_by_branches, attention_by_blocks):
        torch.testing.assert_close(attend(query, key, value, layout, rules), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_is_causal_and_as_wide_as_its_window():
    assert (causal_mask(4, 2, None, torch.float32, torch.device("cpu")) == 0).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_registering_twice_changes_nothing():
    register_tree_attention()
    register_tree_attention()
    assert share_prefixes(AutoModelForCausalLM.from_pretrained(GOLDEN / "gpt_neox", dtype=torch.float32), "on")
