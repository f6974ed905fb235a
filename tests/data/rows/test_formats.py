"""The formats that people have are understood from their columns, and what was found is said in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.data.records.report import OTHER_PROMPT, DataReport
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.formats import find
from preference_training.data.rows.grouping import Row, group_rows
from preference_training.data.rows.values import NO_VERDICT, TIE, verdict_values


def mapped(rows: list[dict], report: DataReport | None = None, **names) -> list[Row]:
    report = report if report is not None else DataReport()
    found = FieldMap(**names).map_rows(enumerate(rows, start=1), "data.jsonl", report)
    return [row._replace(number=0) for row in found]


def read(*rows: dict, **names) -> tuple[Row, str]:
    """The first of some rows, and the line on what was found."""
    report = DataReport()
    found = mapped(list(rows), report, **names)
    return found[0], (report.remarks() or [""])[0]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


Q, A, R, B = Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b")
TALK = [user("q"), assistant("a"), user("r"), assistant("b")]
SHAREGPT = [{"from": role, "value": text} for role, text in (("Human", "q"), ("GPT", "a"), ("human", "r"), ("gpt", "b"))]


# ---- conversations and text, for SFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation", "Messages"])
@pytest.mark.parametrize(
    "value",
    [TALK, SHAREGPT, json.dumps(TALK), [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}], ["q", "a", "r", "b"]],
    ids=["role and content", "from and value", "a JSON text", "input and output", "texts in turn"],
)
def test_of_a_conversation_all_is_the_response_from_the_first_assistant_turn_on(name, value):
    row, said = read({name: value, "id": 3, "source": "web"})
    assert row == Row((Q,), [(A, R, B)], [], 0)
    assert said == f"conversations in `{name}`; columns not read: id, source"


def test_a_system_prompt_and_tools_beside_a_conversation_belong_to_its_prompt():
    rows = [{"messages": TALK, "system": "Be brief.", "tools": '[{"name": "f"}]'}, {"messages": TALK, "system": None}]
    first, second = mapped(rows)
    assert (first.prompt, first.tools) == ((Turn("system", "Be brief."), Q), '[{"name": "f"}]')
    assert (second.prompt, second.tools) == ((Q,), "")


@pytest.mark.parametrize("name", ["answer", "target", "solution", "output"])
def test_a_conversation_that_ends_with_the_assistants_turn_is_no_prompt_of_the_answer_beside_it(name):
    row, said = read({"messages": TALK, name: "42"})
    assert row == Row((Q,), [(A, R, B)], [], 0)
    assert said == f"conversations in `messages`; columns not read: {name}"
    # What the map, or a column of its own, says is the prompt stays the prompt.
    assert read({"messages": TALK, name: "42"}, prompt="messages")[0] == Row((Q, A, R, B), ["42"], [], 0)
    assert read({"messages": TALK, "question": "q", name: "42"})[0] == Row("q", ["42"], [], 0)


def test_earlier_turns_beside_a_conversation_follow_its_own_system_turn():
    own, history = Turn("system", "s"), [["q", "a"]]
    talk = [{"role": "system", "content": "s"}, user("r")]
    assert read({"prompt": talk, "completion": "b", "history": history})[0].prompt == (own, Q, A, R)
    row, said = read({"messages": [*talk, assistant("b")], "history": history})
    assert (row.prompt, row.responses) == ((own, Q, A, R), ["b"])
    assert said == "conversations in `messages`, earlier turns in `history`"


def test_a_developer_turn_of_its_own_replaces_the_system_column_as_a_system_turn_does():
    report = DataReport()
    talk = [{"role": "developer", "content": "d"}, *TALK]
    assert mapped([{"messages": talk, "system": "s"}], report)[0].prompt == (Turn("developer", "d"), Q)
    assert list(report.changed) == ["conversations with their own system turn, which replaces the field 'system'"]


def test_turns_behind_the_last_of_the_assistants_are_left_out_and_counted():
    report = DataReport()
    (row,) = mapped([{"messages": [*TALK, user("and?")]}], report)
    assert row.responses == [(A, R, B)]
    assert report.changed == {"conversations whose turns behind the assistant's last one were left out": 1}


def test_a_conversation_without_a_turn_of_the_assistants_is_reported():
    with pytest.raises(UserError, match="row 1: field 'messages' has no turn of the assistant's"):
        mapped([{"messages": [user("q")]}])


def test_a_label_beside_a_conversation_is_of_its_last_turn():
    row, said = read({"messages": TALK, "kto_tag": False})
    assert row == Row((Q, A, R), ["b"], [], 0, labels=[False])
    assert said == "conversations in `messages`, labels of their last turns in `kto_tag`"


def test_plain_text_has_no_prompt():
    row, said = read({"text": "A note.", "url": "x"})
    assert row == Row("", ["A note."], [], 0)
    assert said == "plain text in `text`; columns not read: url"


@pytest.mark.parametrize(
    ("row", "expected", "said"),
    [
        ({"prompt": "q", "completion": "a"}, Row("q", ["a"], [], 0), "answers in `completion`"),
        (
            {"prompt": [user("q")], "completion": [assistant("a")]},
            Row((Q,), ["a"], [], 0),
            "answers in `completion`",
        ),
        ({"question": "q", "answer": "a"}, Row("q", ["a"], [], 0), "answers in `answer`, prompts in `question`"),
        (
            {"instruction": "i", "input": "n", "output": "o"},
            Row("i\nn", ["o"], [], 0),
            "answers in `output`, prompts in `instruction` and `input`",
        ),
        (
            {"instruction": "i", "context": "n", "response": "o", "category": "c"},
            Row("i\nn", ["o"], [], 0),
            "answers in `response`, prompts in `instruction` and `context`; columns not read: category",
        ),
        (
            {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["q", "a"]]},
            Row((Turn("system", "s"), Q, A, Turn("user", "i")), ["o"], [], 0),
            "answers in `output`, prompts in `instruction`, system prompts in `system`, earlier turns in `history`",
        ),
        ({"messages": TALK[:3], "response": "b"}, Row((Q, A, R), ["b"], [], 0), "answers in `response`, prompts in `messages`"),
    ],
)
def test_a_prompt_and_an_answer_are_found_by_their_names(row, expected, said):
    assert read(row) == (expected, said)


def test_the_input_of_an_instruction_is_read_in_any_case():
    row, said = read({"INSTRUCTION": "i", "INPUT": "n", "OUTPUT": "o"})
    assert row == Row("i\nn", ["o"], [], 0)
    assert said == "answers in `OUTPUT`, prompts in `INSTRUCTION` and `INPUT`"


def test_input_and_context_of_an_instruction_are_both_read():
    row, said = read({"instruction": "i", "input": "n", "context": "c", "output": "o"})
    assert row == Row("i\nn\nc", ["o"], [], 0)
    assert said == "answers in `output`, prompts in `instruction` and `input` and `context`"


# ---- pairs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("q")], "chosen": assistant("a"), "rejected": assistant("b")}, Row((Q,), ["a", "b"], [(0, 1)], 0)),
        (
            {"conversations": SHAREGPT[:1], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
            Row((Q,), ["a", "b"], [(0, 1)], 0),
        ),
        ({"prompt": "q", "chosen": {"content": "a"}, "rejected": {"content": "b"}}, Row("q", ["a", "b"], [(0, 1)], 0)),
        ({"prompt": "q", "chosen-response": "a", "rejected-response": "b"}, Row("q", ["a", "b"], [(0, 1)], 0)),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, Row("q", ["a", "b", "c"], [(0, 1), (0, 2)], 0)),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, Row("q", ["a", "b"], [(0, 1)], 0)),
        (
            {"prompt": "q", "chosen": ["a", "b"], "rejected": "c"},
            Row("q", ["a", "b", "c"], [(0, 2), (1, 2)], 0, more_targets=(1,)),
        ),
        ({"instruction": "q", "input": "", "output": ["a", "b", "c"]}, Row("q", ["a", "b", "c"], [(0, 1), (0, 2)], 0)),
        (
            {"input": {"messages": [user("q")]}, "preferred_output": TALK[1:2], "non_preferred_output": TALK[3:]},
            Row((Q,), ["a", "b"], [(0, 1)], 0),
        ),
        ({"chosen": "Say it: a", "rejected": "Say it: b"}, Row("Say it:", [" a", " b"], [(0, 1)], 0)),
        ({"chosen": "One a.", "rejected": "Two b."}, Row("", ["One a.", "Two b."], [(0, 1)], 0)),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, Row("", ["a", "b"], [(0, 1)], 0)),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "weight": "0.5"},
         Row("q", ["a", "b"], [(0, 1)], 0, margins=[2.0], weights=[0.5])),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
         Row((Turn("system", "s"), Q), ["a", "b"], [(0, 1)], 0)),
    ],
)  # fmt: skip
def test_pairs_are_found_in_all_their_forms(row, expected):
    assert read(row)[0] == expected


@pytest.mark.parametrize("names", [("rejected", "rejected_2"), ("rejected_1", "rejected_2"), ("rejected1", "rejected2")])
def test_numbered_columns_of_rejected_answers_are_all_read(names):
    one, two = names
    report = DataReport()
    rows = [{"prompt": "q", "chosen": "a", one: "b", two: text} for text in ("c", None)]
    assert mapped(rows, report) == [Row("q", ["a", "b", "c"], [(0, 1), (0, 2)], 0), Row("q", ["a", "b"], [(0, 1)], 0)]
    assert report.found == f"pairs in `chosen` and `{one}` and `{two}`"
    assert (report.columns_not_read, report.changed) == ({}, {"answers left out that are missing (null)": 1})


def test_the_usual_columns_go_without_saying_and_others_are_named_with_what_they_are():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read(pair)[1] == ""
    assert read(pair | {"system": "s", "id": 1})[1] == (
        "pairs in `chosen` and `rejected`, system prompts in `system`; columns not read: id"
    )


def test_conversations_part_at_any_turn_and_one_may_end_before_the_other():
    row, _ = read({"chosen": TALK, "rejected": [user("q"), assistant("no"), user("r"), assistant("c")]})
    assert row == Row((Q,), [(A, R, B), (Turn("assistant", "no"), R, Turn("assistant", "c"))], [(0, 1)], 0)
    row, _ = read({"chosen": TALK[:2], "rejected": TALK})
    assert row == Row((Q,), ["a", (A, R, B)], [(0, 1)], 0)
    report = DataReport()
    assert mapped([{"chosen": TALK, "rejected": [user("z"), assistant("b")]}], report) == []
    assert report.left_out == {OTHER_PROMPT: 1}


def test_a_column_that_may_be_the_prompt_is_never_left_out_unasked():
    with pytest.raises(UserError, match=r"No known format fits; .*prompt: Frage, chosen: chosen, rejected: rejected"):
        mapped([{"Frage": "Which one?", "chosen": "Say it: a", "rejected": "Say it: b"}])
    with pytest.raises(UserError, match=r"prompt: Frage, response: answer"):
        mapped([{"Frage": "Which one?", "answer": "a"}])


def test_without_a_prompt_every_row_is_a_record_of_its_own():
    rows = mapped([{"chosen": f"One {n}.", "rejected": f"Two {n}."} for n in range(3)])
    records = list(group_rows(rows, DataReport()))
    assert [(prompt, record["pairs"]) for prompt, record in records] == [("", [(0, 1)])] * 3


def test_rows_with_other_tools_are_other_prompts():
    rows = mapped([{"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": name}]} for name in "ffg"])
    records = [record for _, record in group_rows(rows, DataReport())]
    assert [(record["tools"], len(record["pairs"])) for record in records] == [('[{"name": "f"}]', 2), ('[{"name": "g"}]', 1)]


# ---- lists, verdicts, labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, Row("q", ["a", "b"], [(1, 0)], 1, [1, 2])),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}, Row("q", ["a", "b"], [(0, 1)], 0, [-1, -2])),
        ({"instruction": "q", "generations": ["a", "b"], "ratings": [5, 1]}, Row("q", ["a", "b"], [(0, 1)], 0, [5, 1])),
        (
            {"instruction": "q", "completions": [{"response": a, "overall_score": n} for a, n in (("a", 1), ("b", 2))]},
            Row("q", ["a", "b"], [(1, 0)], 1, [1, 2]),
        ),
        ({"question": "q", "answers": [{"text": "a", "pm_score": 3}, {"text": "b", "pm_score": 0}]},
         Row("q", ["a", "b"], [(0, 1)], 0, [3, 0])),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [True, False]}, Row("q", ["a", "b"], [(0, 1)], 0, [1, 0])),
    ],
)  # fmt: skip
def test_lists_of_answers_with_scores_or_ranks_are_found(row, expected):
    assert read(row)[0] == expected


def test_of_several_answers_those_that_are_missing_or_unrated_are_left_out_alone_and_counted():
    report = DataReport()
    rows = [{"prompt": "q", "responses": ["a", "b", None, "c"], "scores": [1, 2, 3, None]}]
    assert mapped(rows, report) == [Row("q", ["a", "b"], [(1, 0)], 1, [1, 2])]
    assert report.changed == {
        "answers left out that are missing (null)": 1, "answers left out that have no score or rank": 1,
    }  # fmt: skip
    report = DataReport()
    assert mapped([{"prompt": "q", "responses": ["a", None], "scores": [None, 1]}], report) == []
    assert report.left_out == {"no answer has a score or rank": 1}


def test_one_of_two_answers_without_a_score_is_no_tie_and_among_three_is_left_out_alone():
    report = DataReport()
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "score_a": 1, "score_b": 2}
    assert len(mapped([row, row | {"score_b": None}], report)) == 1
    assert report.left_out == {NO_VERDICT: 1}
    rounds = {"prompt": ["q"], "x": ["a"], "y": ["b"], "z": ["c"], "sx": 1, "sy": None, "sz": 2}
    (found,) = mapped([rounds], responses=["x", "y", "z"], scores=["sx", "sy", "sz"])
    assert (found.responses, found.pairs, found.target) == (["a", "c"], [(1, 0)], 1)


def test_answers_and_rows_without_what_is_compared_are_left_out_and_counted():
    report = DataReport()
    full = {"prompt": "q", "responses": ["a", "b", "", "c"], "scores": [1, 2, 3, "N/A"]}
    assert mapped([full, full | {"scores": None}], report) == [Row("q", ["a", "b"], [(1, 0)], 1, [1, 2])]
    assert report.changed == {"answers left out that are empty": 1, "answers left out that have no score or rank": 1}
    assert report.left_out == {"no answer has a score or rank": 1}
    report = DataReport()
    pair = {"prompt": "q", "chosen": "a", "rejected": ["b"]}
    assert mapped([pair, pair | {"rejected": []}], report) == [Row("q", ["a", "b"], [(0, 1)], 0)]
    assert report.left_out == {"no rejected answer": 1}


def test_a_listed_answer_without_the_score_of_the_others_is_left_out_alone():
    report = DataReport()
    answers = [{"text": "a", "score": 1}, {"text": "b"}, {"text": "c", "score": 2}]
    assert mapped([{"prompt": "q", "responses": answers}], report) == [Row("q", ["a", "c"], [(1, 0)], 1, [1, 2])]
    assert report.changed == {"answers left out that have no score or rank": 1}


WEBGPT = {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b"}
SAFE = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 0}
ARENA = {"conversation_a": [user("q"), assistant("a")], "conversation_b": [user("q"), assistant("b")]}
ARENA_TEXTS = {"prompt": '["q", "r"]', "response_a": '["a", "b"]', "response_b": '["c", "d"]'}


@pytest.mark.parametrize(
    ("row", "better"),
    [
        (WEBGPT | {"score_0": -0.5, "score_1": 0.5}, 1),
        (SAFE | {"better_response_id": 1}, 1),
        (SAFE | {"better_response_id": 0}, 0),
        # HelpSteer: below 0 the first is better.
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}, 1),
        ({"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -3}, 0),
        (ARENA | {"winner": "model_a", "model_a": "x", "model_b": "y"}, 0),
        (ARENA_TEXTS | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, 1),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, 0),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, 1),
        ({"info": {"post": "q"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, 1),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "B"}, 1),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "rating_a": 2, "rating_b": 1}, 0),
    ],
)
def test_of_two_answers_the_public_sets_verdicts_are_known(row, better):
    found, said = read(row)
    assert (found.pairs, found.target) == ([(better, 1 - better)], better)
    assert found.prompt in ("q", (Q,))
    assert said.startswith("two answers in `")


def test_verdicts_are_shown_as_the_rows_write_them():
    rows = [ARENA | {"winner": winner} for winner in ("Model A", "tie", "Model B")]
    report = DataReport()
    mapped(rows, report)
    assert report.found.endswith("the better one in `winner` (Model A is `conversation_a`, Model B is `conversation_b`)")


@pytest.mark.parametrize(
    "row",
    [
        WEBGPT | {"score_0": 0.0, "score_1": 0.0},
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        ARENA | {"winner": "tie (bothbad)"},
        ARENA_TEXTS | {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    ],
)
def test_verdicts_that_tie_are_left_out_and_counted(row):
    report = DataReport()
    assert mapped([row], report) == []
    assert report.left_out == {TIE: 1}


@pytest.mark.parametrize(
    ("better", "verdict", "expected"),
    [
        ("v", "y", 1),
        ("v", "X", 0),
        ({"v": [1, 2]}, 2, 1),
        ({"v": [1, 0]}, True, 0),
        ({"v": [1, 0]}, "False", 1),
        ({"v": [True, False]}, "true", 0),
        ({"v": [1, 2]}, 0.5, None),
        ({"v": [1, 2]}, float("nan"), None),
        ({"v": ["< 0", "> 0"]}, float("nan"), None),
        ({"v": ["< 0", "> 0"]}, "tie", None),
        ({"v": [-1, 1]}, -1, 0),
        ({"v": [-1, 1]}, "1.0", 1),
        ({"v": [-1, 1]}, "0.0", None),
        ({"v": ["> 0", "< 0"]}, -1, 1),
        ({"v": [["yes", "rather"], ["no"]]}, "rather", 0),
        ({"v": ["yes", "no"]}, "Tie", None),
        ({"v": ["> 0", "< 0"]}, 0, None),
        ({"v": ["yes", "no"]}, None, None),
    ],
)
def test_a_map_says_which_of_two_answers_is_better(better, verdict, expected):
    rows = mapped([{"prompt": "p", "x": "a", "y": "b", "v": verdict}], answers=["x", "y"], better=better)
    assert [row.target for row in rows] == ([] if expected is None else [expected])


def test_a_verdict_that_is_not_evident_is_refused_with_the_map_that_says_it():
    row = {"prompt": "p", "x": "a", "y": "b", "v": 1}
    with pytest.raises(UserError, match=r"not evident which of x and y that means. Write better: \{v: \[VALUE, VALUE\]\}"):
        mapped([row], answers=["x", "y"], better="v")
    with pytest.raises(UserError, match="field 'v' is 'perhaps', expected a value for one of x and y, or a tie"):
        mapped([row | {"v": "perhaps"}], answers=["x", "y"], better={"v": ["yes", "no"]})
    unknown = {"prompt": "p", "response_1": "a", "response_2": "b", "preference": 1}
    with pytest.raises(UserError, match=r"answers: \[response_1, response_2\], better: \{preference: \["):
        mapped([unknown])


def test_a_list_of_one_text_is_that_text():
    assert read({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]})[0] == Row("q", ["a", "b"], [(0, 1)], 0)
    assert read({"prompt": ["q"], "completion": ["a"]})[0] == Row("q", ["a"], [], 0)


def test_numbers_tell_answers_apart_only_where_both_occur():
    assert verdict_values([0, 1, 1], ["response_a", "response_b"]) == [[0], [1]]
    assert verdict_values([2, 1.0], ["response_a", "response_b"]) == [[1], [2]]
    for unclear in ([1], [0, 1, 2], [-1, 1], ["good", "bad"], []):
        assert verdict_values(unclear, ["response_a", "response_b"]) is None
    assert verdict_values([0, 1], ["version1", "version2"]) is None


def test_signed_verdicts_are_never_read_as_places_of_answers():
    for signed in ([-1, 0, 1], [-2, -1, 1, 2], ["-1", "1"], [-1.0], ["-1.0", "-2.0"]):
        for answers in (["response_a", "response_b"], ["response_1", "response_2"]):
            assert verdict_values(signed, answers) is None
    rows = [{"prompt": "q", "response_a": "aa", "response_b": "bb", "preference": verdict} for verdict in (-1, 1, 0)]
    with pytest.raises(UserError, match=r"better: \{preference: \["):
        mapped(rows)


@pytest.mark.parametrize("names", [("winner", "loser"), ("chosen", "rejected"), ("preferred", "rejected")])
@pytest.mark.parametrize("stem", ["model_", "response_", ""])
def test_columns_that_name_the_better_answer_are_verdicts_and_not_answers(names, stem):
    rows = [
        {"prompt": "q", "response_a": "a", "response_b": "b"} | dict(zip(names, (stem + one, stem + other), strict=True))
        for one, other in ("ab", "ba")
    ]
    assert [(row.responses, row.pairs) for row in mapped(rows)] == [(["a", "b"], [(0, 1)]), (["a", "b"], [(1, 0)])]


def test_the_winner_may_be_the_name_of_a_model_in_the_row():
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "model_a": "gpt-4", "model_b": "claude"}
    other = row | {"model_a": "llama", "model_b": "gpt-4"}
    verdicts = [row | {"winner": name} for name in ("gpt-4", "claude", "tie", "model_b")]
    both = row | {"model_b": "gpt-4", "winner": "gpt-4"}
    report = DataReport()
    found = mapped([*verdicts[:3], other | {"winner": "gpt-4"}, both], report)
    assert [row.target for row in found] == [0, 1, 1]
    assert report.left_out == {TIE: 2}
    assert [
        row.target for row in mapped(verdicts, better={"winner": ["model_a", "model_b"]}, answers=["response_a", "response_b"])
    ] == [0, 1, 1]
    with pytest.raises(UserError, match="expected a value for one of"):
        mapped([verdicts[0], *[row | {"winner": "gpt-4"}] * 100, row | {"winner": "bard"}])


@pytest.mark.parametrize("more", [{}, {"winner_is": "x"}, {"label": True}])
def test_two_answers_without_an_evident_verdict_are_never_suggested_as_one(more):
    with pytest.raises(UserError, match=r"answers: \[response_a, response_b\], better: \{") as error:
        mapped([{"prompt": "q", "response_a": "a", "response_b": "b"} | more])
    assert "response: " not in str(error.value)


def test_shps_labels_may_be_booleans():
    rows = [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": label} for label in (True, False, "True", 0)]
    assert [row.target for row in mapped(rows)] == [0, 1, 0, 1]


@pytest.mark.parametrize("values", [(0, 1), (True, False)])
@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_of_two_answers_are_not_guessed(name, values):
    rows = [{"prompt": "q", "response_a": "a", "response_b": "b", name: value} for value in values]
    with pytest.raises(UserError, match=rf"answers: \[response_a, response_b\], better: \{{{name}: \["):
        mapped(rows)


@pytest.mark.parametrize("verdict", [7, -3, 2.5])
def test_a_number_that_means_neither_answer_is_no_tie(verdict):
    with pytest.raises(UserError, match="expected a value for one of response_0 and response_1, or a tie"):
        mapped([SAFE | {"better_response_id": verdict}])


def test_labels_of_single_answers_are_found():
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    report = DataReport()
    assert [row.labels for row in mapped(rows, report)] == [[True], [False]]
    assert report.found == "answers in `completion`, labels in `label`"
    # As a score, true is above false.
    scored = mapped(rows, response="completion", score="label")
    assert [record["pairs"] for _, record in group_rows(scored, DataReport())] == [[]] or [row.scores for row in scored] == [
        [1.0], [0.0]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("yes", "no"),
    [("good", "bad"), (1, -1), ("1.0", "-1.0"), ("Yes", "No"), ("positive", "negative"), ("chosen", "rejected"),
     ("like", "dislike")],
)  # fmt: skip
def test_labels_are_understood_in_the_words_that_people_use_and_rows_without_are_left_out(yes, no):
    report = DataReport()
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (yes, no, None, "", yes)]
    assert [row.labels for row in mapped(rows, report)] == [[True], [False], [True]]
    assert report.left_out == {"the answer has no label": 2}
    report = DataReport()
    assert [row.labels for row in mapped([{"messages": TALK, "label": label} for label in (no, None)], report)] == [[False]]
    assert report.left_out == {"the answer has no label": 1}


def test_two_labels_that_are_not_understood_are_refused():
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in ("up", "down")]
    with pytest.raises(UserError, match="row 1: field 'label' is 'up', expected one of true, 1, desirable"):
        mapped(rows)
    more = [row | {"label": label} for row, label in zip(rows * 2, ("math", "code", "law", "art"), strict=True)]
    assert [row.labels for row in mapped(more)] == [None] * 4


def test_helpsteers_single_answers_have_its_score():
    row = {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4}
    assert read(row)[0] == Row("q", ["a"], [], 0, [3.0], forms_pairs=True)


# ---- what a map says, and rows that differ ---------------------------------------------------------------------------------


def test_what_a_map_says_is_not_searched_for():
    row = {"prompt": "p", "instruction": "i", "completion": "c", "chosen": "a", "rejected": "b"}
    assert read(row)[0] == Row("p", ["a", "b"], [(0, 1)], 0)
    assert read(row, response="completion")[0] == Row("p", ["c"], [], 0)
    assert read(row, prompt="instruction")[0] == Row("i", ["a", "b"], [(0, 1)], 0)
    assert read({"t": "x y", "text": "z"}, text="t")[0] == Row("", ["x y"], [], 0)
    assert read({"m": TALK, "messages": TALK[:2]}, messages="m")[0].responses == [(A, R, B)]


def test_rows_of_another_format_among_the_others_are_read_and_counted():
    report = DataReport()
    nothing = {"prompt": None, "chosen": None, "rejected": None, "messages": None}
    pair = nothing | {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = mapped([pair, pair, nothing | {"messages": TALK}], report)
    assert [row.responses for row in rows] == [["a", "b"], ["a", "b"], [(A, R, B)]]
    assert report.changed == {"rows of another format: conversations in `messages`": 1}


def test_a_number_that_single_rows_lack_is_unknown_there():
    rows = [{"prompt": "q", "chosen": f"a{n}", "rejected": "b", "margin": n or None, "weight": n or None} for n in (1, 0, 2)]
    ((_, record),) = group_rows(mapped(rows), DataReport())
    assert (record["margins"], record["weights"]) == ([1.0, None, 2.0], [1.0, 1.0, 2.0])


FORMATS = [
    {"messages": TALK},
    {"prompt": "q", "completion": "a"},
    {"instruction": "i", "input": "n", "output": "o"},
    {"text": "A note."},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": TALK, "rejected": [*TALK[:3], assistant("c")]},
    {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
    SAFE | {"better_response_id": 1},
    ARENA | {"winner": "model_a"},
    {"prompt": "q", "completion": "a", "label": True},
]
NOTES = {"id": 7, "source": "web", "meta": {"n": 1}, "lang": "en", "url": "http://x"}


@settings(max_examples=300, deadline=None)
@given(
    row=st.sampled_from(FORMATS),
    notes=st.sets(st.sampled_from(sorted(NOTES))),
    empty=st.sets(st.sampled_from(["system", "tools", "history", "label_2", "messages", "chosen", "text", "margin"])),
    order=st.randoms(use_true_random=False),
    count=st.integers(1, 3),
)
def test_a_format_is_found_whatever_the_order_of_columns_and_whichever_others_there_are(row, notes, empty, order, count):
    more = {name: NOTES[name] for name in notes} | {name: None for name in empty if name not in row}
    items = list((row | more).items())
    order.shuffle(items)
    report = DataReport()
    assert mapped([dict(items)] * count, report) == mapped([row] * count)
    named = {name for column in report.columns_not_read for name in [column.partition(".")[0]]}
    assert named - {"safer_response_id"} == notes


@settings(max_examples=300, deadline=None)
@given(
    columns=st.dictionaries(
        st.sampled_from(sorted({name for row in FORMATS for name in row} | {"system", "history", "tools", "weight", "input"})),
        st.sampled_from(
            ["x y", "", None, 1, True, ["a", "b"], [1, 2], TALK, assistant("a"), {"text": "t"}, "[1", "model_b", "\ud800"]
        ),
        max_size=6,
    )
)
def test_any_subset_of_columns_is_read_skipped_or_reported_and_no_column_disappears(columns):
    report = DataReport(skip_bad_rows=True)
    rows = mapped([columns], report)
    assert len(rows) + report.num_bad_rows + sum(report.left_out.values()) == report.rows_read == 1
    found = FieldMap().found_in([columns])
    read_names = {name.split(".")[0] for name in found.names}
    for name, value in columns.items() if rows else ():
        assert value in (None, "") or name in read_names or name in {n.split(".")[0] for n in report.columns_not_read}
    # What is found does not depend on how often it is seen.
    assert find([columns], {}) == find([columns] * 3, {})
