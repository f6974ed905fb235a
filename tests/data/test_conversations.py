"""Conversations as token ids: what chat templates write of them, and that the assistant's turns alone are scored."""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn, message_of
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.records import END_NOT_MARKED, NO_REASONING, NO_TOOLS, RENDERED
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.conversations import (
    RowError,
    parse_serialized_turns,
    parse_tools,
    parse_turns,
    part_conversations,
    split_conversation,
    with_roles,
)
from preference_training.data.tokenization import tokenize_records
from tests.support.chat_templates import KINDS, LLAMA_3, MARKED, QWEN_2, WITH_TOOLS, WITHOUT_SYSTEM, tokenizer_of, with_template

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


# ---- what is scored ---------------------------------------------------------------------------------------------------------

TWO = (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2"))


def picture(tokenizer, found, k: int = 0) -> str:
    """Prompt | response, with the scored spans in brackets."""
    ids, at, text = found.responses[k], 0, tokenizer.decode(found.prompt_ids) + "|"
    for start, end in (found.spans or [[(0, len(r))] for r in found.responses])[k]:
        text += f"{tokenizer.decode(ids[at:start])}[{tokenizer.decode(ids[start:end])}]"
        at = end
    return text + tokenizer.decode(ids[at:])


END = "<|endoftext|>"
PICTURES = {
    "hh": f"\n\nHuman: q1\n\nAssistant:|[ a1]\n\nHuman: q2\n\nAssistant:[ a2{END}]",
    "raw": f"q1\n\n|[a1]\n\nq2\n\n[a2{END}]",
    "chatml": "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n|[a1<|im_end|>]\n<|im_start|>user\nq2<|im_end|>\n"
    f"<|im_start|>assistant\n[a2<|im_end|>{END}]",
}


@pytest.mark.parametrize("template", PICTURES)
def test_built_in_templates_score_each_assistant_turn(template):
    tokenizer = tokenizer_of("Qwen 2.5 base")
    assert picture(tokenizer, learned(tokenizer, TWO, template=template)) == PICTURES[template]


@pytest.mark.parametrize("template", ["chat", "chatml", "hh"])
def test_last_turn_makes_the_others_the_prompt(template):
    tokenizer = tokenizer_of("SmolLM 2")
    last, every = (learned(tokenizer, TWO, train_on, template=template) for train_on in ("last_turn", "all_turns"))
    assert whole_and_mask(last)[0] == whole_and_mask(every)[0]
    assert [tokenizer.decode(ids) for ids in scored(last)] == [tokenizer.decode(ids) for ids in scored(every)[-1:]]


def test_built_in_templates_render_calls_of_tools_and_their_results():
    turns = (Turn("user", "q"), Turn("assistant", "", CALL), Turn("tool", "r"), Turn("assistant", "a"))
    tokenizer, report = tokenizer_of("SmolLM 2"), DataReport()
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert picture(tokenizer, learned(tokenizer, turns, template="chatml", tools=TOOLS, report=report)) == (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n|[{call}<|im_end|>]\n<|im_start|>tool\nr<|im_end|>\n"
        "<|im_start|>assistant\n[a<|im_end|>]"
    )
    # Which tools there are is for chat templates alone.
    assert report.changed == {NO_TOOLS: 1}
    assert f"[ {call}]\n\nTool: r\n\nAssistant:[ a" in picture(tokenizer, learned(tokenizer, turns, template="hh"))


def test_tools_that_a_chat_template_does_not_render_are_counted_and_others_are_rendered():
    for kind, changed in (("SmolLM 2", {NO_TOOLS: 1}), ("Qwen 2.5", {})):
        report, tokenizer = DataReport(), tokenizer_of(kind)
        found = learned(tokenizer, TWO, tools=TOOLS, report=report)
        assert report.changed == changed
        assert ('"description": "d"' in tokenizer.decode(found.prompt_ids)) == (not changed)


def test_calls_with_arguments_that_a_template_takes_as_text_are_given_as_text():
    template = LLAMA_3.replace("(call.arguments | tojson)", "call.arguments")
    tokenizer = with_template(template, *KINDS["Llama 3"][1:])
    turns = (Turn("user", "q"), Turn("assistant", "", CALL), Turn("tool", "r"), Turn("assistant", "a"))
    assert '"parameters": {"x": 1}}<|eot_id|>]' in picture(tokenizer, learned(tokenizer, turns))


def test_calls_that_a_chat_template_drops_are_refused():
    turns = (Turn("user", "q"), Turn("assistant", "", CALL), Turn("tool", "r"), Turn("assistant", "a"))
    with pytest.raises(UserError, match="template: the tokenizer's chat template drops calls of tools, in turn 2") as refused:
        learned(tokenizer_of("SmolLM 2"), turns)
    # The row has no fault.
    assert str(refused.value).endswith("or rows without such a turn. Or skip such rows with on_bad_row=skip.")


def test_a_developer_turn_is_a_system_turn_for_templates_without_developers():
    turns = (Turn("developer", "be brief"), *TWO)
    tokenizer = tokenizer_of("Qwen 2.5")
    as_system = learned(tokenizer, (Turn("system", "be brief"), *TWO))
    assert whole_and_mask(learned(tokenizer, turns)) == whole_and_mask(as_system)
    assert "developer" in tokenizer_of("Llama 3").decode(learned(tokenizer_of("Llama 3"), turns).prompt_ids)


FIRST, SECOND = (Turn("assistant", f"<think>\nt{n}\n</think>\n\na{n}") for n in (1, 2))
THOUGHTS = (TWO[0], FIRST, TWO[2], SECOND)


@pytest.mark.parametrize("marked", [False, True])
def test_reasoning_is_kept_and_dropped_as_the_template_does_and_what_is_dropped_is_counted(marked):
    tokenizer, report = tokenizer_of("Qwen 3", marked), DataReport()
    assert picture(tokenizer, learned(tokenizer, THOUGHTS, report=report)) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n|[a1<|im_end|>]\n<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\nt2\n</think>\n\na2<|im_end|>]"
    )
    assert report.changed == {NO_REASONING: 1}


