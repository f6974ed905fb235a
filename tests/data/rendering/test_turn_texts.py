"""What chat templates write around turns: where that is always the same, prefixes of conversations need not be rendered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.chat_rendering import ChatTemplate
from preference_training.data.rendering.records import Renderer
from preference_training.data.rendering.settings import TokenSettings
from tests.support.chat_templates import KINDS, WITHOUT_SYSTEM, tokenizer_of, with_template

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


def counted(tokenizer, monkeypatch) -> list:
    """The conversations that a tokenizer renders from now on, with their options."""
    usual, calls = tokenizer.apply_chat_template, []
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda *given, **options: (calls.append((given, options)), usual(*given, **options))[1],
    )
    return calls


def test_a_template_is_probed_once_and_again_where_it_has_changed(monkeypatch):
    tokenizer = with_template(KINDS["Llama 3"][0], *KINDS["Llama 3"][1:])
    calls = counted(tokenizer, monkeypatch)
    first = ChatTemplate(tokenizer)
    probes = len(calls)
    again = ChatTemplate(tokenizer)
    # What is left checks the syntax.
    assert (again.opening, again.turn_texts, len(calls) - probes) == (first.opening, first.turn_texts, 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|end|>")
    assert ChatTemplate(tokenizer).turn_texts.ended == "<|end|>"


def test_whether_a_template_renders_tools_is_tried_once_for_each_set_of_them(monkeypatch):
    tokenizer, report = tokenizer_of("Qwen 2.5"), DataReport()
    renderer = Renderer(tokenizer, TokenSettings("targets", 500, 250, "keep_end", "chat"), report)
    calls = counted(tokenizer, monkeypatch)
    for number in range(6):
        tools = '[{"name": "f"}]' if number % 2 else '[{"name": "g"}]'
        renderer.render(PreferenceRecord((Turn("user", f"q {number}"),), ["a"], [], "a", number, "", tools=tools))
    without_tools = [options for _, options in calls if not options.get("tools")]
    assert (len(without_tools), report.changed) == (2, {})
