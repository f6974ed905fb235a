"""The part of the store that keeps judgments of people: an append-only log of events.

None is ever changed or removed, and an undo is an event too. The current judgments are derived from the log.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

from preference_collection.store.database import as_json, chunks, insert
from preference_collection.store.model import Comparison, Judged, Judgment, Votes, judgment_error, new_id
from preference_collection.store.schema import now
from preference_collection.store.tasks import Tasks

INSERT_JUDGMENTS = """INSERT INTO judgments SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), CAST(unnest(?::VARCHAR[]) AS JSON)::INTEGER[],
    CAST(unnest(?::VARCHAR[]) AS JSON)::INTEGER[], unnest(?::DOUBLE[]), CAST(unnest(?::VARCHAR[]) AS JSON)::VARCHAR[],
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::INTEGER[]), unnest(?::BOOLEAN[]), unnest(?::TIMESTAMP[]),
    unnest(?::VARCHAR[])"""

KNOWN_JUDGMENTS = "SELECT id, comparison, labeler FROM judgments WHERE id IN (SELECT unnest(?::VARCHAR[]))"
SIZES = "SELECT id, len(answers) FROM comparisons WHERE id IN (SELECT unnest(?::VARCHAR[]))"
COLUMNS = "id, comparison, labeler, choice, shown, ranks, seconds, reasons, comment, edited, edited_from, settles"
STANDING_OF = f"SELECT {COLUMNS} FROM standing WHERE comparison = $comparison ORDER BY number"
STANDING_AMONG = f"""SELECT {COLUMNS} FROM standing WHERE comparison IN (SELECT unnest($comparisons::VARCHAR[]))
    ORDER BY number"""
LAST_OF = f"SELECT {COLUMNS} FROM standing WHERE labeler = $labeler ORDER BY number DESC LIMIT 1"
JUDGED_BY = "SELECT comparison, labeler, choice <> 'skip', settles FROM standing"
ONE_JUDGED_BY = "SELECT comparison, labeler, choice <> 'skip', settles FROM standing WHERE comparison = $comparison"
# What u undoes: no settlement, and nothing that stands again because a later judgment of the same comparison was undone.
UNDOABLE = f"""SELECT {COLUMNS} FROM standing WHERE labeler = $labeler AND NOT settles AND number = (
    SELECT max(number) FROM judgments later WHERE later.labeler = standing.labeler
        AND later.comparison = standing.comparison AND later.undoes IS NULL AND NOT later.settles)
    ORDER BY number DESC LIMIT 1"""
SETTLED = f"""SELECT {COLUMNS} FROM standing WHERE settles
    QUALIFY row_number() OVER (PARTITION BY comparison ORDER BY number DESC) = 1 ORDER BY number DESC LIMIT $limit"""
SETTLEMENTS_OF = """SELECT id FROM judgments WHERE comparison = $comparison AND settles AND undoes IS NULL
    AND id NOT IN (SELECT undoes FROM judgments WHERE undoes IS NOT NULL)"""
ALL_STANDING = f"SELECT {COLUMNS}, moment FROM standing ORDER BY number"


class Judgments(Tasks):
    """Judgments of comparisons, and undoing them."""

    def add_comparisons(self, comparisons: Iterable[Comparison], judgments: Iterable[Judgment] = ()) -> tuple[int, int]:
        """Add comparisons with their answers and judgments, all or none. Known ones are not changed.

        Returns the numbers of added and of known comparisons. Raises ValueError for a comparison that has not two to five
        answers, and for invalid judgments.
        """
        added = known = 0
        with self._writing() as cursor:
            for some in chunks(comparisons):
                new = self._add_comparisons(cursor, some)
                added, known = added + new, known + len(some) - new
            for some in chunks(judgments):
                self._add_judgments(cursor, some)
        return added, known

    def judge(self, judgment: Judgment) -> None:
        """Add a judgment. One with a known id is ignored, so a key pressed twice counts once.

        Raises ValueError for an invalid one, for an unknown comparison, and for an id of another judgment.
        """
        with self._writing() as cursor:
            self._add_judgments(cursor, [judgment])

    def _add_judgments(self, cursor, judgments: list[Judgment]) -> None:
        sizes = dict(cursor.execute(SIZES, [list({judgment.comparison for judgment in judgments})]).fetchall())
        for judgment in judgments:
            if judgment.comparison not in sizes:
                raise ValueError(f"no such comparison: {judgment.comparison}")
            if error := judgment_error(judgment, sizes[judgment.comparison]):
                raise ValueError(f"judgment {judgment.id} {error}")
        rows = cursor.execute(KNOWN_JUDGMENTS, [[judgment.id for judgment in judgments]]).fetchall()
        seen = {id: whose for id, *whose in rows}
        new = []
        for judgment in judgments:
            whose = [judgment.comparison, judgment.labeler]
            if judgment.id not in seen:
                seen[judgment.id] = whose
                new.append(judgment)
            elif seen[judgment.id] != whose:
                raise ValueError(f"the id {judgment.id} belongs to another judgment")
        insert(cursor, INSERT_JUDGMENTS, [self._event(judgment) for judgment in new])

    def _event(self, j: Judgment) -> tuple:
        return (next(self._numbers), j.id, j.comparison, j.labeler, j.choice, as_json(j.order), as_json(j.ranks), j.seconds,
                as_json(j.reasons), j.comment, j.edited, j.edited_from, j.settles, now(), None)  # fmt: skip

    def _undoing(self, labeler: str, comparison: str, judgment: str) -> tuple:
        return (next(self._numbers), new_id(), comparison, labeler, None, None, None, None, None, None, None, None,
                False, now(), judgment)  # fmt: skip

    def undo(self, labeler: str) -> str | None:
        """Undo a labeler's newest judgment; their previous judgment of the comparison is current again.

        Returns the comparison's id, None if there is nothing to undo.
        """
        with self._writing() as cursor:
            row = cursor.execute(LAST_OF, {"labeler": labeler}).fetchone()
            if row is None:
                return None
            last = _judgment(row)
            insert(cursor, INSERT_JUDGMENTS, [self._undoing(labeler, last.comparison, last.id)])
        return last.comparison

    def undo_label(self, labeler: str) -> Judgment | None:
        """Undo what a labeler last judged on the labeling page, and return it; None if there is nothing.

        Settlements are not undone by this, and older judgments of a comparison that stand again neither.
        """
        with self._writing() as cursor:
            row = cursor.execute(UNDOABLE, {"labeler": labeler}).fetchone()
            if row is None:
                return None
            last = _judgment(row)
            insert(cursor, INSERT_JUDGMENTS, [self._undoing(labeler, last.comparison, last.id)])
        return last

    def settled(self, limit: int) -> list[Judgment]:
        """The last word on each comparison that was settled, the newest first, `limit` at most."""
        return [_judgment(row) for row in self._rows(SETTLED, {"limit": limit})]

    def unsettle(self, labeler: str, comparison: str) -> bool:
        """Undo all that settles a comparison; a labeler does so. Returns whether anything did."""
        with self._writing() as cursor:
            found = cursor.execute(SETTLEMENTS_OF, {"comparison": comparison}).fetchall()
            insert(cursor, INSERT_JUDGMENTS, [self._undoing(labeler, comparison, id) for (id,) in found])
        return bool(found)

    def last_judgment(self, labeler: str) -> Judgment | None:
        """A labeler's newest judgment that was not undone."""
        row = self._row(LAST_OF, {"labeler": labeler})
        return row and _judgment(row)

    def standing(self, comparison: str) -> list[Judgment]:
        """The current judgments of a comparison, in chronological order."""
        return [_judgment(row) for row in self._rows(STANDING_OF, {"comparison": comparison})]

    def standing_among(self, comparisons: Iterable[str]) -> list[Judgment]:
        """The current judgments of some comparisons, in chronological order."""
        return [_judgment(row) for row in self._rows(STANDING_AMONG, {"comparisons": list(comparisons)})]

    def judgment_ids(self) -> set[str]:
        """The ids of all judgments, also of those that were undone."""
        return {id for (id,) in self._rows("SELECT id FROM judgments WHERE undoes IS NULL")}

    def judged_by(self, comparisons: Sequence[str] | None = None) -> list[tuple[str, str, bool, bool]]:
        """Who judged comparisons: (comparison, labeler, whether it is more than a skip, whether it settles).

        Of all comparisons unless some are given.
        """
        if comparisons is not None and len(comparisons) == 1:
            return self._rows(ONE_JUDGED_BY, {"comparison": comparisons[0]})
        wanted = None if comparisons is None else set(comparisons)
        return [row for row in self._rows(JUDGED_BY) if wanted is None or row[0] in wanted]

    def judgments(self) -> Iterator[Judged]:
        """All current judgments with what was judged, in chronological order."""
        with closing(self.connection.cursor()) as cursor:
            rows = cursor.execute(ALL_STANDING).fetchall()
        said: dict[str, list[Judgment]] = {}
        for *columns, _ in rows:
            judgment = _judgment(columns)
            said.setdefault(judgment.comparison, []).append(judgment)
        for some in chunks(rows):
            comparisons = self._comparisons(list({row[1] for row in some}))
            tasks = self._tasks(list({comparison.task for comparison in comparisons.values()}))
            for *columns, moment in some:
                judgment = _judgment(columns)
                comparison = comparisons[judgment.comparison]
                of_all = said[comparison.id]
                settled = next((each.id for each in reversed(of_all) if each.settles), None)
                yield Judged(judgment, moment, tasks[comparison.task], comparison, votes_of(comparison, of_all), settled)


def votes_of(comparison: Comparison, judgments: list[Judgment]) -> Votes:
    """The votes that judgments of a comparison are; one that settles is none."""
    judgments = [judgment for judgment in judgments if not judgment.settles]
    choices = [judgment.choice for judgment in judgments]
    ranks = [judgment.ranks for judgment in judgments if judgment.choice == "ranked"]
    best = tuple(sum(each[index] == 1 for each in ranks) for index in range(len(comparison.answers)))
    return Votes(best, choices.count("tie"), choices.count("bad"), choices.count("skip"))


def _judgment(row) -> Judgment:
    id, comparison, labeler, choice, shown, ranks, seconds, reasons, comment, edited, edited_from, settles = row
    return Judgment(
        id, comparison, labeler, choice, tuple(shown), tuple(ranks or ()), seconds, tuple(reasons or ()), comment or "",
        edited or "", edited_from, settles,
    )  # fmt: skip
