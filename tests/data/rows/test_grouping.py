"""How rows of a prompt come together: pairs, scored and labeled responses, and which of them SFT learns."""

import json
import time
from collections import Counter
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.records.record import Turn
from preference_training.data.records.report import SAME_TEXT, DataReport
from preference_training.data.rows import grouping
from preference_training.data.rows.grouping import (
    BOTH_LABELS,
    EQUAL_SCORES,
    NO_PAIR,
    SAME_RESPONSE,
    TOO_MANY_PAIRS,
    Row,
    add_responses,
    group_rows,
    new_record,
    pairs_by_score,
    scored_record,
)

# Few different values, so that equal ones meet often.
PROMPTS = st.sampled_from(["p", "q", (Turn("user", "p"),), (Turn("system", "s"), Turn("user", "p"))])
ANSWERS = st.sampled_from(["a", "b", "c", "d"])
SCORES = st.sampled_from([-1.0, 0.0, 0.5, 7.0])


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


def test_of_more_pairs_than_fit_some_of_each_response_are_taken_and_the_others_are_counted(monkeypatch):
    monkeypatch.setattr(grouping, "MOST_PAIRS", 500)
    report, scores = DataReport(), [1.0] * 50 + [0.0] * 50
    rows = [scored_row("p", f"a{n}", score) for n, score in enumerate(scores)]
    ((_, record),) = group_rows(rows, report)
    pairs = record["pairs"]
    assert all(scores[better] > scores[worse] for better, worse in pairs)
    assert len(pairs) == len(set(pairs)) and 200 < len(pairs) <= 500
    assert set(Counter(index for pair in pairs for index in pair)) == set(range(100))
    # 2,500 pairs differ; of each score 50 responses are equal.
    assert report.left_out == {TOO_MANY_PAIRS: 2500 - len(pairs), EQUAL_SCORES: 2 * 50 * 49 // 2}


def test_many_rows_of_one_prompt_take_no_time():
    rows = [pair_row("p", f"a{n}", f"b{n}") for n in range(20_000)]
    started = time.process_time()
    ((_, record),) = group_rows(rows, DataReport())
    assert len(record["responses"]) == 40_000 and time.process_time() - started < 5


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
        ),
        # Nothing to compare, and something for SFT.
        ("q", {"responses": ["only"], "pairs": [], "sft_target": "only", "scores": [5]}),
    ]
    assert report.left_out == {EQUAL_SCORES: 1}


def test_sft_learns_every_answer_with_the_best_score_of_its_prompt():
    report = DataReport()
    ((_, tied),) = group_rows([scored_row("p", "a", 2), scored_row("p", "b", 2)], report)
    assert (tied["pairs"], tied["sft_targets"], report.left_out) == ([], ["a", "b"], {EQUAL_SCORES: 1})
    ((_, best),) = group_rows([scored_row("p", text, score) for text, score in (("a", 3), ("b", 1), ("c", 3))], DataReport())
    assert (best["pairs"], best["sft_targets"], best["sft_target"]) == ([(0, 1), (2, 1)], ["a", "c"], "c")


def test_pairs_and_scored_responses_of_a_prompt_are_one_record():
    weighted = pair_row("p", "x", "y")._replace(weights=[0.5])
    rows = [scored_row("p", "a", 1.0), weighted, scored_row("p", "b", 2.0)]
    assert list(group_rows(rows, DataReport())) == [
        ("p", {
            "responses": ["x", "y", "a", "b"], "pairs": [(0, 1), (3, 2)], "sft_target": "b", "weights": [0.5, 1.0],
            "sft_targets": ["x", "b"], "scores": [None, None, 1.0, 2.0],
        }),
    ]  # fmt: skip
    report = DataReport()
    ((_, record),) = group_rows([*rows[:2], scored_row("p", "b", 1.0)], report)
    assert (record["responses"], record["pairs"]) == (["x", "y", "a", "b"], [(0, 1)])
    assert (record["sft_targets"], report.left_out) == (["x", "a", "b"], {EQUAL_SCORES: 1})


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
        assert bool(record["pairs"]) == (len(set(record["scores"])) > 1)
        assert all(max(scores[better]) > min(scores[worse]) for better, worse in record["pairs"])


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


# ---- lists, labels, and numbers of pairs --------------------------------------------------------------------------------


def labeled_row(prompt, response: str, label: bool) -> Row:
    return Row(prompt, [response], [], 0, labels=[label])


def test_labeled_responses_of_a_prompt_form_one_record():
    rows = [labeled_row("p", "a", True), labeled_row("q", "b", False), labeled_row("p", "c", False)]
    report = DataReport()
    assert list(group_rows(rows, report)) == [
        (
            "p",
            {"responses": ["a", "c"], "pairs": [], "sft_target": "c", "sft_targets": ["a", "c"], "labels": [True, False]},
        ),
        ("q", {"responses": ["b"], "pairs": [], "sft_target": "b", "labels": [False]}),
    ]
    assert report == DataReport()


