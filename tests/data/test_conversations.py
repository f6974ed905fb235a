"""Conversations as token ids: what chat templates write of them, and that the assistant's turns alone are scored."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from preference_training.data.rows.conversations import split_conversation
from preference_training.data.rows.records import PreferenceRecord, Turn, message_of
from preference_training.data.tokenization import TokenSettings, tokenize_records
from tests.support.chat_templates import KINDS, MARKED, WITH_TOOLS, WITHOUT_SYSTEM, tokenizer_of

WORDS = st.lists(st.sampled_from(["the", "Yes", "no.", "é", "漢", "🙂", "1,", "a\nb", "<b>", "{x}"]), min_size=1, max_size=5)
TEXTS = WORDS.map(" ".join)
CALL = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]})
TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}])


@st.composite
def conversations(draw, system: bool = True, tools: bool = False) -> tuple[Turn, ...]:
    """Questions and answers in turn, perhaps behind a system turn, perhaps with calls of tools before answers."""
    turns = [Turn("system", draw(TEXTS))] * (system and draw(st.booleans()))
    for _ in range(draw(st.integers(1, 4))):
        turns.append(Turn("user", draw(TEXTS)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            turns += [Turn("assistant", "", CALL), Turn("tool", draw(TEXTS))]
        turns.append(Turn("assistant", draw(TEXTS)))
    return tuple(turns)


def learned(
    tokenizer, turns: tuple[Turn, ...], train_on: str = "all_turns", tools: str = "", template: str = "chat", report=None
):
    """The only example of SFT on a conversation."""
    prompt, response = split_conversation(turns, "messages")
    record = PreferenceRecord(prompt, [response], [], response, 1, "rows.jsonl, row 1", tools=tools)
    settings = TokenSettings("targets", 10**6, 10**5, template=template, train_on=train_on)
    [found] = tokenize_records([record], tokenizer, settings, report)
    return found


def scored(found, k: int = 0) -> list[list[int]]:
    """The ids of each scored span of a response."""
    ids = found.responses[k]
    return [ids[start:end] for start, end in (found.spans or [[(0, len(ids))]])[k]]


def expected(tokenizer, turns, tools: str = "", **options) -> dict:
    listed = json.loads(tools) if tools else None
    return tokenizer.apply_chat_template([message_of(turn) for turn in turns], tools=listed, return_dict=True, **options)


def whole_and_mask(found) -> tuple[list[int], list[int]]:
    ids = found.prompt_ids + found.responses[0]
    mask = [0] * len(ids)
    for start, end in (found.spans or [[(0, len(found.responses[0]))]])[0]:
        before = len(found.prompt_ids)
        mask[before + start : before + end] = [1] * (end - start)
    return ids, mask


def up_to_the_end(ids: list[int], tokenizer) -> list[int]:
    """Ids up to the last end-of-sequence token, which is all that is learned."""
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return (
        ids[: ends[-1] + 1] if ends and tokenizer.decode(ids[ends[-1] + 1 :]).strip() == "" else [*ids, tokenizer.eos_token_id]
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_token_ids_are_those_of_the_chat_template_and_only_the_assistant_is_scored(kind, data):
    tokenizer, tools = tokenizer_of(kind), kind in WITH_TOOLS and data.draw(st.booleans())
    turns = data.draw(conversations(kind not in WITHOUT_SYSTEM, tools))
    given_tools = TOOLS if tools and kind != "GPT-OSS" else ""
    found = learned(tokenizer, turns, tools=given_tools)
    ids, _ = whole_and_mask(found)
    assert ids == up_to_the_end(expected(tokenizer, turns, given_tools)["input_ids"], tokenizer)
    spans = [tokenizer.decode(part) for part in scored(found)]
    answers = [turn for turn in turns if turn.role == "assistant"]
    assert len(spans) == len(answers)
    for span, turn in zip(spans, answers, strict=True):
        # A span holds its turn, and nothing but the marks of its template around it.
        text = turn.content or '"x": 1'
        assert span.count(text) >= 1
        assert not any(other.content in span.replace(text, "", 1) for other in turns if len(other.content) > 12)
    # An earlier turn ends as the last does, so that a model learns to end each; only GPT-OSS has a token of its own for that.
    ends = {part[-1] for part in scored(found)[:-1]}
    if kind not in ("GPT-OSS", "Qwen 2.5 base", "Phi", "Gemma 3"):
        assert ends <= {tokenizer.eos_token_id}
    assert all(token in tokenizer.all_special_ids for token in ends)


@pytest.mark.parametrize("kind", MARKED)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_where_a_template_marks_what_is_generated_the_mask_is_its_own(kind, data):
    tokenizer = tokenizer_of(kind, marked=True)
    turns = data.draw(conversations())
    assume(sum(turn.role == "assistant" for turn in turns) > 1)
    ids, mask = whole_and_mask(learned(tokenizer, turns))
    whole = expected(tokenizer, turns, return_assistant_tokens_mask=True)
    assert ids == whole["input_ids"][: len(ids)]
    assert mask == whole["assistant_masks"][: len(ids)]
    assert sum(whole["assistant_masks"][len(ids) :]) == 0 and 1 in mask


@pytest.mark.parametrize("kind", MARKED)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_marks_and_rendered_prefixes_find_the_same_turns(kind, data):
    turns = data.draw(conversations())
    marked, plain = (learned(tokenizer_of(kind, marks), turns) for marks in (True, False))
    assert whole_and_mask(marked)[0] == whole_and_mask(plain)[0]
    texts = [[tokenizer_of(kind).decode(part).strip() for part in scored(found)] for found in (marked, plain)]
    assert texts[0] == texts[1]
