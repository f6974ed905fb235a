"""benchmarks/science.py in seconds: what losses converge to, and beta-DPO's copies beside the loss itself."""

import math

import pytest
import torch

from tests.support.files import ROOT


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def closed_form(benchmarks):
    from science_parts import closed_form

    return closed_form


def test_dpo_and_robust_dpo_reach_the_reference_tilted_by_rewards_and_biased_losses_do_not(closed_form):
    world = closed_form.make_world(2, 8, seed=3)
    # pi_ref exp(r / beta) / Z at beta 1/2.
    tilted = world.reference.exp() * (2 * world.rewards).exp()
    tilted /= tilted.sum(-1, keepdim=True)
    flipped = 0.2 + 0.6 * world.preferences
    at = lambda name, labels, **keys: closed_form.converge(world, name, labels, tilted.log(), 60, beta=0.5, **keys)  # noqa: E731
    for run in (at("dpo", world.preferences), at("robust", flipped, label_smoothing=0.2)):
        assert abs(run["kl_from_optimum"][-1]) < 1e-10 < 0.1 < run["kl_from_optimum"][0], run["loss"]
    # Flips pull DPO back to the reference, smoothing pulls it farther back.
    biased, twice = at("dpo", flipped), at("dpo", flipped, label_smoothing=0.2)
    assert 0.01 < biased["kl_from_optimum"][-1] < twice["kl_from_optimum"][-1]
    assert twice["kl_from_reference"] < biased["kl_from_reference"]


def test_ipo_reaches_the_reference_tilted_by_win_rates_and_flips_only_raise_its_beta(closed_form):
    world = closed_form.make_world(2, 8, seed=3)
    tilted = (world.reference + 0.6 * world.preferences.mean(-1) / 0.5).log_softmax(-1)
    run = closed_form.converge(world, "ipo", 0.2 + 0.6 * world.preferences, tilted, 20, beta=0.5)
    assert abs(run["kl_from_optimum"][-1]) < 1e-14
    without = closed_form.converge(world, "ipo", world.preferences, tilted, 20, beta=0.5 / 0.6)
    assert abs(without["kl_from_optimum"][-1]) < 1e-14


def test_of_two_responses_every_margin_is_what_the_algebra_says(closed_form):
    found = closed_form.two_responses(prompts=6, steps=300)
    # The surest labels need thousands of steps under robust DPO.
    near = [at for at, difference in enumerate(found["reward_difference"]) if abs(difference) < 3]
    assert len(near) >= 3
    for title in closed_form.KINDS:
        margin, expected = found[title]["margin"], found[title]["expected"]
        assert [margin[at] for at in near] == pytest.approx([expected[at] for at in near], abs=1e-6), title
    # With a reward difference of ln 3 p is 3/4, and a fifth of the labels flipped makes it 0.2 + 0.6 * 3/4 = 0.65.
    expected = {"dpo": math.log(0.65 / 0.35), "robust": math.log(3), "ipo": 0.15}
    for name, margin in expected.items():
        found = closed_form.expected_margins(name, torch.tensor(0.75, dtype=torch.float64), 1.0, 0.2 * (name == "robust"), 0.2)
        assert found.item() == pytest.approx(margin, rel=1e-12)


def test_a_pair_that_is_always_labeled_alike_has_a_limit_under_ipo_and_smoothing_only(closed_form):
    found = closed_form.certain_labels(steps=64, every=32)
    beta, smoothing = closed_form.BETA, closed_form.FLIPPED
    assert found["IPO"][-1] == pytest.approx(1 / (2 * beta), rel=1e-9)
    assert found["conservative"][-1] == pytest.approx(math.log((1 - smoothing) / smoothing) / beta, rel=1e-6)
    # DPO slows down: e to the margin times beta grows evenly. Robust DPO does not: its gradient has a lower bound.
    assert found["DPO"][2] - found["DPO"][1] < 0.2 * found["DPO"][1]
    assert found["robust"][2] - found["robust"][1] > 0.9 * (found["robust"][1] - found["robust"][0])


