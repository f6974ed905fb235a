"""The store keeps every judgment, under concurrent writes and killed processes."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from math import factorial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_collection.store.model import (
    CHOICES,
    Judgment,
    Query,
    Task,
    Verdict,
    Votes,
    new_id,
    ranks_of_scores,
    shown_order,
)
from preference_collection.store.statistics import Progress
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task, all_at_once
from preference_training.data.records.record import Turn

ROOT = Path(__file__).parent.parent.parent
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def judged(store, comparison, said=0, labeler: str = "ada", **more) -> Judgment:
    judgment = a_judgment(comparison, said, labeler, **more)
    store.judge(judgment)
    return judgment


def with_comparisons(store, *tasks: str, texts: tuple[str, ...] = ("one", "two")) -> list:
    store.add_tasks(map(a_task, tasks))
    comparisons = [a_comparison(task, texts) for task in tasks]
    store.add_comparisons(comparisons)
    return comparisons


# ---- what goes in comes out -------------------------------------------------------------------------------------------------

CONVERSATION = (
    Turn("system", "Be kind."),
    Turn("user", "Hi"),
    Turn("assistant", "", '{"tool_calls": []}'),
    Turn("user", "So?"),
)


def test_tasks_and_comparisons_are_stored_unchanged(store):
    task = a_task(tests=({"args": [[1, "é"], None], "expected": {"a": [True, 0.5]}, "compare": "close"},))
    comparison = a_comparison(texts=("```python\nx = '\"'\n```", "; DROP TABLE pairs; --"))
    assert store.add_tasks([task]) == (1, 0)
    assert store.add_comparisons([comparison]) == (1, 0)
    assert store.task("sum") == task and store.task("nothing") is None
    assert store.comparisons_of("sum") == [comparison] == list(store.comparisons())
    assert store.comparison(comparison.id) == comparison and store.comparison("nothing") is None


def test_conversations_are_stored_unchanged_with_up_to_five_answers(store):
    task = Task("chat", "Hi", "", CONVERSATION)
    comparison = a_comparison("chat", "abcde", prompt=CONVERSATION)
    store.add_tasks([task])
    store.add_comparisons([comparison])
    assert store.task("chat") == task and task.kind == "text"
    assert store.comparisons_of("chat") == [comparison]


@pytest.fixture(scope="module")
def memory():
    """A store in memory, for many examples."""
    with closing(open_store(":memory:")) as opened:
        yield opened


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, comment=TEXTS, labeler=TEXTS, reasons=st.lists(TEXTS, max_size=3))
def test_any_text_is_stored_unchanged(memory, text, comment, labeler, reasons):
    task = a_task(new_id() + text, title=text, prompt=(Turn("user", text),))
    memory.add_tasks([task])
    comparison = a_comparison(task.id, (text, text + "\0```'\""), new_id() + text, prompt=text)
    memory.add_comparisons([comparison])
    said = judged(memory, comparison, 1, labeler, comment=comment, reasons=tuple(reasons), seconds=1.5, edited=text)
    assert memory.task(task.id) == task
    assert memory.comparisons_of(task.id) == [comparison]
    assert memory.standing(comparison.id) == [said] == [memory.last_judgment(labeler)]


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(2, 5))
def test_any_judgment_is_stored_unchanged(memory, data, n):
    ranks = ranks_of_scores(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    said = ranks if max(ranks) > 1 else data.draw(st.sampled_from(CHOICES[1:]))
    more = {"order": tuple(data.draw(st.permutations(range(n)))), "settles": said != "skip" and data.draw(st.booleans())}
    if text := data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=3)):
        more |= {"edited": text, "edited_from": data.draw(st.none() | st.integers(0, n - 1))}
    memory.add_tasks([a_task()])
    comparison = a_comparison(texts="abcde"[:n])
    memory.add_comparisons([comparison])
    judgment = judged(memory, comparison, said, **more)
    assert memory.standing(comparison.id) == [judgment]
    row = list(memory.judgments())[-1]
    assert (row.judgment, row.comparison, row.task) == (judgment, comparison, a_task())


def test_an_existing_task_is_not_changed(store):
    store.add_tasks([a_task()])
    assert store.add_tasks([a_task(title="Another"), a_task("other"), a_task("other")]) == (1, 2)
    assert store.task("sum").title == "The sum"


def test_an_existing_comparison_is_not_changed(store):
    [comparison] = with_comparisons(store, "sum")
    other = a_comparison("sum", ("three", "four"), id=comparison.id)
    assert store.add_comparisons([other, other]) == (0, 2)
    assert store.comparison(comparison.id) == comparison and store.answers_of("sum") == list(comparison.answers)


def test_answers_wait_in_their_order_until_a_comparison_takes_them(store):
    store.add_tasks([a_task("a"), a_task("b")])
    comparison = a_comparison("a", ("one", "two", "three"))
    for answer in comparison.answers:
        store.add_answers("a", [answer, answer])
    assert store.answers_of("a") == list(comparison.answers) and store.comparison_ids() == []
    assert [task.id for task in store.tasks_without_comparison()] == ["a", "b"]
    store.add_comparisons([comparison])
    assert store.answers_of("a") == list(comparison.answers), "none is there twice"
    assert [task.id for task in store.tasks_without_comparison(5)] == ["b"]
    assert store.tasks_without_comparison(0) == []


@pytest.mark.parametrize("texts", ["a", "abcdef"])
def test_a_comparison_has_two_to_five_answers(store, texts):
    with pytest.raises(ValueError, match="answers"):
        store.add_comparisons([a_comparison(), a_comparison(texts=texts)])
    assert store.comparison_ids() == [], "all or none"


def test_the_content_survives_reopening_the_file(store):
    [comparison] = with_comparisons(store, "sum")
    said = judged(store, comparison)
    store.close()
    with closing(open_store(store.address)) as again:
        assert again.standing(comparison.id) == [said]
        later = judged(again, comparison, 1)
        assert again.standing(comparison.id) == [later], "numbers went on from where they were"


# ---- judgments -------------------------------------------------------------------------------------------------------------


def test_the_latest_judgment_of_each_labeler_counts_and_an_undo_restores_the_previous_one(store):
    [comparison] = with_comparisons(store, "sum")
    one = judged(store, comparison, 0)
    other = judged(store, comparison, "tie", labeler="bob")
    two = judged(store, comparison, 1)
    assert store.standing(comparison.id) == [other, two]
    assert store.undo("ada") == comparison.id
    assert store.standing(comparison.id) == [one, other]
    assert store.undo("ada") == comparison.id
    assert store.undo("ada") is None and store.last_judgment("ada") is None
    assert store.standing(comparison.id) == [other]
    # Nothing was deleted from the table: three judgments and two undos.
    assert store.connection.execute("SELECT count(*) FROM judgments").fetchone() == (5,)


def test_a_key_pressed_twice_counts_once(store):
    [comparison] = with_comparisons(store, "sum")
    said = judged(store, comparison)
    store.judge(said)
    assert store.progress("ada") == Progress(1, 1, judged_comparisons=1, judgments=1, mine=1, labelers=1)
    store.undo("ada")
    assert store.progress("ada").judgments == 0


def test_an_id_of_another_judgment_is_refused(store):
    one, other = with_comparisons(store, "a", "b")
    said = judged(store, one)
    for changed in ({"labeler": "bob"}, {"comparison": other.id}):
        with pytest.raises(ValueError, match=f"the id {said.id} belongs to another judgment"):
            store.judge(replace(said, **changed))
    assert store.standing(one.id) == [said] and store.standing(other.id) == []


INVALID = [
    ({"choice": "both"}, "has the choice 'both', expected one of ranked, tie, bad, skip"),
    ({"order": (0, 2)}, r"has the order \(0, 2\), expected each of 0 to 1 once"),
    ({"order": ()}, "has the order"),
    ({"ranks": (1,)}, "has 1 ranks for 2 answers"),
    ({"ranks": (1, 3)}, "expected 1 for the best and none left out"),
    ({"ranks": (True, 2)}, "expected 1 for the best"),
    ({"ranks": (1, 1)}, "which is the choice 'tie'"),
    ({"choice": "tie"}, "has ranks and the choice 'tie'"),
    ({"choice": "skip", "ranks": (), "settles": True}, "settles nothing with the choice 'skip'"),
    ({"edited_from": 0}, "has edited_from 0, expected the index of an answer that was edited"),
    ({"edited_from": 2, "edited": "x"}, "has edited_from 2"),
    ({"seconds": -1.0}, "took -1.0 seconds"),
    ({"seconds": float("nan")}, "took nan seconds"),
    ({"comparison": "none"}, "no such comparison: none"),
]


@pytest.mark.parametrize(("changed", "said"), INVALID, ids=[said[:30] for _, said in INVALID])
def test_an_invalid_judgment_is_refused(store, changed, said):
    [comparison] = with_comparisons(store, "sum")
    with pytest.raises(ValueError, match=said):
        store.judge(replace(a_judgment(comparison), **changed))
    with pytest.raises(ValueError, match=said):
        store.add_comparisons([], [a_judgment(comparison), replace(a_judgment(comparison), **changed)])
    assert store.progress().judgments == 0


@pytest.mark.parametrize("n", range(2, 6))
def test_the_order_of_answers_is_stable_and_each_is_first_as_often(n):
    orders = [shown_order(labeler, pair, n) for labeler in ("ada", "bob") for pair in map(str, range(600))]
    assert orders == [shown_order(labeler, pair, n) for labeler in ("ada", "bob") for pair in map(str, range(600))]
    # 1200 throws of an n-sided die: 1200 / n of each, with a deviation of at most sqrt(1200) / 2 = 17; five of these to a side.
    for place in range(n):
        for answer in range(n):
            assert abs(sum(order[place] == answer for order in orders) - 1200 / n) < 87
    # Two labelers see the same order as often as chance says: 1 in n factorial.
    same = sum(a == b for a, b in zip(orders[:600], orders[600:], strict=True))
    assert abs(same - 600 / factorial(n)) < 62


def test_each_exported_judgment_comes_with_the_votes_on_its_comparison(store):
    pair, ranking = a_comparison("a"), a_comparison("a", "abc")
    store.add_tasks([a_task("a")])
    store.add_comparisons([pair, ranking])
    for labeler, said in zip(("ada", "bob", "eve", "kim", "lee"), (0, 1, "tie", "bad", "skip"), strict=True):
        judged(store, pair, said, labeler)
    judged(store, ranking, (2, 1, 1), "ada")
    rows = list(store.judgments())
    assert [row.judgment.labeler for row in rows] == ["ada", "bob", "eve", "kim", "lee", "ada"]
    assert {row.votes for row in rows[:5]} == {Votes((1, 1), ties=1, bad=1, skips=1)}
    assert rows[5].votes == Votes((0, 1, 1), 0, 0, 0), "two are first"


def test_a_judgment_that_settles_is_named_with_all_of_its_comparison_until_it_is_undone(store):
    pair, other = with_comparisons(store, "a", "b")
    for labeler, said in (("ada", 0), ("bob", 1)):
        judged(store, pair, said, labeler)
    judged(store, other)
    assert {row.settled for row in store.judgments()} == {None}
    last = judged(store, pair, 1, "eve", settles=True)
    assert [row.settled for row in store.judgments()] == [last.id, last.id, None, last.id]
    store.undo("eve")
    assert {row.settled for row in store.judgments()} == {None}


# ---- the list of tasks ------------------------------------------------------------------------------------------------------


def ids(store, **query) -> list[str]:
    rows, total = store.browse(Query(**query))
    assert total == len(rows)
    return [row.id for row in rows]


def test_the_list_is_filtered_per_labeler(store):
    comparisons = with_comparisons(store, "a", "b", "c")
    store.add_tasks([a_task("d", difficulty="hard", title="100% 'quoted'")])
    judged(store, comparisons[0], 0, "ada")
    judged(store, comparisons[0], 1, "bob")
    judged(store, comparisons[1], "skip", "ada")
    judged(store, comparisons[1], 0, "bob")
    assert ids(store) == ["a", "b", "c", "d"]
    assert ids(store, labeler="ada", only="unlabeled") == ["c", "d"]
    assert ids(store, labeler="eve", only="unlabeled") == ["a", "b", "c", "d"]
    assert ids(store, only="disagreement") == ["a"], "a skip disagrees with nobody"
    assert ids(store, difficulty="hard") == ids(store, search="% 'QUO") == ["d"]
    assert store.difficulties() == ["easy", "hard"]
    rows, total = store.browse(Query(), start=1, size=2)
    assert [row.id for row in rows] == ["b", "c"] and total == 4
    assert (rows[0].judgments, rows[0].comparison, rows[1].judgments) == (2, comparisons[1].id, 0)


@pytest.mark.parametrize(
    ("one", "other", "disagree"),
    [
        ((1, 2, 3), (1, 2, 3), False),
        ((1, 2, 3), (1, 3, 2), True),
        ((1, 2, 2), (1, 2, 3), False),  # a tie beside an order is no opposite
        ((1, 2, 3), "tie", True),
        ("tie", "bad", True),
        ("bad", "bad", False),
        ((1, 2, 3), "skip", False),
    ],
)
def test_labelers_disagree_if_they_chose_differently_or_rank_two_answers_in_opposite_order(store, one, other, disagree):
    [comparison] = with_comparisons(store, "a", texts="abc")
    judged(store, comparison, one, "ada")
    judged(store, comparison, other, "bob")
    assert ids(store, only="disagreement") == ["a"] * disagree
    judged(store, comparison, one, "eve", settles=True)
    assert ids(store, only="disagreement") == []


def test_a_new_comparison_makes_a_task_unlabeled_again(store):
    [comparison] = with_comparisons(store, "a")
    judged(store, comparison)
    assert ids(store, labeler="ada", only="unlabeled") == []
    store.add_comparisons([a_comparison("a")])
    assert ids(store, labeler="ada", only="unlabeled") == ["a"]


def test_comparisons_that_the_policy_is_least_sure_about_come_first(store):
    a, b, c, d = with_comparisons(store, "a", "b", "c", "d")
    store.add_scores("old", [(d.id, 0.0)])
    store.add_scores("new", [(a.id, -5.0), (b.id, 0.5), (c.id, 2.0)])
    # d was scored only by an older policy.
    assert ids(store, order="uncertain") == ["b", "c", "a", "d"]


def test_test_runs_are_stored_and_the_newest_is_shown(store):
    assert store.test_run("g") is None
    store.add_test_run("g", [{"status": "failed"}])
    store.add_test_run("g", [{"status": "passed", "got": "é"}])
    assert store.test_run("g") == [{"status": "passed", "got": "é"}]


def test_the_newest_verdict_of_each_judge_counts(store):
    [comparison] = with_comparisons(store, "a", texts="abc")
    verdicts = [
        Verdict(comparison.id, "one", (1, 1, 1), "All the same.", {}),
        Verdict(comparison.id, "two", (3, 1, 2), "é", {"temperature": 0}),
        Verdict(comparison.id, "one", (1, 2, 2), "The first.", {"seed": 3}),
    ]
    store.add_verdicts(verdicts)
    assert store.verdicts(comparison.id) == verdicts[1:] and store.verdicts("nothing") == []


def test_a_verdict_or_probability_that_is_none_is_refused(store):
    [comparison] = with_comparisons(store, "a")
    with pytest.raises(ValueError, match="the verdict of one on .* has 3 ranks for 2 answers"):
        store.add_verdicts([Verdict(comparison.id, "one", (1, 2), "", {}), Verdict(comparison.id, "one", (1, 2, 3), "", {})])
    with pytest.raises(ValueError, match="no such comparison: none"):
        store.add_verdicts([Verdict("none", "one", (1, 2), "", {})])
    assert store.verdicts(comparison.id) == [], "all or none"
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="is not a probability"):
            store.add_flip_probabilities("run", [(comparison.id, value)])


# ---- several at once, and ends -----------------------------------------------------------------------------------------------


def judge_at_once(store, labelers: int, each: int) -> None:
    """Each labeler, in a thread, judges the comparisons in turn, undoes one in ten, and browses now and then."""
    comparisons = with_comparisons(store, *(f"p{index}" for index in range(each)))
    opinions = (0, 1, "tie", "bad", "skip")

    def label(name: str) -> None:
        for index, comparison in enumerate(comparisons):
            judged(store, comparison, opinions[index % 5], name)
            if index % 10 == 0:
                store.undo(name)
                judged(store, comparison, opinions[index % 5], name)
            if index % 25 == 0:
                store.browse(Query(labeler=name, only="unlabeled"))

    all_at_once(label, labelers)
    assert store.progress("labeler 0") == Progress(each, each, each, labelers * each, each, labelers)
    numbers = "SELECT count(*), count(DISTINCT id), count(DISTINCT number) FROM judgments"
    written = labelers * (each + 2 * (-(-each // 10)))
    assert store.connection.execute(numbers).fetchone() == (written, written, written)


def test_concurrent_labelers_lose_and_duplicate_nothing(store):
    judge_at_once(store, labelers=16, each=20)


WRITER = """
import sys
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
store = open_store(sys.argv[1])
store.add_tasks([a_task()])
comparison = a_comparison(id="pair")
store.add_comparisons([comparison])
for number in range(10**6):
    store.judge(a_judgment(comparison, labeler=f"labeler {number}", id=f"j{number}"))
    print(f"j{number}", flush=True)
"""


def test_a_process_killed_while_writing_loses_nothing_that_it_confirmed(tmp_path):
    path = str(tmp_path / "collection.duckdb")
    command = [sys.executable, "-c", WRITER, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        said = [process.stdout.readline().strip() for _ in range(60)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.read().split()
    with closing(open_store(path)) as store:
        found = {judgment.id for judgment in store.standing("pair")}
        # It may have written one more than it could confirm.
        assert set(said) <= found and len(found) <= len(said) + 1
        judged(store, store.comparison("pair"))
