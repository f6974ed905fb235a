"""The store: problems, generated solutions and what people think of them, in DuckDB (a file, or MotherDuck by `md:`).

Judgements are events: one is added, none is ever changed or removed, and an undo is an event too. What stands is found by
reading them. One process holds a store, with a thread for every labeller: each call has a cursor of its own, and writes
follow one another under a lock. Values are always bound, and every statement is a constant of this module.
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

from preference_collection.schema import now, open_database
from preference_training.core.errors import UserError

CHOICES = ("first", "second", "tie", "skip")
# Which problems are shown: all, those that this labeller has not judged, those on which labellers differ.
FILTERS = ("all", "unlabelled", "disagreement")
# Their order: as they were added, or those first of which the policy is least sure which solution is better.
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
        SELECT pairs.problem, count(*) AS judgements, bool_or(labeller = $labeller AND standing.pair = newest.pair) AS mine,
            count(DISTINCT CASE WHEN choice <> 'skip' AND standing.pair = newest.pair THEN choice END) AS opinions
        FROM standing JOIN pairs ON pairs.id = standing.pair JOIN newest ON newest.problem = pairs.problem
        GROUP BY pairs.problem),
    margins AS (
        SELECT pair, arg_max(margin, moment) AS margin FROM scores
        WHERE model = (SELECT arg_max(model, moment) FROM scores) GROUP BY pair)
    SELECT problems.id, title, difficulty, newest.pair, coalesce(judgements, 0), coalesce(mine, false),
        coalesce(opinions, 0) > 1, margin, count(*) OVER ()
    FROM problems LEFT JOIN newest ON newest.problem = problems.id LEFT JOIN votes ON votes.problem = problems.id
        LEFT JOIN margins ON margins.pair = newest.pair
    WHERE ($difficulty = '' OR difficulty = $difficulty) AND contains(lower(title), lower($search))
        AND ($only <> 'unlabelled' OR NOT coalesce(mine, false)) AND ($only <> 'disagreement' OR opinions > 1)
    ORDER BY CASE WHEN $uncertain THEN abs(margin) END NULLS LAST, problems.number
    LIMIT $size OFFSET $start"""

JUDGEMENTS = """
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
        (SELECT count(*) FROM standing), (SELECT count(*) FROM standing WHERE labeller = $labeller),
        (SELECT count(DISTINCT labeller) FROM standing)"""


def new_id() -> str:
    """An id that nothing else has: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def side_shown_left(labeller: str, pair: str) -> str:
    """Which solution of a pair this labeller sees on the left, "first" or "second": as good as random, and always the same."""
    return ("first", "second")[hashlib.sha256(f"{labeller}\0{pair}".encode()).digest()[0] % 2]


@dataclass(frozen=True)
class Problem:
    """A programming problem. Each test is a dict of `args`, `expected` and perhaps `compare`, as `sandbox.py` reads it."""

    id: str
    title: str
    difficulty: str
    description: str
    function_name: str
    tests: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A solution as a model wrote it. code is what was found in the text, None where it holds none."""

    id: str
    model: str
    prompt: str
    parameters: dict
    text: str
    code: str | None


@dataclass(frozen=True)
class Pair:
    """Two solutions of one problem. Which is the first says nothing of where it is shown."""

    id: str
    problem: str
    first: Generation
    second: Generation


@dataclass(frozen=True)
class Judgement:
    """What a labeller says of a pair: choice is one of CHOICES, shown_left "first" or "second", seconds how long it took."""

    id: str
    pair: str
    shown_left: str
    choice: str
    labeller: str
    seconds: float | None = None
    reasons: tuple[str, ...] = ()
    comment: str = ""


@dataclass(frozen=True)
class ProblemRow:
    """A problem in the list: its newest pair, how many judgements it has, whether `mine` is among them, whether they differ.

    margin is by how much the policy prefers the first solution; None where it was not asked.
    """

    id: str
    title: str
    difficulty: str
    pair: str | None
    judgements: int
    mine: bool
    disagreement: bool
    margin: float | None


@dataclass(frozen=True)
class Query:
    """Which problems of the list are wanted, as whom: one of FILTERS, one of ORDERS, a part of the title."""

    labeller: str = ""
    only: str = "all"
    order: str = "added"
    difficulty: str = ""
    search: str = ""


