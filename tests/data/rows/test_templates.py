"""How conversations become text: each template on texts, HH dialogues and conversations, and what it does with the system."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.data.rendering.chat_rendering import ConversationError, response_opening
from preference_training.data.rows.templates import ASSISTANT, HUMAN, build_template, parse_dialogue, split_dialogue
from preference_training.modeling.tokenizer import byte_level_tokenizer

# As chat models ship them. Llama 2's writes both special tokens itself, takes the system into the first turn, and refuses
# conversations that do not alternate.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
# Marks the last message, so that a prompt reads otherwise once it is answered.
LAST_IS_MARKED = (
    "{% for message in messages %}{{ ('*' if loop.last else '') + message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}"
)

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
TURNS = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Why?"))
WITH_SYSTEM = (Turn("system", "Be brief."), *TURNS)


def tokenizer_of(chat_template: str | None = None, eos: str = "</s>"):
    """A tokenizer with a chat template; a template looks at nothing else of it but its special tokens."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
    tokenizer.chat_template = chat_template
    return tokenizer


PLAIN, LLAMA, CHAT = tokenizer_of(), tokenizer_of(LLAMA_2), tokenizer_of(CHATML, eos="<|im_end|>")


def rendered(name, prompt, responses=("Yes",), system_prompt=None, tokenizer=PLAIN):
    """Text of the prompt, and of its only response."""
    text, [response] = build_template(name, system_prompt, tokenizer)(prompt, list(responses))
    return text, response


# ---- HH dialogues -------------------------------------------------------------------------------------------------------

markers = ("\n\nHuman:", "\n\nAssistant:")
contents = st.text(min_size=1).filter(lambda text: text.strip() and not any(marker in text for marker in markers))


@st.composite
def dialogues(draw) -> str:
    """HH prompts in the form that the data set has them: perhaps a preamble, turns by turns, the assistant's marker."""
    preamble = draw(st.just("") | contents.map(str.strip))
    turns = draw(st.lists(st.tuples(contents, contents), max_size=3))
    text = preamble + "".join(f"{HUMAN} {question}{ASSISTANT} {answer}" for question, answer in turns)
    return f"{text}{HUMAN} {draw(contents)}{ASSISTANT}"


@settings(deadline=None)
@given(dialogues())
def test_a_dialogue_that_is_parsed_and_written_again_is_the_same_text(text):
    turns = parse_dialogue(text)
    assert turns[-1].role == "user"
    assert rendered("hh", turns) == rendered("hh", text) == (text, " Yes")


@settings(deadline=None)
@given(dialogues())
def test_the_turns_of_a_dialogue_alternate_behind_its_preamble(text):
    roles = [turn.role for turn in parse_dialogue(text)]
    preamble = [] if text.startswith(HUMAN) else ["system"]
    questions = len(roles) - len(preamble)
    assert questions % 2 == 1
    assert roles == preamble + (["user", "assistant"] * questions)[:questions]


@settings(deadline=None)
@given(dialogues(), st.text().filter(lambda text: ASSISTANT not in text))
def test_a_dialogue_is_cut_after_its_last_marker(prompt, answer):
    assert split_dialogue(prompt + answer) == (prompt, answer)


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_inspected(text):
    turns = parse_dialogue(text + ASSISTANT)
    assert turns is None or (HUMAN in text and all(turn.role in ("system", "user", "assistant") for turn in turns))


@pytest.mark.parametrize(
    "text",
    ["What is blue?", "", f"{HUMAN} Hi", f"{HUMAN} Hi{ASSISTANT} Hello", f"The sky{ASSISTANT}", "Human: Hi Assistant:"],
    ids=["a question", "nothing", "no answer is asked for", "an answer", "no human", "no line breaks"],
)
def test_a_text_that_is_no_hh_prompt_is_none(text):
    assert parse_dialogue(text) is None


def test_a_text_without_an_assistant_cannot_be_cut():
    with pytest.raises(ValueError, match="substring not found"):
        split_dialogue(f"{HUMAN} Hi")


def test_a_blank_behind_the_last_marker_is_not_part_of_the_prompt():
    assert parse_dialogue(f"{DIALOGUE} \n") == parse_dialogue(DIALOGUE) == TURNS


# ---- texts --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(prompt=st.text() | dialogues(), response=st.text(), system=st.none() | st.text())
def test_without_a_template_and_as_raw_a_text_stays_as_it_is(prompt, response, system):
    for name in (None, "raw"):
        assert rendered(name, prompt, [response], system) == (prompt, response)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hh", ("\n\nHuman: Why?\n\nAssistant:", " Yes")),
        ("chatml", ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>")),
    ],
)
def test_a_text_that_is_no_dialogue_is_one_turn_of_the_users(name, expected):
    assert rendered(name, "Why?") == rendered(name, (Turn("user", "Why?"),)) == expected


def test_the_chat_template_takes_a_text_as_one_turn_of_the_users():
    assert rendered("chat", "Why?", tokenizer=LLAMA) == ("<s>[INST] Why? [/INST]", " Yes ")


