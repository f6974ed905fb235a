"""A trie's attention in parts, each one call of a kernel for rows of several lengths (flash attention's "varlen").

In packed order every branch is contiguous, and so are all branches below it. Its tokens see their own branch causally, and all
tokens that they share with each branch above it. The first part is the causal one of all branches. Part d has a row for each
branch d levels down: its queries are that branch and all below it, its keys what they share with the branch's parent. Every
query is in one row of a part at most, and sees each of its tokens in exactly one part.

Shapes: T packed tokens, R rows of a part, Q and K the queries and keys of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from preference_training.batching.tries import Branch


@dataclass(frozen=True)
class AttentionPart:
    """Rows of queries, each of which attends to the row's keys: causally in the part of all branches, else to all of them.

    queries, keys: [Q], [K], packed indices; None for all tokens. query_starts, key_starts: [R + 1], where each row begins, and
    the end. longest_query, longest_key: tokens of the longest row. repeats_keys: whether a key is in several rows.
    """

    queries: Any
    keys: Any
    query_starts: Any
    key_starts: Any
    longest_query: int
    longest_key: int
    repeats_keys: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether it is the part in which every branch attends to itself."""
        return self.queries is None

    @property
    def arrays(self) -> dict[str, Any]:
        """What is different on each device, by the names of the fields."""
        names = ("query_starts",) if self.is_causal else ("queries", "keys", "query_starts", "key_starts")
        return {name: getattr(self, name) for name in names}

    def on_device(self, tensors: dict[str, Tensor]) -> "AttentionPart":
        """The part with its arrays as tensors."""
        starts = tensors["query_starts"]
        given = tensors.get("queries"), tensors.get("keys"), starts, tensors.get("key_starts", starts)
        return AttentionPart(*given, self.longest_query, self.longest_key, self.repeats_keys)


class _Row(NamedTuple):
    """Packed queries [start, stop) and packed keys [first, last); parent: the branch of the keys."""

    start: int
    stop: int
    first: int
    last: int
    parent: int


def attention_parts(branches: "Sequence[Branch]") -> list[AttentionPart]:
    """The parts of a trie of some branches: the causal one, then one for each level of them."""
    starts = _offsets(numpy.array([branch.own for branch in branches]))
    longest = max(branch.own for branch in branches)
    return [AttentionPart(None, None, starts, starts, longest, longest), *map(_part, _levels(branches))]


def _levels(branches: "Sequence[Branch]") -> list[list[_Row]]:
    """The rows of each level, in packed order."""
    stops = [branch.start + branch.own for branch in branches]
    for number in reversed(range(len(branches))):
        if (parent := branches[number].parent) >= 0:
            stops[parent] = max(stops[parent], stops[number])
    levels: list[list[_Row]] = []
    depths: list[int] = []
    for branch, stop in zip(branches, stops, strict=True):
        depth = depths[branch.parent] + 1 if branch.parent >= 0 else 0
        depths.append(depth)
        if not depth:
            continue
        if depth > len(levels):
            levels.append([])
        above = branches[branch.parent]
        row = _Row(branch.start, stop, above.start, above.start + branch.shared - above.shared, branch.parent)
        rows = levels[depth - 1]
        if rows and rows[-1][1:] == (row.start, *row[2:]):
            # The next branch that shares the same tokens: one row, whose keys are read once.
            row = rows.pop()._replace(stop=stop)
        rows.append(row)
    return levels


def _part(rows: list[_Row]) -> AttentionPart:
    starts, stops, firsts, lasts, parents = numpy.array(rows, numpy.int64).T
    queries, keys = stops - starts, lasts - firsts
    found = _ranges(starts, queries), _ranges(firsts, keys), _offsets(queries), _offsets(keys)
    return AttentionPart(*found, int(queries.max()), int(keys.max()), len(set(parents.tolist())) < len(rows))


def _offsets(lengths: NDArray[numpy.int64]) -> NDArray[numpy.int32]:
    """Where each of some adjacent ranges begins, and the end."""
    return numpy.concatenate([[0], lengths.cumsum()]).astype(numpy.int32)


def _ranges(starts: NDArray[numpy.int64], lengths: NDArray[numpy.int64]) -> NDArray[numpy.int32]:
    """The numbers from each start on, as many as its length."""
    offsets = _offsets(lengths)
    return (numpy.arange(offsets[-1]) + numpy.repeat(starts - offsets[:-1], lengths)).astype(numpy.int32)
