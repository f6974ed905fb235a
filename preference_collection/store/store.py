"""The store: problems, generated solutions and judgments, in DuckDB (a file, or MotherDuck with `md:`).

Judgments are an append-only log of events: none is ever changed or removed, and an undo is an event too. The current judgments
are derived from the log. One process opens a store, with a thread per labeler: each call has its own cursor, and a lock
serializes writes. Values are always bound, and every statement is a constant of this module.
"""

import hashlib
import json
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count, islice

import duckdb

from preference_collection.store.schema import now, open_database
from preference_training.core.errors import UserError

CHOICES = ("first", "second", "tie", "skip")
# Filters of the list: all problems, those that this labeler has not judged, those on which labelers disagree.
FILTERS = ("all", "unlabeled", "disagreement")
# Orders of the list: by time added, or by the policy's uncertainty about which solution is better.
ORDERS = ("added", "uncertain")

INSERT_PROBLEMS = """INSERT INTO problems SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::TIMESTAMP[])"""
INSERT_GENERATIONS = """INSERT INTO generations SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::TIMESTAMP[])"""
INSERT_PAIRS = """INSERT INTO pairs SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::TIMESTAMP[])"""
INSERT_PREFERENCES = """INSERT INTO preferences SELECT unnest(?::BIGINT[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::DOUBLE[]),
    CAST(unnest(?::VARCHAR[]) AS JSON)::VARCHAR[], unnest(?::VARCHAR[]), unnest(?::TIMESTAMP[]), unnest(?::VARCHAR[])"""
INSERT_SCORES = """INSERT INTO scores SELECT unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::DOUBLE[]),
    unnest(?::TIMESTAMP[])"""

PAIR_COLUMNS = """pairs.id, pairs.problem,
    one.id, one.model, one.prompt, one.parameters, one.text, one.code,
    two.id, two.model, two.prompt, two.parameters, two.text, two.code"""
PAIRS_OF = f"""SELECT {PAIR_COLUMNS} FROM pairs JOIN generations one ON one.id = first JOIN generations two ON two.id = second
    WHERE pairs.problem = $problem ORDER BY pairs.number DESC"""
ALL_PAIRS = f"""SELECT {PAIR_COLUMNS} FROM pairs JOIN generations one ON one.id = first
    JOIN generations two ON two.id = second ORDER BY pairs.number"""

BROWSE = """
    WITH newest AS (SELECT problem, arg_max(id, number) AS pair FROM pairs GROUP BY problem),
    votes AS (
        SELECT pairs.problem, count(*) AS judgments, bool_or(labeller = $labeler AND standing.pair = newest.pair) AS mine,
            count(DISTINCT CASE WHEN choice <> 'skip' AND standing.pair = newest.pair THEN choice END) AS opinions
        FROM standing JOIN pairs ON pairs.id = standing.pair JOIN newest ON newest.problem = pairs.problem
        GROUP BY pairs.problem),
    margins AS (
        SELECT pair, arg_max(margin, moment) AS margin FROM scores
        WHERE model = (SELECT arg_max(model, moment) FROM scores) GROUP BY pair)
    SELECT problems.id, title, difficulty, newest.pair, coalesce(judgments, 0), coalesce(mine, false),
        coalesce(opinions, 0) > 1, margin, count(*) OVER ()
    FROM problems LEFT JOIN newest ON newest.problem = problems.id LEFT JOIN votes ON votes.problem = problems.id
        LEFT JOIN margins ON margins.pair = newest.pair
    WHERE ($difficulty = '' OR difficulty = $difficulty) AND contains(lower(title), lower($search))
        AND ($only <> 'unlabeled' OR NOT coalesce(mine, false)) AND ($only <> 'disagreement' OR opinions > 1)
    ORDER BY CASE WHEN $uncertain THEN abs(margin) END NULLS LAST, problems.number
    LIMIT $size OFFSET $start"""

JUDGMENTS = """
    SELECT s.id, s.pair, s.shown_left, s.choice, s.labeller, s.seconds, s.reasons, s.comment, s.moment,
        problems.id, problems.title, problems.difficulty, one.prompt, one.text, two.text, one.model, two.model,
        count(*) FILTER (s.choice = 'first') OVER votes, count(*) FILTER (s.choice = 'second') OVER votes,
        count(*) FILTER (s.choice = 'tie') OVER votes, count(*) FILTER (s.choice = 'skip') OVER votes
    FROM standing s JOIN pairs ON pairs.id = s.pair JOIN problems ON problems.id = pairs.problem
        JOIN generations one ON one.id = pairs.first JOIN generations two ON two.id = pairs.second
    WINDOW votes AS (PARTITION BY s.pair)
    ORDER BY s.number"""

