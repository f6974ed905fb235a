"""The objectives against golden numbers, numbers derived in view, and what must hold of any loss."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preference_training.configuration.composition import group_keys
from preference_training.core.errors import UserError
from preference_training.core.metric_names import LOSS_AT_BETA_USED
from preference_training.losses.base import Examples, Loss, ReferenceUpdate, TokenLogps, example_metrics
from preference_training.losses.beta_dpo import (
    GapStatistics,
    adapted_beta,
    draw_without_replacement,
    log_sampling_weights,
    number_kept,
)
from preference_training.losses.formulas import (
    bco_loss,
    dpo_loss,
    dpop_loss,
    gap,
    hinge_loss,
    ipo_loss,
    log_odds,
    orpo_loss,
    robust_dpo_loss,
    rpo_loss,
    simpo_loss,
)
from preference_training.losses.objectives import (
    BetaDPOLoss,
    HingeLoss,
    PairSelection,
    RewardShift,
)
from preference_training.losses.registry import build_loss, losses
from preference_training.losses.zero_margin import loss_at_zero_margin
from tests.support.files import CONFIG_DIR
from tests.support.losses import (
    BY_KIND,
    default,
    f64,
    of_pairs,
    one_pair,
    softplus,
    statistics_of,
    sum_by_response,
    tokens_of_pairs,
)

LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def vectors(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy and reference log-probs [2P], chosen before rejected, and the pairs [P, 2]."""
    values = [torch.tensor(case[name], dtype=torch.float64) for name in LOGPS]
    count = len(values[0])
    pairs = torch.stack([torch.arange(count), torch.arange(count) + count], dim=1)
    return torch.cat(values[:2]), torch.cat(values[2:]), pairs


