"""Filling a store ahead: several answers to each task that has no comparison yet, from one model or one of each.

Each answer is saved as it is finished, so that what is interrupted goes on where it ended.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from preference_collection.generation.asking import Sampling, filled, instruction_for, new_seeds, requests_for
from preference_collection.generation.batches import PATIENCE, Batch, Patience, Progress, number_of, reply_to
from preference_collection.generation.sources import Model
from preference_collection.generation.stopping import Stop
from preference_collection.generation.writing import answer_of
from preference_collection.store.model import LEAST_ANSWERS, MOST_ANSWERS, Answer, Comparison, Query, Task, new_id
from preference_training.core.errors import UserError

# How often a model is asked again, with another seed, after a reply that cannot be used or that is there already.
FURTHER_SEEDS = 3


@dataclass(frozen=True)
class Plan:
    """Which answers each task gets: `count` from one model, or one from each of several.

    sampling: its instruction is the one of the settings, which only tasks with code get.
    """

    models: tuple[Model, ...]
    count: int
    sampling: Sampling

    @property
    def each(self) -> int:
        """Answers of each model to a task."""
        return self.count if len(self.models) == 1 else 1

    def sampling_for(self, task: Task) -> Sampling:
        """The sampling with the instruction for a task."""
        return Sampling(self.sampling.temperature, self.sampling.max_tokens, instruction_for(task, self.sampling.instruction))


def plan_of(settings, models: Sequence[Model], count: int | None = None) -> Plan:
    """The plan of settings, with `count` answers of one model, or one of each of several.

    Raises UserError for a number of answers that a comparison cannot have.
    """
    if len({model.model for model in models}) < len(models):
        raise UserError("--model: found the same model twice, expected different ones, or one with --per-problem.")
    if len(models) > 1 and count not in (None, len(models)):
        raise UserError(f"--per-problem: found {count} and {len(models)} models, expected one answer of each.")
    count = len(models) if len(models) > 1 else count or settings.answers
    if not LEAST_ANSWERS <= count <= MOST_ANSWERS:
        raise UserError(f"--per-problem: found {count}, expected a number from {LEAST_ANSWERS} to {MOST_ANSWERS}.")
    return Plan(tuple(models), count, Sampling(settings.temperature, settings.max_tokens, settings.instruction or ""))


class Filler:
    """Makes answers to tasks, saves each, and adds a comparison once a task has enough that differ.

    counts: answers, comparisons, unusable (answers kept with their fault), same (tasks left without a comparison).
    """

    def __init__(self, store, plan: Plan, stop: Stop, patience: Patience, added: Callable[[str], None] = lambda _: None):
        """added: is told the id of each new comparison."""
        self.counts: Counter = Counter()
        self._store, self._plan, self._stop, self._patience, self._added = store, plan, stop, patience, added
        self._lock = threading.Lock()
        # The answers that count for a task until it has enough, and tasks that remain without a comparison.
        self._made: dict[str, list[Answer]] = {}
        self._same: set[str] = set()

    def jobs(self, tasks: Sequence[Task], known: Callable[[int], None] = lambda _: None) -> Iterator[Callable[[], None]]:
        """What is missing for comparisons of these tasks, one answer each. One model's are together: it is loaded once.

        known: is told how many answers are there already.
        """
        for model in self._plan.models:
            for task in tasks:
                missing = self._num_missing(task, model)
                known(self._plan.each - missing)
                yield from [partial(self._make, task, model)] * missing

    def _num_missing(self, task: Task, model: Model) -> int:
        """How many answers of a model a task lacks. Earlier ones count if the model was asked the same."""
        [asked] = requests_for(task, model.model, self._plan.sampling_for(task), [0])
        earlier = self._store.answers_of(task.id)
        own = [answer for answer in earlier if (answer.model, answer.prompt) == (model.model, asked.prompt)][: self._plan.each]
        with self._lock:
            self._made.setdefault(task.id, []).extend(own)
            self._finish(task)
        return self._plan.each - len(own)

    def _make(self, task: Task, model: Model) -> None:
        """Make and save one answer. Raises UserError and StoppedError."""
        sampling = self._plan.sampling_for(task)
        instruction = filled(sampling.instruction, task)
        again = Counter()
        while True:
            [request] = requests_for(task, model.model, sampling, new_seeds(1))
            answer = answer_of(task, request, instruction, *reply_to(model, request, self._stop, self._patience))
            fault = "fault" in answer.parameters
            if fault and again["fault"] < FURTHER_SEEDS:
                again["fault"] += 1
                continue
            if self._save(task, answer, fault):
                return
            again["same"] += 1
            if again["same"] > FURTHER_SEEDS:
                self._leave(task)
                return

    def _save(self, task: Task, answer: Answer, fault: bool) -> bool:
        """Save an answer, unless the task has the same."""
        with self._lock:
            if content(answer) in map(content, self._made[task.id]):
                return False
            self._store.add_answers(task.id, [answer])
            self._made[task.id].append(answer)
            self.counts["answers"] += 1
            self.counts["unusable"] += fault
            self._finish(task)
        return True

    def _finish(self, task: Task) -> None:
        """Add the comparison of a task whose answers are there."""
        answers = self._made[task.id]
        if len(answers) == self._plan.count:
            del self._made[task.id]
            comparison = Comparison(new_id(), task.id, tuple(answers))
            self._store.add_comparisons([comparison])
            self.counts["comparisons"] += 1
            self._added(comparison.id)

    def _leave(self, task: Task) -> None:
        with self._lock:
            self._same.add(task.id)
            self.counts["same"] = len(self._same)


def content(answer: Answer) -> str:
    """What makes two answers the same: their code, or their text without any."""
    return (answer.code or answer.text).strip()


def fill(store, plan: Plan, count: int, workers: int, patience: Patience = PATIENCE) -> str:
    """Give `count` tasks a comparison, the first that have none. Returns a line about what was done.

    Raises UserError if the source has no replies; what was made stays.
    """
    check_writable(store)
    if not store.browse(Query(), 0, 1)[1]:
        raise UserError(f"generate: {store.address} has no tasks. Import some: python -m preference_collection import FILE.")
    for model in plan.models:
        model.check()
    stop = Stop()
    filler = Filler(store, plan, stop, patience)
    tasks = store.tasks_without_comparison(count)
    progress = Progress(len(tasks) * plan.count, "answers")
    batch = Batch(workers, stop, progress)
    try:
        batch.run(filler.jobs(tasks, progress.skip))
    except (UserError, KeyboardInterrupt) as error:
        kind = UserError if isinstance(error, UserError) else KeyboardInterrupt
        said = f"{error}\n{number_of(filler.counts['answers'], 'answer')} saved; run the command again to continue."
        raise kind(said.strip()) from error
    return summary(filler.counts, len(tasks), batch.failures)


def check_writable(store) -> None:
    """Raise UserError, before any model is asked, if a store cannot keep what it says."""
    if store.read_only:
        raise UserError(f"store: {store.address} is open read-only. Open a store that you can write to.")


def summary(counts: Counter, tasks: int, failures: Sequence[UserError]) -> str:
    """The last line: what was made, and what was not."""
    if not tasks:
        return "every task has a comparison"
    made = f"{number_of(counts['answers'], 'answer')} and {number_of(counts['comparisons'], 'comparison')}"
    parts = [f"{made} added for {number_of(tasks, 'task')}"]
    if counts["unusable"]:
        parts.append(f"{counts['unusable']} of the answers cannot be used, even after {FURTHER_SEEDS} more attempts each")
    if counts["same"]:
        parts.append(f"{number_of(counts['same'], 'task')} left without a comparison, since their answers are the same")
    if failures:
        parts.append(f"{number_of(len(failures), 'request')} without a reply, the first: {failures[0]}")
    return "; ".join(parts)
