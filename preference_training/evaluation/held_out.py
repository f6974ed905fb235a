"""Held-out metrics and the KL divergence to the reference. Leaves policy, reference, loss and random streams unchanged.

Shapes: R responses and E examples over the whole held-out set.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import isfinite, isnan

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from preference_training.batching.micro_batches import split_into_batches
from preference_training.batching.packing import PackedBatch, TokenBudget, iterate_examples
from preference_training.core.metric_names import EVAL, EVAL_LOSS
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.evaluation.intervals import estimate, mean_interval
from preference_training.losses.base import MISSING_NUMBERS, Examples, Loss, TokenLogps, example_metrics, with_margins
from preference_training.modeling.logprobs import policy_scores, reference_logps
from preference_training.modeling.state import compute_device


@dataclass(frozen=True)
class HeldOut:
    """The metrics of every example, name → [E] float64 on the CPU, NaN where it has none, and the statistics of the loss.

    sources: [E], the names of the examples' prompts. least: the least value that a metric may have, of those that have one.
    """

    examples: dict[str, Tensor]
    statistics: dict[str, float | Tensor]
    sources: Sequence[str]
    least: Mapping[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """The mean of each metric over the examples that have it, and the statistics, by name."""
        means = {
            name: (values.mean() if name == EVAL_LOSS else values.nanmean()).item() for name, values in self.examples.items()
        }
        # No metric rather than NaN where no example has it: KTO's rewards of a label that the data lacks.
        means = {name: value for name, value in means.items() if name == EVAL_LOSS or not isnan(value)}
        return with_margins(means, EVAL) | {name: float(value) for name, value in self.statistics.items()}

    def lines(self) -> str:
        """The name of each example's prompt and its metrics as JSON lines, without those that it does not have."""
        columns = {name: values.tolist() for name, values in self.examples.items()}
        return "".join(
            json.dumps({"prompt": source} | {name: values[k] for name, values in columns.items() if isfinite(values[k])}) + "\n"
            for k, source in enumerate(self.sources)
        )


@dataclass(frozen=True)
class Scores:
    """Log-probs of the responses of some batches over all ranks, float64 on the CPU, and the examples they belong to.

    policy, reference: [R]; reference may be None. examples: E, in their order; sources: [E], the names of their prompts.
    """

    policy: Tensor
    reference: Tensor | None
    examples: Examples
    sources: Sequence[str]


def evaluate_held_out(
    policy: nn.Module,
    reference: Callable[[PackedBatch], Tensor] | None,
    loss: Loss,
    batches: Iterable[PackedBatch],
    ranks: Ranks = SINGLE_PROCESS,
    on_batch: Callable[[PackedBatch, Tensor, Tensor], None] | None = None,
) -> HeldOut:
    """Score every held-out example once. The loss sees all of them together, so that the batches do not affect the result.

    reference: returns the log-probs [R] of a batch; None for losses without one. batches: this rank's; every rank gets the
    result for all. on_batch: called with each batch and the log-probs of both models. Raises ValueError without any example.
    """
    scores = score_responses(policy, reference, batches, ranks, on_batch, loss)
    examples = scores.examples
    output = loss(scores.policy, scores.reference, examples).weighted(examples.weights)
    metrics = example_metrics(loss, output, scores.policy, examples, EVAL)
    return HeldOut(metrics, output.statistics, scores.sources, {} if loss.can_be_negative else {EVAL_LOSS: 0.0})


