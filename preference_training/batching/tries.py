"""Tries of token sequences: what begins alike is stored, and computed, once.

A trie is packed depth first. A *branch* is a run of packed tokens: the tokens that one sequence does not share with any before
it. It continues its parent branch after the tokens that both share; the first branch of a tree has no parent. Sequences that
share too little to pay for it begin trees of their own.

Shapes: T packed tokens, N sequences.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from preference_training.batching.attention_parts import AttentionPart, attention_parts

# The shortest run of tokens that is worth sharing between sequences of different prompts. Shorter ones cost a branch more
# attention than they save; see benchmarks/tries.py.
MIN_SHARED = 16
# The block size of FlexAttention's masks. Unit: tokens.
BLOCK = 128

Tokens = list[int]


@dataclass(frozen=True)
class Branch:
    """The `own` tokens of a sequence from packed index `start` on, after the `shared` first ones of branch `parent`.

    parent: index of an earlier branch, -1 for none (then shared is 0).
    """

    parent: int
    shared: int
    start: int
    own: int

    @property
    def length(self) -> int:
        """Tokens from the beginning of the sequence to the end of the branch."""
        return self.shared + self.own


@dataclass(frozen=True)
class Trie:
    """The branches of packed sequences, in packed order, and where each sequence ends.

    ends: [N], of each sequence its last branch and its length in tokens.
    """

    branches: tuple[Branch, ...]
    ends: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Packed tokens."""
        return sum(branch.own for branch in self.branches)

    def padded(self, length: int) -> "Trie":
        """The trie with one more branch of padding, which no sequence reads, so that it has `length` packed tokens."""
        missing = length - self.num_tokens
        return Trie((*self.branches, Branch(-1, 0, self.num_tokens, missing)), self.ends) if missing else self

    @cached_property
    def paths(self) -> list[NDArray[numpy.int64]]:
        """The packed indices of each branch's tokens from the beginning of its sequence on."""
        found: list[NDArray[numpy.int64]] = []
        for branch in self.branches:
            own = numpy.arange(branch.start, branch.start + branch.own)
            found.append(numpy.concatenate([found[branch.parent][: branch.shared], own]) if branch.shared else own)
        return found

    def path(self, number: int) -> NDArray[numpy.int64]:
        """The packed indices of a sequence's tokens."""
        branch, length = self.ends[number]
        return self.paths[branch][:length]

    @cached_property
    def positions(self) -> NDArray[numpy.int64]:
        """The position of each packed token in its sequence: [T]."""
        return numpy.concatenate([numpy.arange(branch.shared, branch.length) for branch in self.branches])

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(branch.length for branch in self.branches)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, padding aside."""
        return max(length for _, length in self.ends)

    @cached_property
    def depths(self) -> list[int]:
        """How many branches are above each branch."""
        found: list[int] = []
        for branch in self.branches:
            found.append(found[branch.parent] + 1 if branch.parent >= 0 else 0)
        return found

    @property
    def predecessors(self) -> NDArray[numpy.int64]:
        """The packed index of the token before each token: [T]; -1 for the first of a sequence."""
        before = numpy.arange(-1, self.num_tokens - 1)
        for branch in self.branches:
            before[branch.start] = self.paths[branch.parent][branch.shared - 1] if branch.shared else -1
        return before

    @cached_property
    def subtree_ends(self) -> NDArray[numpy.int32]:
        """One past the last packed token below each token: [T]. A query sees a key iff key <= query < subtree_ends[key]."""
        total = self.num_tokens
        ends = numpy.empty(total, numpy.int32)
        # By position: where the subtree of an earlier token at that position ends.
        next_end = numpy.full(max(branch.length for branch in self.branches), total, numpy.int32)
        for branch in reversed(self.branches):
            ends[branch.start : branch.start + branch.own] = next_end[branch.shared : branch.length]
            next_end[branch.shared :] = branch.start
        return ends


def build_trie(sequences: Sequence[Tokens], owners: Sequence[Hashable]) -> tuple[Trie, list[int]]:
    """The trie of some sequences, none of which is empty, and its packed token ids [T].

    owners: [N], what each sequence belongs to; those of one owner share whatever they can, others from MIN_SHARED tokens on.
    """
    branches: list[Branch] = []
    ends: list[tuple[int, int]] = [(0, 0)] * len(sequences)
    ids: list[int] = []
    for tree in trees(sequences, owners):
        before, last = None, -1
        for number in tree:
            sequence = sequences[number]
            shared = 0 if before is None else common_prefix(before, sequence)
            if len(sequence) > shared or before is None:
                parent = last
                while parent >= 0 and branches[parent].shared >= shared:
                    parent = branches[parent].parent
                branches.append(Branch(parent, shared, len(ids), len(sequence) - shared))
                ids += sequence[shared:]
                last = len(branches) - 1
            ends[number] = last, len(sequence)
            before = sequence
    return Trie(tuple(branches), tuple(ends)), ids


def trees(sequences: Sequence[Tokens], owners: Sequence[Hashable]) -> list[list[int]]:
    """The indices of the sequences of each tree, sorted by token ids; trees are in the order of their first sequences."""
    members: list[list[int]] = []
    tree_of: dict[Hashable, int] = {}
    for number, (sequence, owner) in enumerate(zip(sequences, owners, strict=True)):
        keys: list[Hashable] = [(owner,)]
        if len(sequence) >= MIN_SHARED:
            keys.append(tuple(sequence[:MIN_SHARED]))
        known = sorted({tree_of[key] for key in keys if key in tree_of})
        tree = known[0] if known else len(members)
        if not known:
            members.append([])
        members[tree].append(number)
        tree_of |= dict.fromkeys(keys, tree)
        if len(known) > 1:
            # A sequence of one tree's owner begins like those of another tree.
            members[tree] += members[known[1]]
            members[known[1]] = []
            tree_of = {key: tree if value == known[1] else value for key, value in tree_of.items()}
    return [sorted(tree, key=sequences.__getitem__) for tree in members if tree]


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixCounter:
    """Counts the packed tokens of a growing set of sequences; never fewer than their trie has."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sorted: list[Tokens] = []
        self.owners: set[Hashable] = set()

    def add(self, sequence: Tokens, owner: Hashable, prompt_length: int) -> int:
        """Add a sequence that shares at least `prompt_length` tokens with the others of its owner.

        Returns how many of its tokens are shared with those before.
        """
        place = bisect_left(self._sorted, sequence)
        neighbors = self._sorted[max(0, place - 1) : place + 1]
        shared = max((common_prefix(sequence, other) for other in neighbors), default=0)
        if shared < MIN_SHARED:
            shared = prompt_length if owner in self.owners else 0
        self.num_tokens += len(sequence) - shared
        self._sorted.insert(place, sequence)
        self.owners.add(owner)
        return shared


