"""Records as text: what is counted, which faults are told, how rows of a prompt come together, and who is held out."""

import hashlib
import json
from collections import Counter
from itertools import combinations, count, islice

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.rows.grouping import (
    EQUAL_SCORES,
    NO_PAIR,
    SAME_RESPONSE,
    Row,
    add_responses,
    group_rows,
    new_record,
    pairs_by_score,
    scored_record,
)
from preference_training.data.rows.records import (
    SAME_TEXT,
    DataReport,
    Turn,
    is_held_out,
    item_error,
    prompt_error,
    prompt_hash,
    split_by_hash,
    text_error,
    type_name,
)

# Few different values, so that equal ones meet often.
PROMPTS = st.sampled_from(["p", "q", (Turn("user", "p"),), (Turn("system", "s"), Turn("user", "p"))])
ANSWERS = st.sampled_from(["a", "b", "c", "d"])
SCORES = st.sampled_from([-1.0, 0.0, 0.5, 7.0])
TEXTS = st.text(min_size=1).filter(lambda text: text_error(text) is None)

# ---- the report ---------------------------------------------------------------------------------------------------------


def test_a_bad_row_stops_the_run_and_its_message_names_the_remedy():
    report, fault = DataReport(), UserError("datasets: rows.jsonl, row 3: no text.")
    with pytest.raises(UserError) as refusal:
        report.bad_row(fault)
    assert str(refusal.value) == ("datasets: rows.jsonl, row 3: no text. Fix the row, or skip such rows with on_bad_row=skip.")
    assert refusal.value.__cause__ is fault
    assert report == DataReport()


def test_skipped_rows_are_counted_and_the_first_ten_are_listed_by_the_first_line_of_their_message():
    report = DataReport(skip_bad_rows=True)
    for number in range(1, 13):
        report.bad_row(UserError(f"row {number} is bad\nand this is why"))
    assert report.num_bad_rows == 12
    assert report.bad_rows == [f"row {number} is bad" for number in range(1, 11)]
    assert report.lines() == ["12 bad rows skipped", *(f"  row {number} is bad" for number in range(1, 11))]


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
        (None, "is None, expected a text"),
        (5, "is int, expected a text"),
        (b"bytes", "is bytes, expected a text"),
        (["a"], "is list, expected a text"),
        ("\ud83d", "holds half a surrogate pair ('\\ud83d' at character 0), which is not text"),
        ("two \udc00\udc01", "holds half a surrogate pair ('\\udc00' at character 4), which is not text"),
    ],
)
def test_a_value_that_is_no_text_is_reported_with_what_it_is(text, fault):
    assert text_error(text) == fault
    assert prompt_error(text) == fault


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


LAST_TURN = "is a conversation whose last turn is not the user's"


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ((), LAST_TURN),
        ((Turn("user", "q"), Turn("assistant", "a")), LAST_TURN),
        ((Turn("system", "s"),), LAST_TURN),
        (
            (Turn("user", "q"), Turn("human", "q")),
            "has a turn 2 that is not (role, content) with one of the roles system, user",
        ),
        ((("user", "q", "more"),), "has a turn 1 that is not (role, content)"),
        ((("user",),), "has a turn 1 that is not (role, content)"),
        (({"role": "user", "content": "q"},), "has a turn 1 that is not (role, content)"),
        (("user", "q"), "has a turn 1 that is not (role, content)"),
        ((Turn(["user"], "q"),), "has a turn 1 that is not (role, content)"),
        ((Turn(numpy.array(["user", "user"]), "q"),), "has a turn 1 that is not (role, content)"),
        ((Turn("system", ""), Turn("user", "q")), "has a turn 1 that is empty"),
        ((Turn("user", None),), "has a turn 1 that is None, expected a text"),
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
    ],
)
def test_a_conversation_that_ends_with_the_user_is_valid(prompt):
    assert prompt_error(prompt) is None


SOUND = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        (("", SOUND), "the prompt is empty"),
        (((Turn("assistant", "a"),), SOUND), f"the prompt {LAST_TURN}"),
        (("p", SOUND | {"responses": ["a", " "]}), "response 1 is empty"),
        (("p", SOUND | {"sft_target": ""}), "sft_target is empty"),
        (("p", SOUND | {"sft_target": None}), "sft_target is None, expected a text"),
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


@settings(max_examples=300)
@given(item=JUNK | st.tuples(JUNK, JUNK), record=st.fixed_dictionaries({key: st.just(SOUND[key]) | JUNK for key in SOUND}))
def test_any_junk_is_reported_with_its_error_and_never_raises(item, record):
    assert isinstance(item_error(item), str | None)
    fault = item_error(("p", record))
    assert isinstance(fault, str | None)
    if fault is None:
        assert all(isinstance(text, str) for text in [*record["responses"], record["sft_target"]])


# ---- building records ---------------------------------------------------------------------------------------------------


