"""How a layer attends within a sequence."""

from typing import NamedTuple

from torch import Tensor


class Rules(NamedTuple):
    """How a layer attends within a sequence.

    scaling: None is 1 / sqrt(D). window: a token sees less than so many positions back. chunk: it sees tokens of its own chunk
    of so many positions. softcap: c replaces each score s by c * tanh(s / c). sinks: [H], the score of one more key of each
    head, whose value is zero.
    """

    scaling: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def first_visible(self, position: int) -> int:
        """The first position that a token at `position` or any later one may see, or with chunks the beginning of its chunk."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def are_plain(self, length: int) -> bool:
        """Whether these are the rules of plain causal attention for a sequence of `length` tokens."""
        hides = min(self.window or length, self.chunk or length) < length
        return not hides and self.softcap is None and self.sinks is None
