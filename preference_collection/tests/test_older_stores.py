"""Stores of the older layout: problems with their labels, and the tests beside them."""

import json

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_collection.exchange import code_rows
from preference_collection.exchange.importing import import_into
from preference_collection.exchange.literals import arguments_in, enclosed, literal_in
from preference_training.core.errors import UserError

PROBLEMS = [(1, "One", "Easy", "Say 1.", "a", "b", 0.0), (2, "Two", "Hard", "Say 2.", None, None, None)]
TESTS = "CREATE TABLE leetcode_tests (id INTEGER, function_name VARCHAR, inputs {0}, outputs {0})"


def older_store(path, tests: list[tuple], kind: str = "VARCHAR"):
    """A store with two problems and rows of tests, whose inputs and outputs have a type."""
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE leetcode_problems (id INTEGER, title VARCHAR, difficulty VARCHAR, description VARCHAR, "
            "version1 VARCHAR, version2 VARCHAR, preference DOUBLE)"
        )
        connection.executemany("INSERT INTO leetcode_problems VALUES (?, ?, ?, ?, ?, ?, ?)", PROBLEMS)
        connection.execute(TESTS.format(kind))
        if tests:
            connection.executemany("INSERT INTO leetcode_tests VALUES (?, ?, ?, ?)", tests)
    return path


def found_tests(store, path) -> list[tuple]:
    import_into(store, path)
    task = store.task("1")
    return task.function_name, [(test["args"], test["expected"]) for test in task.tests]


TWO_SUM = ("two_sum", [([[2, 7], 9], [0, 1]), ([[3, 3], 6], [0, 1])])


@pytest.mark.parametrize(
    ("tests", "kind"),
    [
        # A row for each problem: lists of texts, with the brackets of the call and of the output.
        ([(1, "two_sum", ["([2, 7], 9)", "[[3, 3], 6]"], ["[[0, 1]]", "([0, 1])"])], "VARCHAR[]"),
        ([(1, "two_sum", ["[2, 7], 9", "[3, 3], 6"], ["[0, 1]", "[0, 1]"])], "VARCHAR[]"),
        ([(1, "two_sum", ["nums = [2, 7], target = 9", "nums = [3, 3], target = 6"], ["[0, 1]", "(0, 1)"])], "VARCHAR[]"),
        # Lists as JSON, or as Python prints them.
        ([(1, "two_sum", "[[[2, 7], 9], [[3, 3], 6]]", "[[0, 1], [0, 1]]")], "VARCHAR"),
        ([(1, "two_sum", "[([2, 7], 9), ([3, 3], 6)]", "[(0, 1), (0, 1)]")], "VARCHAR"),
        ([(1, "two_sum", '["[[2, 7], 9]", "[[3, 3], 6]"]', '["[0, 1]", "[0, 1]"]')], "VARCHAR"),
        ([(1, "two_sum", "[[[2, 7], 9], [[3, 3], 6]]", "[[0, 1], [0, 1]]")], "JSON"),
        # A row for each test.
        ([(1, "two_sum", "[[2, 7], 9]", "[0, 1]"), (1, "two_sum", "([3, 3], 6)", "(0, 1)")], "VARCHAR"),
        ([(1, "two_sum", "[[2, 7], 9]", "[0, 1]"), (1, "two_sum", "[[3, 3], 6]", "[0, 1]"), (2, None, None, None)], "VARCHAR"),
    ],
)
def test_the_tests_of_an_older_store_are_imported(store, tmp_path, tests, kind):
    assert found_tests(store, older_store(tmp_path / "old.duckdb", tests, kind)) == TWO_SUM
    assert store.task("2").tests == () and store.progress().judgments == 1


def test_constants_of_json_and_of_python_are_the_same(store, tmp_path):
    rows = [(1, "f", '[true, null, "a"]', "false"), (1, "f", "[True, None, 'a']", "False")]
    assert found_tests(store, older_store(tmp_path / "old.duckdb", rows)) == ("f", [([True, None, "a"], False)] * 2)


FAULTS = [
    ((1, None, "[1]", "1"), "leetcode_tests row 1: it has no function_name"),
    ((1, "two sum", "[1]", "1"), "leetcode_tests row 1: function_name 'two sum' is not a valid function name"),
    ((7, "f", "[1]", "1"), "leetcode_tests row 1: no problem has the id '7'"),
    ((1, "f", "[1, 2]", "[1]"), "leetcode_tests row 1: it has 2 inputs and 1 outputs, expected one output for each input"),
    ((1, "f", "['[1']", "[1]"), "leetcode_tests row 1: '[1' is no value, as JSON or as Python prints it"),
    ((1, "f", "[1]", "__import__('os').getcwd()"), "leetcode_tests row 1: \"__import__('os').getcwd()\" is no value"),
    ((1, "f", "[1]", "{1, 2}"), "leetcode_tests row 1: a value is set, which JSON lacks"),
    ((1, "f", "[1]", " "), "leetcode_tests row 1: a text is empty, expected a value"),
    ((1, "f", "[1]", None), "leetcode_tests row 1: it has no outputs"),
]


@pytest.mark.parametrize(("row", "fault"), FAULTS, ids=[fault[22:50] for _, fault in FAULTS])
def test_a_faulty_row_of_tests_is_said_and_can_be_skipped(store, tmp_path, row, fault):
    path = older_store(tmp_path / "old.duckdb", [row])
    with pytest.raises(UserError) as caught:
        import_into(store, path)
    assert f"old.duckdb, {fault}" in str(caught.value)
    assert import_into(store, path, skip_bad_rows=True).num_bad_rows == 1
    assert store.task("1").tests == ()


def test_an_older_store_on_motherduck_is_imported_by_its_address(store, tmp_path, monkeypatch):
    path = older_store(tmp_path / "old.duckdb", [(1, "f", "[1]", "1"), (1, "f", "[2]", "2")])
    asked = []

    def connect(address, read_only):
        asked.append((address, read_only))
        return duckdb.connect(str(path), read_only=True)

    monkeypatch.setattr(code_rows, "connect", connect)
    for address in ("md:dpo", "md:_share/dpo/0123-abc"):
        import_into(store, address)
    assert asked == [("md:dpo", True), ("md:_share/dpo/0123-abc", True)]
    assert len(store.task("1").tests) == 2


def test_motherduck_without_a_token_is_one_message(store, monkeypatch):
    for name in ("motherduck_token", "MOTHERDUCK_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="md:dpo is a MotherDuck address, but motherduck_token is not set"):
        import_into(store, "md:dpo")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2), max_leaves=6,
)  # fmt: skip


@given(st.lists(PLAIN, max_size=3))
def test_arguments_are_the_same_as_json_and_as_python_prints_them(values):
    for text in (json.dumps(values), repr(values), repr(tuple(values))):
        assert arguments_in(text) == values and enclosed(text) == len(values)
    if values:
        assert literal_in(repr(values[0])) == literal_in(json.dumps(values[0])) == literal_in([values[0]])[0] == values[0]


@given(st.text(max_size=40) | PLAIN | st.floats() | st.binary())
def test_any_value_is_read_or_refused_and_never_run(value):
    for read in (literal_in, arguments_in):
        try:
            json.dumps(read(value), allow_nan=False)
        except ValueError as fault:
            assert str(fault)
