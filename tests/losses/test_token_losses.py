"""Losses that read tokens, against numbers derived in view."""

import math

import pytest
import torch

from preference_training.losses.base import Examples, TokenLogps
from preference_training.losses.registry import build_loss
from preference_training.losses.token_losses import typicality
from tests.support.losses import f64, softplus

# Responses of 3, 1 and 2 tokens; two pairs share the first.
LENGTHS, PAIRS = torch.tensor([3, 1, 2]), torch.tensor([[0, 1], [2, 0]])
RESPONSES = torch.tensor([0, 0, 0, 1, 2, 2])


def of(policy: torch.Tensor, reference: torch.Tensor, collision: torch.Tensor | None = None) -> Examples:
    return Examples(
        PAIRS,
        LENGTHS,
        policy_tokens=TokenLogps(policy, RESPONSES, collision),
        reference_tokens=TokenLogps(reference, RESPONSES),
    )


def sums(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.new_zeros(3).index_add(0, RESPONSES, tokens)


POLICY, REFERENCE = f64(-1, -2, -4, -3, -1, -1), f64(-2, -2, -2, -1, -2, -3)


def test_ld_dpo_counts_what_is_longer_than_the_other_response_less():
    output = build_loss("ld_dpo", beta=0.5, alpha=0.25)(sums(POLICY), sums(REFERENCE), of(POLICY, REFERENCE))
    # Token ratios: response 0: 1, 0, -2; 1: -2; 2: 1, 2.
    # Pair (0, 1) shares one token: 1 + (0 - 2) / 4 = 0.5 against -2. Pair (2, 0) shares two: 1 + 2 against 1 + 0 - 2 / 4.
    assert output.losses.tolist() == pytest.approx([softplus(-0.5 * 2.5), softplus(-0.5 * 2.5)], rel=1e-12)
    assert output.chosen_rewards.tolist() == pytest.approx([0.25, 1.5])
    assert output.rejected_rewards.tolist() == pytest.approx([-1.0, 0.25])


def test_ld_dpo_that_counts_all_tokens_is_dpo():
    output = build_loss("ld_dpo", beta=0.5, alpha=1.0)(sums(POLICY), sums(REFERENCE), of(POLICY, REFERENCE))
    expected = build_loss("dpo", beta=0.5)(sums(POLICY), sums(REFERENCE), of(POLICY, REFERENCE))
    torch.testing.assert_close(output.losses, expected.losses)


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_token_that_is_not_finite_spoils_only_pairs_of_its_response(bad):
    lengths, pairs, responses = torch.tensor([2, 1, 2, 1]), torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 0, 1, 2, 2, 3])
    policy, reference = f64(-1, bad, -3, -1, -4, -2).requires_grad_(), f64(-2, -2, -1, -2, -3, -1)
    both = {"policy_tokens": TokenLogps(policy, responses), "reference_tokens": TokenLogps(reference, responses)}
    losses = build_loss("ld_dpo", beta=0.5, alpha=0.25)(policy, None, Examples(pairs, lengths, **both)).losses
    assert not losses[0].isfinite()
    # Of the second pair: 1 - 1/4 against -1.
    assert losses[1].item() == pytest.approx(softplus(-0.5 * 1.75))
    [gradient] = torch.autograd.grad(losses[1], policy)
    assert gradient[3:].isfinite().all()


def test_the_gradient_of_ld_dpo_is_that_of_finite_differences():
    loss = build_loss("ld_dpo", beta=0.5, alpha=0.25)
    assert torch.autograd.gradcheck(
        lambda tokens: loss(sums(tokens), None, of(tokens, REFERENCE)).losses, POLICY.clone().requires_grad_()
    )


def test_a_response_is_typical_where_its_tokens_are_as_likely_as_tokens_drawn_from_the_policy():
    # A uniform choice of two has a collision of 1/2, as any token of it: weight 1. Tokens half as likely: weight 1/2.
    half = math.log(0.5)
    tokens = TokenLogps(f64(*[half] * 3, half, *[2 * half] * 2), RESPONSES, f64(*[half] * 6))
    assert typicality(tokens, LENGTHS).tolist() == pytest.approx([1, 1, 0.5])


def test_wpo_weights_pairs_by_both_responses_and_leaves_the_weights_out_of_the_gradient():
    collision = f64(-1, -1, -2, -2, -0.5, -0.5)
    tokens = POLICY.clone().requires_grad_()
    loss, dpo = build_loss("wpo", beta=0.5), build_loss("dpo", beta=0.5)
    output = loss(sums(tokens), sums(REFERENCE), of(tokens, REFERENCE, collision))
    # Mean of policy minus collision: (0 - 1 - 2) / 3, -1, -0.5.
    weights = f64(math.exp(-2), math.exp(-1.5))
    expected = dpo(sums(tokens), sums(REFERENCE), of(tokens, REFERENCE))
    torch.testing.assert_close(output.losses, weights * expected.losses)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.sum(), tokens)[0] for each in (output.losses, weights * expected.losses))
    )
    assert torch.equal(output.chosen_rewards, expected.chosen_rewards)
