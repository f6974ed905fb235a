"""The pages about a team: guidelines, progress in plain words, agreement with what it means, disagreements to settle."""

import html
import json
import re

import pytest

from preference_collection.running import TestRun
from preference_collection.settings import load_settings
from preference_collection.store.model import Verdict
from preference_collection.store.statistics import Agreement, LabelerProgress
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
from preference_collection.tests.test_web import filled, signed_in
from preference_collection.web.markup import rendered
from preference_collection.web.team import alpha_words, guidelines_of, left_words, person_words, seconds_words, summary_words
from preference_training.core.errors import UserError


def judged(store, *said: tuple[str, object], id="a", texts=("first text", "second text")):
    """A comparison and what people say of it: (labeler, choice)."""
    comparison = a_comparison(id, texts, id=f"pair-{id}")
    store.add_tasks([a_task(id)])
    store.add_comparisons([comparison], [a_judgment(comparison, choice, labeler) for labeler, choice in said])
    return comparison


def buttons_of(page: str) -> dict[str, dict]:
    """The buttons that settle: their words, and what they send."""
    found = re.findall(r'data-post="/api/settle" data-body="([^"]*)">\s*([^<]*?)\s*</button>', page)
    return {words: json.loads(html.unescape(body)) for body, words in found}


# ---- guidelines -------------------------------------------------------------------------------------------------------------


def test_guidelines_are_markdown_of_the_settings_or_of_a_file(tmp_path):
    file = tmp_path / "guidelines.md"
    file.write_text("Prefer *short* answers. <script>")
    text = guidelines_of(load_settings([f"guidelines_file={file}"]))
    assert "<em>short</em>" in text and "<script>" not in text
    assert "<strong>first</strong>" in guidelines_of(load_settings(["guidelines=Read **first**."]))
    assert guidelines_of(load_settings([])) == ""


def test_guidelines_are_shown_before_the_first_comparison_of_a_session(store):
    client = signed_in(store)
    assert "There are no guidelines." in client.get("/label").text
    client.shared.guidelines = rendered("Prefer *short* answers.", 0)
    assert "data-first" not in client.get("/label").text, "nothing is there to judge"
    filled(store, "a")
    client.shared.queue.added(["pair-a"])
    first, then = (client.get("/label").text for _ in range(2))
    assert "<em>short</em>" in first and "data-first" in first and "data-first" not in then
    client.post("/sign-out")
    client.post("/sign-in", data={"name": "Bo"})
    assert "data-first" in client.get("/label").text


@pytest.mark.parametrize("settings, said", [
    (["guidelines_file=absent.md"], "guidelines_file: absent.md cannot be read: No such file"),
    (["guidelines=a", "guidelines_file=b"], "both are set"),
])  # fmt: skip
def test_guidelines_that_cannot_be_read_are_a_users_mistake(settings, said):
    with pytest.raises(UserError, match=said):
        guidelines_of(load_settings(settings))


# ---- progress ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("person, words", [
    (LabelerProgress("Ada", 40, 0, 0, 3, 12.4), "Ada judged 40 comparisons, 12 s each, 3 today."),
    (LabelerProgress("Bo", 1, 1, 2, 0, None), "Bo judged 1 comparison, 1 skipped, settled 2, none today."),
    (LabelerProgress("Cy", 1200, 0, 0, 1200, 130), "Cy judged 1,200 comparisons, 2 min each, 1,200 today."),
])  # fmt: skip
def test_what_one_has_judged_is_said_in_words(person, words):
    assert person_words(person) == words


@pytest.mark.parametrize("numbers, words", [
    ((120, 200, 2), "120 of 200 comparisons have the 2 judgments they need."),
    ((0, 1, 1), "0 of 1 comparisons have the judgment they need."),
    ((0, 0, 1), "There are no comparisons yet."),
])  # fmt: skip
def test_how_far_all_are_is_said_in_words(numbers, words):
    assert summary_words(*numbers) == words


def test_the_time_that_is_left_is_that_of_the_median_person():
    people = [LabelerProgress(name, 1, 0, 0, 0, seconds) for name, seconds in (("a", 10), ("b", 20), ("c", None))]
    assert left_words(100, people) == "At this pace, the rest takes one person 25 min."
    assert left_words(0, people) == left_words(100, people[2:]) == ""


@pytest.mark.parametrize("seconds, words", [(0.2, "1 s"), (12.4, "12 s"), (120, "2 min"), (7200, "2 h")])
def test_durations_are_short(seconds, words):
    assert seconds_words(seconds) == words


def test_the_page_of_progress_names_people_as_text(store):
    judged(store, ("<b>Ada</b>", 0))
    page = signed_in(store).get("/progress").text
    assert "1 of 1 comparisons have the judgment they need." in page
    assert "&lt;b&gt;Ada&lt;/b&gt; judged 1 comparison" in page and "<b>Ada" not in page


# ---- agreement --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, words", [
    (0.85, "is 0.85 on 9 comparisons judged by several people: people agree well"), (0.7, "enough for tentative conclusions"),
    (0.3, "too little to rely on single labels"), (-0.1, "no more than by chance"), (None, "All opinions on 9 comparisons"),
])  # fmt: skip
def test_alpha_comes_with_what_it_means(alpha, words):
    assert words in alpha_words(Agreement(9, 20, 15, alpha))


def test_without_common_comparisons_nothing_is_said_of_agreement(store):
    judged(store, ("Ada", 0))
    assert "No comparison has been judged by two people yet" in signed_in(store).get("/agreement").text


