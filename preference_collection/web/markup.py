"""Markdown of models as safe HTML: nothing in it acts, loads, or stays unseen.

HTML in a text is text. Images are not loaded: their text and address are shown. Links show their address, and lead there only
if it is http, https or mailto. LaTeX stays as written. What exceeds `fold_lines` lines is folded with <details>, which needs no
script. The class names are those of static/text.css.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from markdown_it import MarkdownIt
from markdown_it.common.normalize_url import normalizeLink
from markdown_it.token import Token
from markupsafe import Markup, escape

from preference_collection.web.characters import one_kind_of_line, shown
from preference_collection.web.highlighting import highlighted_lines

# Markdown is rendered up to this length, and plain text follows up to the second. Unit: characters.
RENDERED, SENT = 40_000, 1_000_000
# Text with a longer line, nested deeper, or of more parts is not markdown that a person reads: it is shown as written. The
# parser drops what is below its own depth limit, which is therefore higher.
LONGEST_LINE, DEEPEST, PARSER_DEEPEST, MOST_TOKENS = 10_000, 20, 40, 20_000
# The parser gives each row of a table as many cells as its head has. Unit: columns times lines.
MOST_CELLS = 10_000
# Folding counts a line of the text as several where it wraps. Unit: characters.
WIDTH = 100
# So few lines are not worth a fold.
SPARED = 3
# The highest heading of a text. Those above belong to the page.
TOP_HEADING = 3

ADDRESS = re.compile(r"(?:https?://|mailto:)[!-~]+", re.IGNORECASE)
# LaTeX between \( \), \[ \], $$ $$, \begin{} \end{}, or $ $ where it does not look like two amounts of money. Each form ends at
# the next sign of its kind, so that the time is proportional to the length.
MATH = re.compile(
    r"\\\((?:[^\\]|\\[^()])++\\\)|\\\[(?:[^\\]|\\[^][])++\\\]|\$\$(?:[^$\\]|\\.)++\$\$"
    r"|\\begin\{(\w{1,20}\*?)\}(?:(?!\\(?:begin|end)\{\1\}).){1,2000}\\end\{\1\}|\$(?!\s)(?:[^$\\\n]|\\.)++(?<!\s)\$(?!\d)",
    re.DOTALL,
)
TABLE_HEAD = re.compile(r"[\s|:-]*-[\s|:-]*")
CONTAINERS = ("bullet_list_open", "ordered_list_open", "blockquote_open")
AS_WRITTEN = '<p class="note">This is too long or too deeply nested for markdown. It is shown as written.</p>'


@dataclass(frozen=True)
class Block:
    """A block in units that a fold may part: lines of code, items of a list, rows of a table.

    `begin(k)` is the HTML before unit k where the block begins with it; a unit is its number of lines and its HTML.
    """

    begin: Callable[[int], str]
    units: list[tuple[int, str]]
    end: str

    def html(self, first: int = 0, last: int | None = None) -> str:
        """The units from `first` up to `last`, as a block of its own."""
        inner = "".join(html for _, html in self.units[first:last])
        return f"{self.begin(first)}{inner}{self.end}" if inner else ""


def rendered(text: str, fold_lines: int, whole: str | None = None) -> Markup:
    """Markdown as HTML, folded after `fold_lines` lines; 0 does not fold. `whole` is the address of the text as a file, for
    what is longer than a page can hold.
    """
    text = one_kind_of_line(text)
    head = _head(text)
    return Markup(f'<div class="rendered">{_rendered(head, fold_lines)}{_rest(text, len(head), whole)}</div>')


def code_block(code: str, language: str, fold_lines: int, whole: str | None = None) -> Markup:
    """Code as HTML, highlighted and with line numbers, folded after `fold_lines` lines; 0 does not fold."""
    code = one_kind_of_line(code)
    head = _head(code)
    block = _code(head, language, "numbered")
    return Markup(f'<div class="rendered">{_folded([block], fold_lines)}{_rest(code, len(head), whole)}</div>')


@lru_cache(maxsize=1024)
def _rendered(text: str, fold_lines: int) -> str:
    blocks, note = _blocks(text)
    return note + _folded(blocks, fold_lines)


def _head(text: str) -> str:
    """What is rendered of a text: all of it, or its beginning up to the end of a line."""
    if len(text) <= RENDERED:
        return text
    return text[: max(text.rfind("\n", RENDERED // 2, RENDERED) + 1, 0) or RENDERED]


def _rest(text: str, begun: int, whole: str | None) -> str:
    """What follows the rendered part: plain text behind a fold, and a line about what a page cannot hold."""
    rest = text[begun:SENT]
    parts = []
    if rest:
        parts += [f'<details class="rest"><summary>Show {len(rest):,} more characters as plain text</summary>']
        parts += [f'<pre class="plain">{shown(rest)}</pre></details>']
    if len(text) > SENT:
        line = f"{len(text) - SENT:,} of {len(text):,} characters are not on this page."
        link = f' <a href="{escape(whole)}" rel="noreferrer noopener" target="_blank">Open the whole text</a>' if whole else ""
        parts += [f'<p class="note">{line}{link}</p>']
    return "".join(parts)


def _folded(blocks: Iterable[Block], fold_lines: int) -> str:
    """Blocks as HTML; what exceeds `fold_lines` lines is behind a fold."""
    blocks = list(blocks)
    total = sum(lines for block in blocks for lines, _ in block.units)
    if not fold_lines or total <= fold_lines + SPARED:
        return "".join(block.html() for block in blocks)
    before, after, room = [], [], fold_lines
    for block in blocks:
        fits = 0
        while room > 0 and fits < len(block.units):
            room -= block.units[fits][0]
            fits += 1
        before.append(block.html(0, fits))
        after.append(block.html(fits))
    hidden = "".join(after)
    if not hidden:
        return "".join(before)
    fold = f'<details class="fold"><summary>Show {total - fold_lines + min(room, 0):,} more lines</summary>{hidden}</details>'
    return "".join(before) + fold


# ---- from tokens to blocks --------------------------------------------------------------------------------------------------


def _blocks(text: str) -> tuple[Iterable[Block], str]:
    """The blocks of a text, and a note where it is shown as written."""
    lines = text.split("\n")
    if max(map(len, lines)) > LONGEST_LINE or _cells(lines) > MOST_CELLS:
        return [_plain(lines)], AS_WRITTEN
    tokens = PARSER.parse(text)
    if len(tokens) > MOST_TOKENS or any(token.level >= DEEPEST for token in tokens) or _cells_dropped(tokens, lines):
        return [_plain(lines)], AS_WRITTEN
    ends = [0, *accumulate(math.ceil(len(line) / WIDTH) or 1 for line in lines)]
    return [_block(group, ends) for group in _groups(tokens)], ""


def _cells(lines: list[str]) -> int:
    """The most cells that a table can have."""
    return max((line.count("|") * (len(lines) - at) for at, line in enumerate(lines) if TABLE_HEAD.fullmatch(line)), default=0)


def _cells_dropped(tokens: Sequence[Token], lines: list[str]) -> bool:
    """Whether a row of a table has more cells than its head, of which the parser keeps nothing."""
    count = kept = 0
    for token in tokens:
        if token.type == "table_open":
            count, kept = sum(map(str.isalnum, "".join(lines[slice(*token.map)]))), 0
        elif token.type == "table_close" and kept < count:
            return True
        elif count and token.type == "inline":
            kept += sum(map(str.isalnum, token.content))
    return False


def _groups(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """The tokens of each block: from the one that opens it to the one that closes it."""
    depth = begun = 0
    for index, token in enumerate(tokens):
        depth += token.nesting
        if depth == 0:
            yield tokens[begun : index + 1]
            begun = index + 1


def _block(group: Sequence[Token], ends: list[int]) -> Block:
    first = group[0]
    if first.type in ("fence", "code_block"):
        label = Markup('<p class="language">{}</p>').format(shown(first.info.strip())) if first.info.strip() else ""
        return _code(first.content.removesuffix("\n"), first.info.strip().split(" ")[0], label=label)
    if first.type in CONTAINERS:
        start = int(first.attrGet("start") or 1)
        # A list that goes on behind the fold goes on counting.
        begin = (lambda k: f'<ol start="{start + k}">') if first.type == "ordered_list_open" else lambda _: f"<{first.tag}>"
        return Block(begin, [_unit(inner, ends) for inner in _groups(group[1:-1])], f"</{first.tag}>")
    if first.type == "table_open":
        parts = list(_groups(group[1:-1]))
        head = _html(parts[0])
        rows = [_unit(row, ends) for part in parts[1:] for row in _groups(part[1:-1])]
        # A table without rows is its head.
        return Block(lambda _: f'<div class="wide"><table>{head}<tbody>', rows or [(1, " ")], "</tbody></table></div>")
    return Block(lambda _: "", [_unit(group, ends)], "")


def _unit(group: Sequence[Token], ends: list[int]) -> tuple[int, str]:
    begin, end = group[0].map or (0, 1)
    return max(1, ends[min(end, len(ends) - 1)] - ends[begin]), _html(group)


def _html(tokens: Sequence[Token]) -> str:
    return PARSER.renderer.render(tokens, PARSER.options, {})


def _plain(lines: list[str]) -> Block:
    """A text as written; long lines are units of `WIDTH` characters, so that a fold can part them."""
    units = []
    for line in lines:
        pieces = [line[at : at + WIDTH] for at in range(0, len(line), WIDTH)] or [""]
        units += [(1, str(shown(piece))) for piece in pieces[:-1]] + [(1, f"{shown(pieces[-1])}\n")]
    return Block(lambda _: '<pre class="plain">\n', units, "</pre>")


def _code(code: str, language: str, kind: str = "code", label: str = "") -> Block:
    """Code in units of lines. The label stands before its first line only."""
    units = [
        (math.ceil(len(line) / WIDTH) or 1, f'<span class="line">{html}\n</span>')
        for line, html in zip(code.split("\n"), highlighted_lines(code, language), strict=True)
    ]

    def begin(k: int) -> str:
        return f'{"" if k else label}<pre class="{kind}"><code>'

    return Block(begin, units, "</code></pre>")


# ---- the parser and the HTML of its tokens ----------------------------------------------------------------------------------


def _text(_renderer, tokens, index, _options, _env) -> str:
    return str(shown(tokens[index].content))


def _inline_code(_renderer, tokens, index, _options, _env) -> str:
    return f"<code>{shown(tokens[index].content)}</code>"


def _code_token(_renderer, tokens, index, _options, _env) -> str:
    """Code within a list or a quotation, which a fold does not part."""
    return _block(tokens[index : index + 1], [0]).html()


def _math(_renderer, tokens, index, _options, _env) -> str:
    return f'<span class="math">{shown(tokens[index].content)}</span>'


def _image(renderer, tokens, index, options, env) -> str:
    token = tokens[index]
    inner = renderer.renderInline(token.children or [], options, env)
    address = _address(token.attrGet("src"), token.attrGet("title"))
    return f'<span class="image">Image: {inner}{address}</span>'


def _link_open(_renderer, tokens, index, _options, _env) -> str:
    return "" if tokens[index].markup == "autolink" else '<span class="link">'


def _link_close(_renderer, tokens, index, _options, _env) -> str:
    """The address of the link, which stands behind its text. An address alone, in < >, is followed by nothing else."""
    opened = next(tokens[at] for at in range(index, -1, -1) if tokens[at].type == "link_open")
    address = _address(opened.attrGet("href"), opened.attrGet("title"))
    return address if opened.markup == "autolink" else f"{address}</span>"


def _without_doubles(state) -> None:
    """A rule of the parser: an address in < > is its own text, which would stand beside it a second time."""
    for block in state.tokens:
        for before, token in pairwise(block.children or []):
            if before.type == "link_open" and before.markup == "autolink":
                token.content = ""


def _address(address, title) -> str:
    """An address in parentheses, with its title; a link if it leads to the web or to mail, text otherwise."""
    address, title = str(address or ""), f' "{title}"' if title else ""
    encoded = normalizeLink(address)
    if ADDRESS.fullmatch(encoded) and ADDRESS.match(address):
        link = Markup('<a href="{}" rel="noreferrer noopener" target="_blank">{}</a>').format(encoded, shown(address))
        return f' <span class="address">({link}{shown(title)})</span>'
    return f' <span class="address">({shown(address + title)})</span>'


def _cell(renderer, tokens, index, _options, _env) -> str:
    """A table's cell; its alignment is a class, since the page allows no inline style."""
    token = tokens[index]
    style = str(token.attrs.pop("style", ""))
    if style:
        token.attrs["class"] = f"align-{style.rpartition(':')[2]}"
    return renderer.renderToken(tokens, index, _options, _env)


