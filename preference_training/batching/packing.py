"""Packed batches: the tries of some examples' sequences, without padding, and what is scored of them.

Shapes: T packed tokens, R responses, E examples of at most M members, S scored tokens, C contributions: a scored token counts
for each of the responses that share it, so C >= S.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import zip_longest
from math import inf
from operator import itemgetter
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from preference_training.batching.parts import PackPart, part_of_pack
from preference_training.batching.staging import StagedTensors
from preference_training.batching.tries import BLOCK, PrefixCounter, Trie, TrieLayout, build_trie, trees
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.base import MISSING_NUMBERS, Examples

# The shortest packed row on a GPU: with one block of attention only, compiled kernels would be compiled once more.
MIN_GPU_LENGTH = 2 * BLOCK


@dataclass(frozen=True)
class PackedBatch:
    """Sequences as a trie, packed without padding: a sequence is a prompt with one of its responses.

    Responses are numbered prompt by prompt, in the order of the examples. All tensors are int64, except those of numbers that
    came with the data.

    input_ids, position_ids: [T]; positions are those of the plain sequence. trie: of R sequences.
    members: [E, M], the response numbers of each example, padded with -1. response_lengths: [R], scored tokens.
    response_rows: [R], the responses' indices among all responses of the run's data. last_tokens: [R], the packed index of each
    response's last token.
    scored_ids: [S], the scored tokens; predicted_at: [S], the packed index whose output predicts each (that of the token before
    it). scored: [C], indices of scored tokens, response by response; scored_responses, scored_positions: [C], the response that
    each counts for, and its position in the sequence.
    places: [E], the indices of its examples among those of the micro-batch, over all ranks.
    sources: [E], for messages. is_filler: padding for ranks that have fewer packs than another; it does not count.
    weights, margins, labels: [E] float32, the numbers of its examples; None if the data has none.
    num_padding: packed tokens at the end that belong to no sequence.
    staged: its tensors and those of its layout as one block of memory, which reaches a GPU in one copy.
    source: the batch in the memory of the host that this one, on a device, was copied from.
    """

    input_ids: Tensor
    position_ids: Tensor
    trie: Trie
    members: Tensor
    response_lengths: Tensor
    response_rows: Tensor
    last_tokens: Tensor
    scored_ids: Tensor
    predicted_at: Tensor
    scored: Tensor
    scored_responses: Tensor
    scored_positions: Tensor
    places: Tensor
    sources: tuple[str, ...]
    is_filler: bool = False
    weights: Tensor | None = None
    margins: Tensor | None = None
    labels: Tensor | None = None
    num_padding: int = 0
    staged: StagedTensors | None = None
    source: "PackedBatch | None" = None

    @property
    def on_host(self) -> "PackedBatch":
        """The batch in the memory of the host, where its numbers are read without waiting for a device."""
        return self.source or self

    @property
    def num_examples(self) -> int:
        """Its examples: pairs, rankings or single responses."""
        return len(self.members)

    @property
    def num_tokens(self) -> int:
        """Packed tokens, each shared one counted once; 0 for a filler."""
        return 0 if self.is_filler else len(self.input_ids) - self.num_padding

    @property
    def num_computed(self) -> int:
        """Packed tokens that this process computes, with padding."""
        part: PackPart | None = self.__dict__.get("own_part")
        return len(self.input_ids if part is None else part.input_ids)

    @property
    def num_row_tokens(self) -> int:
        """Tokens of a row for each member of each example, as computing examples one by one would take; 0 for a filler."""
        lengths = [length for _, length in self.trie.ends]
        return 0 if self.is_filler else sum(lengths[number] for row in self.members.tolist() for number in row if number >= 0)

    @cached_property
    def examples(self) -> Examples:
        """The examples as losses see them; their mean length is that of a whole batch, which a pack does not know."""
        numbers = {"weights": self.weights, "margins": self.margins, "labels": None if self.labels is None else self.labels > 0}
        return Examples(self.members, self.response_lengths, **numbers)

    @cached_property
    def layout(self) -> TrieLayout:
        """The trie as attention needs it, built once for all layers and models that process the batch."""
        return TrieLayout(self.trie, self.input_ids.device)

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        if self.staged is None:
            return replace(self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True)), source=self.on_host)
        found = self.staged.to(device)
        own = {item.name for item in fields(self)}
        batch = replace(self, staged=None, source=self, **{name: tensor for name, tensor in found.items() if name in own})
        layout = {name: tensor for name, tensor in found.items() if name not in own}
        # Where the cached property keeps its value.
        batch.__dict__["layout"] = TrieLayout(self.trie, device, layout)
        return batch

    def part(self, number: int, parts: int) -> PackPart:
        """What process `number` of a context group of `parts` computes, on the batch's device; built once."""
        if "own_part" not in self.__dict__:
            on_gpu = torch.cuda.is_available()
            if self.source is None:
                part = part_of_pack(self, number, parts, BLOCK if on_gpu else 1)
            else:
                part = self.source.part(number, parts)
                if on_gpu:
                    device = self.input_ids.device
                    staged = StagedTensors.of(part.tensors | part.layout.complete().tensors)
                    part = part.with_layout(staged.to(device), device)
            self.__dict__["own_part"] = part
        return self.__dict__["own_part"]

    def for_gpu(self) -> "PackedBatch":
        """The batch padded to whole blocks of attention, and staged: prepared ahead of time for its one copy to a GPU."""
        length = max(MIN_GPU_LENGTH, -(-len(self.input_ids) // BLOCK) * BLOCK)
        missing = length - len(self.input_ids)
        padded = replace(
            self,
            input_ids=pad(self.input_ids, (0, missing)),
            position_ids=torch.cat([self.position_ids, torch.arange(missing)]),
            trie=self.trie.padded(length),
            num_padding=self.num_padding + missing,
        )
        own = {item.name: getattr(padded, item.name) for item in fields(padded)}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return replace(padded, staged=StagedTensors.of(tensors | padded.layout.complete().tensors))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """The batch with each of its tensors changed."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)


# The version of the rules by which examples become packs. Increment it whenever the same examples and budget give other packs:
# log-probs that are cached with those of other packs differ in their last bits.
PACKING_VERSION = 3

# One example: a prompt, and the number of the example in it.
Example = tuple[TokenizedPrompt, int]


def iterate_examples(prompts: Iterable[TokenizedPrompt]) -> Iterator[Example]:
    """Every example of `prompts`; those of one prompt are adjacent."""
    for prompt in prompts:
        for number in range(prompt.num_examples):
            yield prompt, number


def num_scored(prompt: TokenizedPrompt, index: int) -> int:
    """The number of a response's scored tokens."""
    return sum(end - start for start, end in prompt.scored_spans(index))


class _Responses:
    """The responses of some examples, numbered prompt by prompt, each once; and their sequences."""

    def __init__(self, examples: Sequence[Example]):
        used: dict[int, tuple[TokenizedPrompt, dict[int, None]]] = {}
        for prompt, number in examples:
            _, indices = used.setdefault(id(prompt), (prompt, {}))
            indices |= dict.fromkeys(prompt.members(number))
        self.prompts = [(prompt, index) for prompt, indices in used.values() for index in indices]
        self.number = {(id(prompt), index): number for number, (prompt, index) in enumerate(self.prompts)}
        self.owners = [id(prompt) for prompt, _ in self.prompts]
        self.sequences = [prompt.sequences[index] for prompt, index in self.prompts]

    def members(self, examples: Sequence[Example]) -> NDArray[numpy.int64]:
        """The response numbers of each example, padded with -1: [E, M]."""
        found = [[self.number[id(prompt), index] for index in prompt.members(number)] for prompt, number in examples]
        width = max(map(len, found))
        return numpy.array([row + [-1] * (width - len(row)) for row in found], numpy.int64)

    def scored_positions(self) -> list[NDArray[numpy.int64]]:
        """The positions of each response's scored tokens in its sequence."""
        found = []
        for prompt, index in self.prompts:
            start = len(prompt.prompt_ids)
            spans = [numpy.arange(start + first, start + end) for first, end in prompt.scored_spans(index)]
            found.append(numpy.concatenate(spans))
        return found


def pack_examples(examples: Sequence[Example], places: Sequence[int] | None = None) -> PackedBatch:
    """Pack examples; what their sequences share is stored once. `places`: their indices; by default 0, 1, 2, ..."""
    responses = _Responses(examples)
    trie, tokens = build_trie(responses.sequences, responses.owners)
    ids = numpy.array(tokens, numpy.int64)
    positions = responses.scored_positions()
    lengths = numpy.array(list(map(len, positions)))
    targets = numpy.concatenate([trie.path(number)[scored] for number, scored in enumerate(positions)])
    # Each scored token once, in packed order, however many responses share it.
    scored = numpy.unique(targets)
    numbers: dict[str, Any] = {name: _numbers(examples, name, missing) for name, missing in MISSING_NUMBERS.items()}
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(trie.positions),
        trie=trie,
        members=torch.from_numpy(responses.members(examples)),
        response_lengths=torch.from_numpy(lengths),
        response_rows=torch.tensor([prompt.first_row + index for prompt, index in responses.prompts]),
        last_tokens=torch.tensor([int(trie.path(number)[-1]) for number in range(len(positions))]),
        scored_ids=torch.from_numpy(ids[scored]),
        predicted_at=torch.from_numpy(trie.predecessors[scored]),
        scored=torch.from_numpy(numpy.searchsorted(scored, targets)),
        scored_responses=torch.from_numpy(numpy.repeat(numpy.arange(len(positions)), lengths)),
        scored_positions=torch.from_numpy(numpy.concatenate(positions)),
        places=torch.tensor(range(len(examples)) if places is None else places),
        sources=tuple(prompt.source for prompt, _ in examples),
        **numbers,
    )


def _numbers(examples: Sequence[Example], name: str, missing: float) -> Tensor | None:
    """A number of each example [E]; `missing` for those of prompts without, None where no prompt has any."""
    columns = [getattr(prompt, name) for prompt, _ in examples]
    if all(column is None for column in columns):
        return None
    values = [missing if column is None else column[number] for column, (_, number) in zip(columns, examples, strict=True)]
    return torch.tensor(values, dtype=torch.float32)


def cut(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Consecutive parts of `size` examples; the last may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


@dataclass(frozen=True)
class TokenBudget:
    """The maximum number of packed tokens that are computed at once.

    limit: more would not fit into memory. soft_limit: more would not be faster, so a new prompt starts a new pack, unless that
    would compute much again: see `largest_pack`. The examples of one prompt stay together up to the limit.
    """

    limit: int
    soft_limit: int

    def largest_pack(self, shared: int) -> int:
        """The most tokens of a pack with a new prompt that shares so many with those before.

        The soft limit rises by four times as many, so that prompts that share much are computed together: of long shared
        prefixes a new pack would compute a fifth again, and of short ones little is lost.
        """
        return min(self.limit, self.soft_limit + 4 * shared)

    def over(self, parts: int) -> "TokenBudget":
        """The budget of packs that so many processes compute together."""
        return TokenBudget(min(parts * self.limit, sys.maxsize), min(parts * self.soft_limit, sys.maxsize))


UNLIMITED = TokenBudget(sys.maxsize, sys.maxsize)


def split_by_budget(examples: Sequence[Example], places: Sequence[int], budget: TokenBudget) -> Iterator[list[int]]:
    """Split the examples at `places` into packs within the budget, such that those that share prefixes fall together.

    An example that exceeds the budget alone gets its own pack.
    """
    pack = _OpenPack()
    for place in _by_sharing(examples, places):
        prompt, _ = examples[place]
        is_known = id(prompt) in pack.counter.owners
        shared = pack.add(place, examples[place])
        most = budget.limit if is_known else budget.largest_pack(shared)
        if len(pack.places) > 1 and pack.counter.num_tokens > most:
            yield sorted(pack.places[:-1])
            pack = _OpenPack()
            pack.add(place, examples[place])
    if pack.places:
        yield sorted(pack.places)


class _OpenPack:
    """The examples of a pack so far."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.counter = PrefixCounter()
        self._counted: set[tuple[int, int]] = set()

    def add(self, place: int, example: Example) -> int:
        """Add the example at a place; returns how many tokens it shares with the examples before, where its prompt is new.

        That is what its first member shares: the others begin with the same prompt.
        """
        prompt, number = example
        self.places.append(place)
        shared = []
        for index in prompt.members(number):
            if (id(prompt), index) not in self._counted:
                self._counted.add((id(prompt), index))
                shared.append(self.counter.add(prompt.sequences[index], id(prompt), len(prompt.prompt_ids)))
        return shared[0] if shared else 0


def _by_sharing(examples: Sequence[Example], places: Sequence[int]) -> list[int]:
    """Places such that examples whose first members begin alike are adjacent, otherwise in their order."""
    chosen = [(prompt, prompt.members(number)[0]) for prompt, number in (examples[place] for place in places)]
    sequences = [prompt.sequences[index] for prompt, index in chosen]
    found = trees(sequences, [id(prompt) for prompt, _ in chosen])
    return [places[position] for tree in found for position in tree]


def assign_to_ranks(examples: Sequence[Example], size: int) -> list[list[int]]:
    """The indices of the examples that each of `size` ranks computes, with about equally many tokens each.

    The examples of a prompt stay together unless they exceed a rank's fair share. All ranks compute the same assignment.
    """
    if size == 1:
        return [list(range(len(examples)))]
    fair = sum(weight for weight, _ in _units(examples, range(len(examples)))) / size
    units = _units(examples, range(len(examples)), fair)
    loads = [0] * size
    parts: list[list[int]] = [[] for _ in range(size)]
    # Longest first, each to the least loaded rank.
    for weight, unit in sorted(units, key=itemgetter(0), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += weight
        parts[lightest] += unit
    return [sorted(part) for part in parts]


def _units(examples: Sequence[Example], places: Iterable[int], most: float = inf) -> list[tuple[int, list[int]]]:
    """The places of each prompt's examples, with their tokens; one by one those of prompts with more than `most` tokens."""
    groups: dict[int, list[int]] = {}
    for place in places:
        groups.setdefault(id(examples[place][0]), []).append(place)
    weighed = [(_num_tokens(examples, group), group) for group in groups.values()]
    units = [(weight, group) for weight, group in weighed if weight <= most]
    return units + [(_num_tokens(examples, [place]), [place]) for weight, group in weighed if weight > most for place in group]


def _num_tokens(examples: Sequence[Example], places: Iterable[int]) -> int:
    """Tokens of the examples at `places`, which have the same prompt; the prompt and each response count once."""
    chosen = [examples[place] for place in places]
    prompt, _ = chosen[0]
    indices = {index for _, number in chosen for index in prompt.members(number)}
    return len(prompt.prompt_ids) + sum(len(prompt.responses[index]) for index in indices)


def divide(examples: Sequence[Example], budget: TokenBudget, size: int) -> list[list[list[int]]]:
    """The packs within the budget that each of `size` ranks computes, as indices of examples; the same on every rank.

    Several ranks compute in lockstep: their first packs together, then their second ones. So each rank's share is divided
    evenly over as few packs as all ranks can do with, the largest first, unless that would compute shared prefixes more often.
    """
    shares = assign_to_ranks(examples, size)
    filled = [list(split_by_budget(examples, places, budget)) for places in shares]
    number = max(map(len, filled))
    if size == 1 or number == 1:
        return filled
    tokens = [[count_tokens(examples, places) for places in cuts] for cuts in filled]
    fewest = max(1, -(-max(map(sum, tokens)) // budget.soft_limit))
    for wanted in range(fewest, number + 1):
        even = [_divide_evenly(examples, places, wanted, budget.soft_limit) for places in shares]
        fits = all(count <= budget.soft_limit or len(places) == 1 for packs in even for count, places in packs)
        if fits and _in_lockstep([[count for count, _ in packs] for packs in even]) <= _in_lockstep(tokens):
            return [[sorted(places) for _, places in packs] for packs in even]
    by_size = [sorted(zip(counts, cuts, strict=True), reverse=True) for counts, cuts in zip(tokens, filled, strict=True)]
    return [[places for _, places in packs] for packs in by_size]


def _divide_evenly(examples: Sequence[Example], places: Sequence[int], number: int, limit: int) -> list[tuple[int, list[int]]]:
    """At most `number` packs of about equally many tokens each, the largest first, with their tokens.

    The longest prompt first, each to the pack that has the fewest tokens; examples of one prompt stay together up to the limit.
    """
    packs = [_OpenPack() for _ in range(number)]
    for _, unit in sorted(_units(examples, places, limit), key=itemgetter(0), reverse=True):
        pack = min(packs, key=lambda each: each.counter.num_tokens)
        for place in unit:
            pack.add(place, examples[place])
    found = [(pack.counter.num_tokens, pack.places) for pack in packs if pack.places]
    return sorted(found, reverse=True)


def _in_lockstep(tokens: Sequence[Sequence[int]]) -> int:
    """Tokens that one rank after the other waits for: the sum of the largest first, second, ... pack of any rank."""
    return sum(map(max, zip_longest(*(sorted(counts, reverse=True) for counts in tokens), fillvalue=0)))


def count_tokens(examples: Sequence[Example], places: Iterable[int]) -> int:
    """The packed tokens of the examples at `places`, what they share counted once."""
    pack = _OpenPack()
    for place in places:
        pack.add(place, examples[place])
    return pack.counter.num_tokens


def build_packs(examples: Sequence[Example], budget: TokenBudget, ranks: Ranks = SINGLE_PROCESS) -> list[PackedBatch]:
    """Pack this rank's share of the examples within the budget. Every rank gets equally many packs.

    The ranks of a sharded model compute in lockstep, so a rank with fewer packs than another gets fillers, which do not count.
    """
    cuts = divide(examples, budget, ranks.size)
    packs = [pack_examples([examples[place] for place in places], places) for places in cuts[ranks.rank]]
    missing = max(map(len, cuts)) - len(packs)
    if missing:
        shortest = min(range(len(examples)), key=lambda place: _num_tokens(examples, [place]))
        packs += [replace(pack_examples([examples[shortest]], [shortest]), is_filler=True)] * missing
    return packs
