"""Faults in texts, turns and records are told; what is none is not."""

from itertools import combinations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.data.records.record import Turn, prompt_text, response_of
from preference_training.data.records.validation import (
    LISTS_OF_VALUES,
    item_error,
    prompt_error,
    response_error,
    text_error,
    type_name,
)

# Few different values, so that equal ones meet often.
PROMPTS = st.sampled_from(["p", "q", (Turn("user", "p"),), (Turn("system", "s"), Turn("user", "p"))])
CALL = Turn("assistant", "", '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}')
RESULT = Turn("tool", "", '{"name": "f"}')
TEXTS = st.text(min_size=1).filter(lambda text: text_error(text) is None)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        (" \t\n\u00a0\u2003", "is empty"),
        (None, "is null, expected a text"),
        (5, "is int, expected a text"),
        (b"bytes", "is bytes, expected a text"),
        (["a"], "is list, expected a text"),
        ("\ud83d", "holds half a surrogate pair ('\\ud83d' at character 0), which is not text"),
        ("two \udc00\udc01", "holds half a surrogate pair ('\\udc00' at character 4), which is not text"),
    ],
)
def test_a_value_that_is_no_text_is_reported_with_what_it_is(text, fault):
    assert text_error(text) == response_error(text) == fault
    # An empty text is no prompt, and responses need none.
    assert prompt_error(text) == (None if text == "" else fault)


@pytest.mark.parametrize("text", ["a", " a ", "\u200b", "0", "\U0001f642", "\x00"])
def test_any_text_with_something_in_it_is_valid(text):
    assert text_error(text) is None


@given(text=st.text())
def test_a_text_is_valid_if_it_has_more_than_white_space(text):
    assert (text_error(text) is None) == bool(text.strip())


@given(text=st.text(st.characters(categories=["L", "Cs"]), min_size=1))
def test_a_text_is_valid_if_it_can_be_written(text):
    half = any("\ud800" <= character <= "\udfff" for character in text)
    assert (text_error(text) is None) == (not half)


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ((), "is a conversation without turns"),
        (
            (Turn("user", "q"), Turn("human", "q")),
            "has a turn 2 that is not (role, content) with one of the roles system, developer, user",
        ),
        ((("user", "q", "more"),), "has a turn 1 that is not (role, content)"),
        ((("user", "q", "[]"),), "has a turn 1 that is not (role, content)"),
        ((("user", "q", "{}", ""),), "has a turn 1 that is not (role, content)"),
        ((Turn("assistant", "", '{"name": "a"}'),), "has a turn 1 that is empty"),
        ((Turn("user", "q", '{"name": "\ud800"}'),), "has a turn 1 that holds half a surrogate pair"),
        ((("user",),), "has a turn 1 that is not (role, content)"),
        (({"role": "user", "content": "q"},), "has a turn 1 that is not (role, content)"),
        (("user", "q"), "has a turn 1 that is not (role, content)"),
        ((Turn(["user"], "q"),), "has a turn 1 that is not (role, content)"),
        ((Turn(numpy.array(["user", "user"]), "q"),), "has a turn 1 that is not (role, content)"),
        ((Turn("user", ""), Turn("assistant", "a")), "has a turn 1 that is empty"),
        ((Turn("user", None),), "has a turn 1 that is null, expected a text"),
        ((Turn("user", "q"), Turn("assistant", "\ud800"), Turn("user", "q")), "has a turn 2 that holds half a surrogate pair"),
        ([Turn("user", "q")], "is list, expected a text"),
    ],
)
def test_a_conversation_with_an_error_is_reported_with_which_turn_has_it(prompt, fault):
    assert prompt_error(prompt).startswith(fault)


@pytest.mark.parametrize(
    "prompt",
    [
        (Turn("user", "q"),),
        (Turn("system", "s"), Turn("user", "q")),
        (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "q")),
        (("user", "q"),),
        # Responses continue an assistant turn at the end; an empty system turn is none.
        (Turn("user", "q"), Turn("assistant", "a")),
        (Turn("system", ""), Turn("developer", "d"), Turn("user", "q")),
        (Turn("user", "q"), CALL, RESULT),
    ],
)
def test_a_conversation_whose_turns_have_text_or_calls_is_valid(prompt):
    assert prompt_error(prompt) is None


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        ((), "is a conversation without turns"),
        ((Turn("user", "q"), Turn("assistant", "a")), "starts with the user's turn, expected the assistant's"),
        ((CALL, RESULT), "ends with the tool's turn, expected the assistant's"),
        ((Turn("assistant", ""),), "has a turn 1 that is empty"),
        ((CALL, RESULT, Turn("assistant", "a")), None),
        (((("assistant", "a")),), None),
        ((CALL,), None),
    ],
)
def test_a_response_of_several_turns_starts_and_ends_with_the_assistant(response, fault):
    assert response_error(response) == fault
    record = {"responses": [response, "b"], "pairs": [(0, 1)], "sft_target": response}
    assert item_error(("p", record)) == (fault and f"response 0 {fault}")


def test_a_single_turn_is_its_text_unless_it_has_other_fields():
    assert response_of((Turn("assistant", "a"),)) == "a"
    assert response_of((CALL,)) == (CALL,)
    assert response_of((Turn("assistant", "a"),) * 2) == (Turn("assistant", "a"),) * 2


def test_other_fields_of_a_turn_leave_prompts_without_any_as_they_were():
    plain = (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "b"))
    assert prompt_text(plain) == "user\0q\0assistant\0a\0user\0b" == prompt_text(tuple(turn[:2] for turn in plain))
    assert repr(plain[0]) == "Turn(role='user', content='q')"
    assert prompt_text((plain[0], CALL)) != prompt_text((plain[0], Turn("assistant", "")))
    assert repr(CALL) == f"Turn(role='assistant', content='', rest={CALL.rest!r})"


