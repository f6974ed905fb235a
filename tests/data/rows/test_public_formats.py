"""Rows in the formats that other tools document and public sets have, read without a field map."""

import json

import pytest

from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.records.report import DataReport
from preference_training.data.rows.examples import LOWER, select
from preference_training.data.rows.field_maps import NOTHING_LEARNED, FieldMap
from preference_training.data.rows.grouping import group_rows

U, U2, A, A2 = Turn("user", "q"), Turn("user", "q2"), Turn("assistant", "a"), Turn("assistant", "a2")
SYSTEM = Turn("system", "s")


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


ASKED, ANSWERED = said("user", "q"), said("assistant", "a")


def records_of(rows: list[dict], report: DataReport, **names) -> list[tuple]:
    mapped = FieldMap(**names).map_rows(enumerate(rows, start=1), "data.jsonl", report)
    return list(group_rows(mapped, report))


# A row, its prompt, its responses, whether the first is preferred to the others, and the columns that are named as not read.
PAIRS = {
    "LLaMA-Factory, ranking": ({"instruction": "i", "input": "n", "chosen": "a", "rejected": "b"}, "i\nn", ["a", "b"]),
    "LLaMA-Factory, sharegpt ranking": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        (U,), ["a", "b"],
    ),
    "axolotl, chatml.intel": ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, (SYSTEM, U), ["a", "b"]),
    "axolotl, chatml.icr": ({"system": "s", "input": "q", "chosen": "a", "rejected": "b"}, (SYSTEM, U), ["a", "b"]),
    "axolotl, llama3.argilla": (
        {"system": "s", "instruction": "q", "chosen_response": "a", "rejected_response": "b"}, (SYSTEM, U), ["a", "b"],
    ),
    "axolotl, orpo": (
        {"system": "s", "prompt": "q", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, said("assistant", "b")]},
        (SYSTEM, U), ["a", "b"],
    ),
    "OpenRLHF": ({"context_messages": [ASKED], "chosen": [ANSWERED], "rejected": [said("assistant", "b")]}, (U,), ["a", "b"]),
    "ms-swift, texts": ({"query": "q", "response": "a", "rejected_response": "b"}, "q", ["a", "b"]),
    "ms-swift, a rejected text": ({"messages": [ASKED, ANSWERED], "rejected_response": "b"}, (U,), ["a", "b"]),
    "ms-swift, a system turn": (
        {"messages": [said("system", "s"), ASKED, ANSWERED, said("user", "q2"), said("assistant", "a2")],
         "rejected_response": "b"},
        (SYSTEM, U, A, U2), ["a2", "b"],
    ),
    "ms-swift, rejected texts": ({"messages": [ASKED, ANSWERED], "rejected_response": ["b", "c"]}, (U,), ["a", "b", "c"]),
    "ms-swift, rejected messages": (
        {"messages": [ASKED, ANSWERED], "rejected_messages": [ASKED, said("assistant", "b")]}, (U,), ["a", "b"],
    ),
    "ultrafeedback cleaned": (
        {"instruction": "q", "chosen-response": "a", "rejected-responses": ["b", "c"]}, "q", ["a", "b", "c"],
    ),
    "OpenAI and Together, preferences": (
        {"input": {"messages": [ASKED]}, "preferred_output": [ANSWERED], "non_preferred_output": [said("assistant", "b")]},
        (U,), ["a", "b"],
    ),
    "NeMo-RL, ranks of conversations": (
        {"context": [ASKED], "completions": [{"rank": 0, "completion": [ANSWERED]},
                                             {"rank": 1, "completion": [said("assistant", "b")]}]},
        (U,), ["a", "b"],
    ),
    "CSV, lists as JSON": ({"prompt": "q", "responses": '["a", "b"]', "scores": "[2, 1]"}, "q", ["a", "b"]),
    "CSV, lists as Python prints them": ({"prompt": "q", "responses": "['a', 'b']", "scores": "[2.0, 1.0]"}, "q", ["a", "b"]),
    "CSV, a missing number": ({"prompt": "q", "responses": "['a', 'x', 'b']", "scores": "[2.0, nan, 1.0]"}, "q", ["a", "b"]),
    "CSV, other words for a missing number": (
        {"prompt": "q", "responses": "['a', 'x', 'b', 'y']", "scores": "[2.0, NA, 1.0, n/a]"}, "q", ["a", "b"],
    ),
    "CSV, objects": ({"prompt": "q", "completions": '[{"text": "a", "score": 2}, {"text": "b", "score": 1}]'}, "q", ["a", "b"]),
    "CSV, ranks": ({"prompt": "q", "responses": '["a", "b"]', "ranks": "[1, 2]"}, "q", ["a", "b"]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "responses"), PAIRS.values(), ids=PAIRS)
