"""Says which rank the others wait for, before a collective times out.

Every process writes into the store of the run, now and then, what it does (`core.process_group.progress`). Rank 0 reads what
the others write, and the others what rank 0 writes. A process that is stopped, dead or out of reach is silent; one that is
elsewhere still says where.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch

from preference_training.core.process_group import local_rank, progress

# The share of the timeout after which a rank is waited for too long: the collective itself ends the run at the whole of it.
PATIENCE = 0.6
# The most seconds between two heartbeats, and how many there are at least in a timeout.
LONGEST_INTERVAL, PER_TIMEOUT = 10.0, 16
# So many missed heartbeats are silence.
MOST_MISSED = 4
# How many ranks are described in one line.
MOST_NAMED = 8


class Heartbeat(NamedTuple):
    """What a rank has last written: the number of the heartbeat, what it does, and for how many seconds it has done that."""

    number: int
    phase: str | None
    seconds: float

    def __str__(self) -> str:
        """In words."""
        return self.phase or "between steps"


class Heartbeats(threading.Thread):
    """Writes this rank's heartbeats and watches those of others, until `stop`.

    store: of the run. timeout: of its collectives. Unit: seconds. said: what it has said of ranks that are waited for.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, size: int, timeout: float):
        super().__init__(name="heartbeats", daemon=True)
        self.rank, self.size, self.patience = rank, size, PATIENCE * timeout
        self.interval = min(LONGEST_INTERVAL, timeout / PER_TIMEOUT)
        # A connection of its own: another would be held while a collective waits in it.
        self.store = torch.distributed.PrefixStore("heartbeats", store.clone())
        self.store.set_timeout(timedelta(seconds=max(1.0, 2 * self.interval)))
        self.seen: dict[int, Heartbeat] = {}
        # When each rank was last heard of, and the store reached.
        self.heard: dict[int, float] = {}
        self.number, self.said, self.said_of = 0, "", None
        self.ended = threading.Event()

    def stop(self) -> None:
        """End the thread."""
        self.ended.set()
        self.join(timeout=2 * self.interval)

    def run(self) -> None:
        """Write and watch."""
        reached = time.monotonic()
        watched = range(1, self.size) if self.rank == 0 else [0]
        self.heard = dict.fromkeys(range(self.size), reached)
        while not self.ended.wait(self.interval):
            try:
                self._write()
                self._read(watched)
                reached = time.monotonic()
                self._watch(watched)
            except (RuntimeError, OSError):
                # Of a run that ends, the store is gone.
                if time.monotonic() - reached > self.patience and not self.ended.is_set() and local_rank() == 0:
                    self._say(
                        f"rank {self.rank} does not reach the store of the run, on the machine of rank 0: that machine or its "
                        "first process does not answer"
                    )

    def _write(self) -> None:
        self.number += 1
        phase, since = progress.phase, progress.since
        self.store.set(str(self.rank), json.dumps([self.number, phase, time.monotonic() - since]))

    def _read(self, ranks: Iterable[int]) -> None:
        """Note the newest heartbeats of some ranks."""
        present = [rank for rank in ranks if self.store.check([str(rank)])]
        for rank in present:
            beat = Heartbeat(*json.loads(self.store.get(str(rank))))
            if self.seen.get(rank) != beat:
                self.seen[rank], self.heard[rank] = beat, time.monotonic()

    def _silent(self, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those of some ranks that have not been heard of for so long."""
        now = time.monotonic()
        return [rank for rank in ranks if now - self.heard[rank] > seconds]

    def _watch(self, watched: Iterable[int]) -> None:
        """Say who is waited for, once it takes too long."""
        silent = self._silent(watched, self.patience)
        waits = progress.phase is not None and time.monotonic() - progress.since > self.patience
        if self.rank == 0:
            if silent or waits:
                # Where rank 0 waits, some missed heartbeats are enough.
                silent = self._silent(watched, MOST_MISSED * self.interval)
                self._say(self._of_others(silent), silent)
        # The first rank that is heard of speaks for rank 0.
        elif silent and not self._any_heard(range(1, self.rank)):
            self._say(
                f"rank 0 has not been heard of for {self.patience:.0f} s; it last did: {self.seen.get(0, 'nothing')}", [0]
            )

    def _any_heard(self, ranks: range) -> bool:
        """Whether any of some ranks writes."""
        if not ranks:
            return False
        self._read(ranks)
        before = {rank: self.seen.get(rank) for rank in ranks}
        self.ended.wait(2 * self.interval)
        self._read(ranks)
        return any(self.seen.get(rank) != beat for rank, beat in before.items())

    def _of_others(self, silent: list[int]) -> str:
        """Which ranks rank 0 waits for, and what they last did."""
        here = Heartbeat(self.number, progress.phase, time.monotonic() - progress.since)
        begins = f"rank 0 has been in {here} for {here.seconds:.0f} s" if progress.phase else "rank 0 trains on"
        if silent:
            seconds = time.monotonic() - max(self.heard[rank] for rank in silent)
            what = f"not heard of for {seconds:.0f} s: {self._described(silent)}"
        elif elsewhere := [rank for rank, beat in sorted(self.seen.items()) if beat.phase != here.phase]:
            what = f"all ranks answer, and elsewhere are {self._described(elsewhere)}"
        else:
            what = "all ranks answer and are there too: either it takes that long, or the network between them fails"
        return f"{begins}; {what}"

    def _described(self, ranks: list[int]) -> str:
        named = [f"rank {rank} (last: {self.seen.get(rank, 'nothing')})" for rank in ranks[:MOST_NAMED]]
        return ", ".join(named) + (f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else "")

    def _say(self, text: str, waits_for: Sequence[int] = ()) -> None:
        """Print a line to stderr, which every rank has, once for each place and the ranks that it waits for."""
        key = progress.phase, tuple(waits_for)
        if key != self.said_of:
            self.said_of, self.said = key, text
            print(f"waiting: {text}", file=sys.stderr, flush=True)


_running: list[Heartbeats] = []


def start_heartbeats(store: torch.distributed.Store, rank: int, size: int, timeout: float) -> None:
    """Start those of this process, in a run of several. Unit of timeout: seconds."""
    if size > 1 and math.isfinite(timeout):
        _running.append(Heartbeats(store, rank, size, timeout))
        _running[-1].start()


def stop_heartbeats() -> None:
    """Stop those of this process."""
    progress.at(None)
    while _running:
        with suppress(RuntimeError):
            _running.pop().stop()


def explain(error: BaseException) -> None:
    """Add to an error what was said of ranks that were waited for."""
    for heartbeats in _running:
        if heartbeats.said:
            error.add_note(heartbeats.said)
