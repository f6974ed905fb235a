"""Records as text: what is counted, which faults are told, how rows of a prompt come together, and who is held out."""

import hashlib
import json
from itertools import combinations, count, islice

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.rows.records import (
    LISTS_OF_VALUES,
    DataReport,
    Turn,
    is_held_out,
    item_error,
    prompt_error,
    prompt_hash,
    prompt_text,
    response_error,
    response_of,
    split_by_hash,
    text_error,
    type_name,
)

# Few different values, so that equal ones meet often.
PROMPTS = st.sampled_from(["p", "q", (Turn("user", "p"),), (Turn("system", "s"), Turn("user", "p"))])
ANSWERS = st.sampled_from(["a", "b", "c", "d"])
SCORES = st.sampled_from([-1.0, 0.0, 0.5, 7.0])
CALL = Turn("assistant", "", '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}')
RESULT = Turn("tool", "", '{"name": "f"}')
TEXTS = st.text(min_size=1).filter(lambda text: text_error(text) is None)

# ---- the report ---------------------------------------------------------------------------------------------------------


def test_a_bad_row_stops_the_run_and_its_message_names_the_remedy():
    report, fault = DataReport(), UserError("datasets: rows.jsonl, row 3: no text.")
    with pytest.raises(UserError) as refusal:
        report.bad_row(fault)
    assert str(refusal.value) == ("datasets: rows.jsonl, row 3: no text. Fix the row, or skip such rows with on_bad_row=skip.")
    assert refusal.value.__cause__ is fault
    assert report == DataReport()


def test_skipped_rows_are_counted_and_the_first_ten_kinds_are_listed_by_the_first_line_of_their_message():
    report = DataReport(skip_bad_rows=True)
    kinds = "abcdefghijkl"
    for number, kind in enumerate(kinds, start=1):
        report.bad_row(UserError(f"row {number} has {kind}\nand this is why"))
    assert report.num_bad_rows == 12
    assert report.bad_rows == [f"row {number} has {kind}" for number, kind in enumerate(kinds[:10], start=1)]
    assert report.lines() == ["12 bad rows skipped", *(f"  {message}" for message in report.bad_rows)]


def test_rows_that_fail_alike_are_one_line_with_their_number():
    report = DataReport(skip_bad_rows=True)
    for number, found in enumerate(["'much'", "'5 of 9'", "null", "'more'"], start=7):
        report.bad_row(UserError(f"data.jsonl, row {number}: field 'n' is {found}, expected a number."))
    assert report.lines() == [
        "4 bad rows skipped",
        "  data.jsonl, row 7: field 'n' is 'much', expected a number. (2 more rows like it)",
        "  data.jsonl, row 9: field 'n' is null, expected a number.",
    ]
    assert DataReport(**report.as_dict()) == report


def test_what_is_skipped_and_changed_is_added_up_by_reason_and_nothing_is_no_reason():
    report = DataReport()
    report.skip("too long", 2)
    report.skip("too short")
    report.skip("too long")
    report.skip("never", 0)
    report.change("prompts cut", 4)
    report.change("answers cut", 0)
    assert (report.left_out, report.changed) == ({"too long": 3, "too short": 1}, {"prompts cut": 4})
    assert report.lines() == ["3 skipped: too long; 1 skipped: too short; 4 prompts cut"]


def test_a_report_without_anything_to_say_has_no_lines():
    assert DataReport(rows_read=10, num_prompts=10).lines() == []


REPORTS = st.builds(
    DataReport,
    skip_bad_rows=st.booleans(),
    rows_read=st.integers(0),
    num_prompts=st.integers(0),
    num_bad_rows=st.integers(0),
    bad_rows=st.lists(st.text(), max_size=10),
)


@given(report=REPORTS, reasons=st.lists(st.tuples(st.text(), st.integers(0, 5))), changes=st.lists(st.text()))
def test_a_report_survives_json_and_continues_counting(report, reasons, changes):
    for reason, number in reasons:
        report.skip(reason, number)
    for what in changes:
        report.change(what)
    again = DataReport(**json.loads(json.dumps(report.as_dict())))
    assert again == report
    for each in (again, report):
        each.skip("once more")
        each.change("once more")
    assert again == report
    assert again.left_out["once more"] == 1 + sum(number for reason, number in reasons if reason == "once more")


