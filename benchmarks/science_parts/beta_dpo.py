"""beta-DPO and other losses on labels of which a share is flipped: true win rate against KL divergence, exactly.

A policy is log-linear: its logits are the reference's plus features of a response times weights, so that what it learns of some
prompts holds for others. True rewards are linear in the same features, and a rest that no policy can express. Pairs are drawn
evenly or in mixed quality, labeled by Bradley and Terry's model, some flipped, and trained on for some epochs with Adam. All
methods, betas and seeds are copies that are trained at once; of one seed all have the same world, pairs, flips and order, and
are compared seed by seed. Shapes: M methods, B betas, S seeds, P pairs of a batch, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from preference_training.losses.beta_dpo import MIN_BETA, MIN_DEVIATION, MOMENTUM, number_kept
from preference_training.losses.formulas import dpo_loss, ipo_loss, robust_dpo_loss

FEATURES, RESPONSES, PROMPTS = 32, 24, 40
BETAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
SEEDS, PAIRS, EPOCHS, BATCH, RATE = 16, 768, 4, 16, 0.05
# The paper's filtering ratio and scaling factor, as its code has them: the factor is 1 / nats.
RATIO, SCALING = 0.2, 0.6
FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4)
MIXED = (0.0, 0.2)
# Of a data set that is small enough to learn its flips by heart, in as many steps.
FEW, FEW_FLIPPED = 96, (0.0, 0.2)
# Divergences from the reference at which win rates are compared. Unit: nats.
LEVELS = (0.1, 0.3, 1.0, 2.0)
# The setting of which the course of beta is kept, in means over ten steps.
FOLLOWED = 0.1


class Method(NamedTuple):
    """A loss. ratio, scaling, threshold: of beta-DPO; in_rewards: the scaling factor is that of gaps times beta."""

    name: str
    kind: str
    ratio: float = 0.0
    scaling: float = 0.0
    in_rewards: bool = False
    threshold: str = "mean"


METHODS = (
    Method("DPO", "dpo"),
    Method("conservative", "conservative"),
    Method("robust", "robust"),
    Method("IPO", "ipo"),
    Method("filtering", "beta", ratio=RATIO),
    Method("scaling", "beta", scaling=SCALING),
    Method("beta-DPO", "beta", RATIO, SCALING),
    Method("beta-DPO, a per reward", "beta", RATIO, SCALING, in_rewards=True),
    Method("scaling, trend", "beta", scaling=SCALING, threshold="trend"),
    Method("beta-DPO, trend", "beta", RATIO, SCALING, threshold="trend"),
)


@dataclass
class Worlds:
    """S worlds. features: [S, Q, K, D]; reference: [S, Q, K] log-probs; rewards: [S, Q, K]."""

    features: Tensor
    reference: Tensor
    rewards: Tensor

    def beaten(self) -> Tensor:
        """[S, Q, K], how likely a sample of the reference has a smaller true reward than each response; ties count half."""
        lower = (self.rewards[..., :, None] > self.rewards[..., None, :]).to(self.reference)
        chance = self.reference.exp()
        return (lower @ chance[..., None])[..., 0] + chance / 2

    def measure(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """KL from the reference in nats, and the win rate against it: [M, B, S] each, of policies' weights [M, B, S, D]."""
        shift = torch.einsum("mbsd,sqkd->mbsqk", weights, self.features)
        policy = (self.reference + shift).log_softmax(-1)
        chance = policy.exp()
        divergence = (chance * (policy - self.reference)).sum(-1).mean(-1)
        return divergence, (chance * self.beaten()).sum(-1).mean(-1)


def make_worlds(seeds: int, draw: torch.Generator) -> tuple[Worlds, Worlds]:
    """Worlds to train in, and the same with other prompts. Rewards have a standard deviation of 1.6, the rest of 0.5."""
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    weights = normal(seeds, FEATURES)
    weights *= 1.5 / weights.norm(dim=-1, keepdim=True)
    found = []
    for _ in range(2):
        features = normal(seeds, PROMPTS, RESPONSES, FEATURES)
        rest = 0.5 * normal(seeds, PROMPTS, RESPONSES)
        reference = normal(seeds, PROMPTS, RESPONSES).log_softmax(-1)
        found.append(Worlds(features, reference, torch.einsum("sqkd,sd->sqk", features, weights) + rest))
    return found[0], found[1]


