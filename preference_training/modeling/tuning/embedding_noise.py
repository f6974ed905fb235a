"""NEFTune (Jain et al. 2024): uniform noise on the embeddings of tokens in training, which makes SFT overfit less.

Noise is a function of the seed, the step, a token's id and its position in its sequence: the same however a batch is cut into
packs or ranks, with shared prefixes or without, and when a run is resumed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from preference_training.batching.micro_batches import MicroBatch
from preference_training.core.process_group import SINGLE_PROCESS, Ranks

# Odd constants of splitmix64 (Steele et al. 2014) as signed numbers.
GOLDEN, FIRST, SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Bits of a random number that become a number in float32.
BITS = 24


class EmbeddingNoise:
    """Noise on the embeddings of a model while it is `on`: uniform up to alpha / sqrt(L d), d the width of the embeddings.

    L is the length of the longest sequence of a batch: in the paper's own code it is the length that a batch is padded to.
    Without alpha there is none.
    """

    def __init__(self, model: nn.Module, alpha: float | None, seed: int):
        self.alpha, self.seed = alpha, seed
        self.step, self.longest = 0, 0
        self.positions: Tensor | None = None
        self.hooks = []
        if alpha is not None:
            self.hooks = [
                model.register_forward_pre_hook(self._note_positions, with_kwargs=True),
                model.get_input_embeddings().register_forward_hook(self._add),
            ]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def on(self, step: int, micro_batches: Sequence[MicroBatch], ranks: Ranks = SINGLE_PROCESS) -> Iterator[None]:
        """Context of the forward passes of a step on this rank's micro-batches."""
        if self.alpha is not None:
            longest = max(pack.trie.longest_sequence for micro_batch in micro_batches for pack in micro_batch.packs)
            self.step, self.longest = step, -ranks.all_reduce_min(-longest)
        try:
            yield
        finally:
            self.longest, self.positions = 0, None

    def _note_positions(self, _module: nn.Module, _inputs: tuple, options: dict) -> None:
        self.positions = options.get("position_ids")

    def _add(self, _module: nn.Module, inputs: tuple, embeddings: Tensor) -> Tensor:
        if self.alpha is None or not self.longest:
            return embeddings
        ids = inputs[0]
        positions = torch.arange(ids.shape[-1], device=ids.device) if self.positions is None else self.positions.to(ids.device)
        noise = uniform(self.seed, self.step, positions, ids, embeddings.shape[-1])
        scale = self.alpha / math.sqrt(self.longest * embeddings.shape[-1])
        return embeddings + (noise * scale).to(embeddings.dtype)


def uniform(seed: int, step: int, positions: Tensor, ids: Tensor, width: int) -> Tensor:
    """Numbers in [-1, 1) of tokens with these ids at these positions, both [..., T] int64: [..., T, width] float32."""
    keys = torch.zeros_like(ids)
    for number in (seed, step, positions, ids):
        keys = _mix(keys + number + GOLDEN)
    columns = torch.arange(1, width + 1, device=ids.device) * GOLDEN
    found = _mix(keys[..., None] + columns)
    return ((found >> (64 - BITS)) & (2**BITS - 1)).float() / 2 ** (BITS - 1) - 1


def _mix(values: Tensor) -> Tensor:
    """The finalizer of splitmix64: random bits of an int64, whose products wrap around."""
    values = (values ^ _shifted(values, 30)) * FIRST
    values = (values ^ _shifted(values, 27)) * SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros from the left."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