@dataclass(frozen=True)
class Progress:
    """How far it has come; judgements count those that stand, and mine those of one labeller."""

    problems: int
    pairs: int
    judged_pairs: int
    judgements: int
    mine: int
    labellers: int


@dataclass(frozen=True)
class Agreement:
    """How far labellers agree on the pairs that several have judged, skips left aside.

    comparisons counts pairs of labellers on the same pair of solutions, and agreed those of the same choice. alpha is
    Krippendorff's for nominal data (1 agreement, 0 chance); None where nobody differs in anything.
    """

    pairs: int
    comparisons: int
    agreed: int
    alpha: float | None


def agreement_of(votes: Iterable[tuple[int, ...]]) -> Agreement:
    """Agreement from the votes on each pair: how many chose first, second, tie.

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
    """An open store. Use `open_store`; `read_only` says whether nothing can be added."""

    address: str
    connection: duckdb.DuckDBPyConnection
    read_only: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        """Events are numbered from where the last process stopped."""
        last = self._row("SELECT greatest((SELECT max(number) FROM preferences), (SELECT max(number) FROM pairs), "
                         "(SELECT max(number) FROM problems))")  # fmt: skip
        self._numbers = count((last[0] or 0) + 1)

    def close(self) -> None:
        """Write what is in memory into the file, and let go of it."""
        self.connection.close()

    # ---- reading -----------------------------------------------------------------------------------------------------------

    def _rows(self, statement: str, values: dict | None = None) -> list[tuple]:
        with closing(self.connection.cursor()) as cursor:
            return cursor.execute(statement, values or {}).fetchall()

    def _row(self, statement: str, values: dict | None = None) -> tuple | None:
        return next(iter(self._rows(statement, values)), None)

    def problem(self, problem: str) -> Problem | None:
        """The problem of an id."""
        row = self._row(
            "SELECT id, title, difficulty, description, function_name, tests FROM problems WHERE id = $id", {"id": problem}
        )
        return row and Problem(*row[:5], tuple(json.loads(row[5])))

    def pair_ids(self) -> set[str]:
        """The ids of all pairs."""
        return {id for (id,) in self._rows("SELECT id FROM pairs")}

    def difficulties(self) -> list[str]:
        """The difficulties there are."""
        return [row[0] for row in self._rows("SELECT DISTINCT difficulty FROM problems ORDER BY 1")]

    def pairs_of(self, problem: str) -> list[Pair]:
        """The pairs of a problem, the newest first."""
        return [_pair(row) for row in self._rows(PAIRS_OF, {"problem": problem})]

    def pairs(self) -> list[Pair]:
        """All pairs, the oldest first."""
        return [_pair(row) for row in self._rows(ALL_PAIRS)]

    def browse(self, query: Query, start: int = 0, size: int = 20) -> tuple[list[ProblemRow], int]:
        """A page of the list of problems, from `start` on, and how many there are in all."""
        values = {
            "labeller": query.labeller, "only": query.only, "uncertain": query.order == "uncertain",
            "difficulty": query.difficulty, "search": query.search, "start": start, "size": size,
        }  # fmt: skip
        rows = self._rows(BROWSE, values)
        return [ProblemRow(*row[:-1]) for row in rows], rows[0][-1] if rows else 0

    def standing(self, pair: str) -> list[Judgement]:
        """What stands of a pair, in the order in which it was said."""
        rows = self._rows(
            "SELECT id, pair, shown_left, choice, labeller, seconds, reasons, comment FROM standing "
            "WHERE pair = $pair ORDER BY number", {"pair": pair},
        )  # fmt: skip
        return [Judgement(*row[:6], tuple(row[6] or ()), row[7] or "") for row in rows]

    def last_judgement(self, labeller: str) -> tuple[str, str, str] | None:
        """(id, pair, problem) of the newest judgement of a labeller that was not taken back."""
        return self._row(
            "SELECT standing.id, pair, problem FROM standing JOIN pairs ON pairs.id = pair WHERE labeller = $labeller "
            "ORDER BY standing.number DESC LIMIT 1", {"labeller": labeller},
        )  # fmt: skip

    def judgements(self) -> Iterator[tuple]:
        """Every judgement that stands, with its problem, both texts and the votes on its pair: the columns of JUDGEMENTS."""
        with closing(self.connection.cursor()) as cursor:
            cursor.execute(JUDGEMENTS)
            while rows := cursor.fetchmany(1000):
                yield from rows

    def progress(self, labeller: str = "") -> Progress:
        """How far it has come."""
        return Progress(*self._row(PROGRESS, {"labeller": labeller}))

    def agreement(self) -> Agreement:
        """How far labellers agree."""
        return agreement_of(self._rows(VOTES_OF_PAIRS))

    def test_run(self, generation: str) -> list[dict] | None:
        """The results of the newest run of a solution's tests."""
        row = self._row(
            "SELECT results FROM test_runs WHERE generation = $generation ORDER BY moment DESC LIMIT 1",
            {"generation": generation},
        )
        return row and json.loads(row[0])

    # ---- adding ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self):
        """A cursor in a transaction, while no other thread writes: all of it is kept, or nothing."""
        if self.read_only:
            raise UserError(f"store: {self.address} is open for reading only. Expected a store of your own to add to.")
        with self._lock, closing(self.connection.cursor()) as cursor:
            cursor.begin()
            try:
                yield cursor
            except BaseException:
                cursor.rollback()
                raise
            cursor.commit()

    def add_problems(self, problems: Iterable[Problem]) -> tuple[int, int]:
        """Add problems whose ids are new. Returns how many were added, and how many were there already."""
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

    def add_pairs(self, pairs: Iterable[Pair], judgements: Iterable[Judgement] = ()) -> None:
        """Add pairs with their generations, and judgements of them, all or none. A generation that is known stays as it is."""
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
            for some in _chunks(judgements):
                _insert(cursor, INSERT_PREFERENCES, [self._event(judgement) for judgement in some])

    def judge(self, judgement: Judgement) -> None:
        """Add a judgement. One whose id is known is there already: a key that is pressed twice counts once.

        Raises ValueError for a choice or a side that is none, and for a pair that is not there.
        """
        if judgement.choice not in CHOICES or judgement.shown_left not in CHOICES[:2]:
            raise ValueError(f"no judgement: {judgement}")
        with self._writing() as cursor:
            if cursor.execute("SELECT count(*) FROM preferences WHERE id = ?", [judgement.id]).fetchone()[0]:
                return
            if not cursor.execute("SELECT count(*) FROM pairs WHERE id = ?", [judgement.pair]).fetchone()[0]:
                raise ValueError(f"no such pair: {judgement.pair}")
            _insert(cursor, INSERT_PREFERENCES, [self._event(judgement)])

    def undo(self, labeller: str) -> tuple[str, str] | None:
        """Take back the newest judgement of a labeller that stands; what they said of the pair before stands again.

        Returns (pair, problem) of it, None where there is nothing to take back.
        """
        last = self.last_judgement(labeller)
        if last is None:
            return None
        judgement, pair, problem = last
        with self._writing() as cursor:
            event = (next(self._numbers), new_id(), pair, None, None, labeller, None, "[]", None, now(), judgement)
            _insert(cursor, INSERT_PREFERENCES, [event])
        return pair, problem

    def _event(self, j: Judgement) -> tuple:
        number = next(self._numbers)
        return (number, j.id, j.pair, j.shown_left, j.choice, j.labeller, j.seconds, _json(j.reasons), j.comment, now(), None)

    def add_test_run(self, generation: str, results: list[dict]) -> None:
        """Keep the results of a solution's tests."""
        with self._writing() as cursor:
            cursor.execute("INSERT INTO test_runs VALUES (?, ?, ?)", [generation, _json(results), now()])

    def add_scores(self, model: str, margins: Iterable[tuple[str, float]]) -> None:
        """Keep by how much a model prefers the first solution of each pair: (pair, margin)."""
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
    """Open a store, made or brought to this version where that is needed.

    address: a file, `md:NAME` of MotherDuck, `md:_share/NAME/ID` of one who shares, or `:memory:`. Raises UserError, with what
    was found, where it cannot be opened.
    """
    return Store(address, *open_database(address, read_only))
