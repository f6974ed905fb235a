"""Opening a store: older ones are migrated with their content, and what is no store is refused in one message."""

import subprocess
import sys
from contextlib import closing

import duckdb
import pytest

from preference_collection.store import schema
from preference_collection.store.model import Answer, Comparison, Judgment, Query, Task
from preference_collection.store.schema import MIGRATIONS, now
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
from preference_training.core.errors import UserError

# ---- what is no store -------------------------------------------------------------------------------------------------------


def refused(address, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_store(str(address), **options)
    return str(caught.value)


def test_a_file_that_is_not_a_duckdb_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Some notes.\n" * 2000)
    assert refused(path) == f"store: {path} is not a DuckDB file. Expected a store of this app, or a new file name."
    assert path.read_text().startswith("Some notes."), "and it is left alone"


def test_a_store_open_in_another_process_is_refused(tmp_path):
    path = tmp_path / "collection.duckdb"
    hold = "import sys, duckdb; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        message = refused(path)
        assert message.startswith(f"store: {path} is open in another process (process {process.pid}), probably the labeling")
        assert "stop that one first" in message and "http" not in message
        assert str(process.pid) in message
        process.stdin.close()
    open_store(str(path)).close()


def test_a_store_of_a_newer_app_is_refused(store):
    store.connection.execute("INSERT INTO schema_versions VALUES (99, now()::TIMESTAMP)")
    store.close()
    known = len(MIGRATIONS)
    assert refused(store.address) == (
        f"store: {store.address} has schema 99, written by a newer app; this one supports {known}. Update this app."
    )


def test_an_unrelated_database_is_refused(tmp_path):
    path = tmp_path / "other.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE leetcode_problems (id INTEGER)")
    message = refused(path)
    assert "contains other tables (leetcode_problems)" in message and f"import {path}" in message
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("SHOW TABLES").fetchall() == [("leetcode_problems",)]


def test_a_directory_and_a_missing_file_give_one_message_each(tmp_path):
    assert f"store: {tmp_path} is a directory" in refused(tmp_path)
    absent = tmp_path / "absent.duckdb"
    assert refused(absent, read_only=True) == f"store: {absent}: no such file. Expected an existing store."


# What a store of schema 2 holds, by table; schema 1 has the first four.
OLDER_ROWS = """
INSERT INTO problems VALUES (1, 'a', 'The a', 'easy', 'Say "a" \\ é', 'f', '[{"args": [], "expected": 1}]', now()::TIMESTAMP);
INSERT INTO generations VALUES
    ('g2', 'a', 'tiny', 'Say "a"', '{"seed": 7}', 'one', 'x = 1', now()::TIMESTAMP - INTERVAL 1 SECOND),
    ('g1', 'a', 'large', 'Say "a"', '{}', 'two', NULL, now()::TIMESTAMP);
INSERT INTO pairs VALUES (2, 'p', 'a', 'g2', 'g1', now()::TIMESTAMP);
INSERT INTO preferences VALUES
    (3, 'j1', 'p', 'first', 'first', 'ada', 1.5, ['faster'], 'so', now()::TIMESTAMP, NULL),
    (4, 'j2', 'p', 'second', 'second', 'bob', NULL, [], '', now()::TIMESTAMP, NULL),
    (5, 'j3', 'p', 'second', 'tie', 'eve', NULL, [], '', now()::TIMESTAMP, NULL),
    (6, 'j4', 'p', 'first', 'skip', 'kim', NULL, [], '', now()::TIMESTAMP, NULL),
    (7, 'j5', 'p', 'first', 'second', 'ada', NULL, [], '', now()::TIMESTAMP, NULL),
    (8, 'undo', 'p', NULL, NULL, 'ada', NULL, [], NULL, now()::TIMESTAMP, 'j5');
"""
LATER_ROWS = """
INSERT INTO test_runs VALUES ('g2', '[{"status": "passed"}]', now()::TIMESTAMP);
INSERT INTO scores VALUES ('p', 'policy', -0.5, now()::TIMESTAMP);
"""


