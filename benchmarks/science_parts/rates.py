"""What of learning rates, warm-up and schedules a small world can show: DPO on 288 pairs, one epoch of batches of 8.

These are 36 steps, a short run of docs/defaults.md. Worlds, policies and pairs are those of `beta_dpo.py`. Absolute learning
rates mean nothing here, since they depend on what is trained; optimizers, betas and schedules are compared at many. Shapes:
R learning rates, B betas, S seeds, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preference_training.configuration.validation import configured
from preference_training.losses.formulas import dpo_loss
from preference_training.training.optimizers.schedules import schedule
from science_parts.beta_dpo import draw_pairs, make_worlds

BETAS = (0.05, 0.1, 0.2, 0.4, 0.8)
SEEDS, PAIRS, BATCH, FLIPPED = 16, 288, 8, 0.1
# Learning rates in powers of two: SGD's steps are of the size of a gradient, the others' of the learning rate.
OPTIMIZERS = {
    "AdamW": (torch.optim.Adam, [2.0**power for power in range(-10, 2)]),
    "RMSprop": (torch.optim.RMSprop, [2.0**power for power in range(-10, 2)]),
    "SGD": (torch.optim.SGD, [2.0**power for power in range(-4, 8)]),
}
SCHEDULES = {
    "pretrained: a tenth of the steps, then linear to 0": ("warmup_share=0.1", "lr_schedule=linear", "final_lr_share=0"),
    "a tenth of the steps, then constant": ("warmup_share=0.1", "lr_schedule=constant"),
    "original: 150 steps, then constant": ("warmup_share=null", "warmup_steps=150", "lr_schedule=constant"),
}
# At which beta win rates are kept of each seed.
KEPT = 0.1


def train(pairs: Tensor, optimizer: str, overrides: tuple[str, ...]) -> Tensor:
    """Weights [R, B, S, D] after one epoch of DPO over pairs [S, P, D]."""
    make, rates = OPTIMIZERS[optimizer]
    seeds, count, features = pairs.shape
    betas = torch.tensor(BETAS, dtype=torch.float64)[:, None, None]
    weights = [torch.zeros(len(BETAS), seeds, features, dtype=torch.float64, requires_grad=True) for _ in rates]
    stepper = make([{"params": [own], "lr": rate} for own, rate in zip(weights, rates, strict=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, schedule(configured(*overrides), count // BATCH))
    for step in range(count // BATCH):
        stepper.zero_grad()
        gaps = torch.einsum("rbsd,spd->rbsp", torch.stack(weights), pairs[:, step * BATCH :][:, :BATCH])
        dpo_loss(gaps, torch.zeros_like(gaps), betas).mean(-1).sum().backward()
        stepper.step()
        scheduler.step()
    return torch.stack([own.detach() for own in weights])


def experiment(short: bool = False) -> dict:
    """KL and win rate of every optimizer, schedule, learning rate and beta. short: of AdamW and SGD, few seeds."""
    seeds, optimizers = (4, ("AdamW", "SGD")) if short else (SEEDS, tuple(OPTIMIZERS))
    own, other = make_worlds(seeds, torch.Generator().manual_seed(11))
    pairs = draw_pairs(own, PAIRS, FLIPPED, False, torch.Generator().manual_seed(12))
    runs = []
    for optimizer in optimizers:
        for name, overrides in SCHEDULES.items():
            divergence, wins = other.measure(train(pairs, optimizer, overrides))
            runs.append(
                {
                    "optimizer": optimizer,
                    "schedule": name,
                    "rates": OPTIMIZERS[optimizer][1],
                    "kl": divergence.mean(-1).tolist(),
                    "win_rate": wins.mean(-1).tolist(),
                    "win_rate_by_seed": [[round(x, 4) for x in row] for row in wins[:, BETAS.index(KEPT)].tolist()],
                }
            )
    return {"betas": list(BETAS), "seeds": seeds, "kept": KEPT, "runs": runs}


def run_of(found: dict, optimizer: str, schedule_name: str) -> dict:
    """The run of an optimizer under a schedule, by the beginning of its name."""
    return next(r for r in found["runs"] if r["optimizer"] == optimizer and r["schedule"].startswith(schedule_name))
