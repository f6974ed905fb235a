"""Statistics of a split: counts, lengths, and pairs that occur again."""

from dataclasses import dataclass

import numpy

from preference_training.data.columns import Columns
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.pairs import Pairs, Votes


@dataclass(frozen=True)
class Facts:
    """Statistics of one split. Lengths are in tokens; prompt_hashes are of each prompt, [N] uint64.

    example_lengths: of each prompt with its longest response. tokens counts every prompt and response once.
    """

    prompts: int
    examples: int
    responses: int
    prompt_lengths: numpy.ndarray
    response_lengths: numpy.ndarray
    example_lengths: numpy.ndarray
    tokens: int
    pairs: Pairs
    votes: Votes
    prompt_hashes: numpy.ndarray


def collect_facts(table: PromptTable) -> Facts:
    """The statistics of a table, in one pass over its columns."""
    batches = [columns for part in table.parts for columns in part.batches]

    def joined(lengths) -> numpy.ndarray:
        return numpy.concatenate([numpy.zeros(0, numpy.int64), *map(lengths, batches)])

    pairs = Pairs.of(table)
    facts = Facts(
        prompts=len(table),
        examples=int(table.num_examples.sum()),
        responses=table.num_responses,
        prompt_lengths=joined(lambda columns: columns.prompts.lengths),
        response_lengths=joined(lambda columns: columns.responses.lists.lengths),
        example_lengths=joined(_longest),
        tokens=int(table.num_tokens.sum()),
        pairs=pairs,
        votes=Votes.of(pairs),
        prompt_hashes=table.prompt_hashes,
    )
    for part in table.parts:
        part.release()
    return facts


def _longest(columns: Columns) -> numpy.ndarray:
    """The tokens of each prompt with its longest response: [N]."""
    longest = numpy.maximum.reduceat(columns.responses.lists.lengths, columns.responses.first[:-1])
    return columns.prompts.lengths + longest
