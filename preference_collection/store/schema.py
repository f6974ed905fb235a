"""Opening a store: its versioned schema, migrations, and error messages.

A store is a DuckDB file, or a MotherDuck database (`md:NAME`, or a read-only share, `md:_share/NAME/ID`).
"""

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from preference_training.core.errors import UserError, first_line

TOKENS = ("motherduck_token", "MOTHERDUCK_TOKEN")

# A MotherDuck share, which only its owner can write: md:_share/NAME/ID.
SHARE = re.compile(r"md:_share/[\w.-]+/[\w-]+")

# Entry number n, counted from 1, migrates a store from version n - 1 to n. Entries are added, never changed: stores of every
# version exist. There are no keys or indexes: the single writer enforces uniqueness, and a column scan takes a millisecond.
MIGRATIONS = (
    (
        """CREATE TABLE problems (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, title VARCHAR NOT NULL, difficulty VARCHAR NOT NULL,
            description VARCHAR NOT NULL, function_name VARCHAR NOT NULL, tests VARCHAR NOT NULL, added TIMESTAMP NOT NULL)""",
        """CREATE TABLE generations (
            id VARCHAR NOT NULL, problem VARCHAR NOT NULL, model VARCHAR NOT NULL, prompt VARCHAR NOT NULL,
            parameters VARCHAR NOT NULL, text VARCHAR NOT NULL, code VARCHAR, made TIMESTAMP NOT NULL)""",
        """CREATE TABLE pairs (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, problem VARCHAR NOT NULL, first VARCHAR NOT NULL,
            second VARCHAR NOT NULL, made TIMESTAMP NOT NULL)""",
        """CREATE TABLE preferences (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, pair VARCHAR NOT NULL, shown_left VARCHAR, choice VARCHAR,
            labeller VARCHAR NOT NULL, seconds DOUBLE, reasons VARCHAR[], comment VARCHAR, moment TIMESTAMP NOT NULL,
            undoes VARCHAR)""",
        # The latest judgment of each labeler on each pair, without the undone ones.
        """CREATE VIEW standing AS
            SELECT * EXCLUDE (undoes) FROM preferences
            WHERE undoes IS NULL AND id NOT IN (SELECT undoes FROM preferences WHERE undoes IS NOT NULL)
            QUALIFY row_number() OVER (PARTITION BY pair, labeller ORDER BY number DESC) = 1""",
    ),
    (
        "CREATE TABLE test_runs (generation VARCHAR NOT NULL, results VARCHAR NOT NULL, moment TIMESTAMP NOT NULL)",
        """CREATE TABLE scores (
            pair VARCHAR NOT NULL, model VARCHAR NOT NULL, margin DOUBLE NOT NULL, moment TIMESTAMP NOT NULL)""",
    ),
    # Problems become tasks with a prompt of any kind (JSON: a text, or turns), pairs comparisons of any number of answers,
    # and choices ranks. Ids stay.
    (
        """CREATE TABLE tasks (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, title VARCHAR NOT NULL, difficulty VARCHAR NOT NULL,
            prompt VARCHAR NOT NULL, function_name VARCHAR NOT NULL, tests VARCHAR NOT NULL, kind VARCHAR NOT NULL,
            added TIMESTAMP NOT NULL)""",
        """INSERT INTO tasks SELECT number, id, title, difficulty, to_json(description)::VARCHAR, function_name, tests, 'code',
            added FROM problems""",
        """CREATE TABLE answers (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, task VARCHAR NOT NULL, model VARCHAR NOT NULL,
            prompt VARCHAR NOT NULL, parameters VARCHAR NOT NULL, text VARCHAR NOT NULL, code VARCHAR,
            made TIMESTAMP NOT NULL)""",
        """INSERT INTO answers SELECT row_number() OVER (ORDER BY made, id), id, problem, model, to_json(prompt)::VARCHAR,
            parameters, text, code, made FROM generations""",
        """CREATE TABLE comparisons (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, task VARCHAR NOT NULL, answers VARCHAR[] NOT NULL,
            made TIMESTAMP NOT NULL)""",
        "INSERT INTO comparisons SELECT number, id, problem, [first, second], made FROM pairs",
        """CREATE TABLE judgments (
            number BIGINT NOT NULL, id VARCHAR NOT NULL, comparison VARCHAR NOT NULL, labeler VARCHAR NOT NULL,
            choice VARCHAR, shown INTEGER[], ranks INTEGER[], seconds DOUBLE, reasons VARCHAR[], comment VARCHAR,
            edited VARCHAR, edited_from INTEGER, settles BOOLEAN NOT NULL, moment TIMESTAMP NOT NULL, undoes VARCHAR)""",
        """INSERT INTO judgments SELECT number, id, pair, labeller,
            CASE WHEN choice IN ('first', 'second') THEN 'ranked' ELSE choice END,
            CASE shown_left WHEN 'first' THEN [0, 1] WHEN 'second' THEN [1, 0] END,
            CASE choice WHEN 'first' THEN [1, 2] WHEN 'second' THEN [2, 1] END,
            seconds, reasons, comment, '', NULL, false, moment, undoes FROM preferences""",
        """CREATE TABLE verdicts (
            number BIGINT NOT NULL, comparison VARCHAR NOT NULL, judge VARCHAR NOT NULL, ranks INTEGER[] NOT NULL,
            reason VARCHAR NOT NULL, parameters VARCHAR NOT NULL, moment TIMESTAMP NOT NULL)""",
        """CREATE TABLE flip_probabilities (
            comparison VARCHAR NOT NULL, source VARCHAR NOT NULL, probability DOUBLE NOT NULL, moment TIMESTAMP NOT NULL)""",
        "ALTER TABLE test_runs RENAME generation TO answer",
        "ALTER TABLE scores RENAME pair TO comparison",
        "DROP VIEW standing",
        # The latest judgment of each labeler on each comparison, without the undone ones. Who settles a comparison keeps their
        # own judgment of it.
        """CREATE VIEW standing AS
            SELECT * EXCLUDE (undoes) FROM judgments
            WHERE undoes IS NULL AND id NOT IN (SELECT undoes FROM judgments WHERE undoes IS NOT NULL)
            QUALIFY row_number() OVER (PARTITION BY comparison, labeler, settles ORDER BY number DESC) = 1""",
        "DROP TABLE problems",
        "DROP TABLE generations",
        "DROP TABLE pairs",
        "DROP TABLE preferences",
    ),
)


