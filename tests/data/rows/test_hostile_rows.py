"""Rows of shapes that are easily read wrongly: each is read whole, or refused with what would read it, or said."""

import json
from decimal import Decimal

import pytest

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.records.report import DataReport
from preference_training.data.rows.examples import UNDESIRABLE, select
from preference_training.data.rows.field_maps import (
    CONTEXT_JOINED,
    EMPTY_ANSWER,
    NO_ANSWER,
    FieldMap,
)
from preference_training.data.rows.grouping import Row, group_rows

U, A = Turn("user", "Where to?"), Turn("assistant", "Home.")
TALK = [{"role": "user", "content": "Where to?"}, {"role": "assistant", "content": "Home."}]


def mapped(rows: list[dict], **names) -> tuple[list[Row], DataReport]:
    report = DataReport()
    found = list(FieldMap(**names).map_rows(enumerate(rows, start=1), "data.jsonl", report))
    return [row._replace(number=0) for row in found], report


def refusal(row: dict, **names) -> str:
    with pytest.raises(UserError) as refused:
        mapped([row], **names)
    return str(refused.value)


# ---- what says that an answer is bad ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["is_safe", "is_correct", "thumbs_up", "Approved"])
@pytest.mark.parametrize(("good", "bad"), [(True, False), ("True", "false")])
def test_sft_does_not_learn_answers_that_a_column_calls_bad(name, good, bad):
    rows, report = mapped([{"prompt": f"p {n}", "response": "r", name: value} for n, value in enumerate((good, bad))])
    assert [row.labels for row in rows] == [[True], [False]]
    assert report.found == f"answers in `response`, labels in `{name}`"
    records = [
        PreferenceRecord(prompt, record["responses"], [], record["sft_target"], 1, "", labels=record["labels"])
        for prompt, record in group_rows(rows, report)
    ]
    selected = [part.responses for record in records for part in select(record, "targets", "unread", report)]
    assert (selected, report.left_out) == ([["r"]], {UNDESIRABLE: 1})


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"response": "r", "toxic": True}, "toxic is true of some rows"),
        ({"response": "r", "feedback": "bad"}, "feedback is bad of some rows"),
        ({"response": "r", "is_harmful": "TRUE"}, "is_harmful is true of some rows"),
        ({"messages": TALK, "is_safe": False}, "is_safe is false of some rows"),
    ],
)
def test_a_column_that_seems_to_call_an_answer_bad_and_is_not_read_is_noted(row, note):
    _, report = mapped([{"prompt": "p"} | row if "response" in row else row])
    assert [line for line in report.notes if line.startswith(f"{note}, which are learned like the others; where: {{")]


@pytest.mark.parametrize(
    "more", [{"toxic": False}, {"feedback": "good"}, {"is_safe": True}, {"toxicity": 0.9}, {"redacted": True}, {"flags": "1"}]
)
def test_no_other_column_is_noted(more):
    assert mapped([{"messages": TALK} | more])[1].notes == []


def test_a_column_by_which_rows_are_chosen_is_not_noted():
    rows = [{"prompt": "p", "response": str(toxic), "toxic": toxic} for toxic in (True, False)]
    kept, report = mapped(rows, where={"toxic": "!= True"})
    assert ([row.responses for row in kept], report.notes) == ([["False"]], [])


# ---- prompts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers", [{"answer": "a"}, {"chosen": "a", "rejected": "b"}, {"response": "a", "is_safe": True}], ids=" ".join
)
def test_a_context_beside_a_question_is_joined_as_an_input_is(answers):
    rows, report = mapped([{"context": "The Alps.", "question": "How high?"} | answers])
    assert (rows[0].prompt, report.changed) == ("How high?\nThe Alps.", {CONTEXT_JOINED: 1})
    assert "prompts in `question` and `context`" in report.found and not report.columns_not_read


@pytest.mark.parametrize("context", [{"passages": ["x"]}, ["x", "y"], 5])
def test_a_context_that_is_no_text_is_reported_as_not_read(context):
    rows, report = mapped([{"context": context, "question": "How high?", "answer": "a"}])
    assert (rows[0].prompt, report.changed, report.columns_not_read) == ("How high?", {}, {"context": 1})


def test_a_context_beside_a_question_that_the_user_maps_is_reported_as_not_read():
    rows, report = mapped([{"context": "The Alps.", "question": "How high?", "answer": "a"}], prompt="question")
    assert (rows[0].prompt, report.columns_not_read) == ("How high?", {"context": 1})


TURNS = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}


def test_beside_pairs_of_turns_the_column_that_may_be_the_prompt_is_named():
    assert "It may be task: datasets=[{path: ..., prompt: task}]." in refusal({"task": "What now?", "id": 3} | TURNS)
    assert "It may be one of task, topic: " in refusal({"task": "What now?", "topic": "of time"} | TURNS)


@pytest.mark.parametrize("prompt", ["世界上最高的山是哪一座", "ภูเขาที่สูงที่สุด", "最高の山はどれですか"])
def test_texts_of_scripts_without_spaces_may_be_prompts_too(prompt):
    assert "It may be task" in refusal({"task": prompt} | TURNS)
    assert "prompt: task, response: answer" in refusal({"task": prompt, "answer": "山。"})