def test_a_response_that_a_record_has_is_not_stored_twice_and_pairs_refer_to_its_first_place():
    record = new_record()
    assert add_responses(record, ["good", "bad"], [(0, 1)]) == 0
    assert add_responses(record, ["worse", "bad", "good"], [(2, 0), (1, 0)]) == 0
    # worse is the third text; of the second call's indices 2 is good, 0 is worse and 1 is bad.
    assert record == {"responses": ["good", "bad", "worse"], "pairs": [(0, 1), (0, 2), (1, 2)], "sft_target": None}


def test_pairs_of_the_same_text_are_counted_and_not_added():
    record = new_record()
    assert add_responses(record, ["a", "a", "b"], [(0, 1), (0, 2), (1, 0)]) == 2
    assert (record["responses"], record["pairs"]) == (["a", "b"], [(0, 1)])


@given(scores=st.lists(SCORES, max_size=8))
def test_pairs_by_score_are_all_pairs_of_different_scores_with_the_higher_one_first(scores):
    pairs = pairs_by_score(scores)
    assert all(scores[better] > scores[worse] for better, worse in pairs)
    assert [tuple(sorted(pair)) for pair in pairs] == [
        (i, j) for i in range(len(scores)) for j in range(i + 1, len(scores)) if scores[i] != scores[j]
    ]


def pair_row(prompt, chosen: str, rejected: str) -> Row:
    return Row(prompt, [chosen, rejected], [(0, 1)], 0)


def scored_row(prompt, response: str, score: float) -> Row:
    return Row(prompt, [response], [], 0, [score], forms_pairs=True)


def test_rows_of_a_prompt_form_one_record_in_the_order_of_first_rows():
    rows = [pair_row("p", "a", "b"), pair_row("q", "x", "y"), pair_row("p", "b", "c")]
    report = DataReport()
    assert list(group_rows(rows, report)) == [
        ("p", {"responses": ["a", "b", "c"], "pairs": [(0, 1), (1, 2)], "sft_target": "b", "sft_targets": ["a", "b"]}),
        ("q", {"responses": ["x", "y"], "pairs": [(0, 1)], "sft_target": "x"}),
    ]
    assert report == DataReport()


def test_rows_of_a_prompt_far_apart_are_records_of_their_own():
    rows = [pair_row(prompt, "a", "b") for prompt in ("p", "q", "r", "p")]
    assert [prompt for prompt, _ in group_rows(rows, DataReport(), window=3)] == ["p", "q", "r"]
    # With two open prompts, p is closed when r comes, and opened anew.
    assert [prompt for prompt, _ in group_rows(rows, DataReport(), window=2)] == ["p", "q", "r", "p"]


def test_no_more_than_the_window_of_rows_is_read_ahead():
    endless = (pair_row(f"p{number}", "a", "b") for number in count())
    records = group_rows(endless, DataReport(), window=5)
    assert [prompt for prompt, _ in islice(records, 3)] == ["p0", "p1", "p2"]
    # The third record is closed by the eighth row; the ninth has not been read.
    assert next(endless).prompt == "p8"


def test_a_prompt_whose_pairs_are_all_of_the_same_text_is_skipped_and_its_pairs_are_counted():
    report = DataReport()
    rows = [pair_row("p", "a", "a"), pair_row("q", "a", "b"), pair_row("q", "c", "c")]
    ((prompt, record),) = group_rows(rows, report)
    # The last row of q has no pair, so that the target stays that of the row before.
    assert (prompt, record["pairs"], record["sft_target"]) == ("q", [(0, 1)], "a")
    assert report.left_out == {SAME_TEXT: 2}


def test_a_row_whose_pairs_are_all_of_the_same_text_does_not_set_the_target():
    rows = [pair_row("p", "good", "bad"), Row("p", ["a", "a", "b"], [(0, 1)], 0)]
    ((_, record),) = group_rows(rows, DataReport())
    assert record["sft_target"] == "good"


def test_rows_with_one_response_and_without_a_score_are_records_by_themselves_at_once():
    endless = (Row("p", [f"answer {number}"], [], 0) for number in count())
    assert list(islice(group_rows(endless, DataReport()), 2)) == [
        ("p", {"responses": ["answer 0"], "pairs": [], "sft_target": "answer 0"}),
        ("p", {"responses": ["answer 1"], "pairs": [], "sft_target": "answer 1"}),
    ]


def test_scored_responses_of_a_prompt_form_pairs_and_the_best_is_the_target():
    rows = [scored_row("p", "low", 1), scored_row("q", "only", 5), scored_row("p", "high", 3), scored_row("p", "also low", 1)]
    report = DataReport()
    assert list(group_rows(rows, report)) == [
        (
            "p",
            {"responses": ["low", "high", "also low"], "pairs": [(1, 0), (1, 2)], "sft_target": "high", "scores": [1, 3, 1]},
        )
    ]
    assert report.left_out == {EQUAL_SCORES: 1, NO_PAIR: 1}


def test_a_conversation_and_a_text_of_the_same_words_are_different_prompts():
    rows = [pair_row("p", "a", "b"), pair_row((Turn("user", "p"),), "a", "b"), pair_row((Turn("system", "p"),), "a", "b")]
    assert [prompt for prompt, _ in group_rows(rows, DataReport())] == [row.prompt for row in rows]


