"""Packed batches: concatenated trees of prompts and responses, without padding.

Shapes: T packed tokens, R responses, P pairs. A packed batch holds every prompt once and every response once: a *tree* is a
prompt followed by its responses, and the batch concatenates trees. Each response continues the positions of its prompt.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from preference_training.batching.trees import Tree, TreeLayout
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.base import Examples


@dataclass(frozen=True)
class PackedBatch:
    """Concatenated trees without padding. Responses are numbered through the batch, tree by tree.

    All tensors are int64.

    input_ids, position_ids: [T]; a response's positions continue its prompt's.
    pairs: [P, 2], response numbers of preferred and dispreferred; empty for SFT.
    response_lengths: [R], tokens.
    response_rows: [R], the responses' indices among all responses of the run's data.
    scored_ids: [S], the concatenated tokens of the responses; predicted_at: [S], the packed index whose output predicts each of
    them (that of the token before it); scored_responses: [S], the response that each belongs to.
    places: [E], the indices of its examples among those of the micro-batch, over all ranks.
    sources: [examples], for messages. is_filler: padding for ranks that have fewer packs than another; it does not count.
    """

    input_ids: Tensor
    position_ids: Tensor
    trees: tuple[Tree, ...]
    pairs: Tensor
    response_lengths: Tensor
    response_rows: Tensor
    scored_ids: Tensor
    predicted_at: Tensor
    scored_responses: Tensor
    places: Tensor
    sources: tuple[str, ...]
    is_filler: bool = False

    @property
    def num_examples(self) -> int:
        """Pairs, or for SFT responses."""
        return len(self.pairs) or len(self.response_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens, each prompt and response counted once; 0 for a filler."""
        return 0 if self.is_filler else len(self.input_ids)

    @cached_property
    def examples(self) -> Examples:
        """The examples as losses see them; their mean length is that of a whole batch, which a pack does not know."""
        members = self.pairs if len(self.pairs) else torch.arange(len(self.response_lengths), device=self.pairs.device)[:, None]
        return Examples(members, self.response_lengths)

    @cached_property
    def layout(self) -> TreeLayout:
        """The trees as attention needs them, built once for all layers and models that process the batch."""
        return TreeLayout(self.trees, self.input_ids.device)

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """The batch with each of its tensors changed."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)


# One example: a prompt and one of its pairs; for SFT the pair is None.
Example = tuple[TokenizedPrompt, tuple[int, int] | None]


def iterate_examples(prompts: Iterable[TokenizedPrompt]) -> Iterator[Example]:
    """Every example of `prompts`; those of one prompt are adjacent."""
    for prompt in prompts:
        if prompt.pairs:
            yield from ((prompt, pair) for pair in prompt.pairs)
        else:
            yield prompt, None


def pack_examples(examples: Sequence[Example], places: Sequence[int] | None = None) -> PackedBatch:
    """Pack examples, storing each shared prompt and response once. `places`: their indices; by default 0, 1, 2, ..."""
    used: dict[int, tuple[TokenizedPrompt, dict[int, int]]] = {}
    for prompt, pair in examples:
        _, numbers = used.setdefault(id(prompt), (prompt, {}))
        for index in pair or (0,):
            numbers.setdefault(index, len(numbers))
    ids: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    predicted: list[int] = []
    owners: list[int] = []
    rows: list[int] = []
    trees: list[Tree] = []
    first_number: dict[int, int] = {}
    for key, (prompt, numbers) in used.items():
        start, prompt_length = len(ids), len(prompt.prompt_ids)
        responses = [prompt.responses[index] for index in numbers]
        trees.append(Tree(start, prompt_length, tuple(map(len, responses))))
        first_number[key] = len(rows)
        ids += prompt.prompt_ids
        positions += range(prompt_length)
        for index, response in zip(numbers, responses, strict=True):
            owners += [len(rows)] * len(response)
            rows.append(prompt.first_row + index)
            predicted += [start + prompt_length - 1, *range(len(ids), len(ids) + len(response) - 1)]
            scored += response
            ids += response
            positions += range(prompt_length, prompt_length + len(response))
    pairs = [[first_number[id(p)] + used[id(p)][1][index] for index in pair] for p, pair in examples if pair]
    return PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        trees=tuple(trees),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        response_lengths=torch.tensor([length for tree in trees for length in tree.response_lengths]),
        response_rows=torch.tensor(rows),
        scored_ids=torch.tensor(scored),
        predicted_at=torch.tensor(predicted),
        scored_responses=torch.tensor(owners),
        places=torch.tensor(range(len(examples)) if places is None else places),
        sources=tuple(prompt.source for prompt, _ in examples),
    )


def cut(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Consecutive parts of `size` examples; the last may be smaller."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


@dataclass(frozen=True)
class TokenBudget:
    """The maximum number of packed tokens that are computed at once.

    limit: more would not fit into memory. soft_limit: more would not be faster, so a new prompt starts a new pack; the pairs of
    one prompt stay together up to the limit, because they share it.
    """

    limit: int
    soft_limit: int


UNLIMITED = TokenBudget(sys.maxsize, sys.maxsize)


# What examples may share: the key of a prompt, and the index of one of its responses or None for the prompt itself.
Part = tuple[int, int | None]


def token_counts(example: Example) -> dict[Part, int]:
    """Tokens of an example's prompt and of each of its responses."""
    prompt, pair = example
    parts: dict[Part, int] = {(id(prompt), None): len(prompt.prompt_ids)}
    return parts | {(id(prompt), index): len(prompt.responses[index]) for index in pair or (0,)}


