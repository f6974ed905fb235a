"""Training data with other weights of its pairs, which are known by their content.

A pair is known by a hash of its token ids, in the direction of its label: with its label changed it is another pair.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import xxhash

from preference_training.core.values import counted
from preference_training.data.columns import Lists
from preference_training.data.preparation import Prepared, derived_part
from preference_training.data.prompt_table import PromptTable, TablePart, write_batches
from preference_training.data.tokenization import TokenizedPrompt


def pair_key(prompt: Iterable[int], preferred: Iterable[int], other: Iterable[int]) -> str:
    """What a pair is known by: 32 hexadecimal digits, of its token ids."""
    digest = xxhash.xxh3_128()
    for ids in (prompt, preferred, other):
        numbers = numpy.fromiter(ids, numpy.int32)
        digest.update(numpy.int64(len(numbers)).tobytes() + numbers.tobytes())
    return digest.hexdigest()


def pair_keys(prompt: TokenizedPrompt) -> list[str]:
    """The keys of a prompt's pairs, in their order."""
    texts = prompt.responses
    return [pair_key(prompt.prompt_ids, texts[i], texts[j]) for i, j in prompt.pairs]


@dataclass(frozen=True)
class Weighed:
    """Training data with weights, and how many of its pairs have one of their own."""

    prepared: Prepared
    known: int
    pairs: int

    @property
    def line(self) -> str:
        """What was found, as a line of text."""
        line = f"data.weights: {self.known:,} of {counted(self.pairs, 'training pair')} weighted"
        unknown = self.pairs - self.known
        return line + (f"; {unknown:,} are not among those that were judged, and count 1" if unknown else "")


def weigh(train: Prepared, weights: Mapping[str, float], directory: Path) -> Weighed:
    """The training data with each pair's weight times that of the data; pairs without one keep theirs.

    directory: of prepared data, where the tables with weights are kept. Data whose weights are all 1 stays as it is.
    """
    parts, known, pairs = [], 0, 0
    for part in train.table.parts:
        factors = [
            numpy.array([weights.get(key, numpy.nan) for prompt in PromptTable([_one(part, k)]) for key in pair_keys(prompt)])
            for k in range(len(part.batches))
        ]
        found = numpy.concatenate([numpy.zeros(0), *factors])
        known, pairs = known + int((~numpy.isnan(found)).sum()), pairs + len(found)
        parts.append(_weighted(part, [numpy.nan_to_num(each, nan=1.0) for each in factors], directory))
    return Weighed(replace(train, table=PromptTable(parts, train.table.first_row)), known, pairs)


def _one(part: TablePart, k: int) -> TablePart:
    """A part with one of its batches."""
    return replace(part, batches=[part.batches[k]])


def _weighted(part: TablePart, factors: list[numpy.ndarray], directory: Path) -> TablePart:
    if all((each == 1).all() for each in factors):
        return part
    digest = xxhash.xxh3_128(part.fingerprint.encode())
    for each in factors:
        digest.update(each.tobytes())

    def batches() -> Iterable:
        for columns, factor in zip(part.batches, factors, strict=True):
            counts = columns.examples.counts
            own = numpy.ones(len(factor))
            if len(columns.weights.values):
                # Those of prompts without weights of their own are empty lists.
                own[numpy.repeat(columns.weights.lengths > 0, counts)] = columns.weights.values
            offsets = numpy.concatenate([[0], numpy.cumsum(counts)]).astype(numpy.int32)
            yield columns._replace(weights=Lists(offsets, own * factor)).as_arrow()

    return derived_part(part, digest.hexdigest(), part.num_prompts, lambda file: write_batches(file, batches()), directory)
