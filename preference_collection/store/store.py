"""The store: tasks, answers, comparisons and judgments, in DuckDB (a file, or MotherDuck with `md:`).

One process opens a store, with a thread per labeler: each call has its own cursor, and a lock serializes writes. Values are
always bound, and every statement is a constant of its module.
"""

from preference_collection.store.evidence import Evidence
from preference_collection.store.model import Query, TaskRow
from preference_collection.store.priorities import DISAGREEMENTS, DISPUTED, FLIPPED, MARGINS, UNCERTAIN
from preference_collection.store.schema import open_database
from preference_collection.store.statistics import Statistics

BROWSE = f"""
    WITH newest AS (SELECT task, arg_max(id, number) AS comparison FROM comparisons GROUP BY task),
    disputed AS ({DISAGREEMENTS}),
    votes AS (
        SELECT comparisons.task, count(*) AS judgments,
            bool_or(labeler = $labeler AND standing.comparison = newest.comparison) AS mine
        FROM standing JOIN comparisons ON comparisons.id = standing.comparison JOIN newest ON newest.task = comparisons.task
        GROUP BY comparisons.task),
    margins AS ({MARGINS}),
    priorities AS (
        SELECT * FROM ({UNCERTAIN}) WHERE $order = 'uncertain' UNION ALL SELECT * FROM ({FLIPPED}) WHERE $order = 'flipped'
        UNION ALL SELECT * FROM ({DISPUTED}) WHERE $order = 'disputed')
    SELECT tasks.id, title, difficulty, newest.comparison, coalesce(judgments, 0), coalesce(mine, false),
        disputed.comparison IS NOT NULL, margin, count(*) OVER ()
    FROM tasks LEFT JOIN newest ON newest.task = tasks.id LEFT JOIN votes ON votes.task = tasks.id
        LEFT JOIN disputed ON disputed.comparison = newest.comparison
        LEFT JOIN margins ON margins.comparison = newest.comparison
        LEFT JOIN priorities ON priorities.comparison = newest.comparison
    WHERE ($difficulty = '' OR difficulty = $difficulty) AND contains(lower(title), lower($search))
        AND ($only <> 'unlabeled' OR NOT coalesce(mine, false))
        AND ($only <> 'disagreement' OR disputed.comparison IS NOT NULL)
    ORDER BY priority NULLS LAST, tasks.number
    LIMIT $size OFFSET $start"""

ORDERED_IDS = f"""
    SELECT comparisons.id FROM comparisons LEFT JOIN (
        SELECT * FROM ({UNCERTAIN}) WHERE $order = 'uncertain' UNION ALL SELECT * FROM ({FLIPPED}) WHERE $order = 'flipped'
        UNION ALL SELECT * FROM ({DISPUTED}) WHERE $order = 'disputed') priorities ON priorities.comparison = comparisons.id
    ORDER BY priority NULLS LAST, number"""


class Store(Statistics, Evidence):
    """An open store; create it with `open_store`."""

    def browse(self, query: Query, start: int = 0, size: int = 20) -> tuple[list[TaskRow], int]:
        """A page of the list of tasks, beginning at `start`, and the total number."""
        values = {
            "labeler": query.labeler, "only": query.only, "order": query.order, "difficulty": query.difficulty,
            "search": query.search, "start": start, "size": size,
        }  # fmt: skip
        rows = self._rows(BROWSE, values)
        return [TaskRow(*row[:-1]) for row in rows], rows[0][-1] if rows else 0

    def ordered_ids(self, order: str) -> list[str]:
        """The ids of all comparisons in one of ORDERS; equals, and those that it says nothing about, oldest first."""
        return [id for (id,) in self._rows(ORDERED_IDS, {"order": order})]


def open_store(address: str, read_only: bool = False) -> Store:
    """Open a store, and create or migrate it if needed.

    address: a file, a MotherDuck database `md:NAME` or share `md:_share/NAME/ID`, or `:memory:`. Raises UserError if it cannot
    be opened.
    """
    return Store(address, *open_database(address, read_only))
