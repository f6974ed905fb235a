"""The prompts of a loop: which columns they are in, which of them are held out, and which a round samples."""

import json
from collections import Counter

import pytest

from preference_training.core.errors import UserError
from preference_training.data.records.held_out import is_held_out
from preference_training.data.records.record import Turn
from preference_training.rounds.prompts import LoopPrompt, prompts_of_round, read_prompts, read_stored, store


@pytest.fixture
def read(tmp_path, compose):
    """The prompts of rows, and what was done to them."""

    def read(*rows: dict, **keys):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [f"rounds.{key}={value}" for key, value in ({"held_out": 0} | keys).items()]
        return read_prompts(compose("+rounds=default", f"rounds.prompts={path}", "rounds.judge=toy", *given).rounds)

    return read


def test_a_prompt_is_a_text_or_a_conversation_with_its_system_prompt_and_the_rest_goes_to_the_judge(read):
    prompts, said = read(
        {"prompt": "Why?", "answer": 3},
        {"messages": [{"role": "user", "content": "Who?"}], "system": "Be brief.", "answer": 4},
        {"messages": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]},
    )
    assert [prompt.prompt for prompt in prompts] == [
        "Why?", (Turn("system", "Be brief."), Turn("user", "Who?")), (Turn("user", "And?"),),
    ]  # fmt: skip
    assert [prompt.row for prompt in prompts] == [{"answer": 3}, {"answer": 4}, {}]
    assert list(said.values()) == [1] and "the assistant's" in next(iter(said))


def test_a_prompt_that_comes_again_is_counted(read):
    prompts, said = read({"prompt": "Why?", "n": 1}, {"prompt": "Why?", "n": 2})
    assert ([prompt.row for prompt in prompts], sum(said.values())) == ([{"n": 1}], 1)


def test_a_share_is_held_out_by_a_hash_and_a_file_by_its_prompts(read, tmp_path):
    rows = [{"prompt": f"Question {k}?"} for k in range(40)]
    prompts, _ = read(*rows, held_out=0.3)
    assert [prompt.held_out for prompt in prompts] == [is_held_out(row["prompt"], 0.3) for row in rows]
    (tmp_path / "held.jsonl").write_text('{"prompt": "Question 3?"}\n{"prompt": "Another?"}\n')
    prompts, said = read(*rows[:5], held_out=tmp_path / "held.jsonl")
    assert [prompt.prompt for prompt in prompts if prompt.held_out] == ["Question 3?", "Another?"]
    assert "Question 3?" not in [prompt.prompt for prompt in prompts if not prompt.held_out] and sum(said.values()) == 1


@pytest.mark.parametrize(("rows", "words"), [
    ([{"id": 7}], "row 1: none of the columns id is a prompt"),
    ([{"prompt": "Why?"}, {"prompt": "  "}], "row 2: field 'prompt' is empty"),
    ([{"prompt": "Why?", "tools": [{"name": "f"}]}], "row 1: field 'tools' is not empty"),
    ([{"messages": [{"role": "assistant", "content": "So."}]}], "row 1: field 'messages' has no turn before the assistant's"),
    ([], "has no rows"),
])  # fmt: skip
def test_a_row_without_a_prompt_is_refused_with_its_number(read, rows, words):
    with pytest.raises(UserError, match=f"rounds.prompts: .*{words}"):
        read(*rows)


def test_what_is_stored_is_read_again(tmp_path):
    prompts = [
        LoopPrompt(0, "Why? \n{é", {"answer": [1, None]}, False),
        LoopPrompt(1, (Turn("system", "x"), Turn("user", "Who?")), {}, True),
    ]
    store(prompts, tmp_path / "prompts.parquet")
    assert read_stored(tmp_path / "prompts.parquet") == prompts


def test_rounds_take_the_next_prompts_of_a_random_order_until_each_has_come():
    prompts = [LoopPrompt(k, f"{k}", {}, k >= 10) for k in range(12)]
    rounds = [[each.prompt_id for each in prompts_of_round(prompts, number, 5, 0)] for number in (1, 2, 3, 4)]
    assert sorted(rounds[0] + rounds[1]) == sorted(rounds[2] + rounds[3]) == list(range(10))
    assert all(each == sorted(each) for each in rounds)
    # 4 do not divide 10: over five rounds each prompt comes twice, less those that would come twice in a round.
    counts = Counter(each.prompt_id for number in range(1, 6) for each in prompts_of_round(prompts, number, 4, 0))
    assert set(counts) == set(range(10)) and max(counts.values()) == 2
    assert [each.prompt_id for each in prompts_of_round(prompts, 3, None, 0)] == list(range(10))


@pytest.mark.parametrize(("text", "words"), [
    ("", "rounds.prompts: mine.jsonl has no rows"),
    ('{"prompt": \n', "rounds.prompts: mine.jsonl, row 1: not JSON: .* Expected one object a line. Fix the row.$"),
    ("[1]\n", "rounds.prompts: mine.jsonl, row 1: found int, expected a JSON object. Fix the row.$"),
])  # fmt: skip
def test_a_file_without_prompts_is_told_by_the_key_that_names_it(text, words, compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"^{words}"):
        read_prompts(compose("+rounds=default", "rounds.prompts=mine.jsonl", "rounds.judge=toy").rounds)
