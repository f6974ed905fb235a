"""A post's HTML as plain text, for data sets that hold HTML."""

from collections.abc import Iterator


def html_to_text(html: str) -> str:
    """A post's HTML as text: paragraphs, headings, lists and quotes apart by an empty line, code inside <code> tags.

    Links keep their text, list items begin with "- ", quoted lines with "> ".
    """
    from bs4 import BeautifulSoup

    return "\n\n".join(_text_blocks(BeautifulSoup(html, "html.parser")))


BLOCKS = ["p", "pre", "ul", "ol", "blockquote", "div", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "table"]


def _text_blocks(element) -> list[str]:
    """The non-empty blocks of text below `element`, in order."""
    blocks, inline = [], ""
    for child in element.children:
        if child.name not in BLOCKS:
            inline += _inline_text(child)
            continue
        blocks, inline = [*blocks, inline.strip()], ""
        if child.name == "pre":
            blocks.append(f"<code>{child.get_text().rstrip()}</code>")
        elif child.name in ("ul", "ol"):
            blocks.append("\n".join(_list_items(child)))
        elif child.name == "blockquote":
            blocks.append("\n".join(f"> {line}" for line in "\n\n".join(_text_blocks(child)).splitlines()))
        else:
            blocks += _text_blocks(child)
    return [block for block in [*blocks, inline.strip()] if block]


def _list_items(element) -> Iterator[str]:
    """The items of a list, further lines indented; a list directly within a list belongs to the preceding item."""
    for child in element.children:
        if child.name in ("ul", "ol"):
            yield "\n".join(f"  {line}" for item in _list_items(child) for line in item.split("\n"))
        elif child.name is not None:
            yield "- " + "\n".join(_text_blocks(child)).replace("\n", "\n  ")


def _inline_text(element) -> str:
    """The text of an element inside a paragraph, with inline code in <code> tags and line breaks kept."""
    if element.name is None:
        # A comment is not text; its class is a subclass of the text node's.
        return str(element) if type(element).__name__ == "NavigableString" else ""
    if element.name == "code":
        return f"<code>{element.get_text()}</code>"
    return "\n" if element.name == "br" else "".join(map(_inline_text, element.children))