# ---- conversations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        (None, DIALOGUE, " Yes"),
        ("hh", DIALOGUE, " Yes"),
        ("raw", "Hi\n\nHello\n\nWhy?\n\n", "Yes"),
        (
            "chatml",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n",
            "Yes<|im_end|>",
        ),
    ],
)
def test_a_conversation_is_written_turn_by_turn(name, prompt, response):
    assert rendered(name, TURNS) == (prompt, response)


def test_turns_may_be_plain_pairs():
    plain = tuple(tuple(turn) for turn in TURNS)
    for name in (None, "raw", "hh", "chatml"):
        assert rendered(name, plain) == rendered(name, TURNS)


@pytest.mark.parametrize("name", ["hh", "chatml"])
def test_a_dialogue_and_the_same_conversation_are_the_same_text(name):
    assert rendered(name, DIALOGUE, [" Yes"]) == rendered(name, TURNS, ["Yes"])


def test_a_dialogue_and_the_same_conversation_are_the_same_text_for_a_chat_model():
    dialogue = rendered("chat", DIALOGUE, [" Yes"], tokenizer=LLAMA)
    assert dialogue == rendered("chat", TURNS, ["Yes"], tokenizer=LLAMA)
    # The tokens between the turns stay, the answer's own end goes.
    assert dialogue == ("<s>[INST] Hi [/INST] Hello </s><s>[INST] Why? [/INST]", " Yes ")


def test_all_responses_of_a_prompt_are_written_behind_the_same_text():
    for name, tokenizer in ((None, PLAIN), ("raw", PLAIN), ("hh", PLAIN), ("chatml", PLAIN), ("chat", LLAMA)):
        _, responses = build_template(name, None, tokenizer)(TURNS, ["Yes", "No", "Perhaps"])
        assert [rendered(name, TURNS, [text], tokenizer=tokenizer)[1] for text in ("Yes", "No", "Perhaps")] == responses


def test_chatml_ends_a_response_with_its_marker_unless_that_is_the_end_of_sequence_token():
    assert rendered("chatml", "Why?", tokenizer=PLAIN)[1] == "Yes<|im_end|>"
    assert rendered("chatml", "Why?", tokenizer=CHAT)[1] == "Yes"


# ---- the tokenizer's chat template --------------------------------------------------------------------------------------

turn_contents = st.text().filter(lambda text: not any(token in text for token in ("<s>", "</s>", "<|im_end|>")))


@pytest.mark.parametrize("tokenizer", [LLAMA, CHAT, tokenizer_of(CHATML)], ids=["llama", "chatml", "chatml with another end"])
@settings(deadline=None)
@given(data=st.data())
def test_prompt_response_and_end_are_what_the_chat_template_writes(tokenizer, data):
    questions = data.draw(st.lists(turn_contents, min_size=1, max_size=3))
    turns = [Turn("user", questions[0])]
    for question in questions[1:]:
        turns += [Turn("assistant", data.draw(turn_contents)), Turn("user", question)]
    answer = data.draw(turn_contents)
    prompt, response = rendered("chat", tuple(turns), [answer], tokenizer=tokenizer)
    messages = [turn._asdict() for turn in (*turns, Turn("assistant", answer))]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.eos_token not in response
    # Where the template writes the end, only a line break may follow it; where it does not, nothing is missing.
    ends_itself = tokenizer.eos_token in whole[len(prompt) :]
    assert whole.rstrip("\n") == (prompt + response + tokenizer.eos_token * ends_itself).rstrip("\n")


def test_chat_without_a_chat_template_is_refused_with_what_else_to_use():
    with pytest.raises(UserError, match="template: found chat, but this tokenizer has no chat template .*chatml, hh or raw"):
        build_template("chat", None, PLAIN)


def test_a_role_that_the_chat_template_refuses_is_named():
    with pytest.raises(UserError, match="template: .* refuses a conversation of system, user: System role not supported"):
        rendered("chat", WITH_SYSTEM[:1] + TURNS[:1], tokenizer=tokenizer_of(NO_SYSTEM))


def test_turns_that_the_chat_template_refuses_are_named():
    with pytest.raises(UserError, match="refuses a conversation of user, user: Conversation roles must alternate"):
        rendered("chat", (TURNS[0], TURNS[2]), tokenizer=LLAMA)


def test_a_chat_template_that_writes_an_answered_prompt_differently_is_refused_with_the_first_difference():
    # "*user: Why?" and "user: Why?" differ where they begin.
    with pytest.raises(UserError, match=r"template: .*\(at character 0: '\*user: Why\?.*' and 'user: Why\?.*chatml or hh"):
        rendered("chat", "Why?", tokenizer=tokenizer_of(LAST_IS_MARKED))


