"""report.html of a loop: its policies in numbers, with responses side by side, what each round was trained on, and warnings."""

import json
import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from preference_training.core.errors import UserError
from preference_training.reporting.comparison import comparison_page, find_runs, read_runs
from preference_training.reporting.loops.findings import loop_findings
from preference_training.reporting.loops.page import evenly, loop_page, rebuild_loop_report, write_loop_report
from preference_training.reporting.loops.record import LoopRecord
from preference_training.rounds.loop import all_files
from preference_training.rounds.summary import metrics_table
from tests.reporting.loops.made_up import EXCLUDED, POLICIES, made_up_loop


@pytest.fixture
def loop(tmp_path) -> Path:
    return made_up_loop(tmp_path / "loop")


def parsed(folder: Path) -> BeautifulSoup:
    return BeautifulSoup(loop_page(LoopRecord.read(folder)), "html.parser")


def table(page: BeautifulSoup, name: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    [region] = page.select(f'[aria-label="{name}"]')
    return [[cell.get_text(" ", strip=True) for cell in row.select("th, td")] for row in region.select("tbody tr")]


def texts(folder: Path) -> list[str]:
    return [finding.text for finding in loop_findings(LoopRecord.read(folder))]


# ---- the page ----------------------------------------------------------------------------------------------------------------


def test_the_policies_stand_below_one_another_with_intervals_and_lead_to_their_trainings(loop):
    page = parsed(loop)
    assert table(page, "Policies") == [
        ["first model", "0.2 [0.15, 0.25]", "-", "20 [19, 21]", "0 [-0.5, 0.5]", "2", "0"],
        ["after round 1", "0.4 [0.35, 0.45]", "0.75 [0.7, 0.8]", "24 [23, 25]", "5 [4.5, 5.5]", "2", "0"],
        ["after round 2", "0.6 [0.55, 0.65]", "0.9 [0.85, 0.95]", "26 [25, 27]", "9 [8.5, 9.5]", "2", "0"],
    ]
    assert [link["href"] for link in page.select('[aria-label="Policies"] a')] == [f"round-{k}/run/report.html" for k in (1, 2)]
    assert all((loop / link["href"]).is_file() for link in page.select('[aria-label="Policies"] a, .facts a'))


def test_what_a_round_was_trained_on_is_said_with_what_was_excluded_and_why(loop):
    [first, second] = table(parsed(loop), "Rounds")
    assert first[:5] == ["round 1", "28", "224", "27", "300"] and second[0] == "round 2"
    assert first[-1] == "40 responses without text 3 pairs of responses with equal scores"
    assert set(EXCLUDED.values()) == {40, 3}


def test_the_same_prompt_is_answered_by_each_policy_side_by_side_with_score_and_reason(loop):
    page = parsed(loop)
    prompts = page.select("details:has(.side-by-side)")
    assert [each.summary.get_text(strip=True) for each in prompts] == [f"Question {k}?" for k in range(12)]
    shown = prompts[0].select(".side-by-side > div")
    assert [each.h4.get_text() for each in shown] == [
        "first model: score 0.2, cut", "after round 1: score 0.4", "after round 2: score 0.6",
    ]  # fmt: skip
    assert [each.select_one(".hint").get_text() for each in shown] == ["reason <0>", "reason <1>", "reason <2>"]
    # Texts of a model are no markup; what has changed is marked.
    assert shown[1].select_one(".text").get_text() == "It is <b>odd</b>, says policy 1"
    assert [each.get_text() for each in shown[1].select("ins")] == ["1"] and not shown[0].select("ins, b")


def test_charts_have_the_policies_at_the_number_of_their_rounds(loop):
    figures = {each.strong.get_text(): json.loads(each.script.get_text()) for each in parsed(loop).select("figure.chart")}
    assert figures["Score"]["lines"][0]["x"] == [0, 1, 2] and figures["Score"]["lines"][0]["y"] == [0.2, 0.4, 0.6]
    assert figures["Score"]["lines"][0]["low"] == [0.15, 0.35, 0.55]
    assert (figures["Win rate"]["lines"][0]["x"], figures["Win rate"]["lines"][0]["y"]) == ([1, 2], [0.75, 0.9])
    assert [line["name"] for line in figures["Diversity"]["lines"]] == ["distinct-2", "similarity"]


def test_of_many_policies_the_first_the_last_and_some_between_are_shown():
    assert evenly(list(range(11)), 6) == [0, 2, 4, 6, 8, 10] and evenly([1, 2], 6) == [1, 2]


def test_a_loop_that_has_just_begun_has_a_page(loop):
    for files in all_files(loop):
        files.summary.unlink()
        files.held_out_samples.unlink()
    page = parsed(loop)
    assert "No round has been judged yet." in page.get_text()
    assert not page.select("figure, .findings, .side-by-side")


@pytest.mark.parametrize("name", ["held_out_samples.parquet", "held_out_scores.parquet", "summary.json"])
def test_a_damaged_file_leaves_out_its_part(loop, name):
    (loop / "round-2" / name).write_bytes(b"{")
    page = parsed(loop)
    assert "after round 2" in page.get_text()


def test_the_page_is_written_for_a_loop_only(loop, tmp_path):
    assert rebuild_loop_report(loop) == write_loop_report(loop) == loop / "report.html"
    with pytest.raises(UserError, match=r"contains no rounds\.json\. Expected the directory of a loop of rounds"):
        rebuild_loop_report(tmp_path)


# ---- what to know first ------------------------------------------------------------------------------------------------------


def test_of_a_loop_that_improves_there_is_nothing_to_know_first(loop):
    assert texts(loop) == []


def test_what_the_rounds_have_found_stands_first_of_each_kind_the_latest(loop):
    length = [{"kind": "length", "text": f"responses have grown to {tokens} tokens"} for tokens in (24, 26)]
    ties = {"kind": "ties", "severity": "error", "text": "half of the scores are equal"}
    for name, found in (("round-1", [length[0], ties]), ("round-2", [length[1]])):
        file = loop / name / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"findings": found}))
    assert [(each.severity, each.text) for each in loop_findings(LoopRecord.read(loop))] == [
        ("error", "round-1: half of the scores are equal"), ("warning", "round-2: responses have grown to 26 tokens"),
    ]  # fmt: skip
    assert "half of the scores are equal" in parsed(loop).select_one(".findings").get_text()


