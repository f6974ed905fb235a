"""What a chat template writes around the turns of a response, so that each prefix of a conversation need not be rendered."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Render = Callable[[list[dict]], str]


class TurnTexts(NamedTuple):
    """The text after an assistant turn, between it and a user turn, and after that up to the next assistant turn."""

    ended: str
    before_user: str
    after_user: str

    @classmethod
    def of(cls, render: Render, ask: Render) -> "TurnTexts | None":
        """Those of a template that writes the same texts around all turns, at the end of a conversation or within; else None.

        render, ask: the template without and with the generation prompt. Raises what they raise.
        """
        contents = "Qoneq", "Qtwoq", "Qthreeq", "Qfourq", "Qfiveq", "Qsixq"
        turns = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
        asked = [ask(turns[:k]) for k in (1, 3, 5)]
        answered = [render(turns[:k]) for k in (2, 4, 6)]
        ended = answered[0].removeprefix(asked[0]).partition(contents[1])[2]
        before_user, _, after_user = asked[1].removeprefix(answered[0]).partition(contents[2])
        found = cls(ended, before_user, after_user)
        parts = [found.parts(asked[0], [turn["content"] for turn in turns[1:k]]) for k in (2, 4, 6)]
        is_same = ["".join(some) for some in parts] == answered and ["".join(parts[-1][:k]) for k in (1, 4, 7)] == asked
        return found if is_same else None

    def parts(self, asked: str, contents: Sequence[str]) -> list[str]:
        """A conversation in parts: what asks for an assistant turn, its content, what ends it, what asks for the next, ..."""
        parts = [asked]
        for place, content in enumerate(contents):
            parts += [content, self.ended] if place % 2 == 0 else [self.before_user + content + self.after_user]
        return parts