def older_store(path: str, version: int) -> None:
    """A store of schema 1 or 2 with content."""
    with duckdb.connect(path) as connection:
        connection.execute("CREATE TABLE schema_versions (version INTEGER NOT NULL, moment TIMESTAMP NOT NULL)")
        for number, statements in enumerate(MIGRATIONS[:version], start=1):
            for statement in statements:
                connection.execute(statement)
            connection.execute("INSERT INTO schema_versions VALUES (?, ?)", [number, now()])
        connection.execute(OLDER_ROWS + (LATER_ROWS if version > 1 else ""))


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_each_earlier_version_is_migrated_with_its_content(tmp_path, version):
    path = str(tmp_path / "older.duckdb")
    older_store(path, version)
    assert f"has schema {version}, this app needs {len(MIGRATIONS)}" in refused(path, read_only=True)
    with closing(open_store(path)) as store:
        versions = store.connection.execute("SELECT version FROM schema_versions ORDER BY 1").fetchall()
        assert versions == [(number,) for number in range(1, len(MIGRATIONS) + 1)]
        tests = ({"args": [], "expected": 1},)
        assert store.task("a") == Task("a", "The a", "easy", 'Say "a" \\ é', "f", tests, "code")
        answers = (
            Answer("g2", "tiny", 'Say "a"', {"seed": 7}, "one", "x = 1"),
            Answer("g1", "large", 'Say "a"', {}, "two", None),
        )
        assert store.comparisons_of("a") == [Comparison("p", "a", answers)] and store.answers_of("a") == list(answers)
        assert store.standing("p") == [
            Judgment("j1", "p", "ada", "ranked", (0, 1), (1, 2), 1.5, ("faster",), "so"),
            Judgment("j2", "p", "bob", "ranked", (1, 0), (2, 1)),
            Judgment("j3", "p", "eve", "tie", (1, 0)),
            Judgment("j4", "p", "kim", "skip", (0, 1)),
        ]
        assert store.test_run("g2") == ([{"status": "passed"}] if version > 1 else None)
        assert store.browse(Query())[0][0].margin == (-0.5 if version > 1 else None)
        # New rows are numbered behind the old ones, and what was judged can be undone.
        store.judge(Judgment("j6", "p", "ada", "bad", (0, 1)))
        assert [judgment.id for judgment in store.standing("p")] == ["j2", "j3", "j4", "j6"]
        assert store.undo("ada") == "p" == store.undo("ada") and store.undo("ada") is None


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    path = str(tmp_path / "older.duckdb")
    older_store(path, 2)
    monkeypatch.setattr(schema, "MIGRATIONS", (*MIGRATIONS[:-1], (*MIGRATIONS[-1], "SELECT * FROM no_such_table")))
    with pytest.raises(duckdb.CatalogException):
        open_store(path)
    monkeypatch.undo()
    with duckdb.connect(path) as connection:
        assert connection.execute("SELECT max(version) FROM schema_versions").fetchone() == (2,)
        assert connection.execute("SELECT count(*) FROM preferences").fetchone() == (6,)
    with closing(open_store(path)) as store:
        assert [judgment.id for judgment in store.standing("p")] == ["j1", "j2", "j3", "j4"]


def test_a_read_only_store_can_be_read_but_not_written(store):
    comparison = a_comparison("a")
    store.add_tasks([a_task("a")])
    store.add_comparisons([comparison])
    store.close()
    with closing(open_store(store.address, read_only=True)) as reader:
        assert reader.comparison(comparison.id) == comparison
        with pytest.raises(UserError, match="is open read-only"):
            reader.judge(a_judgment(comparison))


def test_motherduck_without_a_token_gives_one_message_and_opens_no_browser(monkeypatch):
    for name in ("motherduck_token", "MOTHERDUCK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    message = "store: md:mine is a MotherDuck address, but motherduck_token is not set. Set it to your token."
    assert refused("md:mine") == message


def test_a_motherduck_address_is_opened_by_its_kind(monkeypatch):
    asked = []

    def connect(address, **options):
        asked.append((address, options))
        return Connection()

    class Connection:
        def execute(self, *statement):
            asked.append(statement)
            raise duckdb.IOException("no network")

    monkeypatch.setenv("motherduck_token", "secret")
    monkeypatch.setattr(duckdb, "connect", connect)
    assert refused("md:_share/birds/0a9a02-6e") == (
        "store: md:_share/birds/0a9a02-6e cannot be opened: no network. Expected a DuckDB file or a MotherDuck address."
    )
    assert asked == [("md:", {}), ("ATTACH ? AS shared", ["md:_share/birds/0a9a02-6e"])]