# ---- faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        (" \t\n\u00a0\u2003", "is empty"),
        (None, "is null, expected a text"),
        (5, "is int, expected a text"),
        (b"bytes", "is bytes, expected a text"),
        (["a"], "is list, expected a text"),
        ("\ud83d", "holds half a surrogate pair ('\\ud83d' at character 0), which is not text"),
        ("two \udc00\udc01", "holds half a surrogate pair ('\\udc00' at character 4), which is not text"),
    ],
)
def test_a_value_that_is_no_text_is_reported_with_what_it_is(text, fault):
    assert text_error(text) == response_error(text) == fault
    # An empty text is no prompt, and responses need none.
    assert prompt_error(text) == (None if text == "" else fault)


@pytest.mark.parametrize("text", ["a", " a ", "\u200b", "0", "\U0001f642", "\x00"])
def test_any_text_with_something_in_it_is_valid(text):
    assert text_error(text) is None


@given(text=st.text())
def test_a_text_is_valid_if_it_has_more_than_white_space(text):
    assert (text_error(text) is None) == bool(text.strip())


@given(text=st.text(st.characters(categories=["L", "Cs"]), min_size=1))
def test_a_text_is_valid_if_it_can_be_written(text):
    half = any("\ud800" <= character <= "\udfff" for character in text)
    assert (text_error(text) is None) == (not half)


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ((), "is a conversation without turns"),
        (
            (Turn("user", "q"), Turn("human", "q")),
            "has a turn 2 that is not (role, content) with one of the roles system, developer, user",
        ),
        ((("user", "q", "more"),), "has a turn 1 that is not (role, content)"),
        ((("user", "q", "[]"),), "has a turn 1 that is not (role, content)"),
        ((("user", "q", "{}", ""),), "has a turn 1 that is not (role, content)"),
        ((Turn("assistant", "", '{"name": "a"}'),), "has a turn 1 that is empty"),
        ((Turn("user", "q", '{"name": "\ud800"}'),), "has a turn 1 that holds half a surrogate pair"),
        ((("user",),), "has a turn 1 that is not (role, content)"),
        (({"role": "user", "content": "q"},), "has a turn 1 that is not (role, content)"),
        (("user", "q"), "has a turn 1 that is not (role, content)"),
        ((Turn(["user"], "q"),), "has a turn 1 that is not (role, content)"),
        ((Turn(numpy.array(["user", "user"]), "q"),), "has a turn 1 that is not (role, content)"),
        ((Turn("user", ""), Turn("assistant", "a")), "has a turn 1 that is empty"),
        ((Turn("user", None),), "has a turn 1 that is null, expected a text"),
        ((Turn("user", "q"), Turn("assistant", "\ud800"), Turn("user", "q")), "has a turn 2 that holds half a surrogate pair"),
        ([Turn("user", "q")], "is list, expected a text"),
    ],
)
def test_a_conversation_with_an_error_is_reported_with_which_turn_has_it(prompt, fault):
    assert prompt_error(prompt).startswith(fault)


@pytest.mark.parametrize(
    "prompt",
    [
        (Turn("user", "q"),),
        (Turn("system", "s"), Turn("user", "q")),
        (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "q")),
        (("user", "q"),),
        # Responses continue an assistant turn at the end; an empty system turn is none.
        (Turn("user", "q"), Turn("assistant", "a")),
        (Turn("system", ""), Turn("developer", "d"), Turn("user", "q")),
        (Turn("user", "q"), CALL, RESULT),
    ],
)
def test_a_conversation_whose_turns_have_text_or_calls_is_valid(prompt):
    assert prompt_error(prompt) is None


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        ((), "is a conversation without turns"),
        ((Turn("user", "q"), Turn("assistant", "a")), "starts with the user's turn, expected the assistant's"),
        ((CALL, RESULT), "ends with the tool's turn, expected the assistant's"),
        ((Turn("assistant", ""),), "has a turn 1 that is empty"),
        ((CALL, RESULT, Turn("assistant", "a")), None),
        (((("assistant", "a")),), None),
        ((CALL,), None),
    ],
)
def test_a_response_of_several_turns_starts_and_ends_with_the_assistant(response, fault):
    assert response_error(response) == fault
    record = {"responses": [response, "b"], "pairs": [(0, 1)], "sft_target": response}
    assert item_error(("p", record)) == (fault and f"response 0 {fault}")


