"""HTML as its reader gets it, for tests: the elements with their attributes, and the visible text."""

from html.parser import HTMLParser

# Elements that have no end.
VOID = {"br", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A parsed fragment: `elements` as (name, attributes), and `text` without what is spoken only."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list[tuple[str, bool]] = []
        self.feed(str(html))
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("class") == "unseen"))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if not any(spoken for _, spoken in self._open):
            self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment

    def all(self, tag: str) -> list[dict]:
        """The attributes of all elements of a name."""
        return [attributes for name, attributes in self.elements if name == tag]
