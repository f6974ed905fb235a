"""Context parallelism: which tokens of a pack each process of a context group computes.

The N processes of a group have the same pack of T tokens. Where its trees can be divided about equally, each process gets whole
trees, and needs nothing of the others. Otherwise the packed row is padded and cut into 2N slices, of which process r gets the
slices r and 2N - 1 - r: of one long row all processes then compute equally many scores.

Shapes: N processes, C tokens of each, T = N * C packed tokens with padding, S scored tokens, K the most of one process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from preference_training.batching.tries import BLOCK, Branch, Trie, TrieLayout, block_visibility, int32
from preference_training.core.process_group import WHOLE_PACKS

# Whole trees may leave the fullest process with so many times the tokens that slices would give it: gathering keys and values
# costs about as much.
MAX_IMBALANCE = 1.1


class Piece(NamedTuple):
    """The part of a branch that lies in one slice: `own` packed tokens from `start` on, at positions from `shared` on.

    before: the index of the piece whose sequence it continues after `shared` tokens, -1 for none.
    """

    before: int
    shared: int
    start: int
    own: int


@dataclass(frozen=True)
class Cut:
    """A pack's tokens over the processes of a group.

    index: [N, C], the packed indices of each process's tokens; padding has indices from the pack's tokens on.
    slice_length: None where each process has whole trees.
    """

    trie: Trie
    index: NDArray[numpy.int64]
    slice_length: int | None

    @classmethod
    def of(cls, trie: Trie, parts: int, unit: int) -> "Cut":
        """Cut a trie without padding; the tokens of each process are a multiple of twice `unit`, those of a slice of `unit`."""
        total = trie.num_tokens
        length = _whole_units(-(-total // (2 * parts)), unit)
        trees = _divided(_trees(trie), parts)
        fullest = _whole_units(max(sum(end - start for start, end in own) for own in trees), 2 * unit)
        if fullest <= MAX_IMBALANCE * 2 * length:
            return cls(trie, _padded(trees, fullest, total), None)
        slices = numpy.arange(2 * parts * length).reshape(2 * parts, length)
        index = numpy.concatenate([slices[:parts], slices[: parts - 1 : -1]], axis=1)
        return cls(trie.padded(2 * parts * length), index, length)

    def layout(self, part: int, device: torch.device) -> TrieLayout:
        """The layout that a process's attention reads."""
        if self.slice_length is not None:
            return SlicedLayout(self, part, device)
        return TrieLayout(_sub_trie(self.trie, self.index[part]), device)

    @cached_property
    def places(self) -> NDArray[numpy.int64]:
        """The place of each packed token among all processes' tokens, process by process: [T]."""
        found = numpy.empty(int(self.index.max()) + 1, numpy.int64)
        found[self.index.ravel()] = numpy.arange(self.index.size)
        return found


