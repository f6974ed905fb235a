"""What chat templates write around turns: where that is always the same, prefixes of conversations need not be rendered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.rendering.chat_rendering import ChatTemplate
from preference_training.data.rows.records import Turn
from tests.support.chat_templates import KINDS, WITHOUT_SYSTEM, tokenizer_of

CONTENTS = st.sampled_from(
    ["the", "Yes, no.", " é ", "a\nb\n", "<think>\nso\n</think>\nyes", "x</think>", "<|im_end|>", "[INST]"]
)


def rendered(template: ChatTemplate, prompt, response):
    try:
        return template(prompt, [response])
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(contents=st.lists(CONTENTS, min_size=2, max_size=7), with_system=st.booleans())
def test_responses_are_cut_as_by_rendering_each_prefix(kind, contents, with_system):
    turns = [Turn(("user", "assistant")[k % 2], content) for k, content in enumerate(contents[: len(contents) // 2 * 2])]
    prompt = (Turn("system", "Be brief."),) * (with_system and kind not in WITHOUT_SYSTEM) + (turns[0],)
    quick = ChatTemplate(tokenizer_of(kind))
    slow = ChatTemplate(tokenizer_of(kind))
    slow.turn_texts = None
    assert rendered(quick, prompt, tuple(turns[1:])) == rendered(slow, prompt, tuple(turns[1:]))


@pytest.mark.parametrize("kind", ["Qwen 2.5", "Llama 3"])
def test_a_conversation_is_rendered_twice_whatever_its_length(kind, monkeypatch):
    tokenizer = tokenizer_of(kind)
    template = ChatTemplate(tokenizer)
    usual, calls = tokenizer.apply_chat_template, []
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *given, **options: (calls.append(1), usual(*given, **options))[1]
    )
    turns = [Turn(("user", "assistant")[k % 2], f"turn {k}") for k in range(20)]
    template(turns[:1], [tuple(turns[1:])])
    assert len(calls) == 2


def test_texts_around_turns_that_depend_on_their_place_are_not_known():
    # It writes the reasoning of the last turn only.
    assert ChatTemplate(tokenizer_of("Qwen 3")).turn_texts is None
    assert ChatTemplate(tokenizer_of("Llama 3")).turn_texts is not None
