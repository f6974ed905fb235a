"""A user's function as a judge: what it may take and give, and what is said of its mistakes."""

import json
from pathlib import Path

import pytest

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.rounds.judges.base import Judge, JudgedInput, Score
from preference_training.rounds.judges.choice import build_judge
from preference_training.rounds.judges.functions import FunctionJudge
from preference_training.rounds.judges.verdicts import Verdicts

SAMPLES = [JudgedInput("Why?", "Because.", {"answer": 3}), JudgedInput((Turn("user", "Who?"),), "Me, me.", {"answer": 4})]


@pytest.fixture
def judge(tmp_path):
    """The judge of a file with this text."""

    def judge(text: str, name: str = "score") -> FunctionJudge:
        (tmp_path / "rules.py").write_text(text)
        return FunctionJudge(f"{tmp_path / 'rules.py'}:{name}")

    return judge


@pytest.mark.parametrize("text", [
    "def score(prompt, response): return len(response)",
    "def score(prompt, response, row): return len(response) + 0 * row['answer']",
    "def score(question, text, *, factor=1): return len(text)",
    "def score(prompts, responses): return [len(response) for response in responses]",
    "def score(prompts, responses, rows): return [len(text) + 0 * row['answer'] for text, row in zip(responses, rows)]",
    "import numpy\ndef score(prompts, responses): return numpy.array([len(response) for response in responses])",
    "import torch\ndef score(prompts, responses): return torch.tensor([len(response) for response in responses])",
])  # fmt: skip
def test_a_function_takes_one_response_or_many_with_or_without_the_row(judge, text):
    assert judge(text).judge(SAMPLES) == [Score(8.0), Score(7.0)]


def test_a_prompt_is_a_text_or_messages(judge):
    found = judge("def score(prompt, response): return 1, repr(prompt)").judge(SAMPLES)
    assert found == [Score(1.0, "'Why?'"), Score(1.0, "[{'role': 'user', 'content': 'Who?'}]")]


def test_none_is_no_score_and_true_is_one(judge):
    assert judge("def score(prompt, response): return None if 'Me' in response else True").judge(SAMPLES) == [
        Score(1.0), Score(None),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), [
    ("def score(prompt, response):\n    return [1][len(response)]", r"rules\.py:score, line 2: IndexError: list index out of "
     r"range, for the response 'Because\.' to 'Why\?'\. Fix"),
    ("def score(prompts, responses):\n    return 1 / 0", "line 2: ZeroDivisionError.* for one of the responses from the resp"),
    ("def score(prompt, response): return 'good'", r"gives 'good' for the response 'Because\.' to 'Why\?'\. Expected a finite"),
    ("def score(prompt, response): return float('nan')", "gives nan for"),
    ("def score(prompts, responses): return [1]", r"gave 1 scores for 2 responses\. Expected one each"),
    ("def score(prompt): return 1", r"takes \(prompt\)\. Expected score\(prompt, response\)"),
    ("def other(prompt, response): return 1", r"has no function 'score'; known are: other"),
    ("import nothing_of_this_name", r"rules\.py, line 1: ModuleNotFoundError: No module named"),
])  # fmt: skip
def test_a_mistake_in_the_function_is_told_with_its_line_and_the_response(judge, text, words):
    with pytest.raises(UserError, match=words):
        judge(text).judge(SAMPLES)


def test_a_judge_that_does_not_exist_is_refused(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in {
        "toys": "no judge 'toys'; did you mean toy", "toy:x": "expected toy", "my.py": r"expected FILE\.py:NAME",
        "my.py:f": "my.py: no such file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            build_judge(compose("+rounds=default", "rounds.prompts=x.jsonl", f"rounds.judge={name}"))
    assert build_judge(compose("+rounds=default", "rounds.prompts=x.jsonl", "rounds.judge=toy")).judge(
        [JudgedInput("", "Ugh, not again. Nobody cares.", {}), JudgedInput("", "Gladly! Read the label first.", {})]
    ) == [Score(0.0), Score(1.0)]


# ---- verdicts that are kept --------------------------------------------------------------------------------------------


class Named(Judge):
    """A judge that is never asked."""

    def __init__(self, identity: str):
        self.name, self.identity = "named", identity

    def judge(self, samples):
        raise AssertionError


def test_scores_are_known_by_judge_prompt_response_and_row(tmp_path):
    path, judge = tmp_path / "verdicts.jsonl", Named("one")
    Verdicts(path).add(judge, SAMPLES, [Score(1.5, "why"), Score(None)])
    known = Verdicts(path).known
    assert known[Verdicts.key(judge, SAMPLES[0])] == Score(1.5, "why")
    others = [
        (Named("two"), SAMPLES[0]), (judge, SAMPLES[0]._replace(prompt="When?")), (judge, SAMPLES[0]._replace(response="So.")),
        (judge, SAMPLES[0]._replace(row={"answer": 5})),
    ]  # fmt: skip
    assert all(Verdicts.key(*other) not in known for other in others)


def test_what_could_not_be_judged_is_asked_again_only_where_that_is_wanted(tmp_path):
    path, judge = tmp_path / "verdicts.jsonl", Named("one")
    Verdicts(path).add(judge, SAMPLES, [Score(1.5), Score(None)])
    key = Verdicts.key(judge, SAMPLES[1])
    assert Verdicts(path).known[key] == Score(None) and key not in Verdicts(path, unjudged_again=True).known


def test_half_a_line_of_a_process_that_was_killed_costs_that_line_alone(tmp_path):
    path, judge = tmp_path / "verdicts.jsonl", Named("one")
    Verdicts(path).add(judge, SAMPLES, [Score(1.0), Score(2.0)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    verdicts = Verdicts(path)
    assert list(verdicts.known.values()) == [Score(1.0)]
    verdicts.add(judge, SAMPLES[1:], [Score(2.0)])
    assert list(Verdicts(path).known.values()) == [Score(1.0), Score(2.0)]
    assert json.loads(path.read_text().splitlines()[-1])["score"] == 2.0 and isinstance(path, Path)
