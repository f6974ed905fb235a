"""What is computed at once: the micro-batches of a step, and the batches of an evaluation, each cut into packs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy
import torch
from torch import Tensor

from preference_training.batching.packing import UNLIMITED, Example, PackedBatch, TokenBudget, examples_of, packs_of
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.data.prompt_table import PromptTable, Selection, shuffled


@dataclass(frozen=True)
class MicroBatch:
    """One of a step's `gradient_accumulation_steps` parts.

    packs are this rank's, each within the budget; `examples` are those of all ranks, and num_examples counts them.
    """

    packs: list[PackedBatch]
    num_examples: int
    examples: Sequence[Example] = ()

    @classmethod
    def of(cls, examples: Sequence[Example], budget: TokenBudget, ranks: Ranks) -> "MicroBatch":
        """Some examples, packed within a budget."""
        return cls([_pinned(pack) for pack in packs_of(examples, budget, ranks)], len(examples), examples)


def _pinned(batch: PackedBatch) -> PackedBatch:
    """The batch in page-locked memory where there is a GPU, so that it is copied there while the GPU computes."""
    return batch.with_tensors(Tensor.pin_memory) if torch.cuda.is_available() else batch


def evaluation_prompts(prompts: PromptTable, n_examples: int | None, seed: int) -> Selection:
    """The prompts of the `n_examples` held-out examples (None: all) of every evaluation, drawn by `seed`."""
    order = shuffled(len(prompts), f"{seed} evaluation")
    if n_examples is not None:
        order = order[: numpy.searchsorted(numpy.cumsum(prompts.num_examples[order]), n_examples) + 1]
    return Selection(prompts, order)


def evaluation_batches(
    prompts: PromptTable,
    batch_size: int,
    n_examples: int | None,
    seed: int,
    budget: TokenBudget = UNLIMITED,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[PackedBatch]:
    """This rank's part of the `n_examples` held-out examples, in batches of at most `batch_size` over all ranks.

    Their `places` are those among all held-out examples.
    """
    examples = list(islice(examples_of(evaluation_prompts(prompts, n_examples, seed)), n_examples))
    return batches_of(examples, batch_size, budget, ranks)


def batches_of(
    examples: Sequence[Example], batch_size: int, budget: TokenBudget = UNLIMITED, ranks: Ranks = SINGLE_PROCESS
) -> list[PackedBatch]:
    """This rank's part of some examples, in batches of at most `batch_size` over all ranks; `places` are among them all."""
    starts = range(0, len(examples), batch_size)
    return [
        replace(pack, places=pack.places + start)
        for start in starts
        for pack in packs_of(examples[start : start + batch_size], budget, ranks)
    ]