VOTES_OF_PAIRS = """
    SELECT count(*) FILTER (choice = 'first'), count(*) FILTER (choice = 'second'), count(*) FILTER (choice = 'tie')
    FROM standing WHERE choice <> 'skip' GROUP BY pair HAVING count(*) > 1"""

PROGRESS = """
    SELECT (SELECT count(*) FROM problems), (SELECT count(*) FROM pairs), (SELECT count(DISTINCT pair) FROM standing),
        (SELECT count(*) FROM standing), (SELECT count(*) FROM standing WHERE labeller = $labeler),
        (SELECT count(DISTINCT labeller) FROM standing)"""


def new_id() -> str:
    """A unique id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def side_shown_left(labeler: str, pair: str) -> str:
    """Which solution of a pair this labeler sees on the left, "first" or "second": pseudo-random, but always the same."""
    return ("first", "second")[hashlib.sha256(f"{labeler}\0{pair}".encode()).digest()[0] % 2]


@dataclass(frozen=True)
class Problem:
    """A programming problem. Each test is a dict with `args`, `expected` and optionally `compare`: see `sandbox.py`."""

    id: str
    title: str
    difficulty: str
    description: str
    function_name: str
    tests: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A solution written by a model. code is extracted from the text, None if it contains none."""

    id: str
    model: str
    prompt: str
    parameters: dict
    text: str
    code: str | None


@dataclass(frozen=True)
class Pair:
    """Two solutions of one problem. Their order does not determine which is shown on the left."""

    id: str
    problem: str
    first: Generation
    second: Generation


@dataclass(frozen=True)
class Judgment:
    """A labeler's judgment of a pair: choice is one of CHOICES, shown_left "first" or "second", seconds the time taken."""

    id: str
    pair: str
    shown_left: str
    choice: str
    labeler: str
    seconds: float | None = None
    reasons: tuple[str, ...] = ()
    comment: str = ""


@dataclass(frozen=True)
class ProblemRow:
    """A problem in the list: its newest pair, the number of judgments, whether one is mine, and whether labelers disagree.

    margin is how much the policy prefers the first solution; None if it was not scored.
    """

    id: str
    title: str
    difficulty: str
    pair: str | None
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


@dataclass(frozen=True)
class Progress:
    """Progress counts. judgments counts the current ones, and mine those of one labeler."""

    problems: int
    pairs: int
    judged_pairs: int
    judgments: int
    mine: int
    labelers: int


@dataclass(frozen=True)
class Agreement:
    """Agreement between labelers on pairs that several have judged, without skips.

    comparisons counts pairs of labelers on the same pair of solutions, and agreed those with the same choice. alpha is
    Krippendorff's for nominal data (1 agreement, 0 chance); None if all choices are the same.
    """

    pairs: int
    comparisons: int
    agreed: int
    alpha: float | None


