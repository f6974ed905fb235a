"""The objectives against golden numbers, numbers derived in view, and what must hold of any loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import (
    BetaDPOLoss,
    GapStatistics,
    adapted_beta,
    build_loss,
    dpo_loss,
    draw_without_replacement,
    example_metrics,
    gap,
    ipo_loss,
    log_sampling_weights,
    number_kept,
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
        output = build_loss(case["loss"], beta=case["beta"], **options)(policy, reference, pairs, torch.ones(len(policy)))
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
    output = build_loss("ipo", beta=0.5, length_normalised=True)(
        policy, reference, torch.tensor([[0, 1]]), torch.tensor([4, 3])
    )
    # chosen per token: -2 against -1; rejected: -3 against -1; margin (-2+1) - (-3+1) = 1; (1 - 1/(2*0.5))^2 = 0
    assert output.losses.tolist() == [0]


def test_sft_is_minus_the_log_prob_of_each_response():
    output = build_loss("sft")(torch.tensor([-3.0, -5.0]), None, torch.empty(0, 2, dtype=torch.int64), torch.tensor([1, 2]))
    assert output.losses.tolist() == [3, 5]


def test_equal_rewards_count_as_half_accurate():
    policy = torch.tensor([-3.0, -5.0])
    pairs = torch.tensor([[0, 1]])
    output = build_loss("dpo")(policy, policy, pairs, torch.ones(2))
    assert example_metrics(output, policy, pairs, "eval")["rewards_eval/accuracies"].tolist() == [0.5]


def test_an_unknown_loss_or_mode_is_a_value_error():
    with pytest.raises(ValueError, match="dppo"):
        build_loss("dppo")
    with pytest.raises(ValueError, match="beta_dpoo"):
        build_loss("dpo", mode_loss="beta_dpoo")


# ---- beta-DPO -----------------------------------------------------------------------------------------------------------


def beta_dpo(ratio: float = 0.2, seed: int = 0) -> BetaDPOLoss:
    return build_loss("dpo", beta=0.1, mode_loss="beta_DPO", mode_weight=ratio, a=0.6, seed=seed)


def random_pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    pairs = torch.arange(2 * count).view(count, 2)
    return torch.randn(2 * count, generator=draw) * 5, torch.randn(2 * count, generator=draw) * 5, pairs


def test_the_first_training_batch_starts_the_statistics_as_they_are():
    loss = beta_dpo()
    loss.select(torch.tensor([1.0, 2.0, 6.0]))
    # mean 3; deviations -2, -1, 3: variance 14 / 2
    assert (loss.statistics.mean, loss.statistics.deviation) == (3.0, pytest.approx(math.sqrt(7)))


def test_the_loss_of_a_batch_is_the_mean_over_the_kept_pairs_at_the_adapted_beta():
    loss = beta_dpo(ratio=0.5)
    policy, reference, pairs = random_pairs(8)
    selection = loss.select(gap(policy - reference, pairs))
    output = loss(policy, reference, pairs, torch.ones(16), selection)
    kept = selection.weights > 0
    assert kept.sum() == 4
    expected = dpo_loss(gap(policy, pairs), gap(reference, pairs), selection.beta)[kept].mean()
    torch.testing.assert_close(output.losses.mean(), expected)
    assert output.statistics["beta_DPO/kept_fraction"] == 0.5


def test_evaluation_filters_nothing_and_leaves_the_statistics_as_they_are():
    loss = beta_dpo()
    loss.select(torch.tensor([1.0, 2.0, 6.0]))
    before = (loss.statistics.mean, loss.statistics.deviation, loss.generator.get_state())
    policy, reference, pairs = random_pairs(8)
    output = loss(policy, reference, pairs, torch.ones(16))
    beta = adapted_beta(0.1, 0.6, gap(policy - reference, pairs).mean(), 3.0)
    torch.testing.assert_close(output.losses, dpo_loss(gap(policy, pairs), gap(reference, pairs), beta))
    assert (loss.statistics.mean, loss.statistics.deviation) == before[:2]
    assert torch.equal(loss.generator.get_state(), before[2])


def test_equal_policy_and_reference_are_survived_and_give_the_base_beta():
    selection = beta_dpo().select(torch.zeros(10))
    assert selection.beta.item() == pytest.approx(0.1)
    assert (selection.weights > 0).sum() == 8


def test_a_single_pair_is_kept_and_leaves_the_deviation_unset():
    loss = beta_dpo()
    selection = loss.select(torch.tensor([2.0]))
    assert selection.weights.tolist() == [1.0]
    assert loss.statistics.deviation is None


def test_beta_never_falls_below_its_floor():
    assert adapted_beta(0.1, 0.6, torch.tensor(-100.0), 0.0).item() == pytest.approx(1e-3)


def test_the_draw_is_the_same_for_the_same_seed_and_another_for_another():
    gaps = torch.randn(64, generator=torch.Generator().manual_seed(1))
    drawn = [beta_dpo(0.5, seed).select(gaps).weights.tolist() for seed in (0, 0, 1)]
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
        selection = loss.select(torch.tensor(gaps))
        assert math.isfinite(selection.beta) and selection.beta >= 0.99e-3
        assert (selection.weights > 0).sum() == max(1, int(len(gaps) * (1 - ratio)))
        assert selection.weights.mean().item() == pytest.approx(1, rel=1e-5)