def test_losses_and_rewards_equal_the_golden_ones_to_1e_minus_12(golden):
    for case in golden("losses.json"):
        policy, reference, pairs = vectors(case)
        options = {key: case[key] for key in ("label_smoothing", "reference_free") if case.get(key) is not None}
        output = build_loss(case["loss"], beta=case["beta"], **options)(policy, reference, of_pairs(pairs))
        for name, found in [
            ("losses", output.losses),
            ("chosen_rewards", output.chosen_rewards),
            ("rejected_rewards", output.rejected_rewards),
        ]:
            torch.testing.assert_close(found, torch.tensor(case["expect"][name], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_beta_dpo_weights_beta_and_losses_equal_the_golden_ones_to_1e_minus_12(golden):
    for case in golden("beta_dpo.json"):
        policy, reference, pairs = vectors(case)
        expect, kept = case["expect"], torch.tensor(case["kept_rows"])
        gaps = gap(policy - reference, pairs)
        weights = log_sampling_weights(gaps, case["gap_mean"], case["gap_std"]).exp()
        torch.testing.assert_close(weights, torch.tensor(expect["sampling_weights"], dtype=torch.float64), rtol=1e-12, atol=0)
        assert number_kept(len(gaps), case["mode_weight"]) == expect["num_kept"]
        beta = adapted_beta(case["beta"], case["a"], gaps[kept].mean(), case["gap_mean"])
        assert beta.item() == pytest.approx(expect["beta_used"], rel=1e-12)
        losses = dpo_loss(gap(policy, pairs), gap(reference, pairs), beta)
        torch.testing.assert_close(losses, torch.tensor(expect["losses"], dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert losses[kept].mean().item() == pytest.approx(expect["loss"], rel=1e-12)


def test_the_running_statistics_follow_the_golden_moving_average(golden):
    for step in golden("beta_dpo_moving_average.json"):
        statistics = GapStatistics(*step["before"])
        statistics.update(torch.tensor(step["gaps"], dtype=torch.float64))
        assert [statistics.mean, statistics.deviation] == pytest.approx(step["after"], rel=1e-12)


def test_dpo_at_equal_policy_and_reference_is_ln_2_whatever_beta():
    gaps = torch.tensor([3.0, -7.0], dtype=torch.float64)
    for beta in (0.05, 0.5):
        torch.testing.assert_close(dpo_loss(gaps, gaps, beta), torch.full((2,), math.log(2), dtype=torch.float64))


def test_conservative_dpo_is_smallest_at_the_log_odds_of_a_right_label():
    # d/dx of -(1-e) log s(x) - e log s(-x) is s(x) - (1-e): zero where the margin x is log((1-e)/e).
    best = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    dpo_loss(best, torch.zeros(1), beta=1.0, label_smoothing=0.1).sum().backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-6)


def test_ipo_is_zero_where_the_margin_is_one_over_two_beta():
    assert ipo_loss(torch.tensor([6.0]), torch.tensor([1.0]), beta=0.1).item() == 0


def test_length_normalised_ipo_divides_each_log_prob_by_its_response_length():
    policy, reference = torch.tensor([-8.0, -9.0]), torch.tensor([-4.0, -3.0])
    output = build_loss("ipo", beta=0.5, length_normalised=True)(policy, reference, one_pair(4, 3))
    # chosen per token: -2 against -1; rejected: -3 against -1; margin (-2+1) - (-3+1) = 1; (1 - 1/(2*0.5))^2 = 0
    assert output.losses.tolist() == [0]


def test_sft_is_minus_the_log_prob_of_each_response():
    output = build_loss("sft")(torch.tensor([-3.0, -5.0]), None, Examples(torch.tensor([[0], [1]]), torch.tensor([1, 2])))
    assert output.losses.tolist() == [3, 5]


def test_equal_rewards_count_as_half_accurate():
    policy = torch.tensor([-3.0, -5.0])
    pairs = torch.tensor([[0, 1]])
    loss = build_loss("dpo")
    output = loss(policy, policy, of_pairs(pairs))
    assert example_metrics(loss, output, policy, of_pairs(pairs), "eval")["rewards_eval/accuracies"].tolist() == [0.5]


def test_an_unknown_loss_or_mode_is_a_value_error():
    with pytest.raises(ValueError, match="dppo"):
        build_loss("dppo")
    with pytest.raises(ValueError, match="beta_dpoo"):
        build_loss("dpo", mode_loss="beta_dpoo")


# ---- beside TRL -----------------------------------------------------------------------------------------------------------


def test_losses_gradients_and_rewards_are_those_of_trl(golden):
    """The file says how it was made."""
    numbers = golden("trl_losses.json")
    compared = [case["keys"]["name"] for case in numbers["losses"]]
    # Of these TRL has none: DPOP's penalty, a moving reference, a selection of pairs, offsets and rankings. Its reward models
    # are in another file.
    assert set(compared) == {name for kind in BY_KIND.values() for name in kind} - {
        *("sft", "dpop", "tr_dpo", "beta_DPO", "odpo", "plackett_luce", "reward"),
    }
    for case in numbers["losses"]:
        batches = [numbers["pairs"]] if case["together"] else [[pair] for pair in numbers["pairs"]]
        for k, batch in enumerate(batches):
            tokens, reference, examples = tokens_of_pairs(batch, case["labeled"])
            policy = sum_by_response(tokens, examples)
            shift = None if case["reward_shift"] is None else RewardShift(case["reward_shift"])
            output = build_loss(**case["keys"])(policy, reference, examples, shift)
            loss = output.losses.mean()
            found = {"losses": loss, "gradients": torch.autograd.grad(loss, tokens)[0]}
            found["rewards"] = torch.stack([output.chosen_rewards.nanmean(), output.rejected_rewards.nanmean()])
            for name, values in case["expect"].items():
                within = {"rtol": case["tolerance"], "atol": case["tolerance"]}
                torch.testing.assert_close(found[name].detach(), torch.tensor(values[k], dtype=torch.float64), **within)


# ---- the formulas, by hand ------------------------------------------------------------------------------------------------


def test_the_hinge_is_one_at_no_margin_and_nothing_from_one_over_beta_on():
    # 1 - 0.5 (margin): margins 0, 1, 2 = 1/beta, 3
    assert hinge_loss(f64(0, 1, 2, 3), f64(0, 0, 0, 0), beta=0.5).tolist() == [1, 0.5, 0, 0]


def test_robust_dpo_takes_the_wrong_labels_part_out_of_the_loss():
    # beta times the margin is 1: right label log(1 + e^-1), wrong label log(1 + e); (0.8 right - 0.2 wrong) / 0.6
    expected = (0.8 * softplus(-1) - 0.2 * softplus(1)) / 0.6
    assert robust_dpo_loss(f64(3), f64(1), beta=0.5, label_smoothing=0.2).item() == pytest.approx(expected, rel=1e-12)


def test_rpo_adds_the_negative_log_likelihood_per_token():
    policy, reference = f64(-6, -8), f64(-5, -5)
    output = build_loss("rpo", beta=0.5, alpha=2.0)(policy, reference, one_pair(3, 4))
    # margin (-6 + 5) - (-8 + 5) = 2, times 0.5: log(1 + e^-1); chosen per token -6 / 3 = -2, times -2: 4
    assert output.losses.item() == pytest.approx(softplus(-1) + 4, rel=1e-12)
    assert [output.chosen_rewards.item(), output.rejected_rewards.item()] == [-0.5, -1.5]


def test_dpop_pays_only_for_a_chosen_response_that_has_become_less_likely():
    # Chosen up by 1: DPO, margin 1 + 1. Chosen down by 1, rejected by 5: margin -1 + 5 - 3 * 1 = 1.
    found = dpop_loss(f64(1, -1), f64(-1, -5), beta=0.5, penalty=3.0)
    assert found.tolist() == pytest.approx([softplus(-1), softplus(-0.5)], rel=1e-12)


def test_simpo_compares_log_probs_per_token_with_a_margin_to_reach():
    policy = f64(-6, -9)
    output = build_loss("simpo", beta=2.0, gamma=0.5)(policy, None, one_pair(3, 3))
    # 2 (-2 + 3) - 0.5 = 1.5
    assert output.losses.item() == pytest.approx(softplus(-1.5), rel=1e-12)
    assert [output.chosen_rewards.item(), output.rejected_rewards.item()] == [-4, -6]


def test_orpo_adds_the_odds_ratio_to_the_likelihood():
    # Probabilities per token 1/2 and 1/5: odds 1 and 1/4, a ratio of 4; sigmoid(log 4) = 4/5.
    policy = 2 * f64(0.5, 0.2).log()
    output = build_loss("orpo", beta=0.1)(policy, None, one_pair(2, 2))
    assert output.losses.item() == pytest.approx(math.log(2) - 0.1 * math.log(0.8), rel=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(0.1 * math.log(0.5))


def test_bco_tells_good_from_bad_by_rewards_beyond_the_shift():
    # Rewards 2 and -1 about a shift of 0.5: -log s(1.5) - log s(0.5 + 1)
    assert bco_loss(f64(2), f64(-1), 0.5).item() == pytest.approx(2 * softplus(-1.5), rel=1e-12)


def test_length_normalised_dpo_is_dpo_of_log_probs_per_token():
    policy, reference = f64(-8, -9), f64(-4, -3)
    output = build_loss("dpo_norm", beta=2.0)(policy, reference, one_pair(4, 3))
    # chosen per token -2 against -1, rejected -3 against -1: ratios -1 and -2, a margin of 1, times 2
    assert output.losses.item() == pytest.approx(softplus(-2), rel=1e-12)
    assert [output.chosen_rewards.item(), output.rejected_rewards.item()] == [-2, -4]


def test_tr_dpo_is_dpo_with_a_reference_that_moves():
    policy, reference, pairs = random_pairs(4)
    loss = build_loss("tr_dpo", beta=0.3, reference_update_every=8, reference_update_share=0.5)
    expected = build_loss("dpo", beta=0.3)(policy, reference, of_pairs(pairs))
    assert torch.equal(loss(policy, reference, of_pairs(pairs)).losses, expected.losses)
    assert loss.reference_update == ReferenceUpdate(8, 0.5) and build_loss("dpo").reference_update is None


# ---- what must hold of them -----------------------------------------------------------------------------------------------

LOGPS_OF_A_PAIR = st.tuples(*[st.floats(-60, -0.1)] * 4)


@given(logps=LOGPS_OF_A_PAIR, beta=st.floats(0.01, 2))
def test_at_their_neutral_settings_they_are_dpo(logps, beta):
    chosen, rejected, *reference = (f64(value) for value in logps)
    gaps = chosen - rejected, reference[0] - reference[1]
    expected = dpo_loss(*gaps, beta)
    ratios = chosen - reference[0], rejected - reference[1]
    for found in (
        robust_dpo_loss(*gaps, beta, 0.0),
        rpo_loss(*gaps, chosen, beta, 0.0),
        dpop_loss(*ratios, beta, 0.0),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Without a reference and a margin SimPO is DPO against a reference that likes all equally.
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta, 0.0), dpo_loss(gaps[0], f64(0), beta))


# IPO, SPPO, NCA and EXO have a margin or rewards to hit, APO-down lowers both, DiscoPOP is not convex; two read tokens.
OTHERS = {"ipo", "sppo_hard", "nca_pair", "exo_pair", "apo_down", "discopop", "ld_dpo", "wpo"}
PUSHING_APART = sorted(set(BY_KIND["pairs"]) - OTHERS)


@pytest.mark.parametrize("name", PUSHING_APART)
@given(logps=LOGPS_OF_A_PAIR, lengths=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_no_gradient_makes_a_chosen_response_less_likely_or_a_rejected_one_more(name, logps, lengths):
    policy, reference = f64(*logps[:2]).requires_grad_(), f64(*logps[2:])
    output = default(name)(policy, reference, one_pair(*lengths))
    output.losses.sum().backward()
    assert output.losses.isfinite().all() and policy.grad.isfinite().all()
    assert policy.grad[0] <= 0 <= policy.grad[1]


def test_no_loss_is_below_0_but_those_that_say_so():
    draw, numbers = torch.Generator().manual_seed(0), torch.arange(400)
    policy, reference = (-40 * torch.rand(400, generator=draw, dtype=torch.float64) for _ in range(2))
    tokens = {
        "policy_tokens": TokenLogps(policy, numbers, collision=policy / 2),
        "reference_tokens": TokenLogps(reference, numbers),
    }
    examples = replace(of_pairs(numbers.view(200, 2)), lengths=torch.ones(400, dtype=torch.long), **tokens)
    found = {name: default(name) for name in (*BY_KIND["pairs"], *BY_KIND["targets"])}
    lowest = {
        name: loss(policy, reference if loss.needs_reference else None, examples).losses.min() for name, loss in found.items()
    }
    # Rounding may leave a divergence of 0 a little below it.
    assert {name for name, least in lowest.items() if least < -1e-12} == {"robust"}
    assert {name for name, loss in found.items() if loss.can_be_negative} == {"robust"}


@given(share=st.floats(0, 0.49), gaps=st.lists(st.floats(-30, 30), min_size=1, max_size=5))
def test_robust_dpo_over_labels_wrong_as_often_as_it_thinks_is_dpo_of_the_right_ones(share, gaps):
    gaps, none = f64(*gaps), torch.zeros(len(gaps), dtype=torch.float64)
    right, wrong = (robust_dpo_loss(sign * gaps, none, 0.5, share) for sign in (1, -1))
    torch.testing.assert_close((1 - share) * right + share * wrong, dpo_loss(gaps, none, 0.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_are_right_from_impossible_to_certain(dtype):
    logps = torch.tensor([-200.0, math.log(0.25), -1e-3, 0.0], dtype=dtype, requires_grad=True)
    found = log_odds(logps)
    # p / (1 - p): next to nothing, 1/3, about 1000, and at 1 the largest that the format tells from it
    eps = torch.finfo(dtype).eps
    expected = [-200.0, math.log(1 / 3), -1e-3 - math.log(-math.expm1(-1e-3)), -math.log(eps)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    orpo_loss(logps, torch.full_like(logps, -1.0), 0.1).sum().backward()
    assert logps.grad.isfinite().all()


# ---- BCO's reward shift -----------------------------------------------------------------------------------------------------


def test_bco_shifts_rewards_by_the_running_mean_of_all_of_them():
    loss = build_loss("bco", beta=0.5)
    # Mean log ratio (2 + 0 + 4 - 2) / 4 = 1, times 0.5
    assert statistics_of(loss, torch.tensor([[2.0, 0.0], [4.0, -2.0]])) == RewardShift(0.5)
    # 0.9 * 0.5 + 0.1 * 0.5 * 3
    assert statistics_of(loss, torch.tensor([[3.0, 3.0]])).value == pytest.approx(0.6)
    other = build_loss("bco", beta=0.5)
    other.load_state_dict(loss.state_dict())
    assert statistics_of(other, torch.tensor([[1.0, 3.0]])) == statistics_of(loss, torch.tensor([[1.0, 3.0]]))


def test_bco_evaluates_with_the_shift_of_training_and_leaves_it_as_it_is():
    policy, reference, pairs = random_pairs(8)
    loss = build_loss("bco", beta=0.5)
    untrained = loss(policy, reference, of_pairs(pairs))
    assert untrained.statistics["bco/reward_shift"] == pytest.approx(0.5 * (policy - reference).mean().item())
    statistics_of(loss, torch.tensor([[1.0, 3.0]]))
    output = loss(policy, reference, of_pairs(pairs))
    assert output.statistics == {"bco/reward_shift": 1.0} and loss.state_dict() == {"shift": 1.0}
    rewards = 0.5 * (policy - reference)[pairs]
    torch.testing.assert_close(output.losses, bco_loss(rewards[:, 0], rewards[:, 1], 1.0))


# ---- beta-DPO -----------------------------------------------------------------------------------------------------------


def gap_statistics(loss: Loss, gaps: torch.Tensor) -> PairSelection:
    """A loss's statistics of a micro-batch with these gaps."""
    return statistics_of(loss, torch.stack([gaps, torch.zeros_like(gaps)], dim=1))


def beta_dpo(ratio: float = 0.2, seed: int = 0) -> BetaDPOLoss:
    return build_loss("dpo", beta=0.1, mode_loss="beta_DPO", mode_weight=ratio, a=0.6, seed=seed)


def random_pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    pairs = torch.arange(2 * count).view(count, 2)
    return torch.randn(2 * count, generator=draw) * 5, torch.randn(2 * count, generator=draw) * 5, pairs


def test_the_first_training_batch_starts_the_statistics_as_they_are():
    loss = beta_dpo()
    gap_statistics(loss, torch.tensor([1.0, 2.0, 6.0]))
    # mean 3; deviations -2, -1, 3: variance 14 / 2
    assert (loss.statistics.mean, loss.statistics.deviation) == (3.0, pytest.approx(math.sqrt(7)))


def test_the_loss_of_a_batch_is_the_mean_over_the_kept_pairs_at_the_adapted_beta():
    loss = beta_dpo(ratio=0.5)
    policy, reference, pairs = random_pairs(8)
    selection = loss.batch_statistics(policy[pairs], reference[pairs], of_pairs(pairs))
    output = loss(policy, reference, of_pairs(pairs), selection)
    kept = selection.weights > 0
    assert kept.sum() == 4
    expected = dpo_loss(gap(policy, pairs), gap(reference, pairs), selection.beta)[kept].mean()
    torch.testing.assert_close(output.losses.mean(), expected)
    assert output.statistics["beta_DPO/kept_fraction"] == 0.5


def test_evaluation_filters_nothing_and_leaves_the_statistics_as_they_are():
    loss = beta_dpo()
    gap_statistics(loss, torch.tensor([1.0, 2.0, 6.0]))
    before = (loss.statistics.mean, loss.statistics.deviation, loss.generator.get_state())
    policy, reference, pairs = random_pairs(8)
    output = loss(policy, reference, of_pairs(pairs))
    # Its loss is DPO's, so that runs compare, whatever their scaling factor and however far they are.
    torch.testing.assert_close(output.losses, build_loss("dpo", beta=0.1)(policy, reference, of_pairs(pairs)).losses)
    # The loss at the beta that training would take stands beside it.
    beta = adapted_beta(0.1, 0.6, gap(policy - reference, pairs).mean(), 3.0)
    adapted = dpo_loss(gap(policy, pairs), gap(reference, pairs), beta).mean()
    torch.testing.assert_close(output.statistics[LOSS_AT_BETA_USED], adapted)
    assert output.statistics["beta_DPO/beta_used"] == beta and adapted != output.losses.mean()
    assert (loss.statistics.mean, loss.statistics.deviation) == before[:2]
    assert torch.equal(loss.generator.get_state(), before[2])


@pytest.mark.parametrize("seen", [[], [[5.0, 0.0]], [[-9.0, 0.0], [2.0, 0.0]]])
@pytest.mark.parametrize("scaling", [0.0, 0.6, 2.0])
def test_a_held_out_loss_of_beta_dpo_does_not_depend_on_what_training_has_seen_nor_on_its_scaling_factor(seen, scaling):
    loss = build_loss("dpo", beta=0.5, mode_loss="beta_DPO", mode_weight=0.2, a=scaling)
    for micro_batch in seen:
        statistics_of(loss, torch.tensor([micro_batch]))
    # A margin of 3 nats at beta 0.5.
    output = loss(f64(-4, -9), f64(-3, -5), one_pair(2, 3))
    assert output.losses.item() == pytest.approx(softplus(-1.5), rel=1e-12)


def test_losses_whose_evaluations_depend_on_the_run_say_so():
    names = {name for kind in BY_KIND.values() for name in kind}
    says = {name for name in names if default(name).evaluation_depends_on}
    assert says == {"tr_dpo", "bco"}
    # What a loss does not say must hold: what training has seen leaves an evaluation's losses as they are.
    policy, reference, pairs = random_pairs(4)
    for name in set(BY_KIND["pairs"]) - says - {"ld_dpo", "wpo"}:
        loss = default(name)
        before = loss(policy, reference, of_pairs(pairs)).losses
        statistics_of(loss, torch.tensor([[5.0, -3.0], [4.0, 1.0]]))
        assert torch.equal(loss(policy, reference, of_pairs(pairs)).losses, before), name


def test_equal_policy_and_reference_are_survived_and_give_the_base_beta():
    selection = gap_statistics(beta_dpo(), torch.zeros(10))
    assert selection.beta.item() == pytest.approx(0.1)
    assert (selection.weights > 0).sum() == 8


def test_a_single_pair_is_kept_and_leaves_the_deviation_unset():
    loss = beta_dpo()
    selection = gap_statistics(loss, torch.tensor([2.0]))
    assert selection.weights.tolist() == [1.0]
    assert loss.statistics.deviation is None


def test_beta_never_falls_below_its_floor():
    assert adapted_beta(0.1, 0.6, torch.tensor(-100.0), 0.0).item() == pytest.approx(1e-3)


def test_the_draw_is_the_same_for_the_same_seed_and_another_for_another():
    gaps = torch.randn(64, generator=torch.Generator().manual_seed(1))
    drawn = [gap_statistics(beta_dpo(0.5, seed), gaps).weights.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_draw_follows_its_weights():
    # Of weights 3 : 1, one draw takes the first with probability 3/4; 4,000 draws have a deviation of 0.7%.
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.tensor([math.log(3.0), 0.0])
    first = sum(draw_without_replacement(log_weights, 1, generator).item() == 0 for _ in range(4000))
    assert first / 4000 == pytest.approx(0.75, abs=0.03)


@given(
    gaps=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    ratio=st.floats(0, 0.99),
    batches=st.integers(1, 3),
)
def test_any_gaps_give_a_finite_beta_and_the_asked_number_of_pairs(gaps, ratio, batches):
    loss = beta_dpo(ratio)
    for _ in range(batches):
        selection = gap_statistics(loss, torch.tensor(gaps))
        assert math.isfinite(selection.beta) and selection.beta >= 0.99e-3
        assert (selection.weights > 0).sum() == max(1, int(len(gaps) * (1 - ratio)))
        assert selection.weights.mean().item() == pytest.approx(1, rel=1e-5)


# ---- of the user's own ----------------------------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass

import torch

from preference_training.losses.formulas import gap, sides
from preference_training.losses.base import Loss, LossOutput, ReferenceUpdate, SharedStatistics
from preference_training.losses.objectives import HingeLoss


@dataclass
class Scaled(Loss):
    scale: float
    beta: float = 0.5
    seed: int = 1

    def __post_init__(self):
        if self.scale == 0:
            raise ValueError("a scale of 0 teaches nothing")

    def __call__(self, policy, reference, examples, batch_statistics=None):
        rewards = sides(self.beta * (policy - reference).detach(), examples.pairs)
        return LossOutput(-self.scale * gap(policy - reference, examples.pairs), *rewards)


class Likelihood(Loss):
    examples, needs_reference = "targets", False

    def __call__(self, policy, reference, examples, batch_statistics=None):
        return LossOutput(-policy / examples.lengths)


class Moving(HingeLoss):
    reference_update = ReferenceUpdate(1, 0.5)


class Summed(HingeLoss):
    def __call__(self, *given):
        return LossOutput(super().__call__(*given).losses.sum())


class Surveying(HingeLoss):
    surveys = True


class Paired(HingeLoss):
    paired = False


class WithPairs(HingeLoss):
    def __call__(self, policy, reference, pairs, lengths, batch_statistics=None):
        return super().__call__(policy, reference, pairs)


class OfLogRatios(HingeLoss):
    def batch_statistics(self, log_ratios):
        return None


class OfTriples(HingeLoss):
    examples = "pair"


class OfTokens(HingeLoss):
    reads_tokens = True


class Counting(HingeLoss):
    def state_dict(self):
        return {"count": 3}


class Numbers(HingeLoss):
    def __call__(self, *given):
        return super().__call__(*given).losses


class WithoutRewards(HingeLoss):
    def __call__(self, *given):
        return LossOutput(super().__call__(*given).losses)


class OfMargins(HingeLoss):
    needs_margins = True

    def losses(self, policy, reference, examples):
        return super().losses(policy, reference, examples) * examples.margins


class Surveyed(HingeLoss):
    needs_batch_statistics = True
    gives = SharedStatistics()

    def batch_statistics(self, policy, reference, examples):
        assert policy.shape == reference.shape == examples.members.shape and not policy.requires_grad
        return self.gives


class SurveyedInVain(Surveyed):
    gives = None


class SurveyedWrong(Surveyed):
    def __call__(self, policy, reference, examples, batch_statistics=None):
        output = super().__call__(policy, reference, examples)
        return output if batch_statistics is None else LossOutput(output.losses.sum())


def hinge(beta):
    return HingeLoss(beta)


def any_options(**options):
    return HingeLoss(sum(options.values()))


def nothing():
    return None
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """`own(NAME, option=value)` is the loss that NAME of a user's file makes."""
    file = tmp_path_factory.mktemp("own") / "losses.py"
    file.write_text(OWN)
    return lambda name, seed=7, **options: build_loss("own", seed, function=f"{file}:{name}", options=options)


def test_a_loss_of_a_users_file_is_used_as_any_other(own):
    policy, reference = f64(-3.0, -5.0), f64(-4.0, -4.0)
    output = own("Scaled", scale=2.0)(policy, reference, one_pair(1, 1))
    # Minus twice the margin of 1 - (-1) nats; rewards are half the ratios.
    assert output.losses.tolist() == [-4.0]
    assert (output.chosen_rewards.tolist(), output.rejected_rewards.tolist()) == ([0.5], [-0.5])
    assert own("hinge", beta=0.25) == HingeLoss(0.25)
    assert own("any_options", x=0.5, y=0.25) == HingeLoss(0.75)
    assert own("Likelihood").examples == "targets"
    assert own("OfMargins", beta=1).needs_margins and own("Surveyed", beta=1).needs_batch_statistics


def test_a_loss_of_ones_own_and_a_mix_with_a_part_that_can_be_may_be_negative(own):
    assert own("Scaled", scale=1.0).can_be_negative
    assert not build_loss("mix", parts=[{"name": "dpo"}, {"name": "ipo"}]).can_be_negative
    assert build_loss("mix", parts=[{"name": "dpo"}, {"name": "robust"}]).can_be_negative


def test_a_loss_of_ones_own_is_given_the_runs_seed_where_it_asks_for_one(own):
    assert own("Scaled", scale=1.0).seed == 7
    assert own("Scaled", scale=1.0, seed=3).seed == 3


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("Scalled", {}, r"loss\.function: .*losses\.py has no 'Scalled'; did you mean Scaled\?"),
        ("Scaled", {"scael": 1}, r"loss\.options\.scael: Scaled has no such option; did you mean scale\?"),
        ("Scaled", {}, r"loss\.options\.scale: not given, and Scaled has no default for it\."),
        ("Scaled", {"scale": 0}, r"loss\.options: Scaled rejects them: a scale of 0 teaches nothing"),
        ("nothing", {}, r"makes NoneType\. Expected a Loss"),
        ("torch", {}, r"loss\.function: .*'torch' cannot be called\. Expected a class or a function"),
        ("Moving", {"beta": 1}, r"moves the reference, which only loss=tr_dpo can"),
        ("Surveying", {"beta": 1}, r"has surveys, which is called needs_batch_statistics now"),
        ("Paired", {"beta": 1}, r"has paired, in place of which it declares examples now: \"pairs\", or \"targets\" where"),
        (
            "WithPairs",
            {"beta": 1},
            r"examples\.pairs and examples\.lengths now: write def __call__\(self, policy, reference, examples",
        ),
        ("OfLogRatios", {"beta": 1}, r"write def batch_statistics\(self, policy, reference, examples\)"),
        ("OfTriples", {"beta": 1}, r"has examples 'pair'; did you mean pairs\?"),
        ("OfTokens", {"beta": 1}, r"reads log-probs of single tokens, which only losses of the framework can"),
        ("Numbers", {"beta": 1}, r"gives Tensor when it is called, not a LossOutput"),
        ("Summed", {"beta": 1}, r"gives losses of shape \[\] for 2 pairs, expected one with gradient for each"),
        ("SurveyedInVain", {"beta": 1}, r"gives NoneType when batch_statistics is called, not BatchStatistics"),
        ("SurveyedWrong", {"beta": 1}, r"gives losses of shape \[\] .*, when it is called with batch_statistics"),
        ("WithoutRewards", {"beta": 1}, r"gives no chosen_rewards and rejected_rewards with one value an example"),
        (
            "Counting",
            {"beta": 1},
            r"gives the state_dict \{'count': 3\}, which no checkpoint takes; expected \{\}, or \{'own': ",
        ),
    ],
)
def test_what_is_no_loss_or_is_given_what_it_does_not_take_is_refused_before_any_data(own, name, options, told):
    with pytest.raises(UserError, match=told):
        own(name, **options)


def test_a_bug_in_a_users_file_keeps_its_traceback(tmp_path):
    (tmp_path / "own.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        build_loss("own", function=f"{tmp_path}/own.py:x", options={})


# ---- a new loss -------------------------------------------------------------------------------------------------------------

CAPPED = """
from dataclasses import dataclass

from preference_training.losses.formulas import gap
from preference_training.losses.objectives import LogRatioLoss
from preference_training.losses.registry import register_loss
from preference_training.losses.zero_margin import loss_at_zero_margin


@register_loss("capped", "capped DPO", "2401.00001")
@dataclass
class CappedLoss(LogRatioLoss):
    cap: float

    training_keys = ("cap",)

    def __post_init__(self):
        if self.cap <= 0:
            raise ValueError(f"found cap {self.cap}, expected more than 0")

    def losses(self, policy, reference, examples):
        return -(self.beta * gap(policy - reference, examples.pairs)).clamp(max=self.cap)
"""
USED = """
import sys
from dataclasses import replace
from pathlib import Path

import preference_training.losses.registry as registry
import train
from preference_training.configuration.saved import changed_config, known_values
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError

registered = registry.find_loss("capped")
assert registered.link == "capped DPO ([arXiv 2401.00001](https://arxiv.org/abs/2401.00001))"
assert registered.objective.reward == "log-ratio" and "loss.cap" in registry.training_keys()


config = configured("loss=capped", "loss.cap=3")
loss = config.loss
assert config.as_dict()["loss"] == loss.given() == {"name": "capped", "beta": 0.5, "cap": 3}
assert config.changed({"loss.cap": 4}).loss.given()["cap"] == 4
# As an evaluation of the run reads it, with and without another value.
saved = known_values(config.as_dict())
assert saved["loss"]["cap"] == 3
for overrides, cap in (([], 3), (["loss.cap=5"], 5)):
    assert changed_config(saved, Path("run"), {}, overrides, {}).loss.given()["cap"] == cap
assert "torch" not in sys.modules
import torch
from preference_training.losses.base import Examples

# Margins of 2 - 0 and 2 + 8 nats at beta 0.5 are 1, and 5, which is above the cap of 3.
policy, reference = torch.tensor([-1.0, -5.0, -11.0]), torch.tensor([-3.0, -5.0, -3.0])
examples = Examples(torch.tensor([[0, 1], [0, 2]]), torch.ones(3))
built = registry.build_loss(**loss.given())
assert built(policy, reference, examples).losses.tolist() == [-1.0, -3.0]
for cap in (0, "abc"):
    try:
        registry.build_loss(**configured("loss=capped", f"loss.cap={cap}").loss.given())
    except UserError as error:
        print(error)
"""


def test_a_new_loss_is_one_module_and_its_file_of_keys(tmp_path):
    root = CONFIG_DIR.parent
    shutil.copytree(root / "config", tmp_path / "config")
    for file in root.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(
        root / "preference_training", tmp_path / "preference_training", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "preference_training" / "losses" / "capped.py").write_text(CAPPED)
    (tmp_path / "config" / "loss" / "capped.yaml").write_text("name: capped\nbeta: 0.5\ncap: 2.0\n")
    command = [sys.executable, "-c", USED]
    used = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (used.returncode, used.stderr) == (0, "")
    assert used.stdout.splitlines() == [
        "loss: capped rejects its keys: found cap 0, expected more than 0",
        "loss.cap: found 'abc', expected a number.",
    ]


def test_a_loss_moves_the_reference_exactly_where_its_file_says_when():
    for name in losses().keys() - {"own", "beta_DPO"}:
        assert (default(name).reference_update is not None) is ("reference_update_every" in group_keys("loss")[name]), name


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ({"name": "dpo"}, math.log(2)),
        ({"name": "dpo", "label_smoothing": 0.2}, math.log(2)),
        ({"name": "dpo", "mode_loss": "beta_DPO", "mode_weight": 0.5, "a": 0.6}, math.log(2)),
        # (0 - 1 / (2 beta))^2
        ({"name": "ipo", "beta": 0.25}, 4.0),
        ({"name": "hinge", "beta": 0.1}, 1.0),
        # Both halves at their threshold.
        ({"name": "bco", "beta": 0.1}, 2 * math.log(2)),
        ({"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, 0.5),
        ({"name": "mix", "parts": [{"name": "dpo"}, {"name": "hinge", "weight": 2.0}]}, math.log(2) + 2),
        # What depends on the response, its label, or the policy alone.
        ({"name": "rpo", "beta": 0.1, "alpha": 1.0}, None),
        ({"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 2.0}, None),
        ({"name": "plackett_luce", "beta": 0.1}, None),
        ({"name": "dpo", "reference_free": True}, None),
        ({"name": "simpo", "beta": 2.0, "gamma": 1.0}, None),
        ({"name": "sft"}, None),
    ],
    ids=str,
)
def test_what_a_loss_is_while_policy_and_reference_agree_is_found_by_computing_it(loss, value):
    found = loss_at_zero_margin(build_loss(**loss))
    assert found == (None if value is None else pytest.approx(value, rel=1e-9))
