"""The loss of reward models: values derived in view, TRL's own numbers, and what is logged."""

import math

import pytest
import torch

from preference_training.configuration.checks.run import check_objective
from preference_training.core.errors import UserError
from preference_training.losses.base import Examples, example_metrics
from preference_training.losses.registry import build_loss, model_head


def examples(count: int, margins=None) -> Examples:
    """Pairs of the responses 0 and 1, 2 and 3, ..."""
    return Examples(torch.arange(2 * count).view(count, 2), torch.ones(2 * count), margins=margins)


def test_a_pair_costs_the_negative_log_of_the_probability_that_its_response_is_preferred():
    # Odds of 3 to 1: a difference of ln 3, and -ln(3 / 4).
    values = torch.tensor([math.log(3) + 2.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    output = build_loss("reward")(values, None, examples(2))
    assert output.losses.tolist() == pytest.approx([math.log(4 / 3), math.log(2)])
    assert output.chosen_rewards.tolist() == [math.log(3) + 2.0, 1.0] and output.rejected_rewards.tolist() == [2.0, 1.0]


def test_a_margin_is_what_the_difference_must_exceed():
    # A difference of 2 with a margin of 2 is no better than none without: -ln(1 / 2).
    values, margins = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0])
    assert build_loss("reward")(values, None, examples(2, margins)).losses.tolist() == pytest.approx([math.log(2)] * 2)


def test_the_penalty_is_on_the_squared_sum_of_the_rewards():
    values = torch.tensor([3.0, 3.0, 1.5, -1.5])
    centered = build_loss("reward", center_coefficient=0.25)(values, None, examples(2)).losses
    # (3 + 3)^2 / 4 = 9, and rewards around 0 cost nothing.
    plain = build_loss("reward")(values, None, examples(2)).losses
    assert (centered - plain).tolist() == pytest.approx([9.0, 0.0])


def test_losses_and_gradients_are_trls(golden):
    numbers = golden("trl_reward.json")
    rewards = torch.tensor(numbers["rewards"], dtype=torch.float64)
    assert len(numbers["cases"]) == 4
    for case in numbers["cases"]:
        values = rewards.T.flatten().requires_grad_()
        margins = None if case["margins"] is None else torch.tensor(case["margins"], dtype=torch.float64)
        loss = build_loss("reward", center_coefficient=case["center_coefficient"])(values, None, examples(6, margins))
        mean = loss.losses.mean()
        [gradient] = torch.autograd.grad(mean, values)
        assert mean.item() == pytest.approx(case["loss"], abs=1e-12)
        torch.testing.assert_close(
            gradient.view(6, 2).T, torch.tensor(case["gradient"], dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_rewards_are_logged_and_no_log_probs():
    values = torch.tensor([3.0, 1.0, 0.0, 0.5, 2.0, 2.0])
    pairs = examples(3)
    loss = build_loss("reward")
    metrics = example_metrics(loss, loss(values, None, pairs), values, pairs, "eval")
    names = {"loss/eval", *(f"rewards_eval/{kind}" for kind in ("chosen", "rejected", "accuracies", "margins"))}
    assert metrics.keys() == names
    assert metrics["rewards_eval/margins"].tolist() == [2.0, -0.5, 0.0]
    # Equal rewards count as half right.
    assert metrics["rewards_eval/accuracies"].tolist() == [1.0, 0.0, 0.5]


def test_what_a_loss_of_values_cannot_do_is_refused():
    assert model_head("reward") == "value" and model_head("dpo") == model_head("own") == "lm"
    check_objective("rewards_eval/margins", "reward", "pairs", "value")
    with pytest.raises(UserError, match="objective: loss=reward has no metric 'logps_eval/chosen'"):
        check_objective("logps_eval/chosen", "reward", "pairs", "value")
    with pytest.raises(UserError, match=r"^loss\.center_coefficient: found -1, expected 0 or more\.$"):
        build_loss("reward", center_coefficient=-1)
    with pytest.raises(UserError, match="loss.center_coefficient: found 'high', expected a number"):
        build_loss("reward", center_coefficient="high")
