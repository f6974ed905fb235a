"""Texts as they are, until they are rendered."""

from markupsafe import Markup


def rendered(text: str, fold_lines: int, whole: str | None = None) -> Markup:
    """A text as HTML."""
    return Markup('<pre class="plain">{}</pre>').format(text)


def code_block(code: str, language: str, fold_lines: int, whole: str | None = None) -> Markup:
    """Code as HTML."""
    return Markup("<pre><code>{}</code></pre>").format(code)
