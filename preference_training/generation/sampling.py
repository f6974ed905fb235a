"""Answers drawn from a model, each prompt's from a random stream of its own.

Shapes: B prompts that are answered together, V vocabulary.
"""

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from preference_training.core.process_group import SINGLE_PROCESS, Ranks, local_world_size
from preference_training.modeling.state import compute_device, free_memory

# Prompts that a CPU answers together: more are not faster, and wait longer for the longest answer among them.
ROWS_ON_CPU = 64


# Of which answers a stream of noise is. Answers of two models that are compared are drawn independently: from one stream they
# would be alike more often than chance has it, and a win rate would lean towards one half.
POLICY, OTHER = "", "other"


def sample_answers(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    max_length: int,
    seed: int,
    ranks: Ranks = SINGLE_PROCESS,
    stream: str = POLICY,
) -> list[str]:
    """`sample_responses` as text, up to the end of the response."""
    responses = sample_responses(model, tokenizer, prompts, max_length, seed, ranks, stream)
    return [tokenizer.decode(response, skip_special_tokens=True) for response in responses]


@torch.no_grad()
def sample_responses(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    max_length: int,
    seed: int,
    ranks: Ranks = SINGLE_PROCESS,
    stream: str = POLICY,
) -> list[list[int]]:
    """One sampled response to each prompt, both token ids; the end-of-sequence token is its last, unless it is cut before.

    `max_length` bounds each prompt plus response, in tokens; a response has at least one. Drawn from the model's own
    distribution: nothing of its generation_config (temperature, penalties) is heeded. What is drawn depends on the seed, the
    stream (POLICY or OTHER) and the prompt alone, not on the prompts beside it nor on their order, but for rounding: where two
    tokens are as good as equal, another width of the batch may tip the scales, next to never in float32, now and then in
    bfloat16. The global random streams are left as they were. Every rank answers all prompts, and together with the others.
    """
    responses: list[list[int]] = [[]] * len(prompts)
    # Prompts of like length waste little of each other's time.
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    size = _rows_at_once(model, max_length, ranks) if prompts else 1
    training, usual = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            answered = _respond(model, tokenizer, [prompts[k] for k in chosen], max_length, (seed, stream))
            for k, response in zip(chosen, answered, strict=True):
                responses[k] = response
    finally:
        model.train(training)
        model.generation_config = usual
    return responses


def _respond(model: nn.Module, tokenizer, prompts: Sequence[list[int]], max_length: int, noise: tuple) -> list[list[int]]:
    """The responses to prompts that are answered together, padded on their left."""
    device = compute_device(model)
    width = max(map(len, prompts))
    # Padding is masked, but looked up: an id that the embedding lacks would not be found.
    known = tokenizer.pad_token_id < model.config.get_text_config().vocab_size
    padding = tokenizer.pad_token_id if known else tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    room = torch.tensor([max(1, max_length - len(prompt)) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=int(room.max()),
        # The choice is greedy among scores that have noise on them, which is a draw.
        do_sample=False,
        logits_processor=[OwnStreams(prompts, *noise)],
        stopping_criteria=[OwnRoom(room.to(device), width)],
        pad_token_id=padding,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = output[:, width:].tolist()
    return [_up_to(tokenizer.eos_token_id, row[:limit]) for row, limit in zip(rows, room.tolist(), strict=True)]


def _up_to(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


class OwnStreams(LogitsProcessor):
    """Adds Gumbel noise to scores [B, V], each row's from a generator seeded by its prompt and its stream.

    The greatest of the sums is a draw from the softmax of the scores (Gumbel 1954; Maddison et al. 2014, section 2).
    """

    def __init__(self, prompts: Sequence[list[int]], seed: int, stream: str = POLICY):
        # The policy's answers are those that earlier versions drew.
        named = [(seed, prompt, stream) if stream else (seed, prompt) for prompt in prompts]
        self.seeds = [xxhash.xxh3_64_intdigest(repr(name).encode()) for name in named]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with noise, [B, V]."""
        if not self.generators:
            # Where the scores are, which of a model over several devices is known only now.
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


class OwnRoom(StoppingCriteria):
    """Ends each row after as many tokens behind its prompt as there is room for: [B]; all prompts end at `width`."""

    def __init__(self, room: Tensor, width: int):
        self.room, self.width = room, width

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        """Which rows are at their end: [B] bool."""
        return self.room <= input_ids.shape[1] - self.width


def _rows_at_once(model: nn.Module, max_length: int, ranks: Ranks) -> int:
    """How many prompts are answered together: as many as half of the free memory holds on every rank.

    A row holds keys and values of all its tokens, the activations of its prompt, and a few copies of its scores.
    """
    config = model.config.get_text_config()
    kept = (2 * config.num_hidden_layers + 8) * config.hidden_size * model.dtype.itemsize
    per_row = max_length * kept + 5 * 4 * config.vocab_size
    device = compute_device(model)
    free = free_memory(device) // (1 if device.type == "cuda" else local_world_size())
    rows = max(1, free // 2 // per_row)
    return ranks.broadcast(ranks.all_reduce_min(rows if device.type == "cuda" else min(rows, ROWS_ON_CPU)))