def test_beta_dpo_goes_farther_than_dpo_at_one_beta_and_is_not_better_at_one_distance(benchmarks):
    from science_parts import beta_dpo

    found = beta_dpo.experiment(short=True)
    [share] = found["conditions"]
    mean = lambda name, key: [sum(row) / len(row) for row in share[key][found["methods"].index(name)]]  # noqa: E731
    places = [found["betas"].index(beta) for beta in (0.4, 0.8, 1.6)]
    assert all(mean("beta-DPO", "kl")[at] > 1.1 * mean("DPO", "kl")[at] for at in places)
    # Scaling moves along DPO's frontier; filtering needs the sixteen seeds of the whole experiment to be judged.
    for name in ("scaling", "scaling, trend"):
        difference, _, _ = beta_dpo.advantage(found, share, name, 0.3)
        assert abs(difference) < 0.003, name
    # A gap that grows leaves the running mean behind.
    assert share["beta_in_force"]["scaling"][1] > 1.08 and abs(share["beta_in_force"]["scaling, trend"][1] - 1) < 0.03


def test_beta_sets_how_far_sgd_goes_in_a_few_steps_but_not_adamw_and_a_long_warm_up_costs_a_factor_of_eight(benchmarks):
    from science_parts import rates

    found = rates.experiment(short=True)
    small, (first, *_, last) = 2, found["betas"]
    adamw = rates.run_of(found, "AdamW", "pretrained")["kl"][small]
    assert adamw[0] / adamw[-1] == pytest.approx(1, abs=0.1)
    # SGD's steps are proportional to beta, and KL to their square, until the policy has moved.
    sgd = rates.run_of(found, "SGD", "pretrained")["kl"][0]
    assert sgd[1] / sgd[0] == pytest.approx(4, rel=0.1) and last / first == 16
    # Of 36 steps with a tenth for warm-up the mean rate is 0.94; in 36 of 150 steps of warm-up it is 0.123.
    short, long = (rates.run_of(found, "AdamW", name)["kl"] for name in ("a tenth", "original"))
    assert long[small + 3][0] == pytest.approx(short[small][0], rel=0.15)


def test_win_rates_are_compared_at_one_distance_seed_by_seed(benchmarks):
    from science_parts.beta_dpo import at_level, interval

    # Over the root of the divergence 0.25 is halfway between 0 and 1.
    assert at_level([1.0], [0.7], 0.25) == pytest.approx(0.6)
    assert math.isnan(at_level([1.0], [0.7], 1.5))
    # Of 1, 2, 3, 4: mean 2.5, deviation 1.291, t of 3 degrees of freedom 3.182: 3.182 * 1.291 / 2 = 2.054.
    assert interval([1.0, 2.0, 3.0, 4.0, math.nan]) == pytest.approx((2.5, 2.5 - 2.054, 2.5 + 2.054), abs=1e-3)
    assert math.isnan(interval([1.0])[0])


def test_pictures_are_those_of_the_newest_raw_numbers(benchmarks):
    import science

    for name in science.EXPERIMENTS:
        for file, drawn in science.pictures(name, science.newest(name)).items():
            assert (ROOT / "docs" / file).read_text() == drawn, f"python benchmarks/science.py --draw; {file}"


def test_an_experiment_leaves_its_raw_numbers_and_what_they_were_computed_on(benchmarks, tmp_path, monkeypatch):
    import science
    from science_parts import closed_form

    monkeypatch.setattr(closed_form, "experiment", lambda short: {"short": short, "kl": [1 / 3]})
    path = science.run("closed_form", tmp_path, short=True)
    found = science.newest("closed_form", tmp_path)
    assert path.parent == tmp_path and found["short"] is True and found["kl"] == [0.3333333]
    assert found["command"] == "benchmarks/science.py closed_form" and found["versions"]["torch"]
