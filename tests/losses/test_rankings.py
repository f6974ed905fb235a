"""Losses of rankings and of labeled responses, against numbers derived in view."""

import math

import pytest
import torch

from preference_training.evaluation.held_out import HeldOut
from preference_training.losses.base import Examples, example_metrics, with_margins
from preference_training.losses.formulas import kto_loss, plackett_luce_loss
from preference_training.losses.registry import build_loss
from tests.support.losses import f64, sigmoid


def test_plackett_luce_is_a_choice_of_the_best_that_is_left_again_and_again():
    # Weights 4, 2, 1: chosen first with 4/7, then 2/3.
    rewards = f64(math.log(4), math.log(2), 0)[None]
    expected = -math.log(4 / 7) - math.log(2 / 3)
    assert plackett_luce_loss(rewards, torch.ones(1, 3, dtype=torch.bool)).item() == pytest.approx(expected, rel=1e-12)


def test_a_shorter_ranking_ends_early_with_no_gradient_behind_its_end():
    rewards = f64(1, 0, 99).requires_grad_()
    loss = plackett_luce_loss(rewards[None], torch.tensor([[True, True, False]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-math.log(sigmoid(1)), rel=1e-12)
    assert rewards.grad.tolist() == pytest.approx([-sigmoid(-1), sigmoid(-1), 0])


def test_a_ranking_of_two_is_dpo_and_its_rewards_are_those_of_best_and_worst():
    policy, reference = f64(-1, -4, -3), f64(-2, -2, -2)
    loss, dpo = build_loss("plackett_luce", beta=0.5), build_loss("dpo", beta=0.5)
    two = Examples(torch.tensor([[0, 1], [2, 1]]), torch.ones(3))
    assert torch.equal(
        loss(policy, reference, two).losses.round(decimals=12), dpo(policy, reference, two).losses.round(decimals=12)
    )
    output = loss(policy, reference, Examples(torch.tensor([[0, 2, 1], [2, 0, -1]]), torch.ones(3)))
    assert (output.chosen_rewards.tolist(), output.rejected_rewards.tolist()) == ([0.5, -0.5], [-1.0, 0.5])


def test_the_gradient_of_a_ranking_is_that_of_finite_differences():
    examples = Examples(torch.tensor([[0, 2, 1], [2, 0, -1]]), torch.ones(3))
    loss = build_loss("plackett_luce", beta=0.5)
    assert torch.autograd.gradcheck(
        lambda policy: loss(policy, f64(-2, -2, -2), examples).losses, f64(-1, -4, -3).requires_grad_()
    )


# ---- KTO ------------------------------------------------------------------------------------------------------------------

LABELED = Examples(torch.tensor([[0, 1], [2, 3]]), torch.ones(4), labels=torch.tensor([True, False]))


def kto(beta: float = 0.5, desirable: float = 1.0, undesirable: float = 1.0):
    return build_loss("kto", beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)


def test_kto_is_small_where_a_reward_is_on_its_labels_side_of_the_threshold():
    # 1 - s(2 - 0.5), 1 - s(0.5 + 1)
    found = kto_loss(f64(2, -1), torch.tensor([True, False]), 0.5)
    assert found.tolist() == pytest.approx([sigmoid(-1.5)] * 2, rel=1e-12)


def test_ktos_threshold_is_the_mean_log_ratio_of_the_mismatched_responses_of_the_whole_micro_batch():
    policy, reference = f64(-1, -2, -6, -1), f64(-3, -5, -5, -2)
    # Ratios: 2 and -1; mismatched 3 and 1, a mean of 2, times beta 1. Weights 1 and 3.
    output = kto(undesirable=3.0)(policy, reference, LABELED)
    assert output.losses.tolist() == pytest.approx([1 - sigmoid(1 - 1), 3 * (1 - sigmoid(1 + 0.5))], rel=1e-12)
    assert output.statistics["kto/kl"].item() == 2
    # In packs the threshold is the micro-batch's, whatever is in the pack.
    loss = kto(undesirable=3.0)
    found = loss.batch_statistics(policy[LABELED.members], reference[LABELED.members], LABELED)
    alone = Examples(LABELED.members[1:], LABELED.lengths, labels=LABELED.labels[1:])
    assert loss(policy, reference, alone, found.at(torch.tensor([1]))).losses.item() == output.losses[1].item()


def test_a_negative_estimate_of_the_divergence_counts_as_none():
    found = kto().batch_statistics(f64(0, -3)[None], f64(0, 0)[None], LABELED)
    assert found.value == 0


def test_the_mismatched_response_has_no_gradient():
    policy = f64(-1, -2, -6, -1).requires_grad_()
    kto()(policy, f64(-3, -5, -5, -2), LABELED).losses.sum().backward()
    # Weight w, distance d: -w beta s(d) s(-d) for a desirable response.
    assert policy.grad.tolist() == pytest.approx([-0.5 * 0.25, 0, 0.5 * sigmoid(1.5) * sigmoid(-1.5), 0])


def test_chosen_metrics_are_of_desirable_responses_alone_and_rejected_ones_of_the_others():
    policy, reference = f64(-1, -2, -6, -1), f64(-3, -5, -5, -2)
    found = example_metrics(kto(), kto()(policy, reference, LABELED), policy, LABELED, "eval")
    numbers = {name: values.tolist() for name, values in found.items()}
    nan = pytest.approx(math.nan, nan_ok=True)
    assert numbers["rewards_eval/chosen"] == [1, nan] and numbers["rewards_eval/rejected"] == [nan, -0.5]
    assert numbers["logps_eval/chosen"] == [-1, nan] and numbers["logps_eval/rejected"] == [nan, -6]
    # The desirable one is at the threshold, a tie.
    assert numbers["rewards_eval/accuracies"] == [0.5, 1]
    # No example has a margin; their means do.
    means = {name: values.nanmean().item() for name, values in found.items()}
    assert "rewards_eval/margins" not in means and with_margins(means, "eval")["rewards_eval/margins"] == 1.5


def test_a_metric_that_no_held_out_example_has_is_left_out():
    loss = build_loss("kto", beta=0.5, desirable_weight=1.0, undesirable_weight=1.0)
    # Both responses are desirable: none has the reward of an undesirable one, and there is no margin.
    examples = Examples(torch.tensor([[0, 1], [1, 0]]), torch.ones(2), labels=torch.tensor([True, True]))
    output = loss(f64(-1, -3), f64(-2, -2), examples)
    means = HeldOut(example_metrics(loss, output, f64(-1, -3), examples, "eval"), output.statistics, ["a", "b"]).means()
    assert means.keys() == {"rewards_eval/chosen", "rewards_eval/accuracies", "logps_eval/chosen", "loss/eval", "kto/kl"}
