"""A batch of tokenized prompts as columns: lists of numbers in flat arrays, as Arrow stores them, and their hash.

Shapes: N prompts, R responses.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy
import pyarrow
import xxhash

from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.base import MISSING_NUMBERS


class Lists(NamedTuple):
    """Lists of numbers: list k is `values` from offset k to offset k + 1."""

    offsets: numpy.ndarray
    values: numpy.ndarray

    @classmethod
    def of(cls, lists: Sequence[list], kind: str = "i") -> "Lists":
        """Lists in memory. kind: of the numbers, as in `array`: "i" for int32, "d" for float64."""
        values = array(kind)
        if not any(lists):
            return cls(numpy.zeros(len(lists) + 1, numpy.int32), numpy.asarray(values))
        for numbers in lists:
            values.fromlist(numbers)
        offsets = numpy.fromiter(accumulate(map(len, lists), initial=0), numpy.int32, len(lists) + 1)
        return cls(offsets, numpy.asarray(values))

    @classmethod
    def of_arrow(cls, lists: pyarrow.ListArray) -> "Lists":
        """Views of an Arrow array."""
        return cls(lists.offsets.to_numpy(), lists.values.to_numpy())

    def as_arrow(self, kind: pyarrow.DataType) -> pyarrow.ListArray:
        """The lists as an Arrow array."""
        return pyarrow.ListArray.from_arrays(self.offsets, self.values, type=kind)

    def at(self, k: int) -> list:
        """List k."""
        return self.values[self.offsets[k] : self.offsets[k + 1]].tolist()

    @classmethod
    def joined(cls, lists: Sequence[numpy.ndarray]) -> "Lists":
        """Arrays of int32 as lists, with offsets for more than 2 ** 31 numbers."""
        offsets = numpy.concatenate([[0], numpy.cumsum([len(numbers) for numbers in lists], dtype=numpy.int64)])
        return cls(offsets, numpy.concatenate([numpy.zeros(0, numpy.int32), *lists]))

    @property
    def lengths(self) -> numpy.ndarray:
        """How many numbers each list has."""
        return numpy.diff(self.offsets)

    @property
    def hashes(self) -> numpy.ndarray:
        """A hash of each list of int32: [lists] uint64."""
        ids = memoryview(numpy.ascontiguousarray(self.values, numpy.int32)).cast("B")
        cuts = (self.offsets.astype(numpy.int64) * numpy.dtype(numpy.int32).itemsize).tolist()
        return numpy.array([xxhash.xxh3_64_intdigest(ids[start:end]) for start, end in pairwise(cuts)], numpy.uint64)


class ListsOfLists(NamedTuple):
    """Lists of lists of numbers: item k is `lists` from number `first[k]` to `first[k + 1]`."""

    first: numpy.ndarray
    lists: Lists

    @classmethod
    def of(cls, items: Sequence[Sequence[Sequence[int]]]) -> "ListsOfLists":
        """Lists of lists in memory."""
        first = numpy.fromiter(accumulate(map(len, items), initial=0), numpy.int32, len(items) + 1)
        return cls(first, Lists.of([*map(list, chain.from_iterable(items))]))

    @classmethod
    def of_arrow(cls, items: pyarrow.ListArray) -> "ListsOfLists":
        """Views of an Arrow array."""
        return cls(items.offsets.to_numpy(), Lists.of_arrow(items.values))

    def as_arrow(self, kind: pyarrow.DataType) -> pyarrow.ListArray:
        """The lists as an Arrow array."""
        return pyarrow.ListArray.from_arrays(self.first, self.lists.as_arrow(kind.value_type), type=kind)

    def at(self, k: int) -> list[list[int]]:
        """Item k."""
        cuts = self.lists.offsets[self.first[k] : self.first[k + 1] + 1].tolist()
        values = self.lists.values[cuts[0] : cuts[-1]].tolist()
        return [values[start - cuts[0] : end - cuts[0]] for start, end in pairwise(cuts)]

    @property
    def counts(self) -> numpy.ndarray:
        """How many lists each item has."""
        return numpy.diff(self.first)


def _list_of(kind: pyarrow.DataType) -> pyarrow.DataType:
    return pyarrow.list_(pyarrow.field("item", kind, nullable=False))


INTEGERS, NUMBERS = _list_of(pyarrow.int32()), _list_of(pyarrow.float64())
SCHEMA = pyarrow.schema(
    {
        "number": pyarrow.int64(),
        "prompt_ids": INTEGERS,
        "responses": _list_of(INTEGERS),
        "examples": _list_of(INTEGERS),
        # What a prompt may lack is an empty list then.
        "spans": _list_of(INTEGERS),
        "weights": NUMBERS,
        "margins": NUMBERS,
        "labels": NUMBERS,
    }
)


class Columns(NamedTuple):
    """A batch of N prompts. spans: the start and end of each span of each response, concatenated."""

    numbers: numpy.ndarray
    prompts: Lists
    responses: ListsOfLists
    examples: ListsOfLists
    spans: ListsOfLists
    weights: Lists
    margins: Lists
    labels: Lists

    @classmethod
    def of(cls, prompts: Iterable[TokenizedPrompt]) -> "Columns":
        """Columns of prompts, in memory."""
        prompts = list(prompts)
        return cls(
            numpy.array([prompt.number for prompt in prompts], numpy.int64),
            Lists.of([prompt.prompt_ids for prompt in prompts]),
            ListsOfLists.of([prompt.responses for prompt in prompts]),
            ListsOfLists.of([prompt.examples for prompt in prompts]),
            ListsOfLists.of([[list(chain(*spans)) for spans in prompt.spans or ()] for prompt in prompts]),
            *(Lists.of([getattr(prompt, name) or [] for prompt in prompts], "d") for name in MISSING_NUMBERS),
        )

    @classmethod
    def of_arrow(cls, batch: pyarrow.RecordBatch) -> "Columns":
        """Columns as views of an Arrow batch."""
        numbers, prompts, *nested = batch.columns
        nested, optional = nested[:3], nested[3:]
        lists = [*map(ListsOfLists.of_arrow, nested), *map(Lists.of_arrow, optional)]
        return cls(numbers.to_numpy(), Lists.of_arrow(prompts), *lists)

    def as_arrow(self) -> pyarrow.RecordBatch:
        """The columns as an Arrow batch."""
        columns: tuple = self[1:]
        lists = [column.as_arrow(kind) for column, kind in zip(columns, SCHEMA.types[1:], strict=True)]
        return pyarrow.RecordBatch.from_arrays([pyarrow.array(self.numbers), *lists], schema=SCHEMA)

    @property
    def num_responses(self) -> int:
        """R."""
        return int(self.responses.first[-1])

    @property
    def num_examples(self) -> numpy.ndarray:
        """Examples of each prompt; its responses where each of them is one: [N] int32."""
        counts = self.examples.counts
        return numpy.where(counts, counts, self.responses.counts).astype(numpy.int32)

    @property
    def num_tokens(self) -> numpy.ndarray:
        """Tokens of each prompt with all its responses: [N]."""
        return self.prompts.lengths + numpy.diff(self.responses.lists.offsets[self.responses.first])

    @property
    def prompt_hashes(self) -> numpy.ndarray:
        """A hash of each prompt's token ids; of one token at most, with those of the text that follows: [N] uint64."""
        hashes = self.prompts.hashes
        # Texts without a prompt share a beginning-of-sequence token at most.
        for k in numpy.flatnonzero(self.prompts.lengths <= 1):
            start, end = self.responses.lists.offsets[self.responses.first[k] :][:2]
            text = numpy.ascontiguousarray(self.responses.lists.values[start:end], numpy.int32)
            hashes[k] = xxhash.xxh3_64_intdigest(text.tobytes(), seed=int(hashes[k]))
        return hashes

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        rows = numpy.repeat(self.prompts.lengths, self.responses.counts) + self.responses.lists.lengths
        return int(rows.max(initial=0))

    def prompt(self, k: int, source: str, first_row: int) -> TokenizedPrompt:
        """The k-th prompt; `first_row` is that of the batch's first response."""
        number = int(self.numbers[k])
        # Most data has none, and one look at all is faster than one at each prompt.
        spans = self.spans.at(k) if len(self.spans.lists.offsets) > 1 else ()
        numbers = {name: column for name in MISSING_NUMBERS if len((column := getattr(self, name)).values)}
        return TokenizedPrompt(
            self.prompts.at(k),
            self.responses.at(k),
            [tuple(members) for members in self.examples.at(k)],
            f"{source} {number}",
            number,
            first_row + int(self.responses.first[k]),
            [list(zip(cuts[::2], cuts[1::2], strict=True)) for cuts in spans] or None,
            **{name: column.at(k) or None for name, column in numbers.items()},
        )


