"""The store keeps every judgment, under concurrent writes and killed processes."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_collection.store.schema import MIGRATIONS, now
from preference_collection.store.store import (
    CHOICES,
    Judgment,
    Progress,
    Query,
    agreement_of,
    new_id,
    open_store,
    side_shown_left,
)
from preference_collection.tests.conftest import a_pair, a_problem
from preference_training.core.errors import UserError

ROOT = Path(__file__).parent.parent.parent
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def judged(store, pair: str, choice: str = "first", labeler: str = "ada", **more) -> Judgment:
    judgment = Judgment(new_id(), pair, "first", choice, labeler, **more)
    store.judge(judgment)
    return judgment


def with_pairs(store, *problems: str) -> list:
    store.add_problems(map(a_problem, problems))
    pairs = [a_pair(problem) for problem in problems]
    store.add_pairs(pairs)
    return pairs


# ---- what goes in comes out -------------------------------------------------------------------------------------------------


def test_problems_and_pairs_are_stored_unchanged(store):
    problem = a_problem(tests=({"args": [[1, "é"], None], "expected": {"a": [True, 0.5]}, "compare": "close"},))
    pair = a_pair(texts=("```python\nx = '\"'\n```", "; DROP TABLE pairs; --"))
    assert store.add_problems([problem]) == (1, 0)
    store.add_pairs([pair])
    assert store.problem("sum") == problem and store.problem("nothing") is None
    assert store.pairs_of("sum") == [pair] == store.pairs()


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, comment=TEXTS, labeler=TEXTS, reasons=st.lists(TEXTS, max_size=3))
def test_any_text_is_stored_unchanged(text, comment, labeler, reasons):
    with closing(open_store(":memory:")) as store:
        store.add_problems([a_problem("p" + text, title=text, description=text)])
        pair = a_pair("p" + text, texts=(text, text + "\0```'\""))
        store.add_pairs([pair])
        said = judged(store, pair.id, labeler=labeler, comment=comment, reasons=tuple(reasons), seconds=1.5)
        assert store.problem("p" + text).description == text
        assert store.pairs_of("p" + text) == [pair]
        assert store.standing(pair.id) == [said]


def test_an_existing_problem_is_not_changed(store):
    store.add_problems([a_problem()])
    assert store.add_problems([a_problem(title="Another"), a_problem("other"), a_problem("other")]) == (1, 2)
    assert store.problem("sum").title == "The sum"


def test_the_content_survives_reopening_the_file(store):
    [pair] = with_pairs(store, "sum")
    said = judged(store, pair.id)
    store.close()
    with closing(open_store(store.address)) as again:
        assert again.standing(pair.id) == [said]
        later = judged(again, pair.id, "second")
        assert again.standing(pair.id) == [later], "numbers went on from where they were"


# ---- judgments -------------------------------------------------------------------------------------------------------------


def test_the_latest_judgment_of_each_labeler_counts_and_an_undo_restores_the_previous_one(store):
    [pair] = with_pairs(store, "sum")
    one = judged(store, pair.id, "first")
    other = judged(store, pair.id, "tie", labeler="bob")
    two = judged(store, pair.id, "second")
    assert store.standing(pair.id) == [other, two]
    assert store.undo("ada") == (pair.id, "sum")
    assert store.standing(pair.id) == [one, other]
    assert store.undo("ada") == (pair.id, "sum")
    assert store.undo("ada") is None
    assert store.standing(pair.id) == [other]
    # Nothing was deleted from the table: three judgments and two undos.
    assert store.connection.execute("SELECT count(*) FROM preferences").fetchone() == (5,)


def test_a_key_pressed_twice_counts_once(store):
    [pair] = with_pairs(store, "sum")
    said = judged(store, pair.id)
    store.judge(said)
    assert store.progress("ada") == Progress(problems=1, pairs=1, judged_pairs=1, judgments=1, mine=1, labelers=1)
    store.undo("ada")
    assert store.progress("ada").judgments == 0


@pytest.mark.parametrize(
    "judgment", [Judgment("a", "pair", "first", "both", "ada"), Judgment("a", "pair", "tie", "first", "ada"),
                  Judgment("a", "no such pair", "first", "first", "ada")],
)  # fmt: skip
def test_an_invalid_judgment_is_refused(store, judgment):
    with pytest.raises(ValueError):
        store.judge(judgment)
    assert store.progress().judgments == 0


def test_the_side_shown_left_is_balanced_and_stable(store):
    sides = [side_shown_left(labeler, pair) for labeler in ("ada", "bob") for pair in map(str, range(500))]
    assert sides == [side_shown_left(labeler, pair) for labeler in ("ada", "bob") for pair in map(str, range(500))]
    # 1000 throws of a coin: 500 heads, with a deviation of sqrt(1000) / 2 = 16; five of these to either side.
    assert abs(sides.count("first") - 500) < 80
    assert 170 < sum(a != b for a, b in zip(sides[:500], sides[500:], strict=True)) < 330


def test_agreement_is_krippendorffs_alpha():
    # Two labelers, four units, (a a) (a a) (b b) (a b): 8 values, 5 a and 3 b. D_o = 2/8: the one unit that disagrees has
    # (4 - 1 - 1) / 1 = 2. D_e = (64 - 25 - 9) / (8 * 7) = 30/56. alpha = 1 - (1/4) / (30/56) = 1 - 7/15.
    found = agreement_of([(2, 0, 0), (2, 0, 0), (0, 2, 0), (1, 1, 0)])
    assert (found.pairs, found.comparisons, found.agreed) == (4, 4, 3)
    assert found.alpha == pytest.approx(8 / 15)
    # Three labelers of one pair, two of a kind: one of three comparisons agrees.
    assert agreement_of([(2, 1, 0)]).agreed == 1
    assert agreement_of([(3, 0, 0), (1, 0, 0)]).alpha is None and agreement_of([]).comparisons == 0


def test_agreement_ignores_skips_and_single_judgments(store):
    one, two, three = with_pairs(store, "a", "b", "c")
    for pair, choices in ((one, ("first", "first", "skip")), (two, ("tie", "second")), (three, ("first",))):
        for labeler, choice in zip(("ada", "bob", "eve"), choices, strict=False):
            judged(store, pair.id, choice, labeler)
    found = store.agreement()
    assert (found.pairs, found.comparisons, found.agreed) == (2, 2, 1)


# ---- the list of problems ---------------------------------------------------------------------------------------------------


def ids(store, **query) -> list[str]:
    rows, total = store.browse(Query(**query))
    assert total == len(rows)
    return [row.id for row in rows]


def test_the_list_is_filtered_per_labeler(store):
    pairs = with_pairs(store, "a", "b", "c")
    store.add_problems([a_problem("d", difficulty="hard", title="100% 'quoted'")])
    judged(store, pairs[0].id, "first", "ada")
    judged(store, pairs[0].id, "second", "bob")
    judged(store, pairs[1].id, "skip", "ada")
    judged(store, pairs[1].id, "first", "bob")
    assert ids(store) == ["a", "b", "c", "d"]
    assert ids(store, labeler="ada", only="unlabeled") == ["c", "d"]
    assert ids(store, labeler="eve", only="unlabeled") == ["a", "b", "c", "d"]
    assert ids(store, only="disagreement") == ["a"], "a skip disagrees with nobody"
    assert ids(store, difficulty="hard") == ids(store, search="% 'QUO") == ["d"]
    assert store.difficulties() == ["easy", "hard"]
    rows, total = store.browse(Query(), start=1, size=2)
    assert [row.id for row in rows] == ["b", "c"] and total == 4
    assert (rows[0].judgments, rows[0].pair, rows[1].judgments) == (2, pairs[1].id, 0)


def test_a_new_pair_makes_a_problem_unlabeled_again(store):
    [pair] = with_pairs(store, "a")
    judged(store, pair.id)
    assert ids(store, labeler="ada", only="unlabeled") == []
    store.add_pairs([a_pair("a")])
    assert ids(store, labeler="ada", only="unlabeled") == ["a"]


def test_pairs_that_the_policy_is_least_sure_about_come_first(store):
    pairs = with_pairs(store, "a", "b", "c", "d")
    store.add_scores("old", [(pairs[3].id, 0.0)])
    store.add_scores("new", [(pairs[0].id, -5.0), (pairs[1].id, 0.5), (pairs[2].id, 2.0)])
    # d was scored only by an older policy.
    assert ids(store, order="uncertain") == ["b", "c", "a", "d"]


def test_test_runs_are_stored_and_the_newest_is_shown(store):
    assert store.test_run("g") is None
    store.add_test_run("g", [{"status": "failed"}])
    store.add_test_run("g", [{"status": "passed", "got": "é"}])
    assert store.test_run("g") == [{"status": "passed", "got": "é"}]


# ---- several at once, and ends -----------------------------------------------------------------------------------------------


def judge_at_once(store, labelers: int, each: int) -> None:
    """Each labeler, in a thread, judges the pairs in turn, undoes one in ten, and browses now and then."""
    problems = [f"p{index}" for index in range(each)]
    pairs = with_pairs(store, *problems)
    failures = []

    def label(name: str) -> None:
        try:
            for index, pair in enumerate(pairs):
                judged(store, pair.id, CHOICES[index % 4], name)
                if index % 10 == 0:
                    store.undo(name)
                    judged(store, pair.id, CHOICES[index % 4], name)
                if index % 25 == 0:
                    store.browse(Query(labeler=name, only="unlabeled"))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=label, args=(f"labeler {number}",)) for number in range(labelers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.progress("labeler 0") == Progress(each, each, each, labelers * each, each, labelers)
    numbers = "SELECT count(*), count(DISTINCT id), count(DISTINCT number) FROM preferences"
    written = labelers * (each + 2 * (-(-each // 10)))
    assert store.connection.execute(numbers).fetchone() == (written, written, written)


def test_concurrent_labelers_lose_and_duplicate_nothing(store):
    judge_at_once(store, labelers=16, each=20)


WRITER = """
import sys
from preference_collection.store.store import Judgment, open_store
from preference_collection.tests.conftest import a_pair, a_problem
store = open_store(sys.argv[1])
store.add_problems([a_problem()])
store.add_pairs([a_pair(id="pair")])
for number in range(10**6):
    store.judge(Judgment(f"j{number}", "pair", "first", "first", f"labeler {number}"))
    print(f"j{number}", flush=True)
