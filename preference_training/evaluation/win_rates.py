"""The win rate of the policy's responses against those of another model, under a judge.

A judge that may have a position bias is asked in both orders; two different verdicts make a tie. Comparisons without a verdict
are counted separately and excluded; where they exceed a share of all, there is no win rate.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import xxhash

from preference_training.core.errors import UserError
from preference_training.evaluation.intervals import share_interval
from preference_training.evaluation.judges import OUTCOMES, Judge, NoVerdictError


@dataclass(frozen=True)
class Comparison:
    """Two responses to a prompt: the policy's and the other model's."""

    prompt: str
    policy: str
    other: str

    def questions(self, judge: Judge) -> list[tuple[str, str, str]]:
        """The questions to the judge: (prompt, first, second). None for equal responses."""
        if self.policy == self.other:
            return []
        orders = [(self.prompt, self.policy, self.other), (self.prompt, self.other, self.policy)]
        return orders if judge.both_orders else orders[:1]


class VerdictStore:
    """Verdicts in a JSON Lines file: written as soon as they are known, and never asked for again.

    key_of_path: the key of the configuration that says where, for messages.
    """

    def __init__(self, path: Path, key_of_path: str = "evaluation.to"):
        self.path, self.key_of_path, self.known = path, key_of_path, {}
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                if row["verdict"] in OUTCOMES:
                    self.known[row["key"]] = row["verdict"]
            except (ValueError, LookupError, TypeError, RecursionError):
                # An incomplete line of a process that was killed.
                continue
        self.writing = threading.Lock()
        self.begin = b"" if content.endswith(b"\n") or not content else b"\n"

    @staticmethod
    def key(judge: Judge, question: tuple[str, str, str]) -> str:
        """A hash of a judge and its complete request."""
        return xxhash.xxh3_128_hexdigest(json.dumps([judge.identity, judge.request(*question)]).encode())

    def add(self, judge: Judge, question: tuple[str, str, str], verdict: str) -> None:
        """Store a verdict."""
        key = self.key(judge, question)
        texts = dict(zip(("prompt", "first", "second"), question, strict=True))
        row = {"key": key, "judge": judge.identity, "verdict": verdict, **texts}
        with self.writing:
            try:
                with self.path.open("ab", buffering=0) as file:
                    file.write(self.begin + json.dumps(row).encode() + b"\n")
            except OSError as error:
                raise UserError(f"{self.key_of_path}: cannot write {self.path}: {error.strerror}. Free some space.") from error
            self.begin = b""
            self.known[key] = verdict


def ask_all(judge: Judge, comparisons: Sequence[Comparison], store: VerdictStore, workers: int, max_missing: int) -> Counter:
    """Ask the questions without a verdict, `workers` at a time; returns the reasons for missing verdicts.

    Stops where more than `max_missing` verdicts are missing.
    """
    judge.begin()
    asked = {VerdictStore.key(judge, question): question for each in comparisons for question in each.questions(judge)}
    missing: Counter = Counter()
    unknown = [question for key, question in asked.items() if key not in store.known]
    judge.prepare(unknown)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(ask, judge, question, store) for question in unknown]
        try:
            for future in as_completed(waiting):
                try:
                    future.result()
                except NoVerdictError as error:
                    missing[error.reason] += 1
                except CancelledError:
                    missing["not asked"] += 1
                if missing.total() > max_missing:
                    stop_asking(judge, waiting)
        except BaseException:
            stop_asking(judge, waiting)
            raise
    return missing


def ask(judge: Judge, question: tuple[str, str, str], store: VerdictStore) -> None:
    """Ask one question, and store its verdict before the worker continues with another."""
    store.add(judge, question, judge.better(*question))


def stop_asking(judge: Judge, waiting: Iterable[Future]) -> None:
    """Cancel waiting questions; those in progress end after their current attempt."""
    judge.stop()
    for future in waiting:
        future.cancel()


def outcome(comparison: Comparison, judge: Judge, store: VerdictStore) -> float | None:
    """1 for a win of the policy, 0 for a loss, 0.5 for a tie, None without a verdict."""
    verdicts = [store.known.get(VerdictStore.key(judge, question)) for question in comparison.questions(judge)]
    if None in verdicts:
        return None
    # How much better does not matter here. In the second order the policy's response comes second.
    found = {abs(number - OUTCOMES[verdict]) for number, verdict in enumerate(verdicts)}
    return found.pop() if len(found) == 1 else 0.5


class Judged(NamedTuple):
    """What a judge said of comparisons. outcomes: of each, as `outcome` has them. reasons: those for missing verdicts.

    retried: the number of retries, by reason.
    """

    outcomes: list[float | None]
    store: VerdictStore
    reasons: Counter
    retried: Counter
    note: str | None
    is_enough: bool


def judge_all(judge: Judge, comparisons: Sequence[Comparison], path: Path, settings) -> Judged:
    """Judge all comparisons; the parameters are those of `win_rate`."""
    note = judge.identify()
    store = VerdictStore(path)
    max_unjudged = int(settings.max_missing * len(comparisons))
    # Each comparison has one or two questions and needs all their verdicts.
    max_missing = max_unjudged * (2 if judge.both_orders else 1)
    questions = {VerdictStore.key(judge, question) for each in comparisons for question in each.questions(judge)}
    if store.known:
        earlier = len(questions & store.known.keys())
        print(f"judge: {earlier:,} of {len(questions):,} verdicts reused from earlier evaluations, {path}", flush=True)
    reasons = ask_all(judge, comparisons, store, settings.judge_workers, max_missing)
    outcomes = [outcome(comparison, judge, store) for comparison in comparisons]
    unanswered = outcomes.count(None)
    retried = judge.take_retries()
    return Judged(outcomes, store, reasons, retried, note, unanswered < len(outcomes) and unanswered <= max_unjudged)


def win_rate(judge: Judge, comparisons: Sequence[Comparison], path: Path, settings) -> dict:
    """Judge all comparisons; returns the counts and the win rate, which is wins plus half the ties over all that were judged.

    path: the file of verdicts, from which earlier ones are reused. settings: the section `evaluation`. The rate is None where
    more than `max_missing` of the comparisons have no verdict.
    """
    return summary(judge, judge_all(judge, comparisons, path, settings), settings)


def summary(judge: Judge, found: Judged, settings) -> dict:
    """The counts and the win rate of what was judged, in plain values."""
    judged = numpy.array([value for value in found.outcomes if value is not None])
    rate = None
    if found.is_enough:
        low, high = share_interval(judged)
        rate = {"mean": float(judged.mean()), "low": low, "high": high}
    return {
        "judge": settings.judge,
        "against": settings.against,
        "comparisons": len(found.outcomes),
        "wins": int((judged == 1).sum()),
        "ties": int((judged == 0.5).sum()),
        "losses": int((judged == 0).sum()),
        "unanswered": len(found.outcomes) - len(judged),
        "reasons": dict(found.reasons.most_common()),
        "retried": dict(found.retried.most_common()),
        "note": found.note,
        "rate": rate,
    }