class ContentHash:
    """A hash of the token ids and examples of prompts, independent of batches, numbers, names and files.

    What only some data has (spans, weights, margins, labels, examples that are no pairs) is hashed only where it is present, so
    that the hashes of pairs and of SFT targets stay what they were before.
    """

    # Counts, then ids, of prompts, responses and examples.
    REQUIRED = 7

    def __init__(self):
        self._required = [xxhash.xxh3_128() for _ in range(self.REQUIRED)]
        self._optional: dict[str, xxhash.xxh3_128] = {}
        self._present: set[str] = set()

    def update(self, columns: Columns) -> None:
        """Add a batch."""
        prompts, responses, examples, spans = columns.prompts, columns.responses, columns.examples, columns.spans
        members = numpy.diff(examples.lists.offsets[examples.first])
        counts = prompts.lengths, responses.counts, responses.lists.lengths, members
        ids = prompts.values, responses.lists.values, examples.lists.values
        for digest, part in zip(self._required, (*counts, *ids), strict=True):
            digest.update(numpy.ascontiguousarray(part, numpy.int32))
        sizes = examples.lists.lengths
        self._update_optional("sizes", (sizes != 2).any(), sizes)
        self._update_optional("spans", len(spans.lists.lengths), spans.counts, spans.lists.lengths, spans.lists.values)
        for name in MISSING_NUMBERS:
            column = getattr(columns, name)
            self._update_optional(name, len(column.values), column.lengths, column.values)

    def _update_optional(self, name: str, present: int | bool, *parts: numpy.ndarray) -> None:
        if present:
            self._present.add(name)
        for number, part in enumerate(parts):
            self._optional.setdefault(f"{name} {number}", xxhash.xxh3_128()).update(numpy.ascontiguousarray(part))

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        optional = [f"{key} {of.hexdigest()}" for key, of in self._optional.items() if key.split()[0] in self._present]
        return xxhash.xxh3_128_hexdigest("".join([*(of.hexdigest() for of in self._required), *optional]).encode())


def content_hash(batches: Iterable[Columns]) -> str:
    """The `ContentHash` of batches."""
    digest = ContentHash()
    for columns in batches:
        digest.update(columns)
    return digest.hexdigest()
