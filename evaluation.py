"""Held-out metrics and samples. Reads policy, reference and loss; changes none of them, nor any random stream.

Shapes: R responses and P pairs over the whole held-out set; E examples (P, or R for SFT).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
from torch import Tensor, nn

from batches import PackedBatch
from logprobs import response_logps
from losses import Loss, example_metrics
from ranks import ALONE, Ranks


@dataclass(frozen=True)
class HeldOut:
    """Every example's metrics, name → [E] float64 on the CPU, and the loss's own statistics."""

    examples: dict[str, Tensor]
    statistics: dict[str, float | Tensor]

    def means(self) -> dict[str, float]:
        """Name → mean over all examples, and the statistics under their own names."""
        means = {name: values.mean().item() for name, values in self.examples.items()}
        return means | {name: float(value) for name, value in self.statistics.items()}


@torch.no_grad()
def evaluate(
    policy: nn.Module,
    reference: Callable[[PackedBatch], Tensor] | None,
    loss: Loss,
    batches: Sequence[PackedBatch],
    ranks: Ranks = ALONE,
) -> HeldOut:
    """Score every held-out example once. The loss sees all of them together, so that nothing depends on how they are cut.

    `reference` gives the log-probs [R] of a batch; None where the loss needs none. `batches` are this rank's; every rank gets
    the result for all. Raises ValueError where there is no example.
    """
    if not batches:
        raise ValueError("no held-out example to evaluate")
    device = next(policy.parameters()).device
    scored = []
    for batch in batches:
        on_device = batch.to(device)
        logps = response_logps(policy, on_device).double().cpu()
        known = None if reference is None else reference(on_device).double().cpu()
        if not batch.is_filler:
            scored.append((logps, known, batch.pairs.cpu(), batch.response_lengths.cpu(), batch.places.cpu()))
    parts = [part for rank in ranks.gather(scored) for part in rank]
    starts = list(accumulate((len(lengths) for _, _, _, lengths, _ in parts), initial=0))
    order = torch.cat([places for *_, places in parts]).argsort()
    pairs = torch.cat([pairs + start for (_, _, pairs, _, _), start in zip(parts, starts, strict=False)])
    pick = slice(None) if loss.paired else order
    all_policy = torch.cat([logps for logps, *_ in parts])[pick]
    all_reference = None if reference is None else torch.cat([known for _, known, *_ in parts])
    lengths = torch.cat([lengths for _, _, _, lengths, _ in parts])[pick]
    pairs = pairs[order] if loss.paired else pairs
    output = loss(all_policy, all_reference, pairs, lengths)
    return HeldOut(example_metrics(output, all_policy, pairs, "eval"), output.statistics)


# ---- intervals ----------------------------------------------------------------------------------------------------------


def share_interval(values: Tensor) -> tuple[float, float]:
    """95% interval of a share, from values [E] between 0 and 1: Wilson's, which is not empty at 0 and at 1."""
    n, share, z = len(values), values.double().mean().item(), 1.959964
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def mean_interval(values: Tensor, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the mean of values [E]: percentiles of `draws` bootstrap means, the same at every call."""
    values = values.double().numpy()
    rows = numpy.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = numpy.percentile(values[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)


# ---- samples ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_answers(model: nn.Module, tokenizer, prompts: Sequence[list[int]], max_length: int, seed: int) -> list[str]:
    """One sampled answer to each prompt (token ids), as text up to the end of the response.

    `max_length` bounds prompt plus answer, in tokens. The same seed gives the same answers; the global random streams are
    left as they were.
    """
    if not prompts:
        return []
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(1, max_length - width),
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.train(training)
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
