"""Any trie, in any order and cut anyhow, has the log-probs and gradients of its sequences alone under plain transformers."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from preference_training.batching.packing import Example, TokenBudget, build_packs, iterate_examples
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures import tiny_models
from tests.support.random_tries import gradients, plain_results, random_prompts, relative_error, weighted_sum

# One of each kind of attention: plain, windows, soft-caps, sinks, chunks with scaled queries, a layout that arrives on the
# mask, positions that are learned, experts.
KINDS = ("llama", "mistral", "gemma2", "gpt_oss", "llama4-scaled", "stablelm", "gpt2", "mixtral")
LOGPS, GRADIENTS = 1e-5, 1e-4
# Shared by all examples of a test, since models are made once for them.
MODELS: dict[str, tuple[nn.Module, nn.Module]] = {}
budgets = st.builds(TokenBudget, limit=st.integers(1, 150), soft_limit=st.integers(1, 150))


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """A model as transformers have it, and a copy that shares prefixes."""
    if name not in MODELS:
        plain = tiny_models.build(name).eval()
        sharing = copy.deepcopy(plain)
        assert share_prefixes(sharing, "on") and plain.config._attn_implementation in ("sdpa", "eager")
        MODELS[name] = plain, sharing
    return MODELS[name]


@st.composite
def cuts(draw) -> tuple[list[Example], list[list[Example]], TokenBudget]:
    """All examples of some random tries, and the same in any order as micro-batches, with a budget for their packs."""
    examples = list(iterate_examples(random_prompts(draw(st.randoms()))))
    shuffled = draw(st.permutations(examples))
    at = draw(st.integers(0, len(examples)))
    return examples, [part for part in (shuffled[:at], shuffled[at:]) if part], draw(budgets)


def check(plain: nn.Module, sharing: nn.Module, cut, logps: float = LOGPS, gradient: float = GRADIENTS) -> None:
    """Log-probs to `logps` and the gradient to `gradient`, both relative, on the sequences of a cut."""
    examples, parts, budget = cut
    expected, expected_gradients = plain_results(plain, examples)
    trained = [weight for weight in sharing.parameters() if weight.requires_grad]
    total = [torch.zeros_like(weight) for weight in trained]
    for batch in (batch for part in parts for batch in build_packs(part, budget)):
        found = response_scores(sharing, batch)
        wanted = torch.stack([expected[row] for row in batch.response_rows.tolist()])
        torch.testing.assert_close(found.detach().double(), wanted, rtol=logps, atol=logps)
        for kept, one in zip(total, gradients(weighted_sum(found, batch), trained), strict=True):
            kept += one
    assert relative_error(total, expected_gradients) <= gradient


def for_each_cut(count: int, body) -> None:
    """Run a check on so many random cuts."""
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    settings(max_examples=count, deadline=None, suppress_health_check=suppressed)(given(cuts())(body))()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [6, pytest.param(150, marks=pytest.mark.long)])
def test_any_trie_has_the_numbers_of_its_sequences_alone(name, count):
    plain, sharing = models(name)
    for_each_cut(count, lambda cut: check(plain, sharing, cut))


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.long)])
def test_any_trie_trains_an_adapter_as_its_sequences_alone_do(count):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    plain = get_peft_model(tiny_models.build("mistral"), adapter).eval()
    sharing = copy.deepcopy(plain)
    assert share_prefixes(sharing, "on")
    for_each_cut(count, lambda cut: check(plain, sharing, cut))


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["gpt_oss", "stablelm"])
def test_any_trie_is_the_same_where_activations_are_recomputed(name, count):
    plain, sharing = copy.deepcopy(models(name))
    enable_activation_checkpointing(sharing.train())
    for_each_cut(count, lambda cut: check(plain, sharing, cut))


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_under_autocast_any_trie_agrees_with_its_sequences_alone_to_what_bfloat16_has(name, count):
    plain, sharing = copy.deepcopy(models(name))
    sharing.autocast_dtype = torch.bfloat16

    def body(cut):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(plain, sharing, cut, logps=2e-2, gradient=1e-1)

    for_each_cut(count, body)
