"""Who judges what next: every comparison by `overlap` people, nobody one twice, and no two the same sooner than needed.

The queue is in memory: it is built from the store, and told of every event after the store has kept it. What a labeler was
given is leased to them for a while, so that others get something else. All methods may be called from any thread.
"""

import heapq
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from preference_collection.store.model import ORDERS
from preference_collection.store.store import Store

# A judgment that stands: (comparison, labeler, whether it is more than a skip, whether it settles).
Row = tuple[str, str, bool, bool]


class Leases:
    """Who has what before them, and until when: at most one comparison each."""

    def __init__(self):
        """Nobody has anything."""
        self._held: dict[str, tuple[str, float]] = {}
        self._holders: dict[str, set[str]] = {}
        self._ends: list[tuple[float, str]] = []

    def of(self, labeler: str) -> str | None:
        """What a labeler has before them."""
        return self._held.get(labeler, (None,))[0]

    def holders(self, comparison: str) -> set[str]:
        """Who has a comparison before them."""
        return self._holders.get(comparison, set())

    def take(self, labeler: str, comparison: str, end: float) -> None:
        """Lease a comparison to a labeler who has none."""
        self._held[labeler] = (comparison, end)
        self._holders.setdefault(comparison, set()).add(labeler)
        heapq.heappush(self._ends, (end, labeler))

    def drop(self, labeler: str) -> None:
        """End a labeler's lease."""
        comparison, _ = self._held.pop(labeler)
        self._holders[comparison].discard(labeler)
        if not self._holders[comparison]:
            del self._holders[comparison]

    def ended(self, moment: float) -> Iterator[str]:
        """The labelers whose leases have ended, to be dropped one by one."""
        while self._ends and self._ends[0][0] <= moment:
            end, labeler = heapq.heappop(self._ends)
            # Leases that were dropped or renewed leave their ends behind.
            if self._held.get(labeler, (None, None))[1] == end:
                yield labeler


class Waiting:
    """The comparisons that need more judgments, and who judged or is judging which."""

    def __init__(self, overlap: int):
        """Without comparisons. overlap: how many people judge each."""
        self.overlap = overlap
        self.leases = Leases()
        self.ids: list[str] = []
        self.places: dict[str, int] = {}
        self.judges: dict[str, set[str]] = {}  # by comparison: whose judgment counts
        self.settled: set[str] = set()
        self.seen: dict[str, set[str]] = {}  # by labeler: what they judged or skipped
        # By comparison: how many judged it or are judging it. By this number: the places of those that need more, in order.
        self.loads: dict[str, int] = {}
        self.by_load: list[list[int]] = [[] for _ in range(overlap)]

    def append(self, ids: list[str], rows: Iterable[Row]) -> None:
        """Add comparisons at the end, with the judgments of them."""
        for id in ids:
            self.places[id] = len(self.ids)
            self.judges[id] = set()
            self.ids.append(id)
        self._take(rows)
        for id in ids:
            self._put(id)

    def replace(self, id: str, rows: Iterable[Row]) -> None:
        """Forget the judgments of a comparison, and take in those that stand."""
        if id in self.places:
            with self._moving(id):
                for seen in self.seen.values():
                    seen.discard(id)
                self.judges[id].clear()
                self.settled.discard(id)
                self._take(rows)

    def _take(self, rows: Iterable[Row]) -> None:
        for id, labeler, counts, settles in rows:
            if id not in self.places:
                continue
            if settles:
                self.settled.add(id)
                continue
            self.seen.setdefault(labeler, set()).add(id)
            if counts:
                self.judges[id].add(labeler)

    def lease(self, labeler: str, id: str, end: float) -> None:
        """Lease a comparison to a labeler until a moment."""
        self.release(labeler)
        with self._moving(id):
            self.leases.take(labeler, id, end)

    def release(self, labeler: str) -> None:
        """End a labeler's lease, if they have one."""
        if (held := self.leases.of(labeler)) is not None:
            with self._moving(held):
                self.leases.drop(labeler)

    def in_order(self, labeler: str) -> Iterator[str]:
        """What a labeler may judge, those first that the fewest judged or are judging."""
        seen = self.seen.get(labeler, ())
        return (id for places in self.by_load for place in places if (id := self.ids[place]) not in seen)

    def is_open(self, id: str | None, labeler: str) -> bool:
        """Whether a labeler may judge a comparison."""
        if id not in self.places or id in self.settled or id in self.seen.get(labeler, ()):
            return False
        return len((self.judges[id] | self.leases.holders(id)) - {labeler}) < self.overlap

    def number(self, labeler: str) -> int:
        """How many a labeler may judge."""
        judged = sum(self.loads[id] < self.overlap for id in self.seen.get(labeler, ()))
        # What is leased to them may have all that it needs with them.
        held = self.leases.of(labeler)
        with_them = held is not None and self.loads[held] >= self.overlap and self.is_open(held, labeler)
        return sum(map(len, self.by_load)) - judged + with_them

    @contextmanager
    def _moving(self, id: str):
        """While something about a comparison changes, it waits nowhere."""
        if self.loads[id] < self.overlap:
            places = self.by_load[self.loads[id]]
            del places[bisect_left(places, self.places[id])]
        yield
        self._put(id)

    def _put(self, id: str) -> None:
        load = self.overlap if id in self.settled else len(self.judges[id] | self.leases.holders(id))
        self.loads[id] = load
        if load < self.overlap:
            insort(self.by_load[load], self.places[id])


