"""The value of a loss where policy and reference agree: what it starts at, before a run has learned anything."""

from __future__ import annotations

from preference_training.losses.base import Examples, Loss, TokenLogps

# Lengths of made-up responses, and a tolerance for float64.
LENGTHS = (3, 5, 2, 7, 4, 1)
ROUNDING = 1e-9


def loss_at_zero_margin(loss: Loss) -> float | None:
    """The loss of every example while policy and reference give the same log-probs: ln 2 of DPO, 1 / (2 beta)^2 of IPO.

    Found by computing it on made-up responses. None where it differs between examples, as where a loss has a term of
    likelihood, or where there is no reference.
    """
    import torch

    if not loss.needs_reference or loss.model_head == "value":
        return None
    draws = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    values = -torch.rand(int(lengths.sum()), generator=draws, dtype=torch.float64)
    responses = torch.arange(len(lengths)).repeat_interleave(lengths)
    tokens = TokenLogps(values, responses, collision=2 * values)
    logps = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, responses, values)
    # Pairs, or a labeled response with a mismatched one; and a ranking of three.
    members = [[0, 1, -1], [2, 3, -1], [4, 5, 0]] if loss.examples == "rankings" else [[0, 1], [2, 3], [4, 5]]
    examples = Examples(
        torch.tensor(members),
        lengths,
        mean_length=float(lengths.double().mean()),
        margins=torch.tensor([0.5, 1.0, 2.0]),
        labels=torch.tensor([True, False, True]),
        policy_tokens=tokens,
        reference_tokens=tokens,
    )
    with torch.no_grad():
        losses = loss(logps, logps.clone(), examples).losses
    low, high = losses.min().item(), losses.max().item()
    return high if high - low <= ROUNDING * max(1.0, abs(high)) else None
