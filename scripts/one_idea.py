"""Draw docs/one-idea.svg: a prompt with its responses as one trie, next to the same as rows of a batch.

python scripts/one_idea.py [--check]

--check writes nothing, and exits with status 1 if the picture is out of date.
"""

from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "one-idea.svg"

# The example: tokens of the prompt and of each response, and pairs (preferred, rejected).
PROMPT, RESPONSES, PAIRS = 11, (6, 9, 4), ((0, 1), (0, 2), (2, 1))
NAMES = "ABC"
# Sizes. Unit: pixels.
WIDTH, HEIGHT, TOKEN, BAR, LEFT, RIGHT = 960, 430, 15, 22, 40, 520

# With a background for light and for dark mode, so that it is legible on any page.
STYLE = """
.ground{fill:#fbfbf8} .prompt{fill:#667089} .r0{fill:#1f77b4} .r1{fill:#b5520f} .r2{fill:#2f7d3e}
.padding{fill:none;stroke:#b9b9b2;stroke-dasharray:3 3} .line{fill:none;stroke:#6b7280;stroke-width:1.5}
text{fill:#22262e;font:14px system-ui,sans-serif} .title{font-weight:600;font-size:16px} .small{font-size:12px;fill:#5b6270}
.on{fill:#fff;font-size:12px}
@media (prefers-color-scheme:dark){.ground{fill:#1c1f26} .prompt{fill:#626c80} .r0{fill:#2f7ab5} .r1{fill:#b95d1e}
.r2{fill:#3a8449} .padding{stroke:#565d6b} .line{stroke:#9aa2b1} text{fill:#e8eaee} .small{fill:#a9b0bd} .on{fill:#fff}}
"""


def bar(x: float, y: float, tokens: int, kind: str, label: str = "") -> str:
    """Some tokens as a labeled bar."""
    width = tokens * TOKEN
    text = f'<text class="on" x="{x + width / 2}" y="{y + 15}" text-anchor="middle">{label}</text>' if label else ""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BAR}" rx="3"/>{text}'


def line(x: float, y: float, text: str, kind: str = "") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>'


def as_rows() -> tuple[list[str], int]:
    """The left half: two rows per pair, padded to the longest; and the number of tokens computed."""
    longest = PROMPT + max(RESPONSES)
    parts = [line(LEFT, 40, "As padded rows", "title"), line(LEFT, 62, "two rows per pair, padded to the longest")]
    for number, response in enumerate(response for pair in PAIRS for response in pair):
        y = 84 + number * 34 + (number // 2) * 12
        parts.append(bar(LEFT, y, PROMPT, "prompt", "prompt"))
        parts.append(bar(LEFT + PROMPT * TOKEN, y, RESPONSES[response], f"r{response}", NAMES[response]))
        padding = longest - PROMPT - RESPONSES[response]
        if padding:
            parts.append(bar(LEFT + (longest - padding) * TOKEN, y + 0.5, padding, "padding"))
    tokens = len(PAIRS) * 2 * longest
    return parts, tokens


def as_trie() -> tuple[list[str], int]:
    """The right half: the prompt and each response once, and pairs as indices; and the number of tokens computed."""
    parts = [line(RIGHT, 40, "As a trie", "title"), line(RIGHT, 62, "prompt and responses once; pairs are indices")]
    end, begin = RIGHT + PROMPT * TOKEN, RIGHT + PROMPT * TOKEN + 40
    middle = 84 + 46 + BAR / 2
    parts.append(bar(RIGHT, middle - BAR / 2, PROMPT, "prompt", "prompt"))
    for number, tokens in enumerate(RESPONSES):
        y = 84 + number * 46
        parts.append(
            f'<path class="line" d="M{end} {middle}C{end + 20} {middle} {begin - 20} {y + BAR / 2} {begin} {y + BAR / 2}"/>'
        )
        parts.append(bar(begin, y, tokens, f"r{number}", NAMES[number]))
    parts.append(line(RIGHT, 252, "log-probs, one per response:"))
    for number, name in enumerate(NAMES):
        parts.append(bar(RIGHT + 248 + number * 38, 236, 2, f"r{number}", name))
    parts.append(line(RIGHT, 292, "pairs (preferred, other), looked up by the loss:"))
    for number, (preferred, other) in enumerate(PAIRS):
        x = RIGHT + number * 120
        parts += [line(x, 322, "("), bar(x + 8, 306, 2, f"r{preferred}", NAMES[preferred]), line(x + 43, 322, ",")]
        parts += [bar(x + 52, 306, 2, f"r{other}", NAMES[other]), line(x + 86, 322, ")")]
    return parts, PROMPT + sum(RESPONSES)


def picture() -> str:
    """The whole SVG."""
    (rows, row_tokens), (trie, trie_tokens) = as_rows(), as_trie()
    title = f"A prompt with {len(RESPONSES)} responses in {len(PAIRS)} pairs, as rows of a batch and as a trie"
    note = f"prompt of {PROMPT} tokens, responses of {', '.join(map(str, RESPONSES))}; dashed frames are padding"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        *rows,
        line(LEFT, 358, f"{row_tokens} tokens computed", "title"),
        *trie,
        line(RIGHT, 358, f"{trie_tokens} tokens computed", "title"),
        line(LEFT, 398, note, "small"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write or check the picture."""
    from generated import write_or_check

    write_or_check(PICTURE, picture())


if __name__ == "__main__":
    main()