def _heading(renderer, tokens, index, options, env) -> str:
    token = tokens[index]
    token.tag = (
        f"h{min(6, int(token.markup and len(token.markup) if token.markup[0] == '#' else token.tag[1]) + TOP_HEADING - 1)}"
    )
    return renderer.renderToken(tokens, index, options, env)


def _math_rule(state, silent: bool) -> bool:
    """The parser's rule for LaTeX, which comes before escapes and emphasis."""
    if state.src[state.pos] not in "\\$":
        return False
    match = MATH.match(state.src, state.pos)
    if not match or match.end() > state.posMax:
        return False
    if not silent:
        state.push("math", "", 0).content = match[0]
    state.pos = match.end()
    return True


def _parser() -> MarkdownIt:
    # Definitions of references are hidden text; without the rule they are shown.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": PARSER_DEEPEST})
    parser.enable(["table", "strikethrough"]).disable(["reference", "html_block", "html_inline"])
    parser.inline.ruler.before("escape", "math", _math_rule)
    parser.core.ruler.push("without_doubles", _without_doubles)
    # Every address is a link to the parser, and shown; what may lead somewhere is decided when it is rendered.
    parser.normalizeLink = str
    parser.validateLink = lambda _: True
    rules = {
        "text": _text, "code_inline": _inline_code, "fence": _code_token, "code_block": _code_token, "math": _math,
        "image": _image, "link_open": _link_open, "link_close": _link_close, "th_open": _cell, "td_open": _cell,
        "heading_open": _heading, "heading_close": _heading,
    }  # fmt: skip
    for name, rule in rules.items():
        parser.add_render_rule(name, rule)
    return parser


PARSER = _parser()
