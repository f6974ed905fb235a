"""How often the policy's answers win against another's under a judge.

A judge that may prefer a place to an answer is asked in both orders; where its two verdicts differ, that is a tie. What it does
not answer is never a win: it is counted apart and left out, and beyond a share of such comparisons there is no rate.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy
import xxhash

from preference_training.core.errors import UserError
from preference_training.evaluation.intervals import share_interval
from preference_training.evaluation.judges import VERDICTS, Judge, NoJudgementError


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt: the policy's, and the other's that it is compared with."""

    prompt: str
    policy: str
    other: str

    def questions(self, judge: Judge) -> list[tuple[str, str, str]]:
        """What the judge is asked: prompt, first, second. Nothing where both answers are the same text."""
        if self.policy == self.other:
            return []
        orders = [(self.prompt, self.policy, self.other), (self.prompt, self.other, self.policy)]
        return orders if judge.both_orders else orders[:1]


class Judgements:
    """Verdicts in a file of JSON lines: each is there as soon as it is known, and is not asked for again."""

    def __init__(self, path: Path):
        self.path, self.known = path, {}
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                if row["verdict"] in VERDICTS:
                    self.known[row["key"]] = row["verdict"]
            except (ValueError, LookupError, TypeError, RecursionError):
                # Half a line: the process was killed while it wrote it.
                continue
        self.writing = threading.Lock()
        self.begin = b"" if content.endswith(b"\n") or not content else b"\n"

    @staticmethod
    def key(judge: Judge, question: tuple[str, str, str]) -> str:
        """Stands for a judge and all that it is asked."""
        return xxhash.xxh3_128_hexdigest(json.dumps([judge.identity, judge.request(*question)]).encode())

    def add(self, judge: Judge, question: tuple[str, str, str], verdict: str) -> None:
        """Keep a verdict."""
        key = self.key(judge, question)
        texts = dict(zip(("prompt", "first", "second"), question, strict=True))
        row = {"key": key, "judge": judge.identity, "verdict": verdict, **texts}
        with self.writing:
            try:
                with self.path.open("ab", buffering=0) as file:
                    file.write(self.begin + json.dumps(row).encode() + b"\n")
            except OSError as error:
                raise UserError(f"evaluation.to: {self.path} cannot be written to: {error.strerror}. Make room.") from error
            self.begin = b""
            self.known[key] = verdict


def ask_all(
    judge: Judge, comparisons: Sequence[Comparison], judgements: Judgements, workers: int, most_missing: int
) -> Counter:
    """Ask what is not known yet, `workers` questions at a time; returns the reasons for those that were not answered.

    Asks no more where more than `most_missing` questions have no answer.
    """
    asked = {Judgements.key(judge, question): question for each in comparisons for question in each.questions(judge)}
    missing: Counter = Counter()
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(ask, judge, q, judgements) for key, q in asked.items() if key not in judgements.known]
        try:
            for future in as_completed(waiting):
                try:
                    future.result()
                except NoJudgementError as error:
                    missing[error.reason] += 1
                except CancelledError:
                    missing["not asked"] += 1
                if missing.total() > most_missing:
                    stop_asking(judge, waiting)
        finally:
            stop_asking(judge, waiting)
    return missing


def ask(judge: Judge, question: tuple[str, str, str], judgements: Judgements) -> None:
    """Ask one question; its verdict is kept before whoever asks goes on to another."""
    judgements.add(judge, question, judge.better(*question))


def stop_asking(judge: Judge, waiting: Iterable[Future]) -> None:
    """Ask nothing more; what is being asked ends after its attempt."""
    judge.stop()
    for future in waiting:
        future.cancel()


def outcome(comparison: Comparison, judge: Judge, judgements: Judgements) -> float | None:
    """1 where the policy's answer is better, 0 where the other's is, 0.5 for a tie, None where it was not judged."""
    verdicts = [judgements.known.get(Judgements.key(judge, question)) for question in comparison.questions(judge)]
    if None in verdicts:
        return None
    values = {"first": 1.0, "second": 0.0, "tie": 0.5}
    # In the second order the policy's answer is the second one.
    found = {abs(number - values[verdict]) for number, verdict in enumerate(verdicts)}
    return found.pop() if len(found) == 1 else 0.5


def win_rate(judge: Judge, comparisons: Sequence[Comparison], path: Path, settings) -> dict:
    """Ask a judge for all comparisons, and how often the policy wins: wins and half the ties, of those that were judged.

    path: the file of verdicts, in which earlier ones are found. settings is the section `evaluation`. The rate is null where
    more than `max_missing` of the comparisons were not judged.
    """
    note = judge.identify()
    judgements = Judgements(path)
    most_missing = int(settings.max_missing * len(comparisons))
    # A comparison is missing if one of its two questions is.
    most = most_missing * (2 if judge.both_orders else 1)
    questions = {Judgements.key(judge, question) for each in comparisons for question in each.questions(judge)}
    if judgements.known:
        earlier = len(questions & judgements.known.keys())
        print(f"judge: {earlier:,} of {len(questions):,} verdicts are known from earlier evaluations, {path}", flush=True)
    reasons = ask_all(judge, comparisons, judgements, settings.judge_workers, most)
    outcomes = [outcome(comparison, judge, judgements) for comparison in comparisons]
    judged = numpy.array([value for value in outcomes if value is not None])
    unanswered = len(outcomes) - len(judged)
    rate = None
    if len(judged) and unanswered <= most_missing:
        low, high = share_interval(judged)
        rate = {"mean": float(judged.mean()), "low": low, "high": high}
    return {
        "judge": settings.judge,
        "against": settings.against,
        "comparisons": len(outcomes),
        "wins": int((judged == 1).sum()),
        "ties": int((judged == 0.5).sum()),
        "losses": int((judged == 0).sum()),
        "unanswered": unanswered,
        "reasons": dict(reasons.most_common()),
        "retried": dict(judge.retries.most_common()),
        "note": note,
        "rate": rate,
    }