@settings(max_examples=300)
@given(rows=st.lists(st.builds(pair_row, PROMPTS, ANSWERS, ANSWERS), max_size=20), window=st.integers(1, 6))
def test_no_pair_is_lost_or_made_up_whatever_the_window(rows, window):
    report = DataReport()
    records = list(group_rows(rows, report, window))
    texts = [(prompt, record["responses"][i], record["responses"][j]) for prompt, record in records for i, j in record["pairs"]]
    expected = [(row.prompt, *row.responses) for row in rows if row.responses[0] != row.responses[1]]
    assert Counter(texts) == Counter(expected)
    assert report.left_out.get(SAME_TEXT, 0) == len(rows) - len(expected)
    for _, record in records:
        assert len(set(record["responses"])) == len(record["responses"])
        assert {index for pair in record["pairs"] for index in pair} == set(range(len(record["responses"])))
        assert record["sft_target"] in {record["responses"][better] for better, _ in record["pairs"]}


@given(rows=st.lists(st.builds(pair_row, PROMPTS, ANSWERS, ANSWERS), max_size=20), window=st.integers(1, 6))
def test_sft_learns_the_preferred_response_of_each_usable_row_whatever_the_window(rows, window):
    records = group_rows(rows, DataReport(), window)
    learned = [(prompt, text) for prompt, record in records for text in record.get("sft_targets", [record["sft_target"]])]
    assert Counter(learned) == Counter((row.prompt, row.responses[0]) for row in rows if row.responses[0] != row.responses[1])


@pytest.mark.parametrize(
    ("targets", "fault"),
    [("a", "sft_targets is str, expected a list"), (["a", ""], "sft_targets 1 is empty"), ([], None), (["a"], None)],
)
def test_several_sft_targets_are_a_list_of_texts(targets, fault):
    assert item_error(("p", SOUND | {"sft_targets": targets})) == fault


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


@given(rows=st.lists(st.builds(pair_row, PROMPTS, ANSWERS, ANSWERS), max_size=20))
def test_with_room_for_all_prompts_each_has_one_record_whose_target_is_the_last_preferred_response(rows):
    records = list(group_rows(rows, DataReport()))
    usable = [row for row in rows if row.responses[0] != row.responses[1]]
    last = {row.prompt: row.responses[0] for row in usable}
    assert {prompt: record["sft_target"] for prompt, record in records} == last
    assert [prompt for prompt, _ in records] == list(last)


@given(rows=st.lists(st.builds(scored_row, PROMPTS, ANSWERS, SCORES), max_size=20), window=st.sampled_from([1, 2, 100]))
def test_the_better_of_two_scored_rows_is_preferred_whatever_the_window(rows, window):
    said = {(row.prompt, row.responses[0], row.scores[0]) for row in rows}
    for prompt, record in group_rows(rows, DataReport(), window):
        scores = [{score for p, text, score in said if (p, text) == (prompt, response)} for response in record["responses"]]
        assert record["pairs"]
        assert all(max(scores[better]) > min(scores[worse]) for better, worse in record["pairs"])


# ---- answers with scores ------------------------------------------------------------------------------------------------


def test_every_pair_of_different_scores_is_formed_and_the_others_are_counted():
    report = DataReport()
    record = scored_record(["a", "b", "c"], [3, 3, 5], report)
    assert record == {"responses": ["a", "b", "c"], "pairs": [(2, 0), (2, 1)], "sft_target": "c", "scores": [3, 3, 5]}
    assert report.left_out == {EQUAL_SCORES: 1}


def test_of_responses_with_the_same_text_the_last_counts():
    report = DataReport()
    record = scored_record(["a", "b", "a"], [1, 2, 4], report)
    assert record == {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a", "scores": [4, 2]}
    assert report.left_out == {SAME_RESPONSE: 1}


@pytest.mark.parametrize(("responses", "scores"), [([], []), (["a"], [1]), (["a", "b"], [2, 2]), (["a", "a"], [1, 2])])
def test_responses_without_any_pair_are_no_record_and_counted(responses, scores):
    report = DataReport()
    assert scored_record(responses, scores, report) is None
    assert report.left_out[NO_PAIR] == 1


@given(answers=st.lists(st.tuples(ANSWERS, SCORES), max_size=8))
def test_pairs_of_responses_and_what_is_skipped_add_up(answers):
    report = DataReport()
    record = scored_record([text for text, _ in answers], [score for _, score in answers], report)
    score_of = dict(answers)
    size = len(score_of)
    formed = len(record["pairs"]) if record else 0
    assert formed + report.left_out.get(EQUAL_SCORES, 0) == size * (size - 1) // 2
    assert report.left_out.get(SAME_RESPONSE, 0) == len(answers) - size
    assert report.left_out.get(NO_PAIR, 0) == (record is None) == (len(set(score_of.values())) < 2)
    if record:
        assert record["responses"] == list(score_of)
        assert score_of[record["sft_target"]] == max(score_of.values())
        assert all(score_of[record["responses"][i]] > score_of[record["responses"][j]] for i, j in record["pairs"])


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
