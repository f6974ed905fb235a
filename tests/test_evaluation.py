"""Held-out metrics: every example once, however it is cut; and intervals that hold what they promise."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from batches import evaluation_batches
from conftest import CONFIG_DIR, GOLDEN
from evaluation import bootstrap_means, evaluate, interval, mean_interval, share_interval
from logprobs import LiveReference
from losses import build_loss
from prompt_table import PromptTable
from tokenization import TokenizedPrompt


@pytest.fixture(scope="module")
def models():
    """A policy and a reference."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32) for name in ("llama_policy", "llama")
    )
    return [policy.eval(), LiveReference(reference)]


PROMPTS = PromptTable.of(TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0]], [(0, 1)]) for n in range(11))


def choices_of_pairs() -> list[str]:
    """The losses of pairs that are whole without a file of the user's."""
    return [path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml") if path.stem not in ("sft", "own")]


@pytest.mark.parametrize("loss", sorted(choices_of_pairs()))
def test_held_out_metrics_do_not_depend_on_the_batch_size(loss, models, compose):
    built = build_loss(**compose(f"loss={loss}").loss)
    built.survey(torch.tensor([[0.5, 0.0], [-0.5, 0.0], [1.0, 0.0]]))
    policy, reference = models
    reference = reference if built.needs_reference else None
    results = [evaluate(policy, reference, built, evaluation_batches(PROMPTS, size, None, seed=0)) for size in (1, 4, 11)]
    for result in results[1:]:
        assert len(result.examples["loss/eval"]) == 11
        for name, value in results[0].means().items():
            assert float(result.means()[name]) == pytest.approx(float(value), abs=1e-6), name


def test_an_empty_held_out_set_is_a_value_error(models):
    with pytest.raises(ValueError, match="no held-out example"):
        evaluate(*models, build_loss("dpo"), [])


def test_the_interval_of_a_share_is_wilsons():
    # 8 of 10: the textbook values 0.490 and 0.943.
    low, high = share_interval(torch.tensor([1.0] * 8 + [0.0] * 2))
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))


def test_the_interval_of_a_share_of_1_is_not_empty():
    low, high = share_interval(torch.ones(100))
    assert low == pytest.approx(0.963, abs=1e-3) and high == pytest.approx(1.0)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50))
def test_the_interval_of_a_mean_lies_within_the_data(values):
    low, high = mean_interval(torch.tensor(values, dtype=torch.float64), draws=100)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mean_interval(values)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.integers(1, 4))
def test_the_bootstrap_takes_examples_that_belong_together_as_one(values, copies):
    alone = bootstrap_means(numpy.array(values)[:, None], draws=50)
    groups = numpy.repeat(numpy.arange(len(values)), copies)
    together = bootstrap_means(numpy.repeat(values, copies)[:, None], groups, draws=50)
    # Copies of an example tell nothing new, and so make nothing more certain.
    numpy.testing.assert_allclose(together, alone, atol=1e-9)


def test_a_bootstrap_mean_counts_every_example_of_a_drawn_group():
    # Two groups, of 3 ones and of 1 zero: drawn alike they give 1, 0.75 or 0.
    draws = bootstrap_means(numpy.array([[1.0], [1.0], [1.0], [0.0]]), numpy.array([7, 7, 7, 2]), draws=200)
    assert set(draws[:, 0]) == {1.0, 0.75, 0.0}


def test_bootstrap_values_that_are_no_numbers_are_left_out_of_an_interval():
    assert interval(numpy.array([1.0, numpy.nan, 1.0])) == (1.0, 1.0)