def now() -> datetime:
    """The current time in UTC, for DuckDB's TIMESTAMP."""
    return datetime.now(UTC).replace(tzinfo=None)


def open_database(address: str, read_only: bool = False) -> tuple[duckdb.DuckDBPyConnection, bool]:
    """Connect to a store, and create or migrate it if needed. Also returns whether it is read-only.

    Raises UserError if it cannot be opened.
    """
    connection = connect(address, read_only)
    try:
        rights = "SELECT readonly FROM duckdb_databases() WHERE database_name = current_database()"
        read_only = read_only or connection.execute(rights).fetchone()[0]
        _migrate(address, connection, read_only)
    except BaseException:
        connection.close()
        raise
    return connection, read_only


def connect(address: str, read_only: bool) -> duckdb.DuckDBPyConnection:
    """Connect to a database. MotherDuck's token comes from the environment. Raises UserError if that fails."""
    remote = address.startswith("md:")
    if remote and not any(os.environ.get(name) for name in TOKENS):
        raise UserError(f"store: {address} is a MotherDuck address, but {TOKENS[0]} is not set. Set it to your token.")
    file = None if remote or address == ":memory:" else Path(address).expanduser()
    if file:
        _check_place(address, file, read_only)
    try:
        if not SHARE.fullmatch(address):
            return duckdb.connect(str(file or address), read_only=read_only and not remote)
        connection = duckdb.connect("md:")
        connection.execute("ATTACH ? AS shared", [address])
        connection.execute("USE shared")
        return connection
    except (duckdb.Error, OSError) as error:
        raise _refusal(address, error) from error


def _check_place(address: str, file: Path, read_only: bool) -> None:
    """Raise UserError where no store can be, and make its folder; no more, since a mistyped path must not become a tree."""
    if file.is_dir():
        raise UserError(f"store: {address} is a directory. Expected a file in it, such as {file / 'collection.duckdb'}.")
    if file.exists():
        return
    if read_only:
        raise UserError(f"store: {address}: no such file. Expected an existing store.")
    if not file.parent.parent.is_dir():
        raise UserError(f"store: {address}: there is no directory {file.parent.parent}. Create it, or name another place.")
    try:
        file.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"store: {address} cannot be written: {error.strerror}. Name a file in a directory of yours."
        ) from error


def _refusal(address: str, error: Exception) -> UserError:
    message = first_line(error, 400)
    if "onflicting lock" in message or "already open" in message:
        holder = f" (process {found[1]})" if (found := re.search(r"PID (\d+)", message)) else ""
        return UserError(
            f"store: {address} is open in another process{holder}, probably the labeling app's server. Only one can open it: "
            "stop that one first, or use its pages, such as Export."
        )
    if "ermission denied" in message or "ead-only file system" in message:
        return UserError(f"store: {address} cannot be opened: no permission. Name a file that you may read and write.")
    if "not a valid DuckDB" in message:
        return UserError(f"store: {address} is not a DuckDB file. Expected a store of this app, or a new file name.")
    return UserError(f"store: {address} cannot be opened: {message}. Expected a DuckDB file or a MotherDuck address.")


def _migrate(address: str, connection: duckdb.DuckDBPyConnection, read_only: bool) -> None:
    tables = "SELECT table_name FROM information_schema.tables WHERE table_catalog = current_database()"
    found = {name for (name,) in connection.execute(tables).fetchall()}
    if found and "schema_versions" not in found:
        raise UserError(
            f"store: {address} contains other tables ({', '.join(sorted(found)[:5])}). Expected a store of this app. To import "
            f"a store of the older layout: python -m preference_collection import {address}"
        )
    version = connection.execute("SELECT max(version) FROM schema_versions").fetchone()[0] if found else 0
    if version > len(MIGRATIONS):
        raise UserError(
            f"store: {address} has schema {version}, written by a newer app; this one supports {len(MIGRATIONS)}. "
            "Update this app."
        )
    if version < len(MIGRATIONS) and read_only:
        raise UserError(f"store: {address} has schema {version}, this app needs {len(MIGRATIONS)}. Open it once for writing.")
    if version == len(MIGRATIONS):
        return
    connection.begin()
    if not found:
        connection.execute("CREATE TABLE schema_versions (version INTEGER NOT NULL, moment TIMESTAMP NOT NULL)")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute("INSERT INTO schema_versions VALUES (?, ?)", [number, now()])
    connection.commit()
