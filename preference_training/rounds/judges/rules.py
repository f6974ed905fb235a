"""Rules that a response is to keep: its length in some unit, and what it matches. The text of a rule is all that it is.

words<=50    sentences<=2    characters>=20    lines<=3    matches ^Yes    not matches (?i)as an AI
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from preference_training.core.errors import UserError, nearest
from preference_training.core.values import hash_values
from preference_training.rounds.judges.base import Judge, JudgedInput, Score

# A sentence ends with marks, perhaps with quotes or brackets behind them, before a space or the end; Chinese marks need none.
SENTENCE_END = re.compile("[.!?\u2026]+[\"')\\]\u201d\u2019]*(?=\\s|$)|[\u3002\uff01\uff1f]+")
UNITS: dict[str, Callable[[str], int]] = {
    "characters": lambda text: len(text.strip()),
    "words": lambda text: len(text.split()),
    "sentences": lambda text: count_sentences(text),
    "lines": lambda text: sum(bool(line.strip()) for line in text.splitlines()),
}
LENGTH = re.compile(r"\s*(\w+)\s*(<=|>=|<|>|==?|)\s*(\d*)\s*")
MATCHES = re.compile(r"\s*(not\s+)?matches\s+(.+)", re.DOTALL)
EXPECTED = f"UNIT<=N or UNIT>=N with one of {', '.join(UNITS)}, matches PATTERN, or not matches PATTERN"


def count_sentences(text: str) -> int:
    """The number of sentences: ends of sentences, and one more where text follows the last of them."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return len(ends) + bool(text[ends[-1] if ends else 0 :].strip())


class Rule(NamedTuple):
    """A rule. keeps: how far a text keeps it, 0 to 1, and why it does not keep all of it."""

    text: str
    keeps: Callable[[str], tuple[float, str | None]]


def read_rule(text: str, key: str) -> Rule:
    """The rule of a text. Raises UserError, which names the key that has it."""
    if found := MATCHES.fullmatch(text):
        return Rule(text, _matching(compiled(found[2], key), wanted=not found[1]))
    found = LENGTH.fullmatch(text)
    if not found or found[2] not in ("<=", ">=") or not found[3]:
        raise UserError(f"{key}: found {text!r}, expected {EXPECTED}.")
    if found[1] not in UNITS:
        raise UserError(f"{key}: {text!r}: no unit {found[1]!r}; {nearest(found[1], UNITS)}")
    return Rule(text, _counting(found[1], found[2], int(found[3])))


def compiled(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression. Raises UserError, which names the key that has it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression of Python's: {error}.") from error


def _matching(pattern: re.Pattern[str], wanted: bool) -> Callable[[str], tuple[float, str | None]]:
    def keeps(text: str) -> tuple[float, str | None]:
        found = pattern.search(text)
        if bool(found) == wanted:
            return 1.0, None
        return 0.0, f"nothing matches {pattern.pattern}" if wanted else f"{found[0][:60]!r} matches {pattern.pattern}"

    return keeps


def _counting(unit: str, sign: str, limit: int) -> Callable[[str], tuple[float, str | None]]:
    def keeps(text: str) -> tuple[float, str | None]:
        count = UNITS[unit](text)
        if count <= limit if sign == "<=" else count >= limit:
            return 1.0, None
        # What is too long or too short by less is better, so that there is something to learn from.
        return min(count, limit) / max(count, limit), f"{count} {unit}, expected {sign}{limit}"

    return keeps


class RulesJudge(Judge):
    """The mean over rules of how far a response keeps each, 0 to 1. A length rule that is not kept counts as limit / length."""

    at_once = 1024

    def __init__(self, name: str, rules: Sequence[Rule]):
        self.name, self.rules = name, rules
        self.identity = f"rules {hash_values([rule.text for rule in rules])}"

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """The score of each response; the reason is what the first rule says that it does not keep."""
        return [self._score(sample.response) for sample in samples]

    def _score(self, response: str) -> Score:
        found = [rule.keeps(response) for rule in self.rules]
        reasons = [reason for _, reason in found if reason]
        return Score(sum(value for value, _ in found) / len(found), reasons[0] if reasons else None)
