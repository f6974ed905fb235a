"""A user's mistake, and parts of its message."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from unicodedata import category


class UserError(Exception):
    """A user's mistake. `train.py` prints the message without a traceback and exits with status 2.

    What it names may come from data, so that its control characters are shown, and never reach a terminal.
    """

    def __init__(self, message: object = ""):
        super().__init__(visible(str(message)))


def visible(text: str) -> str:
    r"""A text with control characters, and those that hide or reverse text, as escapes: \x1b. Line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(letter if letter in "\n\t" or not _acts(letter) else _escaped(letter) for letter in text)


def _acts(letter: str) -> bool:
    return category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A clause that suggests what `name` may have meant: "did you mean loss.beta?".

    If no known name is near, it is `otherwise`, by default all known names.
    """
    by_lower = {key.lower(): key for key in sorted(known)}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f"did you mean {by_lower[close[0]]}?"
    return otherwise or f"known are: {', '.join(by_lower.values())}."


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of an error's message without control characters; its type where it has none."""
    if "Weights only load failed" in str(error):
        # torch's first line explains how to unpickle it anyway.
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        held = other[1][:length] if other else "something else"
        return f"it holds {held}, and nothing but tensors and plain values is ever unpickled"
    said = str(error).strip().splitlines() or [type(error).__name__]
    visible = "".join(letter for letter in re.sub(r"\x1b\[[0-9;]*m", "", said[0]) if letter.isprintable())
    return visible[:length].rstrip(" .:")
