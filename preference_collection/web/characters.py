"""Text of models as HTML text: escaped, with every character that would be invisible, or move others, shown by name."""

import re

from markupsafe import Markup, escape

# Control characters except tab and newline; soft hyphens; zero-width characters except the joiners that scripts and emoji need;
# marks that change the direction of writing; line and paragraph separators; fillers; lone surrogates; tags and variation
# selectors, which can hide whole sentences.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def shown(text: str) -> Markup:
    """A text as HTML: escaped, each unseen character a `<span class="control">` with its picture (␛) or its number (U+202E)."""
    parts, begun = [], 0
    for match in UNSEEN.finditer(text):
        parts += [escape(text[begun : match.start()]), Markup('<span class="control">{}</span>').format(name_of(match[0]))]
        begun = match.end()
    return Markup().join([*parts, escape(text[begun:])]) if parts else escape(text)


def name_of(character: str) -> str:
    """What stands for an unseen character: the control picture where Unicode has one, `U+` and its number otherwise."""
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    return f"U+{code:04X}"


def visible(text: str) -> str:
    """A text with the names of its unseen characters in place of them."""
    return UNSEEN.sub(lambda match: name_of(match[0]), text)