def agreement_of(votes: Iterable[tuple[int, ...]]) -> Agreement:
    """Agreement, from the number of votes for first, second and tie on each pair.

    With n_uc votes for c on pair u, m_u on pair u, n_c for c and n in all, alpha = 1 - D_o / D_e, where
    D_o = 1/n sum_u (m_u^2 - sum_c n_uc^2) / (m_u - 1) and D_e = (n^2 - sum_c n_c^2) / (n (n - 1)) (Krippendorff 2011).
    """
    votes = [counts for counts in votes if sum(counts) > 1]
    same, compared = (sum(n * (n - 1) // 2 for n in ns) for ns in ([n for v in votes for n in v], map(sum, votes)))
    total = sum(map(sum, votes))
    totals = [sum(column) for column in zip(*votes, strict=True)]
    expected = (total**2 - sum(n * n for n in totals)) / (total * (total - 1)) if total else 0.0
    observed = sum((sum(v) ** 2 - sum(n * n for n in v)) / (sum(v) - 1) for v in votes) / total if total else 0.0
    return Agreement(len(votes), compared, same, 1 - observed / expected if expected else None)


@dataclass
class Store:
    """An open store; create it with `open_store`."""

    address: str
    connection: duckdb.DuckDBPyConnection
    read_only: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        """Continue the numbering of events."""
        last = self._row("SELECT greatest((SELECT max(number) FROM preferences), (SELECT max(number) FROM pairs), "
                         "(SELECT max(number) FROM problems))")  # fmt: skip
        self._numbers = count((last[0] or 0) + 1)

    def close(self) -> None:
        """Flush to the file, and close it."""
        self.connection.close()

    # ---- reading -----------------------------------------------------------------------------------------------------------

    def _rows(self, statement: str, values: dict | None = None) -> list[tuple]:
        with closing(self.connection.cursor()) as cursor:
            return cursor.execute(statement, values or {}).fetchall()

    def _row(self, statement: str, values: dict | None = None) -> tuple | None:
        return next(iter(self._rows(statement, values)), None)

    def problem(self, problem: str) -> Problem | None:
        """The problem with an id."""
        row = self._row(
            "SELECT id, title, difficulty, description, function_name, tests FROM problems WHERE id = $id", {"id": problem}
        )
        return row and Problem(*row[:5], tuple(json.loads(row[5])))

    def pair_ids(self) -> set[str]:
        """The ids of all pairs."""
        return {id for (id,) in self._rows("SELECT id FROM pairs")}

    def difficulties(self) -> list[str]:
        """All difficulties in use."""
        return [row[0] for row in self._rows("SELECT DISTINCT difficulty FROM problems ORDER BY 1")]

    def pairs_of(self, problem: str) -> list[Pair]:
        """The pairs of a problem, newest first."""
        return [_pair(row) for row in self._rows(PAIRS_OF, {"problem": problem})]

    def pairs(self) -> list[Pair]:
        """All pairs, oldest first."""
        return [_pair(row) for row in self._rows(ALL_PAIRS)]

    def browse(self, query: Query, start: int = 0, size: int = 20) -> tuple[list[ProblemRow], int]:
        """A page of the list of problems, beginning at `start`, and the total number."""
        values = {
            "labeler": query.labeler, "only": query.only, "uncertain": query.order == "uncertain",
            "difficulty": query.difficulty, "search": query.search, "start": start, "size": size,
        }  # fmt: skip
        rows = self._rows(BROWSE, values)
        return [ProblemRow(*row[:-1]) for row in rows], rows[0][-1] if rows else 0

    def standing(self, pair: str) -> list[Judgment]:
        """The current judgments of a pair, in chronological order."""
        rows = self._rows(
            "SELECT id, pair, shown_left, choice, labeller, seconds, reasons, comment FROM standing "
            "WHERE pair = $pair ORDER BY number", {"pair": pair},
        )  # fmt: skip
        return [Judgment(*row[:6], tuple(row[6] or ()), row[7] or "") for row in rows]

    def last_judgment(self, labeler: str) -> tuple[str, str, str] | None:
        """(id, pair, problem) of a labeler's newest judgment that was not undone."""
        return self._row(
            "SELECT standing.id, pair, problem FROM standing JOIN pairs ON pairs.id = pair WHERE labeller = $labeler "
            "ORDER BY standing.number DESC LIMIT 1", {"labeler": labeler},
        )  # fmt: skip

    def judgments(self) -> Iterator[tuple]:
        """All current judgments, with the problem, both texts and the votes on the pair: the columns of JUDGMENTS."""
        with closing(self.connection.cursor()) as cursor:
            cursor.execute(JUDGMENTS)
            while rows := cursor.fetchmany(1000):
                yield from rows

    def progress(self, labeler: str = "") -> Progress:
        """The progress counts."""
        return Progress(*self._row(PROGRESS, {"labeler": labeler}))

    def agreement(self) -> Agreement:
        """The agreement between labelers."""
        return agreement_of(self._rows(VOTES_OF_PAIRS))

    def test_run(self, generation: str) -> list[dict] | None:
        """The newest test results of a solution."""
        row = self._row(
            "SELECT results FROM test_runs WHERE generation = $generation ORDER BY moment DESC LIMIT 1",
            {"generation": generation},
        )
        return row and json.loads(row[0])

    # ---- adding ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self):
        """A cursor in a transaction, with the write lock: committed as a whole or rolled back."""
        if self.read_only:
            raise UserError(f"store: {self.address} is open read-only. Open a store that you can write to.")
        with self._lock, closing(self.connection.cursor()) as cursor:
            cursor.begin()
            try:
                yield cursor
            except BaseException:
                cursor.rollback()
                raise
            cursor.commit()

    def add_problems(self, problems: Iterable[Problem]) -> tuple[int, int]:
        """Add problems with new ids. Returns the numbers of added and of known problems."""
        added = known = 0
        with self._writing() as cursor:
            seen = {id for (id,) in cursor.execute("SELECT id FROM problems").fetchall()}
            for some in _chunks(problems):
                new = [problem for problem in some if not (problem.id in seen or seen.add(problem.id))]
                rows = [
                    (next(self._numbers), p.id, p.title, p.difficulty, p.description, p.function_name, _json(p.tests), now())
                    for p in new
                ]
                _insert(cursor, INSERT_PROBLEMS, rows)
                added, known = added + len(new), known + len(some) - len(new)
        return added, known

    def add_pairs(self, pairs: Iterable[Pair], judgments: Iterable[Judgment] = ()) -> None:
        """Add pairs with their generations and judgments, all or none. Known generations are not changed."""
        with self._writing() as cursor:
            for some in _chunks(pairs):
                generations = {g.id: (g, pair.problem) for pair in some for g in (pair.first, pair.second)}
                statement = "SELECT id FROM generations WHERE id IN (SELECT unnest(?::VARCHAR[]))"
                for (known,) in cursor.execute(statement, [list(generations)]).fetchall():
                    del generations[known]
                rows = [
                    (g.id, problem, g.model, g.prompt, _json(g.parameters), g.text, g.code, now())
                    for g, problem in generations.values()
                ]
                _insert(cursor, INSERT_GENERATIONS, rows)
                _insert(
                    cursor,
                    INSERT_PAIRS,
                    [(next(self._numbers), p.id, p.problem, p.first.id, p.second.id, now()) for p in some],
                )
            for some in _chunks(judgments):
                _insert(cursor, INSERT_PREFERENCES, [self._event(judgment) for judgment in some])

    def judge(self, judgment: Judgment) -> None:
        """Add a judgment. One with a known id is ignored, so a key pressed twice counts once.

        Raises ValueError for an invalid choice or side, and for an unknown pair.
        """
        if judgment.choice not in CHOICES or judgment.shown_left not in CHOICES[:2]:
            raise ValueError(f"invalid judgment: {judgment}")
        with self._writing() as cursor:
            if cursor.execute("SELECT count(*) FROM preferences WHERE id = ?", [judgment.id]).fetchone()[0]:
                return
            if not cursor.execute("SELECT count(*) FROM pairs WHERE id = ?", [judgment.pair]).fetchone()[0]:
                raise ValueError(f"no such pair: {judgment.pair}")
            _insert(cursor, INSERT_PREFERENCES, [self._event(judgment)])

    def undo(self, labeler: str) -> tuple[str, str] | None:
        """Undo a labeler's newest judgment; their previous judgment of the pair is current again.

        Returns its (pair, problem), None if there is nothing to undo.
        """
        last = self.last_judgment(labeler)
        if last is None:
            return None
        judgment, pair, problem = last
        with self._writing() as cursor:
            event = (next(self._numbers), new_id(), pair, None, None, labeler, None, "[]", None, now(), judgment)
            _insert(cursor, INSERT_PREFERENCES, [event])
        return pair, problem

    def _event(self, j: Judgment) -> tuple:
        number = next(self._numbers)
        return (number, j.id, j.pair, j.shown_left, j.choice, j.labeler, j.seconds, _json(j.reasons), j.comment, now(), None)

    def add_test_run(self, generation: str, results: list[dict]) -> None:
        """Save the test results of a solution."""
        with self._writing() as cursor:
            cursor.execute("INSERT INTO test_runs VALUES (?, ?, ?)", [generation, _json(results), now()])

    def add_scores(self, model: str, margins: Iterable[tuple[str, float]]) -> None:
        """Save how much a model prefers the first solution of each pair: (pair, margin)."""
        with self._writing() as cursor:
            for some in _chunks(margins):
                _insert(cursor, INSERT_SCORES, [(pair, model, margin, now()) for pair, margin in some])


def _pair(row: tuple) -> Pair:
    first, second = (Generation(*g[:3], json.loads(g[3]), *g[4:]) for g in (row[2:8], row[8:14]))
    return Pair(*row[:2], first, second)


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _chunks(items: Iterable, size: int = 1000) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def _insert(cursor, statement: str, rows: list[tuple]) -> None:
    if rows:
        cursor.execute(statement, [list(column) for column in zip(*rows, strict=True)])


def open_store(address: str, read_only: bool = False) -> Store:
    """Open a store, and create or migrate it if needed.

    address: a file, a MotherDuck database `md:NAME` or share `md:_share/NAME/ID`, or `:memory:`. Raises UserError if it cannot
    be opened.
    """
    return Store(address, *open_database(address, read_only))
