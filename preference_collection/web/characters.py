"""Text of models as HTML text: escaped, with every character that would be invisible, or move others, shown by name."""

import re

from markupsafe import Markup, escape

# Control characters except tab and newline; soft hyphens; zero-width characters except the joiners that scripts and emoji need;
# marks that change the direction of writing; line and paragraph separators; fillers; lone surrogates; tags and variation
# selectors, which can hide whole sentences.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufdd0\ufdd1\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


# What stands for them where a parser would make something else of them: code points that no text has.
STAND_INS = {"\r": "\ufdd0", "\0": "\ufdd1"}


def one_kind_of_line(text: str) -> str:
    """A text whose lines end with a newline. Other carriage returns, which overwrite a line on a terminal, are kept."""
    text = text.replace("\r\n", "\n")
    for character, stand_in in STAND_INS.items():
        text = text.replace(character, stand_in)
    return text


def shown(text: str) -> Markup:
    """A text as HTML: escaped, and each unseen character as its number: `<span class="control">U+202E</span>`."""
    parts, begun = [], 0
    for match in UNSEEN.finditer(text):
        parts += [escape(text[begun : match.start()]), Markup(f'<span class="control">{name_of(match[0])}</span>')]
        begun = match.end()
    return Markup().join([*parts, escape(text[begun:])]) if parts else escape(text)


def name_of(character: str) -> str:
    """What stands for an unseen character: `U+` and its number."""
    original = next((key for key, stand_in in STAND_INS.items() if stand_in == character), character)
    return f"U+{ord(original):04X}"


def visible(text: str) -> str:
    """A text with the names of its unseen characters in place of them."""
    return UNSEEN.sub(lambda match: name_of(match[0]), text)