def test_a_single_turn_is_its_text_unless_it_has_other_fields():
    assert response_of((Turn("assistant", "a"),)) == "a"
    assert response_of((CALL,)) == (CALL,)
    assert response_of((Turn("assistant", "a"),) * 2) == (Turn("assistant", "a"),) * 2


def test_other_fields_of_a_turn_leave_prompts_without_any_as_they_were():
    plain = (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "b"))
    assert prompt_text(plain) == "user\0q\0assistant\0a\0user\0b" == prompt_text(tuple(turn[:2] for turn in plain))
    assert repr(plain[0]) == "Turn(role='user', content='q')"
    assert prompt_text((plain[0], CALL)) != prompt_text((plain[0], Turn("assistant", "")))
    assert repr(CALL) == f"Turn(role='assistant', content='', rest={CALL.rest!r})"


@pytest.mark.parametrize("tools", [[], "x", '{"a": 1}', 5])
def test_tools_of_a_record_are_the_json_text_of_a_list(tools):
    assert item_error(("p", SOUND | {"tools": tools})).startswith(f"tools is {type_name(tools)}, expected the JSON text")
    assert item_error(("p", SOUND | {"tools": '[{"name": "f"}]'})) is None


SOUND = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ((" ", SOUND), "the prompt is empty"),
        (((), SOUND), "the prompt is a conversation without turns"),
        (("p", SOUND | {"responses": ["a", " "]}), "response 1 is empty"),
        (("p", SOUND | {"sft_target": ""}), "sft_target is empty"),
        (("p", SOUND | {"sft_target": None}), "sft_target is null, expected a text"),
        (("p", SOUND | {"responses": ["a", "x\ud800"]}), "response 1 holds half a surrogate pair"),
        (("p", SOUND | {"responses": {"a": 1}}), "responses is dict, expected a list"),
        (("p", SOUND | {"pairs": iter(())}), "pairs is tuple_iterator, expected a list"),
        (("p", SOUND | {"pairs": [(0, 1), (0, 2)]}), "pair (0, 2) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(1, 1)]}), "pair (1, 1) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [[]]}), "pair () does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(True, False)]}), "pair (True, False) is not two whole numbers"),
        (("p", SOUND | {"pairs": ["01"]}), "pair '01' is not two whole numbers"),
        (("p", {"pairs": []}), "the record has no responses, sft_target"),
        (("p", None), "found str and None, expected a prompt and a dict"),
        (["p", SOUND], "found list, expected a prompt and a dict"),
        ((), "found , expected a prompt and a dict"),
        (None, "found None, expected a prompt and a dict"),
    ],
)
def test_an_item_with_an_error_is_reported_with_its_place(item, fault):
    assert item_error(item).startswith(fault)


def test_the_kind_of_nothing_is_none_and_of_other_values_their_type():
    assert [type_name(value) for value in (None, 1, 1.0, True, "", (), {})] == [
        "None", "int", "float", "bool", "str", "tuple", "dict",
    ]  # fmt: skip


@given(prompt=PROMPTS | TEXTS, responses=st.lists(TEXTS, max_size=4), data=st.data())
def test_records_of_texts_and_of_pairs_between_them_have_no_error(prompt, responses, data):
    indices = list(combinations(range(len(responses)), 2))
    pairs = data.draw(st.lists(st.sampled_from(indices))) if indices else []
    record = {"responses": tuple(responses), "pairs": pairs, "sft_target": data.draw(TEXTS), "more": None}
    assert item_error((prompt, record)) is None


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(list(SOUND)), inner, max_size=3)
    ),
    max_leaves=8,
)


