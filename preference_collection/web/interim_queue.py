"""A queue in order of addition, until the store has its own."""

import threading

from preference_collection.store.store import Store


class Queue:
    """Who judges what next."""

    def __init__(self, store: Store, overlap: int, order: str, lease_seconds: float):
        """Of the store's comparisons."""
        self._ids, self._lock = list(store.comparison_ids()), threading.Lock()
        self._done: dict[str, set[str]] = {}
        for judged in store.judgments():
            self._done.setdefault(judged.judgment.labeler, set()).add(judged.comparison.id)

    def _left(self, labeler: str) -> list[str]:
        done = self._done.setdefault(labeler, set())
        return [id for id in self._ids if id not in done]

    def next(self, labeler: str, skip: str | None = None) -> str | None:
        """The next comparison of a labeler."""
        with self._lock:
            left = self._left(labeler)
            return next((id for id in left if id != skip), left[0] if left else None)

    def peek(self, labeler: str, n: int) -> list[str]:
        """The next ones."""
        return self._left(labeler)[:n]

    def judged(self, labeler: str, comparison: str) -> None:
        """One was judged."""
        with self._lock:
            self._done.setdefault(labeler, set()).add(comparison)

    def undone(self, labeler: str, comparison: str) -> None:
        """A judgment was undone."""
        with self._lock:
            self._done.setdefault(labeler, set()).discard(comparison)

    def added(self, comparisons: list[str]) -> None:
        """Comparisons were added."""
        with self._lock:
            self._ids += comparisons

    def remaining(self, labeler: str) -> int:
        """How many are left for a labeler."""
        return len(self._left(labeler))
