"""People as a judge: the pairs that wait in a file, and verdicts as the labeling app exports them.

preference_collection/tests/test_rounds_of_training.py has the way through the app.
"""

import json

import pytest

from preference_training.core.errors import UserError
from preference_training.rounds.judges.base import JudgedInput, PendingError, Score
from preference_training.rounds.judges.people import PAIRS, VERDICTS, PeopleJudge


@pytest.fixture
def judge(tmp_path):
    """Makes the judge anew, as each start of a loop does."""
    return lambda: PeopleJudge(tmp_path / "people", tmp_path, None)


def inputs(*responses: str, prompt="Why?") -> list[JudgedInput]:
    return [JudgedInput(prompt, each, {}, tuple(dict.fromkeys(responses))) for each in responses]


def waiting(path) -> list[tuple]:
    rows = [json.loads(line) for line in (path / "people" / PAIRS).read_text().splitlines()]
    return [(row["prompt"], frozenset(row["responses"])) for row in rows]


def write(path, name: str, *rows: dict) -> None:
    (path / "people").mkdir(exist_ok=True)
    (path / "people" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def preferring(best: str, worst: str, prompt="Why?") -> dict:
    return {"prompt": prompt, "responses": [best, worst], "pairs": [[0, 1]]}


def tied(one: str, other: str) -> dict:
    return {"prompt": "Why?", "responses": [one, other], "pairs": []}


def test_pairs_without_a_verdict_wait_in_a_file_and_the_message_says_what_to_do(judge, tmp_path):
    with pytest.raises(PendingError) as stopped:
        judge().judge(inputs("a", "b", "c"))
    assert len(waiting(tmp_path)) == 3
    assert set(waiting(tmp_path)) == {("Why?", frozenset(pair)) for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
    lines = str(stopped.value).splitlines()
    assert lines[0].startswith("3 pairs wait for a verdict.")
    assert [line.split()[3] for line in lines[1:4]] == ["import", f"store={tmp_path}/people/labels.duckdb", "export"]
    assert lines[4] == f"  python -m preference_training.rounds run {tmp_path}"


def test_pairs_of_several_tables_wait_together(judge, tmp_path):
    one = judge()
    for samples in (inputs("a", "b"), [JudgedInput("When?", "x", {}, against=("y",))]):
        with pytest.raises(PendingError):
            one.judge(samples)
    assert len(waiting(tmp_path)) == 2


def test_verdicts_become_win_shares_and_only_what_is_missing_waits(judge, tmp_path):
    write(tmp_path, VERDICTS, preferring("a", "b"), preferring("a", "c"))
    with pytest.raises(PendingError, match="^1 pairs wait"):
        judge().judge(inputs("a", "b", "c"))
    assert waiting(tmp_path) == [("Why?", frozenset(("b", "c")))]
    write(tmp_path, "verdicts.ties.jsonl", tied("c", "b"))
    assert [score.value for score in judge().judge(inputs("a", "b", "c"))] == [1.0, 0.25, 0.25]


def test_several_verdicts_are_averaged_overruled_ones_do_not_count_and_skipped_pairs_are_not_judged(judge, tmp_path):
    write(tmp_path, VERDICTS, preferring("a", "b"), preferring("a", "b"), preferring("b", "a"))
    write(tmp_path, "verdicts.ties.jsonl", tied("a", "b"))
    write(tmp_path, "verdicts.overruled.jsonl", *[preferring("b", "a")] * 5)
    # (1 + 1 + 0 + 0.5) / 4
    assert [score.value for score in judge().judge(inputs("a", "b"))] == [0.625, 0.375]
    write(tmp_path, "verdicts.skips.jsonl", tied("x", "y"))
    assert judge().judge(inputs("x", "y")) == [Score(None, "skipped by the labeler")] * 2


@pytest.mark.parametrize("row", [{}, {"prompt": "Why?", "responses": ["a"]}, {"prompt": "Why?", "responses": ["a", "b", "c"]}])
def test_a_file_of_something_else_is_told_with_its_row(row, judge, tmp_path):
    write(tmp_path, VERDICTS, preferring("a", "b"), row)
    with pytest.raises(UserError, match=r"verdicts\.jsonl, row 2: found no pair: .* Expected what the labeling app exports"):
        judge()
