"""What every part of the store shares: reading with a cursor of one's own, and writing one at a time."""

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count, islice

import duckdb

from preference_training.core.errors import UserError
from preference_training.data.records.record import Prompt, Turn

LAST_NUMBER = """SELECT greatest((SELECT max(number) FROM judgments), (SELECT max(number) FROM comparisons),
    (SELECT max(number) FROM answers), (SELECT max(number) FROM tasks), (SELECT max(number) FROM verdicts))"""


@dataclass
class Database:
    """An open database of the current schema."""

    address: str
    connection: duckdb.DuckDBPyConnection
    read_only: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        """Continue the numbering of rows."""
        self._numbers = count((self._row(LAST_NUMBER)[0] or 0) + 1)

    def close(self) -> None:
        """Flush to the file, and close it."""
        self.connection.close()

    def _rows(self, statement: str, values: dict | None = None) -> list[tuple]:
        with closing(self.connection.cursor()) as cursor:
            return cursor.execute(statement, values or {}).fetchall()

    def _row(self, statement: str, values: dict | None = None) -> tuple | None:
        return next(iter(self._rows(statement, values)), None)

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


def insert(cursor, statement: str, rows: list[tuple]) -> None:
    """Add rows with a statement that takes a list of values for each column."""
    if rows:
        cursor.execute(statement, [list(column) for column in zip(*rows, strict=True)])


def chunks(items: Iterable, size: int = 1000) -> Iterator[list]:
    """The items in lists of at most `size`."""
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def as_json(value) -> str:
    """A value as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def prompt_of_json(text: str) -> Prompt:
    """The prompt that `as_json` wrote: a text, or a conversation."""
    value = json.loads(text)
    return value if isinstance(value, str) else tuple(Turn(*turn) for turn in value)