def draw_pairs(worlds: Worlds, count: int, flipped: float, is_mixed: bool, draw: torch.Generator) -> Tensor:
    """[S, count, D], features of the preferred minus those of the other response.

    Of mixed pairs every second is the best and the worst of four responses, a high gap; the others are the two in the middle.
    """
    seeds = len(worlds.rewards)
    uniform = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    seed = torch.arange(seeds)[:, None, None]
    prompt = torch.randint(PROMPTS, (seeds, count, 1), generator=draw)
    four = uniform(seeds, count, RESPONSES).topk(4).indices
    if is_mixed:
        order = worlds.rewards[seed, prompt, four].argsort(-1)
        ends, middle = order[..., [0, 3]], order[..., [1, 2]]
        four = four.gather(-1, torch.where(torch.arange(count)[:, None] % 2 == 0, ends, middle))
    pair = four[..., :2]
    rewards = worlds.rewards[seed, prompt, pair]
    is_first = uniform(seeds, count) < (rewards[..., 0] - rewards[..., 1]).sigmoid()
    is_first ^= uniform(seeds, count) < flipped
    features = worlds.features[seed, prompt, pair]
    return (features[..., 0, :] - features[..., 1, :]) * torch.where(is_first, 1.0, -1.0)[..., None]


class BatchedBetaDPO:
    """beta-DPO of many copies at once: what `BetaDPOLoss` does for each, as `tests/losses/test_beta_dpo.py` shows.

    ratio: one number, scaling: [M, 1, 1] or [M, B, 1], is_trend: [M, 1, 1] bool.
    """

    def __init__(self, betas: Tensor, ratio: list[float], scaling: Tensor, is_trend: Tensor):
        self.betas, self.ratio, self.scaling, self.is_trend = betas, ratio, scaling, is_trend
        self.mean = self.deviation = self.kept = self.kept_second = torch.zeros(())
        self.is_new = True

    def select(self, gaps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [M, B, S, P] whose mean is 1, betas [M, B, S] and thresholds [M, B, S], from gaps and noise [S, P]."""
        before = 0.0 if self.is_new else MOMENTUM
        self.is_new = False
        self.mean = before * self.mean + (1 - before) * gaps.mean(-1)
        self.deviation = before * self.deviation + (1 - before) * gaps.std(-1)
        scores = -0.5 * ((gaps - self.mean[..., None]) / self.deviation.clamp(min=MIN_DEVIATION)[..., None]) ** 2 + noise
        weights = torch.zeros_like(gaps)
        for number, ratio in enumerate(self.ratio):
            count = number_kept(gaps.shape[-1], ratio)
            weights[number].scatter_(-1, scores[number].topk(count).indices, gaps.shape[-1] / count)
        kept = (weights * gaps).mean(-1)
        self.kept = before * self.kept + (1 - before) * kept
        self.kept_second = before * self.kept_second + (1 - before) * self.kept
        threshold = torch.where(self.is_trend, 2 * self.kept - self.kept_second, self.mean)
        return weights, (self.betas * (1 + self.scaling * (kept - threshold))).clamp(min=MIN_BETA), threshold


def losses_of(gaps: Tensor, betas: Tensor, flipped: float, beta_dpo: BatchedBetaDPO, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of all copies, from gaps [M, B, S, P], and beta-DPO's betas. betas: [B, 1]."""
    at, total, others = betas[..., None], gaps.new_zeros(()), 0
    none = torch.zeros_like(gaps[0])
    # Both need the share of flipped labels; they are given the true one.
    formulas = {
        "dpo": lambda own: dpo_loss(own, none, at),
        "conservative": lambda own: dpo_loss(own, none, at, flipped),
        "robust": lambda own: robust_dpo_loss(own, none, at, flipped),
        "ipo": lambda own: ipo_loss(own, none, at),
    }
    for number, method in enumerate(METHODS):
        if method.kind in formulas:
            total = total + formulas[method.kind](gaps[number]).mean(-1).sum()
            others += 1
    own = gaps[others:]
    weights, used, _ = beta_dpo.select(own.detach(), noise)
    total = total + (weights * dpo_loss(own, torch.zeros_like(own), used[..., None])).mean(-1).sum()
    return total, used


def train(pairs: Tensor, flipped: float, draw: torch.Generator, epochs: int) -> tuple[Tensor, Tensor, dict]:
    """Weights [M, B, S, D] after training; beta in force over loss.beta, averaged over steps, [M', B, S]; its course at one."""
    betas = torch.tensor(BETAS, dtype=torch.float64)[:, None]
    dynamic = [method for method in METHODS if method.kind == "beta"]
    scaling = torch.stack([method.scaling * (betas if method.in_rewards else torch.ones_like(betas)) for method in dynamic])
    is_trend = torch.tensor([method.threshold == "trend" for method in dynamic])[:, None, None]
    beta_dpo = BatchedBetaDPO(betas, [method.ratio for method in dynamic], scaling, is_trend)
    seeds, count, features = pairs.shape
    weights = torch.zeros(len(METHODS), len(BETAS), seeds, features, dtype=torch.float64, requires_grad=True)
    steps = epochs * count // BATCH
    optimizer = torch.optim.Adam([weights], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)
    )
    ratios, course, followed = torch.zeros(()), [], BETAS.index(FOLLOWED)
    for step in range(steps):
        if step % (count // BATCH) == 0:
            order = torch.randperm(count, generator=draw)
        place = order[step % (count // BATCH) * BATCH :][:BATCH]
        uniform = torch.rand(seeds, BATCH, generator=draw, dtype=torch.float64).clamp(min=1e-300)
        optimizer.zero_grad()
        gaps = torch.einsum("mbsd,spd->mbsp", weights, pairs[:, place])
        total, used = losses_of(gaps, betas, flipped, beta_dpo, -(-uniform.log()).log())
        total.backward()
        optimizer.step()
        schedule.step()
        ratios = ratios + used / betas / steps
        course.append(used[:, followed].mean(-1) / FOLLOWED)
    tens = torch.stack(course)[: steps // 10 * 10].view(-1, 10, len(dynamic)).mean(1)
    followed_by = {method.name: tens[:, at].tolist() for at, method in enumerate(dynamic)}
    return weights.detach(), ratios, followed_by


def condition(flipped: float, is_mixed: bool, pairs: int, epochs: int, seeds: int) -> dict:
    """Everything of one share of flipped labels: per method and beta KL and win rate of each seed, [M, B, S]."""
    draw = torch.Generator().manual_seed(round(1000 * flipped) + is_mixed)
    own, other = make_worlds(seeds, torch.Generator().manual_seed(7))
    trained, ratios, course = train(draw_pairs(own, pairs, flipped, is_mixed, draw), flipped, draw, epochs)
    divergence, wins = other.measure(trained)
    digits = lambda values: [[[round(x, 4) for x in row] for row in each] for each in values.tolist()]  # noqa: E731
    return {
        "flipped": flipped,
        "mixed": is_mixed,
        "pairs": pairs,
        "epochs": epochs,
        "kl": digits(divergence),
        "win_rate": digits(wins),
        "beta_in_force": {
            method.name: [float(f"{x:.4g}") for x in ratios.mean(-1)[at].tolist()]
            for at, method in enumerate(m for m in METHODS if m.kind == "beta")
        },
        "course": {name: [float(f"{x:.4g}") for x in row] for name, row in course.items()},
    }


def experiment(short: bool = False) -> dict:
    """All shares of flipped labels, evenly drawn, mixed and few pairs. short: one of them, small."""
    kinds = [(share, False, PAIRS, EPOCHS) for share in FLIPPED] + [(share, True, PAIRS, EPOCHS) for share in MIXED]
    kinds += [(share, False, FEW, EPOCHS * PAIRS // FEW) for share in FEW_FLIPPED]
    kinds, seeds = ([(0.2, False, 256, 4)], 6) if short else (kinds, SEEDS)
    found = {"methods": [method.name for method in METHODS], "betas": list(BETAS), "seeds": seeds, "followed": FOLLOWED}
    return found | {"conditions": [condition(*kind, seeds) for kind in kinds]}


# ---- comparing --------------------------------------------------------------------------------------------------------------


def at_level(divergence: list[float], wins: list[float], level: float) -> float:
    """The win rate at a KL divergence, interpolated between the betas of one seed; NaN beyond the farthest.

    Near the reference win rates grow with the root of the divergence, so that lines are drawn over that.
    """
    import numpy

    places = sorted(zip([0.0, *divergence], [0.5, *wins], strict=True))
    x, y = zip(*places, strict=True)
    return float(numpy.interp(level**0.5, numpy.sqrt(x), y)) if level <= x[-1] else float("nan")


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95% interval by Student's t; NaN with fewer than four finite values."""
    import numpy
    from scipy.stats import t

    values = numpy.array([value for value in differences if value == value])
    if len(values) < 4:
        return (float("nan"),) * 3
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def advantage(found: dict, share: dict, method: str, level: float) -> tuple[float, float, float]:
    """A method's win rate minus DPO's at the same KL divergence, seed by seed: mean and 95% interval."""

    def of(name: str) -> list[float]:
        at = found["methods"].index(name)
        kl, wins = share["kl"][at], share["win_rate"][at]
        return [at_level([row[s] for row in kl], [row[s] for row in wins], level) for s in range(found["seeds"])]

    return interval([a - b for a, b in zip(of(method), of("DPO"), strict=True)])