def test_named_chat_templates_without_a_default_are_named():
    tokenizer = tokenizer_of({"tool_use": CHATML, "rag": CHATML})
    with pytest.raises(UserError, match=r"template: found chat, but of .* templates \(rag, tool_use\) none is called default"):
        build_template("chat", None, tokenizer)
    assert rendered("chatml", TURNS, tokenizer=tokenizer) == rendered("chatml", TURNS, tokenizer=PLAIN)
    tokenizer.chat_template["default"] = CHATML
    assert rendered("chat", TURNS, tokenizer=tokenizer)[0] == rendered("chat", TURNS, tokenizer=CHAT)[0]


def test_a_chat_template_that_is_broken_is_reported_before_any_row():
    with pytest.raises(UserError, match="template: the tokenizer's chat template is broken, line 1: .*chatml, hh or raw"):
        build_template("chat", None, tokenizer_of("{% for message in messages %}{{ message }}"))


@pytest.mark.parametrize("stumble", ["{{ messages[7].content }}", "{{ 'a' + 1 }}", "{{ messages['x'] + none }}", "{{ 1 / 0 }}"])
def test_whatever_a_chat_template_stumbles_over_is_reported_with_the_conversation(stumble):
    with pytest.raises(ConversationError, match="refuses a conversation of user, assistant, user: "):
        rendered("chat", TURNS, tokenizer=tokenizer_of(stumble))


def test_what_a_chat_template_writes_before_responses_unasked_is_the_end_of_the_prompt():
    always = CHATML.split("{% if add")[0]
    assert rendered("chat", TURNS, tokenizer=tokenizer_of(always)) == rendered("chat", TURNS, tokenizer=tokenizer_of(CHATML))
    assert response_opening(tokenizer_of(always)) == "<|im_start|>assistant\n"
    # A blank is the answer's; what is thought before it, if the template begins the answer, too.
    thinks = "+ ('<think></think>' if message['role'] == 'assistant' else '') + message['content']"
    think = CHATML.replace("+ message['content']", thinks)
    assert [response_opening(tokenizer) for tokenizer in (LLAMA, CHAT, tokenizer_of(think), tokenizer_of(NO_SYSTEM))] == [
        ""
    ] * 4


def test_turns_and_responses_that_a_chat_template_drops_are_reported():
    users = (
        "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content.split('</think>')[-1] + '\\n' }}{% endfor %}"
    )
    with pytest.raises(ConversationError, match="drops turn 1, the system's"):
        rendered("chat", WITH_SYSTEM, tokenizer=tokenizer_of(users))
    with pytest.raises(ConversationError, match="drops a part of the response"):
        rendered("chat", TURNS, ["<think>Well.</think> Yes"], tokenizer=tokenizer_of(users))
    # What was thought in earlier turns is left out by design.
    thought = (TURNS[0], Turn("assistant", "<think>Well.</think>Hello"), TURNS[2])
    assert rendered("chat", thought, tokenizer=tokenizer_of(users)) == rendered("chat", TURNS, tokenizer=tokenizer_of(users))


# ---- the system ---------------------------------------------------------------------------------------------------------

SYSTEM_FIRST = {
    "raw": "Be brief.\n\nHi\n\n",
    "hh": "Be brief.\n\nHuman: Hi\n\nAssistant:",
    None: "Be brief.\n\nHuman: Hi\n\nAssistant:",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "chat": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
}


@pytest.mark.parametrize("name", SYSTEM_FIRST)
def test_the_system_prompt_stands_before_a_conversation_that_has_none(name):
    found = rendered(name, TURNS[:1], system_prompt="Be brief.", tokenizer=LLAMA)
    assert found[0] == SYSTEM_FIRST[name]


@pytest.mark.parametrize("name", SYSTEM_FIRST)
@pytest.mark.parametrize("system_prompt", [None, "Talk a lot."])
def test_a_conversations_own_system_wins(name, system_prompt):
    found = rendered(name, WITH_SYSTEM[:2], system_prompt=system_prompt, tokenizer=LLAMA)
    assert found[0] == SYSTEM_FIRST[name]


@pytest.mark.parametrize("name", ["hh", "chatml", "chat"])
@pytest.mark.parametrize("system_prompt", [None, "Talk a lot."])
def test_what_stands_before_the_first_turn_of_a_dialogue_is_its_own_system(name, system_prompt):
    found = rendered(name, f"Be brief.{HUMAN} Hi{ASSISTANT}", [" Yes"], system_prompt, LLAMA)
    assert found[0] == SYSTEM_FIRST[name]


@pytest.mark.parametrize("name", ["hh", "chatml", "chat"])
def test_a_text_that_becomes_a_conversation_gets_the_system_prompt(name):
    assert rendered(name, "Hi", system_prompt="Be brief.", tokenizer=LLAMA)[0] == SYSTEM_FIRST[name]


def test_an_empty_system_prompt_is_none():
    for name in SYSTEM_FIRST:
        assert rendered(name, TURNS, system_prompt="", tokenizer=LLAMA) == rendered(name, TURNS, tokenizer=LLAMA)
