"""Maps of fields: every form of a row becomes prompts and responses, every fault is told with its file, row and field."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.data.records.report import OTHER_PROMPT, DataReport
from preference_training.data.records.validation import shown, text_error
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.grouping import Row
from preference_training.data.rows.values import LABELS, UntypedRow, condition, field_value


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def turns(*texts: str) -> list[dict]:
    """A conversation whose turns are the user's and the assistant's in turn, as {role, content}."""
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def mapped(rows: list[dict], report: DataReport | None = None, **names) -> list[Row]:
    report = report if report is not None else DataReport()
    found = FieldMap(**names).map_rows(enumerate(rows, start=1), "data.jsonl", report)
    return [row._replace(number=0) for row in found]


def one(row: dict, **names) -> Row:
    (found,) = mapped([row], **names)
    return found


def fault(row: dict, **names) -> str:
    """What is told about a row, between its place and the remedy; a run that skips it counts and lists the same."""
    field_map = FieldMap(**names)
    with pytest.raises(UserError) as refusal:
        list(field_map.map_rows([(7, row)], "data.jsonl", DataReport()))
    start, end = "datasets: data.jsonl, row 7: ", " Fix the row, or skip such rows with on_bad_row=skip."
    text = str(refusal.value)
    assert text.startswith(start)
    assert text.endswith(end)
    report = DataReport(skip_bad_rows=True)
    assert list(field_map.map_rows([(7, row)], "data.jsonl", report)) == []
    bad = [text.removesuffix(end)]
    assert report == DataReport(skip_bad_rows=True, rows_read=1, num_bad_rows=1, bad_rows=bad, found=report.found)
    return text.removeprefix(start).removesuffix(end)


# ---- pairs of texts -----------------------------------------------------------------------------------------------------


def test_a_prompt_in_a_field_of_its_own_stands_before_both_responses():
    row = {"prompt": "p", "chosen": " good", "rejected": "bad ", "more": 1}
    assert one(row) == Row("p", [" good", "bad "], [(0, 1)], 0, None)


def test_fields_of_any_name_are_read():
    row = {"question": "q", "better": "good", "worse": "bad", "prompt": 1, "chosen": 2}
    assert one(row, prompt="question", chosen="better", rejected="worse") == Row("q", ["good", "bad"], [(0, 1)], 0)


def test_dialogues_are_cut_behind_their_last_assistant_turn():
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b" + dialogue("c", "good"),
        "rejected": dialogue("a", "b") + dialogue("c", "bad"),
    }
    assert one(row) == Row("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", [" good", " bad"], [(0, 1)], 0)


def test_texts_of_dialogues_with_a_prompt_beside_them_are_left_as_they_are():
    row = {"prompt": "p", "chosen": dialogue("q", "good"), "rejected": dialogue("q", "bad")}
    assert one(row) == Row("p", [row["chosen"], row["rejected"]], [(0, 1)], 0)


def test_dialogues_and_rows_with_a_prompt_stand_side_by_side():
    rows = [{"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert [row.prompt for row in mapped(rows)] == ["\n\nHuman: q\n\nAssistant:", "p"]


def test_dialogues_that_answer_different_prompts_are_skipped_and_counted():
    report = DataReport()
    rows = [
        {"chosen": dialogue("q", "a"), "rejected": dialogue("another q", "b")},
        {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")},
        {"chosen": turns("q", "a"), "rejected": turns("another q", "b")},
    ]
    assert len(mapped(rows, report)) == 1
    assert (report.rows_read, report.num_bad_rows, report.left_out) == (3, 0, {OTHER_PROMPT: 2})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        # The blank before the answers is theirs, as TRL has it.
        ("Q: why? A: because", "Q: why? A: no idea", "Q: why? A:"),
        # No word is cut: both answers begin with b.
        ("Say it. because", "Say it. but", "Say it."),
        ("one\ntwo three", "one\ntwo four", "one\ntwo"),
        ("one\nthree", "one\nfour", "one\n"),
        ("shared", "shared and more", None),
        ("shared and", "shared and more", "shared"),
        ("  x", "  y", None),
        ("a", "b", None),
    ],
)
def test_an_implicit_prompt_is_what_both_texts_start_with_up_to_a_white_space(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    if prompt is None:
        assert "start with different words" in fault(row, implicit_prompt=True)
    else:
        expected = Row(prompt, [chosen.removeprefix(prompt), rejected.removeprefix(prompt)], [(0, 1)], 0)
        assert one(row, implicit_prompt=True) == expected


def test_an_implicit_prompt_gives_way_to_a_prompt_in_a_field_of_its_own():
    row = {"prompt": "p", "chosen": "Say it. a", "rejected": "Say it. b"}
    assert one(row, implicit_prompt=True) == Row("p", ["Say it. a", "Say it. b"], [(0, 1)], 0)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=300)
@given(prompt=WORDS, answers=st.lists(WORDS, min_size=2, max_size=2))
def test_an_implicit_prompt_and_its_responses_are_the_texts_again(prompt, answers):
    chosen, rejected = (f"{prompt} {answer}" for answer in answers)
    report = DataReport(skip_bad_rows=True)
    for row in mapped([{"chosen": chosen, "rejected": rejected}], report, implicit_prompt=True):
        assert [row.prompt + response for response in row.responses] == [chosen, rejected]
        assert row.prompt.startswith(prompt)
        assert all(text_error(text) is None for text in (row.prompt, *row.responses))
    assert report.rows_read == 1


# ---- conversations ------------------------------------------------------------------------------------------------------

HUMAN_TURNS = (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"))


def test_what_conversations_have_in_common_is_the_prompt_and_their_last_turns_are_the_responses():
    row = {"chosen": turns("q", "a", "r", "good"), "rejected": turns("q", "a", "r", "bad")}
    assert one(row) == Row(HUMAN_TURNS, ["good", "bad"], [(0, 1)], 0)


def test_a_prompt_field_beside_conversations_that_hold_the_prompt_is_not_read_twice():
    row = {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad")}
    assert one(row).prompt == (Turn("user", "q"),)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("q", (Turn("user", "q"),)),
        (turns("q", "a", "r"), HUMAN_TURNS),
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", HUMAN_TURNS),
    ],
    ids=["text", "conversation", "dialogue"],
)
def test_responses_that_are_conversations_of_one_turn_follow_the_prompt_field(prompt, expected):
    row = {"prompt": prompt, "chosen": turns("", "good")[1:], "rejected": turns("", "bad")[1:]}
    assert one(row) == Row(expected, ["good", "bad"], [(0, 1)], 0)


def test_a_conversation_in_the_prompt_field_is_answered_by_texts():
    row = {"prompt": turns("q", "a", "r"), "chosen": "good", "rejected": "bad"}
    assert one(row) == Row(HUMAN_TURNS, ["good", "bad"], [(0, 1)], 0)


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("system", "human", "gpt"), {"from": "human", "value": "q"}),
        (("system", "user", "assistant"), {"role": "user", "content": "q"}),
        (("system", "human", "model"), {"role": "human", "content": "q", "more": None}),
    ],
    ids=["from and value", "role and content", "other names of roles"],
)
def test_turns_of_other_names_are_the_systems_the_users_and_the_assistants(names, role):
    keys = [key for key in role if key != "more"]
    system, human, good, bad = (
        dict(zip(keys, turn, strict=True)) for turn in zip([*names, names[2]], ["s", "q", "good", "bad"], strict=True)
    )
    row = {"chosen": [system, human, good], "rejected": [system, human, bad]}
    assert one(row) == Row((Turn("system", "s"), Turn("user", "q")), ["good", "bad"], [(0, 1)], 0)


# ---- a system field -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, (Turn("user", "p"),)),
        ({"prompt": "\n\nHuman: p\n\nAssistant:", "chosen": "a", "rejected": "b"}, (Turn("user", "p"),)),
        ({"prompt": turns("q", "a", "r"), "chosen": "a", "rejected": "b"}, HUMAN_TURNS),
        ({"chosen": turns("q", "a", "r", "a"), "rejected": turns("q", "a", "r", "b")}, HUMAN_TURNS),
    ],
    ids=["text", "dialogue", "conversation", "conversations"],
)
def test_a_system_field_stands_before_the_prompt_and_an_empty_one_does_not(row, prompt):
    assert one(row | {"sys": "be brief"}, system="sys") == Row((Turn("system", "be brief"), *prompt), ["a", "b"], [(0, 1)], 0)
    for nothing in ("", None):
        assert one(row | {"sys": nothing}, system="sys") == Row(prompt, ["a", "b"], [(0, 1)], 0)


def test_a_system_field_with_an_error_is_reported():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert fault(row | {"sys": 5}, system="sys") == "field 'sys' is int, expected a text."
    assert fault(row | {"sys": " "}, system="sys") == "field 'sys' is empty."
    assert fault(row, system="sys") == "no field 'sys', the row has prompt, chosen, rejected."
    silent = row | {"sys": "s", "prompt": "\n\nHuman: \n\nAssistant:"}
    assert fault(silent, system="sys") == "the prompt has a turn 1 that is empty."


# ---- several responses a row ----------------------------------------------------------------------------------------------


def test_lists_of_responses_and_scores_form_all_pairs_of_different_scores():
    row = {"prompt": "p", "answers": ["a", "b", "c"], "points": [1, 3, 1.0]}
    assert one(row, responses="answers", scores="points") == Row("p", ["a", "b", "c"], [(1, 0), (1, 2)], 1, [1, 3, 1])


def test_of_ranks_the_lower_is_the_better_one():
    row = {"prompt": "p", "answers": ["a", "b", "c"], "places": [2, 3, 1]}
    assert one(row, responses="answers", ranks="places") == Row("p", ["a", "b", "c"], [(0, 1), (2, 0), (2, 1)], 2, [-2, -3, -1])


def test_dotted_names_lead_into_each_item_of_a_list():
    row = {"prompt": "p", "answers": [{"text": "a", "vote": {"n": 2}}, {"text": "b", "vote": {"n": 5}}]}
    assert one(row, responses="answers.text", scores="answers.vote.n") == Row("p", ["a", "b"], [(1, 0)], 1, [2, 5])


def test_dotted_names_lead_into_nested_values_of_every_field():
    row = {"meta": {"q": "p", "sys": "s"}, "out": {"good": "a", "bad": "b"}}
    assert one(row, prompt="meta.q", chosen="out.good", rejected="out.bad") == Row("p", ["a", "b"], [(0, 1)], 0)
    prompt = (Turn("system", "s"), Turn("user", "p"))
    found = one(row, prompt="meta.q", chosen="out.good", rejected="out.bad", system="meta.sys")
    assert found == Row(prompt, ["a", "b"], [(0, 1)], 0)


def test_a_field_whose_own_name_has_a_dot_goes_before_a_nested_one():
    row = {"prompt": "p", "a.b": "good", "a": {"b": "nested"}, "rejected": "bad"}
    assert one(row, chosen="a.b").responses == ["good", "bad"]


def test_numbers_may_be_texts_as_csv_has_them():
    row = {"prompt": "p", "answers": ["a", "b"], "points": ["10", " 9.5 "]}
    assert one(row, responses="answers", scores="points").pairs == [(0, 1)]


def test_equal_scores_and_a_single_response_form_no_pair_and_leave_the_target():
    assert one({"prompt": "p", "r": ["a", "b"], "s": [1, 1]}, responses="r", scores="s") == Row("p", ["a", "b"], [], 0, [1, 1])
    assert one({"prompt": "p", "r": ["a"], "s": [1]}, responses="r", ranks="s") == Row("p", ["a"], [], 0, [-1])


@given(scores=st.lists(st.integers(-3, 3) | st.floats(allow_nan=False), min_size=1, max_size=6))
def test_scores_and_the_ranks_that_are_their_negatives_say_the_same(scores):
    row = {"prompt": "p", "r": [str(k) for k in range(len(scores))], "s": scores, "k": [-score for score in scores]}
    by_score, by_rank = one(row, responses="r", scores="s"), one(row, responses="r", ranks="k")
    assert by_score == by_rank
    assert all(scores[better] > scores[worse] for better, worse in by_score.pairs)
    assert scores[by_score.target] == max(scores)


# ---- one response a row -------------------------------------------------------------------------------------------------


def test_a_response_with_a_score_waits_for_others_of_its_prompt():
    assert one({"prompt": "p", "text": "a", "points": "3"}, response="text", score="points") == Row(
        "p", ["a"], [], 0, [3.0], forms_pairs=True
    )


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (False, False), (1, True), (0.0, False), ("1", True), (" False ", False), ("desirable", True),
     ("Undesirable", False)],
)  # fmt: skip
def test_a_response_with_a_label_is_desirable_or_not(value, label):
    row = {"prompt": "p", "text": "a", "ok": value}
    assert one(row, response="text", label="ok") == Row("p", ["a"], [], 0, labels=[label])


@pytest.mark.parametrize("value", [2, None, "maybe", "", [True]])
def test_a_label_that_is_neither_is_reported(value):
    found = fault({"prompt": "p", "text": "a", "ok": value}, response="text", label="ok")
    assert found == f"field 'ok' is {shown(value)}, expected one of {', '.join(LABELS)}."


def test_a_pair_may_have_a_margin_and_a_weight():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "info": {"gap": "-1.5", "w": 2}}
    found = one(row, margin="info.gap", example_weight="info.w")
    assert found == Row("p", ["a", "b"], [(0, 1)], 0, margins=[-1.5], weights=[2.0])
    assert one(row) == Row("p", ["a", "b"], [(0, 1)], 0)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("margin", "big", "field 'n' is 'big', expected a number."),
        ("margin", None, "field 'n' is null, expected a number."),
        ("margin", float("inf"), "field 'n' is inf, expected a finite number."),
        ("example_weight", -1, "field 'n' is -1.0, expected a finite number of at least 0."),
        ("example_weight", float("inf"), "field 'n' is inf, expected a finite number of at least 0."),
    ],
)
def test_a_margin_or_weight_that_is_no_such_number_is_reported(key, value, told):
    assert fault(PAIR | {"n": value}, **{key: "n"}) == told
    assert fault(PAIR, **{key: "n"}).startswith("no field 'n', the row has prompt")


def test_a_response_without_a_score_is_for_sft():
    assert one({"prompt": "p", "text": "a", "score": 3}, response="text") == Row("p", ["a"], [], 0, None)
    row = {"messages": turns("q", "a", "r"), "text": "a"}
    assert one(row, prompt="messages", response="text") == Row(HUMAN_TURNS, ["a"], [], 0, None)


# ---- faults -------------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "no field 'chosen', the row has no fields."),
        ({"prompt": "p", "rejected": "a"}, "no field 'chosen', the row has prompt, rejected."),
        (PAIR | {"chosen": 3}, "field 'chosen' is int, expected a text."),
        (PAIR | {"rejected": None}, "field 'rejected' is null, expected a text."),
        (PAIR | {"rejected": ""}, "field 'rejected' is empty."),
        (PAIR | {"chosen": "\n"}, "field 'chosen' is empty."),
        (PAIR | {"prompt": "  "}, "field 'prompt' is empty."),
        (PAIR | {"prompt": {"q": 1}}, "field 'prompt' is dict, expected a text."),
        (PAIR | {"prompt": []}, "field 'prompt' is a conversation without turns."),
        (PAIR | {"prompt": ["p", "p"]}, "field 'prompt': turn 1 is not {role, content}."),
        (PAIR | {"chosen": [{"role": "user"}], "rejected": []}, "field 'chosen': turn 1 is not {role, content}."),
        (PAIR | {"rejected": [{"role": "system", "content": ""}]}, "field 'rejected' is a conversation without turns."),
        (PAIR | {"chosen": turns("q", "a")}, "field 'rejected' is str, expected a conversation as in the other field."),
        (PAIR | {"rejected": turns("q", "a")}, "field 'chosen' is str, expected a conversation as in the other field."),
        (PAIR | {"chosen": turns("q", " "), "rejected": turns("q", "a")}, "field 'chosen': turn 2 is empty."),
        (PAIR | {"chosen": turns("q", "a"), "rejected": turns("q", 5)}, "field 'rejected': turn 2 is int, expected a text."),
        (
            PAIR | {"chosen": turns("q", "a"), "rejected": [*turns("q"), *turns("r")]},
            "the last turn of rejected is the user's. Expected the assistant's, which is the response.",
        ),
        (
            PAIR | {"chosen": turns("q"), "rejected": turns("r")},
            "the last turn of chosen is the user's. Expected the assistant's",
        ),
        (
            {"chosen": "a", "rejected": "b", "frage": "Which one?"},
            r"chosen has no '\n\nAssistant:' turn. Expected a dialogue of",
        ),
        ({"chosen": dialogue("q", ""), "rejected": dialogue("q", "b")}, "the response in field 'chosen' is empty."),
        ({"chosen": dialogue("q", "a"), "rejected": dialogue("q", " \n")}, "the response in field 'rejected' is empty."),
        (PAIR | {"chosen": "x \ud83d"}, "field 'chosen' holds half a surrogate pair ('\\ud83d' at character 2)"),
    ],
)
def test_an_invalid_pair_is_reported_with_file_row_and_field(row, told):
    assert fault(row).startswith(told)


@pytest.mark.parametrize("role", ["toolbox", "", 5, ["user"], {"user": 1}])
def test_an_unknown_role_is_reported_with_the_known_ones(role):
    row = {"chosen": [*turns("q"), {"role": role, "content": "a"}], "rejected": turns("q", "b")}
    assert fault(row).startswith(
        f"field 'chosen': turn 2 has the role {role!r}, expected one of system, developer, user, human, prompter, assistant, "
    )


def test_of_assistant_turns_in_a_row_all_are_the_response():
    row = {"chosen": [*turns("q", "a"), *turns("", "good")[1:]], "rejected": [*turns("q", "a"), *turns("", "bad")[1:]]}
    first, good, bad = (Turn("assistant", text) for text in ("a", "good", "bad"))
    found = one(row)
    assert (found.prompt, found.responses) == ((Turn("user", "q"),), [(first, good), (first, bad)])


def test_a_prompt_that_ends_with_the_assistant_is_continued_by_the_responses():
    found = one(PAIR | {"prompt": turns("q", "My answer is ")})
    assert found.prompt == (Turn("user", "q"), Turn("assistant", "My answer is "))


def test_a_prompt_field_that_is_named_must_be_there():
    row = {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}
    assert fault(row, prompt="question") == "no field 'question', the row has chosen, rejected."
    assert fault(row | {"meta": {"p": "q"}}, prompt="meta.q") == "no field 'meta.q', the row has chosen, rejected, meta."


LISTS = {"prompt": "p", "r": ["a", "b"], "s": [1, 2]}
UNEVEN = "r and s are not two lists of the same length. Expected one number for each response."


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (LISTS | {"s": [1]}, UNEVEN),
        (LISTS | {"s": 1}, UNEVEN),
        (LISTS | {"r": "ab"}, UNEVEN),
        (LISTS | {"r": [], "s": []}, "field 'r' is an empty list."),
        (LISTS | {"r": ["a", 5]}, "field 'r': response 1 is int, expected a text."),
        (LISTS | {"r": [" ", "b"]}, "field 'r': response 0 is empty."),
        (LISTS | {"s": [1, "x"]}, "field 's' is 'x', expected a number."),
        (LISTS | {"s": [[1], 1]}, "field 's' is [1], expected a number."),
        (LISTS | {"prompt": ""}, "field 'prompt' is empty."),
        ({"r": ["a", "b"], "s": [1, 2]}, "no field 'prompt', the row has r, s."),
        ({"prompt": "p", "r": ["a", "b"]}, "no field 's', the row has prompt, r."),
    ],
)
def test_an_invalid_list_of_responses_is_reported_with_file_row_and_field(row, told):
    assert fault(row, responses="r", scores="s") == told
    assert fault(row, responses="r", ranks="s") == told


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "no field 'r', the row has prompt."),
        ({"prompt": "p", "r": "a"}, "no field 's', the row has prompt, r."),
        ({"r": "a", "s": 1}, "no field 'prompt', the row has r, s."),
        ({"prompt": "p", "r": ["a", "a"], "s": 1}, "field 'r': turn 1 is not {role, content}."),
        ({"prompt": "p", "r": "a", "s": "many"}, "field 's' is 'many', expected a number."),
        ({"prompt": "p", "r": "a", "s": [1]}, "field 's' is [1], expected a number."),
        ({"prompt": "p", "r": "a", "s": ""}, "field 's' is '', expected a number."),
    ],
)
def test_an_invalid_scored_response_is_reported_with_file_row_and_field(row, told):
    assert fault(row, response="r", score="s") == told


@pytest.mark.parametrize(
    "answers", [None, 5, "text", [5], [{"txt": "a"}], [{"text": "a"}, {}], {"text": {}}], ids=lambda answers: str(answers)
)
def test_a_dotted_name_that_leads_nowhere_is_reported_with_the_fields_there_are(answers):
    row = {"prompt": "p", "answers": answers}
    assert fault(row, response="answers.text.more") == "no field 'answers.text.more', the row has prompt, answers."


def test_an_empty_list_has_the_fields_of_its_items_none_of_them():
    assert field_value({"answers": []}, "answers.text") == []
    with pytest.raises(RowError, match="no field 'answers.text', the row has answers"):
        field_value({"answers": [[{"text": "nested twice"}]]}, "answers.text")


# ---- where --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (">= 2", [2, 3]),
        (">2", [3]),
        ("<= 2", [1, 2]),
        ("< 2", [1]),
        ("!= 2", [1, 3]),
        ("== 2", [2]),
        ("==2", [2]),
        ("2", [2]),
        (2, [2]),
        (2.0, [2]),
        ([1, "3"], [1, 3]),
        ([], []),
        (">= -1e9", [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("as_read", [int, float, str], ids=["whole numbers", "floats", "texts"])
def test_where_keeps_the_rows_that_fulfil_it_and_counts_the_others(wanted, kept, as_read):
    report = DataReport()
    rows = [PAIR | {"n": as_read(n), "prompt": str(n)} for n in (1, 2, 3)]
    assert [int(row.prompt) for row in mapped(rows, report, where={"n": wanted})] == kept
    assert report.rows_read == 3
    assert report.left_out == ({f"n is not {wanted}": 3 - len(kept)} if len(kept) < 3 else {})


@pytest.mark.parametrize(
    ("value", "wanted", "keeps"),
    [
        (True, True, True),
        (False, True, False),
        (None, None, True),
        ("", None, False),
        ("en", "en", True),
        ("en ", "en", False),
        ("en", ["de", "en"], True),
        ("en", "== en", True),
        ("en", "!= en", False),
        ("x", "!=", True),
        ("", "!=", False),
        (0.5, 0.5, True),
        (1, True, False),
        ([1], "[1]", True),
        ("1.0", "1", False),
        ("1.0", 1, True),
        ("5.0", [4, 5], True),
        ("5.0", "!= 5", False),
        (2**53 + 1, 2**53, False),
        (2**53 + 1, str(2**53), False),
        (float("nan"), "!= nan", False),
        ("True", "true", True),
        (None, "!= null", False),
        (None, "None", True),
        ("null", None, True),
        ("nul", [None, 3], False),
    ],
)
def test_where_compares_numbers_by_value_and_other_values_as_texts(value, wanted, keeps):
    assert condition(wanted)(value) is keeps


def test_several_conditions_must_all_hold_and_a_row_is_counted_once_for_the_first_that_does_not():
    report = DataReport()
    rows = [PAIR | {"n": n, "language": language} for language in ("en", "de") for n in (1, 2)]
    assert len(mapped(rows, report, where={"language": "en", "n": ">= 2"})) == 1
    assert report.left_out == {"language is not en": 2, "n is not >= 2": 1}


def test_where_reads_nested_values():
    rows = [PAIR | {"meta": {"n": n}} for n in (1, 2)]
    assert len(mapped(rows, where={"meta.n": "> 1"})) == 1


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (PAIR, "where: no field 'n', the row has prompt, chosen, rejected."),
        (PAIR | {"n": "many"}, "where: field 'n' is 'many', expected a number."),
        (PAIR | {"n": None}, "where: field 'n' is null, expected a number."),
        (PAIR | {"n": float("nan")}, "where: field 'n' is nan, expected a number."),
    ],
)
def test_a_row_that_cannot_be_compared_is_reported_with_its_column(row, told):
    assert fault(row, where={"n": ">= 1"}) == told


@pytest.mark.parametrize("wanted", [">= much", "<", "> ", "<= 1,5"])
def test_a_comparison_with_what_is_no_number_is_refused(wanted):
    with pytest.raises(ValueError, match="could not convert string to float"):
        condition(wanted)


# ---- top_k --------------------------------------------------------------------------------------------------------------


def test_top_k_keeps_the_rows_with_the_largest_values_in_the_order_of_the_file_and_counts_the_others():
    report = DataReport()
    rows = [PAIR | {"prompt": str(n), "n": n} for n in (3, 9, 1, 7, 5)]
    found = mapped(rows, report, top_k={"column": "n", "k": 3})
    assert [row.prompt for row in found] == ["9", "7", "5"]
    assert report.left_out == {"not among the 3 largest of n": 2}
    assert report.rows_read == 5


def test_of_equal_values_top_k_keeps_the_earlier_rows():
    rows = [PAIR | {"prompt": str(place), "n": n} for place, n in enumerate([1, 2, 1, 2, 1])]
    assert [row.prompt for row in mapped(rows, top_k={"column": "n", "k": 3})] == ["0", "1", "3"]


def test_top_k_is_taken_of_the_rows_that_fulfil_where():
    rows = [PAIR | {"prompt": str(n), "n": n, "language": "en" if n % 2 else "de"} for n in range(6)]
    found = mapped(rows, where={"language": "de"}, top_k={"column": "n", "k": 2})
    assert [row.prompt for row in found] == ["2", "4"]


@pytest.mark.parametrize("value", [None, "much", True, [1]])
def test_a_value_that_has_no_place_among_the_largest_is_reported_with_its_column(value):
    assert (
        fault(PAIR | {"n": value}, top_k={"column": "n", "k": 2}) == f"top_k: field 'n' is {shown(value)}, expected a number."
    )


@given(values=st.lists(st.integers(0, 5), max_size=12), k=st.integers(1, 6))
def test_top_k_keeps_what_a_sorted_list_would(values, k):
    report = DataReport()
    rows = [PAIR | {"prompt": str(place), "n": n} for place, n in enumerate(values)]
    places = sorted(range(len(values)), key=lambda place: (-values[place], place))[:k]
    found = mapped(rows, report, top_k={"column": "n", "k": k})
    assert [int(row.prompt) for row in found] == sorted(places)
    assert sum(report.left_out.values()) == max(0, len(values) - k)


# ---- any row ------------------------------------------------------------------------------------------------------------

TEXTS = ["", " ", "a", "b", dialogue("q", "a"), "\ud800"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", " ", "a", "b", dialogue("q", "a"), "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=3)
        | st.builds(lambda *texts: turns(*texts), inner, inner)
    ),
    max_leaves=6,
)
MAPS = [
    {},
    {"implicit_prompt": True},
    {"system": "system"},
    {"responses": "chosen", "scores": "rejected"},
    {"responses": "chosen.text", "ranks": "chosen.value"},
    {"response": "chosen", "score": "rejected"},
    {"response": "chosen.content"},
    {"prompt": "prompt.text", "chosen": "chosen.content"},
    {"where": {"chosen": ">= 1"}},
    {"where": {"prompt": ["a", 1], "system": "!= b"}},
    {"top_k": {"column": "rejected", "k": 2}},
]


@pytest.mark.parametrize("names", MAPS, ids=str)
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({}, optional={name: VALUES for name in ("prompt", "chosen", "rejected", "system")}), max_size=4
    )
)
def test_any_rows_are_mapped_skipped_or_reported_and_none_is_forgotten(names, rows):
    report = DataReport(skip_bad_rows=True)
    found = mapped(rows, report, **names)
    assert len(found) + report.num_bad_rows + sum(report.left_out.values()) == report.rows_read == len(rows)
    for row in found:
        assert all(text_error(text) is None for text in row.responses)
        assert all(0 <= index < len(row.responses) for pair in row.pairs for index in pair)
        hash(row.prompt)
    for message in report.bad_rows:
        assert message.startswith("datasets: data.jsonl, row ")


@given(value=VALUES)
def test_conditions_take_any_value_or_say_what_it_is(value):
    for wanted in (1, "a", None, True, [1, "a"], "== 1", "!= a"):
        assert isinstance(condition(wanted)(value), bool)
    try:
        assert isinstance(condition("> 1", "n")(value), bool)
    except RowError as fault:
        assert str(fault) == f"field 'n' is {shown(value)}, expected a number."


def test_the_kinds_of_values_in_messages_are_those_of_json():
    for text, kind in (("null", "null"), ("{}", "dict"), ("1", "int"), ("true", "bool")):
        assert fault(PAIR | {"chosen": json.loads(text)}) == f"field 'chosen' is {kind}, expected a text."


def test_a_conversation_keeps_its_own_system_turn_where_a_field_names_another():
    row = {
        "sys": "From the field.",
        "chosen": [{"role": "system", "content": "Its own."}, *turns("q", "a")],
        "rejected": [{"role": "system", "content": "Its own."}, *turns("q", "b")],
    }
    assert FieldMap(system="sys").map_row(row).prompt == (Turn("system", "Its own."), Turn("user", "q"))


# ---- nothing is lost without a word -------------------------------------------------------------------------------------


def conversation(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


PIRATE = ("system", "Talk like a pirate.")
GREETING = (("user", "hello"), ("assistant", "ahoy"))


def beside(prompt, *shared: tuple[str, str]) -> dict:
    """A row with a prompt beside conversations that begin with the same turns."""
    return {"prompt": prompt, **{name: conversation(*shared, ("assistant", name)) for name in ("chosen", "rejected")}}


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        # The conversations go on from the prompt.
        ([PIRATE, *GREETING], [("user", "q")]),
        ([PIRATE], [*GREETING, ("user", "q")]),
        ([PIRATE, GREETING[0]], [GREETING[1], ("user", "q")]),
        # They repeat all of it, or its end; white space aside.
        ([PIRATE, *GREETING, ("user", "q")], [PIRATE, *GREETING, ("user", "q")]),
        ([PIRATE, *GREETING, ("user", "q")], [*GREETING, ("user", "q")]),
        ([PIRATE, *GREETING, ("user", "q ")], [("user", "q")]),
        ([("user", "q")], [PIRATE, *GREETING, ("user", "q")]),
    ],
)
def test_turns_of_a_prompt_and_those_that_both_responses_share_stand_in_order_each_once(prompt, shared):
    found = one(beside(conversation(*prompt), *shared)).prompt
    assert [(turn.role, turn.content.strip()) for turn in found] == [PIRATE, *GREETING, ("user", "q")]


def test_a_prompt_that_conversations_neither_repeat_nor_continue_is_reported():
    row = beside(conversation(("user", "another question")), ("user", "q"))
    assert "the prompt ends with the user's turn, and chosen and rejected start with the user's" in fault(row)


def test_a_text_beside_conversations_is_reported_where_it_is_in_none_of_their_turns_with_the_map_that_reads_it():
    row = beside("Talk like a pirate.", ("user", "q"))
    assert "would be lost. If it is a system prompt, set system: prompt" in fault(row)
    assert one(row, system="prompt").prompt == (Turn(*PIRATE), Turn("user", "q"))


@pytest.mark.parametrize("prompt", ["q", " q\n", "hello", "", None, dialogue("hello", "ahoy") + "\n\nHuman: q\n\nAssistant:"])
def test_a_text_beside_conversations_may_say_what_their_turns_say(prompt):
    assert one(beside(prompt, *GREETING, ("user", "q"))).prompt == tuple(Turn(*turn) for turn in (*GREETING, ("user", "q")))


@pytest.mark.parametrize(
    "written", [json.dumps, repr, lambda turns: json.dumps(turns, indent=1)], ids=["json", "python", "lines"]
)
def test_conversations_that_were_written_into_texts_are_read(written):
    row = {"prompt": turns("q", "a", "next"), "chosen": turns("q", "good")[1:], "rejected": turns("q", "bad")[1:]}
    assert one({name: written(value) for name, value in row.items()}) == one(row)
    whole = {"chosen": turns("q", "good"), "rejected": turns("q", "bad")}
    assert one({name: written(value) for name, value in whole.items()}) == one(whole)


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "admin", "content": "x"}',
        '["a", "b"]',
        '{"value": 3}',
        '[{"value": "x", "from": 1}]',
        "[1, 2]",
        '{"a": 1, [1]: 2}',
        '{"role": "ad',
        "[{",
    ],
)
def test_other_json_in_texts_is_text(text):
    assert one({"prompt": "p", "chosen": text, "rejected": "b"}).responses == [text, "b"]


def test_turns_in_texts_may_begin_with_any_key_and_unknown_roles_are_named():
    row = {"prompt": "p", "chosen": '[{"id": 1, "role": "assistant", "content": "c"}]', "rejected": "b"}
    assert one(row).responses == ["c", "b"]
    assert "'admin'" in fault(row | {"chosen": '[{"role": "admin", "content": "x"}]'})


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_lists_of_answers_that_were_written_into_texts_are_read(written):
    row, report = {"prompt": "p", "chosen": ["c"], "rejected": ["r", "s"]}, DataReport()
    cells = UntypedRow(row | {name: written(row[name]) for name in ("chosen", "rejected")})
    assert mapped([cells], report) == [one(row)]
    assert report.changed == {"rows whose cells are lists of answers, each read as several": 1}
    assert mapped([cells], DataReport(), roles={"bot": "assistant"}) == [one(row)]
    arena = {"prompt": ["q", "r"], "x": ["a", "b"], "y": ["c", "d"], "v": "x"}
    names = {"answers": ["x", "y"], "better": {"v": ["x", "y"]}}
    texts = arena | {name: written(arena[name]) for name in ("prompt", "x", "y")}
    assert one(texts, **names) == one(arena, **names)
    told = "field 'y' is not a list of as many texts as 'prompt'"
    assert told in fault(texts | {"y": written(["c"])}, **names)
    report = DataReport()
    assert mapped([texts | {"y": written(["c", None])}], report, **names) == []
    assert report.left_out == {"a prompt or an answer in a list is missing (null)": 1}


@pytest.mark.parametrize(("chosen", "rejected"), [("['a', 'b']", "['b', 'a']"), ('["apple","pear"]', '["dog"]')])
def test_typed_texts_that_are_lists_stay_texts_as_of_structured_output(chosen, rejected):
    row = {"prompt": "p", "chosen": chosen, "rejected": rejected}
    assert mapped([row, row]) == [Row("p", [chosen, rejected], [(0, 1)], 0)] * 2
    beside = {"messages": turns("q", "a"), "rejected_response": rejected}
    assert one(beside).responses == ["a", rejected]
    cells = UntypedRow({name: value if name != "messages" else json.dumps(value) for name, value in beside.items()})
    assert one(cells).responses == ["a", *json.loads(rejected.replace("'", '"'))]


def test_a_conversation_as_text_that_cannot_be_read_is_reported():
    broken = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    assert "starts like a list of turns, but is not JSON" in fault({"chosen": broken, "rejected": broken})


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
def test_rows_with_pictures_films_or_sounds_are_reported(name):
    row = {"prompt": "<image> What is it?", "chosen": "a", "rejected": "b"}
    assert f"field {name!r} is not empty, but models read only text here" in fault(row | {name: ["x.png"]})
    assert one(row | {name: []}) == one(row | {name: None}) == one(row)


def test_instruction_and_input_are_one_prompt_and_that_is_counted():
    report = DataReport()
    rows = [{"instruction": "Translate.", "input": text, "output": "x"} for text in ("a word", "", None)]
    found = mapped(rows, report, prompt="instruction", response="output")
    assert [row.prompt for row in found] == ["Translate.\na word", "Translate.", "Translate."]
    assert report.lines() == ["1 prompts joined from instruction and input, on separate lines"]
    # Where the map says what input is, it is that.
    (row,) = mapped(rows[:1], prompt="instruction", response="output", system="input")
    assert row.prompt == (Turn("system", "a word"), Turn("user", "Translate."))


SYSTEM = "with system: system it becomes the system turn"
MARGIN = "with margin: margin it is the margin of the pair"
WEIGHT = "with example_weight: weight it is the weight of the pair"
OTHERS = {"system": ["s"], "margin": "wide", "weight": -1}


@pytest.mark.parametrize(
    ("row", "names", "remark"),
    [
        # What the first rows have of the usual kind is read unasked; see test_formats.py.
        ({"system": "s", "margin": 0, "weight": 2}, {}, None),
        (OTHERS, {}, f"system, margin, weight ({SYSTEM}; {MARGIN}; {WEIGHT})"),
        (OTHERS | {"system": "s", "margin": 0}, {"system": "system", "where": {"margin": 0}}, f"weight ({WEIGHT})"),
        ({"margin": 0, "weight": 2}, {"margin": "margin", "example_weight": "weight"}, None),
        ({"tools": [{"name": "f"}]}, {}, None),
        ({"tools": 3}, {}, "tools (with tools: tools they are given to the chat template)"),
        ({"meta": {"id": 1, "split": "x"}}, {"where": {"meta.id": 1}}, "meta.split"),
        ({"": 3, "empty": "", "none": None, "no": [], "nothing": {}}, {}, "''"),
    ],
)
def test_columns_that_hold_something_and_are_not_read_are_named(row, names, remark):
    report, texts = DataReport(), {"prompt": "p", "chosen": "a", "rejected": "b"}
    # The last of three rows has them: all rows are looked at.
    mapped([texts, texts, texts | row] if not names else [texts | row], report, **names)
    expected = [f"columns not read: {remark}"] if remark else []
    said = [line[line.index("columns") :] for line in report.lines() if "columns not read" in line]
    assert said == expected


def test_what_stands_beside_role_and_text_of_a_turn_is_named():
    chosen = [
        {"role": "user", "content": "q", "turn_id": 1},
        {"role": "assistant", "content": "a", "vote": ["x"], "name": None, "reasoning_content": "b"},
    ]
    report = DataReport()
    mapped([{"chosen": chosen, "rejected": turns("q", "b")}], report)
    assert report.columns_not_read == {"chosen.turn_id": 1, "chosen.vote": 1}
    # The older form of a call is read.
    report, calls = DataReport(), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    mapped([{"messages": [chosen[0], calls]}], report)
    assert report.columns_not_read == {"messages.turn_id": 1}
    # In a text, too; what cannot be read as turns there may still be compared.
    report, broken = DataReport(), "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    row = {"chosen": json.dumps(chosen), "rejected": json.dumps(turns("q", "b")), "meta": broken}
    mapped([row], report, where={"meta": broken})
    assert report.columns_not_read == {"chosen.turn_id": 1, "chosen.vote": 1}
    # Whose turn it is goes without saying.
    report = DataReport()
    answers = {name: {"role": "assistant", "content": name, "score": 1} for name in ("chosen", "rejected")}
    mapped([{"prompt": "p", **answers}], report, chosen="chosen.content", rejected="rejected.content")
    assert report.columns_not_read == {"chosen.score": 1, "rejected.score": 1}


COLUMNS = ("prompt", "chosen", "rejected", "system", "input", "instruction", "note", "output", "score")


@settings(max_examples=300)
@given(
    columns=st.sets(st.sampled_from(COLUMNS)),
    names=st.sampled_from(
        [{}, {"system": "system"}, {"prompt": "instruction"}, {"response": "output"}, {"response": "output", "score": "score"}]
    ),
    form=st.sampled_from(["text", "turns", "written"]),
)
def test_every_column_of_a_row_is_in_its_texts_or_named(columns, names, form):
    row = {column: f"<{column}>" for column in columns} | ({"score": 1.5} if "score" in columns else {})
    if form != "text":
        role = {"prompt": "user", "instruction": "user"}
        row |= {
            name: [{"role": role.get(name, "assistant"), "content": row[name]}]
            for name in ("prompt", "chosen", "rejected")
            if name in row
        }
    if form == "written":
        row = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
    report = DataReport(skip_bad_rows=True)
    for found in mapped([row], report, **names):
        said = found.prompt if isinstance(found.prompt, str) else " ".join(turn.content for turn in found.prompt)
        said += " ".join(found.responses)
        assert all(
            f"<{column}>" in said or column in report.columns_not_read or (column == "score" and found.scores)
            for column in columns
        )


def test_a_system_field_that_gives_way_to_a_turn_is_counted():
    report = DataReport()
    rows = [{"sys": sys, **beside(None, PIRATE, ("user", "q"))} for sys in ("Be brief.", PIRATE[1], "", None)]
    assert len(mapped(rows, report, system="sys")) == 4
    assert report.changed == {"conversations with their own system turn, which replaces the field 'sys'": 1}


@pytest.mark.parametrize(
    ("keys", "row", "remedy"),
    [
        ({}, {"Frage": "p q", "Antwort": "c d"}, "datasets=[{path: ..., prompt: Frage, response: Antwort}]"),
        ({}, {"Frage": "p q", "good one": "a", "bad": "b"}, '{path: ..., prompt: Frage, chosen: "good one", rejected: bad}'),
        (
            {},
            {"Frage": "p q", "chosen": "a", "rejected": "b"},
            "{path: ..., prompt: Frage, chosen: chosen, rejected: rejected}",
        ),
        ({}, {"Frage": "p q", "answer": "a"}, "{path: ..., prompt: Frage, response: answer}"),
        (
            {},
            {"Frage": "p q", "replies": ["a", "b"], "tags": ["x"], "grades": [1, 2.5]},
            "{path: ..., prompt: Frage, responses: replies, scores: grades}",
        ),
        ({}, {"body": "p q", "n": 3}, "{path: ..., text: body}"),
        ({"response": "answer"}, {"Frage": "p q", "answer": "c"}, "{path: ..., prompt: Frage, response: answer}"),
        ({}, {"prompt": "p", "rejected": "b"}, "no field 'chosen', the row has prompt, rejected."),
    ],
)
def test_what_is_reported_names_a_map_that_reads_the_row(keys, row, remedy):
    assert remedy in fault(row, **keys)


def test_filters_and_implicit_prompts_without_effect_are_noted():
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "n": n} for n in range(3)]
    report = DataReport()
    mapped(rows, report, where={"n": ">= 0"}, top_k={"column": "n", "k": 3}, implicit_prompt=True)
    assert report.notes == [
        "where skips no row by n: >= 0",
        "top_k has no effect: there are 3 rows, and 3 are kept",
        "implicit_prompt has no effect: prompts are in separate fields, or in turns",
    ]
    report = DataReport()
    mapped(rows, report, where={"n": ">= 1"}, top_k={"column": "n", "k": 1})
    assert report.notes == []