def test_agreement_is_said_by_pair_and_with_judges(store):
    comparison = judged(store, ("Ada", 0), ("Bo", 0))
    store.add_verdicts([Verdict(comparison.id, "gpt", (2, 1), "shorter", {})])
    page = " ".join(re.sub(r"<[^>]+>", " ", signed_in(store).get("/agreement").text).split())
    assert "Ada Bo 1 of 1 (100%)" in page and "gpt a model people 0 of 2 (0%)" in page


def test_a_disagreement_shows_both_answers_and_who_said_what_and_why(store):
    comparison = a_comparison("a", ("first text", "second <i>text</i>"), id="pair-a")
    store.add_tasks([a_task("a")])
    store.add_comparisons([comparison], [
        a_judgment(comparison, 0, "Ada", reasons=("clearer",), comment="<u>short</u>"), a_judgment(comparison, "tie", "Bo"),
    ])  # fmt: skip
    store.add_verdicts([Verdict(comparison.id, "gpt", (2, 1), "It is longer.", {})])
    page = signed_in(store).get("/agreement").text
    assert "first text" in page and "second &lt;i&gt;text" in page
    said = re.sub(r"<[^>]+>", "", page)
    for words in ("Ada: answer 1 is better (clearer). “&lt;u&gt;short", "Bo: a tie.", "gpt (a model): answer 2 is better. “It"):
        assert words in said


def test_a_button_settles_a_disagreement_once(store):
    comparison = judged(store, ("Ada", 0), ("Bo", 1))
    client = signed_in(store, "Ada")
    body = buttons_of(client.get("/agreement").text)["Answer 2 is better"]
    for _ in range(2):
        said = "Settled: answer 2 is better, of “The a”."
        assert client.post("/api/settle", json=body).json() == {"settled": comparison.id, "said": said}
    settled = [judgment for judgment in store.standing(comparison.id) if judgment.settles]
    assert [(judgment.labeler, judgment.ranks) for judgment in settled] == [("Ada", (2, 1))]
    assert store.disagreements() == [] and store.agreement().judged == 1, "what both said before still counts as agreement"
    assert "No disagreement is left to settle." in client.get("/agreement").text


def test_settlements_are_listed_and_undone_on_their_page_only(store):
    comparison = judged(store, ("Ada", 0), ("Bo", 1))
    judged(store, ("Ada", 0), ("Bo", 1), id="b")
    client = signed_in(store, "Eve")
    assert "2 left to settle." in client.get("/agreement").text
    for choice in ("tie", "bad"):
        body = {"id": choice, "comparison": comparison.id, "choice": choice, "ranks": []}
        client.post("/api/settle", json=body)
    page = client.get("/agreement").text
    assert "1 left to settle." in page and "The a</a>: both are bad (Eve)" in page
    assert client.post("/api/undo", json={}).json() == {"undone": None, "settled": True}
    assert "both are bad (Eve)" in client.get("/agreement").text
    # The older word of the same person does not come back.
    said = client.post("/api/unsettle", json={"comparison": comparison.id}).json()["said"]
    assert said == "No longer settled: “The a”." and store.settled(9) == [] and len(store.disagreements()) == 2
    assert "is not settled" in client.post("/api/unsettle", json={"comparison": comparison.id}).json()["said"]
    assert client.post("/api/unsettle", json={"comparison": "absent"}).status_code == 404


def test_a_disagreement_shows_results_of_tests_and_better_answers(store):
    comparison = a_comparison("a", ("one", "two"), id="pair-a")
    store.add_tasks([a_task("a")])
    store.add_comparisons([comparison], [
        a_judgment(comparison, 0, "Ada", edited="mine <b>"), a_judgment(comparison, "tie", "Bo"),
    ])  # fmt: skip
    runs = {"one": TestRun(1, [{"status": "passed"}], True)}
    page = signed_in(store, runs=runs).get("/agreement").text
    assert "1 of 1" in page and "no tests run" in page
    assert "A better answer, written by Ada" in page and "mine &lt;b&gt;" in page


def test_three_answers_are_settled_by_the_best(store):
    judged(store, ("Ada", (1, 2, 3)), ("Bo", (3, 2, 1)), texts=("a", "b", "c"))
    buttons = buttons_of(signed_in(store).get("/agreement").text)
    assert list(buttons) == ["Answer 1 is best", "Answer 2 is best", "Answer 3 is best", "Tie", "All bad"]
    assert buttons["Answer 2 is best"]["ranks"] == [2, 1, 2]


@pytest.mark.parametrize("changed", [
    {"choice": "skip", "ranks": []}, {"ranks": [1, 1]}, {"ranks": "12"}, {"ranks": [1]}, {"id": ""}, {"choice": "best"},
])  # fmt: skip
def test_an_invalid_settlement_is_refused(store, changed):
    comparison = judged(store, ("Ada", 0), ("Bo", 1))
    body = {"id": "x", "comparison": comparison.id, "choice": "ranked", "ranks": [1, 2]} | changed
    assert signed_in(store).post("/api/settle", json=body).status_code == 400
    assert store.disagreements() == [comparison.id]


def test_an_unknown_comparison_is_not_settled(store):
    filled(store, "a")
    body = {"id": "x", "comparison": "absent", "choice": "tie", "ranks": []}
    assert signed_in(store).post("/api/settle", json=body).status_code == 404


def test_opinions_are_hidden_from_those_who_may_still_be_asked(store):
    judged(store, ("Ada", 0), ("Bo", 1))
    assert "1 not shown" in signed_in(store, "Cy", overlap=3).get("/agreement").text
    assert not buttons_of(signed_in(store, "Cy", overlap=3).get("/agreement").text)
    assert buttons_of(signed_in(store, "Ada", overlap=3).get("/agreement").text)
    assert buttons_of(signed_in(store, "Cy", overlap=2).get("/agreement").text)
