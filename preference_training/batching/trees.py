"""The layout of prompts and responses in a packed batch."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """The location of one prompt and its responses among the packed tokens: the prompt at `start`, then each response."""

    start: int
    prompt_length: int
    response_lengths: tuple[int, ...]

    @property
    def response_starts(self) -> list[int]:
        """Index of each response's first packed token."""
        return list(accumulate(self.response_lengths[:-1], initial=self.start + self.prompt_length))

    @property
    def end(self) -> int:
        """One past the tree's last packed token."""
        return self.start + self.prompt_length + sum(self.response_lengths)


class TreeLayout:
    """The trees of one packed batch, as every attention layer needs them; `seen`: whether a layer has used it.

    by_branches: attention is computed branch by branch, in the order of plain sequences; else all at once, under a block mask.
    """

    def __init__(self, trees: tuple[Tree, ...], device: torch.device):
        self.trees = trees
        self.device = device
        self.seen = False
        self.by_branches = device.type != "cuda"
        self._block_masks: dict[int | None, Any] = {}
        self._elsewhere: dict[torch.device, TreeLayout] = {}

    def on(self, device: torch.device) -> "TreeLayout":
        """The layout with its tensors on a device: a model may be split over several, and hooks move only tensors."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = TreeLayout(self.trees, device)
            self._elsewhere[device].by_branches = self.by_branches
        return self._elsewhere[device]

    @cached_property
    def branch_lengths(self) -> list[int]:
        """Tokens of each branch in packed order: of a prompt with its first response, then of each further response."""
        return [
            length
            for tree in self.trees
            for length in (tree.prompt_length + tree.response_lengths[0], *tree.response_lengths[1:])
        ]

    @cached_property
    def token_trees(self) -> Tensor:
        """The index of each packed token's tree: [T] int32."""
        lengths = torch.tensor([tree.end - tree.start for tree in self.trees])
        return torch.arange(len(self.trees), dtype=torch.int32).repeat_interleave(lengths).to(self.device)

    @cached_property
    def token_responses(self) -> Tensor:
        """The index of each packed token's response within its tree, -1 in a prompt: [T] int32."""
        parts = [part for tree in self.trees for part in [(-1, tree.prompt_length), *enumerate(tree.response_lengths)]]
        numbers, lengths = zip(*parts, strict=True)
        return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(lengths)).to(self.device)

    @cached_property
    def token_positions(self) -> Tensor:
        """Position of each packed token in its own sequence of prompt and response: [T] int32."""
        parts = [
            torch.arange(first, first + length, dtype=torch.int32)
            for tree in self.trees
            for first, length in [(0, tree.prompt_length), *((tree.prompt_length, n) for n in tree.response_lengths)]
        ]
        return torch.cat(parts).to(self.device)

    def may_attend(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Whether the packed token at `query` attends to that at `key` (integer tensors that broadcast).

        It attends within its tree to the prompt and its own response, causally, less than `window` positions back.
        """
        tree, response, position = self.token_trees, self.token_responses, self.token_positions
        own = (tree[query] == tree[key]) & ((response[key] == -1) | (response[key] == response[query])) & (key <= query)
        return own if window is None else own & (position[query] - position[key] < window)

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's block mask of the batch, built once for all layers with the same window."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            length = self.trees[-1].end
            self._block_masks[window] = create_block_mask(
                lambda batch, head, query, key: self.may_attend(query, key, window), None, None, length, length, self.device
            )
        return self._block_masks[window]
