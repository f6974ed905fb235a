"""Samples that the reference would hardly say: nonsense is told from a habit."""

import pytest
import torch

from preference_training.batching.packing import UNLIMITED, PackedBatch, TokenBudget
from preference_training.generation.likelihood import FAR, FEWEST, improbability

# A reference for which each token costs so many nats, whatever comes before it.
NATS = {5: 1.0, 6: 1.5, 9: 6.0}


def score(batch: PackedBatch) -> torch.Tensor:
    logps = torch.zeros(len(batch.response_lengths))
    tokens = batch.scored_ids[batch.scored].tolist()
    return logps.index_add(0, batch.scored_responses, torch.tensor([-NATS[token] for token in tokens]))


PROMPTS = [[1, 2, 3], [1, 2, 4], [7]]
USUAL = [[5] * 40, [6] * 20, [5, 6] * 10]


@pytest.mark.parametrize("batching", [(64, UNLIMITED), (2, UNLIMITED), (3, TokenBudget(30, 30))])
def test_nonsense_is_named_with_its_cost_and_the_usual_one(batching):
    # Of the policy 20 tokens of 6 nats and 50 of 1; of the reference 50 of 1 and 30 of 1.5.
    policy = [[9] * 20, [5] * 40, [5] * 10]
    assert improbability(score, PROMPTS, policy, USUAL, batching) is None, "170 / 70 = 2.4, less than 1.2 + 1.5"
    found = improbability(score, PROMPTS, [[9] * 30, [9] * 30, [5] * 10], USUAL, batching)
    assert found == "the reference finds the policy's samples improbable: 5.3 nats per token, and 1.2 of its own"


def test_a_habit_is_no_nonsense():
    shorter = [[6] * 30, [6] * 20, [6] * 20]
    assert 1.19 + FAR > 1.5
    assert improbability(score, PROMPTS, shorter, USUAL, (64, UNLIMITED)) is None


def test_a_few_tokens_or_empty_samples_decide_nothing():
    few = [[9] * (FEWEST // 3), [], [9]]
    assert improbability(score, PROMPTS, few, USUAL, (64, UNLIMITED)) is None
    assert improbability(score, PROMPTS, [[], [], []], USUAL, (64, UNLIMITED)) is None