@torch.no_grad()
def score_responses(
    policy: nn.Module,
    reference: Callable[[PackedBatch], Tensor] | None,
    batches: Iterable[PackedBatch],
    ranks: Ranks = SINGLE_PROCESS,
    on_batch: Callable[[PackedBatch, Tensor, Tensor], None] | None = None,
    loss: Loss | None = None,
) -> Scores:
    """The log-probs of every response; the parameters are those of `evaluate_held_out`. loss: says what else is read."""
    if not batches:
        raise ValueError("no held-out example to evaluate")
    device = compute_device(policy)
    scored = []
    for batch in batches:
        on_device = batch.to(device)
        (logps, tokens), (known, known_tokens) = (
            policy_scores(policy, on_device, loss),
            reference_logps(reference, on_device, loss),
        )
        logps, known = logps.double().cpu(), None if known is None else known.double().cpu()
        if on_batch is not None and known is not None:
            on_batch(batch, logps, known)
        if not batch.is_filler:
            examples = replace(batch.examples, policy_tokens=tokens, reference_tokens=known_tokens).with_tensors(Tensor.cpu)
            scored.append((logps, known, examples, batch.places.cpu(), batch.sources))
    logps, knowns, examples, places, sources = zip(
        *(part for rank in ranks.all_gather_object(scored) for part in rank), strict=True
    )
    order = torch.cat(places).argsort()
    names = [name for batch in sources for name in batch]
    return Scores(
        policy=torch.cat(logps),
        reference=None if reference is None else torch.cat(knowns),
        examples=_joined(examples, order),
        sources=[names[place] for place in order.tolist()],
    )


def _joined(parts: Sequence[Examples], order: Tensor) -> Examples:
    """The examples of several batches as those of one, at `order`."""
    offsets = [0, *accumulate(len(part.lengths) for part in parts)][:-1]
    width = max(part.members.shape[1] for part in parts)
    members = [
        pad(part.members.where(part.members < 0, part.members + offset), (0, width - part.members.shape[1]), value=-1)
        for part, offset in zip(parts, offsets, strict=True)
    ]
    joined = Examples(torch.cat(members)[order], torch.cat([part.lengths for part in parts]))

    def data(name: str, missing: float) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        kind = next(value.dtype for value in values if value is not None)
        filled = [
            torch.full((len(part),), missing, dtype=kind) if value is None else value
            for part, value in zip(parts, values, strict=True)
        ]
        return torch.cat(filled)[order]

    return replace(
        joined,
        mean_length=joined.lengths[joined.first].double().mean().item(),
        **{name: data(name, missing) for name, missing in MISSING_NUMBERS.items()},
        policy_tokens=_joined_tokens([part.policy_tokens for part in parts], offsets),
        reference_tokens=_joined_tokens([part.reference_tokens for part in parts], offsets),
    )


def _joined_tokens(parts: Sequence[TokenLogps | None], offsets: Sequence[int]) -> TokenLogps | None:
    """The tokens of several batches, whose responses are numbered from `offsets` on; None if they have none."""
    if any(part is None for part in parts):
        return None
    collisions = [part.collision for part in parts]
    return TokenLogps(
        torch.cat([part.values for part in parts]),
        torch.cat([part.responses + offset for part, offset in zip(parts, offsets, strict=True)]),
        None if collisions[0] is None else torch.cat(collisions),
    )


def response_batches(
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int,
    budget: TokenBudget,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[PackedBatch]:
    """This rank's batches of prompts with one response each, both as token ids."""
    sampled = [TokenizedPrompt(prompt, [response], []) for prompt, response in zip(prompts, responses, strict=True)]
    return split_into_batches(list(iterate_examples(sampled)), batch_size, budget, ranks)


def kl_estimate(
    policy: nn.Module, reference, batches: Sequence[PackedBatch], ranks: Ranks = SINGLE_PROCESS
) -> tuple[dict, list[float]]:
    """Estimate KL(policy || reference) from responses sampled from the policy: the mean log-ratio, which is unbiased.

    batches: from `response_batches`; a truncated response counts as far as it goes. Returns the estimates per response and per
    token (all log-ratios over all tokens), in nats, and the log-ratio of each response.
    """
    scores = score_responses(policy, reference, batches, ranks)
    responses = scores.examples.first
    ratios = (scores.policy - scores.reference)[responses].numpy()
    tokens = scores.examples.lengths[responses].numpy()
    per_response = estimate(ratios.mean(), mean_interval(ratios))
    per_token = estimate(ratios.sum() / tokens.sum(), mean_interval(ratios, sizes=tokens))
    counts = {"answers": len(ratios), "tokens": int(tokens.sum())}
    return counts | {"per_answer": per_response, "per_token": per_token}, ratios.tolist()