def test_pairs_of_each_format_are_read_whole(row, prompt, responses):
    report = DataReport()
    ((found, record),) = records_of([row], report)
    assert (found, record["responses"]) == (prompt, responses)
    assert record["pairs"] == [(0, index) for index in range(1, len(responses))]
    assert (report.columns_not_read, report.num_bad_rows) == ({}, 0)


# A row, its prompt, what SFT learns of it, and the columns that are named as not read.
TARGETS = {
    "TRL, a completion of turns": ({"prompt": [ASKED], "completion": [ANSWERED]}, (U,), "a", []),
    "axolotl, gpteacher": ({"instruction": "i", "input": "n", "response": "a"}, "i\nn", "a", []),
    "axolotl, in capitals": ({"INSTRUCTION": "q", "RESPONSE": "a"}, "q", "a", []),
    "axolotl, turns that are not trained on": (
        {"messages": [said("user", "q", train=False), said("assistant", "a", train=False), said("user", "q2"),
                      said("assistant", "a2", train=True)]},
        (U, Turn("assistant", "a", '{"weight": 0}'), U2), "a2", [],
    ),
    "OpenAI and Mistral, weights": (
        {"messages": [ASKED, said("assistant", "a", weight=0), said("user", "q2"), said("assistant", "a2", weight=1)]},
        (U, Turn("assistant", "a", '{"weight": 0}'), U2), "a2", [],
    ),
    "FastChat, weights": (
        {"conversations": [{"from": "human", "value": "q", "weight": 0.0}, {"from": "gpt", "value": "a", "weight": 1.0}]},
        (U,), "a", [],
    ),
    "ms-swift, loss": (
        {"messages": [ASKED, said("assistant", "a", loss=True), said("user", "q2"), said("assistant", "x", loss=False)]},
        (U,), "a", [],
    ),
    "ms-swift, history": (
        {"system": "s", "query": "q2", "response": "a2", "history": [["q", "a"]]}, (SYSTEM, U, A, U2), "a2", [],
    ),
    "ms-swift, rounds": (
        {"system": "s", "conversation": [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]},
        (SYSTEM, U), (A, U2, A2), [],
    ),
    "Oumi": ({"conversation_id": "1", "messages": [ASKED, ANSWERED], "metadata": {"k": 1}}, (U,), "a",
             ["conversation_id", "metadata"]),
    "NeMo": (
        {"system": "s", "mask": "User", "conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]},
        (SYSTEM, U), "a", ["mask"],
    ),
    "Bedrock, Converse": (
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "s"}],
         "messages": [said("user", [{"text": "q"}]), said("assistant", [{"text": "a"}])]},
        (SYSTEM, U), "a", ["schemaVersion"],
    ),
    "Anthropic": (
        {"system": "s", "messages": [ASKED, said("assistant", [{"type": "text", "text": "a"}])]}, (SYSTEM, U), "a", [],
    ),
    "Cohere": ({"messages": [said("System", "s"), said("User", "q"), said("Chatbot", "a")]}, (SYSTEM, U), "a", []),
    "Gemini": (
        {"systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
         "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        (SYSTEM, U), "a", [],
    ),
    "CSV, messages as Python prints them": (
        {"messages": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a', 'name': None}]"}, (U,), "a", [],
    ),
    "pairs without rejected answers": ({"prompt": "q", "chosen": "a", "text": "q a"}, "q", "a", ["text"]),
    "Dolly": ({"instruction": "i", "context": "c", "response": "a", "category": "x"}, "i\nc", "a", ["category"]),
    "OpenOrca": ({"system_prompt": "s", "question": "q", "response": "a"}, (SYSTEM, U), "a", []),
    "Capybara": ({"conversation": [{"input": "q", "output": "a"}]}, (U,), "a", []),
    "LIMA": ({"conversations": ["q", "a"]}, (U,), "a", []),
    "P3": ({"inputs": "q", "targets": "a"}, "q", "a", []),
    "Firefly": ({"kind": "k", "input": "q", "target": "a"}, "q", "a", ["kind"]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "target", "left"), TARGETS.values(), ids=TARGETS)
def test_what_sft_learns_of_each_format_is_read_whole(row, prompt, target, left):
    report = DataReport()
    ((found, record),) = records_of([row], report)
    assert (found, record["sft_target"], record["pairs"]) == (prompt, target, [])
    assert (sorted(report.columns_not_read), report.num_bad_rows) == (left, 0)


def test_a_conversation_none_of_whose_turns_is_learned_is_left_out_and_other_weights_are_refused():
    report = DataReport(skip_bad_rows=True)
    rows = [{"messages": [ASKED, said("assistant", "a", weight=weight)]} for weight in (0, 0.5)]
    assert records_of(rows, report) == []
    assert report.left_out == {NOTHING_LEARNED: 1}
    (told,) = report.bad_rows
    assert "turn 2 has weight: 0.5, expected 0 or 1 (false or true)" in told


F = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (F, json.dumps([F])), ([F], json.dumps([F])), (json.dumps(F), json.dumps([F])), (json.dumps([F]), json.dumps([F])),
        ("none", ""), ("null", ""), ("NA", ""), ("n/a", ""), ("[]", ""), (" ", ""),
    ],
)  # fmt: skip
def test_tools_may_be_one_or_several_objects_or_their_text_or_none(name, value, text):
    report = DataReport()
    ((_, record),) = records_of([{"messages": [ASKED, ANSWERED], name: value}], report)
    assert record.get("tools", "") == text
    assert report.columns_not_read == {}


