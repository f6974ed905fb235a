"""The load-balancing loss of mixtures of experts, and what a step says of their balance."""

from functools import cache
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, iterate_examples
from preference_training.core.errors import UserError
from preference_training.core.process_group import SINGLE_PROCESS
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.experts.balance import ExpertBalance, Tally
from preference_training.modeling.experts.routers import find_routers
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures.tiny_models import build as tiny_model
from tests.support.building import build_trainer

# transformers computes the loss of these itself, from the choices that their routers make.
WITH_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
SHARED = list(range(40, 64))
# What all rows share, what the two answers of a prompt share, answers that begin alike, one answer in two pairs.
PROMPTS = [
    TokenizedPrompt([*SHARED, 70 + k], [[80, 81 + k, 0], [80, 90, 91, 92 + k, 0], [95 + k, 0]], [(0, 1), (0, 2)])
    for k in range(4)
]


@cache
def model_of(name: str):
    return tiny_model(name)


@pytest.fixture
def make(compose):
    """A trainer on a tiny model, with a coefficient of the load-balancing loss."""

    def made(name: str, coefficient: float | None, *overrides: str, sharing: str = "on", prepare=None):
        asked = [] if coefficient is None else [f"model.router_aux_loss={coefficient}"]
        config = compose("wandb.enabled=false", "loss=simpo", *asked, *overrides)
        policy = tiny_model(name)
        share_prefixes(policy, sharing)
        if prepare:
            prepare(policy)
        # One without a reference.
        return build_trainer(config, policy, build_loss("simpo", beta=2.0, gamma=1.0))

    return made


def cut(size: int, tokens: int) -> list[MicroBatch]:
    """The examples in micro-batches of so many, whose packs hold at most so many tokens."""
    examples = list(iterate_examples(PROMPTS))
    budget = TokenBudget(tokens, tokens)
    return [MicroBatch.of(examples[start : start + size], budget) for start in range(0, len(examples), size)]


def gradient(trainer, batch) -> tuple[torch.Tensor, dict]:
    """The gradient of a batch, and the numbers of its routers."""
    trainer.step.backward(batch)
    weights = trainer.models.policy.parameters()
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return torch.cat([each.flatten() for each in found]), trainer.step.balance.metrics()


def plain(name: str) -> tuple[torch.Tensor, float]:
    """The gradient and the value of transformers' own load-balancing loss, of a padded row for each member of each example."""
    rows = [
        torch.tensor(prompt.sequences[member])
        for prompt, number in iterate_examples(PROMPTS)
        for member in prompt.members(number)
    ]
    model = tiny_model(name)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    found = model(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask, output_router_logits=True)
    found.aux_loss.backward()
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
    return torch.cat([each.flatten() for each in grads]), found.aux_loss.item()