# ---- conversations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [("role", "text"), ("role", "message"), ("role", "value"), ("from", "content"), ("speaker", "text")],
    ids=" ".join,
)
def test_turns_may_be_spelled_in_further_ways(keys):
    role, text = keys
    rows, _ = mapped([{"messages": [{role: turn["role"], text: turn["content"]} for turn in TALK]}])
    assert (rows[0].prompt, rows[0].responses) == ((U,), ["Home."])


@pytest.mark.parametrize(
    "value",
    [
        [["Where to?", "Home."]],
        [{"user": "Where to?", "assistant": "Home."}],
        [{"question": "Where to?", "answer": "Home."}],
        json.dumps(json.dumps(TALK)),
    ],
    ids=["lists of two", "user and assistant", "question and answer", "JSON of a JSON text"],
)
def test_questions_with_their_answers_are_a_conversation(value):
    rows, _ = mapped([{"conversation": value}])
    assert (rows[0].prompt, rows[0].responses) == ((U,), ["Home."])


def test_what_else_an_item_of_question_and_answer_has_is_reported():
    _, report = mapped([{"conversation": [{"user": "q", "assistant": "a", "system": "Be brief."}]}])
    assert report.columns_not_read == {"conversation.system": 1}


def test_a_mask_of_the_assistants_turns_is_refused_and_of_the_users_is_what_sft_does():
    row = {"mask": "User", "conversations": [{"from": "User", "value": "Where to?"}, {"from": "Assistant", "value": "Home."}]}
    assert mapped([row])[0][0].responses == ["Home."]
    assert "field 'mask' is 'Assistant': the turns of this role are not learned" in refusal(row | {"mask": "Assistant"})


def test_a_turn_of_unknown_keys_is_refused_with_these():
    assert "turn 1 is not {role, content}, it has who, says." in refusal({"messages": [{"who": "user", "says": "q"}]})


def test_messages_of_trees_are_refused():
    row = {"message_id": "2", "parent_id": "1", "text": "Home.", "role": "assistant"}
    assert "single messages of trees, which parent_id joins. Expected one conversation a row" in refusal(row)


def test_a_dialogue_in_one_text_is_not_learned_whole_unasked():
    row = {"system": "SYSTEM: You help.", "chat": "USER: Where to?\n\n\nASSISTANT: Home. <|endoftext|>"}
    assert "Field 'chat' is a text of several turns, which would be learned like the answers." in refusal(row)


# ---- answers ----------------------------------------------------------------------------------------------------------------


def test_of_several_rejected_answers_the_missing_and_the_empty_are_left_out_alone_and_counted():
    rows, report = mapped([{"prompt": "p", "chosen": "a", "rejected": ["b", "", None, " ", "c"]}])
    assert (rows[0].responses, rows[0].pairs) == (["a", "b", "c"], [(0, 1), (0, 2)])
    assert report.changed == {NO_ANSWER: 1, EMPTY_ANSWER: 2}
    assert "field 'rejected' is empty" in refusal({"prompt": "p", "chosen": "a", "rejected": ["", ""]})


def test_of_stack_exchange_pairs_response_j_is_preferred():
    rows, _ = mapped([{"question": "q", "response_j": "a", "response_k": "b"}])
    assert rows[0] == Row("q", ["a", "b"], [(0, 1)], 0)


def test_of_a_problem_with_solution_and_answer_the_solution_is_learned():
    rows, report = mapped([{"problem": "2 + 2?", "answer": "4", "solution": "Add them: 4."}])
    assert (rows[0].responses, report.columns_not_read) == (["Add them: 4."], {"answer": 1})


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def test_decimal_numbers_are_scores():
    rows, _ = mapped(
        [{"prompt": "p", "response": text, "score": Decimal(score)} for text, score in (("a", "1.5"), ("b", "0.25"))]
    )
    assert [row.scores for row in rows] == [[1.5], [0.25]]


def test_a_pair_whose_margin_is_not_a_number_has_none_and_the_others_keep_theirs():
    rows, report = mapped([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": value} for value in (1.5, float("nan"))])
    assert [row.margins for row in rows] == [[1.5], None]
    assert report.found.endswith("margins in `margin`")


# ---- the nearest entry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "entry"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        ({"instruction": "p", "output": "a"}, {"prompt": "instruction", "response": "output"}),
        ({"messages": TALK}, {"messages": "messages"}),
    ],
)
@pytest.mark.parametrize("written", [dict, json.dumps], ids=["object", "JSON text"])
def test_rows_within_one_object_are_refused_with_the_entry_that_reads_them(inner, entry, written):
    row = {"data": written(inner), "id": 5}
    names = {key: f"data.{name}" for key, name in entry.items()}
    message = refusal(row)
    assert all(f'{key}: "{name}"' in message for key, name in names.items())
    assert mapped([row], **names)[0][0].responses[0] in ("a", "Home.")


def test_the_nearest_entry_does_not_learn_identifiers():
    assert "prompt: question, response: note" in refusal({"sample_id": "x y", "question": "q", "note": "n"})