def split_by_budget(examples: Sequence[Example], places: Iterable[int], budget: TokenBudget) -> Iterator[list[int]]:
    """Split the examples at `places`, in order, into packs within the budget.

    An example that exceeds the budget alone gets its own pack.
    """
    pack: list[int] = []
    tokens = 0
    seen: set[Part] = set()
    for place in places:
        parts = token_counts(examples[place])
        prompt = next(iter(parts))
        added = sum(length for key, length in parts.items() if key not in seen)
        most = budget.limit if prompt in seen else budget.soft_limit
        if pack and tokens + added > most:
            yield pack
            pack, tokens, seen, added = [], 0, set(), sum(parts.values())
        pack.append(place)
        seen |= parts.keys()
        tokens += added
    if pack:
        yield pack


def assign_to_ranks(examples: Sequence[Example], size: int) -> list[list[int]]:
    """The indices of the examples that each of `size` ranks computes, with about equally many tokens each.

    The examples of a prompt stay together unless they exceed a rank's fair share. All ranks compute the same assignment.
    """
    if size == 1:
        return [list(range(len(examples)))]
    groups: dict[int, list[int]] = {}
    for place, (prompt, _) in enumerate(examples):
        groups.setdefault(id(prompt), []).append(place)
    weighed = [(_num_tokens(examples, group), group) for group in groups.values()]
    fair = sum(weight for weight, _ in weighed) / size
    units = [(weight, group) for weight, group in weighed if weight <= fair]
    units += [(_num_tokens(examples, [place]), [place]) for weight, group in weighed if weight > fair for place in group]
    loads = [0] * size
    parts: list[list[int]] = [[] for _ in range(size)]
    # Longest first, each to the least loaded rank.
    for weight, unit in sorted(units, key=itemgetter(0), reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += weight
        parts[lightest] += unit
    return [sorted(part) for part in parts]


def _num_tokens(examples: Sequence[Example], places: Iterable[int]) -> int:
    """Tokens of the examples at `places`; each prompt and response counts once."""
    return sum({part: count for place in places for part, count in token_counts(examples[place]).items()}.values())


def build_packs(examples: Sequence[Example], budget: TokenBudget, ranks: Ranks = SINGLE_PROCESS) -> list[PackedBatch]:
    """Pack this rank's share of the examples within the budget. Every rank gets equally many packs.

    The ranks of a sharded model compute in lockstep, so a rank with fewer packs than another gets fillers, which do not count.
    """
    cuts = [list(split_by_budget(examples, places, budget)) for places in assign_to_ranks(examples, ranks.size)]
    packs = [pack_examples([examples[place] for place in places], places) for places in cuts[ranks.rank]]
    missing = max(map(len, cuts)) - len(packs)
    if missing:
        shortest = min(range(len(examples)), key=lambda place: sum(token_counts(examples[place]).values()))
        packs += [replace(pack_examples([examples[shortest]], [shortest]), is_filler=True)] * missing
    return packs
