"""Working ahead of the labelers: the next comparisons are there, with their tests, before anyone asks for them.

Two threads: one runs the tests of what comes next for each active labeler; the other, where the settings name a generator,
makes answers to further tasks when less than enough is left.
"""

import sys
import threading
import time
import traceback
from itertools import zip_longest

from preference_collection.generation.batches import Batch, Patience
from preference_collection.generation.filling import Filler, plan_of
from preference_collection.generation.sources import model_named
from preference_collection.generation.stopping import Stop
from preference_training.core.errors import UserError, first_line

# A labeler who has done nothing for this long is not active. Unit: seconds.
ACTIVE_SECONDS = 600.0
# How often the queue is looked at, without an event. Unit: seconds.
EVERY_SECONDS = 2.0
# The first and the longest pause after a source has failed. Unit: seconds.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
# Answers that are made at a time.
WORKERS = 2
# A failing source is left alone soon: the pauses are those above.
PATIENCE = Patience(attempts=2)


class Ahead:
    """Keeps comparisons ready for the labelers. Start it once; `seen` tells it who is active."""

    def __init__(self, store, queue, runner, settings):
        """runner: runs tests. settings: ahead is the number of comparisons for each labeler, generator the model.

        Raises UserError for a generator that cannot be.
        """
        self.pause = FIRST_PAUSE
        self._store, self._queue, self._runner, self._settings = store, queue, runner, settings
        can_write = settings.generator and not store.read_only
        self._plan = plan_of(settings, [model_named(settings.generator, settings)]) if can_write else None
        self._stop, self._changed, self._num_events = Stop(), threading.Condition(), 0
        # When labelers were last active, and those for whom something else comes next since the last look.
        self._active: dict[str, float] = {}
        self._due: set[str] = set()
        self._tested: set[str] = set()
        self._left_out: set[str] = set()
        self._status = ""
        self._threads: list[threading.Thread] = []

    def start(self) -> "Ahead":
        """Begin."""
        works = [self._run_tests, *[self._generate] * (self._plan is not None)]
        self._threads = [threading.Thread(target=self._repeat, args=(work,), name="ahead", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End: requests in progress are stopped. Returns when both threads have ended."""
        self._stop.ask()
        with self._changed:
            self._wake()
        for thread in self._threads:
            thread.join()

    def seen(self, labeler: str) -> None:
        """A labeler is active: sees a comparison, or has judged one."""
        with self._changed:
            self._active[labeler] = time.monotonic()
            self._due.add(labeler)
            self._wake()

    def status(self) -> str:
        """Why no answers are made at the moment; empty if nothing is wrong."""
        return self._status

    def _wake(self) -> None:
        """Count an event, with the lock."""
        self._num_events += 1
        self._changed.notify_all()

    def _repeat(self, work) -> None:
        """Do the work after each event, and now and then without one: other threads change the store too."""
        while not self._stop.asked:
            num_events = self._num_events
            try:
                work()
            except Exception as error:
                # A thread that ends would leave labelers waiting.
                traceback.print_exc()
                self._say(f"Working ahead failed: {type(error).__name__}: {first_line(error)}.")
                self._stop.wait(LONGEST_PAUSE)
            with self._changed:
                self._changed.wait_for(lambda known=num_events: self._num_events != known, EVERY_SECONDS)

    def _now_active(self) -> list[str]:
        """The active labelers."""
        with self._changed:
            since = time.monotonic() - ACTIVE_SECONDS
            self._active = {labeler: moment for labeler, moment in self._active.items() if moment >= since}
            return list(self._active)

    def _num_needed(self, active: list[str]) -> int:
        """How many comparisons are to be ready: each is for `overlap` labelers, and all active ones draw on the same."""
        return self._settings.ahead * -(-len(active) // self._settings.overlap)

    # ---- tests -------------------------------------------------------------------------------------------------------------

    def _run_tests(self) -> None:
        """Start the tests of what comes next, in turn for each labeler for whom something has changed."""
        with self._changed:
            due, self._due = self._due, set()
        count = self._num_needed(self._now_active())
        upcoming = [self._queue.peek(labeler, count) for labeler in due]
        for id in dict.fromkeys(id for ids in zip_longest(*upcoming) for id in ids if id and id not in self._tested):
            comparison = self._store.comparison(id)
            task = comparison and self._store.task(comparison.task)
            if self._stop.asked:
                return
            self._tested.add(id)
            if task and task.tests:
                for answer in comparison.answers:
                    self._runner.start_tests(answer, task, later=True)

    # ---- answers -----------------------------------------------------------------------------------------------------------

    def _num_missing(self) -> int:
        """How many comparisons are missing for the labeler with the least left."""
        active = self._now_active()
        needed = self._num_needed(active)
        return max((needed - self._queue.remaining(labeler) for labeler in active), default=0)

    def _generate(self) -> None:
        """Make the missing comparisons. After an error, pause; each pause is twice the last."""
        missing = self._num_missing()
        tasks = self._store.tasks_without_comparison(missing + len(self._left_out)) if missing > 0 else []
        tasks = [task for task in tasks if task.id not in self._left_out][:missing]
        if not tasks:
            return
        stop = Stop()
        self._stop.also(stop.ask)
        filler = Filler(self._store, self._plan, stop, PATIENCE, self._added)
        batch = Batch(WORKERS, stop)
        try:
            batch.run(filler.jobs(tasks))
            error = batch.failures[0] if batch.failures and not filler.counts["comparisons"] else None
        except UserError as failure:
            error = failure
        finally:
            self._stop.forget(stop.ask)
        if error is None:
            self._status, self.pause = "", FIRST_PAUSE
            # Their answers are all the same, or had no reply: others come first.
            self._left_out |= {task.id for task in tasks if not self._store.comparisons_of(task.id)}
        elif not self._stop.asked:
            self._say(f"No answers are made ahead: {error}")
            self._stop.wait(self.pause)
            self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def _added(self, comparison: str) -> None:
        self._queue.added([comparison])
        with self._changed:
            self._due |= self._active.keys()
            self._wake()

    def _say(self, message: str) -> None:
        """Keep a message for the page, and print it once."""
        if message != self._status:
            self._status = message
            print(message, file=sys.stderr, flush=True)
