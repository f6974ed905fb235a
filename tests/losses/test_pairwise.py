"""Losses of single pairs, against numbers derived in view."""

import math

import pytest
import torch

from preference_training.core.errors import UserError
from preference_training.losses.formulas import (
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    divergence_score,
    exo_loss,
    nca_loss,
    odpo_loss,
    sppo_loss,
)
from preference_training.losses.pairwise import DIVERGENCES
from preference_training.losses.registry import build_loss
from tests.support.losses import BY_KIND, default, f64, of_pairs, one_pair, softplus


def test_exo_is_the_divergence_of_the_policys_preference_from_the_labels():
    # The policy prefers the chosen response with probability 3/4, the label with 0.9.
    expected = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    assert exo_loss(f64(math.log(3)), 0.1).item() == pytest.approx(expected, rel=1e-12)


def test_exo_is_nothing_where_the_policy_prefers_as_often_as_the_label():
    logits = f64(math.log(9)).requires_grad_()
    loss = exo_loss(logits, 0.1)
    loss.sum().backward()
    assert (loss.item(), logits.grad.item()) == (pytest.approx(0, abs=1e-15), pytest.approx(0, abs=1e-15))


def test_nca_classifies_both_responses_and_holds_the_chosen_one_back():
    # -log s(2) - 1/2 log s(-2) - 1/2 log s(1)
    expected = softplus(-2) + 0.5 * softplus(2) + 0.5 * softplus(-1)
    assert nca_loss(f64(2), f64(-1)).item() == pytest.approx(expected, rel=1e-12)


def test_nca_leaves_a_chosen_reward_of_ln_2_alone():
    # Its derivative is -s(-r) + s(r) / 2: none where s(r) = 2/3.
    reward = f64(math.log(2)).requires_grad_()
    nca_loss(reward, f64(0)).sum().backward()
    assert reward.grad.item() == pytest.approx(0, abs=1e-12)


def test_sppo_pulls_the_log_ratios_to_plus_and_minus_half_of_one_over_beta():
    # Targets are 1 and -1: (3 - 1)^2 + (0.5 + 1)^2
    assert sppo_loss(f64(3), f64(0.5), beta=0.5).item() == pytest.approx(4 + 2.25)
    assert sppo_loss(f64(1), f64(-1), beta=0.5).item() == 0


def test_apo_zero_lowers_one_and_raises_the_other_from_where_they_are():
    # 1 - s(log 3) + s(-log 3) = 1/4 + 1/4
    assert apo_zero_loss(f64(math.log(3)), f64(-math.log(3))).item() == pytest.approx(0.5)


def test_apo_down_makes_both_less_likely_and_the_rejected_one_more_so():
    chosen, rejected = f64(0).requires_grad_(), f64(-math.log(3)).requires_grad_()
    loss = apo_down_loss(chosen, rejected)
    loss.sum().backward()
    # s(0) + 1 - s(log 3); derivatives s'(0) - s'(log 3) = 1/4 - 3/16, and s'(log 3).
    assert loss.item() == pytest.approx(0.5 + 0.25)
    assert (chosen.grad.item(), rejected.grad.item()) == (pytest.approx(1 / 16), pytest.approx(3 / 16))


def test_discopop_turns_from_the_logistic_loss_to_the_exponential_one_at_its_temperature():
    # At logits log 3 and temperature 1 the exponential loss has a share of 3/4: log(4/3) / 4 + 3/4 * 1/3.
    assert discopop_loss(f64(math.log(3)), 1.0).item() == pytest.approx(math.log(4 / 3) / 4 + 0.25, rel=1e-12)
    far = discopop_loss(f64(-5, 5), 0.05)
    assert far.tolist() == pytest.approx([softplus(5), math.exp(-5)], rel=1e-9)


def test_an_offset_is_a_margin_to_exceed():
    assert odpo_loss(f64(2), f64(0.5)).item() == pytest.approx(softplus(-1.5), rel=1e-12)


@pytest.mark.parametrize(("scale", "offset"), [("log", 0.5 * math.log(3)), ("linear", 1.5)])
def test_odpo_reads_its_offset_from_the_margins_of_the_data(scale, offset):
    loss = build_loss("odpo", beta=0.5, alpha=0.5, scale=scale)
    # A log-ratio of 4, times beta: 2.
    output = loss(f64(-1, -5), f64(-3, -3), of_pairs(torch.tensor([[0, 1]]), margins=f64(3)))
    assert output.losses.item() == pytest.approx(softplus(offset - 2), rel=1e-12)
    assert [output.chosen_rewards.item(), output.rejected_rewards.item()] == [1, -1]


