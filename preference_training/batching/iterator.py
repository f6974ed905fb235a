"""The steps of a run from any position on, packed ahead of time.

PromptTable -> `Schedule` -> `BatchIterator` -> the micro-batches of a step, each a list of PackedBatches
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import UNLIMITED, PackedBatch, TokenBudget, build_packs, cut
from preference_training.batching.schedule import Position, Schedule, beginning
from preference_training.core.process_group import SINGLE_PROCESS, Ranks

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, produced ahead by a thread; its exceptions are raised here."""
    waiting: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item: tuple[Any, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:  # passed on, not handled
            put((end, error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        # A thread that still computes when the interpreter exits would abort the process.
        thread.join()


@dataclass(frozen=True)
class Packing:
    """How batches are packed: the token budget of a pack, and this process's rank.

    first_budget: the budget at the start of the run, if it has changed since.
    """

    budget: TokenBudget = UNLIMITED
    ranks: Ranks = SINGLE_PROCESS
    first_budget: TokenBudget | None = None


class BatchIterator:
    """The optimizer steps of a run: each a list of micro-batches.

    A micro-batch is split into packs within `budget`, of which this process gets its rank's. Steps are packed ahead of time,
    and are the same for any number of ranks. The budget may shrink during a run; `first_budget` is the initial one.

    `state_dict` holds the position after the last step that was yielded, not after those packed ahead; iterating after
    `load_state_dict` continues with the next step.
    """

    def __init__(self, schedule: Schedule, num_micro_batches: int = 1, packing: Packing | None = None):
        packing = packing or Packing()
        self.schedule = schedule
        self.micro_batch_size = schedule.batch_size // num_micro_batches
        self.ranks = packing.ranks
        self.budget = packing.budget
        self.first_budget = packing.first_budget or packing.budget
        self.position = beginning()

    def state_dict(self) -> dict[str, Any]:
        """The position (epoch, examples yielded of it, examples in total), both budgets, ranks, and processes per rank."""
        budgets = [length for budget in (self.budget, self.first_budget) for length in (budget.limit, budget.soft_limit)]
        return {"position": self.position, "budget": budgets, "ranks": self.ranks.size, "context": self.ranks.context.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in a `state_dict`, on any number of ranks."""
        self.position = dict(state["position"])

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for batch, budget, position in prefetch(self._packed()):
            self.position = position
            # It may have been packed before the packs were halved.
            yield batch if budget == self.budget else self._repack(batch)

    def _packed(self) -> Iterator[tuple[list[MicroBatch], TokenBudget, Position]]:
        for examples, position in self.schedule.steps(dict(self.position)):
            budget, parts = self.budget, cut(examples, self.micro_batch_size)
            yield [MicroBatch.of(part, budget, self.ranks) for part in parts], budget, position

    @property
    def epochs_done(self) -> float:
        """How many epochs the run has completed after the last step that was yielded."""
        epoch = self.position["epoch"]
        return epoch + self.position["examples_in_epoch"] / self.schedule.epoch_size(epoch)

    @property
    def finished(self) -> bool:
        """Whether the last step has been yielded."""
        return self.position["examples"] >= self.schedule.total_examples

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the last step that was yielded ends its epoch."""
        return self.position["examples_in_epoch"] == self.schedule.epoch_size(self.position["epoch"])

    def halve_packs(self, batch: Sequence[MicroBatch], largest: int | None = None) -> list[MicroBatch]:
        """Repack a step, and all later ones, into packs half as large as its largest, or as one of `largest` tokens."""
        packs = (len(pack.input_ids) for micro_batch in batch for pack in micro_batch.packs)
        # An example that exceeds the budget alone has its own pack.
        limit = (max(packs) if largest is None else min(largest, self.budget.limit)) // 2
        self.budget = TokenBudget(limit, min(limit, self.budget.soft_limit))
        return self._repack(batch)

    def _repack(self, batch: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [MicroBatch.of(micro_batch.examples, self.budget, self.ranks) for micro_batch in batch]

    def first_epoch(self) -> Iterator[PackedBatch]:
        """This rank's packs of all micro-batches of the first epoch, as the run computes them at its start."""
        for examples, position in self.schedule.steps(beginning()):
            if position["epoch"] > 0:
                return
            for part in cut(examples, self.micro_batch_size):
                yield from build_packs(part, self.first_budget, self.ranks)
