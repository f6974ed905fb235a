"""The answers in the fields of a row, and how a prompt is told from them."""

from dataclasses import dataclass

from preference_training.data.records.record import Prompt, Response, Turn, is_learned, message_of, response_of
from preference_training.data.records.report import OTHER_PROMPT, DataReport
from preference_training.data.records.validation import text_error
from preference_training.data.rows.conversations import (
    RowError,
    end_of_common,
    json_type,
    parse_serialized_turns,
    parse_turns,
    part_conversations,
    round_keys,
    split_conversation,
    turn_keys,
)
from preference_training.data.rows.nearest_entry import with_nearest
from preference_training.data.rows.prompt_fields import USUAL, PromptFields
from preference_training.data.rows.templates import split_dialogue
from preference_training.data.rows.values import check_text, is_text_list, is_text_pair, parse_text_list, unlisted

Turns = tuple[Turn, ...]


class LeftOut(Exception):  # noqa: N818
    """A row that is left out and counted, with the reason."""


# Where a dict holds one text, this is its key.
TEXT_KEYS = ("content", "value", "text", "response")


def answers_in(value, name: str) -> list[str | Turns]:
    """The answers in a field: a text, a turn, a conversation, or a list of any of these. Raises RowError."""
    parsed = parse_serialized_turns(value, name)
    if parsed is value and isinstance(value, str):
        check_text(value, name)
        return [value]
    value = parsed
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return [answer_in(item, name) for item in value]
    return [answer_in(value, name)]


def answer_in(value, name: str) -> str | Turns:
    """One answer: a text, a turn or a conversation. Raises RowError."""
    value = unlisted(parse_serialized_turns(value, name))
    if turn_keys(value):
        value = [value]
    if isinstance(value, list):
        return parse_turns(value, name)
    if isinstance(value, dict) and (key := next((key for key in TEXT_KEYS if isinstance(value.get(key), str)), None)):
        value = value[key]
    check_text(value, name)
    return value


def listed_answer(answer, name: str, index: int) -> str | Turns:
    """The answer at a place of a list. Raises RowError."""
    if isinstance(answer, list | dict):
        return answer_in(answer, f"{name}.{index}")
    if problem := text_error(answer):
        raise RowError(f"field {name!r}: response {index} {problem}.")
    return answer_in(answer, name)


def answer_of(answers: list, names: str | list[str], index: int) -> tuple[str, str | Turns]:
    """One of several answers with the name of its field: a column of its own, or that of their list. Raises RowError."""
    if isinstance(names, list):
        return names[index], answer_in(answers[index], names[index])
    return names, listed_answer(answers[index], names, index)


# ---- conversations --------------------------------------------------------------------------------------------------------


def conversation_in(value, name: str) -> Turns:
    """The turns of a whole conversation; also a list of {input, output}, or of texts of user and assistant in turn."""
    value = parse_text_list(parse_serialized_turns(value, name))
    items = value if isinstance(value, list) else [value]
    if items and (keys := round_keys(items[0])) and all(round_keys(item) == keys for item in items):
        items = [item[key] for item in items for key in keys]
    if items and isinstance(value, list) and all(map(is_text_pair, items)):
        items = [text for pair in items for text in pair]
    if items and all(isinstance(item, str) for item in items) and isinstance(value, list):
        for text in items:
            check_text(text, name)
        return tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(items))
    if not all(isinstance(item, dict) for item in items):
        check_text(None if items is value else value, name)
        raise RowError(f"field {name!r} is a text, expected a conversation: a list of {{role, content}}.")
    return parse_turns(items, name)


def last_turns_replaced(values: list, names: list[str]) -> list:
    """A conversation and the answers that are rejected for its last turn, as whole conversations where they are texts."""
    whole = conversation_in(values[0], names[0])
    if whole[-1].role != "assistant":
        raise RowError(_not_the_assistants(names[0], whole[-1].role))
    before = [message_of(turn) for turn in whole[:-1]]

    def continued(value):
        if is_text_list(value):
            return list(map(continued, value))
        return [*before, {"role": "assistant", "content": value}] if isinstance(value, str) and value else value

    others = zip(values[1:], names[1:], strict=True)
    return [values[0], *(continued(parse_serialized_turns(value, name)) for value, name in others)]


def _not_the_assistants(name: str, role: str) -> str:
    return f"the last turn of {name} is the {role}'s. Expected the assistant's, which is the response."


# ---- answers that are missing ---------------------------------------------------------------------------------------------

NO_ANSWER = "answers left out that are missing (null)"
EMPTY_ANSWER = "answers left out that are empty"


def without_empty(value, report: DataReport):
    """A list of rejected texts without those that are missing or empty, which are counted; any other value as it is."""
    if not isinstance(value, list) or not all(isinstance(one, str | None) for one in value):
        return value
    kept = [one for one in value if one is not None and one.strip()]
    if not kept:
        return value
    missing = value.count(None)
    report.change(NO_ANSWER, missing)
    report.change(EMPTY_ANSWER, len(value) - missing - len(kept))
    return kept


# ---- texts ----------------------------------------------------------------------------------------------------------------


def dialogue_prompt(dialogue: str, name: str) -> str:
    """The prompt of an HH dialogue. Raises RowError."""
    try:
        return split_dialogue(dialogue)[0]
    except ValueError:
        raise RowError(
            f"{name} has no '\\n\\nAssistant:' turn. Expected a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or a "
            "field prompt beside chosen and rejected (implicit_prompt=true uses their common beginning)."
        ) from None


