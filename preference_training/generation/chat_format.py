"""The prompts of a conversation as training rendered and tokenized them."""

from preference_training.data.records.record import Prompt, Turn
from preference_training.data.rendering.chat_templates import conversation_format, end_tokens
from preference_training.data.rendering.encoding import Encoder, Texts
from preference_training.data.rows.templates import build_template, turns_of
from preference_training.data.tokenization import bos_ids


class ChatFormat:
    """A prompt format (raw, hh, chatml or chat) with a tokenizer. stops: texts that end a response, as its tokens do."""

    def __init__(self, name: str, tokenizer):
        self.name = name
        self.stops = conversation_format(name, tokenizer).stops if name in ("hh", "chatml") else ()
        self.end_tokens = end_tokens(name, tokenizer)
        self._template = build_template(name, None, tokenizer)
        self._encoder, self._bos = Encoder(tokenizer), bos_ids(tokenizer)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, which asks for a response. Raises UserError where it has no format."""
        if self.name == "raw" and len(prompt) == 1 and not isinstance(prompt, str):
            # Training reads a text that is alone as it is, and renders conversations.
            prompt = prompt[0].content
        text, _ = self._template(prompt, [])
        [ids] = self._encoder.encode(Texts([text], [], [])).prompts
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def response(self, text: str) -> str:
        """The text of a response as a turn: without the space that hh puts before it."""
        return text.removeprefix(" ") if self.name == "hh" else text


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """A prompt with a system prompt, unless it has one of its own."""
    if not system:
        return prompt
    turns = turns_of(prompt)
    return turns if turns[0][0] in ("system", "developer") else (Turn("system", system), *turns)