def test_reasoning_before_a_call_that_later_turns_take_away_does_not_move_the_spans():
    call = Turn("assistant", "<think>\nt1\n</think>\n\n", CALL)
    turns = (Turn("user", "q1"), call, Turn("tool", "r"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2"))
    tokenizer = tokenizer_of("Qwen 3")
    found = learned(tokenizer, turns)
    assert [tokenizer.decode(ids) for ids in scored(found)] == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
        "a1<|im_end|>",
        "<think>\n\n</think>\n\na2<|im_end|>",
    ]


def test_an_end_that_the_marks_leave_out_is_not_scored_and_counted():
    template = MARKED["Mistral"].replace(
        "{{- message.content + eos_token }}{%- endgeneration %}", "{{- message.content }}{%- endgeneration %}{{- eos_token }}"
    )
    tokenizer, report = with_template(template, *KINDS["Mistral"][1:]), DataReport()
    found = learned(tokenizer, TWO, report=report)
    assert picture(tokenizer, found) == "<s>[INST] q1[/INST]|[ a1]</s>[INST] q2[/INST][ a2]</s>"
    assert report.changed == {END_NOT_MARKED: 1}
    whole = expected(tokenizer, TWO, return_assistant_tokens_mask=True)
    assert whole_and_mask(found) == (whole["input_ids"], whole["assistant_masks"])


def test_a_template_whose_prefixes_are_no_prefixes_is_refused_with_the_reason():
    template = QWEN_2.replace("{%- for message in messages %}", "{{- messages | length }}{%- for message in messages %}", 1)
    tokenizer = with_template(template, *KINDS["Qwen 2.5"][1:])
    with pytest.raises(UserError, match="renders a prompt differently with a response .*cannot be separated"):
        learned(tokenizer, TWO)


def test_a_conversation_that_starts_with_the_assistant_has_no_prompt_but_what_the_template_writes():
    tokenizer = tokenizer_of("SmolLM 2")
    text = picture(tokenizer, learned(tokenizer, TWO[1:]))
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n<|im_start|>assistant\n|[a1"
    )


def test_a_tokenizer_without_offsets_scores_the_same_spans():
    fast = tokenizer_of("SmolLM 2")

    class Slow:
        """What the code uses of a tokenizer that is all Python."""

        is_fast = False

        def __getattr__(self, name):
            return getattr(fast, name)

        def __call__(self, *given, **options):
            return fast(*given, **options)

    for template in ("chatml", "hh", "chat"):
        assert whole_and_mask(learned(Slow(), TWO, template=template)) == whole_and_mask(learned(fast, TWO, template=template))


# ---- pairs ------------------------------------------------------------------------------------------------------------------


def compared(tokenizer, prompt, chosen, rejected, report=None, template="chat", **options):
    record = PreferenceRecord(prompt, [chosen, rejected], [(0, 1)], chosen, 1, "rows.jsonl, row 1")
    [found] = tokenize_records([record], tokenizer, TokenSettings("pairs", 10**6, 10**5, template=template, **options), report)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_responses_of_several_turns_stand_behind_one_prompt_and_their_users_are_not_scored(kind):
    tokenizer = tokenizer_of(kind)
    chosen, rejected = TWO[1:], (Turn("assistant", "b1"), *TWO[2:3], Turn("assistant", "b2"))
    found = compared(tokenizer, TWO[:1], chosen, rejected)
    for k, response in enumerate((chosen, rejected)):
        alone = learned(tokenizer, (*TWO[:1], *response))
        one = replace(found, responses=[found.responses[k]], spans=[found.spans[k]])
        assert whole_and_mask(one) == whole_and_mask(alone)


def test_a_response_that_is_a_text_is_scored_as_a_whole_beside_one_of_several_turns():
    tokenizer = tokenizer_of("SmolLM 2")
    found = compared(tokenizer, TWO[:1], "b", TWO[1:])
    assert [tokenizer.decode(ids) for ids in scored(found)] == ["b<|im_end|>"]
    assert [tokenizer.decode(ids) for ids in scored(found, 1)] == ["a1<|im_end|>", "a2<|im_end|>"]


PREFILLED = {
    "chat": "<|im_start|>assistant\nMy answer is| ",
    "chatml": "<|im_start|>assistant\nMy answer is| ",
    "hh": "Assistant: My answer is| ",
}


@pytest.mark.parametrize("template", PREFILLED)
def test_responses_continue_an_assistant_turn_at_the_end_of_the_prompt(template):
    tokenizer, turns = tokenizer_of("SmolLM 2"), (Turn("user", "q"), Turn("assistant", "My answer is "))
    found = compared(tokenizer, turns, "Blue.", "Seven.", template=template)
    before, after = PREFILLED[template].rsplit("|", 1)
    assert tokenizer.decode(found.prompt_ids).endswith(before)
    assert [tokenizer.decode(ids) for ids in found.responses] == [f"{after}{text}<|im_end|>" for text in ("Blue.", "Seven.")]
    if template == "chat":
        whole = expected(tokenizer, (Turn("user", "q"), Turn("assistant", "My answer is Blue.")))["input_ids"]
        assert whole[: len(found.prompt_ids + found.responses[0])] == found.prompt_ids + found.responses[0]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
@pytest.mark.parametrize("template", [None, "raw", "chat", "chatml"])
def test_prompts_that_are_rendered_already_are_read_as_they_are(template, end):
    tokenizer, report = tokenizer_of("SmolLM 2"), DataReport()
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    found = compared(tokenizer, text, f"Blue.{end}", f"Seven.{end}", report, template, system_prompt="unused")
    turns = (Turn("system", "Be brief."), Turn("user", "q"))
    as_turns = compared(tokenizer, turns, "Blue.", "Seven.")
    assert (found.prompt_ids, found.responses) == (as_turns.prompt_ids, as_turns.responses)
    assert report.changed == {RENDERED: 1}
    with pytest.raises(UserError, match="the text contains '<|im_end|>'"):
        compared(tokenizer, text, "Blue.<|im_end|> Red.", "Seven.")
    with pytest.raises(UserError, match="the text contains '<|im_end|>'"):
        compared(tokenizer, "What is <|im_end|>?", "Blue.", "Seven.")


# ---- messages of rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        (
            [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}],
            (Turn("user", "q"), Turn("assistant", "a")),
        ),
        ([{"role": "prompter", "content": "q", "from": None, "value": None}], (Turn("user", "q"),)),
        ([{"role": None, "content": None, "from": "bot", "value": "a"}], (Turn("assistant", "a"),)),
        ({"role": "assistant", "content": "a"}, (Turn("assistant", "a"),)),
        ([{"role": "system", "content": ""}, {"role": "user", "content": "q"}], (Turn("user", "q"),)),
        ([{"role": "system", "content": None}, {"role": "Developer", "content": "d"}], (Turn("developer", "d"),)),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"text": "c", "type": None}]}],
            (Turn("user", "abc"),),
        ),
        ([{"role": "ipython", "content": ""}, {"from": "observation", "value": "r"}], (Turn("tool", ""), Turn("tool", "r"))),
        (
            [{"role": "tool", "content": "r", "name": "f", "tool_call_id": "1", "score": 3, "tool_calls": []}],
            (Turn("tool", "r", '{"name": "f", "tool_call_id": "1"}'),),
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}],
            (Turn("assistant", "", CALL),),
        ),
        (
            [{"role": "assistant", "tool_calls": '[{"name": "f", "id": null, "arguments": {"x": 1}}]'}],
            (Turn("assistant", "", CALL),),
        ),
        (  # An argument may be null.
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]}],
            (Turn("assistant", "", CALL.replace('"x": 1', '"x": 1, "y": null')),),
        ),
        ([{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}], (Turn("assistant", "", CALL),)),
        (
            [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
            (Turn("assistant", "", CALL),),
        ),
        (
            [{"role": "assistant", "content": "\n", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}],
            (Turn("assistant", "", CALL),),
        ),
        ([{"role": "tool", "content": " "}], (Turn("tool", ""),)),
        ([{"role": "tool", "content": [{"type": "text", "text": "\n"}]}], (Turn("tool", ""),)),
    ],
)
def test_messages_of_every_dialect_are_turns(messages, turns):
    assert parse_turns(messages, "messages") == turns
    text = json.dumps(messages)
    if "role" in text.split(":")[0] or "from" in text.split(":")[0]:
        assert parse_turns(parse_serialized_turns(text, "messages"), "messages") == turns


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
            "turn 1 has a part of the type 'image', but models",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "has a part of the type 'input_audio'"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"video": "a.mp4"}]}, "has a part of the type 'video'"),
        ({"role": "user", "content": [3]}, "has a part of the type 'int'"),
        ({"role": "assistant", "content": None}, "turn 1 is null, expected a text"),
        ({"role": "user", "content": ""}, "turn 1 is empty"),
        ({"role": "user", "content": {"a": 1}}, "turn 1 is dict, expected a text"),
        ({"role": "assistant", "content": "", "tool_calls": ["x"]}, "turn 1 has the tool call 'x'. Expected {function: {name"),
        ({"role": "narrator", "content": "x"}, "turn 1 has the role 'narrator', expected one of system, developer, user"),
        ({"content": "x"}, "turn 1 is not {role, content}"),
    ],
)
def test_messages_that_are_no_turns_are_reported_by_name(message, told):
    with pytest.raises(RowError) as refusal:
        parse_turns([message], "messages")
    assert told in str(refusal.value)


