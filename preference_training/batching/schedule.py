"""The examples of each step of a run, independent of the hardware."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy
import xxhash
from numpy.typing import NDArray

from preference_training.batching.packing import Example, iterate_examples
from preference_training.data.prompt_table import PromptTable, Selection, shuffled

# The progress of a run: its epoch, the examples seen in this epoch, and the examples seen in total.
Position = dict[str, int]


def beginning() -> Position:
    """The position of a run before its first step."""
    return {"epoch": 0, "examples_in_epoch": 0, "examples": 0}


@dataclass(frozen=True)
class RunLength:
    """When a run ends: after so many epochs, examples or steps, whichever comes first."""

    n_epochs: int | None = 1
    n_examples: int | None = None
    n_steps: int | None = None

    def __post_init__(self) -> None:
        assert (self.n_epochs, self.n_examples, self.n_steps) != (None, None, None), "a run without an end"


class Schedule:
    """The optimizer steps of a run, `batch_size` examples each.

    An epoch visits every prompt once (those of a weighted data set as often as its weight says), in an order that depends only
    on `seed` and the epoch; the pairs of a prompt stay adjacent. The last batch of an epoch holds the remaining examples.

    replacement: each prompt of an epoch is drawn from all of them, with probabilities in proportion to the weights, until the
    epoch has as many examples, rounded up to whole batches.
    """

    def __init__(
        self,
        prompts: PromptTable,
        batch_size: int,
        seed: int = 0,
        length: RunLength | None = None,
        replacement: bool = False,
    ):
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.length = length or RunLength()
        self.replacement = replacement
        self._epoch_sizes: dict[int, int] = {}

    def with_length(self, length: RunLength) -> "Schedule":
        """The same data in the same order, with another length."""
        other = Schedule(self.prompts, self.batch_size, self.seed, length, self.replacement)
        other._epoch_sizes = self._epoch_sizes
        return other

    @cached_property
    def total_examples(self) -> int:
        """How many examples the run has in total."""
        limits = [] if self.length.n_examples is None else [self.length.n_examples]
        if self.length.n_epochs is not None:
            limits.append(sum(self.epoch_size(epoch) for epoch in range(self.length.n_epochs)))
        if self.length.n_steps is not None:
            limits.append(self._count_examples(self.length.n_steps))
        return min(limits)

    def _count_examples(self, left: int) -> int:
        examples, epoch = 0, 0
        while left > 0:
            size = self.epoch_size(epoch)
            examples, left, epoch = examples + min(size, left * self.batch_size), left - -(-size // self.batch_size), epoch + 1
        return examples

    def epoch_size(self, epoch: int) -> int:
        """How many examples an epoch has; with fractional weights it differs between epochs."""
        if self.replacement:
            return -(-self._weighted_examples // self.batch_size) * self.batch_size
        if epoch not in self._epoch_sizes:
            visits = epoch_visits(self.prompts, f"{self.seed} {epoch}")
            self._epoch_sizes[epoch] = int(self.prompts.num_examples[visits].sum())
        return self._epoch_sizes[epoch]

    @cached_property
    def _weighted_examples(self) -> int:
        """How many examples an epoch has on average."""
        parts = ((part.weight, columns.num_examples) for part in self.prompts.parts for columns in part.batches)
        return max(1, round(sum(weight * int(examples.sum()) for weight, examples in parts)))

    @cached_property
    def total_steps(self) -> int:
        """How many optimizer steps the run has."""
        steps, left, epoch = 0, self.total_examples, 0
        while left > 0:
            size = min(left, self.epoch_size(epoch))
            steps, left, epoch = steps - (-size // self.batch_size), left - size, epoch + 1
        return steps

    @cached_property
    def visits_again(self) -> bool:
        """Whether the run sees prompts more than once."""
        return self.total_examples > int(self.prompts.num_examples[self.prompts_seen.indices].sum())

    @cached_property
    def prompts_seen(self) -> Selection:
        """The prompts that the whole run sees, each once."""
        return Selection(self.prompts, numpy.flatnonzero(self._seen()))

    @cached_property
    def prompts_seen_later(self) -> Selection:
        """The prompts that only later epochs see, as is possible with weighted data sets."""
        return Selection(self.prompts, numpy.flatnonzero(self._seen() & ~self._seen(epochs=1)))

    def _seen(self, epochs: int | None = None) -> NDArray[numpy.bool_]:
        """Whether each prompt is seen, within the first `epochs` epochs if given: [N] bool."""
        seen, left, epoch = numpy.zeros(len(self.prompts), bool), self.total_examples, 0
        while left > 0 and epoch != epochs and not seen.all():
            order = self._order(epoch)
            examples = numpy.cumsum(self.prompts.num_examples[order])
            size = min(left, self.epoch_size(epoch))
            seen[order[: numpy.searchsorted(examples, size) + 1]] = True
            left, epoch = left - size, epoch + 1
        return seen

    def steps(self, position: Position) -> Iterator[tuple[list[Example], Position]]:
        """The examples of each step from `position` on, and the position after it."""
        epoch, in_epoch, total = (position[key] for key in ("epoch", "examples_in_epoch", "examples"))
        while self.length.n_epochs is None or epoch < self.length.n_epochs:
            order = self._order(epoch)
            # Completed prompts are skipped without being read.
            done = numpy.cumsum(self.prompts.num_examples[order]) if in_epoch else order[:0]
            first = int(numpy.searchsorted(done, in_epoch, side="right"))
            skip = in_epoch - (int(done[first - 1]) if first else 0)
            rest = skip + self.epoch_size(epoch) - in_epoch
            examples = islice(iterate_examples(Selection(self.prompts, order[first:])), skip, rest)
            while step := list(islice(examples, self._size_after(total))):
                in_epoch, total = in_epoch + len(step), total + len(step)
                yield step, {"epoch": epoch, "examples_in_epoch": in_epoch, "examples": total}
            if self._size_after(total) == 0:
                return
            epoch, in_epoch = epoch + 1, 0

    def _size_after(self, examples: int) -> int:
        return min(self.batch_size, self.total_examples - examples)

    def _order(self, epoch: int) -> NDArray[numpy.int32]:
        seed = f"{self.seed} {epoch}"
        return drawn(self.prompts, seed, self.epoch_size(epoch)) if self.replacement else epoch_order(self.prompts, seed)


def epoch_order(prompts: PromptTable, seed: str) -> NDArray[numpy.int32]:
    """Indices of the prompts that an epoch visits, shuffled by `seed`."""
    visits = epoch_visits(prompts, seed)
    return visits[shuffled(len(visits), seed)]


def drawn(prompts: PromptTable, seed: str, examples: int) -> NDArray[numpy.int32]:
    """Indices of prompts, each drawn from all of them by the weights of their parts, that have at least so many examples."""
    weights = numpy.repeat([part.weight for part in prompts.parts], [part.num_prompts for part in prompts.parts])
    ends = numpy.cumsum(weights)
    words = numpy.random.PCG64(int(xxhash.xxh3_64_hexdigest(f"{seed} drawn".encode()), 16)).random_raw(examples)
    # 53 random bits: uniform in [0, 1).
    uniform = (words >> numpy.uint64(11)) * 2.0**-53
    indices = numpy.minimum(numpy.searchsorted(ends, uniform * ends[-1], side="right"), len(ends) - 1).astype(numpy.int32)
    enough = int(numpy.searchsorted(numpy.cumsum(prompts.num_examples[indices]), examples)) + 1
    return indices[:enough]


def epoch_visits(prompts: PromptTable, seed: str) -> NDArray[numpy.int32]:
    """Indices of the prompts that an epoch visits, in the order of the table.

    A part of weight w is visited w times: in full for the whole number in w, and a random share of it for the remainder.
    """
    visits, start = [numpy.zeros(0, numpy.int32)], 0
    for number, part in enumerate(prompts.parts):
        size, whole = part.num_prompts, int(part.weight)
        # At least one prompt of each part, however small its weight.
        rest = max(round((part.weight - whole) * size), int(whole == 0 and size > 0))
        indices = numpy.arange(start, start + size, dtype=numpy.int32)
        drawn = indices[shuffled(size, f"{seed} part {number}")[:rest]] if rest else indices[:0]
        visits += [indices] * whole + [drawn]
        start += size
    return numpy.concatenate(visits)
