"""The queue gives each labeler something else, nobody one twice, and nobody waits while something is left for them."""

from collections import Counter
from contextlib import closing
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_collection.store.model import Verdict
from preference_collection.store.queue import Queue
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task, all_at_once


@pytest.fixture
def memory():
    """A store in memory."""
    with closing(open_store(":memory:")) as opened:
        yield opened


def filled(store, n: int) -> list:
    """n comparisons, c0 and so on, of one task."""
    store.add_tasks([a_task()])
    comparisons = [a_comparison(id=f"c{index}") for index in range(n)]
    store.add_comparisons(comparisons)
    return comparisons


class Clock:
    """A time that tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def judge(store, queue: Queue, labeler: str, comparison: str, said=0) -> None:
    store.judge(a_judgment(store.comparison(comparison), said, labeler))
    queue.judged(labeler, comparison)


# ---- what comes next --------------------------------------------------------------------------------------------------------


def test_labelers_get_different_comparisons_and_nobody_one_twice(memory):
    filled(memory, 3)
    queue = Queue(memory)
    assert [queue.next(labeler) for labeler in ("ada", "bob", "eve", "kim")] == ["c0", "c1", "c2", None]
    assert queue.next("ada") == "c0", "it stays theirs"
    judge(memory, queue, "ada", "c0")
    assert queue.next("ada") is None and queue.remaining("ada") == 0
    queue.release("bob")
    assert queue.next("ada") == "c1" and queue.remaining("ada") == 1


def test_a_second_judgment_is_asked_for_when_all_have_one(memory):
    filled(memory, 3)
    queue = Queue(memory, overlap=2)
    judge(memory, queue, "ada", "c0")
    assert queue.next("bob") == "c1" and queue.next("eve") == "c2"
    judge(memory, queue, "bob", "c1")
    assert queue.next("bob") == "c0", "c2 is on its way"
    judge(memory, queue, "bob", "c0")
    assert queue.remaining("kim") == 2 and queue.peek("kim", 9) == ["c1", "c2"]


def test_what_was_skipped_is_left_to_others_and_counts_for_nothing(memory):
    filled(memory, 1)
    queue = Queue(memory)
    judge(memory, queue, "ada", "c0", "skip")
    assert queue.next("ada") is None and queue.next("bob") == "c0"


def test_what_a_labeler_goes_on_from_comes_again_when_nothing_else_is_left(memory):
    filled(memory, 3)
    queue = Queue(memory)
    seen = [queue.next("ada")]
    for _ in range(4):
        seen.append(queue.next("ada", skip=seen[-1]))
    assert seen == ["c0", "c1", "c2", "c0", "c1"]
    assert queue.next("bob") == "c0", "what they went on from is free for others"


def test_a_lease_ends_and_what_comes_late_counts_all_the_same(memory):
    filled(memory, 1)
    clock = Clock()
    queue = Queue(memory, lease_seconds=10, clock=clock)
    assert queue.next("ada") == "c0"
    clock.now = 9.9
    assert queue.next("bob") is None and queue.next("ada") == "c0", "asking again renews it"
    clock.now = 19.8
    assert queue.next("bob") is None
    clock.now = 19.9
    assert queue.next("bob") == "c0"
    judge(memory, queue, "ada", "c0")
    judge(memory, queue, "bob", "c0")
    assert len(memory.standing("c0")) == 2 and queue.next("eve") is None


def test_an_undone_comparison_is_their_next_one_again(memory):
    filled(memory, 3)
    queue = Queue(memory)
    judge(memory, queue, "ada", queue.next("ada"))
    assert queue.next("ada") == "c1"
    queue.undone("ada", memory.undo("ada"))
    assert queue.next("ada") == "c0" and queue.remaining("ada") == 3
    assert queue.next("bob") == "c1"


def test_an_undo_that_restores_an_earlier_judgment_asks_for_nothing(memory):
    filled(memory, 2)
    queue = Queue(memory)
    judge(memory, queue, "ada", "c0")
    judge(memory, queue, "ada", "c0", 1)
    queue.undone("ada", memory.undo("ada"))
    assert queue.next("ada") == "c1"


def test_an_undo_that_restores_a_skip_leaves_the_comparison_to_others(memory):
    filled(memory, 1)
    queue = Queue(memory)
    judge(memory, queue, "ada", "c0", "skip")
    judge(memory, queue, "ada", "c0", 1)
    queue.undone("ada", memory.undo("ada"))
    assert queue.next("bob") == "c0" and queue.next("ada") is None


def test_a_settled_comparison_is_done_until_that_is_undone(memory):
    [comparison] = filled(memory, 1)
    queue = Queue(memory, overlap=3)
    judge(memory, queue, "ada", "c0")
    memory.judge(a_judgment(comparison, 1, "ada", settles=True))
    queue.judged("ada", "c0")
    assert queue.next("bob") is None and Queue(memory, overlap=3).next("bob") is None
    queue.undone("ada", memory.undo("ada"))
    assert queue.next("bob") == "c0" and queue.next("ada") is None


def test_new_comparisons_come_last_once(memory):
    filled(memory, 1)
    queue = Queue(memory)
    memory.add_comparisons([a_comparison(id="new")], [])
    queue.added(["new", "new", "c0"])
    assert queue.peek("ada", 9) == ["c0", "new"]
    assert queue.next("ada") == "c0" and queue.peek("ada", 9) == ["new"], "what they have is not what comes next"


def test_it_goes_on_where_the_store_is(memory):
    filled(memory, 4)
    queue = Queue(memory, overlap=2)
    judge(memory, queue, "ada", "c0")
    judge(memory, queue, "bob", "c0")
    judge(memory, queue, "bob", "c1", "skip")
    again = Queue(memory, overlap=2)
    for labeler in ("ada", "bob", "eve"):
        assert again.peek(labeler, 9) == queue.peek(labeler, 9)
        assert again.remaining(labeler) == len(again.peek(labeler, 9))
    assert again.peek("bob", 9) == ["c2", "c3"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("added", ["c0", "c1", "c2", "c3"]),
        # Margins -2, 0.1 and 1: the smallest first, without their signs.
        ("uncertain", ["c1", "c2", "c0", "c3"]),
        # Probabilities 0.1, 0.9 and, as the last run says, 0.5.
        ("flipped", ["c1", "c2", "c0", "c3"]),
        # Two opposite opinions about c3; of those about c2 one is a tie; both of c1 are the same.
        ("disputed", ["c3", "c2", "c1", "c0"]),
    ],
)
def test_the_order_is_by_what_is_worth_judging_and_the_rest_comes_last(memory, order, expected):
    comparisons = filled(memory, 4)
    memory.add_scores("policy", [("c0", -2.0), ("c1", 0.1), ("c2", 1.0)])
    memory.add_flip_probabilities("run 1", [("c0", 0.1), ("c1", 0.9), ("c2", 0.95)])
    memory.add_flip_probabilities("run 2", [("c2", 0.5)])
    memory.judge(a_judgment(comparisons[3], 0))
    memory.add_verdicts([Verdict("c3", "judge", (1, 2), "", {}), Verdict("c3", "judge", (2, 1), "", {})])
    memory.add_verdicts([Verdict("c2", judge, ranks, "", {}) for judge, ranks in (("one", (1, 1)), ("two", (1, 2)))])
    memory.add_verdicts([Verdict("c1", judge, (1, 2), "", {}) for judge in ("one", "two")])
    assert memory.ordered_ids(order) == expected
    assert Queue(memory, order=order).peek("bob", 9) == [id for id in expected if id != "c3"], "which has its judgment"


def test_scores_that_come_later_change_the_order_when_it_is_read_again(memory):
    filled(memory, 3)
    queue = Queue(memory, order="uncertain")
    assert queue.next("ada") == "c0"
    memory.add_scores("policy", [("c2", 0.1)])
    queue.reorder()
    assert queue.peek("ada", 9) == ["c2", "c1"] and queue.next("ada") == "c0" and queue.next("bob") == "c2"


@pytest.mark.parametrize("wrong", [{"order": "best"}, {"overlap": 0}])
def test_another_order_or_overlap_is_refused(memory, wrong):
    with pytest.raises(ValueError, match="expected one of added, uncertain, flipped, disputed, and 1 or more"):
        Queue(memory, **wrong)


# ---- whatever labelers do ---------------------------------------------------------------------------------------------------

LABELERS = ("ada", "bob", "eve")
WHAT = ("judge", "judge", "judge", "look", "skip", "pass", "undo", "leave", "wait", "add")
STEP = st.tuples(st.sampled_from(LABELERS), st.sampled_from(WHAT))


class Events:
    """The events of a store, without a database. Nobody judges the same twice, so that all judgments stand."""

    def __init__(self, n: int):
        self.said: dict[str, dict[str, bool]] = {f"c{index}": {} for index in range(n)}

    def ordered_ids(self, order: str) -> list[str]:
        return list(self.said)

    def judged_by(self, comparisons=None) -> list:
        return [(id, labeler, counts, False) for id in comparisons or self.said for labeler, counts in self.said[id].items()]


class Model:
    """What must hold of a queue, kept the plain way: by counting."""

    def __init__(self, overlap: int, n: int):
        self.events, self.clock, self.overlap = Events(n), Clock(), overlap
        self.queue = Queue(self.events, overlap, lease_seconds=100, clock=self.clock)
        self.history: dict[str, list[str]] = {labeler: [] for labeler in LABELERS}
        self.held: dict[str, tuple[str, float]] = {}
        self.passed: dict[str, set[str]] = {labeler: set() for labeler in LABELERS}

    def load(self, id: str, labeler: str) -> int:
        """How many others judged or are judging a comparison."""
        judges = {name for name, counts in self.events.said[id].items() if counts}
        return len((judges | {name for name, (held, _) in self.held.items() if held == id}) - {labeler})

    def open_for(self, labeler: str) -> list[str]:
        return [id for id in self.events.said if labeler not in self.events.said[id] and self.load(id, labeler) < self.overlap]

    def expire(self) -> None:
        self.held = {name: (id, end) for name, (id, end) in self.held.items() if end > self.clock.now}

    def next(self, labeler: str, skip: str | None = None) -> str | None:
        self.expire()
        before = self.held.pop(labeler, (None, 0))[0]
        choices = self.open_for(labeler)
        if skip in choices:
            self.passed[labeler].add(skip)
        assert self.queue.remaining(labeler) == len(choices)
        upcoming = self.queue.peek(labeler, 99)
        assert sorted(upcoming) == sorted(set(choices) - {before})
        given = self.queue.next(labeler, skip)
        assert (given is None) == (not choices), "nobody waits while something is left for them"
        if given is None:
            return None
        assert given in choices, "nobody gets one twice, or one that has enough"
        if before in choices and before != skip:
            assert given == before, "what they have stays"
        elif fresh := [id for id in choices if id not in self.passed[labeler]]:
            least = min(self.load(id, labeler) for id in fresh)
            assert given == next(id for id in fresh if self.load(id, labeler) == least), "the fewest first, then the oldest"
        self.held[labeler] = (given, self.clock.now + 100)
        return given

    def judge(self, labeler: str, counts: bool) -> None:
        if given := self.next(labeler):
            self.events.said[given][labeler] = counts
            self.queue.judged(labeler, given)
            self.held.pop(labeler)
            self.passed[labeler].discard(given)
            self.history[labeler].append(given)
            assert sum(self.events.said[given].values()) <= self.overlap, "nobody judges what has enough"

    def undo(self, labeler: str) -> None:
        self.expire()
        if self.history[labeler]:
            last = self.history[labeler].pop()
            del self.events.said[last][labeler]
            self.queue.undone(labeler, last)
            self.passed[labeler].discard(last)
            if last in self.open_for(labeler):
                self.held[labeler] = (last, self.clock.now + 100)

    def leave(self, labeler: str) -> None:
        self.queue.release(labeler)
        self.held.pop(labeler, None)

    def step(self, labeler: str, what: str) -> None:
        if what in ("judge", "skip"):
            self.judge(labeler, what == "judge")
        elif what == "look":
            self.next(labeler)
        elif what == "pass":
            self.next(labeler, skip=self.next(labeler))
        elif what == "undo":
            self.undo(labeler)
        elif what == "leave":
            self.leave(labeler)
        elif what == "wait":
            self.clock.now += 60
        elif what == "add":
            new = f"c{len(self.events.said)}"
            self.events.said[new] = {}
            self.queue.added([new])


@given(overlap=st.integers(1, 3), n=st.integers(0, 5), steps=st.lists(STEP, max_size=40))
def test_whatever_labelers_do_everyone_gets_what_is_theirs(overlap, n, steps):
    model = Model(overlap, n)
    for labeler, what in steps:
        model.step(labeler, what)
    for labeler in LABELERS:
        model.leave(labeler)
    # In the end everything is judged as often as it can be.
    for labeler in LABELERS:
        for _ in model.events.said:
            model.judge(labeler, True)
    assert not any(model.open_for(labeler) for labeler in LABELERS)
    again = Queue(model.events, overlap)
    assert [again.next(labeler) for labeler in LABELERS] == [None] * len(LABELERS)


# ---- many at once -----------------------------------------------------------------------------------------------------------


def test_fifty_labelers_judge_ten_thousand_comparisons_and_none_twice():
    labelers, n, overlap = 50, 10_000, 2
    events = Events(n)
    queue = Queue(events, overlap)
    seconds = []

    def label(name: str) -> None:
        while True:
            begun = perf_counter()
            id = queue.next(name)
            seconds.append(perf_counter() - begun)
            if id is None:
                return
            events.said[id][name] = True
            queue.judged(name, id)

    all_at_once(label, labelers)
    assert Counter(len(names) for names in events.said.values()) == {overlap: n}, "nothing is lost, and nobody is asked twice"
    assert len(seconds) == n * overlap + labelers
    print(f"next, with waiting for others: median {sorted(seconds)[len(seconds) // 2] * 1e3:.3f} ms")
