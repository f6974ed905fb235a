"""The micro-batches of a step and the batches of an evaluation, each split into packs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy
import torch

from preference_training.batching.packing import (
    UNLIMITED,
    Example,
    PackedBatch,
    TokenBudget,
    build_packs,
    iterate_examples,
    num_scored,
)
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.data.prompt_table import PromptTable, Selection, shuffled


@dataclass(frozen=True)
class MicroBatch:
    """One of a step's `gradient_accumulation_steps` parts.

    packs: this rank's, each within the budget. examples: those of all ranks, which num_examples counts. most_members: of any of
    them. first_tokens: the scored tokens of their first members, in total.
    """

    packs: list[PackedBatch]
    num_examples: int
    most_members: int
    first_tokens: int
    examples: Sequence[Example] = ()

    @classmethod
    def of(cls, examples: Sequence[Example], budget: TokenBudget = UNLIMITED, ranks: Ranks = SINGLE_PROCESS) -> "MicroBatch":
        """Pack examples within a budget."""
        members = [(prompt, prompt.members(number)) for prompt, number in examples]
        return cls(
            packs=[prepared(pack, ranks) for pack in build_packs(examples, budget, ranks)],
            num_examples=len(examples),
            most_members=max(len(responses) for _, responses in members),
            first_tokens=sum(num_scored(prompt, responses[0]) for prompt, responses in members),
            examples=examples,
        )


def prepared(batch: PackedBatch, ranks: Ranks) -> PackedBatch:
    """The batch as the device of this process takes it, and what this process computes of it."""
    if ranks.context.size > 1:
        batch.part(ranks.context.rank, ranks.context.size)
        return batch
    return batch.for_gpu() if torch.cuda.is_available() else batch


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
    """This rank's share of the `n_examples` held-out examples, in batches of at most `batch_size` over all ranks.

    Their `places` are indices into all held-out examples.
    """
    examples = list(islice(iterate_examples(evaluation_prompts(prompts, n_examples, seed)), n_examples))
    return split_into_batches(examples, batch_size, budget, ranks)


def split_into_batches(
    examples: Sequence[Example], batch_size: int, budget: TokenBudget = UNLIMITED, ranks: Ranks = SINGLE_PROCESS
) -> list[PackedBatch]:
    """This rank's share of the examples, in batches of at most `batch_size` over all ranks; `places` index all of them."""
    starts = range(0, len(examples), batch_size)
    return [
        prepared(replace(pack, places=pack.places + start), ranks)
        for start in starts
        for pack in build_packs(examples[start : start + batch_size], budget, ranks)
    ]
