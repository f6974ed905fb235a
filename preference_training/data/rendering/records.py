"""Records as texts: what is trained on of each, in its template."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from preference_training.core.errors import UserError
from preference_training.data.records.record import (
    PreferenceRecord,
    Prompt,
    Response,
    Turn,
    is_learned,
    message_of,
    reasoning_of,
)
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.chat_rendering import ConversationError, Spanned, holds, response_opening
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.examples import Selected, select
from preference_training.data.rows.templates import before_last_turn, build_template, rendered_prompts, without_end

# What a report counts of records, besides those it skips.
NO_TURNS = (
    "prompts without system_prompt: they are plain text, which template=null and raw keep unchanged (see hh, chatml, chat)"
)
OPENING_MOVED = (
    "the chat template does not open a response when asked to (add_generation_prompt): {!r}, which it writes before responses, "
    "is appended to prompts"
)
RENDERED = "prompts that are rendered in the tokenizer's chat template already, which are read as they are"
NO_TOOLS = (
    "prompts without their tools: the template does not render them (template=chat does, with a chat template that can: "
    "model.chat_template)"
)
NO_REASONING = "assistant turns without their reasoning, which the chat template does not render there"
END_NOT_MARKED = "responses whose end is not learned: the chat template's {% generation %} marks leave it out"
OWN_SYSTEM_TURN = "prompts without system_prompt: they have their own system turn"


# Sets of tools of which it is remembered whether the template renders them: each row may have its own.
KNOWN_TOOLS = 1000


class Rendered(NamedTuple):
    """A record, what is trained on of it, and the texts of that."""

    record: PreferenceRecord
    part: Selected
    prompt: str
    texts: list[str | Spanned]


class Renderer:
    """Renders records in the template of some settings; errors and counts go to a report."""

    def __init__(self, tokenizer, settings: TokenSettings, report: DataReport):
        self.settings = settings
        self.report = report
        self.template = build_template(settings.template, settings.system_prompt, tokenizer)
        if settings.template == "chat" and (opening := response_opening(tokenizer)):
            self.report.note(OPENING_MOVED.format(opening))
        self.is_rendered = rendered_prompts(tokenizer)
        # Tools -> whether the template renders them.
        self.renders: dict[str, bool] = {}
        # Cached: a tokenizer looks up its special tokens on each access.
        self.eos_token = tokenizer.eos_token

    def render(self, record: PreferenceRecord) -> list[Rendered]:
        """Render the record; for SFT once for each target. Empty without anything to train on, or after an error."""
        if self.settings.version == 1:
            pairs = [] if self.settings.examples == "targets" else record.pairs
            record = replace(record, sft_targets=(), pairs=pairs)
        parts = select(record, self.settings.examples, self.settings.margins, self.report)
        return [rendered for part in parts if (rendered := self._rendered(record, part)) is not None]

    def _rendered(self, record: PreferenceRecord, part: Selected) -> Rendered | None:
        prompt, responses = record.prompt, part.responses
        if self.settings.examples == "targets" and self.settings.train_on == "last_turn":
            prompt, responses = before_last_turn(prompt, responses)
        is_rendered = self.is_rendered(prompt)
        given = [without_end(text, self.eos_token) for text in responses] if is_rendered else [prompt, *responses]
        if any(self._holds_end(value) for value in given):
            self.refuse_end(record)
            return None
        try:
            text, texts = self.template(prompt, responses, record.tools)
            texts = [
                some if isinstance(some, str) else _of_learned(some, turns)
                for some, turns in zip(texts, responses, strict=True)
            ]
        except ConversationError as error:
            # What a template cannot render is no fault of the row, and says what to do.
            remedy = {"remedy": "Or skip"} if str(error).startswith("template: ") else {}
            self.refuse(record, str(error), **remedy)
            return None
        if is_rendered:
            self.report.change(RENDERED)
        elif prompt and self.settings.system_prompt:
            self._count_system_prompt(prompt)
        if record.tools and not self._renders_tools(record.tools, prompt, text):
            self.report.change(NO_TOOLS)
        if self.settings.template == "chat":
            self._count_reasoning(responses, [text + (some if isinstance(some, str) else some.text) for some in texts])
        if any(not isinstance(some, str) and not some.ends for some in texts):
            self.report.change(END_NOT_MARKED)
        return Rendered(record, part, text, texts)

    def _holds_end(self, value: Prompt | Response) -> bool:
        """Whether a text of a prompt or response has the end-of-sequence token."""
        if isinstance(value, str):
            return self.eos_token in value
        return any(self.eos_token in text for turn in value for text in turn[1:])

    def _renders_tools(self, tools: str, prompt: Prompt, text: str) -> bool:
        """Whether the text of a prompt holds its tools: whether it would be another without them. Tried once for each set."""
        if self.settings.template != "chat" or isinstance(prompt, str):
            return False
        if tools not in self.renders:
            if len(self.renders) >= KNOWN_TOOLS:
                self.renders.clear()
            try:
                self.renders[tools] = self.template(prompt, [])[0] != text
            except ConversationError:
                self.renders[tools] = True
        return self.renders[tools]

    def _count_reasoning(self, responses: Sequence[Response], texts: list[str]) -> None:
        """Count the turns whose reasoning the chat template drops: most drop that of earlier turns."""
        for turns, text in zip(responses, texts, strict=True):
            if not isinstance(turns, str):
                dropped = (reasoning and not holds(text, reasoning) for reasoning in map(_reasoning, turns))
                self.report.change(NO_REASONING, sum(map(bool, dropped)))

    def _count_system_prompt(self, prompt: Prompt) -> None:
        """Count the prompts that do not get the system prompt."""
        if isinstance(prompt, str):
            if self.settings.template in (None, "raw"):
                self.report.change(NO_TURNS)
        elif prompt[0][0] == "system":
            self.report.change(OWN_SYSTEM_TURN)

    def refuse(self, record: PreferenceRecord, problem: str, **remedy: str) -> None:
        """Report a record that cannot be used. remedy: as of `DataReport.bad_row`."""
        self.report.bad_row(UserError(f"datasets: {record.source}: {problem}"), **remedy)

    def refuse_end(self, record: PreferenceRecord) -> None:
        """Report a record with the end-of-sequence token in a text."""
        expected = "Expected texts without it; it is added automatically."
        self.refuse(record, f"the text contains {self.eos_token!r}, which marks the end of a response. {expected}")


def _reasoning(turn: Turn) -> str:
    """The reasoning in an assistant turn; "" without any."""
    message = message_of(turn)
    return reasoning_of(message) or (
        message["content"].split("</think>")[0].split("<think>")[-1] if "</think>" in message["content"] else ""
    )


def _of_learned(response: Spanned, turns: Response) -> Spanned:
    """A response of several turns without the spans of those that are not learned. Raises ConversationError."""
    learned = [is_learned(turn) for turn in turns if turn[0] == "assistant"]
    if all(learned):
        return response
    if len(learned) != len(response.spans):
        raise ConversationError(
            "a turn has weight 0, and the chat template's {% generation %} marks do not say which part is of which turn. Use "
            "template=chatml or hh, or a chat template that marks each turn once."
        )
    return response._replace(spans=[span for span, kept in zip(response.spans, learned, strict=True) if kept])
