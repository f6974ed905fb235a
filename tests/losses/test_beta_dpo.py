"""beta-DPO step by step, beside the arithmetic of its authors' code, and the threshold that its beta is measured from."""

import math

import pytest
import torch

from preference_training.checkpointing.state import STATE_SHAPE
from preference_training.core.values import find_mismatch
from preference_training.losses.base import Examples
from preference_training.losses.beta_dpo import MOMENTUM, GapStatistics, running_mean
from preference_training.losses.registry import build_loss
from tests.support.files import ROOT

A, BETA = 0.6, 0.1


def beta_dpo(ratio: float = 0.0, threshold: str = "running_mean", seed: int = 0):
    keys = {"beta": BETA, "mode_loss": "beta_DPO", "mode_weight": ratio, "a": A}
    return build_loss("dpo", threshold=threshold, seed=seed, **keys)


def select(loss, gaps: torch.Tensor):
    """The weights and the beta of a micro-batch with these gaps."""
    logps = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)
    pairs = torch.arange(2 * len(gaps)).view(-1, 2)
    return loss.batch_statistics(logps, torch.zeros_like(logps), Examples(pairs, torch.ones(2 * len(gaps))))


def growing(steps: int, pairs: int = 16, growth: float = 0.2, seed: int = 0) -> list[torch.Tensor]:
    """Gaps of micro-batches of a run that learns: 0 at first, since policy and reference are equal, then `growth` a step."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, pairs, generator=draw, dtype=torch.float64)
    return [growth * step + 0.1 * step * noise[step] for step in range(steps)]


def test_every_step_is_that_of_the_authors_code_once_the_first_gap_is_0():
    """Theirs, in numbers: a mean and a deviation from 0, updated with 0.9 before they are used, beta from the drawn pairs."""
    loss, mean, deviation = beta_dpo(ratio=0.25), 0.0, 0.0
    for gaps in growing(30):
        selection = select(loss, gaps)
        kept = [gap for gap, weight in zip(gaps.tolist(), selection.weights.tolist(), strict=True) if weight]
        own = gaps.tolist()
        average = sum(own) / len(own)
        mean = 0.9 * mean + 0.1 * average
        deviation = 0.9 * deviation + 0.1 * math.sqrt(sum((gap - average) ** 2 for gap in own) / (len(own) - 1))
        assert len(kept) == 12
        assert (loss.statistics.mean, loss.statistics.deviation) == pytest.approx((mean, deviation), rel=1e-12)
        assert selection.beta.item() == pytest.approx(max(1e-3, BETA * (1 + A * (sum(kept) / 12 - mean))), rel=1e-12)


def test_a_running_mean_lags_a_gap_that_grows_by_nine_steps_so_that_beta_is_above_its_setting():
    # A mean with momentum m that includes the newest value lags a line of slope g by g m / (1 - m) = 9 g.
    loss, growth = beta_dpo(), 0.2
    for step in range(200):
        selection = select(loss, torch.full((4,), growth * step, dtype=torch.float64))
    assert growth * 199 - loss.statistics.mean == pytest.approx(9 * growth, rel=1e-6)
    assert selection.beta.item() == pytest.approx(BETA * (1 + A * 9 * growth), rel=1e-6)


def test_a_trend_keeps_beta_near_its_setting_with_a_filter_and_mislabeled_pairs():
    def mean_beta(threshold: str) -> float:
        loss, betas, draw = beta_dpo(0.25, threshold), [], torch.Generator().manual_seed(0)
        for step in range(100):
            # Four of sixteen labels are flipped. Their gaps fall, and are filtered, so that the kept ones are above the mean.
            gaps = 0.1 * step + 0.5 * torch.randn(16, generator=draw, dtype=torch.float64)
            gaps[:4] = -0.05 * step
            betas.append(select(loss, gaps).beta.item())
        return sum(betas[20:]) / 80

    # 0.0625 nats a step without a filter: 1 + 0.6 * 9 * 0.0625 = 1.34. The filter adds to it.
    assert mean_beta("running_mean") > 1.6 * BETA
    assert mean_beta("trend") == pytest.approx(BETA, rel=0.05)


def test_the_trend_is_twice_the_running_mean_minus_its_running_mean():
    statistics, kept, twice = GapStatistics(follows_trend=True), None, None
    assert statistics.threshold is None
    for value in (1.0, 4.0, 2.0):
        statistics.follow(torch.tensor(value))
        kept = running_mean(kept, value)
        twice = running_mean(twice, kept)
        assert statistics.threshold == pytest.approx(2 * kept - twice, rel=1e-12)
    # 1, then 0.9 + 0.4 = 1.3, then 1.17 + 0.2 = 1.37; of these 1, 1.03, 1.064.
    assert statistics.threshold == pytest.approx(2 * 1.37 - 1.064, rel=1e-12) and MOMENTUM == 0.9


@pytest.mark.parametrize("threshold", ["running_mean", "trend"])
def test_a_resumed_loss_continues_as_if_it_had_not_stopped(threshold):
    whole, gaps = beta_dpo(0.25, threshold), growing(12)
    for each in gaps[:6]:
        select(whole, each)
    state = whole.state_dict()
    assert find_mismatch(state, STATE_SHAPE["loss"], "loss") is None
    resumed = beta_dpo(0.25, threshold, seed=5)
    resumed.load_state_dict(state)
    for each in gaps[6:]:
        ours, theirs = select(whole, each), select(resumed, each)
        assert torch.equal(ours.weights, theirs.weights) and torch.equal(ours.beta, theirs.beta)


def test_an_evaluation_measures_from_the_same_threshold():
    loss = beta_dpo(threshold="trend")
    for gaps in growing(12):
        select(loss, gaps)
    output = loss(torch.tensor([5.0, 1.0]), torch.zeros(2), Examples(torch.tensor([[0, 1]]), torch.ones(2)))
    expected = BETA * (1 + A * (4.0 - loss.statistics.threshold))
    assert output.statistics["beta_DPO/beta_used"].item() == pytest.approx(max(1e-3, expected), rel=1e-6)


@pytest.mark.parametrize("threshold", ["running_mean", "trend"])
def test_the_copies_of_the_experiment_do_what_the_loss_does(threshold, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from science_parts.beta_dpo import BatchedBetaDPO

    loss, draw = beta_dpo(0.25, threshold), torch.Generator().manual_seed(0)
    one = lambda value: torch.tensor([[[value]]])  # noqa: E731
    copies = BatchedBetaDPO(torch.tensor([[BETA]], dtype=torch.float64), [0.25], one(A).double(), one(threshold == "trend"))
    for gaps in growing(20):
        uniform = torch.rand(len(gaps), generator=draw, dtype=torch.float64)
        weights, betas, _ = copies.select(gaps[None, None, None], -(-uniform.log()).log()[None])
        selection = select(loss, gaps)
        torch.testing.assert_close(weights[0, 0, 0], selection.weights)
        assert betas.item() == pytest.approx(selection.beta.item(), rel=1e-6)