def _whole_units(number: int, unit: int) -> int:
    """A number, at least one, rounded up to a multiple of `unit`."""
    return -(-max(number, 1) // unit) * unit


def _trees(trie: Trie) -> list[tuple[int, int]]:
    """First packed token and end of each tree."""
    starts = [branch.start for branch in trie.branches if branch.parent < 0]
    return list(pairwise([*starts, trie.num_tokens]))


def _divided(trees: Sequence[tuple[int, int]], parts: int) -> list[list[tuple[int, int]]]:
    """The trees of each process, in packed order: longest first, each to the process with the fewest tokens."""
    loads = [0] * parts
    found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for start, end in sorted(trees, key=lambda tree: tree[0] - tree[1]):
        lightest = loads.index(min(loads))
        loads[lightest] += end - start
        found[lightest].append((start, end))
    return [sorted(own) for own in found]


def _padded(trees: Sequence[Sequence[tuple[int, int]]], length: int, total: int) -> NDArray[numpy.int64]:
    """The packed indices of each process's trees, padded with indices from `total` on: [N, length]."""
    rows, padding = [], total
    for own in trees:
        row = numpy.concatenate([numpy.arange(start, end) for start, end in own] or [numpy.arange(0)])
        missing = length - len(row)
        rows.append(numpy.concatenate([row, numpy.arange(padding, padding + missing)]))
        padding += missing
    return numpy.stack(rows).astype(numpy.int64)


def _sub_trie(trie: Trie, index: NDArray[numpy.int64]) -> Trie:
    """The trie of whole trees, at consecutive indices, and padding."""
    places = {int(packed): place for place, packed in enumerate(index)}
    numbers: dict[int, int] = {-1: -1}
    branches: list[Branch] = []
    for number, branch in enumerate(trie.branches):
        if branch.start in places:
            numbers[number] = len(branches)
            branches.append(Branch(numbers[branch.parent], branch.shared, places[branch.start], branch.own))
    return Trie(tuple(branches), ()).padded(len(index))


# ---- the layout of slices --------------------------------------------------------------------------------------------------


class SlicedLayout(TrieLayout):
    """The layout of a process's slices: its queries are its own C tokens, its keys those of all processes, process by process.

    context: the processes that keys and values are gathered over; set by the model that processes the batch.
    """

    def __init__(self, cut: Cut, part: int, device: torch.device, tensors: dict[str, Tensor] | None = None):
        super().__init__(cut.trie, device, tensors)
        self.cut, self.part = cut, part
        self.context = WHOLE_PACKS

    def on(self, device: torch.device) -> TrieLayout:
        """The layout itself: a sharded model is on one device."""
        return self

    def moved(self, device: torch.device, tensors: dict[str, Tensor]) -> "SlicedLayout":
        """The layout on a device, with its tensors there."""
        return SlicedLayout(self.cut, self.part, device, tensors)

    @property
    def query_index(self) -> Tensor:
        """The packed index of each query: [C] int32."""
        if "query_index" not in self.tensors:
            self.tensors["query_index"] = int32(self.cut.index[self.part], self.device)
        return self.tensors["query_index"]

    @property
    def key_index(self) -> Tensor:
        """The packed index of each key: [T] int32."""
        if "key_index" not in self.tensors:
            self.tensors["key_index"] = int32(self.cut.index.ravel(), self.device)
        return self.tensors["key_index"]

    @property
    def query_positions(self) -> Tensor:
        """Position of each query's token in its sequence: [C] int32."""
        return self.positions[self.query_index]

    def complete(self) -> TrieLayout:
        """The layout with everything computed that its process's models have asked for so far."""
        _ = self.query_index, self.key_index
        return super().complete()

    def mask_rule(self, window: int | None, chunk: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """Whether the query at an index of this process's tokens sees the key at an index of all processes'."""
        rule, queries, keys = super().mask_rule(window, chunk), self.query_index, self.key_index

        def may_attend(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            return rule(batch, head, queries[query], keys[key])

        return may_attend

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of queries and keys."""
        return self.cut.index.shape[1], self.cut.index.size

    def visibility(self, window: int | None, chunk: int | None) -> tuple[NDArray[numpy.bool_], NDArray[numpy.bool_]]:
        """`block_visibility` of this process's blocks of queries and all blocks of keys."""
        rows, columns = (index[::BLOCK] // BLOCK for index in (self.cut.index[self.part], self.cut.index.ravel()))
        some, full = block_visibility(self.trie, window, chunk)
        return some[rows][:, columns], full[rows][:, columns]

    # ---- branch by branch -----------------------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> list[Piece]:
        """The parts of all branches that lie in one slice each, in packed order."""
        length = self.cut.slice_length or self.trie.num_tokens
        found: list[Piece] = []
        of_branch: list[range] = []
        for branch in self.trie.branches:
            first, end = len(found), branch.start + branch.own
            before = -1
            if branch.shared:
                before = next(k for k in of_branch[branch.parent] if found[k].shared + found[k].own >= branch.shared)
            inside = range((branch.start // length + 1) * length, end, length)
            for start, stop in pairwise([branch.start, *inside, end]):
                found.append(Piece(before, branch.shared + start - branch.start, start, stop - start))
                before = len(found) - 1
            of_branch.append(range(first, len(found)))
        return found

    @cached_property
    def gathered_pieces(self) -> list[int]:
        """The indices of all pieces, process by process."""
        places = self.cut.places
        return sorted(range(len(self.pieces)), key=lambda number: places[self.pieces[number].start])

    @cached_property
    def own_pieces(self) -> list[int]:
        """The indices of this process's pieces, in the order of its tokens."""
        size = self.cut.index.shape[1]
        return [number for number in self.gathered_pieces if self.cut.places[self.pieces[number].start] // size == self.part]

    def sequence(self, number: int) -> list[tuple[int, int]]:
        """The sequence of a piece up to its end: the pieces that it consists of, and how many tokens of each."""
        piece = self.pieces[number]
        found, left = [(number, piece.own)], piece.shared
        while left:
            number, piece = piece.before, self.pieces[piece.before]
            count = min(piece.own, left - piece.shared)
            if count > 0:
                found.append((number, count))
                left = piece.shared
        return found[::-1]


# ---- a process's part of a pack --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackPart:
    """What one process of a context group computes of a pack.

    input_ids, position_ids: [C]. index: [C], the packed index of each token; padding has indices from the pack's tokens on.
    scored_ids, predicted_at: [K], its scored tokens, padded with a token that counts for nothing,
    and the index among its tokens whose output predicts each. scored_places: [S], the place of each of the pack's scored
    tokens among those of all processes, process by process. last_tokens, last_places: the same of the responses' last tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    index: Tensor
    scored_ids: Tensor
    predicted_at: Tensor
    scored_places: Tensor
    last_tokens: Tensor
    last_places: Tensor
    layout: TrieLayout

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, without those of its layout."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_layout(self, tensors: dict[str, Tensor], device: torch.device) -> "PackPart":
        """The part on a device, where `tensors` has its tensors and those of its layout."""
        own = self.tensors.keys()
        layout = self.layout.moved(device, {name: value for name, value in tensors.items() if name not in own})
        return replace(self, layout=layout, **{name: value for name, value in tensors.items() if name in own})


def part_of_pack(pack: Any, part: int, parts: int, unit: int) -> PackPart:
    """Part `part` of `parts` of a PackedBatch in the memory of the host; see `Cut.of` for `unit`."""
    total = len(pack.input_ids) - pack.num_padding
    branches = tuple(branch for branch in pack.trie.branches if branch.start < total)
    cut = Cut.of(Trie(branches, pack.trie.ends), parts, unit)
    scored, last = (_locate(cut, packed.numpy(), part) for packed in (pack.predicted_at, pack.last_tokens))
    return PackPart(
        input_ids=_chosen(pack.input_ids[:total], cut.index[part]),
        position_ids=_chosen(pack.position_ids[:total], cut.index[part]),
        index=torch.from_numpy(cut.index[part]),
        scored_ids=pack.scored_ids[torch.from_numpy(scored.chosen)],
        predicted_at=torch.from_numpy(scored.inner),
        scored_places=torch.from_numpy(scored.places),
        last_tokens=torch.from_numpy(last.inner),
        last_places=torch.from_numpy(last.places),
        layout=cut.layout(part, torch.device("cpu")),
    )


def _chosen(values: Tensor, index: NDArray[numpy.int64]) -> Tensor:
    """Values of packed tokens [T] at some indices [C], and 0 at those of padding."""
    values = values.new_zeros(int(index.max()) + 1 + len(values)).index_copy(0, torch.arange(len(values)), values)
    return values[torch.from_numpy(index)]


class _Located(NamedTuple):
    """Where some packed tokens [S] are computed.

    inner: [K], the indices among a process's tokens of those that are its own. chosen: [K], which of the S these are. Both are
    padded with 0 to the most of any process. places: [S], the place of each among the N * K of all processes.
    """

    inner: NDArray[numpy.int64]
    chosen: NDArray[numpy.int64]
    places: NDArray[numpy.int64]


def _locate(cut: Cut, packed: NDArray[numpy.int64], part: int) -> _Located:
    parts, size = cut.index.shape
    owners, inner = numpy.divmod(cut.places[packed], size)
    counts = numpy.bincount(owners, minlength=parts)
    most = max(int(counts.max()), 1)
    ordinals = numpy.empty(len(packed), numpy.int64)
    ordinals[numpy.argsort(owners, kind="stable")] = numpy.arange(len(packed)) - numpy.repeat(
        numpy.cumsum(counts) - counts, counts
    )
    own = numpy.flatnonzero(owners == part)
    missing = (0, most - len(own))
    return _Located(numpy.pad(inner[own], missing), numpy.pad(own, missing), owners * most + ordinals)