def test_odpo_asks_hardly_anything_of_a_pair_without_a_margin():
    policy = f64(-5, -5).requires_grad_()
    build_loss("odpo", beta=0.1, alpha=1.0, scale="log")(
        policy, f64(-5, -5), of_pairs(torch.tensor([[0, 1]]), f64(0))
    ).losses.sum().backward()
    assert policy.grad.isfinite().all() and policy.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # t = 4: log t; 1 - 1/t; log(2t / (1 + t)); (t^-0.5 - 1) / -0.5
        *(("reverse_kl", math.log(4)), ("forward_kl", 0.75), ("js", math.log(8 / 5)), ("alpha", 1.0)),
    ],
)
def test_a_divergence_scores_ratios_by_its_derivative(divergence, expected):
    ratios = f64(math.log(4)).requires_grad_()
    assert divergence_score(ratios, divergence, 0.5).item() == pytest.approx(expected, rel=1e-12)
    # A policy that equals its reference is scored 0. The slope, t f''(t) at 1, is 1 or, of Jensen-Shannon, 1/2.
    zero = f64(0).requires_grad_()
    score = divergence_score(zero, divergence, 0.5)
    score.sum().backward()
    assert (score.item(), zero.grad.item()) == (pytest.approx(0, abs=1e-15), 0.5 if divergence == "js" else 1)


@pytest.mark.parametrize(("alpha", "like"), [(1.0, "reverse_kl"), (0.0, "forward_kl")])
def test_alpha_divergence_has_both_kls_as_its_ends(alpha, like):
    ratios = f64(-2, -0.1, 0, 3)
    torch.testing.assert_close(divergence_score(ratios, "alpha", alpha), divergence_score(ratios, like, 0.5))


def test_f_dpo_compares_scores_and_logs_the_rewards_of_dpo():
    policy, reference = f64(-1, -3), f64(-1 - math.log(4), -3)
    output = build_loss("f_dpo", beta=0.5, f_divergence="forward_kl", f_alpha=0.5)(policy, reference, one_pair(2, 2))
    # Scores 1 - 1/4 and 0, times beta.
    assert output.losses.item() == pytest.approx(softplus(-0.375), rel=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(0.5 * math.log(4))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("far", [-500.0, -200.0, -90.0, 500.0])
def test_f_dpo_is_finite_however_far_the_policy_is_from_the_reference(divergence, far):
    loss = build_loss("f_dpo", beta=0.5, f_divergence=divergence, f_alpha=0.5)
    for policy in (torch.tensor([far, 0.0]), torch.tensor([0.0, far]), torch.tensor([far, far])):
        policy.requires_grad_()
        losses = loss(policy, torch.zeros(2), one_pair(2, 2)).losses
        losses.sum().backward()
        assert losses.isfinite().all() and policy.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_discopop_is_finite_at_any_margin(temperature):
    logits = torch.tensor([-1000.0, -90.0, 90.0, 1000.0], requires_grad=True)
    losses = discopop_loss(logits, temperature)
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()
    if temperature < 1:
        # The sigmoid vanishes faster than the exponential grows: what is left is the logistic loss.
        assert losses[:2].tolist() == pytest.approx([1000, 90])


def test_f_dpo_with_the_reverse_kl_is_dpo():
    policy, reference = f64(-1, -3, -2, -8), f64(-4, -2, -1, -9)
    examples = of_pairs(torch.tensor([[0, 1], [2, 3]]))
    found = build_loss("f_dpo", beta=0.3, f_divergence="reverse_kl", f_alpha=0.5)(policy, reference, examples)
    torch.testing.assert_close(found.losses, build_loss("dpo", beta=0.3)(policy, reference, examples).losses)


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        (
            "f_dpo",
            {"f_divergence": "kl", "f_alpha": 0.5},
            "f_divergence: found 'kl', expected reverse_kl, forward_kl, js, alpha",
        ),
        ("odpo", {"alpha": 1.0, "scale": "square"}, "scale: found 'square', expected log or linear"),
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing: found 0, expected above 0: .*"),
        ("discopop", {"temperature": 0.0}, "temperature: found 0.0, expected above 0"),
        ("ld_dpo", {"alpha": 1.5}, "alpha: found 1.5, expected from 0 to 1"),
        ("kto", {"desirable_weight": -1.0, "undesirable_weight": 1.0}, "desirable_weight: found -1.0, expected 0 or more"),
    ],
)
def test_values_that_a_loss_cannot_have_are_refused(name, keys, told):
    with pytest.raises(UserError, match=rf"^loss\.{told}\.$"):
        build_loss(name, beta=0.1, **keys)


@pytest.mark.parametrize("name", sorted(set(BY_KIND["pairs"]) - {"aot", "aot_unpaired", "beta_DPO", "bco", "ld_dpo", "wpo"}))
def test_gradients_are_those_of_finite_differences(name):
    reference, examples = f64(-4.3, -2.2, -1.7, -9.1), of_pairs(torch.tensor([[0, 1], [2, 3]]), f64(0.5, 2))
    policy = f64(-3.1, -2.7, -2.4, -8.6).requires_grad_()
    assert torch.autograd.gradcheck(lambda logps: default(name)(logps, reference, examples).losses, policy)