records_with_junk = st.fixed_dictionaries(
    {key: st.just(SOUND[key]) | JUNK for key in SOUND}, optional={key: JUNK for key in LISTS_OF_VALUES}
)


@settings(max_examples=300)
@given(item=JUNK | st.tuples(JUNK, JUNK), record=records_with_junk)
def test_any_junk_is_reported_with_its_error_and_never_raises(item, record):
    assert isinstance(item_error(item), str | None)
    fault = item_error(("p", record))
    assert isinstance(fault, str | None)
    if fault is None:
        assert all(isinstance(text, str) for text in [*record["responses"], record["sft_target"]])


@pytest.mark.parametrize(
    ("targets", "fault"),
    [("a", "sft_targets is str, expected a list"), (["a", ""], "sft_targets 1 is empty"), ([], None), (["a"], None)],
)
def test_several_sft_targets_are_a_list_of_texts(targets, fault):
    assert item_error(("p", SOUND | {"sft_targets": targets})) == fault


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"scores": [1, None], "labels": [True, None], "weights": [0], "margins": (-0.5,)}, None),
        ({"scores": None, "labels": None, "weights": None, "margins": None}, None),
        ({"scores": (float("inf"), 2)}, None),
        ({"scores": {"a": 1}}, "scores is dict, expected a list"),
        ({"scores": [1]}, "scores has 1 values for 2 responses, expected one for each"),
        ({"scores": [1, "2"]}, "scores 1 is '2', expected a number or None"),
        ({"scores": [True, 1]}, "scores 0 is True, expected a number or None"),
        ({"scores": [1, float("nan")]}, "scores 1 is nan, expected a number or None"),
        ({"labels": [True, 1]}, "labels 1 is 1, expected True, False or None"),
        ({"labels": ["desirable", None]}, "labels 0 is 'desirable', expected True, False or None"),
        ({"weights": [1, 1]}, "weights has 2 values for 1 pairs, expected one for each"),
        ({"weights": [-1]}, "weights 0 is -1, expected a number of at least 0"),
        ({"weights": [float("inf")]}, "weights 0 is inf, expected a number of at least 0"),
        ({"margins": ["1"]}, "margins 0 is '1', expected a number or None"),
        ({"margins": [float("-inf")]}, "margins 0 is -inf, expected a number or None"),
    ],
)
def test_scores_and_labels_are_of_responses_weights_and_margins_of_pairs(more, fault):
    assert item_error(("p", SOUND | more)) == fault


def test_remarks_are_reported_once_and_survive_json():
    report = DataReport(left_out={"it is odd": 1}, bad_rows=["row 3"])
    for _ in range(2):
        report.not_read("system")
        report.note("weight has no effect")
    again = DataReport(**json.loads(json.dumps(report.as_dict())))
    assert again.lines() == [
        "1 skipped: it is odd",
        "columns not read: system (with system: system it becomes the system turn)",
        "weight has no effect",
        "  row 3",
    ]


def test_names_of_a_hundred_columns_are_kept():
    report = DataReport()
    for number in range(150):
        report.not_read(f"column {number}")
    assert list(report.columns_not_read) == [f"column {number}" for number in range(100)]


# ---- held out -----------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_conversation_is_that_of_its_roles_and_contents():
    digest = hashlib.sha256(b"system\0s\0user\0p").digest()
    assert prompt_hash((Turn("system", "s"), Turn("user", "p"))) == int.from_bytes(digest[:8], "big") / 2**64
    # sha256("abc") begins with ba7816bf 8f01cfea.
    assert prompt_hash("abc") == 0xBA7816BF8F01CFEA / 2**64


@given(prompt=PROMPTS | TEXTS, share=st.floats(0, 1))
def test_a_hash_lies_between_0_and_1_and_a_larger_share_holds_out_all_of_a_smaller_one(prompt, share):
    assert 0 <= prompt_hash(prompt) < 1
    assert not is_held_out(prompt, 0)
    if is_held_out(prompt, share / 2):
        assert is_held_out(prompt, share)


