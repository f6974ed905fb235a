"""A world that is small enough to enumerate: some prompts, some responses to each, and their true rewards.

A policy is a softmax over the responses of each prompt, so that win rates and KL divergences are sums, not samples, and the
optimum of a loss is known in closed form. Shapes: S independent copies (seeds, settings), Q prompts, K responses. float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from preference_training.losses.base import Examples, Loss


@dataclass(frozen=True)
class World:
    """reference: [Q, K], log-probs of the reference policy. rewards: [Q, K], the true rewards, in nats of Bradley-Terry."""

    reference: Tensor
    rewards: Tensor

    @property
    def preferences(self) -> Tensor:
        """[Q, K, K], how likely a labeler prefers the first response to the second: Bradley and Terry's model."""
        return (self.rewards[:, :, None] - self.rewards[:, None, :]).sigmoid()

    def tilted(self, scores: Tensor) -> Tensor:
        """[Q, K], log of pi_ref exp(scores) / Z: with rewards / beta the optimum of Rafailov et al. 2023, equation 4."""
        return (self.reference + scores).log_softmax(-1)


def make_world(prompts: int, responses: int, seed: int, reference_scale: float = 1.0, reward_scale: float = 1.0) -> World:
    """Logits of the reference and rewards are normal, with these standard deviations."""
    draw = torch.Generator().manual_seed(seed)
    logits, rewards = (torch.randn(prompts, responses, generator=draw, dtype=torch.float64) for _ in range(2))
    return World((reference_scale * logits).log_softmax(-1), reward_scale * rewards)


def kl(policy: Tensor, other: Tensor) -> Tensor:
    """KL(policy || other) in nats, of log-probs [..., Q, K], averaged over prompts: [...]."""
    return (policy.exp() * (policy - other)).sum(-1).mean(-1)


def all_pairs(prompts: int, responses: int) -> Tensor:
    """[E, 2], every ordered pair of different responses of a prompt, as numbers of responses of the world."""
    first, second = (~torch.eye(responses, dtype=torch.bool)).nonzero().unbind(1)
    pairs = torch.stack([first, second], dim=1)
    return (pairs + responses * torch.arange(prompts)[:, None, None]).reshape(-1, 2)


def flipped(preferences: Tensor, share: float) -> Tensor:
    """How likely a label says so, where a share of the labels is flipped: q = e + (1 - 2 e) p."""
    return share + (1 - 2 * share) * preferences


def expected_loss(world: World, loss: Loss, preferences: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss over all labels, each as likely as it is: a function of a policy's log-probs [Q, K]. No sampling, no noise.

    preferences: [Q, K, K], how likely the first is labeled as preferred.
    """
    pairs = all_pairs(*world.rewards.shape)
    count = world.rewards.shape[1]
    likely = preferences[pairs[:, 0] // count, pairs[:, 0] % count, pairs[:, 1] % count]
    examples = Examples(pairs, torch.ones(world.rewards.numel(), dtype=torch.float64))
    reference = world.reference.flatten()
    return lambda policy: 2 * (likely * loss(policy.flatten(), reference, examples).losses).mean()


def descend(
    objective: Callable[[Tensor], Tensor], world: World, rate: float, steps: int, watch: Callable[[Tensor], float]
) -> tuple[Tensor, list[float]]:
    """Gradient descent from the reference: the policy's log-probs [Q, K], and what `watch` says before each and at the end.

    rate: relative to the step that is exact where every pair has curvature 1/4 in its margin, as DPO's has at beta 1.
    """
    prompts, responses = world.rewards.shape
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=rate * 2 * prompts * (responses - 1))
    seen = []
    for _ in range(steps):
        policy = logits.log_softmax(-1)
        seen.append(watch(policy.detach()))
        optimizer.zero_grad()
        objective(policy).backward()
        optimizer.step()
    policy = logits.detach().log_softmax(-1)
    return policy, [*seen, watch(policy)]
