"""Tokenized prompts in columns: written to disk as an Arrow file, and read by mapping it into memory.

A table is a sequence of `TokenizedPrompt`s, which are built on access. Of millions of prompts only the numbers of examples are
in memory; everything else stays in the file, whose pages are loaded on demand. Shapes: N prompts.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path

import numpy
import pyarrow
import xxhash

from preference_training.data.columns import SCHEMA, Columns, ContentHash, content_hash
from preference_training.data.tokenization import TokenizedPrompt

# Prompts of one batch of a file.
PROMPTS_PER_BATCH = 4096
# After so many reads the mapped pages are released, so that random access does not load the whole file.
READS_BEFORE_RELEASE = 256


class OtherColumnsError(ValueError):
    """A complete file with other columns than today's."""


@dataclass(frozen=True)
class TablePart:
    """The prompts of one data set. source: the prefix of their names in messages. weight: how often an epoch visits each.

    fingerprint: a hash of all token ids and examples. name: of its file, without the suffix.
    """

    source: str
    batches: Sequence[Columns]
    fingerprint: str
    weight: float = 1.0
    mapped: mmap.mmap | None = None
    name: str = ""

    @classmethod
    def of_file(cls, path: Path, source: str, weight: float = 1.0, fingerprint: str | None = None) -> "TablePart":
        """Map a file written by `write_columns`. Raises OSError or ValueError (as Arrow does) where it is incomplete.

        fingerprint: of its content, if known; else it is computed.
        """
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped))
        if not reader.schema.equals(SCHEMA):
            raise OtherColumnsError(f"{path} has other columns")
        batches = [Columns.of_arrow(reader.get_batch(k)) for k in range(reader.num_record_batches)]
        return cls(source, batches, fingerprint or content_hash(batches), weight, mapped, path.stem)

    @property
    def num_prompts(self) -> int:
        """How many prompts it has."""
        return sum(len(columns.numbers) for columns in self.batches)

    @property
    def prompt_hashes(self) -> numpy.ndarray:
        """A hash of each prompt's token ids: [N] uint64. Reads all prompts, but no responses."""
        found = [columns.prompt_hashes for columns in self.batches]
        self.release()
        return numpy.concatenate(found) if found else numpy.zeros(0, numpy.uint64)

    def release(self) -> None:
        """Release the mapped pages; the next access reads them again."""
        if self.mapped is not None and hasattr(self.mapped, "madvise"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def write_columns(file, prompts: Iterable[TokenizedPrompt], digest: ContentHash | None = None) -> int:
    """Write prompts to an open binary file, a batch at a time; returns how many. Adds their content to the digest."""
    prompts, count = iter(prompts), 0
    with pyarrow.ipc.new_file(file, SCHEMA) as writer:
        while batch := list(islice(prompts, PROMPTS_PER_BATCH)):
            columns = Columns.of(batch)
            writer.write_batch(columns.as_arrow())
            count += len(batch)
            if digest is not None:
                digest.update(columns)
    return count


def write_selected(file, part: TablePart, kept: numpy.ndarray) -> None:
    """Write the prompts of a part for which `kept` [N] is true to an open binary file."""
    ends = numpy.cumsum([len(columns.numbers) for columns in part.batches])[:-1]
    chosen = zip(part.batches, numpy.split(kept, ends), strict=True)
    write_batches(file, (columns.as_arrow().filter(pyarrow.array(some)) for columns, some in chosen))
    part.release()


def write_batches(file, batches: Iterable[pyarrow.RecordBatch]) -> None:
    """Write batches of columns to an open binary file."""
    with pyarrow.ipc.new_file(file, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)


class PromptTable(Sequence[TokenizedPrompt]):
    """The prompts of one or more data sets, concatenated. Responses are numbered from `first_row` on."""

    def __init__(self, parts: Sequence[TablePart], first_row: int = 0):
        self.parts = list(parts)
        self.first_row = first_row
        self._batches = [(part, columns) for part in self.parts for columns in part.batches]
        self._starts = [0, *accumulate(len(columns.numbers) for _, columns in self._batches)]
        self._rows = [first_row, *accumulate((c.num_responses for _, c in self._batches), initial=first_row)][1:]
        self._reads = 0
        self._release()

    def _release(self) -> None:
        for part in self.parts:
            part.release()

    @classmethod
    def of(cls, prompts: Iterable[TokenizedPrompt], first_row: int = 0) -> "PromptTable":
        """A table of prompts in memory."""
        columns = Columns.of(prompts)
        return cls([TablePart("prompt", [columns], content_hash([columns]))] if len(columns.numbers) else [], first_row)

    def joined(self, other: "PromptTable") -> "PromptTable":
        """This table's prompts followed by another's, whose responses are numbered after this one's."""
        assert other.first_row == self.first_row + self.num_responses
        return PromptTable([*self.parts, *other.parts], self.first_row)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> TokenizedPrompt:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        part, columns = self._batches[batch]
        self._reads += 1
        if self._reads % READS_BEFORE_RELEASE == 0:
            self._release()
        return columns.prompt(int(index) - self._starts[batch], part.source, self._rows[batch])

    @cached_property
    def num_examples(self) -> numpy.ndarray:
        """How many examples each prompt has: [N] int32."""
        return self._column(lambda columns: columns.num_examples)

    @property
    def num_tokens(self) -> numpy.ndarray:
        """How many tokens each prompt has with all its responses: [N] int32."""
        return self._column(lambda columns: columns.num_tokens)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with one of its responses; 0 without any prompt."""
        longest = [columns.longest_row for _, columns in self._batches]
        self._release()
        return max(longest, default=0)

    @property
    def largest_id(self) -> int:
        """The largest token id; -1 without any."""
        ids = (ids for _, columns in self._batches for ids in (columns.prompts.values, columns.responses.lists.values))
        largest = max((int(some.max()) for some in ids if len(some)), default=-1)
        self._release()
        return largest

    def _column(self, column) -> numpy.ndarray:
        values = [column(columns) for _, columns in self._batches]
        self._release()
        return numpy.concatenate(values).astype(numpy.int32) if values else numpy.zeros(0, numpy.int32)

    @property
    def num_responses(self) -> int:
        """How many responses all prompts have in total."""
        return self._rows[-1] - self.first_row

    @property
    def prompt_hashes(self) -> numpy.ndarray:
        """A hash of each prompt's token ids: [N] uint64."""
        return numpy.concatenate([numpy.zeros(0, numpy.uint64), *(part.prompt_hashes for part in self.parts)])

    @property
    def fingerprint(self) -> str:
        """A hash of all token ids, examples and response numbers."""
        return xxhash.xxh3_128_hexdigest(repr(([part.fingerprint for part in self.parts], self.first_row)).encode())

    def prompt_index(self, row: int) -> int:
        """The index of the prompt to which response number `row` belongs."""
        batch = bisect_right(self._rows, row) - 1
        first = self._batches[batch][1].responses.first
        return self._starts[batch] + int(numpy.searchsorted(first, row - self._rows[batch], side="right")) - 1


@dataclass(frozen=True)
class Selection:
    """Some prompts of a table, in the order of `indices` [N]."""

    table: PromptTable
    indices: numpy.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[TokenizedPrompt]:
        return (self.table[int(index)] for index in self.indices)

    def joined(self, other: "Selection") -> "Selection":
        """These prompts, then those of another table."""
        return Selection(self.table.joined(other.table), numpy.concatenate([self.indices, other.indices + len(self.table)]))

    def by_length(self) -> "Selection":
        """The same prompts, short ones first."""
        lengths = self.table.num_tokens[self.indices]
        return Selection(self.table, self.indices[numpy.argsort(lengths, kind="stable")])

    @property
    def fingerprint(self) -> str:
        """A hash of the prompts and their response numbers."""
        chosen = numpy.sort(self.indices).astype(numpy.int64)
        return xxhash.xxh3_128_hexdigest(self.table.fingerprint.encode() + chosen.tobytes())


def shuffled(size: int, seed: str) -> numpy.ndarray:
    """The numbers below `size` in an order that depends only on `seed`: [size] int.

    A stable sort of raw generator output, which numpy guarantees to stay the same; it does not guarantee that of its shuffle.
    """
    words = numpy.random.PCG64(int(xxhash.xxh3_64_hexdigest(seed.encode()), 16)).random_raw((size + 1) // 2)
    return numpy.argsort(words.view(numpy.uint32)[:size], kind="stable")
