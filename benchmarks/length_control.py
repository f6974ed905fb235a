"""How far the length-controlled win rate here is from AlpacaEval's own fit (Dubois et al. 2024), on simulated judges.

    python benchmarks/length_control.py [--worlds 20]

A judge prefers by quality, by length and by the instruction's difficulty, in proportions that are known; so is the win rate at
equal length. Each world has 805 instructions, as AlpacaEval. Three fits see the same outcomes:

    ridge        what scripts/benchmark.py computes
    L1           L1 penalties, whose strength 5-fold cross-validation chooses of ten, as AlpacaEval does
    L1, baseline the same with the baseline's verbose and concise outputs beside the model's, which have its quality: rows of
                 weight 0.1 without the term for the model. AlpacaEval has judged those of its own baseline for this

Minutes on one core.
"""

import argparse

import numpy
from scipy.special import expit

from preference_training.evaluation.benchmarks import length_control

INSTRUCTIONS = 805
# Penalties that cross-validation chooses from: scikit-learn's C.
STRENGTHS = numpy.logspace(-4, 4, 10)
FOLDS = 5
# Of a row of the baseline's verbose or concise outputs.
BASELINE_WEIGHT = 0.1
# In log-odds and in the logarithm of a length: how much better the model is, how much the judge likes length, how much longer
# the model writes.
WORLDS = {
    "equal, longer": (0.0, 2.0, 0.7),
    "worse, longer": (-1.0, 1.0, 0.3),
    "better": (0.5, 1.0, 0.0),
    "4 times as long": (0.0, 2.0, 1.5),
}
SPREAD_OF_LENGTHS, SPREAD_OF_DIFFERENCES, EDITED = 0.6, 0.5, 0.8


def fit_l1(features, targets, weights, strength: float, steps: int = 3000):
    """The coefficients that minimize sum |b_k| + strength * sum_n w_n cross_entropy_n, by accelerated proximal gradients."""
    curvature = strength * numpy.linalg.norm(features.T @ (features * weights[:, None]), 2) / 4
    found = ahead = numpy.zeros(features.shape[1])
    speed = 1.0
    for _ in range(steps):
        slope = strength * features.T @ (weights * (expit(features @ ahead) - targets))
        moved = ahead - slope / curvature
        moved = numpy.sign(moved) * numpy.maximum(abs(moved) - 1 / curvature, 0)
        next_speed = (1 + (1 + 4 * speed**2) ** 0.5) / 2
        ahead = moved + (speed - 1) / next_speed * (moved - found)
        if abs(moved - found).max() < 1e-9:
            break
        found, speed = moved, next_speed
    return moved


def chosen_l1(features, targets, weights):
    """The coefficients at the strength with the least cross entropy on the folds that were left out."""
    folds = numpy.arange(len(targets)) % FOLDS
    losses = []
    for strength in STRENGTHS:
        loss = 0.0
        for fold in range(FOLDS):
            kept, left = folds != fold, folds == fold
            scores = features[left] @ fit_l1(features[kept], targets[kept], weights[kept], strength, 300)
            loss += (weights[left] * (numpy.logaddexp(0, scores) - targets[left] * scores)).sum()
        losses.append(loss)
    return fit_l1(features, targets, weights, STRENGTHS[int(numpy.argmin(losses))])


def win_rates(seed: int, quality: float, likes_length: float, longer: float) -> list[float]:
    """In one world: the raw win rate, that at equal length, and those of the three fits; in percent."""
    draw = numpy.random.default_rng(seed)
    difficulty = draw.normal(size=INSTRUCTIONS)
    baseline = draw.lognormal(7, SPREAD_OF_LENGTHS, INSTRUCTIONS)

    def outcomes(quality: float, lengths) -> tuple:
        delta = numpy.round(lengths) - numpy.round(baseline)
        scaled = numpy.tanh(delta / delta.std(ddof=1))
        return scaled, (draw.random(len(delta)) < expit(quality + likes_length * scaled)).astype(float)

    lengths = baseline * draw.lognormal(longer, SPREAD_OF_DIFFERENCES, INSTRUCTIONS)
    scaled, won = outcomes(quality + 0.5 * difficulty, lengths)
    own = numpy.column_stack([scaled, difficulty, numpy.ones(INSTRUCTIONS)])
    edited = [outcomes(0.0, baseline * draw.lognormal(by, 0.2, INSTRUCTIONS)) for by in (EDITED, -EDITED)]
    rows = [own, *(numpy.column_stack([each, difficulty, numpy.zeros(INSTRUCTIONS)]) for each, _ in edited)]
    features, targets = numpy.vstack(rows), numpy.concatenate([won, *(each for _, each in edited)])
    weights = numpy.where(features[:, 2] == 1, 1.0, BASELINE_WEIGHT)
    fits = [chosen_l1(own, won, numpy.ones(INSTRUCTIONS)), chosen_l1(features, targets, weights)]
    ridge = length_control.length_controlled(won, numpy.round(lengths), numpy.round(baseline), difficulty).mean
    rates = [won.mean(), expit(quality + 0.5 * difficulty).mean(), ridge]
    return [100 * float(rate) for rate in (*rates, *(expit(b[1] * difficulty + b[2]).mean() for b in fits))]


def main() -> None:
    """Print the means over worlds, and how far the fits are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20, help="how often each kind of world is drawn")
    count = parser.parse_args().worlds
    # Its interval is not looked at.
    length_control.ROUNDS = 1
    print(
        f"{'judge and model':17}{'raw':>6}{'true':>7}{'ridge':>7}{'L1':>7}{'L1, baseline':>14}  apart from ridge, and at most"
    )
    for name, world in WORLDS.items():
        found = numpy.array([win_rates(seed, *world) for seed in range(count)])
        means, apart = found.mean(0), abs(found[:, 2:3] - found[:, 3:])
        shown = "".join(f"{mean:{width}.1f}" for mean, width in zip(means, (6, 7, 7, 7, 14), strict=True))
        pairs = zip(apart.mean(0), apart.max(0), strict=True)
        print(f"{name:17}{shown}  {'; '.join(f'{mean:.2f}, {most:.2f}' for mean, most in pairs)}", flush=True)


if __name__ == "__main__":
    main()