"""


def test_a_process_killed_while_writing_loses_nothing_that_it_confirmed(tmp_path):
    path = str(tmp_path / "collection.duckdb")
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline().strip() for _ in range(60)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.read().split()
    with closing(open_store(path)) as store:
        found = {judgment.id for judgment in store.standing("pair")}
        # It may have written one more than it could confirm.
        assert set(said) <= found and len(found) <= len(said) + 1
        judged(store, "pair")


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
        assert message.startswith(f"store: {path} is open in another process, and only one can open it. Close the other.")
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
    assert f"store: {tmp_path} cannot be opened" in refused(tmp_path)
    absent = tmp_path / "absent.duckdb"
    assert refused(absent, read_only=True) == f"store: {absent}: no such file. Expected an existing store."


def test_a_store_of_each_earlier_version_is_migrated_with_its_content(tmp_path):
    for version in range(1, len(MIGRATIONS)):
        path = str(tmp_path / f"{version}.duckdb")
        with duckdb.connect(path) as connection:
            connection.execute("CREATE TABLE schema_versions (version INTEGER NOT NULL, moment TIMESTAMP NOT NULL)")
            for number, statements in enumerate(MIGRATIONS[:version], start=1):
                for statement in statements:
                    connection.execute(statement)
                connection.execute("INSERT INTO schema_versions VALUES (?, ?)", [number, now()])
            connection.execute("INSERT INTO problems VALUES (1, 'a', 't', 'easy', 'd', '', '[]', ?)", [now()])
        assert f"has schema {version}, this app needs {len(MIGRATIONS)}" in refused(path, read_only=True)
        with closing(open_store(path)) as store:
            assert ids(store) == ["a"]
            versions = store.connection.execute("SELECT version FROM schema_versions ORDER BY 1").fetchall()
            assert versions == [(number,) for number in range(1, len(MIGRATIONS) + 1)]


def test_a_read_only_store_can_be_read_but_not_written(store):
    [pair] = with_pairs(store, "a")
    store.close()
    with closing(open_store(store.address, read_only=True)) as reader:
        assert ids(reader) == ["a"]
        with pytest.raises(UserError, match="is open read-only"):
            judged(reader, pair.id)


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
