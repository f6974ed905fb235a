"""Importing problems: rows are added once, and faults are reported by row."""

import json

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_collection.exchange.code_rows import RowError, problem_of
from preference_collection.exchange.importing import CONVERSATIONS, OPPOSED, SAMPLES, add_samples, import_into
from preference_collection.store.model import Query
from preference_training.core.errors import UserError

FIELDS = ("id", "title", "difficulty", "description", "version1", "version2", "preference")
ROWS = [
    dict(zip(FIELDS, values, strict=True))
    for values in (
        (1, "One", "Easy", "Say 1.", "a", "b", 0),
        (2, "Two", "Hard", "Say 2.", "c", "d", 1),
        (3, "Three", "Hard", "Say 3.", "e", "f", None),
        (4, "Four", "", "Say 4.", None, None, None),
    )
]


def write(path, rows):
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".duckdb":
        with duckdb.connect(str(path)) as connection:
            connection.execute(
                "CREATE TABLE leetcode_problems (id INTEGER, title VARCHAR, difficulty VARCHAR, description VARCHAR, "
                "version1 VARCHAR, version2 VARCHAR, preference DOUBLE)"
            )
            connection.executemany("INSERT INTO leetcode_problems VALUES (?, ?, ?, ?, ?, ?, ?)", [
                [row[name] for name in FIELDS]
                for row in rows
            ])  # fmt: skip
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet", "older.duckdb"])
def test_rows_of_every_file_type_keep_their_labels(store, tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert import_into(store, path).line() == "4 tasks added, 3 new comparisons, 2 judgments"
    assert [problem.id for problem in store.browse(Query())[0]] == ["1", "2", "3", "4"]
    assert store.task("2").difficulty == "hard"
    choices = {}
    for number in "123":
        [comparison] = store.comparisons_of(number)
        choices[comparison.answers[0].text] = [(said.ranks, said.labeler) for said in store.standing(comparison.id)]
    assert choices == {"a": [((1, 2), "imported")], "c": [((2, 1), "imported")], "e": []}
    # A second import adds nothing.
    assert import_into(store, path).line() == "4 known tasks"
    assert store.progress().judgments == 2


def test_the_sample_problems_are_a_dozen_and_have_tests(store):
    assert import_into(store, SAMPLES).line() == "12 tasks added"
    for row in store.browse(Query())[0]:
        task = store.task(row.id)
        assert task.function_name in task.prompt and len(task.tests) >= 5


def test_the_sample_conversations_are_a_dozen_of_our_own_without_a_preference(store):
    assert import_into(store, CONVERSATIONS).line() == "12 tasks added, 12 new comparisons"
    sizes = [len(comparison.answers) for comparison in store.comparisons()]
    assert set(sizes) == {2, 3, 4} and store.progress().judgments == 0
    add_samples(store)
    assert store.progress().tasks == 24


def choices(store) -> list[tuple]:
    """Who said what of the only comparison."""
    [comparison] = store.comparisons()
    texts = [answer.text for answer in comparison.answers]
    return [(said.labeler, texts[said.ranks.index(1)]) for said in store.standing(comparison.id)]


ASKED = {"question": "P1", "answer_a": "A", "answer_b": "B"}
A_IS_BETTER = {"prompt": "P1", "chosen": "A", "rejected": "B"}
B_IS_BETTER = {"prompt": "P1", "chosen": "B", "rejected": "A"}


def test_a_preference_of_a_known_comparison_is_imported_once(store, tmp_path):
    assert import_into(store, write(tmp_path / "asked.jsonl", [ASKED])).line() == "1 task added, 1 new comparison"
    path = write(tmp_path / "a.jsonl", [A_IS_BETTER])
    assert import_into(store, path).line() == "1 known task, 1 judgment"
    assert import_into(store, path).line() == "1 known task"
    assert choices(store) == [("imported", "A")]


def test_an_opposite_preference_of_a_known_comparison_is_a_further_labelers(store, tmp_path):
    import_into(store, write(tmp_path / "a.jsonl", [A_IS_BETTER]))
    both = write(tmp_path / "b.jsonl", [B_IS_BETTER, A_IS_BETTER])
    found = import_into(store, both)
    assert found.line() == "1 known task, 1 judgment"
    assert choices(store) == [("imported", "A"), ("imported 2", "B")]
    assert [line for line in found.lines() if OPPOSED in line] == [f"  1 {OPPOSED}"]
    assert import_into(store, both).line() == "1 known task"


def test_a_label_of_known_solutions_is_imported(store, tmp_path):
    row = {**ROWS[0], "preference": None}
    assert import_into(store, write(tmp_path / "asked.jsonl", [row])).line() == "1 task added, 1 new comparison"
    assert import_into(store, write(tmp_path / "a.jsonl", [ROWS[0]])).line() == "1 known task, 1 judgment"
    assert choices(store) == [("imported", "a")]


def test_a_prompt_with_assertions_is_a_problem(store, tmp_path):
    row = {"prompt": "Write f.", "tests": ["assert f(1) == 2", "assert not f(0)"], "solution": "def f(n): return 2 * n"}
    assert import_into(store, write(tmp_path / "a.jsonl", [row])).line() == "1 task added"
    [task] = store.tasks_without_comparison()
    assert (task.prompt, task.function_name, task.kind) == ("Write f.", "f", "code")
    assert task.tests == ({"args": [1], "expected": 2}, {"args": [0], "expected": False})


def test_a_prompt_with_tests_and_two_answers_is_a_comparison(store, tmp_path):
    row = {"prompt": "Write f.", "tests": ["assert f(1) == 2"], "chosen": "def f(n): return 2", "rejected": "def f(n): pass"}
    assert import_into(store, write(tmp_path / "a.jsonl", [row])).line() == "1 task added, 1 new comparison, 1 judgment"


BAD = [
    ({"description": " "}, "description is empty"),
    ({}, "description is None, expected a text"),
    ({"description": "d", "title": ["x"]}, "title is list, expected a text"),
    ({"description": "d", "function_name": "two sum"}, "function_name 'two sum' is not a valid function name"),
    ({"description": "d", "function_name": "f", "tests": "[{"}, "tests are not JSON: "),
    ({"description": "d", "function_name": "f", "tests": {"a": 1}}, "tests are dict, expected a list"),
    ({"description": "d", "function_name": "f", "tests": [{"args": 3, "expected": 1}]}, "test 1 is not an object with args"),
    (
        {"description": "d", "function_name": "f", "tests": [{"args": [], "expected": 1, "compare": "as"}]},
        "test 1 has compare 'as'",
    ),
    ({"description": "d", "tests": [{"args": [], "expected": 1}]}, "it has tests but no function_name"),
    ({"description": "d", "tests": ["assert f(1) == 2", "assert f(x)"]}, "test 2 is 'assert f"),
    ({"description": "d", "version1": "a", "version2": "b", "preference": 2}, "preference is '2', expected 0"),
    ({"description": "d", "version1": "a", "preference": 1}, "it has a preference, but version1 or version2 is empty"),
    ({"description": "\ud800"}, "description holds half a surrogate pair"),
]


@pytest.mark.parametrize(("row", "fault"), BAD, ids=[fault[:30] for _, fault in BAD])
def test_an_invalid_row_is_reported_by_number_and_nothing_is_imported(store, tmp_path, row, fault):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(UserError) as caught:
        import_into(store, path)
    assert f"rows.jsonl, row 2: {fault}" in str(caught.value)
    assert str(caught.value).startswith(
        f"import: 1 row of {path} is invalid, and nothing was imported. Fix it, or skip it with"
    )
    assert store.progress().tasks == 0
    assert (
        import_into(store, path, skip_bad_rows=True).line()
        == "1 task added, 1 new comparison, 1 judgment, 1 invalid row skipped"
    )


def test_rows_that_contradict_an_earlier_one_are_invalid(store, tmp_path):
    other = {**ROWS[0], "description": "Say 5."}
    turned = {**ROWS[0], "preference": 1}
    path = write(tmp_path / "rows.jsonl", [ROWS[0], other, turned])
    with pytest.raises(UserError) as caught:
        import_into(store, path)
    assert "row 2: id '1' belongs to a different problem in an earlier row" in str(caught.value)
    assert "row 3: the same two solutions have the opposite preference" in str(caught.value)


def test_invalid_rows_of_one_kind_are_one_line_and_all_are_counted(store, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"description": ""}] * 12)
    with pytest.raises(UserError) as caught:
        import_into(store, path)
    assert "12 rows of" in str(caught.value) and "row 2:" not in str(caught.value)
    assert "row 1: description is empty. (11 more rows like it)" in str(caught.value)


