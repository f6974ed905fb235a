"""The columns of the first rows, and the names that columns have in common formats."""

import re
from collections.abc import Callable, Iterable

from preference_training.data.rows.values import is_missing, parse_text_list

# Column names, the usual ones first. Case does not matter, nor do blanks, dashes and underscores.
PROMPTS = (
    "prompt", "instruction", "question", "query", "messages", "conversations", "conversation", "dialogue", "context",
    "context_messages", "history", "input", "inputs", "user", "problem", "info",
)  # fmt: skip
CHOSEN_REJECTED = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"), ("preferred_output", "non_preferred_output"), ("preferred", "dispreferred"),
    ("preferred", "rejected"), ("accepted", "rejected"), ("chosen", "reject"), ("better", "worse"), ("winner", "loser"),
    ("chosen_response", "rejected_responses"), ("response", "rejected_response"), ("messages", "rejected_messages"),
    ("messages", "rejected_response"), ("response_j", "response_k"),
)  # fmt: skip
NUMBERED = re.compile(r"rejected\d+")
RESPONSES = ("completion", "response", "output", "solution", "answer", "target", "targets", "assistant")
LISTS = ("responses", "completions", "generations", "answers", "candidates", "outputs")
SCORES = ("scores", "ratings", "rating", "score", "rewards")
RANKS = ("ranks", "rank", "ranking", "rankings")
LISTED_TEXTS = ("text", "response", "answer", "content", "completion", "generation", "output")
LISTED_SCORES = ("score", "overall_score", "pm_score", "rating", "reward")
LABEL_NAMES = ("label", "labels", "kto_tag", "is_desirable", "desirable")
# Labels where they are true or false.
TRUE_IF_GOOD = (
    "is_safe", "is_correct", "is_helpful", "is_good", "is_accepted", "is_approved", "thumbs_up", "correct", "safe", "approved",
    "upvoted", "passed",
)  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "contents")
SYSTEMS = ("system", "system_prompt", "systemInstruction", "system_message")
TOOLS = ("tools", "functions")
SINGLE_SCORES = ("score", "rating", "reward", "overall_score")
TWO_ANSWERS = ("response", "answer", "output", "completion", "conversation", "model", "text")
VERDICTS = ("winner", "preference", "preferred", "verdict", "better", "choice", "label", "labels", "chosen")
SUFFIXES = (("a", "b"), ("0", "1"), ("1", "2"))


class Columns:
    """The columns of the first rows that are not empty in all of them, with their values. names: of all columns."""

    def __init__(self, rows: Iterable[dict]):
        self.values: dict[str, list] = {}
        self.names: set[str] = set()
        for row in rows:
            self.names.update(row)
            for name, value in row.items():
                if not is_missing(value):
                    self.values.setdefault(str(name), []).append(value)
        self.spelled = {plain(name): name for name in reversed(self.values)}

    def get(self, *names: str) -> str | None:
        """The first of these columns that there is, as the rows spell it."""
        for name in names:
            if found := name if name in self.values else self.spelled.get(plain(name)):
                return found
        return None

    def both(self, names: Iterable[str]) -> list[str] | None:
        """Two or more columns, if there are all of them."""
        found = [self.get(name) for name in names]
        return found if all(found) else None

    def all(self, name: str | None, test: Callable[[object], bool]) -> bool:
        """Whether a column is there and all of its values pass a test."""
        return name is not None and all(map(test, self.values[name]))

    def inner(self, name: str, names: Iterable[str], some: bool = False) -> str | None:
        """The dotted name of a part of a column of dicts or of lists of dicts, which all of them, or some, have."""
        items = [
            item
            for value in map(parse_text_list, self.values[name])
            for item in (value if isinstance(value, list) else [value])
        ]
        if not items or not all(isinstance(item, dict) for item in items):
            return None
        has = any if some else all
        return next((f"{name}.{part}" for part in names if has(part in item for item in items)), None)


def plain(name: str) -> str:
    """A name as names are compared."""
    return "".join(character for character in name.lower() if character not in " -_")


# The columns by which the labeling app describes its judgments, and the one that its exports alone have. Training reads none of
# them, and need not say so.
MARK_OF_JUDGMENTS = "judgement"
OF_JUDGMENTS = frozenset(
    ("id", "difficulty", "title", "description", "version1", "version2", "preference", "model1", "model2", "votes_version1",
     "votes_version2", "votes_tie", "votes_skip", "votes_bad", "votes", "labeller", "seconds", "shown_left", "shown", "reasons",
     "comment", "judged", "judgement", "task_kind", "models", "settles")
)  # fmt: skip