class Queue:
    """What each labeler judges next."""

    def __init__(
        self, store: Store, overlap: int = 1, order: str = "added", lease_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        """overlap: how many people judge each comparison. order: one of ORDERS. clock: the time in seconds.

        Raises ValueError for another order, and an overlap below 1.
        """
        if order not in ORDERS or overlap < 1:
            raise ValueError(f"found order {order!r} and overlap {overlap}, expected one of {', '.join(ORDERS)}, and 1 or more")
        self._store, self._order, self._lease_seconds, self._clock = store, order, lease_seconds, clock
        self._lock = threading.RLock()
        self._waiting = Waiting(overlap)
        self._passed: dict[str, dict[str, None]] = {}  # by labeler: what they went on from without judging it
        self.added(store.ordered_ids(order))

    # ---- what comes next ----------------------------------------------------------------------------------------------------

    def next(self, labeler: str, skip: str | None = None) -> str | None:
        """The comparison that a labeler should judge next, leased to them; None if nothing is left for them.

        It stays the same until they judge it, their lease ends, or they go on from it: `skip` is what they do not want to see
        now. That comes again when nothing else is left.
        """
        with self._lock:
            self._end_leases()
            if skip is not None and self._waiting.is_open(skip, labeler):
                passed = self._passed.setdefault(labeler, {})
                passed.pop(skip, None)
                passed[skip] = None
            held = self._waiting.leases.of(labeler)
            self._waiting.release(labeler)
            stays = held != skip and self._waiting.is_open(held, labeler)
            chosen = held if stays else next(self._candidates(labeler), None)
            if chosen is not None:
                self._lease(labeler, chosen)
            return chosen

    def peek(self, labeler: str, n: int) -> list[str]:
        """The ids of the next n comparisons of a labeler after the one that is leased to them, without leasing them."""
        with self._lock:
            self._end_leases()
            held = self._waiting.leases.of(labeler)
            return list(islice((id for id in self._candidates(labeler) if id != held), n))

    def remaining(self, labeler: str) -> int:
        """How many comparisons are left for a labeler, with the one that is leased to them."""
        with self._lock:
            self._end_leases()
            return self._waiting.number(labeler)

    def done(self, labeler: str) -> int:
        """How many comparisons a labeler has judged or skipped."""
        with self._lock:
            return len(self._waiting.seen.get(labeler, ()))

    def _candidates(self, labeler: str) -> Iterator[str]:
        """What a labeler may judge, the best first. What they went on from comes last, the longest ago first."""
        passed = self._passed.get(labeler, {})
        yield from (id for id in self._waiting.in_order(labeler) if id not in passed)
        yield from (id for id in passed if self._waiting.is_open(id, labeler))

    def _lease(self, labeler: str, comparison: str) -> None:
        self._waiting.lease(labeler, comparison, self._clock() + self._lease_seconds)

    def _end_leases(self) -> None:
        for labeler in self._waiting.leases.ended(self._clock()):
            self._waiting.release(labeler)

    # ---- events -------------------------------------------------------------------------------------------------------------

    def judged(self, labeler: str, comparison: str) -> None:
        """A labeler has judged, skipped or settled a comparison, and the store has kept it."""
        with self._lock:
            if self._waiting.leases.of(labeler) == comparison:
                self._waiting.release(labeler)
            self._read_again(labeler, comparison)

    def undone(self, labeler: str, comparison: str) -> None:
        """A labeler has undone their judgment of a comparison, and the store has kept it: it is leased to them again.

        If others have judged it or are judging it meanwhile, it is not.
        """
        with self._lock:
            self._read_again(labeler, comparison)
            if self._waiting.is_open(comparison, labeler):
                self._lease(labeler, comparison)

    def _read_again(self, labeler: str, comparison: str) -> None:
        """Take in what the store says of a comparison: under the lock, so that what is read last is what counts."""
        self._passed.get(labeler, {}).pop(comparison, None)
        self._waiting.replace(comparison, self._store.judged_by([comparison]))

    def added(self, comparisons: Iterable[str]) -> None:
        """The store has new comparisons; they come last in the order."""
        with self._lock:
            new = [id for id in dict.fromkeys(comparisons) if id not in self._waiting.places]
            if new:
                self._waiting.append(new, self._store.judged_by(new))

    def release(self, labeler: str) -> None:
        """What is leased to a labeler is free for others, because they leave."""
        with self._lock:
            self._waiting.release(labeler)

    def reorder(self) -> None:
        """Read the store again for the order, which new scores and verdicts change. Leases stay."""
        with self._lock:
            fresh = Waiting(self._waiting.overlap)
            fresh.leases = self._waiting.leases
            ids = self._store.ordered_ids(self._order)
            fresh.append(ids, self._store.judged_by())
            self._waiting = fresh