@pytest.mark.parametrize("name", WITH_LOSS)
def test_value_and_gradient_are_those_of_transformers_on_unpacked_rows(name, make):
    expected, value = plain(name)
    without, _ = gradient(make(name, None), cut(8, 10**6))
    found, numbers = gradient(make(name, 2.0), cut(8, 10**6))
    assert numbers["experts/aux_loss"] == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close((found - without) / 2, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_the_gradient_and_the_numbers_do_not_depend_on_how_a_batch_is_cut(sharing, make):
    expected, numbers = gradient(make("qwen3_moe", 1.0), cut(8, 10**6))
    for size, tokens in product((8, 2), (10**6, 40)):
        batch = cut(size, tokens)
        found, others = gradient(make("qwen3_moe", 1.0, sharing=sharing), batch)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
        assert others == pytest.approx(numbers, rel=1e-5)
    # Nothing like it holds for the mean of the losses of parts.
    parts = [gradient(make("qwen3_moe", 1.0), [part])[1]["experts/aux_loss"] for part in cut(2, 10**6)]
    assert abs(sum(parts) / len(parts) - numbers["experts/aux_loss"]) > 1e-4


@pytest.mark.parametrize("kind", [True, "selective"])
def test_what_is_computed_again_for_the_backward_pass_counts_once(kind, make):
    expected, numbers = gradient(make("mixtral", 1.0), cut(2, 10**6))
    found, again = gradient(
        make("mixtral", 1.0, prepare=lambda model: enable_activation_checkpointing(model, kind)), cut(2, 10**6)
    )
    assert again == numbers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_under_autocast_each_token_counts_once_and_probabilities_are_float32(make):
    def autocast(model):
        model.autocast_dtype = torch.bfloat16

    _, expected = gradient(make("olmoe", 1.0), cut(8, 10**6))
    trainer = make("olmoe", 1.0, prepare=autocast)
    _, found = gradient(trainer, cut(8, 10**6))
    assert trainer.step.balance.total.scores.dtype == torch.float32
    # bfloat16 has three digits, and sends some tokens elsewhere.
    assert found["experts/aux_loss"] == pytest.approx(expected["experts/aux_loss"], rel=0.02)
    rows = sum(
        len(prompt.sequences[member]) for prompt, number in iterate_examples(PROMPTS) for member in prompt.members(number)
    )
    assert trainer.step.balance.total.tokens == rows


@pytest.mark.parametrize("coefficient", [None, 0])
def test_without_a_coefficient_the_gradient_is_that_of_the_loss_and_the_numbers_are_there(coefficient, make):
    trainer = make("qwen2_moe", coefficient)
    _, numbers = gradient(trainer, cut(2, 10**6))
    calls = []
    trainer.step.logps = lambda pack, usual=trainer.step.logps: calls.append(pack) or usual(pack)
    gradient(trainer, batch := cut(2, 10**6))
    assert len(calls) == len(batch), "nothing is computed twice"
    layers = {"/0", "/1"}
    of_layers = {f"experts/{name}{layer}" for name, layer in product(("max_load", "entropy", "dead"), layers)}
    assert set(numbers) == of_layers | {"experts/aux_loss", "experts/max_load", "experts/entropy", "experts/dead"}
    assert 1 <= numbers["experts/max_load"] <= 4 and 0 < numbers["experts/entropy"] <= 1
    assert numbers["experts/max_load"] == max(numbers["experts/max_load/0"], numbers["experts/max_load/1"])


def test_a_dense_model_has_no_numbers_and_refuses_a_coefficient(make):
    assert gradient(make("llama", None), cut(8, 10**6))[1] == {}
    with pytest.raises(UserError, match=r"model.router_aux_loss: found 0.1, but LlamaForCausalLM has no routers"):
        make("llama", 0.1)


def test_the_loss_of_balanced_and_of_collapsed_routing():
    """Of one layer with 4 experts, 2 a token."""
    balanced = Tally(torch.full((1, 4), 5.0), torch.full((1, 4), 2.5), torch.zeros(1), torch.tensor(10.0))
    # f = 1/2 each, P = 1/4 each: 4 * (4 * 1/2 * 1/4).
    assert balanced.aux_loss() == pytest.approx(2.0)
    # f = (1, 1, 0, 0), P = (1/2, 1/2, 0, 0): 4 * (1/2 + 1/2).
    collapsed = Tally(torch.tensor([[10.0, 10, 0, 0]]), torch.tensor([[5.0, 5, 0, 0]]), torch.zeros(1), torch.tensor(10.0))
    assert collapsed.aux_loss() == pytest.approx(4.0)


def test_the_loss_of_deepseek_v3_is_of_shares_of_sigmoid_scores_and_of_the_choices_with_bias(make):
    trainer = make("deepseek_v3", 1.0)
    [router] = find_routers(trainer.models.policy)
    # Chosen by every token for its bias, in its group of the two experts.
    router.module.e_score_correction_bias[:] = torch.tensor([0.0, 0, 50, 0])
    kept = []
    router.module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    _, numbers = gradient(trainer, [MicroBatch.of([(PROMPTS[0], 0)])])
    assert numbers["experts/max_load/1"] == 2 and numbers["experts/dead"] == 2
    logits = kept[0][0].detach()
    weights = torch.tensor([2.0] * 25 + [2.0] + [1.0] * 2 + [1.0] * 4)
    shares = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    mean = weights @ shares / weights.sum()
    # f is 1 of the experts 2 and 3: a group of two, and two experts a token.
    assert numbers["experts/aux_loss"] == pytest.approx(4 * (mean[2] + mean[3]).item(), rel=1e-5)


def test_entropy_is_that_of_a_token_and_dead_experts_are_those_without_tokens(make):
    trainer = make("qwen3_moe", None)
    for router in find_routers(trainer.models.policy):
        # No preference: all probabilities are 1/4, and topk takes the same two.
        torch.nn.init.zeros_(router.module.weight)
    _, numbers = gradient(trainer, cut(8, 10**6))
    assert numbers["experts/entropy"] == pytest.approx(1.0)
    assert numbers["experts/dead"] == 4 and numbers["experts/max_load"] == pytest.approx(2.0)
    assert numbers["experts/aux_loss"] == pytest.approx(4 * 2 * 1 / 4)


def test_routers_that_transformers_does_not_declare_are_known_by_their_classes(monkeypatch):
    model = model_of("deepseek_v3")
    names = [router.name for router in find_routers(model)]
    monkeypatch.delitem(type(model.model)._can_record_outputs, "router_logits")
    assert [router.name for router in find_routers(model)] == names == ["model.layers.1.mlp.gate"]


def test_a_step_that_was_forgotten_leaves_nothing(make):
    trainer = make("mixtral", 1.0)
    batch = cut(2, 10**6)
    expected, numbers = gradient(make("mixtral", 1.0), batch)
    usual, failed = trainer.step.balance._tally, []

    def fails_once(pack):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        return usual(pack)

    trainer.step.balance._tally = fails_once
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step.backward(batch)
    trainer.step._forget(trainer.models.loss.state_dict())
    found, again = gradient(trainer, batch)
    assert again == numbers and torch.equal(found, expected)


def test_layers_with_several_routers_are_numbered():
    balance = ExpertBalance(model_of("jetmoe"), SINGLE_PROCESS, None)
    assert balance.labels == ["0", "1", "2", "3"] and len(balance.routers) == 4