def test_a_second_judge_has_a_column_and_a_line_of_its_own(loop):
    file = loop / "final" / "summary.json"
    summary = json.loads(file.read_text())
    summary["held_out"]["second_win_rate"] = {"mean": 0.4, "low": 0.3, "high": 0.5}
    file.write_text(json.dumps(summary))
    page = parsed(loop)
    assert [row[3] for row in table(page, "Policies")] == ["-", "-", "0.4 [0.3, 0.5]"]
    assert "by the second judge" in page.get_text()


@pytest.mark.parametrize(("policies", "words"), [
    ([POLICIES[0], (0.21, 0.52, 20.0, 1.0)], "The policy after round 1 cannot be told from the first model: its win rate is"),
    ([POLICIES[0], (0.1, 0.2, 20.0, 1.0)], "The judge finds the policy after round 1 worse than the first model"),
    ([POLICIES[0], (0.6, 0.9, 20.0, 5.0), (0.4, 0.8, 20.0, 9.0)], "The policy after round 1 has a higher held-out score"),
])  # fmt: skip
def test_what_the_numbers_of_all_rounds_suggest_is_said(tmp_path, policies, words):
    [found] = texts(made_up_loop(tmp_path / "loop", policies))
    assert found.startswith(words)


@pytest.mark.parametrize(("facts", "words"), [
    ({"unjudged": 3}, "The judge could not judge 3 of 12 held-out responses (after round 2)"),
    ({"truncated": 7}, "7 of 12 held-out responses (after round 2) were cut. Raise rounds.max_new_tokens"),
    ({"prompts": 4}, "held-out prompts: 4 prompts, too few to decide anything by; expected at least 10. Raise rounds.held_out"),
])  # fmt: skip
def test_numbers_that_decide_nothing_are_said(loop, facts, words):
    file = loop / "final" / "summary.json"
    summary = json.loads(file.read_text())
    summary["held_out"] |= facts
    file.write_text(json.dumps(summary))
    [found] = texts(loop)
    assert found.startswith(words)


# ---- as metrics --------------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_policy(loop):
    lines = metrics_table(LoopRecord.read(loop).rows)
    assert [line.split("  ")[0] for line in lines] == ["policy", "first model", "after round 1", "after round 2"]
    cells = ["after round 1", "0.4 [0.35, 0.45]", "0.75 [0.7, 0.8]", "24 [23, 25]", "5 [4.5, 5.5]", "0.9", "300"]
    assert re.split("  +", lines[2]) == cells


def test_a_loop_is_one_run_of_a_comparison_and_its_trainings_are_none(tmp_path):
    for name, last in (("0", 0.6), ("1", 0.8)):
        folder = made_up_loop(tmp_path / name, [*POLICIES[:2], (last, 0.9, 26.0, 9.0)], exp_name=f"loop_{name}")
        rows = LoopRecord.read(folder).rows
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = find_runs([tmp_path])
    assert [run.name for run in runs] == ["0", "1"]
    assert find_runs([tmp_path / "0" / "round-1" / "run"]) == [tmp_path / "0" / "round-1" / "run"]
    page = BeautifulSoup(comparison_page(read_runs(runs), tmp_path), "html.parser")
    assert "held-out score" in page.select_one("thead").get_text()
    # They differ in nothing but their names, so that their mean and spread are shown.
    assert "0.7 ± 0.14" in page.select_one("tbody").get_text(" ")