def test_a_skipped_row_is_counted_once(store, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], {"description": ""}])
    first, *others = import_into(store, path, skip_bad_rows=True).lines()
    assert first.endswith("1 invalid row skipped") and not any("bad row" in line for line in others)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_a_file_without_rows_is_refused(store, tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"import: .*rows.jsonl has no rows\. Expected"):
        import_into(store, tmp_path / "rows.jsonl")


def test_an_answer_that_is_no_text_is_named_by_its_own_column(store, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "P", "answer_a": "A", "answer_b": 3}])
    with pytest.raises(UserError, match="field 'answer_b' is int"):
        import_into(store, path)


def test_broken_lines_are_reported_too(store, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"description": "d"}\n{"description": \n')
    with pytest.raises(UserError, match="row 2: not JSON: Expecting value at column 16 where the line ends"):
        import_into(store, path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.csv", None, "no such file"),
        ("x.duckdb", "no database" * 1000, "is not a DuckDB file"),
        ("x.parquet", "no", "not Parquet"),
        ("x.csv", "a,a\n1,2\n", "names a twice"),
    ],
)
def test_an_unreadable_file_gives_one_message(store, tmp_path, name, content, said):
    path = tmp_path / name
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        import_into(store, path)


def test_a_database_without_the_older_table_is_refused(store, tmp_path):
    duckdb.connect(str(tmp_path / "x.duckdb")).close()
    with pytest.raises(UserError, match="Expected a table leetcode_problems"):
        import_into(store, tmp_path / "x.duckdb")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@given(st.fixed_dictionaries({}, optional={name: ANYTHING for name in (
    "id", "title", "difficulty", "description", "function_name", "tests")}))  # fmt: skip
def test_any_row_gives_a_problem_or_a_fault(row):
    try:
        problem = problem_of(row)
    except RowError as fault:
        assert str(fault)
    else:
        assert problem.prompt.strip() and problem.id and problem.title


def test_the_function_that_a_version_defines_is_kept_where_it_has_another_name(store, tmp_path):
    tests = [{"args": [1, 2], "expected": 3}]
    versions = {"version1": "def add(a, b):\n    return a + b", "version2": "def plus(a, b):\n    return a + b"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1, "description": "Add.", "function_name": "add", "tests": tests, **versions}) + "\n")
    import_into(store, path)
    [comparison] = store.comparisons()
    assert [answer.parameters for answer in comparison.answers] == [{}, {"function_name": "plus"}]