def shared_beginning(texts: list[str]) -> str:
    """The common beginning of texts, up to its last whitespace, so that no word is cut. Raises RowError without any.

    A space before the responses is theirs: tokenizers merge it with the next word.
    """
    columns = enumerate(zip(*texts, strict=False))
    length = next((k for k, characters in columns if len(set(characters)) > 1), min(map(len, texts)))
    shared = texts[0][:length]
    end = max((k + 1 for k, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise RowError("chosen and rejected start with different words, so they share no prompt.")
    return shared[:end].removesuffix(" ")


# ---- prompt and responses -------------------------------------------------------------------------------------------------

NO_TEXT = "a prompt or an answer in a list is missing (null)"

# The name of a field, and an answer in it.
Named = tuple[str, str | Turns]


def rounds_in(row: dict, prompt: str, names: str | list[str]) -> list[Named]:
    """Conversations of a prompt and answers that are lists of the same number of texts, as in the LMSYS arena; else [].

    Raises RowError for lists that do not fit the prompt's, and LeftOut where a text is missing.
    """
    if isinstance(names, str):
        return []
    asked, *answered = texts = [parse_text_list(row.get(name)) for name in (prompt, *names)]
    present = [[one for one in text if one is not None] if isinstance(text, list) else text for text in texts]
    if not is_text_list(present[0]) or not any(map(is_text_list, present[1:])):
        return []
    for name, of, known in zip(names, answered, present[1:], strict=True):
        if not isinstance(of, list) or len(of) != len(asked) or not all(isinstance(one, str) for one in known):
            raise RowError(f"field {name!r} is not a list of as many texts as {prompt!r}. Expected one answer to each prompt.")
    if any(one is None for text in texts for one in text):
        raise LeftOut(NO_TEXT)
    pairs = [zip(asked, of, strict=True) for of in answered]
    return [
        (name, conversation_in([text for pair in of for text in pair], name)) for name, of in zip(names, pairs, strict=True)
    ]


@dataclass(frozen=True)
class Splitting:
    """How the prompt of a row is told from its answers.

    implicit: it is their common beginning. apart: it is never in answers that are texts.
    """

    prompts: PromptFields
    implicit: bool = False
    apart: bool = False

    def split(self, row: dict, answers: list[Named]) -> tuple[Prompt, list[Response]]:
        """The prompt of a row, and its answers as responses to it. Raises RowError, and LeftOut for different prompts."""
        if any(isinstance(answer, tuple) for _, answer in answers):
            return self._of_conversations(row, answers)
        texts = [answer for _, answer in answers]
        if self.apart or self.prompts.in_row(row):
            return self._read(row, answers), texts
        prompt = self._in_texts(row, texts, answers[0][0])
        responses = [text[len(prompt) :] for text in texts]
        for (name, _), response in zip(answers, responses, strict=True):
            if not response.strip():
                raise RowError(f"the response in field {name!r} is empty.")
        return self.prompts.beside_text(row, prompt, responses)

    def _in_texts(self, row: dict, texts: list[str], name: str) -> str:
        if not self.prompts.prompt:
            return ""
        if self.implicit:
            return shared_beginning(texts)
        try:
            prompt = dialogue_prompt(texts[0], name)
        except RowError as error:
            raise RowError(with_nearest(str(error), row) if len(row) > len(texts) else str(error)) from None
        if not all(text.startswith(prompt) for text in texts):
            raise LeftOut(OTHER_PROMPT)
        return prompt

    def _read(self, row: dict, answers: list[Named], as_turns: bool = False) -> Prompt:
        try:
            return self.prompts.read(row, as_turns)
        except RowError as error:
            if self.prompts.prompt in row or self.prompts.prompt != USUAL:
                raise
            raise RowError(self._with_prompt(str(error), row, [name for name, _ in answers])) from None

    def _with_prompt(self, message: str, row: dict, answers: list[str]) -> str:
        """A message, with the entry that names the column which may be the prompt."""
        nearest = with_nearest(message, row, "prompt: ", *answers)
        found = self.prompts.candidates(row, answers)
        if nearest != message or not found:
            return nearest
        may_be = found[0] if len(found) == 1 else f"one of {', '.join(found)}"
        return f"{message} It may be {may_be}: datasets=[{{path: ..., prompt: {found[0]}}}]."

    def _of_conversations(self, row: dict, answers: list[Named]) -> tuple[Prompt, list[Response]]:
        longest = max(len(answer) for _, answer in answers if isinstance(answer, tuple))
        conversations = []
        for name, answer in answers:
            if isinstance(answer, str) and longest > 1:
                raise RowError(f"field {name!r} is {json_type(answer)}, expected a conversation as in the other field.")
            conversations.append(answer if isinstance(answer, tuple) else (Turn("assistant", answer),))
            if conversations[-1][-1].role != "assistant":
                raise RowError(_not_the_assistants(name, conversations[-1][-1].role))
        parted = part_conversations(conversations)
        if len(conversations) == 1:
            shared, _ = split_conversation(conversations[0], answers[0][0])
            parted = tuple(shared), [conversations[0][len(shared) :]]
        if parted is None:
            raise LeftOut(OTHER_PROMPT)
        shared, rests = parted
        for (name, _), rest in zip(answers, rests, strict=True):
            if not is_learned(rest[-1]):
                raise RowError(f"the last turn of {name} has weight 0, and is what would be learned.")
        responses = [response_of(rest) for rest in rests]
        if shared:
            return self.prompts.before(row, shared, shared + rests[0][: end_of_common(rests)]), responses
        if self.prompts.in_row(row) or self.prompts.candidates(row, [name for name, _ in answers]):
            return self._read(row, answers, as_turns=True), responses
        return self.prompts.with_system(row, ()) or "", responses