def split_of(items: list, share: float) -> tuple[list, list]:
    return tuple(list(split_by_hash(iter(items), split, share)) for split in ("train", "test"))


def test_without_a_held_out_share_each_item_is_trained_on_once_whatever_it_comes_from():
    items = [("p", {"sft_target": "a"}), ("q", {"sft_target": "b"})]
    assert list(split_by_hash(items, "train", 0)) == items
    assert list(split_by_hash(items, "test", 0)) == []


def test_what_a_tool_returns_may_be_white_space():
    assert item_error(((Turn("user", "q"), CALL, Turn("tool", " \n")), SOUND)) is None


MANY_PROMPTS = PROMPTS | st.integers(0, 100).map(str) | st.integers(0, 20).map(lambda number: (Turn("user", str(number)),))
SHARES = st.sampled_from([1e-12, 0.01, 0.05, 0.3, 0.9, 0.999])


@settings(max_examples=500)
@given(prompts=st.lists(MANY_PROMPTS, max_size=30), share=SHARES, shuffle=st.randoms(use_true_random=False))
def test_train_and_test_are_disjoint_and_complete_whatever_the_order_of_items(prompts, share, shuffle):
    items = [(prompt, {"number": number}) for number, prompt in enumerate(prompts)]
    train, test = split_of(items, share)
    assert sorted(record["number"] for _, record in train + test) == list(range(len(items)))
    assert all(prompts[record["number"]] == prompt for prompt, record in train + test)
    held_out = {prompt for prompt, _ in test}
    assert not held_out & {prompt for prompt, _ in train}
    # By the hash alone, or where that takes none, the prompt with the smallest one; a single prompt is trained on.
    by_hash = {prompt for prompt in prompts if prompt_hash(prompt) < share}
    smallest = {min(set(prompts), key=prompt_hash)} if len(set(prompts)) > 1 else set()
    assert held_out == (by_hash or smallest)

    shuffle.shuffle(items)
    again_train, again_test = split_of(items, share)
    assert {prompt for prompt, _ in again_test} == held_out
    assert {record["number"] for _, record in again_train} == {record["number"] for _, record in train}


@given(prompts=st.lists(MANY_PROMPTS, max_size=30))
def test_a_share_of_0_holds_out_nothing_and_changes_no_order(prompts):
    items = [(prompt, {}) for prompt in prompts]
    assert split_of(items, 0) == (items, [])


def test_of_two_prompts_one_is_held_out_with_all_its_items_and_a_single_one_is_trained_on():
    twice = [("p", {"number": 0}), ("q", {"number": 1}), ("p", {"number": 2}), ("q", {"number": 3})]
    smaller = min("pq", key=prompt_hash)
    train, test = split_of(twice, 1e-12)
    assert test == [item for item in twice if item[0] == smaller]
    assert train == [item for item in twice if item[0] != smaller]
    single = [("p", {}), ("p", {})]
    assert split_of(single, 1e-12) == (single, [])


def test_items_stream_through_a_split():
    endless = ((str(number), {}) for number in count())
    found = [prompt for prompt, _ in islice(split_by_hash(endless, "test", 0.1), 3)]
    assert found == list(islice((str(number) for number in count() if prompt_hash(str(number)) < 0.1), 3))
    # Before any prompt is held out, only those with the smallest hash so far wait.
    endless = ((str(number), {}) for number in count())
    numbers = [int(prompt) for prompt, _ in islice(split_by_hash(endless, "train", 1e-12), 50)]
    assert len(set(numbers)) == 50
    assert max(numbers) == 50


def test_about_the_share_of_the_prompts_is_held_out():
    items = [(str(number), {}) for number in range(2000)]
    # Binomial(2000, 0.05) has a standard deviation of 9.7; the hash is fixed, so that this cannot fail by chance.
    assert abs(len(split_of(items, 0.05)[1]) - 100) < 40
