"""Sampling of responses, each prompt with a random stream of its own.

Shapes: R rows decoded together, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor, nn
from transformers import GenerationConfig

from preference_training.core.process_group import SINGLE_PROCESS, Ranks, local_world_size
from preference_training.distributed.sharding import whole_weights
from preference_training.generation.decoding import Decoding, Ends, Sampled, generate, repeats_prompts
from preference_training.generation.settings import GenerationSettings
from preference_training.modeling.archives import GENERATION_CONFIG
from preference_training.modeling.state import compute_device, free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows per batch on a CPU: larger batches are not faster, and wait longer for their longest response.
MAX_CPU_BATCH = 64
# Names of noise streams. Responses of two models that are compared are drawn independently: with common random numbers they
# would be equal more often than by chance, which biases a win rate toward one half.
POLICY, OTHER = "", "other"


@dataclass(frozen=True)
class Sampler:
    """Samples responses to prompts, reproducibly. max_length bounds prompt plus response, in tokens.

    Samples from the model's own distribution unless there are `settings`: its generation_config (temperature, penalties) is
    ignored. ends: the tokens that end a response; by default the tokenizer's end-of-sequence token. A response depends on
    the seed, the stream (POLICY or OTHER), the prompt and its number among the prompt's responses; not on how many there are,
    nor on other prompts or their order, except for rounding: where two tokens are almost equally likely, the size of the batch
    may decide (almost never in float32, now and then in bfloat16). Global random streams are unchanged. Every rank takes all
    prompts and gets all responses. Sharded weights are gathered once, if each rank has memory for them; then each rank samples
    for its share of the prompts. Otherwise every token gathers them again, for all prompts on all ranks. interrupt: called
    before each token is chosen; what it raises ends the sampling.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    seed: int
    ranks: Ranks = SINGLE_PROCESS
    settings: GenerationSettings | None = None
    ends: frozenset[int] = frozenset()
    interrupt: Callable[[], None] | None = None

    def texts(self, model: nn.Module, prompts: Sequence[list[int]], stream: str = POLICY) -> list[str]:
        """The responses as text, without special tokens."""
        responses = self.responses(model, prompts, stream)
        return [self.tokenizer.decode(response, skip_special_tokens=True) for response in responses]

    def responses(self, model: nn.Module, prompts: Sequence[list[int]], stream: str = POLICY) -> list[list[int]]:
        """The token ids of a response to each prompt."""
        return [response.token_ids for [response] in self.samples(model, prompts, 1, stream)]

    @torch.no_grad()
    def samples(self, model: nn.Module, prompts: Sequence[list[int]], number: int, stream: str = POLICY) -> list[list[Sampled]]:
        """`number` responses to each prompt, which is computed once for all of them.

        A response has one token at least. Equal prompts have equal responses.
        """
        # Batches of similar length waste little computation on padding.
        unique = sorted(dict.fromkeys(map(tuple, prompts)), key=len)
        with as_trained(model), whole_weights(model, self.ranks) as are_whole:
            rows = _max_rows(model, self.max_length, self.ranks) if prompts else 1
            if are_whole:
                parts = self.ranks.all_gather_object(self._sample(model, self.ranks.shard(unique), number, rows, stream))
                found = {prompt: responses for part in parts for prompt, responses in part.items()}
            else:
                found = self._sample(model, unique, number, rows, stream)
        return [list(found[tuple(prompt)]) for prompt in prompts]

    def _sample(
        self, model: nn.Module, prompts: Sequence[tuple[int, ...]], number: int, rows: int, stream: str
    ) -> dict[tuple[int, ...], list[Sampled]]:
        """`number` responses to each prompt, at most `rows` at once."""
        found: dict[tuple[int, ...], list[Sampled]] = {prompt: [] for prompt in prompts}
        for first in range(0, number, rows):
            copies = range(first, min(number, first + rows))
            size = rows // len(copies)
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                for prompt, responses in zip(batch, self._sample_batch(model, batch, copies, stream), strict=True):
                    found[prompt] += responses
        return found

    def _sample_batch(
        self, model: nn.Module, prompts: Sequence[tuple[int, ...]], copies: range, stream: str
    ) -> list[list[Sampled]]:
        """The responses of the given numbers to a batch of prompts."""
        ends = self._ends(model)
        noise = choice_of_tokens([(prompt, copy) for prompt in prompts for copy in copies], self.seed, stream, self.settings)
        if self.interrupt is not None:
            noise = _interruptible(noise, self.interrupt)
        limits = [self._limit(prompt) for prompt in prompts for _ in copies]
        shared = len(copies) if len(copies) > 1 and repeats_prompts(model, ends) else 1
        asked = [prompt for prompt in prompts for _ in range(len(copies) // shared)]
        settings = self.settings.arguments() if self.settings else {}
        found = generate(model, asked, ends, max(limits), Decoding(noise, limits, ends, shared), **settings)
        return [found[start : start + len(copies)] for start in range(0, len(found), len(copies))]

    def _limit(self, prompt: Sequence[int]) -> int:
        """How many tokens a response may have."""
        room = max(1, self.max_length - len(prompt))
        return min(room, self.settings.max_new_tokens) if self.settings else room

    def _ends(self, model: nn.Module) -> Ends:
        return ends_of(model, self.tokenizer, self.ends)


def advised_generation(model: nn.Module, directory: Path | None) -> GenerationConfig:
    """The generation configuration of a model: that of the directory of its weights, if it has one."""
    if directory is not None and (directory / GENERATION_CONFIG).is_file():
        return GenerationConfig.from_pretrained(directory)
    return model.generation_config


def named_ends(advised: GenerationConfig) -> list[int]:
    """The tokens that end a response by a generation configuration."""
    found = advised.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def ends_of(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", tokens: frozenset[int] = frozenset()) -> Ends:
    """The tokens that end a response of a model, by default the tokenizer's end-of-sequence token, and its padding."""
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Padding is masked but still embedded: its id must exist in the embedding.
    return Ends(tokens or frozenset({end}), padding if padding < model.config.get_text_config().vocab_size else end)


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode and its generation_config is empty."""
    training, generation_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = generation_config


def choice_of_tokens(
    rows: Sequence[tuple[Sequence[int], int]], seed: int, stream: str = POLICY, settings: GenerationSettings | None = None
) -> Callable[..., Tensor]:
    """What is done to the scores of rows before the largest is taken: noise is added, or nothing where it is to be greedy."""
    if settings is not None and settings.is_greedy:
        return lambda scores, _numbers=None: scores
    return PromptSeededNoise(rows, seed, stream)


def _interruptible(choose: Callable[..., Tensor], interrupt: Callable[[], None]) -> Callable[..., Tensor]:
    def asked_first(scores: Tensor, numbers: Sequence[int | None] | None = None) -> Tensor:
        interrupt()
        return choose(scores, numbers)

    return asked_first


class PromptSeededNoise:
    """Adds Gumbel noise to scores [R, V], for each row from a generator seeded by its prompt, its number and the stream.

    rows: the prompt of each row, and its number among the prompt's responses. The argmax is then a sample from the softmax of
    the scores (Gumbel 1954; Maddison et al. 2014, section 2).
    """

    def __init__(self, rows: Sequence[tuple[Sequence[int], int]], seed: int, stream: str = POLICY):
        self.seeds = [xxhash.xxh3_64_intdigest(repr(_name(*row, seed, stream)).encode()) for row in rows]
        self.generators: list[torch.Generator] = []

    def __call__(self, scores: Tensor, numbers: Sequence[int | None] | None = None) -> Tensor:
        """The scores with noise, [R, V]. numbers: which row each one is, by default in order; None is left without noise."""
        if not self.generators:
            # The device of the scores of a model split over several devices is known only now.
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.ones_like(scores)
        for row, number in zip(noise, range(len(self.seeds)) if numbers is None else numbers, strict=True):
            if number is not None:
                row.exponential_(generator=self.generators[number])
        return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


def _name(prompt: Sequence[int], number: int, seed: int, stream: str) -> tuple:
    """The name of a response's noise. That of a prompt's first one is that of earlier versions, and its response with it."""
    return (seed, list(prompt), *([stream] if stream or number else []), *([number] if number else []))


def _max_rows(model: nn.Module, max_length: int, ranks: Ranks) -> int:
    """The number of rows that fit into half of the free memory on every rank.

    A row needs the keys and values of all its tokens, the activations of its prompt, and a few copies of its scores.
    """
    config = model.config.get_text_config()
    per_token = (2 * config.num_hidden_layers + 8) * config.hidden_size * model.dtype.itemsize
    per_row = max_length * per_token + 5 * 4 * config.vocab_size
    device = compute_device(model)
    free = free_memory(device) // (1 if device.type == "cuda" else local_world_size())
    rows = max(1, free // 2 // per_row)
    return ranks.broadcast(ranks.all_reduce_min(rows if device.type == "cuda" else min(rows, MAX_CPU_BATCH)))
