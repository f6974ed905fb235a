"""Compare loss=reward with TRL's own code, on random rewards in float64: losses and gradients.

    python benchmarks/reward_agreement.py                                          # a table; exit status 1 if they disagree
    python benchmarks/reward_agreement.py --golden tests/golden/trl_reward.json    # also write TRL's numbers, for the tests

TRL's `RewardTrainer.compute_loss` runs unchanged, on a stand-in for the trainer and one for the model, which returns the drawn
rewards.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from torch import Tensor
from trl import RewardTrainer

from preference_training.losses.base import Examples
from preference_training.losses.registry import build_loss

NUM_PAIRS = 6
TOLERANCE = 1e-12
COMMAND = "python benchmarks/reward_agreement.py --golden tests/golden/trl_reward.json"


def theirs(rewards: Tensor, margins: Tensor | None, center_coefficient: float) -> tuple[float, Tensor]:
    """TRL's mean loss of pairs, from rewards [2, P], and its gradient."""
    rewards = rewards.clone().requires_grad_()
    gathers = SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center_coefficient or None),
        accelerator=gathers,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(1)} | ({} if margins is None else {"margin": margins})
    model = lambda **_: SimpleNamespace(logits=rewards.flatten()[:, None])  # noqa: E731
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    return loss.item(), torch.autograd.grad(loss, rewards)[0]


def ours(rewards: Tensor, margins: Tensor | None, center_coefficient: float) -> tuple[float, Tensor]:
    """The same of this project's loss."""
    values = rewards.flatten().requires_grad_()
    members = torch.arange(2 * NUM_PAIRS).view(2, NUM_PAIRS).T
    examples = Examples(members, torch.ones(2 * NUM_PAIRS), margins=margins)
    loss = build_loss("reward", center_coefficient=center_coefficient)(values, None, examples).losses.mean()
    return loss.item(), torch.autograd.grad(loss, values)[0].view(2, NUM_PAIRS)


def main() -> None:
    """Compare, print a table, and write the golden file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rewards = 3 * torch.randn(2, NUM_PAIRS, generator=generator, dtype=torch.float64)
    drawn = torch.rand(NUM_PAIRS, generator=generator, dtype=torch.float64)
    cases, worst = [], 0.0
    for margins in (None, drawn):
        for center_coefficient in (0.0, 0.01):
            (loss, gradient), (expected, expected_gradient) = (
                side(rewards.clone(), margins, center_coefficient) for side in (ours, theirs)
            )
            difference = max(abs(loss - expected), (gradient - expected_gradient).abs().max().item())
            worst = max(worst, difference)
            print(f"margins {margins is not None!s:6} center {center_coefficient:<5} largest difference {difference:.1e}")
            cases.append({
                "margins": None if margins is None else margins.tolist(),
                "center_coefficient": center_coefficient,
                "loss": expected,
                "gradient": expected_gradient.tolist(),
            })  # fmt: skip
    if arguments.golden:
        golden = {"made_by": f"TRL {trl.__version__}: {COMMAND}", "rewards": rewards.tolist(), "cases": cases}
        arguments.golden.write_text(json.dumps(golden, indent=1) + "\n")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
