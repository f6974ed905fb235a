"""Answers to the prompts of a file: which prompts a file has, and what is written."""

import io
import json

import pytest

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.generation import answers
from preference_training.generation.answers import read_prompts, write_answers
from preference_training.generation.servers import Reply
from tests.support.files import write

USER = (Turn("user", "Why?"),)
ROWS = [
    ({"prompt": "Why?", "chosen": "Rain.", "rejected": "No."}, "Why?"),
    ({"prompt": "Why?"}, "Why?"),
    ({"question": "Why?"}, "Why?"),
    ({"instruction": "Why?", "input": "Here."}, "Why?\nHere."),
    ({"messages": [{"role": "user", "content": "Why?"}]}, USER),
    ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Rain."}]}, USER),
    ({"conversations": [{"from": "human", "value": "Why?"}]}, USER),
    ({"prompt": [{"role": "user", "content": "Why?"}]}, USER),
]


@pytest.mark.parametrize(("row", "prompt"), ROWS, ids=[json.dumps(row)[:60] for row, _ in ROWS])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_have_the_prompts_of_training_with_or_without_answers(row, prompt, suffix, tmp_path):
    assert read_prompts(str(write(tmp_path / f"rows{suffix}", [row]))) == [prompt]


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "q.txt").write_text("Why?\n\nHow are  you?\n")
    assert read_prompts(str(tmp_path / "q.txt")) == ["Why?", "How are  you?"]
    (tmp_path / "questions").write_text("Why?\n")
    assert read_prompts(str(tmp_path / "questions")) == ["Why?"]


def test_what_has_no_prompts_is_one_message(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "gone.jsonl"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="has no prompts"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="no field 'chosen'"):
        read_prompts(str(write(tmp_path / "other.jsonl", [{"n": 1}])))


class Counting:
    """Answers with its name and the number of the prompt among those of its call."""

    def __init__(self, name: str):
        self.name, self.calls = name, []

    def respond(self, turns, changes, say) -> Reply:
        raise AssertionError("prompts of a file are answered in batches")

    def responses(self, prompts, changes) -> list[str]:
        self.calls.append((len(prompts), changes))
        return [f"{self.name} {number}" for number in range(len(prompts))]


def test_each_prompt_is_a_line_of_json_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answers, "CHUNK", 2)
    before, mine, said = Counting("before"), Counting("mine"), io.StringIO()
    write_answers([before, mine], ["One", "Two", USER], {"seed": 1}, tmp_path / "a.jsonl", said)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        {"prompt": "One", "response": "mine 0", "against": "before 0"},
        {"prompt": "Two", "response": "mine 1", "against": "before 1"},
        {"prompt": [{"role": "user", "content": "Why?"}], "response": "mine 0", "against": "before 0"},
    ]
    assert mine.calls == [(2, {"seed": 1}), (1, {"seed": 1})]
    assert said.getvalue().splitlines() == [
        "answering 3 prompts, 2 at a time ...", "2 of 3 prompts answered", "3 of 3 prompts answered",
    ]  # fmt: skip
    # Without a file they are all that is printed.
    write_answers([mine], ["One"], {}, None, said)
    assert json.loads(capsys.readouterr().out) == {"prompt": "One", "response": "mine 0"}
    with pytest.raises(UserError, match="cannot write"):
        write_answers([mine], ["One"], {}, tmp_path / "gone" / "a.jsonl", said)
