"""The loaders against golden records, what is said about faulty ones, and how files are split."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_datasets import hh_records, shp_records, stack_exchange_records
from preference_training.core.errors import UserError
from preference_training.data import hub_sets
from preference_training.data.entries import load_records, read_entry
from preference_training.data.records.held_out import is_held_out, prompt_hash
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import DataReport
from preference_training.data.registry import DATASETS, Dataset, find_dataset, register
from preference_training.data.rows.templates import split_dialogue
from preference_training.data.sources.html_text import html_to_text
from preference_training.data.toy_preferences import TEST_PROMPTS, TRAIN_PROMPTS, response_kind
from tests.support.files import DATA_SUFFIXES, write

LOADERS = {"hh": hh_records, "shp": shp_records, "se": stack_exchange_records}
FIX = " Fix the row, or skip such rows with on_bad_row=skip."
# Hypothesis runs one function many times; each example writes its own file, so that sharing tmp_path is harmless.
SHARES_FOLDER = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def registry():
    """The registry, put back as it was after each test."""
    known = dict(DATASETS)
    yield DATASETS
    DATASETS.clear()
    DATASETS.update(known)


def load(name, split: str = "train", share: float = 0.05, **options) -> Iterator[PreferenceRecord]:
    """The records of a name or path, as an entry of `datasets` gives them."""
    return load_records(read_entry(str(name), {"held_out_share": share}), split, **options)


def made(loader, rows: list[dict], report: DataReport | None = None, **options) -> list[tuple[str, dict]]:
    """What a loader of a hub set makes of rows, which are numbered from 1."""
    items = loader(enumerate(rows, start=1), report if report is not None else DataReport(), **options)
    return list(items.items() if isinstance(items, dict) else items)


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def triplets(count: int) -> list[dict]:
    return [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]


def prompts_of(path: Path, split: str, share: float = 0.05) -> list[str]:
    return [record.prompt for record in load(path, split, share)]


# ---- golden records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_makes_the_golden_records_in_the_golden_order(golden, name):
    case = golden("loaders.json")[name]
    found = [{"prompt": prompt, **record} for prompt, record in made(LOADERS[name], case["rows"])]
    for record in found:
        record["pairs"] = [list(pair) for pair in record["pairs"]]
        scores = record.pop("scores", None)
        assert scores is None or all(scores[i] > scores[j] for i, j in record["pairs"])
    assert found == case["expect"]


@pytest.mark.parametrize("name", LOADERS)
def test_the_golden_records_are_valid(golden, registry, name):
    rows = golden("loaders.json")[name]["rows"]
    registry["golden"] = Dataset(lambda *_, **__: made(LOADERS[name], rows))
    assert len(list(load("golden"))) == len(golden("loaders.json")[name]["expect"])


# ---- the registry -------------------------------------------------------------------------------------------------------


def test_a_decorated_function_is_a_data_set_known_by_its_name():
    @register("mine", truncation_mode="keep_end")
    def get_mine(split, silent=False, cache_dir=None):
        return {f"{split} prompt": {"responses": ["a", "b"], "pairs": [(1, 0)], "sft_target": f"{silent} {cache_dir}"}}

    (record,) = load("mine", "test", cache_dir="there")
    assert (record.prompt, record.responses, record.pairs) == ("test prompt", ["a", "b"], [(1, 0)])
    assert record.sft_target == "False there"
    assert (record.source, record.number) == ("mine, test prompt 1", 1)
    assert read_entry("mine").dataset.truncation_mode == "keep_end"
    assert get_mine("train")["train prompt"]["sft_target"] == "False None"


def test_dialogues_and_files_keep_the_end_of_a_prompt_and_the_others_its_start(tmp_path):
    path = write(tmp_path / "rows.jsonl", triplets(1))
    modes = {name: read_entry(name).dataset.truncation_mode for name in ("toy", "hh", "shp", "se", str(path))}
    assert modes == {"toy": "keep_start", "hh": "keep_end", "shp": "keep_start", "se": "keep_start", str(path): "keep_end"}


@pytest.mark.parametrize(("name", "meant"), [("tpy", "toy"), ("shpp", "shp"), ("hhh", "hh")])
def test_an_unknown_name_is_refused_with_the_nearest_one(name, meant):
    with pytest.raises(UserError, match=f"unknown data set '{name}'; did you mean {meant}"):
        find_dataset(name)


def test_a_name_near_no_other_is_refused_with_all_names_endings_and_the_form_of_an_own_loader():
    with pytest.raises(UserError, match=r"known are: .*hh, .* shp, toy, .*\. A file must end in \.jsonl.*FILE\.py:NAME"):
        find_dataset("completely-else")
    for name in DATASETS:
        with pytest.raises(UserError, match=rf"known are: .*\b{name}\b.*\. A file"):
            find_dataset("completely-else")


def test_a_file_that_is_not_there_and_a_directory_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl: a directory"):
        read_entry(str(tmp_path / "folder.jsonl"))
    with pytest.raises(UserError, match=r"missing.csv: no such file.*relative to"):
        read_entry(str(tmp_path / "missing.csv"))


def test_entries_of_a_mixture_have_their_own_sources_numbers_and_truncation_modes(tmp_path):
    path = write(tmp_path / "rows.jsonl", triplets(40))
    entries = [read_entry(name) for name in ("toy", str(path))]
    assert [entry.dataset.truncation_mode for entry in entries] == ["keep_start", "keep_end"]
    toys, own = (list(load_records(entry, "train")) for entry in entries)
    assert len(toys) == TRAIN_PROMPTS and 0 < len(own) < 40
    assert [record.source for record in toys] == [f"toy, train prompt {n + 1}" for n in range(len(toys))]
    rows = [next(n for n, row in enumerate(triplets(40), start=1) if row["prompt"] == record.prompt) for record in own]
    assert [record.source for record in own] == [f"{path}, row {number}" for number in rows]
    for records in (toys, own):
        assert [record.number for record in records] == [n + 1 for n in range(len(records))]


# ---- loaders of the user's ----------------------------------------------------------------------------------------------

OWN_LOADERS = """
from __future__ import annotations

