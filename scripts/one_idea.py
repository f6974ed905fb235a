"""Draw docs/one-idea.svg: two prompts that share a system prompt, as a trie, next to the same as rows of a batch.

python scripts/one_idea.py [--check]

--check writes nothing, and exits with status 1 if the picture is out of date.
"""

from pathlib import Path
from typing import NamedTuple

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "one-idea.svg"


class Prompt(NamedTuple):
    """Tokens of a prompt behind the system prompt and of each of its responses, and pairs (preferred, rejected)."""

    tokens: int
    responses: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


# The example.
SYSTEM, PROMPTS = 8, (Prompt(5, (5, 7, 3), ((0, 1), (0, 2), (2, 1))), Prompt(3, (6, 4), ((0, 1),)))
NAMES = "ABCDE"
# Sizes. Unit: pixels.
WIDTH, HEIGHT, TOKEN, BAR, LEFT, RIGHT = 960, 470, 15, 22, 40, 480
ROW, BRANCH, GAP = 30, 40, 34

# With a background for light and for dark mode, so that it is legible on any page.
STYLE = """
.ground{fill:#fbfbf8} .system{fill:#454c5e} .prompt{fill:#717c94} .r0{fill:#1f77b4} .r1{fill:#b5520f} .r2{fill:#2f7d3e}
.r3{fill:#7d4fa3} .r4{fill:#a13d63} .padding{fill:none;stroke:#b9b9b2;stroke-dasharray:3 3}
.line{fill:none;stroke:#6b7280;stroke-width:1.5}
text{fill:#22262e;font:14px system-ui,sans-serif} .title{font-weight:600;font-size:16px} .small{font-size:12px;fill:#5b6270}
.on{fill:#fff;font-size:12px}
@media (prefers-color-scheme:dark){.ground{fill:#1c1f26} .system{fill:#4b5364} .prompt{fill:#6b7589} .r0{fill:#2f7ab5}
.r1{fill:#b95d1e} .r2{fill:#3a8449} .r3{fill:#8a5db0} .r4{fill:#ad4a70} .padding{stroke:#565d6b} .line{stroke:#9aa2b1}
text{fill:#e8eaee} .small{fill:#a9b0bd} .on{fill:#fff}}
"""


def bar(x: float, y: float, tokens: int, kind: str, label: str = "") -> str:
    """Some tokens as a labeled bar."""
    width = tokens * TOKEN
    text = f'<text class="on" x="{x + width / 2}" y="{y + 15}" text-anchor="middle">{label}</text>' if label else ""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BAR}" rx="3"/>{text}'


def line(x: float, y: float, text: str, kind: str = "") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>'


def edge(x: float, y: float, end_y: float) -> str:
    """A curve from the end of a bar to the beginning of a bar of the next level."""
    end = x + GAP
    return f'<path class="line" d="M{x} {y}C{x + GAP / 2} {y} {end - GAP / 2} {end_y} {end} {end_y}"/>'


def _prompt_name(number: int, prompt: Prompt) -> str:
    """A label that fits into the prompt's bar."""
    return f"prompt {number}" if prompt.tokens > 3 else f"{number}"


def as_rows() -> tuple[list[str], int]:
    """The left half: two rows per pair, padded to the longest; and the number of tokens computed."""
    longest = max(SYSTEM + prompt.tokens + max(prompt.responses) for prompt in PROMPTS)
    parts = [line(LEFT, 40, "As padded rows", "title"), line(LEFT, 62, "two rows per pair, padded to the longest")]
    rows, first, y = 0, 0, 84
    for number, prompt in enumerate(PROMPTS, start=1):
        for response in (response for pair in prompt.pairs for response in pair):
            length = SYSTEM + prompt.tokens
            parts.append(bar(LEFT, y, SYSTEM, "system", "system prompt"))
            parts.append(bar(LEFT + SYSTEM * TOKEN, y, prompt.tokens, "prompt", _prompt_name(number, prompt)))
            name = first + response
            parts.append(bar(LEFT + length * TOKEN, y, prompt.responses[response], f"r{name}", NAMES[name]))
            length += prompt.responses[response]
            if length < longest:
                parts.append(bar(LEFT + length * TOKEN, y + 0.5, longest - length, "padding"))
            rows += 1
            y += ROW + 8 * (rows % 2 == 0)
        first += len(prompt.responses)
    return parts, rows * longest


def as_trie() -> tuple[list[str], int]:
    """The right half: what is shared once, and pairs as indices; and the number of tokens computed."""
    parts = [line(RIGHT, 40, "As a trie", "title"), line(RIGHT, 62, "what sequences share is computed once; pairs are indices")]
    count = sum(len(prompt.responses) for prompt in PROMPTS)
    middle = 84 + (count - 1) * BRANCH / 2 + BAR / 2
    parts.append(bar(RIGHT, middle - BAR / 2, SYSTEM, "system", "system prompt"))
    name, column = 0, RIGHT + SYSTEM * TOKEN + GAP
    for number, prompt in enumerate(PROMPTS, start=1):
        center = 84 + (name + (len(prompt.responses) - 1) / 2) * BRANCH + BAR / 2
        parts.append(edge(RIGHT + SYSTEM * TOKEN, middle, center))
        parts.append(bar(column, center - BAR / 2, prompt.tokens, "prompt", _prompt_name(number, prompt)))
        end = column + prompt.tokens * TOKEN
        for tokens in prompt.responses:
            y = 84 + name * BRANCH
            parts += [edge(end, center, y + BAR / 2), bar(end + GAP, y, tokens, f"r{name}", NAMES[name])]
            name += 1
    parts.append(line(RIGHT, 318, "log-probs, one per response:"))
    parts += [bar(RIGHT + 210 + number * 36, 302, 2, f"r{number}", NAMES[number]) for number in range(count)]
    parts.append(line(RIGHT, 356, "pairs (preferred, other):"))
    first, x = 0, RIGHT
    for prompt in PROMPTS:
        for preferred, other in ((first + i, first + j) for i, j in prompt.pairs):
            parts += [line(x, 386, "("), bar(x + 8, 370, 2, f"r{preferred}", NAMES[preferred]), line(x + 43, 386, ",")]
            parts += [bar(x + 52, 370, 2, f"r{other}", NAMES[other]), line(x + 86, 386, ")")]
            x += 108
        first += len(prompt.responses)
    return parts, SYSTEM + sum(prompt.tokens + sum(prompt.responses) for prompt in PROMPTS)


def picture() -> str:
    """The whole SVG."""
    (rows, row_tokens), (trie, trie_tokens) = as_rows(), as_trie()
    title = "Two prompts with the same system prompt and five responses in four pairs, as rows of a batch and as a trie"
    note = "each bar is a run of tokens; dashed frames are padding"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        *rows,
        line(LEFT, 420, f"{row_tokens} tokens computed", "title"),
        *trie,
        line(RIGHT, 420, f"{trie_tokens} tokens computed", "title"),
        line(LEFT, 448, note, "small"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write or check the picture."""
    from generated import write_or_check

    write_or_check(PICTURE, picture())


if __name__ == "__main__":
    main()
