"""Highlighting of code: Pygments' tokens as lines of HTML, with few classes and no inline style."""

from functools import cache

from markupsafe import Markup
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

from preference_collection.web.characters import shown

# Longer code is not highlighted, nor is code with a longer line: lexers take time there that grows faster than its length.
# Unit: characters.
LONGEST, LONGEST_LINE = 20_000, 1_000

# Languages that answers are in. Pygments knows hundreds, whose lexers nobody has tried on hostile input.
LANGUAGES = {
    "bash", "c", "c++", "console", "cpp", "cs", "csharp", "css", "dart", "diff", "docker", "dockerfile", "elixir", "go",
    "golang", "haskell", "hs", "html", "ini", "java", "javascript", "js", "json", "jsx", "julia", "kotlin", "kt",
    "latex", "lua", "make", "makefile", "matlab", "objc", "perl", "php", "powershell", "ps1", "py", "pycon", "python",
    "python3", "r", "rb", "rs", "ruby", "rust", "scala", "sh", "shell", "sql", "swift", "tex", "toml", "ts", "tsx",
    "typescript", "vb", "xml", "yaml", "yml", "zsh",
}  # fmt: skip

CLASSES = {
    Token.Comment: "c", Token.Keyword: "k", Token.Literal.String: "s", Token.Literal.Number: "m", Token.Name.Function: "n",
    Token.Name.Class: "n", Token.Name.Decorator: "n", Token.Name.Builtin: "n", Token.Name.Tag: "n", Token.Generic.Deleted: "d",
    Token.Generic.Inserted: "i", Token.Generic.Heading: "k", Token.Generic.Subheading: "k",
}  # fmt: skip


def highlighted_lines(code: str, language: str) -> list[Markup]:
    """The lines of code as HTML, highlighted where the language is known and the code is not too long."""
    plain = code.split("\n")
    lexer = _lexer(language.lower()) if len(code) <= LONGEST and max(map(len, plain)) <= LONGEST_LINE else None
    if lexer is None:
        return [shown(line) for line in plain]
    tokens = [(kind, value) for _, kind, value in lexer.get_tokens_unprocessed(code)]
    # Lexers of sessions leave out or add parts of what is none.
    if "".join(value for _, value in tokens) != code:
        return [shown(line) for line in plain]
    lines: list[list[Markup]] = [[]]
    for kind, value in tokens:
        name = _class(kind)
        for number, part in enumerate(value.split("\n")):
            if number:
                lines.append([])
            if part:
                html = shown(part)
                lines[-1].append(Markup(f'<span class="{name}">{html}</span>') if name and part.strip() else html)
    return [Markup().join(parts) for parts in lines]


@cache
def _lexer(language: str) -> Lexer | None:
    if language not in LANGUAGES:
        return None
    try:
        return get_lexer_by_name(language)
    except ClassNotFound:
        return None


@cache
def _class(kind) -> str | None:
    """The class of a token: that of its nearest ancestor that has one."""
    while kind is not Token:
        if kind in CLASSES:
            return CLASSES[kind]
        kind = kind.parent
    return None
