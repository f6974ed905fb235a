"""Attention over tries in merged parts: the numbers of the mask, values and gradients; kernels, choice and proof."""

import random
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.batching.tries import TrieLayout, build_trie
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing import attention_choice, tree_attention, varlen_kernels
from preference_training.modeling.prefix_sharing.attention_choice import (
    FLEX,
    VARLEN,
    Measured,
    Shape,
    ask_for,
    asked_for,
    choose,
    in_use,
    varlen_kernel,
)  # fmt: skip
from preference_training.modeling.prefix_sharing.merged_attention import attention_by_parts
from preference_training.modeling.prefix_sharing.proof import find_sharing_failure
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries, share_prefixes
from preference_training.modeling.prefix_sharing.varlen_kernels import FlashAttentionPackage, PlainKernel, Scores, TorchFlash
from preference_training.modeling.reference_cache import model_facts
from preference_training.modeling.tokenizer import load_tokenizer
from tests.batching.test_attention_parts import chain
from tests.modeling.test_tree_attention import gradients, make
from tests.support.random_tries import random_prompts
from trainers import placement_for

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """The choice of attention as it is when a process starts."""
    monkeypatch.setattr(attention_choice, "_asked", "auto")
    monkeypatch.setattr(attention_choice, "_fault", None)
    monkeypatch.setattr(attention_choice, "_said", set())
    monkeypatch.setattr(TrieLayout, "wants_parts", False)


@pytest.fixture
def plain(fresh, monkeypatch):
    """A run with prefix_attention=varlen whose kernel is the plain one."""
    monkeypatch.setattr(attention_choice, "kernels", lambda: (PlainKernel(),))
    ask_for(VARLEN)


# ---- numbers --------------------------------------------------------------------------------------------------------------


def by_definition(query, key, value, layout: TrieLayout, rules: Rules) -> torch.Tensor:
    """Scores, soft-cap, mask, and a softmax with one more score for the sink: [1, H, T, D]."""
    index = torch.arange(query.shape[2])
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * rules.scaling
    scores = scores if rules.softcap is None else rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill(~layout.may_attend(index[:, None], index[None, :]), -torch.inf)
    total = scores.exp().sum(-1, keepdim=True) + (0 if rules.sinks is None else rules.sinks.exp()[None, :, None, None])
    return scores.exp() / total @ value.repeat_interleave(groups, dim=1)