def test_roles_may_be_mapped():
    row = with_roles({"messages": [{"role": "Narrator", "content": "x"}], "role": "narrator"}, {"narrator": "system"})
    assert parse_turns(row["messages"], "messages") == (Turn("system", "x"),)
    assert row["role"] == "narrator"


@pytest.mark.parametrize("template", ["chat", "chatml", "hh"])
def test_an_assistant_turn_of_weight_0_between_others_is_read_and_not_scored(template):
    tokenizer = tokenizer_of("SmolLM 2")
    turns = (*TWO, Turn("user", "q3"), Turn("assistant", "a3"))
    unlearned = (*TWO[:-1], TWO[-1]._replace(rest='{"weight": 0}'), *turns[-2:])
    every, some = (learned(tokenizer, of, template=template) for of in (turns, unlearned))
    assert (some.prompt_ids, some.responses) == (every.prompt_ids, every.responses)
    first, _, last = scored(every)
    assert scored(some) == [first, last]


def test_tools_are_objects_or_their_text():
    for value in (json.loads(TOOLS), TOOLS, [json.dumps(json.loads(TOOLS)[0])]):
        assert parse_tools(value, "tools") == TOOLS
    assert [parse_tools(value, "tools") for value in (None, "", "[]", [])] == [""] * 4
    with pytest.raises(RowError, match="field 'tools' is str, expected a list of tools"):
        parse_tools("weather", "tools")


A, B = Turn("assistant", "b1"), Turn("assistant", "b2")
RESULT = Turn("tool", "r")


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        (TWO, (*TWO[:3], B), 3),
        (TWO, (TWO[0], A, TWO[2], B), 1),
        # One ends where the other goes on.
        (TWO[:2], (*TWO[:3], B), 1),
        (TWO, TWO, 3),
        # Tools that return something else.
        ((TWO[0], A, RESULT, B), (TWO[0], A, Turn("tool", "s"), B), 1),
        # Of assistant turns in a row the first begins the response.
        ((TWO[0], A, TWO[1]), (TWO[0], A, B), 1),
        # Other questions are other prompts.
        (TWO, (Turn("user", "x"), *TWO[1:]), None),
        (TWO, (*TWO[:2], Turn("user", "x"), B), None),
        (TWO[:1], TWO[:1], None),
    ],
)
def test_pairs_part_at_an_assistant_turn(chosen, rejected, shared):
    found = part_conversations([chosen, rejected])
    assert found == (None if shared is None else (chosen[:shared], [chosen[shared:], rejected[shared:]]))