# What hides tokens from each other in layers of one kind: their window and their chunk size.
MaskKind = tuple[int | None, int | None]


class TrieLayout:
    """A trie as the attention layers need it; `seen`: whether a layer has used it.

    by_branches: attention is computed branch by branch, in the order of plain sequences; else all at once, under a block mask.
    tensors: all that was computed of it, [T] or [1, 1, blocks, ...], int32, by name.
    """

    # The kinds that layers of this process have asked for, and whether any has asked for parts: later layouts have them ready.
    kinds: ClassVar[set[MaskKind]] = {(None, None)}
    wants_parts: ClassVar[bool] = False

    def __init__(self, trie: Trie, device: torch.device, tensors: dict[str, Tensor] | None = None):
        self.trie = trie
        self.device = device
        self.seen = False
        self.by_branches = device.type != "cuda"
        self.tensors = tensors or {}
        self._block_masks: dict[MaskKind, Any] = {}
        self._elsewhere: dict[torch.device, TrieLayout] = {}

    def on(self, device: torch.device) -> "TrieLayout":
        """The layout with its tensors on a device: a model may be split over several, and hooks move only tensors."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = TrieLayout(self.trie, device)
            self._elsewhere[device].by_branches = self.by_branches
        return self._elsewhere[device]

    def moved(self, device: torch.device, tensors: dict[str, Tensor]) -> "TrieLayout":
        """The layout on a device, with its tensors there."""
        return TrieLayout(self.trie, device, tensors)

    def complete(self) -> "TrieLayout":
        """The layout with everything computed that its process's models have asked for so far."""
        _ = self.subtree_ends, self.positions
        for window, chunk in tuple(self.kinds):
            self._blocks(window, chunk)
        if self.wants_parts:
            _ = self.parts
        return self

    @cached_property
    def parts(self) -> list[AttentionPart]:
        """The trie's attention in parts, as `attention_parts` has them, with tensors."""
        TrieLayout.wants_parts = True
        found = []
        for number, part in enumerate(attention_parts(self.trie.branches)):
            for name, values in part.arrays.items():
                if f"part {number} {name}" not in self.tensors:
                    self.tensors[f"part {number} {name}"] = int32(values, self.device)
            found.append(part.on_device({name: self.tensors[f"part {number} {name}"] for name in part.arrays}))
        return found

    @property
    def subtree_ends(self) -> Tensor:
        """One past the last packed token below each token: [T] int32."""
        if "subtree_ends" not in self.tensors:
            self.tensors["subtree_ends"] = int32(self.trie.subtree_ends, self.device)
        return self.tensors["subtree_ends"]

    @property
    def positions(self) -> Tensor:
        """Position of each packed token in its sequence: [T] int32."""
        if "positions" not in self.tensors:
            self.tensors["positions"] = int32(self.trie.positions, self.device)
        return self.tensors["positions"]

    @property
    def query_positions(self) -> Tensor:
        """Position of each query's token in its sequence: int32, of as many as there are queries."""
        return self.positions

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of queries and keys."""
        return self.trie.num_tokens, self.trie.num_tokens

    def may_attend(self, query: Tensor, key: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
        """Whether the packed token at `query` attends to that at `key` (integer tensors that broadcast).

        It attends to the tokens of its own sequence up to itself, less than `window` positions back, in the same `chunk`.
        """
        return self.mask_rule(window, chunk)(None, None, query, key)

    def mask_rule(self, window: int | None, chunk: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """`may_attend` in FlexAttention's form, a function of batch, head, query and key.

        It refers to tensors only: compiled code cannot follow a property.
        """
        ends, positions = self.subtree_ends, self.positions

        def may_attend(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
            visible = (key <= query) & (query < ends[key])
            if window is not None:
                visible = visible & (positions[query] - positions[key] < window)
            if chunk is not None:
                visible = visible & (positions[query] // chunk == positions[key] // chunk)
            return visible

        return may_attend

    def block_mask(self, window: int | None = None, chunk: int | None = None) -> Any:
        """FlexAttention's block mask, built once for all layers with the same window and chunk."""
        if (window, chunk) not in self._block_masks:
            self.kinds.add((window, chunk))
            self._block_masks[window, chunk] = self._block_mask(window, chunk)
        return self._block_masks[window, chunk]

    def _block_mask(self, window: int | None, chunk: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        rule = self.mask_rule(window, chunk)
        return BlockMask.from_kv_blocks(*self._blocks(window, chunk), BLOCK, rule, seq_lengths=self.lengths)

    def visibility(self, window: int | None, chunk: int | None) -> tuple[NDArray[numpy.bool_], NDArray[numpy.bool_]]:
        """`block_visibility` of the blocks of queries and keys."""
        return block_visibility(self.trie, window, chunk)

    def _blocks(self, window: int | None, chunk: int | None) -> list[Tensor]:
        """Numbers and indices of the partly, and of the wholly visible key blocks of each query block."""
        names = [f"{what} {window} {chunk}" for what in ("partial counts", "partial indices", "full counts", "full indices")]
        if names[0] not in self.tensors:
            some, full = self.visibility(window, chunk)
            found = [values for blocks in (some & ~full, full) for values in _counts_and_indices(blocks)]
            for name, values in zip(names, found, strict=True):
                self.tensors[name] = int32(values, self.device)
        return [self.tensors[name] for name in names]


def int32(values: NDArray[Any], device: torch.device) -> Tensor:
    """Whole numbers as a tensor of int32 on a device."""
    return torch.from_numpy(values.astype(numpy.int32)).to(device)


def _counts_and_indices(blocks: NDArray[numpy.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """How many blocks of each row are visible, and all blocks of a row, the visible ones first, in order: each [1, 1, ...]."""
    return blocks.sum(1)[None, None], numpy.argsort(~blocks, axis=1, kind="stable")[None, None]


def block_visibility(trie: Trie, window: int | None, chunk: int | None) -> tuple[NDArray[numpy.bool_], NDArray[numpy.bool_]]:
    """Whether some query of a block may see some key of another, and whether all see all: two [blocks, blocks] of query, key.

    From the first and last of each block's tokens, positions and subtree ends, never from all pairs of tokens. "Some" may be
    true where windows or chunks leave nothing, which costs time but changes no result.
    """
    total = trie.num_tokens
    starts = numpy.arange(0, total, BLOCK)
    lasts = numpy.minimum(starts + BLOCK, total) - 1
    ends, positions = trie.subtree_ends, trie.positions
    first_end, last_end = numpy.minimum.reduceat(ends, starts), numpy.maximum.reduceat(ends, starts)
    low, high = numpy.minimum.reduceat(positions, starts), numpy.maximum.reduceat(positions, starts)
    query, key = (slice(None), None), (None, slice(None))
    later = starts[query] > starts[key]
    some = (starts[query] == starts[key]) | (later & (starts[query] < last_end[key]))
    full = later & (lasts[query] < first_end[key])
    if lasts[-1] - starts[-1] + 1 < BLOCK:
        # The kernel skips the mask in full blocks, and the last block of keys or queries is not full of tokens.
        full[-1, :] = full[:, -1] = False
    if window is not None:
        some &= low[query] - high[key] < window
        full &= high[query] - low[key] < window
    if chunk is not None:
        some &= (low[query] // chunk <= high[key] // chunk) & (high[query] // chunk >= low[key] // chunk)
        full &= (low[query] // chunk == high[key] // chunk) & (low[key] // chunk == high[query] // chunk)
    return some, full
