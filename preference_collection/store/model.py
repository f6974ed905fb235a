"""What the store keeps: tasks, answers of models, comparisons of answers, judgments of people, and verdicts of models.

Answers of a comparison are named by their index in it. Ranks have one number for each answer: 1 is best, equal numbers are
equally good, and none is left out between them.
"""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import permutations
from math import isfinite

from preference_training.data.records.record import Prompt, prompt_text

# Kinds of tasks: programming problems, and prompts of any other kind.
KINDS = ("code", "text")
# A judgment ranks the answers, finds all equally good, all equally bad, or leaves them to others.
CHOICES = ("ranked", "tie", "bad", "skip")
# Filters of the list: all tasks, those that this labeler has not judged, those on which labelers disagree.
FILTERS = ("all", "unlabeled", "disagreement")
# Orders of the list and of the queue: by time added; by the policy's uncertainty about which answer is better; by the
# probability that a label is wrong, as training found it; by how much people and judges disagree.
ORDERS = ("added", "uncertain", "flipped", "disputed")
# The numbers of answers that a comparison may have.
LEAST_ANSWERS, MOST_ANSWERS = 2, 5


def new_id() -> str:
    """A unique id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def shown_order(labeler: str, comparison: str, n: int) -> tuple[int, ...]:
    """The order in which a labeler sees the n answers of a comparison: pseudo-random, but always the same."""
    orders = list(permutations(range(n)))
    digest = hashlib.sha256(f"{labeler}\0{comparison}".encode()).digest()
    return orders[int.from_bytes(digest, "little") % len(orders)]


def ranks_of_pick(best: int, n: int) -> tuple[int, ...]:
    """The ranks that prefer one of n answers to all others."""
    return tuple(1 if index == best else 2 for index in range(n))


def ranks_of_scores(scores: Sequence[float]) -> tuple[int, ...]:
    """The ranks of answers by their scores; the highest is the best, and equal scores are equal ranks."""
    places = {score: place for place, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return tuple(places[score] for score in scores)


@dataclass(frozen=True)
class Task:
    """A prompt to answer: a text, or a conversation. kind is one of KINDS.

    A task of kind "code" is a programming problem; function_name and tests are empty if it has none. Each test is a dict with
    `args`, `expected` and optionally `compare`: see `sandbox.py`.
    """

    id: str
    title: str
    difficulty: str
    prompt: Prompt
    function_name: str = ""
    tests: tuple[dict, ...] = ()
    kind: str = "text"

    def prompt_text(self) -> str:
        """The prompt as one text, for lists."""
        return self.prompt if isinstance(self.prompt, str) else "\n\n".join(f"{turn[0]}: {turn[1]}" for turn in self.prompt)

    def same_prompt(self, other: "Task") -> bool:
        """Whether both ask the same."""
        return prompt_text(self.prompt) == prompt_text(other.prompt)


@dataclass(frozen=True)
class Answer:
    """An answer written by a model. code is what was extracted from the text, None if it contains none.

    prompt is what the model was given, with the instruction. parameters are those of the request, and what it ended with.
    """

    id: str
    model: str
    prompt: Prompt
    parameters: dict
    text: str
    code: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two to five answers to one task. Their order does not determine how they are shown."""

    id: str
    task: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Judgment:
    """A labeler's judgment of a comparison: choice is one of CHOICES, seconds the time taken.

    order has the indices of the answers as they were shown, from left to right or from top to bottom. ranks is given if the
    choice is "ranked"; all equal would be a tie. edited is a better answer that the labeler wrote, and edited_from the index of
    the answer that it began as. A judgment that settles is the last word on its comparison.
    """

    id: str
    comparison: str
    labeler: str
    choice: str
    order: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    seconds: float | None = None
    reasons: tuple[str, ...] = ()
    comment: str = ""
    edited: str = ""
    edited_from: int | None = None
    settles: bool = False


@dataclass(frozen=True)
class Verdict:
    """A model's judgment of a comparison; ranks that are all equal mean a tie."""

    comparison: str
    judge: str
    ranks: tuple[int, ...]
    reason: str
    parameters: dict


@dataclass(frozen=True)
class Votes:
    """The judgments of a comparison. best counts, for each answer, the labelers who rank it first."""

    best: tuple[int, ...]
    ties: int
    bad: int
    skips: int


@dataclass(frozen=True)
class Judged:
    """A current judgment with what was judged, for export. settled is the id of the judgment that settles the comparison."""

    judgment: Judgment
    moment: datetime
    task: Task
    comparison: Comparison
    votes: Votes
    settled: str | None


@dataclass(frozen=True)
class TaskRow:
    """A task in the list: its newest comparison, the number of judgments, whether one is mine, and whether labelers disagree.

    margin is how much the policy prefers the first answer to the second; None if it was not scored.
    """

    id: str
    title: str
    difficulty: str
    comparison: str | None
    judgments: int
    mine: bool
    disagreement: bool
    margin: float | None


@dataclass(frozen=True)
class Query:
    """The filters of the list, for a labeler: only is one of FILTERS, order one of ORDERS, search a part of the title."""

    labeler: str = ""
    only: str = "all"
    order: str = "added"
    difficulty: str = ""
    search: str = ""


# ---- what is no judgment ----------------------------------------------------------------------------------------------------


def ranks_error(ranks: Sequence[int], n: int) -> str | None:
    """The error in the ranks of n answers, as the end of a sentence, or None."""
    if len(ranks) != n:
        return f"has {len(ranks)} ranks for {n} answers, expected one for each"
    if not all(type(rank) is int for rank in ranks) or set(ranks) != set(range(1, len(set(ranks)) + 1)):
        return f"has the ranks {tuple(ranks)}, expected 1 for the best and none left out"
    return None


def judgment_error(judgment: Judgment, n: int) -> str | None:
    """The error in a judgment of n answers, as the end of a sentence, or None."""
    if judgment.choice not in CHOICES:
        return f"has the choice {judgment.choice!r}, expected one of {', '.join(CHOICES)}"
    if not all(type(index) is int for index in judgment.order) or sorted(judgment.order) != list(range(n)):
        return f"has the order {tuple(judgment.order)}, expected each of 0 to {n - 1} once"
    if judgment.choice != "ranked" and judgment.ranks:
        return f"has ranks and the choice {judgment.choice!r}"
    if judgment.choice == "ranked":
        if error := ranks_error(judgment.ranks, n):
            return error
        if max(judgment.ranks) == 1:
            return "ranks all answers equally, which is the choice 'tie'"
    if judgment.choice == "skip" and judgment.settles:
        return "settles nothing with the choice 'skip'"
    if judgment.edited_from is not None and (judgment.edited_from not in range(n) or not judgment.edited):
        return f"has edited_from {judgment.edited_from!r}, expected the index of an answer that was edited"
    if judgment.seconds is not None and not (isfinite(judgment.seconds) and judgment.seconds >= 0):
        return f"took {judgment.seconds!r} seconds, expected a number of at least 0"
    return None
