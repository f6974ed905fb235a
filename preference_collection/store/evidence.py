"""The part of the store that keeps what machines say about answers: test results, scores, flip probabilities, verdicts."""

import json
from collections.abc import Iterable
from math import isfinite

from preference_collection.store.database import Database, as_json, chunks, insert
from preference_collection.store.model import Verdict, ranks_error
from preference_collection.store.priorities import NEWEST_VERDICTS
from preference_collection.store.schema import now

INSERT_SCORES = """INSERT INTO scores SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::DOUBLE[]),
    unnest(?::TIMESTAMP[])"""
INSERT_FLIPS = """INSERT INTO flip_probabilities SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::DOUBLE[]),
    unnest(?::TIMESTAMP[])"""
INSERT_VERDICTS = """INSERT INTO verdicts SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    CAST(unnest(?::VARCHAR[]) AS JSON)::INTEGER[], unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::TIMESTAMP[])"""

TEST_RUN = "SELECT results FROM test_runs WHERE answer = $answer ORDER BY moment DESC LIMIT 1"
SIZES = "SELECT id, len(answers) FROM comparisons WHERE id IN (SELECT unnest(?::VARCHAR[]))"
VERDICTS_OF = f"""SELECT comparison, judge, ranks, reason, parameters FROM ({NEWEST_VERDICTS})
    WHERE comparison = $comparison ORDER BY number"""


class Evidence(Database):
    """Test results of answers; scores, flip probabilities and verdicts of comparisons."""

    def test_run(self, answer: str) -> list[dict] | None:
        """The newest test results of an answer."""
        row = self._row(TEST_RUN, {"answer": answer})
        return row and json.loads(row[0])

    def add_test_run(self, answer: str, results: list[dict]) -> None:
        """Save the test results of an answer."""
        with self._writing() as cursor:
            cursor.execute("INSERT INTO test_runs VALUES (?, ?, ?)", [answer, as_json(results), now()])

    def add_scores(self, model: str, margins: Iterable[tuple[str, float]]) -> None:
        """Save how much a model prefers the first answer of each comparison to the second: (comparison, margin)."""
        with self._writing() as cursor:
            for some in chunks(margins):
                insert(cursor, INSERT_SCORES, [(comparison, model, margin, now()) for comparison, margin in some])

    def add_flip_probabilities(self, source: str, probabilities: Iterable[tuple[str, float]]) -> None:
        """Save the probability that the label of each comparison is wrong, as training found it: (comparison, probability).

        source: the run. Raises ValueError for a number that is not a probability.
        """
        with self._writing() as cursor:
            for some in chunks(probabilities):
                if wrong := next((each for each in some if not (isfinite(each[1]) and 0 <= each[1] <= 1)), None):
                    raise ValueError(f"comparison {wrong[0]}: {wrong[1]!r} is not a probability")
                insert(cursor, INSERT_FLIPS, [(comparison, source, value, now()) for comparison, value in some])

    def add_verdicts(self, verdicts: Iterable[Verdict]) -> None:
        """Save verdicts of judges. A later verdict of a judge on a comparison replaces the earlier one.

        Raises ValueError for invalid ranks, and for an unknown comparison.
        """
        with self._writing() as cursor:
            for some in chunks(verdicts):
                sizes = dict(cursor.execute(SIZES, [list({verdict.comparison for verdict in some})]).fetchall())
                for verdict in some:
                    if verdict.comparison not in sizes:
                        raise ValueError(f"no such comparison: {verdict.comparison}")
                    if error := ranks_error(verdict.ranks, sizes[verdict.comparison]):
                        raise ValueError(f"the verdict of {verdict.judge} on {verdict.comparison} {error}")
                rows = [
                    (next(self._numbers), v.comparison, v.judge, as_json(v.ranks), v.reason, as_json(v.parameters), now())
                    for v in some
                ]
                insert(cursor, INSERT_VERDICTS, rows)

    def verdicts(self, comparison: str) -> list[Verdict]:
        """The newest verdict of each judge on a comparison."""
        rows = self._rows(VERDICTS_OF, {"comparison": comparison})
        return [Verdict(id, judge, tuple(ranks), reason, json.loads(more)) for id, judge, ranks, reason, more in rows]
