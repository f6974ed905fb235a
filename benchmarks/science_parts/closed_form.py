"""What DPO, IPO, conservative and robust DPO converge to, beside what the papers' algebra says.

Labels follow Bradley and Terry's model, a share e of them flipped: a label says "i before j" with probability
q = e + (1 - 2 e) p, p = sigmoid(r_i - r_j). Every label counts as often as it is likely, so that nothing is sampled. A loss
that is A(h) where the label is right and A(-h) where it is wrong, h being the margin in nats, has its optimum where
q A'(h) = (1 - q) A'(-h). With two responses to a prompt every margin is free:

    DPO             h = logit(q) / beta                                 without flips (r_i - r_j) / beta
    conservative    h = logit(s + (1 - 2 s) q) / beta                   it shrinks what flips have shrunk once more
    robust          h = logit((q - s) / (1 - 2 s)) / beta               with s = e: (r_i - r_j) / beta
    IPO             h = (2 q - 1) / (2 beta) = (1 - 2 e) (p - 1/2) / beta

With more responses margins are differences of one number per response. DPO without flips, and robust DPO with s = e, still
reach pi_ref exp(r / beta) / Z, since p is of that form. IPO projects its squares on it: pi_ref exp((1 - 2 e) w / beta) / Z, w
being the probability of being preferred to a response drawn evenly (Azar et al. 2023, with their mu uniform).
"""

from __future__ import annotations

from torch import Tensor

from preference_training.losses.registry import build_loss
from science_parts.world import World, descend, expected_loss, flipped, kl, make_world

PROMPTS, RESPONSES = 4, 32
BETAS = (0.05, 0.1, 0.5, 1.0)
# Of the labels in part two; beta there.
FLIPPED, BETA = 0.2, 0.5
STEPS = 80


def converge(world: World, name: str, labels: Tensor, optimum: Tensor, steps: int, **keys: float) -> dict:
    """Descend on a loss over labels [Q, K, K]: the divergence from the optimum [Q, K] before each step and at the end."""
    # IPO's curvature does not depend on beta.
    rate = 1 / 8 if name == "ipo" else 1 / keys["beta"] ** 2
    policy, divergence = descend(
        expected_loss(world, build_loss(name, **keys), labels), world, rate, steps, lambda p: kl(p, optimum).item()
    )
    return {
        "loss": name,
        **keys,
        "kl_from_optimum": divergence,
        "kl_from_reference": kl(policy, world.reference).item(),
        "expected_reward": (policy.exp() * world.rewards).sum(-1).mean().item(),
    }


def even_win_rates(preferences: Tensor) -> Tensor:
    """[Q, K], the probability of being preferred to an evenly drawn response, itself included."""
    return preferences.mean(-1)


def many_responses(steps: int = STEPS, betas: tuple[float, ...] = BETAS, shape: tuple[int, int] = (PROMPTS, RESPONSES)) -> list:
    """Part one: of 32 responses each, every loss that has a closed form, over betas, with and without flipped labels."""
    world = make_world(*shape, seed=0)
    clean, noisy = world.preferences, flipped(world.preferences, FLIPPED)
    found = []
    for beta in betas:
        tilted = world.tilted(world.rewards / beta)
        found.append({"flipped": 0.0} | converge(world, "dpo", clean, tilted, steps, beta=beta))
        of_wins = world.tilted(even_win_rates(noisy) / beta)
        found.append({"flipped": FLIPPED} | converge(world, "ipo", noisy, of_wins, steps, beta=beta))
        found.append({"flipped": FLIPPED} | converge(world, "robust", noisy, tilted, steps, beta=beta, label_smoothing=FLIPPED))
        found.append({"flipped": FLIPPED} | converge(world, "dpo", noisy, tilted, steps, beta=beta))
        found.append({"flipped": FLIPPED} | converge(world, "dpo", noisy, tilted, steps, beta=beta, label_smoothing=FLIPPED))
    return found


def expected_margins(name: str, probability: Tensor, beta: float, smoothing: float, share: float) -> Tensor:
    """The table above: the margin in nats at which a loss has its optimum, of p, with a share of the labels flipped."""
    labels = flipped(probability, share)
    if name == "ipo":
        return (2 * labels - 1) / (2 * beta)
    if name == "robust":
        return ((labels - smoothing) / (1 - 2 * smoothing)).logit() / beta
    return flipped(labels, smoothing).logit() / beta


KINDS = {
    "DPO": ("dpo", {}),
    "conservative": ("dpo", {"label_smoothing": FLIPPED}),
    "robust": ("robust", {"label_smoothing": FLIPPED}),
    "IPO": ("ipo", {}),
}


def two_responses(prompts: int = 48, steps: int = 6 * STEPS) -> dict:
    """Part two: of two responses each, the margin that every loss reaches, beside the table's; a fifth of labels flipped."""
    world = make_world(prompts, 2, seed=1, reward_scale=1.5)
    noisy = flipped(world.preferences, FLIPPED)
    probability = world.preferences[:, 0, 1]
    found: dict = {"reward_difference": (world.rewards[:, 0] - world.rewards[:, 1]).tolist(), "beta": BETA, "flipped": FLIPPED}
    for title, (name, keys) in KINDS.items():
        objective = expected_loss(world, build_loss(name, beta=BETA, **keys), noisy)
        policy, _ = descend(objective, world, 1 / 8 if name == "ipo" else 1 / BETA**2, steps, lambda _: 0.0)
        margins = (policy - world.reference) @ policy.new_tensor([1.0, -1.0])
        expected = expected_margins(name, probability, BETA, keys.get("label_smoothing", 0.0), FLIPPED)
        found[title] = {"margin": margins.tolist(), "expected": expected.tolist()}
    return found


def certain_labels(steps: int = 10 * STEPS, every: int = 8) -> dict:
    """Part three: what happens where one of two responses is always preferred, and where robust DPO expects too many flips.

    The margin in nats of one pair over steps. DPO's optimum is infinite; so is robust DPO's, and its loss has no lower bound.
    """
    world = make_world(1, 2, seed=2)
    sure = world.preferences.new_tensor([[[0.5, 1.0], [0.0, 0.5]]])
    found: dict = {"beta": BETA, "steps": list(range(0, steps + 1, every))}
    for title, (name, keys) in KINDS.items():
        objective = expected_loss(world, build_loss(name, beta=BETA, **keys), sure)
        margin = lambda p: (p - world.reference)[0].diff().neg().item()  # noqa: E731
        _, margins = descend(objective, world, 1 / 8 if name == "ipo" else 1 / BETA**2, steps, margin)
        found[title] = margins[::every]
    return found


def experiment(short: bool = False) -> dict:
    """All three parts. short: seconds in place of a minute."""
    if short:
        return {
            "many": many_responses(60, (0.5,), (2, 8)),
            "two": two_responses(6, 200),
            "certain": certain_labels(64),
        }
    return {"many": many_responses(), "two": two_responses(), "certain": certain_labels()}