def test_a_response_that_is_labeled_both_ways_has_no_label_and_is_counted_once():
    rows = [labeled_row("p", "a", True), labeled_row("p", "a", False), labeled_row("p", "a", True), labeled_row("p", "b", True)]
    report = DataReport()
    ((_, record),) = group_rows(rows, report)
    assert (record["responses"], record["labels"]) == (["a", "b"], [None, True])
    assert report.left_out == {BOTH_LABELS: 1}


def test_a_label_beside_no_label_is_the_label():
    rows = [Row("p", ["a", "b"], [(0, 1)], 0, labels=[None, False]), Row("p", ["a", "b"], [(0, 1)], 0, labels=[True, None])]
    report = DataReport()
    ((_, record),) = group_rows(rows, report)
    assert record["labels"] == [True, False] and report.left_out == {}


def test_lists_keep_their_scores_and_form_no_pairs_with_other_rows():
    rows = [Row("p", ["a", "b"], [(0, 1)], 0, [2, 1]), Row("p", ["c", "a"], [(1, 0)], 1, [0, 3])]
    ((_, record),) = group_rows(rows, DataReport())
    assert (record["responses"], record["pairs"]) == (["a", "b", "c"], [(0, 1), (0, 2)])
    # Of a response with several scores the last counts.
    assert record["scores"] == [3, 1, 0]


def test_weights_and_margins_stay_with_their_pairs():
    rows = [
        Row("p", ["a", "b"], [(0, 1)], 0, weights=[2.0], margins=[0.5]),
        Row("p", ["c", "c", "a"], [(0, 1), (0, 2)], 0, weights=[7.0, 3.0], margins=[7.0, -1.0]),
    ]
    report = DataReport()
    ((_, record),) = group_rows(rows, report)
    assert (record["pairs"], record["weights"], record["margins"]) == ([(0, 1), (2, 0)], [2.0, 3.0], [0.5, -1.0])
    assert report.left_out == {SAME_TEXT: 1}


# ---- rows that are records --------------------------------------------------------------------------------------------------


def records_in(tmp_path, *rows: dict, **entry) -> tuple[dict, DataReport]:
    """What training reads of a file of rows: prompt -> record."""
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = read_entry({"path": str(path), "held_out_share": 0, **entry})
    report = parsed.report()
    return {record.prompt: record for record in load_records(parsed, "train", report)}, report


def test_a_row_that_is_a_record_is_read_as_it_is(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": "q", "responses": ["q a", "q b"], "pairs": [[1, 0]], "sft_target": "q c", "labels": [False, True]},
        {"prompt": turns, "responses": ["x", "y", "z"], "pairs": [[0, 1], [0, 2]], "sft_target": None, "ranks": [1, 2, 2]},
        {"prompt": "r", "responses": ["both", "bad"], "pairs": [], "sft_target": None, "labels": [False, False]},
    ]
    found, report = records_in(tmp_path, *rows)
    # Responses that repeat their prompt do so on purpose: they were judged like that.
    edited = found["q"]
    assert (edited.responses, edited.pairs, edited.sft_target) == (["q a", "q b", "q c"], [(1, 0)], "q c")
    assert edited.labels == [False, True, None]
    ranked = found[(Turn("user", "q"),)]
    assert (ranked.pairs, ranked.sft_target, ranked.scores) == ([(0, 1), (0, 2)], "x", [-1, -2, -2])
    assert (found["r"].pairs, found["r"].labels) == ([], [False, False])
    assert report.lines() == ["records of `responses`, `pairs` and `sft_target`"]


def test_judgments_of_one_prompt_are_joined_and_opposite_labels_cancel(tmp_path):
    picked = {"prompt": "q", "responses": ["a", "b"], "pairs": [[0, 1]], "sft_target": "a", "labels": [True, False]}
    bad = picked | {"pairs": [], "sft_target": None, "labels": [False, False]}
    found, report = records_in(tmp_path, picked, bad)
    assert (found["q"].pairs, found["q"].labels) == ([(0, 1)], [None, False])
    assert report.left_out == {BOTH_LABELS: 1}
    # What one found best is learned once: the other judgment has no target.
    assert found["q"].targets == ("a",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"responses": []}, "field 'responses' is not a list of texts or conversations."),
        ({"responses": ["a", None]}, "field 'responses': response 1 is null, expected a text."),
        ({"pairs": [[0, 2]]}, "pair (0, 2) does not name two of the 2 responses."),
        ({"pairs": 3}, "pairs is int, expected a list."),
        ({"labels": [1, 0]}, "labels 0 is 1, expected True, False or None."),
        ({"ranks": [1]}, "field 'ranks' is [1], expected a list of 2 numbers, one for each response."),
        ({"ranks": 1}, "field 'ranks' is 1, expected a list of 2 numbers"),
        ({"prompt": None}, "field 'prompt' is null, expected a text."),
    ],
)
def test_a_faulty_record_is_refused_with_its_row(tmp_path, change, said):
    row = {"prompt": "q", "responses": ["a", "b"], "pairs": [[0, 1]], "sft_target": "a", "labels": None, "ranks": None}
    with pytest.raises(UserError) as caught:
        records_in(tmp_path, row, row | change)
    assert f"records.jsonl, row 2: {said}" in str(caught.value)
