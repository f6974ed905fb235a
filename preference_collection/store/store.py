"""The store: tasks, answers, comparisons and judgments, in DuckDB (a file, or MotherDuck with `md:`).

One process opens a store, with a thread per labeler: each call has its own cursor, and a lock serializes writes. Values are
always bound, and every statement is a constant of its module.
"""

from preference_collection.store.evidence import Evidence
from preference_collection.store.model import Query, TaskRow
from preference_collection.store.schema import open_database
from preference_collection.store.statistics import Statistics

# Labelers disagree if they chose differently: one ranks the answers where another finds a tie or all bad, or two rank some two
# answers in opposite order. What was settled is no disagreement any more.
BROWSE = """
    WITH newest AS (SELECT task, arg_max(id, number) AS comparison FROM comparisons GROUP BY task),
    told AS (SELECT standing.* FROM standing JOIN newest USING (comparison) WHERE choice <> 'skip'),
    opposed AS (
        SELECT DISTINCT comparison FROM told, (VALUES (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5),
            (4, 5)) places(i, j)
        WHERE j <= len(ranks) GROUP BY comparison, i, j
        HAVING min(sign(ranks[i] - ranks[j])) < 0 AND max(sign(ranks[i] - ranks[j])) > 0),
    disputed AS (
        SELECT comparison FROM told GROUP BY comparison
        HAVING (count(DISTINCT choice) > 1 OR comparison IN (SELECT comparison FROM opposed)) AND NOT bool_or(settles)),
    votes AS (
        SELECT comparisons.task, count(*) AS judgments,
            bool_or(labeler = $labeler AND standing.comparison = newest.comparison) AS mine
        FROM standing JOIN comparisons ON comparisons.id = standing.comparison JOIN newest ON newest.task = comparisons.task
        GROUP BY comparisons.task),
    margins AS (
        SELECT comparison, arg_max(margin, moment) AS margin FROM scores
        WHERE model = (SELECT arg_max(model, moment) FROM scores) GROUP BY comparison)
    SELECT tasks.id, title, difficulty, newest.comparison, coalesce(judgments, 0), coalesce(mine, false),
        disputed.comparison IS NOT NULL, margin, count(*) OVER ()
    FROM tasks LEFT JOIN newest ON newest.task = tasks.id LEFT JOIN votes ON votes.task = tasks.id
        LEFT JOIN disputed ON disputed.comparison = newest.comparison
        LEFT JOIN margins ON margins.comparison = newest.comparison
    WHERE ($difficulty = '' OR difficulty = $difficulty) AND contains(lower(title), lower($search))
        AND ($only <> 'unlabeled' OR NOT coalesce(mine, false))
        AND ($only <> 'disagreement' OR disputed.comparison IS NOT NULL)
    ORDER BY CASE WHEN $uncertain THEN abs(margin) END NULLS LAST, tasks.number
    LIMIT $size OFFSET $start"""


class Store(Statistics, Evidence):
    """An open store; create it with `open_store`."""

    def browse(self, query: Query, start: int = 0, size: int = 20) -> tuple[list[TaskRow], int]:
        """A page of the list of tasks, beginning at `start`, and the total number."""
        values = {
            "labeler": query.labeler, "only": query.only, "uncertain": query.order == "uncertain",
            "difficulty": query.difficulty, "search": query.search, "start": start, "size": size,
        }  # fmt: skip
        rows = self._rows(BROWSE, values)
        return [TaskRow(*row[:-1]) for row in rows], rows[0][-1] if rows else 0


def open_store(address: str, read_only: bool = False) -> Store:
    """Open a store, and create or migrate it if needed.

    address: a file, a MotherDuck database `md:NAME` or share `md:_share/NAME/ID`, or `:memory:`. Raises UserError if it cannot
    be opened.
    """
    return Store(address, *open_database(address, read_only))
