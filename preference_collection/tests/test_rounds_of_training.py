"""Pairs of a round of training that wait for people: through the app, and back to the round as scores."""

import pytest

from preference_collection.exchange.export import export_records
from preference_collection.exchange.importing import import_into
from preference_collection.tests.conftest import a_judgment
from preference_training.data.records.record import Turn
from preference_training.rounds.judges.base import JudgedInput, PendingError
from preference_training.rounds.judges.people import PAIRS, VERDICTS, PeopleJudge

DIALOGUE = "\n\nHuman: Who?\n\nAssistant:"
CONVERSATION = (Turn("system", "Be kind."), Turn("user", "Why?"))
RESPONSES = ("an answer", " spaced", "another\nof two lines")


@pytest.mark.parametrize(
    "prompt", ["Why?", DIALOGUE, CONVERSATION, (Turn("user", "Why?"),), '[{"role": "user", "content": "x"}]', "import os"]
)
def test_pairs_that_wait_are_imported_labeled_and_come_back_as_scores(prompt, store, tmp_path):
    samples = [JudgedInput(prompt, response, {}, RESPONSES) for response in RESPONSES]
    folder = tmp_path / "people"
    with pytest.raises(PendingError):
        PeopleJudge(folder, tmp_path, None).judge(samples)
    import_into(store, str(folder / PAIRS), False, {})
    compared = list(store.comparisons())
    assert len(compared) == 3
    for comparison in compared:
        lengths = [len(answer.text) for answer in comparison.answers]
        store.judge(a_judgment(comparison, lengths.index(max(lengths)) if max(lengths) > 9 else "tie"))
    export_records(store, folder / VERDICTS)
    # The longest wins both of its comparisons, and the others tie.
    found = PeopleJudge(folder, tmp_path, None).judge(samples)
    assert [score.value for score in found] == [0.25, 0.25, 1.0]


def test_a_pair_that_is_bad_on_both_sides_is_a_tie_and_a_skipped_one_has_no_score(store, tmp_path):
    samples = [JudgedInput("Why?", response, {}, RESPONSES) for response in RESPONSES]
    folder = tmp_path / "people"
    with pytest.raises(PendingError):
        PeopleJudge(folder, tmp_path, None).judge(samples)
    import_into(store, str(folder / PAIRS), False, {})
    for comparison in store.comparisons():
        texts = {answer.text for answer in comparison.answers}
        said = 0 if "an answer" not in texts else "bad" if " spaced" in texts else "skip"
        store.judge(a_judgment(comparison, [a.text for a in comparison.answers].index(" spaced") if said == 0 else said))
    export_records(store, folder / VERDICTS)
    found = PeopleJudge(folder, tmp_path, None).judge(samples)
    # an answer: a tie, and a skipped comparison; spaced: a tie and a win; the third: a skipped one and a loss.
    assert [score.value for score in found] == [0.5, 0.75, 0.0]
