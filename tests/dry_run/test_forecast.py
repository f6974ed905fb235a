"""Tokens of every rank, and how long a run takes: numbers derived here."""

import pytest
import torch

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import UNLIMITED, TokenBudget, iterate_examples
from preference_training.batching.schedule import Schedule
from preference_training.core.process_group import Ranks
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.dry_run.forecast import RankTokens, describe_duration
from preference_training.dry_run.preview import describe_steps, first_steps
from preference_training.modeling.tokenizer import load_tokenizer

CPU = torch.device("cpu")
A, B = [5, 0], [6, 7, 0]


def prompts(*lengths: int) -> list[TokenizedPrompt]:
    """Prompts of these lengths, with a pair of responses of 2 and 3 tokens each."""
    return [TokenizedPrompt([10 + n] * length, [A, B], [(0, 1)], number=n) for n, length in enumerate(lengths)]


def test_the_tokens_of_all_ranks_are_those_that_each_would_pack():
    steps = [[MicroBatch.of(list(iterate_examples(prompts(*lengths))))] for lengths in ((4, 4, 4), (15, 5, 5, 5))]
    found = RankTokens.of(steps, TokenBudget(9, 9), 2)
    # Three pairs of 9 tokens: two on one rank. Then one of 20 tokens on a rank, two of 10 on the other, a third on either.
    assert [sorted(step) for step in found.of_steps] == [[9, 18], [20, 30]]
    # 77 tokens in two steps. Each rank computes two packs in either, and one of those eight is padding.
    assert found.per_step == 77 / 2 and found.fillers == 1 / 8
    # Steps wait for 18 + 30 tokens, where ranks have 13.5 + 25 on average.
    assert found.line() == (
        "tokens per rank in the first 2 steps: least 9, mean 19, most 30; the largest of a step has 1.25 times the mean; "
        "packs that are padding: 12%"
    )


def test_steps_of_several_ranks_are_described_by_the_tokens_of_all_of_them():
    table = PromptTable.of(prompts(4, 4, 4, 4))
    batches = BatchIterator(Schedule(table, 4), packing=Packing(UNLIMITED, Ranks(0, 2)))
    first, second = describe_steps(batches.schedule, first_steps(batches, UNLIMITED))
    assert "36 tokens per step on average" in first and "18 tokens of rank 0 in the first step" in second


@pytest.mark.parametrize(("live", "per_weight"), [(False, 6), (True, 8)])
def test_the_duration_is_that_of_the_products_with_weights_at_a_share_of_the_peak(live, per_weight, compose):
    config = compose("model.from_config.num_hidden_layers=2", "peak_tflops=2", "assumed_mfu=0.25")
    tokenizer = load_tokenizer(config.model, None)
    # Two blocks (four projections of 128 x 128, three of 128 x 384, two norms), the last norm, and a head of 620 words.
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128 + 620 * 128
    flops = 1e9 * per_weight * weights
    line = describe_duration(config, tokenizer, 1e9, live, 4, CPU)
    assert (
        f"about {flops / (4 * 2e12 * 0.25) / 60:.1f} minutes of training: {flops:.3g} FLOPs on 4 devices of 2 TFLOP/s" in line
    )
    assert "of which 25% are assumed to be used (assumed_mfu)" in line


def test_the_duration_is_unknown_where_the_peak_is(compose):
    config = compose()
    line = describe_duration(config, load_tokenizer(config.model, None), 1e9, False, 1, CPU)
    assert line.startswith("duration: not known, since the peak of the device is not; peak_tflops=")
