"""Scores as Arena-Hard-Auto computes them (Li et al. 2024): a Bradley-Terry model of battles against a baseline.

A judge sees both orders of a pair, and each is a battle of its own. A verdict that one output is much better counts STRONG
times. The score of a model is its predicted win rate against the baseline. The interval is a bootstrap over prompts, whose
battles belong together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy
from scipy.special import expit

from preference_training.evaluation.benchmarks.logistic import fit_logistic
from preference_training.evaluation.intervals import TAIL
from preference_training.evaluation.judges import OUTCOMES

# How often a verdict of "much better" counts, as in Arena-Hard-Auto.
STRONG = 3
# What verdicts on the first output in a question say: the outcome for it, and how often it counts.
GRADES = {verdict: (outcome, STRONG if verdict.endswith(" much") else 1) for verdict, outcome in OUTCOMES.items()}
ROUNDS = 1000
# Keeps the coefficients of models that win or lose every battle finite.
RIDGE = 1e-3


class Battle(NamedTuple):
    """A verdict on two models by their numbers. outcome: 1 if the first won, 0 if the second did, 0.5 for a tie."""

    prompt: int
    first: int
    second: int
    outcome: float
    weight: float = 1.0


def bradley_terry(battles: Sequence[Battle], models: int, weights: numpy.ndarray | None = None) -> numpy.ndarray:
    """The strengths [models] of models by their numbers, in log-odds, model 0 (the baseline) at 0.

    P(i beats j) = logistic(s_i - s_j), Bradley and Terry (1952). weights: of each battle, besides its own.
    """
    numbers = numpy.array([(battle.first, battle.second) for battle in battles])
    features = numpy.zeros((len(battles), models))
    rows = numpy.arange(len(battles))
    features[rows, numbers[:, 0]] += 1
    features[rows, numbers[:, 1]] -= 1
    outcomes = numpy.array([battle.outcome for battle in battles])
    counted = numpy.array([battle.weight for battle in battles]) * (1 if weights is None else weights)
    return numpy.concatenate([[0.0], fit_logistic(features[:, 1:], outcomes, RIDGE, counted)])


def arena_scores(battles: Sequence[Battle], models: int, seed: int = 0) -> list[dict[str, float]]:
    """The predicted win rate of each model but the baseline (number 0) against it: mean, low, high."""
    prompts = numpy.unique([battle.prompt for battle in battles], return_inverse=True)[1]
    count = prompts.max() + 1
    means = expit(bradley_terry(battles, models))
    # How often each prompt was drawn is a weight of its battles.
    drawn = numpy.random.default_rng(seed).multinomial(count, numpy.full(count, 1 / count), ROUNDS)
    rounds = expit([bradley_terry(battles, models, each[prompts]) for each in drawn])
    low, high = numpy.quantile(rounds, [TAIL, 1 - TAIL], axis=0)
    return [{"mean": float(means[k]), "low": float(low[k]), "high": float(high[k])} for k in range(1, models)]
