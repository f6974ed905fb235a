"""The step that judges, with judges of several kinds: what is compared with what, kept, and said in the summary."""

import json

import pytest

from preference_training.core.errors import UserError
from preference_training.core.signals import StoppedError
from preference_training.rounds.driver import work
from preference_training.rounds.judging import judge
from preference_training.rounds.loop import JUDGED, Loop
from preference_training.rounds.summary import summarize
from preference_training.rounds.tables import SAMPLES, read_table, write_table
from tests.rounds import loops
from tests.support.judge_servers import serving, shorter_wins


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """A loop of two rounds with these overrides, whose samples are written by hand: 4 prompts, of which 1 is held out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-test")
    (tmp_path / "first" / "LATEST").mkdir(parents=True)
    loops.make_prompts(tmp_path, count=3, held_out=1)

    def loop(*more: str) -> Loop:
        found = loops.start(tmp_path, "loss=dpo", *more)
        [held_out] = [prompt.prompt_id for prompt in found.held_out]
        trained = [prompt.prompt_id for prompt in found.prompts if not prompt.held_out]
        texts = {1: "same as before", 2: "better", 3: "b"}
        for number, files in enumerate(found.rounds(), start=1):
            if files.number:
                write_table(files.samples, [row(each, k, "x" * (k + 1)) for each in trained for k in range(3)], SAMPLES)
            write_table(files.held_out_samples, [row(held_out, 0, texts[number])], SAMPLES)
        return found

    return loop


def row(prompt_id: int, number: int, text: str) -> dict:
    return {
        "prompt_id": prompt_id, "number": number, "text": text, "token_ids": list(range(len(text))), "n_tokens": len(text),
        "ended": True, "logp": None, "logp_first": None, "model": "m",
    }  # fmt: skip


def scores(path) -> list:
    return [row["score"] for row in read_table(path)]


def test_a_judge_that_compares_gives_win_shares_and_held_out_win_rates_against_the_first_model(loop, capsys):
    with serving(shorter_wins, {"the-model": "1"}) as server:
        found = loop("rounds.judge=openai:the-model", f"rounds.judging.url={server.url}/v1")
        for number in (1, 2, 3):
            judge(found, number)
            summarize(found, number)
    # Three pairs to each of three prompts; those of round 2 are the same. One held-out comparison in each later round.
    assert len(server.questions) == 2 * (3 * 3) + 2 * 2
    assert scores(found.round(1).scores) == scores(found.round(2).scores) == [1.0, 0.5, 0.0] * 3
    assert [scores(found.round(number).held_out_scores) for number in (1, 2, 3)] == [[0.5], [1.0], [1.0]]
    summary = json.loads(found.round(3).summary.read_text())
    assert summary["held_out"]["win_rate"]["mean"] == 1.0
    judged = json.loads((found.round(2).directory / JUDGED).read_text())
    assert judged["samples"] == {
        "comparisons": 9, "unanswered": 0, "in_both_orders": 9, "orders_disagree": 0, "order_disagreement": 0.0,
    }  # fmt: skip
    # Shorter responses always win.
    assert "shorter responses to a prompt have higher scores (correlation -1.00" in capsys.readouterr().out
    assert [each["kind"] for each in json.loads(found.round(2).summary.read_text())["findings"]] == ["length"]


def test_a_second_judge_scores_held_out_responses_only(loop):
    found = loop("rounds.judge='length:characters<=3'", "rounds.second_judge='length:characters>=8'")
    for number in (1, 2, 3):
        judge(found, number)
        summary = summarize(found, number)
    assert {row["second_score"] for row in read_table(found.round(1).scores)} == {None}
    [row] = read_table(found.round(2).held_out_scores)
    # "better" has 6 characters.
    assert (row["score"], row["second_score"], row["reason"]) == (3 / 6, 6 / 8, "6 characters, expected <=3")
    assert summary["held_out"]["win_rate"]["mean"] == 1.0 and summary["held_out"]["second_win_rate"]["mean"] == 0.0
    assert summary["held_out"]["second_score"]["mean"] == 1 / 8


def test_an_ensemble_keeps_the_scores_of_its_members_and_asks_each_once(loop):
    with serving(shorter_wins, {"the-model": "1"}) as server:
        found = loop(
            "rounds.judge=[{judge:'my_judge.py:score',normalize:none},{judge:openai:the-model,weight:2}]",
            f"rounds.judging.url={server.url}/v1",
        )
        judge(found, 1)
        judge(found, 2)
        asked, questions = loops.asked(found.directory.parent), len(server.questions)
        for files in (found.round(1), found.round(2)):
            files.scores.unlink()
            files.held_out_scores.unlink()
        judge(found, 1)
        judge(found, 2)
    assert len(asked) == len(set(asked)) == 3 * 3 + 2
    assert loops.asked(found.directory.parent) == asked and len(server.questions) == questions
    # The letter e is not in x; win shares 1, 1/2 and 0 have the mean 1/2 and the variance 1/6.
    z = 0.5 / (1 / 6) ** 0.5
    assert scores(found.round(1).scores) == pytest.approx([2 * z / 3, 0.0, -2 * z / 3] * 3)
    assert set(json.loads((found.round(1).directory / JUDGED).read_text())["samples"]["members"]) == {
        "1: my_judge.py:score", "2: openai:the-model",
    }  # fmt: skip


def test_people_stop_the_loop_once_a_round_with_all_that_they_are_asked_and_it_goes_on_when_they_have_answered(loop):
    found = loop("rounds.judge=person")
    with pytest.raises(StoppedError, match="^9 pairs wait for a verdict"):
        work(found, 1, "judge")
    assert not found.round(1).scores.is_file()
    rows = [json.loads(line) for line in (found.directory / "people" / "pairs.jsonl").read_text().splitlines()]
    # The longer one is preferred.
    said = [row | {"pairs": [sorted((0, 1), key=lambda k, row=row: -len(row["responses"][k]))]} for row in rows]
    (found.directory / "people" / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    work(found, 1, "judge")
    assert scores(found.round(1).scores) == [0.0, 0.5, 1.0] * 3 and scores(found.round(1).held_out_scores) == [0.5]
    # The samples of round 2 are the same, and known; its held-out response has to be compared with the first model's.
    with pytest.raises(StoppedError, match="^1 pairs wait"):
        work(found, 2, "judge")
    assert scores(found.round(2).scores) == [0.0, 0.5, 1.0] * 3


def test_a_server_that_is_down_stops_the_step_with_a_message_and_without_scores(loop):
    found = loop("rounds.judge=ollama:m", "rounds.judging.url=http://127.0.0.1:9", "evaluation.judge_attempts=1")
    with pytest.raises(UserError, match="does not answer"):
        judge(found, 1)
    assert not found.round(1).scores.is_file() and not found.verdicts.is_file()


def test_a_loop_that_is_opened_again_has_the_same_judges(loop, tmp_path):
    (tmp_path / "rubric.txt").write_text("Short.")
    found = loop(
        """rounds.judge=['length:words<=3',{judge:openai:the-model,rubric:rubric.txt,weight:2},'regex:^a, "b"$']""",
        "rounds.second_judge={judge:rules,rules:['not matches x{2}']}", "rounds.judging.normalize=none",
    )  # fmt: skip
    again = Loop.open(found.directory).config.rounds
    assert again.judge == [
        "length:words<=3", {"judge": "openai:the-model", "rubric": f"{tmp_path}/rubric.txt", "weight": 2}, 'regex:^a, "b"$',
    ]  # fmt: skip
    assert again.second_judge == {"judge": "rules", "rules": ["not matches x{2}"]} and again.judging.normalize == "none"
