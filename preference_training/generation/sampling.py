"""Sampling of responses, each prompt with a random stream of its own.

Shapes: B prompts of a batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from preference_training.core.process_group import SINGLE_PROCESS, Ranks, local_world_size
from preference_training.modeling.state import compute_device, free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts per batch on a CPU: larger batches are not faster, and wait longer for their longest response.
MAX_CPU_BATCH = 64
# Names of noise streams. Responses of two models that are compared are drawn independently: with common random numbers they
# would be equal more often than by chance, which biases a win rate toward one half.
POLICY, OTHER = "", "other"


@dataclass(frozen=True)
class Sampler:
    """Samples a response to each prompt, reproducibly. max_length bounds prompt plus response, in tokens.

    Samples from the model's own distribution: its generation_config (temperature, penalties) is ignored. A response depends on
    the seed, the stream (POLICY or OTHER) and the prompt alone, not on the other prompts or their order, except for rounding:
    where two tokens are almost equally likely, the size of the batch may decide (almost never in float32, now and then in
    bfloat16). Global random streams are unchanged. Every rank takes all prompts, and all ranks sample together.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    seed: int
    ranks: Ranks = SINGLE_PROCESS

    def texts(self, model: nn.Module, prompts: Sequence[list[int]], stream: str = POLICY) -> list[str]:
        """The responses as text, without special tokens."""
        responses = self.responses(model, prompts, stream)
        return [self.tokenizer.decode(response, skip_special_tokens=True) for response in responses]

    @torch.no_grad()
    def responses(self, model: nn.Module, prompts: Sequence[list[int]], stream: str = POLICY) -> list[list[int]]:
        """The token ids of the responses, of one token at least; the last is the end-of-sequence token unless truncated."""
        responses: list[list[int]] = [[]] * len(prompts)
        # Batches of similar length waste little computation on padding.
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        size = _batch_size(model, self.max_length, self.ranks) if prompts else 1
        training, generation_config = model.training, model.generation_config
        model.eval()
        model.generation_config = GenerationConfig()
        try:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                batch = self._sample_batch(model, [prompts[k] for k in chosen], stream)
                for k, response in zip(chosen, batch, strict=True):
                    responses[k] = response
        finally:
            model.train(training)
            model.generation_config = generation_config
        return responses

    def _sample_batch(self, model: nn.Module, prompts: Sequence[list[int]], stream: str) -> list[list[int]]:
        """The responses to a batch of prompts, padded on the left."""
        device, eos = compute_device(model), self.tokenizer.eos_token_id
        width = max(map(len, prompts))
        # Padding is masked but still embedded: its id must exist in the embedding.
        is_embedded = self.tokenizer.pad_token_id < model.config.get_text_config().vocab_size
        padding = self.tokenizer.pad_token_id if is_embedded else eos
        ids = torch.full((len(prompts), width), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        limits = torch.tensor([max(1, self.max_length - len(prompt)) for prompt in prompts])
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=int(limits.max()),
            # Greedy decoding of scores with Gumbel noise is sampling.
            do_sample=False,
            logits_processor=[PromptSeededNoise(prompts, self.seed, stream)],
            stopping_criteria=[RowLimits(limits.to(device), width)],
            pad_token_id=padding,
            eos_token_id=eos,
        )
        rows = output[:, width:].tolist()
        return [_up_to(eos, row[:limit]) for row, limit in zip(rows, limits.tolist(), strict=True)]


def _up_to(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


class PromptSeededNoise(LogitsProcessor):
    """Adds Gumbel noise to scores [B, V], for each row from a generator seeded by its prompt and the stream.

    The argmax is then a sample from the softmax of the scores (Gumbel 1954; Maddison et al. 2014, section 2).
    """

    def __init__(self, prompts: Sequence[list[int]], seed: int, stream: str = POLICY):
        # Without a stream name, so that the policy's responses are those of earlier versions.
        named = [(seed, prompt, stream) if stream else (seed, prompt) for prompt in prompts]
        self.seeds = [xxhash.xxh3_64_intdigest(repr(name).encode()) for name in named]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with noise, [B, V]."""
        if not self.generators:
            # The device of the scores of a model split over several devices is known only now.
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


class RowLimits(StoppingCriteria):
    """Stops each row after its maximum number of new tokens: limits [B]. All prompts end at `width`."""

    def __init__(self, limits: Tensor, width: int):
        self.limits, self.width = limits, width

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        """Which rows are complete: [B] bool."""
        return self.limits <= input_ids.shape[1] - self.width


def _batch_size(model: nn.Module, max_length: int, ranks: Ranks) -> int:
    """The number of prompts that fit into half of the free memory on every rank.

    A row needs the keys and values of all its tokens, the activations of its prompt, and a few copies of its scores.
    """
    config = model.config.get_text_config()
    per_token = (2 * config.num_hidden_layers + 8) * config.hidden_size * model.dtype.itemsize
    per_row = max_length * per_token + 5 * 4 * config.vocab_size
    device = compute_device(model)
    free = free_memory(device) // (1 if device.type == "cuda" else local_world_size())
    rows = max(1, free // 2 // per_row)
    return ranks.broadcast(ranks.all_reduce_min(rows if device.type == "cuda" else min(rows, MAX_CPU_BATCH)))
