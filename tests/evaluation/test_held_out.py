"""Held-out metrics: every example once, in batches of any size."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.batching.micro_batches import evaluation_batches
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.evaluation.held_out import evaluate_held_out
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from tests.support.files import CONFIG_DIR, GOLDEN


@pytest.fixture(scope="module")
def models():
    """A policy and a reference."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32) for name in ("llama_policy", "llama")
    )
    return [policy.eval(), LiveReference(reference)]


def prompts_of(kind: str) -> PromptTable:
    """Eleven prompts with one example of a kind each, and whatever losses read of the data."""
    numbers = {"weights": [2.0], "margins": [1.5]} if kind == "pairs" else {}
    return PromptTable.of(
        TokenizedPrompt(
            [5 + n, 6, 7],
            [[10 + n, 11, 0], [12 + n, 0], [9, 8 + n, 0]],
            [(0, 2, 1)] if kind == "rankings" and n % 2 else [(0, 1)],
            **numbers | ({"labels": [float(n % 3 == 0)]} if kind == "labels" else {}),
        )
        for n in range(11)
    )


def choices_of_pairs() -> list[str]:
    """The losses of pairs that are whole without a file of the user's."""
    return [path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml") if path.stem not in ("sft", "own")]


@pytest.mark.parametrize("loss", sorted(choices_of_pairs()))
def test_held_out_metrics_do_not_depend_on_the_batch_size(loss, models, compose):
    built = build_loss(**compose(f"loss={loss}").loss.given())
    built.batch_statistics(torch.tensor([[0.5, 0.0], [-0.5, 0.0], [1.0, 0.0]]), torch.zeros(3, 2), None)
    prompts = prompts_of(built.examples)
    policy, reference = models
    reference = reference if built.needs_reference else None
    results = [
        evaluate_held_out(policy, reference, built, evaluation_batches(prompts, size, None, seed=0)) for size in (1, 4, 11)
    ]
    for result in results[1:]:
        assert len(result.examples["loss/eval"]) == 11
        for name, value in results[0].means().items():
            assert float(result.means()[name]) == pytest.approx(float(value), abs=1e-6), name


def test_an_empty_held_out_set_is_a_value_error(models):
    with pytest.raises(ValueError, match="no held-out example"):
        evaluate_held_out(*models, build_loss("dpo"), [])
