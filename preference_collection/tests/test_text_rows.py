"""Rows of prompts and answers: whatever training reads can be labeled, and so can rows that nobody has compared yet."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_collection.exchange.importing import MORE_ANSWERS, OPPOSED, REPEATED, Import, import_into, task_of
from preference_collection.exchange.text_rows import TextRow, text_rows
from preference_collection.store.model import Query
from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.data.records.report import SAME_TEXT, DataReport
from tests.support.files import ROOT

QUESTION = [{"role": "user", "content": "q"}]
ASKED = (Turn("user", "q"),)


def written(tmp_path, rows: list[dict], name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path, rows: list[dict], **columns) -> Import:
    """What is imported of rows."""
    found = Import()
    for _, row in text_rows(str(written(tmp_path, rows)), columns, found.report):
        found.take_text(row)
    found.compare_singles()
    return found


def said(found: Import) -> dict:
    """Prompt -> its judgments, each the choice and the answers with their ranks."""
    heard: dict = {found.tasks[comparison.task].prompt: [] for comparison in found.comparisons.values()}
    for judgment in found.judgments.values():
        comparison = found.comparisons[judgment.comparison]
        ranks = dict(zip((answer.text for answer in comparison.answers), judgment.ranks, strict=False))
        heard[found.tasks[comparison.task].prompt].append((judgment.choice, ranks))
    return heard


A_OVER_B = {"q": [("ranked", {"a": 1, "b": 2})]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], A_OVER_B),
        ([{"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}], {"q": [("ranked", {"a": 1, "b": 2, "c": 2})]}),
        ([{"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 1, 2]}], {"q": [("ranked", {"a": 1, "c": 2, "b": 3})]}),
        ([{"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}], {"q": [("ranked", {"a": 1, "b": 2, "c": 2})]}),
        ([{"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}], {"q": [("tie", {})]}),
        ([{"prompt": "q", "response_a": "b", "response_b": "a", "winner": "b"}], A_OVER_B),
        ([{"prompt": QUESTION, "response_a": "a", "response_b": "b", "winner": "tie"}], {ASKED: [("tie", {})]}),
        ([{"question": "q", "response": "a", "score": 2}, {"question": "q", "response": "b", "score": 1}], A_OVER_B),
        ([{"prompt": "q", "completion": "b", "label": False}, {"prompt": "q", "completion": "a", "label": True}], A_OVER_B),
        ([{"prompt": "q", "completion": text, "label": False} for text in "ab"], {"q": [("bad", {})]}),
        ([{"prompt": "q", "completion": text, "label": True} for text in "ab"], {"q": [("tie", {})]}),
        (
            [{"prompt": "q", "responses": ["a", "b"], "pairs": [], "sft_target": "c", "labels": [False] * 2}],
            {"q": [("bad", {})]},
        ),
    ],
    ids=lambda value: ", ".join(value[0]) if isinstance(value, list) else "",
)
def test_what_a_row_prefers_is_a_judgment(tmp_path, rows, expected):
    found = read(tmp_path, rows)
    assert said(found) == expected
    assert {judgment.labeler for judgment in found.judgments.values()} == {"imported"}


def test_every_format_that_training_documents_can_be_imported(tmp_path):
    table = re.findall(r"^\| `(\{.*?\})` \|.*\| (.*?) \|$", (ROOT / "docs" / "your-own-data.md").read_text(), re.MULTILINE)
    rows = {text: gives for text, gives in table if text.startswith('{"') and '"text"' not in text}
    assert len(rows) > 35
    for text, gives in rows.items():
        found = read(tmp_path, [json.loads(text)])
        assert not found.num_bad_rows, text
        assert len(found.tasks) == 1 and len(found.comparisons) == (0 if "target" in gives or "labeled" in gives else 1), text
        assert len(found.judgments) == len(found.comparisons), text


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"prompt": "q", "responses": ["a", "b"]}], {}),
        ([{"prompt": "q", "responses": "['a', 'b']"}], {}),
        ([{"prompt": "q", "candidates": [{"text": "a"}, {"text": "b"}]}], {}),
        ([{"instruction": "q", "answer_a": "a", "answer_b": "b"}], {}),
        ([{"prompt": "q", "output_1": "a", "output_2": "b", "output_3": None}], {}),
        ([{"prompt": "q", "response_a": "a", "response_b": "b", "winner": None}, *[
            {"prompt": f"q{n}", "response_a": "a", "response_b": "b", "winner": "a"} for n in range(3)]], {}),
        ([{"prompt": name, "responses": ["a", "b"], "scores": scores} for name, scores in (("q", None), ("r", [1, 2]))], {}),
        ([{"ask": "q", "x": "a", "y": "b"}], {"prompt": "ask", "responses": ["x", "y"]}),
        ([{"ask": "q", "x": ["a", "b"]}], {"prompt": "ask", "responses": "x"}),
    ],
)  # fmt: skip
def test_answers_that_nobody_has_compared_are_a_comparison_without_a_judgment(tmp_path, rows, columns):
    found = read(tmp_path, rows, **columns)
    assert said(found)["q"] == [] and not found.num_bad_rows
    [comparison] = [each for each in found.comparisons.values() if found.tasks[each.task].prompt == "q"]
    assert sorted(answer.text for answer in comparison.answers) == ["a", "b"]


def test_prompts_without_an_answer_wait_for_models_and_those_with_one_for_a_second(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answered = [*talk, {"role": "assistant", "content": "a"}]
    for rows, prompts, answers in (
        ([{"prompt": "q"}, {"prompt": QUESTION}], ["q", ASKED], []),
        ([{"question": "What is it?"}], ["What is it?"], []),
        ([{"messages": talk}, {"messages": answered}], [(Turn("system", "s"), Turn("user", "q"))] * 1, ["a"]),
        ([{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": None}], ["q", "r"], ["a"]),
    ):
        found = read(tmp_path, rows)
        assert [task.prompt for task in found.tasks.values()] == prompts
        assert [answer.text for _, answer in found.answers.values()] == answers
        assert not found.comparisons


def test_a_conversation_is_asked_to_continue_at_its_last_turn(tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "qars", strict=True)]
    found = read(tmp_path, [{"messages": turns}, {"messages": turns[:3]}])
    [task] = found.tasks.values()
    assert task.prompt == (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r")) and task.title == "r"
    assert [answer.text for _, answer in found.answers.values()] == ["s"]


def test_answers_of_several_turns_and_tools_keep_what_they_have(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}]}
    rest = [call, {"role": "tool", "content": "seen"}, {"role": "assistant", "content": "Done."}]
    other = [{"role": "assistant", "content": "No."}]
    found = read(tmp_path, [{"prompt": QUESTION, "chosen": rest, "rejected": other, "tools": [{"name": "look"}]}])
    [comparison] = found.comparisons.values()
    answers = {len(answer.parameters.get("turns", "")): answer for answer in comparison.answers}
    assert answers[0].text == "No." and "look" in answers[3].text and "tool: seen" in answers[3].text
    assert {answer.parameters["tools"] for answer in comparison.answers} == {'[{"name": "look"}]'}


def test_of_more_than_five_answers_the_first_five_are_compared_and_it_is_said(tmp_path):
    found = read(tmp_path, [{"prompt": "q", "responses": list("abcdefg"), "scores": [1, 2, 3, 4, 5, 6, 7]}])
    assert said(found) == {"q": [("ranked", {"e": 1, "d": 2, "c": 3, "b": 4, "a": 5})]}
    assert found.report.changed == {MORE_ANSWERS: 2}


def test_opposite_rows_are_several_labelers_and_equal_ones_count_once(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = read(tmp_path, [row, row | {"chosen": "b", "rejected": "a"}, row, row | {"rejected": "a"}])
    assert said(found) == {"q": [("ranked", {"a": 1, "b": 2}), ("ranked", {"a": 2, "b": 1})]}
    assert [judgment.labeler for judgment in found.judgments.values()] == ["imported", "imported 2"]
    assert (found.report.changed, found.report.left_out) == ({OPPOSED: 1, REPEATED: 1}, {SAME_TEXT: 1})


def test_the_order_of_answers_does_not_say_which_is_preferred(tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    found = read(tmp_path, rows)
    first = [comparison.answers[0].text for comparison in found.comparisons.values()]
    assert 8 < first.count("a") < 32


@pytest.mark.parametrize(
    ("rows", "columns", "fault"),
    [
        ([{"text": "A note."}], {}, "plain text in `text`, without prompts or answers. Expected rows of prompts; if these"),
        ([{"foo": "x y", "bar": 3}], {}, "no prompts; the rows have foo, bar. Expected a column prompt, or its name: --map"),
        ([{"prompt": "q"}], {"chosen": "good", "rejcted": "bad"}, "no key 'rejcted'; did you mean rejected?"),
        ([{"prompt": "q", "chosen": "a", "rejected": ""}], {}, "row 1: field 'rejected' is empty."),
        ([{"prompt": "q", "response_a": "a", "response_b": "b", "winner": "x"}], {"answers": ["response_a", "response_b"],
          "better": {"winner": [1, 2]}}, "row 1: field 'winner' is 'x', expected a value for one of"),
        ([{"prompt": "", "completion": "a"}, {"prompt": "q", "completion": "a"}], {}, "row 1: field 'prompt' is empty."),
    ],
)  # fmt: skip
def test_what_cannot_be_labeled_is_refused_with_its_row(store, tmp_path, rows, columns, fault):
    with pytest.raises(UserError) as caught:
        import_into(store, written(tmp_path, rows), given=columns)
    assert fault in str(caught.value) and str(caught.value).startswith("import: ")
    assert store.progress().tasks == 0


def test_rows_of_a_folder_and_columns_of_other_names_are_imported_once(store, tmp_path):
    for name in ("one.jsonl", "two.jsonl"):
        written(tmp_path, [{"ask": f"What is {name}?", "good": "a", "bad": "b", "stars": 5, "note": "n"}], name)
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "where": {"stars": ">= 3"}}
    found = import_into(store, f"{tmp_path}/*.jsonl", given=columns)
    lines = ["columns not read: note", "where skips no row by stars: >= 3"]
    assert found.lines() == ["2 tasks added, 2 new comparisons, 2 judgments", *(f"  {line}" for line in lines)]
    assert [row.title for row in store.browse(Query())[0]] == ["What is one.jsonl?", "What is two.jsonl?"]
    assert import_into(store, f"{tmp_path}/*.jsonl", given=columns).line() == "2 known tasks"


def test_pairs_that_a_run_questions_are_texts_unless_they_are_code(store, tmp_path):
    flagged = {"preference": None, "labelled": 0, "source": "s", "flagged": "mislabelled"}
    code = {"description": "Write f.", "version1": "def f():\n    return 1", "version2": "def f():\n    return 2"}
    rows = [code | flagged, {"description": "Hello?", "version1": "Hi.", "version2": "No."} | flagged]
    import_into(store, written(tmp_path, rows))
    kinds = {task.prompt: task.kind for task in map(store.task, (comparison.task for comparison in store.comparisons()))}
    assert kinds == {"Write f.": "code", "Hello?": "text"}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
VALUE = st.sampled_from(
    [
        "x y",
        "",
        None,
        1,
        0.5,
        True,
        ["a", "b"],
        ["a", None],
        [1, 2],
        QUESTION,
        [*QUESTION, {"role": "assistant", "content": "a"}],
    ]
)
COLUMNS = (
    "prompt", "chosen", "rejected", "responses", "scores", "ranks", "response_a", "response_b", "winner", "completion", "label",
    "messages", "system", "pairs", "sft_target", "note", "title", "image",
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUE, max_size=6), min_size=1, max_size=4))
def test_every_row_is_imported_refused_or_counted(tmp_path_factory, rows):
    path = written(tmp_path_factory.mktemp("rows"), rows)
    report = DataReport(skip_bad_rows=True)
    try:
        found = [number for number, _ in text_rows(str(path), {}, report)]
    except UserError:
        return
    assert len(found) == len(set(found)) and sum(report.left_out.values()) + report.num_bad_rows + len(found) == len(rows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, st.integers(1, 4)), min_size=2, max_size=5, unique_by=lambda pair: pair[0]))
def test_ranks_in_a_file_are_the_ranks_of_the_judgment(tmp_path_factory, ranked):
    texts, ranks = zip(*ranked, strict=True)
    row = {"prompt": "What is the best?", "responses": texts, "ranks": ranks}
    found = read(tmp_path_factory.mktemp("ranks"), [row])
    [(choice, heard)] = said(found)["What is the best?"]
    places = sorted(set(ranks))
    expected = {text: places.index(rank) + 1 for text, rank in ranked}
    assert (choice, heard) == (("ranked", expected) if len(places) > 1 else ("tie", {}))


@given(
    TEXT
    | st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), TEXT).map(lambda turn: Turn(*turn)), min_size=1, max_size=3
    ).map(tuple)
)
def test_every_prompt_has_a_short_title_and_the_same_id_every_time(prompt):
    task = task_of(TextRow(prompt))
    assert len(task.title) <= 80 and "\n" not in task.title
    assert task.id == task_of(TextRow(prompt)).id != task_of(TextRow((Turn("system", "s"), Turn("user", str(prompt))))).id
