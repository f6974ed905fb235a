"""People as a judge: they compare pairs of responses in the labeling app, to which files are the interface.

people/pairs.jsonl                the pairs that wait for a verdict: the app imports them
people/verdicts.jsonl             what the app exports; with verdicts.ties.jsonl and the like, which it writes next to it
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from preference_training.core.errors import UserError
from preference_training.data.files import read_rows
from preference_training.data.records.record import Prompt, Turn, message_of, prompt_text
from preference_training.data.rows.conversations import RowError, parse_serialized_turns
from preference_training.rounds.judges.base import PendingError
from preference_training.rounds.judges.comparing import ComparingJudge, Comparison, Outcome, ordered
from preference_training.rounds.tables import save_text

PAIRS, VERDICTS = "pairs.jsonl", "verdicts.jsonl"
# Kinds of judgments that the app writes next to the others, by the end of the name: ties and skips; those that were overruled
# count no more.
TIES, SKIPS, OVERRULED = ".ties", ".skips", ".overruled"
SKIPPED = "skipped by the labeler"


class PeopleJudge(ComparingJudge):
    """People who compare two responses. Until they have, PendingError says what to do.

    Several verdicts on a pair are averaged. directory: the folder of the files. loop: the loop's own, for the message.
    """

    at_once = 10**9

    def __init__(self, directory: Path, loop: Path, limit: int | None):
        super().__init__("person", "person", limit)
        self.directory, self.loop = directory, loop
        self.waiting: dict[Comparison, None] = {}
        self.known = dict(read_verdicts(directory)) if directory.is_dir() else {}

    def ask(self, comparisons: Sequence[Comparison]) -> None:
        """Write the pairs without a verdict to the file that the app imports. Raises PendingError, and UserError."""
        missing = [each for each in comparisons if _key(each.prompt, each.first, each.second) not in self.known]
        if not missing:
            return
        self.waiting |= dict.fromkeys(missing)
        path = self.directory / PAIRS
        rows = [{"prompt": _plain(each.prompt), "responses": [each.first, each.second]} for each in self.waiting]
        save_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        app, store = "python -m preference_collection", f"store={self.directory / 'labels.duckdb'}"
        raise PendingError(
            f"{len(self.waiting):,} pairs wait for a verdict. Label them, export, and go on:\n"
            f"  {app} import {path} {store}\n"
            f"  {app} {store}\n"
            f"  {app} export {self.directory / VERDICTS} {store}\n"
            f"  python -m preference_training.rounds run {self.loop}"
        )

    def recall(self, comparison: Comparison) -> Outcome:
        """The outcome of a comparison: the mean of its verdicts."""
        value = self.known.get(_key(comparison.prompt, comparison.first, comparison.second))
        return Outcome(value, None if value is not None else SKIPPED)


Key = tuple[str, str, str]


def read_verdicts(directory: Path) -> Iterator[tuple[Key, float | None]]:
    """The outcome of each pair in the files of verdicts; None where everybody has skipped it. Raises UserError."""
    values: dict[Key, list[float]] = defaultdict(list)
    for path in sorted(directory.glob("verdicts*.jsonl")):
        if path.stem.endswith(OVERRULED):
            continue
        for number, row in read_rows(str(path)):
            try:
                key, value = _verdict(row)
            except (RowError, LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"rounds.judge: {path}, row {number}: found no pair: {error}. Expected what the labeling app exports."
                ) from error
            values[key] += [] if path.stem.endswith(SKIPS) else [value]
    yield from ((key, mean(some) if some else None) for key, some in values.items())


def _verdict(row: dict) -> tuple[Key, float]:
    """The pair of a row that the app has exported, and what the verdict is: ties and pairs that are both bad are 0.5."""
    prompt, responses = row["prompt"], row["responses"]
    prompt = tuple(Turn(each["role"], each["content"]) for each in prompt) if isinstance(prompt, list) else prompt
    texts = [each if isinstance(each, str) else each[0]["content"] for each in responses]
    if len(texts) != 2:
        raise ValueError(f"{len(texts)} responses")
    first, second = ordered(*texts)
    if not row.get("pairs"):
        return _key(prompt, first, second), 0.5
    [[best, _]] = row["pairs"]
    return _key(prompt, first, second), float(texts[best] == first)


def _key(prompt: Prompt, first: str, second: str) -> Key:
    """What a pair is known by in files: they write a conversation of one user turn as a text, or a text as such a turn."""
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].role == "user":
        prompt = prompt[0].content
    return prompt_text(prompt), first, second


def _plain(prompt: Prompt) -> str | list[dict]:
    """A prompt as a file has it: a text that would be read as a conversation is the only message of one."""
    if not isinstance(prompt, str):
        return [message_of(turn) for turn in prompt]
    try:
        is_plain = parse_serialized_turns(prompt, "") is prompt
    except RowError:
        is_plain = False
    return prompt if is_plain else [{"role": "user", "content": prompt}]
