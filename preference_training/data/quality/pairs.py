"""The pairs of a table in columns, and what counts alone say of them: contradictions, agreement, length and position.

Shapes: P pairs.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy

from preference_training.data.columns import Columns
from preference_training.data.prompt_table import PromptTable


class Pairs(NamedTuple):
    """All pairs of a table, also those that rankings imply; each field is [P].

    prompts: indices in the table; keys: hashes of the prompts' token ids. preferred, other: numbers of the responses in the
    table. The rest describes both responses: hashes of prompt and response, lengths in tokens, whether the preferred one comes
    first among the responses of its prompt, and whether its prompt has these two responses and no other pair.
    """

    prompts: numpy.ndarray
    keys: numpy.ndarray
    preferred: numpy.ndarray
    other: numpy.ndarray
    preferred_hashes: numpy.ndarray
    other_hashes: numpy.ndarray
    preferred_lengths: numpy.ndarray
    other_lengths: numpy.ndarray
    preferred_is_first: numpy.ndarray
    is_only_pair: numpy.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def of(cls, table: PromptTable) -> "Pairs":
        """The pairs of a table; none where its examples are targets or labels."""
        parts, start, row = [_NONE], 0, 0
        for part in table.parts:
            for columns in part.batches:
                parts.append(_of_batch(columns, start, row))
                start += len(columns.numbers)
                row += columns.num_responses
            part.release()
        return cls(*map(numpy.concatenate, zip(*parts, strict=True)))


_NONE = tuple(
    numpy.zeros(0, kind)
    for kind in (numpy.int64, numpy.uint64, numpy.int64, numpy.int64, numpy.uint64, numpy.uint64, int, int, bool, bool)
)


def _of_batch(columns: Columns, start: int, row: int) -> tuple[numpy.ndarray, ...]:
    """The fields of `Pairs` for a batch; `start` and `row` are the numbers of its first prompt and response."""
    prompts, first, second = _members(columns)
    base = columns.responses.first[prompts].astype(numpy.int64)
    preferred, other = base + first, base + second
    keys = columns.prompts.hashes
    # The same response to another prompt is another one.
    hashes = columns.responses.lists.hashes * numpy.uint64(0x9E3779B97F4A7C15) ^ numpy.repeat(keys, columns.responses.counts)
    lengths = columns.responses.lists.lengths
    pairs = (preferred, other)
    return (
        prompts + start,
        keys[prompts],
        *(rows + row for rows in pairs),
        *(hashes[rows] for rows in pairs),
        *(lengths[rows] for rows in pairs),
        first < second,
        ((columns.responses.counts == 2) & (columns.examples.counts == 1))[prompts],
    )


def _members(columns: Columns) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """The prompt of each pair of a batch, and its responses as indices within the prompt: [P] each."""
    if len(columns.labels.values):
        return (numpy.zeros(0, numpy.int64),) * 3
    examples = columns.examples
    owner = numpy.repeat(numpy.arange(len(columns.numbers)), examples.counts)
    sizes, starts = examples.lists.lengths, examples.lists.offsets[:-1]
    found = []
    for size in numpy.unique(sizes[sizes > 1]).tolist():
        at = numpy.flatnonzero(sizes == size)
        for i, j in combinations(range(size), 2):
            found.append((owner[at], examples.lists.values[starts[at] + i], examples.lists.values[starts[at] + j]))
    if not found:
        return (numpy.zeros(0, numpy.int64),) * 3
    prompts, first, second = (numpy.concatenate(parts).astype(numpy.int64) for parts in zip(*found, strict=True))
    # In the order of the data again.
    order = numpy.argsort(prompts, kind="stable")
    return prompts[order], first[order], second[order]


# ---- the same two responses, judged several times ---------------------------------------------------------------------------


class Votes(NamedTuple):
    """How often the same two responses to a prompt were compared, and with what result.

    compared: distinct comparisons. duplicates: verdicts beyond the first of the same direction. contradictory: comparisons with
    verdicts in both directions. agreements: of each comparison with several verdicts, which share of the pairs of these agree.
    """

    compared: int
    duplicates: int
    contradictory: int
    agreements: numpy.ndarray

    @classmethod
    def of(cls, pairs: Pairs) -> "Votes":
        """The votes in some pairs."""
        low = numpy.minimum(pairs.preferred_hashes, pairs.other_hashes)
        high = numpy.maximum(pairs.preferred_hashes, pairs.other_hashes)
        _, which = numpy.unique(low * numpy.uint64(3) ^ high, return_inverse=True)
        counts = numpy.zeros((int(which.max(initial=-1)) + 1, 2), numpy.int64)
        numpy.add.at(counts, (which, (pairs.preferred_hashes == low).astype(int)), 1)
        repeated = counts[counts.sum(1) > 1]
        votes = repeated.sum(1)
        agreements = (repeated * (repeated - 1)).sum(1) / (votes * (votes - 1))
        return cls(len(counts), int((counts - 1).clip(0).sum()), int((counts > 0).all(1).sum()), agreements)


# ---- rules that need no model -----------------------------------------------------------------------------------------------


class Baseline(NamedTuple):
    """What a trivial rule makes of held-out pairs. outcomes [P]: 1 right, 0 wrong, 0.5 undecided; prompts [P]: their groups."""

    name: str
    outcomes: numpy.ndarray
    prompts: numpy.ndarray

    @property
    def accuracy(self) -> float:
        """The share that the rule gets right."""
        return float(self.outcomes.mean())


# Above this share of one place, the place is how the data was written down, not something a model could see.
WRITTEN_SO = 0.98


def simple_baselines(train: Pairs, held_out: Pairs) -> Iterator[Baseline]:
    """The rules of length and of position, whose direction training pairs decide, on held-out pairs."""
    longer = [numpy.sign(pairs.preferred_lengths - pairs.other_lengths) for pairs in (train, held_out)]
    yield _rule(("longer wins", "shorter wins"), (longer[0], longer[1]), held_out.prompts)
    if position_is_known(train, held_out) and held_out.is_only_pair.any():
        first = [numpy.where(pairs.preferred_is_first, 1, -1)[pairs.is_only_pair] for pairs in (train, held_out)]
        yield _rule(("the first wins", "the last wins"), (first[0], first[1]), held_out.prompts[held_out.is_only_pair])


def position_is_known(train: Pairs, held_out: Pairs) -> bool:
    """Whether the order of responses is that of the data, not of chosen and rejected.

    Only prompts with one pair tell: others may list a response first because another pair has it.
    """
    first = numpy.concatenate([pairs.preferred_is_first[pairs.is_only_pair] for pairs in (train, held_out)])
    return len(first) > 0 and 1 - WRITTEN_SO < first.mean() < WRITTEN_SO


def _rule(names: tuple[str, str], splits: tuple[numpy.ndarray, numpy.ndarray], prompts: numpy.ndarray) -> Baseline:
    """A rule, from where it holds (1) and where its opposite does (-1), in the training and in the held-out split."""
    train, held_out = splits
    sign = 1 if train.sum() >= 0 else -1
    return Baseline(names[sign < 0], (1 + sign * held_out) / 2, prompts)