@pytest.mark.parametrize(
    ("result", "text"),
    [({"x": None}, '{"x": null}'), ([1, 2], "[1, 2]"), (3, "3"), ([{"type": "text", "text": "r"}], "r"), ("r", "r")],
)
def test_what_a_tool_returns_is_text_or_the_json_of_a_value(result, text):
    call = said("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {"a": None}}}])
    ((_, record),) = records_of([{"messages": [ASKED, call, said("tool", result), ANSWERED]}], DataReport())
    called, returned, _ = record["sft_target"]
    assert json.loads(called.rest)["tool_calls"][0]["function"]["arguments"] == {"a": None}
    assert returned == Turn("tool", text)


@pytest.mark.parametrize("name", ["score", "rating", "reward"])
def test_scored_answers_are_ranked_and_sft_learns_the_best_of_each_prompt(name):
    report = DataReport()
    rows = [{"prompt": p, "response": r, name: s} for p, r, s in (("q", "a", 3), ("q", "b", "1"), ("q", "c", 3), ("r", "d", 1))]
    found = dict(records_of(rows, report))
    assert (found["q"]["pairs"], found["q"]["sft_targets"], found["q"]["scores"]) == ([(0, 1), (2, 1)], ["a", "c"], [3, 1, 3])
    assert found["r"] == {"responses": ["d"], "pairs": [], "sft_target": "d", "scores": [1], "rows": [4]}
    record = PreferenceRecord("q", ["a", "b", "c"], [(0, 1), (2, 1)], "c", 1, "x", ("a", "c"), scores=[3, 1, 3])
    assert [one.responses for one in select(record, "targets", "unread", report)] == [["a"], ["c"]]
    assert report.left_out[LOWER] == 1
    # An entry that names the answers alone learns from all of them.
    assert len(records_of(rows, DataReport(), response="response")) == 4


def test_other_names_of_roles_are_read_where_an_entry_says_what_they_are():
    row = {"talk": [said("Customer", "q"), said("bot-2", "a")]}
    for value in (row["talk"], json.dumps(row["talk"])):
        ((prompt, record),) = records_of([{"messages": value}], DataReport(), roles={"customer": "user", "bot-2": "assistant"})
        assert (prompt, record["sft_target"]) == ((U,), "a")
    report = DataReport(skip_bad_rows=True)
    assert records_of([{"messages": row["talk"]}], report) == []
    assert "turn 1 has the role 'Customer'" in report.bad_rows[0]


REFUSED = {
    "a prompt alone": ({"prompt": "q"}, "no field 'chosen'"),
    "steps with labels": ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "no field 'chosen'"),
    "images": ({"messages": [ASKED, ANSWERED], "images": ["a.png"]}, "field 'images' is not empty"),
    "a conversation without an answer": ({"messages": [ASKED], "reference_answer": "a"}, "has no turn of the assistant's"),
    "blocks of tools": (
        {"messages": [ASKED, said("assistant", [{"type": "tool_use", "id": "1", "name": "f", "input": {}}])]},
        "has a part of the type 'tool_use'",
    ),
    "answers beside a prompt of an unknown name": (
        {"frage": [ASKED], "chosen": [ANSWERED], "rejected": [said("assistant", "b")]}, "no field 'prompt'",
    ),
    "a pair whose rejected answer is missing": ({"prompt": "q", "chosen": "a", "rejected": None}, "field 'rejected' is"),
    "a verdict among unknown answers": ({"prompt": "q", "text_x": "a", "text_y": "b", "chosen": "x"}, "no field 'rejected'"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "told"), REFUSED.values(), ids=REFUSED)
def test_what_could_only_be_guessed_is_refused(row, told):
    report = DataReport(skip_bad_rows=True)
    assert records_of([row], report) == []
    assert told in report.bad_rows[0]
