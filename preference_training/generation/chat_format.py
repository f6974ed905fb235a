"""The prompts of a conversation as training rendered and tokenized them."""

from collections.abc import Sequence

from preference_training.data.chat_templates import conversation_format, end_tokens
from preference_training.data.rendering.encoding import Encoder
from preference_training.data.rows.records import Turn
from preference_training.data.rows.templates import build_template
from preference_training.data.tokenization import bos_ids


class ChatFormat:
    """A prompt format (raw, hh, chatml or chat) with a tokenizer. stops: texts that end a response, as its tokens do."""

    def __init__(self, name: str, tokenizer):
        self.name = name
        self.stops = conversation_format(name, tokenizer).stops if name in ("hh", "chatml") else ()
        self.end_tokens = end_tokens(name, tokenizer)
        self._template = build_template(name, None, tokenizer)
        self._encoder, self._bos = Encoder(tokenizer), bos_ids(tokenizer)

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The token ids of the prompt that asks for a response to a conversation. Raises UserError where it has no format."""
        # Training reads a text that is alone as it is, and renders conversations.
        is_text = self.name == "raw" and len(turns) == 1
        text, _ = self._template(turns[0].content if is_text else tuple(turns), [])
        [[ids], _] = self._encoder.encode([text], [])
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def response(self, text: str) -> str:
        """The text of a response as a turn: without the space that hh puts before it."""
        return text.removeprefix(" ") if self.name == "hh" else text