def check(layout: TrieLayout, softcap: float | None, sinks: bool, seed: int = 0) -> None:
    """Output and all gradients in float64, against the definition."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)  # noqa: E731
    tokens = layout.trie.num_tokens
    # Three query heads for each key head, of another size.
    inputs = [number(1, 6, tokens, 8), number(1, 2, tokens, 8), number(1, 2, tokens, 8), *([number(6)] if sinks else [])]
    weights = torch.randn(1, 6, tokens, 8, generator=draw, dtype=torch.float64)
    results = []
    for attend in (by_definition, lambda *given: attention_by_parts(*given, PlainKernel())):
        output = attend(*inputs[:3], layout, Rules(0.4, softcap=softcap, sinks=inputs[3] if sinks else None))
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_merged_parts_are_the_attention_that_the_mask_says_with_its_gradients(fresh, depth, softcap, sinks):
    check(TrieLayout(chain(depth), CPU), softcap, sinks)


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 1.5]), st.booleans())
def test_so_they_are_on_any_trie(rng, softcap, sinks):
    check(TrieLayout(pack_examples(list(iterate_examples(random_prompts(rng)))).trie, CPU), softcap, sinks)


def test_sequences_that_share_nothing_are_one_part_and_the_kernels_output_is_untouched(fresh):
    layout = TrieLayout(build_trie([[1, 2, 3], [4, 5]], [0, 1])[0], CPU)
    assert len(layout.parts) == 1
    check(layout, None, False)


def some_batch(seed: int = 1):
    """A packed batch whose attention is computed all at once."""
    batch = pack_examples(list(iterate_examples(random_prompts(random.Random(seed), most=3)))).for_gpu()
    batch.layout.by_branches = False
    return batch


def by_branches(batch):
    """The same batch branch by branch."""
    batch.layout.by_branches = True
    return batch


# gpt_oss has sinks, gemma2 soft-caps; windows as long as any sequence hide nothing.
MODELS = {"llama": {}, "gpt2": {}, "gpt_oss": {"sliding_window": 500}, "gemma2": {"sliding_window": 500}}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_has_the_log_probs_and_gradients_that_it_has_branch_by_branch(plain, model_type, monkeypatch):
    model = make(model_type, **MODELS[model_type])
    attend_over_tries(model)
    usual, calls = tree_attention.attention_by_parts, []
    monkeypatch.setattr(tree_attention, "attention_by_parts", lambda *given: (calls.append(1), usual(*given))[1])
    found, expected = (gradients(response_scores, model, way(some_batch())) for way in (lambda batch: batch, by_branches))
    assert len(calls) == model.config.num_hidden_layers, "every layer, once"
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_recomputed_activations_and_a_frozen_copy_have_the_same_bits(plain):
    model = make("llama")
    attend_over_tries(model)
    expected = gradients(response_scores, model, some_batch())
    enable_activation_checkpointing(model.train())
    found = gradients(response_scores, model, some_batch())
    with torch.no_grad():
        assert torch.equal(response_scores(model, some_batch()), expected[0])
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


def test_under_autocast_parts_are_computed_in_its_dtype(plain, monkeypatch):
    seen = []

    class Watched(PlainKernel):
        def forward(self, query, key, value, part, scores):
            seen.extend(each.dtype for each in (query, key, value))
            return super().forward(query, key, value, part, scores)

    monkeypatch.setattr(attention_choice, "kernels", lambda: (Watched(),))
    model = make("llama")
    attend_over_tries(model)
    expected = response_scores(model, by_branches(some_batch()))
    model.autocast_dtype = torch.bfloat16
    found = response_scores(model, some_batch())
    assert set(seen) == {torch.bfloat16}
    # Eight bits of mantissa.
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0.5)


# ---- kernels --------------------------------------------------------------------------------------------------------------


def test_torchs_flash_attention_is_called_as_it_is_declared(fresh):
    # A device without numbers that knows the signatures of CUDA's operations.
    layout = TrieLayout(chain(2), torch.device("meta"))
    shape = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    inputs = [torch.empty(1, heads, layout.trie.num_tokens, 16, **shape) for heads in (4, 2, 2)]
    output = attention_by_parts(*inputs, layout, Rules(0.5), TorchFlash())
    assert output.shape == inputs[0].shape and output.dtype == torch.bfloat16
    found = torch.autograd.grad(output.sum(), inputs)
    assert [each.shape for each in found] == [each.shape for each in inputs]


def test_gradients_are_added_up_in_one_order_and_the_setting_is_as_before():
    with varlen_kernels.same_bits():
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def package(monkeypatch):
    """A package flash-attn with the signatures of version 2.8 that computes as the plain kernel does."""
    from preference_training.batching.attention_parts import AttentionPart

    def part(causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        index = None if causal else ()
        return AttentionPart(index, index, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        rows = part(causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *PlainKernel().forward(q, k, v, rows, Scores(softmax_scale, softcap or None)), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
        zero_tensors=False,
    ):  # fmt: skip
        rows = part(causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = PlainKernel().backward(dout, (q, k, v, out, softmax_lse), rows, Scores(softmax_scale, softcap or None))
        for place, each in zip((dq, dk, dv), found, strict=True):
            place.copy_(each)

    module = ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward, module._flash_attn_varlen_backward = (
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)


def test_the_package_flash_attn_gets_scale_cap_and_lengths(fresh, package):
    layout, draw = TrieLayout(chain(3), CPU), torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, layout.trie.num_tokens, 8, generator=draw, requires_grad=True) for h in (4, 2, 2)]
    results = []
    for kernel in (FlashAttentionPackage(), PlainKernel()):
        output = attention_by_parts(*inputs, layout, Rules(0.7, softcap=3.0), kernel)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("query", "scores", "reason"),
    [
        (torch.empty(2, 1, 16), Scores(1.0), "no float32"),
        (torch.empty(2, 1, 20, dtype=torch.float16), Scores(1.0), "no heads of size 20"),
        (torch.empty(2, 1, 264, dtype=torch.float16), Scores(1.0), "no heads of size 264"),
        (torch.empty(2, 1, 16, dtype=torch.bfloat16), Scores(1.0), "no kernels for cpu"),
    ],
)
def test_what_flash_attention_cannot_compute_is_named(query, scores, reason):
    assert reason in TorchFlash().refusal(query, scores) and reason in FlashAttentionPackage().refusal(query, scores)


def test_a_soft_cap_is_computed_by_the_package_only(monkeypatch):
    monkeypatch.setattr(varlen_kernels, "device_refusal", lambda device: None)
    query = torch.empty(2, 1, 16, dtype=torch.bfloat16)
    assert "no soft-cap" in TorchFlash().refusal(query, Scores(1.0, 50.0)) and TorchFlash().refusal(query, Scores(1.0)) is None
    assert FlashAttentionPackage().refusal(query, Scores(1.0, 50.0)) is None


@pytest.mark.parametrize(("capability", "hip", "said"), [((8, 0), None, None), ((7, 5), None, "T4"), ((9, 0), "6.2", "AMD")])
def test_a_gpu_without_flash_attention_is_named(monkeypatch, capability, hip, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", hip)
    found = varlen_kernels.device_refusal.__wrapped__(torch.device("cuda", 0))
    assert found is None if said is None else said in found


# ---- choice ---------------------------------------------------------------------------------------------------------------


def test_without_measurements_auto_is_flex_attention(fresh):
    assert attention_choice.MEASURED == ()
    assert choose(Shape(64, 2.0, 1), ()) == FLEX
    layout = TrieLayout(chain(2), CPU)
    query = torch.empty(1, 2, layout.trie.num_tokens, 16)
    assert varlen_kernel(query, query, layout, Rules()) is None


def test_auto_is_what_was_faster_at_the_nearest_shape_of_the_same_head_size():
    measured = (
        Measured(Shape(128, 2.0, 1), VARLEN), Measured(Shape(128, 7.0, 1), FLEX), Measured(Shape(128, 3.0, 2), FLEX),
        Measured(Shape(64, 2.0, 1), FLEX),
    )  # fmt: skip
    assert choose(Shape(128, 2.4, 1), measured) == VARLEN
    # log(7 / 4) < log(4 / 2)
    assert choose(Shape(128, 4.0, 1), measured) == FLEX
    assert (
        choose(Shape(128, 2.0, 3), measured)
        == choose(Shape(64, 2.0, 1), measured)
        == choose(Shape(80, 2.0, 1), measured)
        == FLEX
    )


def test_the_shape_of_a_trie_is_its_branches_a_tree_and_its_levels():
    # Two trees: a prompt with three responses, and a single sequence.
    trie, _ = build_trie([[1, 1, 5], [1, 1, 6], [1, 1, 7], [9, 9]], [0, 0, 0, 1])
    assert Shape.of(64, trie) == (64, 2.0, 1)


def test_windows_that_hide_tokens_are_left_to_flex_attention_with_a_line(plain, capsys):
    layout = TrieLayout(build_trie([[1] * 9, [1] * 5 + [2]], [0, 0])[0], CPU)
    query = torch.empty(1, 2, 10, 8)
    assert varlen_kernel(query, query, layout, Rules(window=9)).name == "plain"
    for rules in (Rules(window=8), Rules(window=8), Rules(chunk=4)):
        assert varlen_kernel(query, query, layout, rules) is None
    assert varlen_kernel(query, torch.empty(1, 2, 10, 4), layout, Rules()) is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3, "once for each reason"
    assert "window of 8 tokens hides tokens" in said[0] and "chunks of 4 tokens" in said[1] and "of the size of keys" in said[2]


def test_a_run_that_asks_for_varlen_without_a_gpu_is_told(fresh, capsys):
    assert share_prefixes(make("llama"), "on", "varlen")
    said = capsys.readouterr().out
    assert "not by flash attention (prefix_attention=varlen): flash attention has no kernels for cpu" in said
    assert asked_for() == VARLEN and in_use(CPU) == []


# ---- proof ----------------------------------------------------------------------------------------------------------------


class Wrong(PlainKernel):
    """A kernel whose output is a little wrong."""

    def forward(self, query, key, value, part, scores):
        output, lse = super().forward(query, key, value, part, scores)
        return output * 1.5, lse


@pytest.mark.parametrize(("kernel", "left"), [(PlainKernel(), VARLEN), (Wrong(), FLEX)])
def test_the_proof_gives_up_a_kernel_that_computes_something_else(fresh, monkeypatch, capsys, kernel, left):
    asked = []

    def kernels():
        asked.append(asked_for())
        return (kernel,)

    usual = TrieLayout.__init__

    def all_at_once(layout, *given):
        usual(layout, *given)
        layout.by_branches = False

    monkeypatch.setattr(attention_choice, "kernels", kernels)
    monkeypatch.setattr(attention_choice, "device_refusal", lambda device: None)
    monkeypatch.setattr(TrieLayout, "__init__", all_at_once)
    ask_for(VARLEN)
    model = make("llama").to(torch.bfloat16)
    assert find_sharing_failure(model) is None
    said = capsys.readouterr().out
    assert asked and asked_for() == left and in_use(CPU) == ([VARLEN] if left == VARLEN else [])
    assert ("FlexAttention, not flash attention, which failed: its log-probs would be wrong" in said) == (left == FLEX)


def test_log_probs_of_another_attention_are_cached_under_another_name(fresh, monkeypatch):
    model = make("llama")
    usual = model_facts(model)
    ask_for(VARLEN)
    assert model_facts(model) == usual, "where there is no flash attention nothing differs"
    monkeypatch.setattr(attention_choice, "device_refusal", lambda device: None)
    assert model_facts(model) != usual


@pytest.mark.parametrize("name", ["flex", "varlen"])
def test_a_run_computes_with_the_attention_of_its_configuration(fresh, compose, name):
    config = compose("prefix_sharing=on", f"prefix_attention={name}")
    placement = placement_for(config)
    placement.start(config, load_tokenizer(config.model)).load_policy()
    assert asked_for() == name
