"""Whether a policy's samples are improbable to the reference, as those of a model are that training has broken.

A policy that keeps its language says what the reference might have said too: its samples cost the reference about as many nats
per token as its own do, whatever habit it has learned. Nonsense costs several more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from preference_training.batching.micro_batches import split_into_batches
from preference_training.batching.packing import PackedBatch, TokenBudget, iterate_examples
from preference_training.data.tokenization import TokenizedPrompt

# How many nats per token more than the reference's own samples tell nonsense from a habit.
FAR = 1.5
# With fewer tokens a few rare words would decide.
FEWEST = 64

# Log-probs [R] of the responses of a batch, wherever that is.
Score = Callable[[PackedBatch], Tensor]


def improbability(
    score: Score,
    prompts: Sequence[Sequence[int]],
    policy: Sequence[list[int]],
    reference: Sequence[list[int]],
    batching: tuple[int, TokenBudget],
) -> str | None:
    """What speaks for samples that the reference would hardly say, in words; None where nothing does.

    score: the reference. prompts, policy, reference: token ids of the prompts and of both models' samples. batching: how many
    responses are scored at once, and the budget of their packs. Every rank of a run computes all of them.
    """
    pairs = [(list(prompt), one, other) for prompt, one, other in zip(prompts, policy, reference, strict=True) if one and other]
    counts = [sum(map(len, column)) for column in ([one for _, one, _ in pairs], [other for *_, other in pairs])]
    if min(counts) < FEWEST:
        return None
    examples = list(iterate_examples(TokenizedPrompt(prompt, [one, other], []) for prompt, one, other in pairs))
    # Example 2 k is the policy's response to prompt k, and the next one the reference's.
    logps = torch.zeros(len(examples), dtype=torch.float64)
    for batch in split_into_batches(examples, *batching):
        logps[batch.places] = score(batch).double().cpu()[batch.members[:, 0]]
    own, usual = (-logps[start::2].sum().item() / count for start, count in enumerate(counts))
    if own < usual + FAR:
        return None
    return f"the reference finds the policy's samples improbable: {own:.1f} nats per token, and {usual:.1f} of its own"
