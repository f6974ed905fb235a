"""The page on training without labels: its prompts are read, and its judge scores responses to them."""

from preference_training.rounds.judges.base import JudgedInput, Score
from preference_training.rounds.judges.choice import build_judge
from preference_training.rounds.prompts import read_prompts
from tests.support import shown


def test_the_files_of_the_page_are_read_and_its_judge_scores_what_they_ask_for(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown.write_files("docs/without-labels.md", tmp_path)
    config = compose("+rounds=default", "rounds.prompts=prompts.jsonl", "rounds.judge=my_judge.py:score", "rounds.held_out=0.5")
    prompts, said = read_prompts(config.rounds)
    assert [prompt.row["answer"] for prompt in prompts] == ["Nile", "Jupiter", "mercury", "Goethe"]
    # As the output that the page shows has it.
    assert ([prompt.held_out for prompt in prompts], said) == ([False, False, False, True], {})
    texts = ("The Nile.", "", "Gold.")
    scores = build_judge(config).judge([JudgedInput(prompts[0].prompt, text, prompts[0].row) for text in texts])
    assert scores == [Score(1 - 0.009), Score(None), Score(-0.005)]