from dataclasses import dataclass

from preference_datasets import register


@dataclass
class Row:
    text: str


@register("as_dict", truncation_mode="keep_end")
def get_as_dict(split, silent=False, cache_dir=None):
    return {Row("p").text: {"responses": ["a", "b", "c"], "pairs": [(0, 1), (2, 1)], "sft_target": "a"}}


@register("as_generator")
def get_as_generator(split, silent=False, cache_dir=None):
    for number in range(3):
        yield f"{split} {number}", {"responses": ["x", "y"], "pairs": [(1, 0)], "sft_target": "y"}
"""


def test_a_loader_in_a_file_of_the_users_may_return_a_dict_or_yield_records(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_LOADERS)
    (record,) = load(f"{file}:as_dict")
    assert (record.prompt, record.pairs) == ("p", [(0, 1), (2, 1)])
    assert record.source == f"{file}:as_dict, train prompt 1"
    assert read_entry(f"{file}:as_dict").dataset.truncation_mode == "keep_end"
    assert [r.prompt for r in load(f"{file}:as_generator", "test")] == ["test 0", "test 1", "test 2"]


def test_a_name_of_a_file_of_the_users_is_known_with_its_file_only(tmp_path):
    (tmp_path / "own.py").write_text(OWN_LOADERS)
    find_dataset(f"{tmp_path}/own.py:as_dict")
    with pytest.raises(UserError, match="unknown data set 'as_dict'"):
        find_dataset("as_dict")


def test_a_generator_is_read_as_it_yields_and_not_collected_first():
    @register("endless")
    def get_endless(split, silent=False, cache_dir=None):
        number = 0
        while True:
            number += 1
            yield f"prompt {number}", {"responses": ["x"], "pairs": [], "sft_target": "x"}

    records = load("endless")
    assert [next(records).prompt for _ in range(3)] == ["prompt 1", "prompt 2", "prompt 3"]


def test_two_files_may_use_the_same_name_and_neither_hides_the_others_or_a_built_in_one(tmp_path):
    for text in ("first", "second"):
        record = {"responses": ["x"], "pairs": [], "sft_target": "x"}
        (tmp_path / f"{text}.py").write_text(
            "from preference_datasets import register\n"
            f"@register('toy')\ndef load(split, silent=False, cache_dir=None):\n    return {{{text!r}: {record}}}\n"
        )
    names = [f"{tmp_path}/first.py:toy", f"{tmp_path}/second.py:toy"]
    for name in names:  # as the check of a configuration does, before anything is loaded
        find_dataset(name)
    assert [record.prompt for name in names for record in load(name)] == ["first", "second"]
    assert len(list(load("toy", "test"))) == TEST_PROMPTS


def test_a_file_of_the_users_hides_no_module_of_the_same_name(tmp_path):
    (tmp_path / "utils.py").write_text(OWN_LOADERS)
    find_dataset(f"{tmp_path}/utils.py:as_dict")
    from preference_training.core import errors

    assert errors.UserError is UserError


def test_a_name_that_a_file_does_not_register_is_refused_with_the_nearest_that_it_does(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_LOADERS)
    with pytest.raises(UserError, match=r"registers no data set 'as_dictt'; did you mean as_dict\?"):
        find_dataset(f"{file}:as_dictt")
    with pytest.raises(UserError, match="registers no data set 'toy'"):
        find_dataset(f"{file}:toy")
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match="it registers none"):
        find_dataset(f"{tmp_path}/empty.py:x")


def test_a_missing_file_of_loaders_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file\. Expected a Python file that registers 'x'"):
        find_dataset(f"{tmp_path}/missing.py:x")


# ---- faults of records --------------------------------------------------------------------------------------------------

SOUND = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        (("p", SOUND | {"pairs": [(0, 2)]}), r"pair \(0, 2\) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(-1, 0)]}), r"pair \(-1, 0\) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(1, 1)]}), r"pair \(1, 1\) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(0, 1, 1)]}), r"pair \(0, 1, 1\) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [("0", "1")]}), r"pair \('0', '1'\) is not two whole numbers"),
        (("p", SOUND | {"pairs": [(0.0, 1.0)]}), r"pair \(0.0, 1.0\) is not two whole numbers"),
        (("p", SOUND | {"pairs": [(False, True)]}), r"pair \(False, True\) is not two whole numbers"),
        (("p", SOUND | {"pairs": [3]}), "pair 3 is not two whole numbers"),
        (("p", SOUND | {"pairs": None}), "pairs is None, expected a list"),
        (("p", SOUND | {"responses": "ab"}), "responses is str, expected a list"),
        (("p", SOUND | {"responses": ["a", 5]}), "response 1 is int, expected a text"),
        (("p", SOUND | {"responses": ["a", ""]}), "response 1 is empty"),
        (("p", SOUND | {"responses": [" \n\t", "b"]}), "response 0 is empty"),
        (("p", SOUND | {"sft_target": ""}), "sft_target is empty"),
        (("\n", SOUND), "the prompt is empty"),
        (
            ("p", SOUND | {"responses": ["a", "x\ud800"]}),
            r"response 1 holds half a surrogate pair \('\\ud800'",
        ),
        (("p", SOUND | {"sft_target": None}), "sft_target is null, expected a text"),
        (("p", {"responses": ["a"], "sft_target": "a"}), "the record has no pairs"),
        (("p", {}), "the record has no pairs, responses, sft_target"),
        (("p\udfff", SOUND), "the prompt holds half a surrogate pair"),
        ((7, SOUND), "the prompt is int, expected a text"),
        (("p", ["a", "b"]), "found str and list, expected a prompt and a dict"),
        (("p",), "found str, expected a prompt and a dict"),
        (SOUND, "found dict, expected a prompt and a dict"),
    ],
)
def test_an_invalid_record_is_refused_with_its_data_set_its_number_and_its_error(registry, item, fault):
    registry["mine"] = Dataset(lambda *_, **__: iter([("sound", SOUND), item]))
    records = load("mine")
    assert next(records).prompt == "sound"
    with pytest.raises(UserError, match=f"^datasets: mine, train prompt 2: {fault}") as refusal:
        next(records)
    assert str(refusal.value).endswith(". Expected {responses, pairs, sft_target} as in preference_datasets.py." + FIX)


def test_invalid_records_may_be_skipped_and_are_counted_and_the_others_keep_their_numbers(registry):
    items = [("one", SOUND), ("two", SOUND | {"pairs": [(0, 2)]}), ("three", SOUND), ("four", {}), ("five", SOUND)]
    registry["mine"] = Dataset(lambda *_, **__: iter(items))
    entry = read_entry({"name": "mine", "on_bad_row": "skip"})
    report = entry.report()
    assert [(record.prompt, record.number) for record in load_records(entry, "train", report)] == [
        ("one", 1), ("three", 3), ("five", 5),
    ]  # fmt: skip
    assert report.num_bad_rows == 2
    assert [message[:32] for message in report.bad_rows] == [f"datasets: mine, train prompt {n}: " for n in (2, 4)]


def test_a_loader_that_returns_nothing_is_refused(registry):
    registry["mine"] = Dataset(lambda *_, **__: None)
    with pytest.raises(UserError, match="datasets: mine: the loader gave None, expected a dict"):
        list(load("mine"))


def test_numbers_of_other_libraries_serve_as_indices(registry):
    import numpy

    record = SOUND | {"pairs": [[numpy.int64(1), numpy.int32(0)]]}
    registry["mine"] = Dataset(lambda *_, **__: {"p": record})
    (found,) = load("mine")
    assert found.pairs == [(1, 0)]
    assert {type(index) for index in found.pairs[0]} == {int}


# ---- dialogues ----------------------------------------------------------------------------------------------------------


def test_a_dialogue_is_cut_after_its_last_assistant_turn():
    assert split_dialogue("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d") == (
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        " d",
    )


def test_dialogues_with_different_prompts_and_equal_responses_are_skipped_and_counted():
    rows = [
        {"chosen": dialogue("q", "good"), "rejected": dialogue("q", "bad")},
        {"chosen": dialogue("q", "good"), "rejected": dialogue("another q", "bad")},
        {"chosen": dialogue("q", "same"), "rejected": dialogue("q", "same")},
        {"chosen": dialogue("q", "equal"), "rejected": dialogue("q", "equal")},
    ]
    report = DataReport()
    assert made(hh_records, rows, report) == [
        ("\n\nHuman: q\n\nAssistant:", {"responses": [" good", " bad"], "pairs": [(0, 1)], "sft_target": " good"})
    ]
    assert report.rows_read == 4
    assert report.lines() == [
        "1 skipped: chosen and rejected have different prompts; 2 skipped: chosen and rejected are the same"
    ]


SOUND_DIALOGUE = {"chosen": dialogue("q", "good"), "rejected": dialogue("q", "bad")}
SAME_ANSWERS = {"chosen": dialogue("q", "x"), "rejected": dialogue("q", "x")}


@pytest.fixture
def on_the_hub(monkeypatch):
    """Put rows in the place of every set of the hub: `on_the_hub(rows)`."""
    import datasets

    def put(rows: list[dict]) -> None:
        monkeypatch.setattr(hub_sets, "load_hub", lambda *_: datasets.Dataset.from_list(rows))

    return put


def test_a_loader_that_is_called_without_a_report_says_once_what_it_skipped(on_the_hub, capsys):
    on_the_hub([SOUND_DIALOGUE, SAME_ANSWERS, SAME_ANSWERS])
    assert len(list(DATASETS["hh"].load("train"))) == 1
    assert capsys.readouterr().out.splitlines() == ["hh train: 2 skipped: chosen and rejected are the same"]


def test_nothing_is_said_where_nothing_was_skipped_or_silence_was_asked_for_or_a_report_counts(on_the_hub, capsys):
    on_the_hub([SOUND_DIALOGUE])
    list(DATASETS["hh"].load("train"))
    on_the_hub([SOUND_DIALOGUE, SAME_ANSWERS])
    list(DATASETS["hh"].load("train", silent=True))
    report = DataReport()
    assert len(list(load_records(read_entry("hh"), "train", report))) == 1
    assert capsys.readouterr().out == ""
    assert report.left_out == {"chosen and rejected are the same": 1}


def test_a_response_that_several_rows_share_is_stored_once_and_its_pairs_refer_to_it():
    answers = [("good", "bad"), ("good", "worse"), ("bad", "worse")]
    rows = [{"chosen": dialogue("q", better), "rejected": dialogue("q", worse)} for better, worse in answers]
    ((_, record),) = made(hh_records, rows)
    assert record["responses"] == [" good", " bad", " worse"]
    assert record["pairs"] == [(0, 1), (0, 2), (1, 2)]


# ---- SHP ----------------------------------------------------------------------------------------------------------------


def shp_row(a: str, b: str, score_a: int, score_b: int, history: str = "post") -> dict:
    labels = int(score_a >= score_b)
    return {"history": history, "human_ref_A": a, "human_ref_B": b, "score_A": score_a, "score_B": score_b, "labels": labels}


def test_scores_of_zero_and_below_count_as_one_and_divide_nothing_by_zero():
    # 0 : 1 and -5 : 1 are 1 : 1, below the ratio of 2; 0 : 2 is 1 : 2, and so is -3 : 2.
    rows = [
        shp_row("zero", "one", 0, 1, "left out"),
        shp_row("minus", "one", -5, 1, "left out"),
        shp_row("none", "none at all", 0, 0, "left out"),
        shp_row("zero", "two", 0, 2, "kept"),
        shp_row("two", "minus", 2, -3, "kept too"),
    ]
    assert {prompt: record["pairs"] for prompt, record in made(shp_records, rows)} == {
        "\n\nHuman: kept\n\nAssistant:": [(1, 0)],
        "\n\nHuman: kept too\n\nAssistant:": [(0, 1)],
    }


def test_a_comment_that_several_rows_compare_is_stored_once_and_the_best_scored_is_the_target():
    rows = [shp_row("a", "b", 10, 2), shp_row("c", "a", 40, 10), shp_row("b", "c", 2, 40)]
    ((_, record),) = made(shp_records, rows)
    assert record["responses"] == [" a", " b", " c"]
    assert record["pairs"] == [(0, 1), (2, 0), (2, 1)]
    assert record["sft_target"] == " c"


def test_shp_rows_below_the_score_ratio_with_equal_and_with_empty_comments_are_counted():
    rows = [shp_row("a", "b", 10, 2), shp_row("a", "c", 10, 6), shp_row("d", "d", 10, 2), shp_row("a", " \n", 10, 2)]
    report = DataReport()
    ((_, record),) = made(shp_records, rows, report)
    assert record["responses"] == [" a", " b"]
    assert report.rows_read == 4
    assert report.lines() == [
        "1 skipped: the scores' ratio is below 2; 1 skipped: chosen and rejected are the same; 1 skipped: a text is empty"
    ]


def test_the_score_ratio_from_which_shp_rows_count_is_an_option():
    rows = [shp_row("a", "b", 10, 6), shp_row("a", "c", 10, 5)]
    ((_, record),) = made(shp_records, rows)
    assert record["responses"] == [" a", " c"]
    ((_, record),) = made(shp_records, rows, min_score_ratio=1.5)
    assert record["responses"] == [" a", " b", " c"]


# ---- StackExchange ------------------------------------------------------------------------------------------------------


def test_responses_with_equal_scores_form_no_pair_and_are_counted():
    answers = [{"text": "<p>a</p>", "pm_score": 3}, {"text": "<p>b</p>", "pm_score": 3}, {"text": "<p>c</p>", "pm_score": 5}]
    rows = [{"question": "<p>q</p>", "answers": answers}, {"question": "<p>tied</p>", "answers": answers[:2]}]
    report = DataReport()
    ((prompt, record),) = made(stack_exchange_records, rows, report)
    assert prompt == "\n\nHuman: q\n\nAssistant:"
    assert record == {"responses": [" a", " b", " c"], "pairs": [(2, 0), (2, 1)], "sft_target": " c", "scores": [3, 3, 5]}
    assert report.lines() == ["2 skipped: two responses have equal scores; 1 skipped: no two responses have different scores"]


def test_responses_that_read_the_same_as_text_are_one_response_and_counted():
    answers = [("<p>a</p>", 1), ("<p><b>a</b></p>", 4), ("<p>b</p>", 2)]
    row = {"question": "q", "answers": [{"text": text, "pm_score": score} for text, score in answers]}
    report = DataReport()
    ((_, record),) = made(stack_exchange_records, [row], report)
    assert record == {"responses": [" a", " b"], "pairs": [(0, 1)], "sft_target": " a", "scores": [4, 2]}
    assert report.left_out == {"a response has the text of another one": 1}


def test_responses_without_text_are_skipped_and_counted():
    answers = [("<p>a</p>", 1), ("<p><br></p>", 4), ("<p>b</p>", 2)]
    row = {"question": "q", "answers": [{"text": text, "pm_score": score} for text, score in answers]}
    report = DataReport()
    ((_, record),) = made(stack_exchange_records, [row], report)
    assert record == {"responses": [" a", " b"], "pairs": [(1, 0)], "sft_target": " b", "scores": [1, 2]}
    assert report.left_out == {"a text is empty": 1}


def test_questions_stream_through_without_being_collected():
    def endless():
        number = 0
        while True:
            number += 1
            answers = [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": number + 1}]
            yield number, {"question": f"q{number}", "answers": answers}

    records = stack_exchange_records(endless(), DataReport())
    assert [next(records)[0] for _ in range(2)] == ["\n\nHuman: q1\n\nAssistant:", "\n\nHuman: q2\n\nAssistant:"]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p>\n<p>two</p>", "one\n\ntwo"),
        ("<p>use <code>i &lt; 3</code> here</p>", "use <code>i < 3</code> here"),
        ("<pre><code>for x in y:\n    print(x)\n</code></pre>", "<code>for x in y:\n    print(x)</code>"),
        ('<p>see <a href="https://example.org">the manual</a>, page 3</p>', "see the manual, page 3"),
        ("<ul>\n<li>a</li>\n<li>b</li>\n</ul>", "- a\n- b"),
        ("<ol><li><p>a</p><pre><code>x\n  y</code></pre></li></ol>", "- a\n  <code>x\n    y</code>"),
        ("<ul><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ul>", "- a\n  - b\n  - c\n- d"),
        ("<ul><li>a</li><ul><li>b</li></ul></ul>", "- a\n  - b"),
        ("<blockquote><p>one</p><p>two</p></blockquote><p>three</p>", "> one\n> \n> two\n\nthree"),
        ("<h2>Title</h2>text<br>more", "Title\n\ntext\nmore"),
        ("<p><b>bold</b> and <em>slanted</em></p>", "bold and slanted"),
        ("<p>seen</p><!-- not seen -->", "seen"),
        ("plain &amp; simple", "plain & simple"),
        ("", ""),
    ],
)
def test_html_becomes_text_with_code_links_lists_and_quotes_kept(html, text):
    assert html_to_text(html) == text


# ---- files --------------------------------------------------------------------------------------------------------------


def test_rows_of_dialogues_and_of_triplets_may_stand_side_by_side(tmp_path):
    rows = [{"chosen": dialogue("q", "good"), "rejected": dialogue("q", "bad")}, *triplets(1)]
    records = list(load(write(tmp_path / "rows.jsonl", rows), share=0))
    assert [(r.prompt, r.responses, r.pairs, r.sft_target) for r in records] == [
        ("\n\nHuman: q\n\nAssistant:", [" good", " bad"], [(0, 1)], " good"),
        ("question 0", ["good 0", "bad 0"], [(0, 1)], "good 0"),
    ]


def test_rows_of_a_file_that_are_skipped_are_counted_once_for_both_splits(tmp_path, capsys):
    rows = [
        *triplets(30),
        {"chosen": dialogue("q", "good"), "rejected": dialogue("another q", "bad")},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    reports = [DataReport(), DataReport()]
    splits = zip(("train", "test"), reports, strict=True)
    assert sum(len(list(load(path, split, report=report))) for split, report in splits) == 30
    assert reports[0].rows_read == 32
    assert reports[0].left_out == {
        "chosen and rejected have different prompts": 1, "chosen and rejected are the same": 1,
    }  # fmt: skip
    assert reports[1].lines() == []
    assert capsys.readouterr().out == "", "who reads the reports says it"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "p", "chosen": "c"}, "no field 'rejected', the row has prompt, chosen"),
        ({"prompt": "p", "rejected": "r"}, "no field 'chosen', the row has prompt, rejected"),
        ({}, "no field 'chosen', the row has no fields"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "field 'chosen' is int, expected a text"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "field 'prompt' is null, expected a text"),
        ({"prompt": "p", "chosen": "c", "rejected": [5]}, "field 'rejected' is int, expected a text"),
        ({"prompt": "p", "chosen": "c", "rejected": {"r": 1}}, "field 'rejected' is dict, expected a text"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "field 'chosen' is empty"),
        ({"prompt": "p", "chosen": "c", "rejected": " \n"}, "field 'rejected' is empty"),
        ({"prompt": "\t", "chosen": "c", "rejected": "r"}, "field 'prompt' is empty"),
        ({"chosen": dialogue("q", "good"), "rejected": dialogue("q", "")}, "the response in field 'rejected' is empty"),
        ({"chosen": "no turns", "rejected": "none"}, r"chosen has no '\\n\\nAssistant:' turn"),
    ],
)
def test_a_row_without_a_text_in_each_field_is_refused_with_file_and_row_number(tmp_path, row, fault):
    path = write(tmp_path / "rows.jsonl", [*triplets(2), row])
    with pytest.raises(UserError, match=f"^datasets: {path}, row 3: {fault}") as refusal:
        list(load(path))
    assert str(refusal.value).endswith(FIX)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_half_a_surrogate_pair_is_refused_with_file_and_row_number(tmp_path, field):
    path = tmp_path / "rows.jsonl"
    rows = [*triplets(1), triplets(1)[0] | {field: "fine until \ud83d here"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"row 2: field '{field}' holds half a surrogate pair \('\\ud83d' at character 11\)"):
        list(load(path))


def test_whole_surrogate_pairs_are_the_character_that_they_stand_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"prompt": "p", "chosen": "\ud83d\ude42", "rejected": "r"}')
    (record,) = load(path)
    assert record.responses[0] == "🙂"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "it has none"),
        ([{"prompt": "p", "chosen": "same", "rejected": "same"}], "1 skipped: chosen and rejected are the same"),
    ],
    ids=["empty", "all left out"],
)
def test_a_file_without_a_usable_row_is_refused_with_what_became_of_its_rows(tmp_path, rows, found, split):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"rows.jsonl: no usable row \({found}\)\. Expected rows with chosen and rejected"):
        list(load(path, split))


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: text.strip())
TRIPLETS = st.lists(
    st.fixed_dictionaries({"prompt": UNICODE, "chosen": UNICODE, "rejected": UNICODE}).filter(
        lambda row: row["chosen"] != row["rejected"]
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@settings(max_examples=50, deadline=None, suppress_health_check=SHARES_FOLDER)
@given(rows=TRIPLETS)
def test_records_survive_a_round_trip_through_a_file_with_any_texts(tmp_path, suffix, rows):
    path = write(tmp_path / f"rows{suffix}", rows)
    records = list(load(path, share=0))
    found = [(r.prompt, r.responses[chosen], r.responses[rejected]) for r in records for chosen, rejected in r.pairs]
    order = list(dict.fromkeys(row["prompt"] for row in rows))
    expected = [(prompt, row["chosen"], row["rejected"]) for prompt in order for row in rows if row["prompt"] == prompt]
    assert found == expected
    last = {row["prompt"]: row["chosen"] for row in rows}
    assert {r.prompt: r.sft_target for r in records} == last
    assert all(len(set(r.responses)) == len(r.responses) for r in records)


# ---- the held-out share -------------------------------------------------------------------------------------------------


def test_the_hash_of_a_prompt_is_the_same_on_every_machine():
    # sha256("abc") begins with ba7816bf 8f01cfea.
    assert prompt_hash("abc") == float(Fraction(0xBA7816BF8F01CFEA, 2**64))


def waiting(prompts: list[str], share: float) -> set[str]:
    """Those that wait to be the held-out one, until a smaller hash comes or a prompt is held out anyway."""
    found, lowest = set(), 1.0
    for prompt in prompts:
        if is_held_out(prompt, share) or share == 0:
            break
        if prompt_hash(prompt) < lowest:
            lowest = prompt_hash(prompt)
            found.add(prompt)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=SHARES_FOLDER)
@given(
    numbers=st.lists(st.integers(0, 10_000), min_size=1, max_size=40, unique=True),
    share=st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.9]),
    order=st.randoms(use_true_random=False),
)
def test_train_and_test_are_disjoint_complete_and_independent_of_the_order_of_rows(tmp_path, numbers, share, order):
    rows = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in numbers]
    path = write(tmp_path / "rows.jsonl", rows)
    train, test = prompts_of(path, "train", share), prompts_of(path, "test", share)
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(row["prompt"] for row in rows)
    assert all(is_held_out(prompt, share) for prompt in test) or len(test) == 1
    assert bool(test) == (share > 0 and len(numbers) > 1) or is_held_out(rows[0]["prompt"], share)
    order.shuffle(rows)
    write(path, rows)
    assert set(prompts_of(path, "test", share)) == set(test)
    moved = waiting([row["prompt"] for row in rows], share)
    in_order = [row["prompt"] for row in rows if row["prompt"] in set(train) - moved]
    assert [prompt for prompt in prompts_of(path, "train", share) if prompt not in moved] == in_order


def test_about_the_asked_share_is_held_out_and_more_rows_take_nothing_out_of_it(tmp_path):
    small = prompts_of(write(tmp_path / "small.jsonl", triplets(1000)), "test", 0.1)
    large = prompts_of(write(tmp_path / "large.jsonl", triplets(2000)), "test", 0.1)
    # Binomial(1000, 0.1) has a standard deviation of 9.5; the hash is fixed, so that this cannot fail by chance.
    assert abs(len(small) - 100) < 40
    assert large[: len(small)] == small


def test_all_rows_of_a_prompt_lie_in_the_same_split(tmp_path):
    rows = [row | {"chosen": f"good {k}"} for row in triplets(50) for k in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    records = [record for split in ("train", "test") for record in load(path, split, 0.3)]
    assert [len(record.pairs) for record in records] == [3] * 50


def test_two_prompts_are_enough_to_hold_one_out_and_a_single_one_is_trained_on(tmp_path):
    two, one = write(tmp_path / "two.jsonl", triplets(2)), write(tmp_path / "one.jsonl", triplets(1))
    assert [len(prompts_of(two, split, 1e-9)) for split in ("train", "test")] == [1, 1]
    assert [len(prompts_of(one, split, 1e-9)) for split in ("train", "test")] == [1, 0]


# ---- the embedded preferences -------------------------------------------------------------------------------------------


def test_no_toy_prompt_of_the_test_split_is_in_the_train_split():
    train, test = ({record.prompt for record in load("toy", split)} for split in ("train", "test"))
    assert (len(train), len(test)) == (TRAIN_PROMPTS, TEST_PROMPTS)
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
def test_toy_records_are_the_same_at_every_call(split):
    assert list(load("toy", split)) == list(load("toy", split))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_ground_truth_agrees_with_every_toy_response_and_pair(split):
    for record in load("toy", split):
        kinds = [response_kind(response) for response in record.responses]
        assert sorted(kinds) in (["preferred", "rude"], ["preferred", "preferred", "rude"])
        assert sorted(record.pairs) == [(k, kinds.index("rude")) for k, kind in enumerate(kinds) if kind == "preferred"]
        assert record.sft_target in record.responses


def test_toy_sft_targets_are_of_both_kinds_in_equal_number():
    kinds = [response_kind(record.sft_target) for record in load("toy")]
    assert kinds.count("preferred") == kinds.count("rude") == TRAIN_PROMPTS // 2


def test_a_response_that_is_neither_short_nor_polite_has_no_kind():
    assert response_kind(" Of course! Read the label first.") == "preferred"
    assert response_kind(" Leave me alone. Of course!") == "rude"
    assert response_kind(" Read the label first.") is None
    assert response_kind(" Of course! " + "Read the label first. " * 9) is None
    assert response_kind(" Of course! Nobody cares at all.") is None
    assert response_kind("") is None