@pytest.mark.parametrize("tools", [[], "x", '{"a": 1}', 5])
def test_tools_of_a_record_are_the_json_text_of_a_list(tools):
    assert item_error(("p", SOUND | {"tools": tools})).startswith(f"tools is {type_name(tools)}, expected the JSON text")
    assert item_error(("p", SOUND | {"tools": '[{"name": "f"}]'})) is None


SOUND = {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ((" ", SOUND), "the prompt is empty"),
        (((), SOUND), "the prompt is a conversation without turns"),
        (("p", SOUND | {"responses": ["a", " "]}), "response 1 is empty"),
        (("p", SOUND | {"sft_target": ""}), "sft_target is empty"),
        (("p", SOUND | {"sft_target": None}), "sft_target is null, expected a text"),
        (("p", SOUND | {"responses": ["a", "x\ud800"]}), "response 1 holds half a surrogate pair"),
        (("p", SOUND | {"responses": {"a": 1}}), "responses is dict, expected a list"),
        (("p", SOUND | {"pairs": iter(())}), "pairs is tuple_iterator, expected a list"),
        (("p", SOUND | {"pairs": [(0, 1), (0, 2)]}), "pair (0, 2) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(1, 1)]}), "pair (1, 1) does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [[]]}), "pair () does not name two of the 2 responses"),
        (("p", SOUND | {"pairs": [(True, False)]}), "pair (True, False) is not two whole numbers"),
        (("p", SOUND | {"pairs": ["01"]}), "pair '01' is not two whole numbers"),
        (("p", {"pairs": []}), "the record has no responses, sft_target"),
        (("p", None), "found str and None, expected a prompt and a dict"),
        (["p", SOUND], "found list, expected a prompt and a dict"),
        ((), "found , expected a prompt and a dict"),
        (None, "found None, expected a prompt and a dict"),
    ],
)
def test_an_item_with_an_error_is_reported_with_its_place(item, fault):
    assert item_error(item).startswith(fault)


def test_the_kind_of_nothing_is_none_and_of_other_values_their_type():
    assert [type_name(value) for value in (None, 1, 1.0, True, "", (), {})] == [
        "None", "int", "float", "bool", "str", "tuple", "dict",
    ]  # fmt: skip


@given(prompt=PROMPTS | TEXTS, responses=st.lists(TEXTS, max_size=4), data=st.data())
def test_records_of_texts_and_of_pairs_between_them_have_no_error(prompt, responses, data):
    indices = list(combinations(range(len(responses)), 2))
    pairs = data.draw(st.lists(st.sampled_from(indices))) if indices else []
    record = {"responses": tuple(responses), "pairs": pairs, "sft_target": data.draw(TEXTS), "more": None}
    assert item_error((prompt, record)) is None


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(list(SOUND)), inner, max_size=3)
    ),
    max_leaves=8,
)


records_with_junk = st.fixed_dictionaries(
    {key: st.just(SOUND[key]) | JUNK for key in SOUND}, optional={key: JUNK for key in LISTS_OF_VALUES}
)


@settings(max_examples=300)
@given(item=JUNK | st.tuples(JUNK, JUNK), record=records_with_junk)
def test_any_junk_is_reported_with_its_error_and_never_raises(item, record):
    assert isinstance(item_error(item), str | None)
    fault = item_error(("p", record))
    assert isinstance(fault, str | None)
    if fault is None:
        assert all(isinstance(text, str) for text in [*record["responses"], record["sft_target"]])


@pytest.mark.parametrize(
    ("targets", "fault"),
    [("a", "sft_targets is str, expected a list"), (["a", ""], "sft_targets 1 is empty"), ([], None), (["a"], None)],
)
def test_several_sft_targets_are_a_list_of_texts(targets, fault):
    assert item_error(("p", SOUND | {"sft_targets": targets})) == fault


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"scores": [1, None], "labels": [True, None], "weights": [0], "margins": (-0.5,)}, None),
        ({"scores": None, "labels": None, "weights": None, "margins": None}, None),
        ({"scores": (float("inf"), 2)}, None),
        ({"scores": {"a": 1}}, "scores is dict, expected a list"),
        ({"scores": [1]}, "scores has 1 values for 2 responses, expected one for each"),
        ({"scores": [1, "2"]}, "scores 1 is '2', expected a number or None"),
        ({"scores": [True, 1]}, "scores 0 is True, expected a number or None"),
        ({"scores": [1, float("nan")]}, "scores 1 is nan, expected a number or None"),
        ({"labels": [True, 1]}, "labels 1 is 1, expected True, False or None"),
        ({"labels": ["desirable", None]}, "labels 0 is 'desirable', expected True, False or None"),
        ({"weights": [1, 1]}, "weights has 2 values for 1 pairs, expected one for each"),
        ({"weights": [-1]}, "weights 0 is -1, expected a number of at least 0"),
        ({"weights": [float("inf")]}, "weights 0 is inf, expected a number of at least 0"),
        ({"margins": ["1"]}, "margins 0 is '1', expected a number or None"),
        ({"margins": [float("-inf")]}, "margins 0 is -inf, expected a number or None"),
    ],
)
def test_scores_and_labels_are_of_responses_weights_and_margins_of_pairs(more, fault):
    assert item_error(("p", SOUND | more)) == fault


def test_what_a_tool_returns_may_be_white_space():
    assert item_error(((Turn("user", "q"), CALL, Turn("tool", " \n")), SOUND)) is None
