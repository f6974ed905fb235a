"""Random tries for property tests, and the numbers of their sequences alone."""

import random

import torch
from torch import Tensor, nn

from preference_training.batching.packing import Example, PackedBatch
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling import logprobs

VOCABULARY = 97


def random_prompts(rng: random.Random, longest: int = 24, most: int = 4) -> list[TokenizedPrompt]:
    """Prompts that continue earlier sequences, whose responses begin like each other, scored as a whole or in random spans."""
    tokens = lambda: [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))]  # noqa: E731
    prompts: list[TokenizedPrompt] = []
    for _ in range(rng.randint(1, most)):
        # A prompt may continue an earlier one's response, and a response another's: up to some five branches on each other.
        before = rng.choice(prompts) if prompts and rng.random() < 0.5 else None
        begun = before.prompt_ids + rng.choice(before.responses) if before else []
        responses = [tokens()]
        for _ in range(rng.randint(0, 3)):
            other = rng.choice(responses)
            responses.append(other[: rng.randrange(len(other))] + tokens())
        pairs = [(0, k) for k in range(1, len(responses))] if rng.random() < 0.5 else []
        spans = [_spans(rng, len(response)) for response in responses] if rng.random() < 0.5 else None
        first_row = prompts[-1].first_row + len(prompts[-1].responses) if prompts else 0
        prompt_ids = begun[: rng.randint(0, len(begun))] + tokens()
        prompts.append(TokenizedPrompt(prompt_ids, responses, pairs, first_row=first_row, spans=spans))
    return prompts


def _spans(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """One scored span of a response or two, apart from each other."""
    ends = sorted(rng.sample(range(length + 1), min(length + 1, rng.choice((2, 4)))))
    return list(zip(ends[::2], ends[1::2], strict=False))


def padded_scores(model: nn.Module, batch: PackedBatch) -> Tensor:
    """`response_scores` of padded rows, all in one forward."""
    _, by_rows = logprobs._ways(model)
    rows = logprobs._in_groups(model, batch, by_rows, [range(len(batch.response_lengths))])
    return logprobs._by_response(model, rows, batch)


def weighted_sum(logps: Tensor, batch: PackedBatch) -> Tensor:
    """A sum over a batch's examples of their members' log-probs, each with a weight of its own."""
    members = batch.members[batch.members >= 0]
    return (logps[members] * _weights(batch.response_rows[members])).sum()


def _weights(rows: Tensor) -> Tensor:
    return 1 + (rows % 5).float() / 2


def plain_logp(model: nn.Module, example: Example, member: int) -> Tensor:
    """The log-prob of a response by plain transformers, from its sequence alone: a scalar in float64."""
    prompt, response = example[0], example[0].responses[member]
    logits = model(torch.tensor([prompt.prompt_ids + response]), use_cache=False).logits[0].double().log_softmax(-1)
    spans = [(0, len(response))] if prompt.spans is None else prompt.spans[member]
    scored = torch.cat([torch.arange(start, end) for start, end in spans])
    return logits[len(prompt.prompt_ids) - 1 + scored, torch.tensor(response)[scored]].sum()


def plain_results(model: nn.Module, examples: list[Example]) -> tuple[dict[int, Tensor], list[Tensor]]:
    """The log-probs of all responses by their rows, and the gradients of what `weighted_sum` sums over all batches."""
    logps: dict[int, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for prompt, number in examples:
        for member in prompt.members(number):
            row = prompt.first_row + member
            if row not in logps:
                logps[row] = plain_logp(model, (prompt, number), member)
            total = total + logps[row] * _weights(torch.tensor(row))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return {row: logp.detach() for row, logp in logps.items()}, gradients(total, trained)


def gradients(total: Tensor, trained: list[nn.Parameter]) -> list[Tensor]:
    """The gradients of a scalar for some weights; zeros for those that it does not depend on."""
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return [torch.zeros_like(weight) if one is None else one for weight, one in zip(trained, found, strict=True)]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference of two gradients, relative to the norm of the second."""
    norm = lambda parts: sum(part.double().square().sum() for part in parts).sqrt()  # noqa: E731
    apart, size = norm([one - other for one, other in zip(found, expected, strict=True)]), norm(expected)
    return (apart / size).item() if size else apart.item()
