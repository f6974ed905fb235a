"""Undo and judging again, over HTTP: what was undone, what stands again, and what is replaced."""

import re

from preference_collection.store.model import shown_order
from preference_collection.tests.test_web import a_choice, filled, shown_in, signed_in


def test_undo_shows_the_comparison_again_with_its_reasons_comment_and_better_answer(store):
    filled(store, "a", "b")
    client = signed_in(store)
    client.post(
        "/api/judge", json=a_choice("pair-a", reasons=["faster"], comment="good <b>", edited="\n<i> mine", edited_from=1)
    )
    answer = client.post("/api/undo", json={}).json()
    assert answer["undone"] == "pair-a" == shown_in(answer["html"]) and not store.standing("pair-a")
    assert re.search(r'data-reason="faster" aria-pressed="true"', answer["html"])
    assert 'value="good &lt;b&gt;"' in answer["html"] and ">\n\n&lt;i&gt; mine</textarea>" in answer["html"]
    assert f'data-number="{shown_order("Ada", "pair-a", 2).index(1) + 1}">\n\n' in answer["html"]
    assert answer["next"]["progress"] == "0 judged by you · up to 2 left"
    assert (answer["what"], answer["title"], answer["again"]) == ("answer 1 is better", "The a", "")
    assert client.post("/api/undo", json={}).json() == {"undone": None, "settled": False}


def test_an_undo_of_a_judgment_that_replaced_another_says_that_the_earlier_stands_and_goes_no_further_back(store):
    filled(store, "a", "b")
    client = signed_in(store)
    tie = {"choice": "tie", "ranks": []}
    again = a_choice("pair-a")
    sent = (a_choice("pair-b"), a_choice("pair-a", **tie), again, again)
    replaced = [client.post("/api/judge", json=each).json()["replaced"] for each in sent]
    assert replaced == [False, False, True, False]
    answer = client.post("/api/undo", json={}).json()
    assert (answer["undone"], answer["what"], answer["again"]) == ("pair-a", "answer 1 is better", "a tie")
    answer = client.post("/api/undo", json={}).json()
    assert (answer["undone"], answer["again"]) == ("pair-b", "")
    assert client.post("/api/undo", json={}).json()["undone"] is None
    assert [judgment.choice for judgment in store.standing("pair-a")] == ["tie"]
