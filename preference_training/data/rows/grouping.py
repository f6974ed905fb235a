"""Group the rows of each prompt into one record, in memory that does not grow with the data."""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from preference_training.data.rows.records import SAME_TEXT, DataReport, Prompt, Records


def new_record() -> dict:
    """An empty record."""
    return {"responses": [], "pairs": [], "sft_target": None}


def add_responses(record: dict, responses: Iterable[str], pairs: Iterable[tuple[int, int]]) -> int:
    """Add responses, each once, and the pairs between them to a record. Returns how many pairs had identical texts."""
    known = record["responses"]
    indices = []
    for response in responses:
        if response not in known:
            known.append(response)
        indices.append(known.index(response))
    same = 0
    for preferred, other in pairs:
        if indices[preferred] == indices[other]:
            same += 1
        else:
            record["pairs"].append((indices[preferred], indices[other]))
    return same


def pairs_by_score(scores: list[float]) -> list[tuple[int, int]]:
    """All pairs of indices whose scores differ, the higher one first, in the order of their indices."""
    indices = combinations(range(len(scores)), 2)
    return [(i, j) if scores[i] > scores[j] else (j, i) for i, j in indices if scores[i] != scores[j]]


class Row(NamedTuple):
    """One row of a file or table: responses to a prompt, and the preferences between them.

    target: the index of the response that SFT learns. scores: given if rows hold one response each; pairs are then formed
    between the rows of a prompt.
    """

    prompt: Prompt
    responses: list[str]
    pairs: list[tuple[int, int]]
    target: int
    scores: list[float] | None = None


def group_rows(rows: Iterable[Row], report: DataReport, window: int = 20_000) -> Iterator[tuple[Prompt, dict]]:
    """Group the rows of each prompt into one record, in the order of their first rows.

    At most `window` prompts are kept open: rows of a prompt that are further apart form separate records, so that memory does
    not grow with the data. The report counts pairs of identical texts; a row without pair and score is a record of its own. SFT
    learns the target of each row; of rows with one scored response each, the best.
    """
    records: Records = {}
    for row in rows:
        if not row.pairs and row.scores is None:
            yield row.prompt, {"responses": row.responses, "pairs": [], "sft_target": row.responses[row.target]}
            continue
        if row.pairs and len(set(row.responses)) == 1:
            report.skip(SAME_TEXT, len(row.pairs))
            continue
        record = records.setdefault(row.prompt, new_record())
        same = add_responses(record, row.responses, row.pairs)
        report.skip(SAME_TEXT, same)
        if row.scores is not None:
            record.setdefault("scores", []).extend(zip(row.scores, row.responses, strict=True))
        elif same < len(row.pairs):
            record["sft_target"] = row.responses[row.target]
            record.setdefault("sft_targets", []).append(record["sft_target"])
        if len(records) > window:
            prompt = next(iter(records))
            yield from _closed(prompt, records.pop(prompt), report)
    for prompt, record in records.items():
        yield from _closed(prompt, record, report)


EQUAL_SCORES = "two responses have equal scores"
SAME_RESPONSE = "a response has the text of another one"
NO_PAIR = "no two responses have different scores"


def scored_record(responses: list[str], scores: list[float], report: DataReport) -> dict | None:
    """A record of all pairs of responses with different scores, the best of which is the SFT target; None without any pair.

    Of identical responses the last counts. The report counts what is skipped.
    """
    score_of = dict(zip(responses, scores, strict=True))
    texts, scores = list(score_of), list(score_of.values())
    pairs = pairs_by_score(scores)
    report.skip(SAME_RESPONSE, len(responses) - len(texts))
    report.skip(EQUAL_SCORES, len(texts) * (len(texts) - 1) // 2 - len(pairs))
    if not pairs:
        report.skip(NO_PAIR)
        return None
    return {"responses": texts, "pairs": pairs, "sft_target": max(score_of, key=score_of.__getitem__)}


def _closed(prompt: Prompt, record: dict, report: DataReport) -> Iterator[tuple[Prompt, dict]]:
    if scores := record.pop("scores", None):
        record = scored_record([text for _, text in scores], [score for score, _ in scores], report)
    elif len(record.get("sft_targets", ())) < 2:
        record.pop("sft_targets", None)
    if record and record["pairs"]:
        yield prompt, record
