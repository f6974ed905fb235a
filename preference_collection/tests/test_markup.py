"""Text of models becomes HTML in which nothing acts, loads or stays unseen."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_collection.tests.pages import Page
from preference_collection.web.characters import UNSEEN, shown, visible
from preference_collection.web.highlighting import LANGUAGES, highlighted_lines
from preference_collection.web.markup import MOST_CELLS, RENDERED, SENT, code_block, rendered

PLAIN = ["em", "strong", "s", "br", "hr", "ul", "li", "blockquote", "table", "thead", "tbody", "tr", "h3", "h4", "h5", "h6"]
ALLOWED = {
    "div": {"class"}, "p": {"class"}, "span": {"class"}, "pre": {"class"}, "a": {"href", "rel", "target"},
    "details": {"class"}, "ol": {"start"}, "td": {"class"}, "th": {"class"},
    **{tag: set() for tag in [*PLAIN, "code", "summary"]},
}  # fmt: skip

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</div></main>", "<!--", "<style>*{display:none}</style>",
    "]]>", "[a](javascript:alert(1))", "![a](http://e.example/p 'title')", "<javascript:alert(1)>", "[a](data:text/html,x)",
    "[a](\" onclick=alert(1))", "[a]: javascript:alert(1)", "[a][a]", "```python\n", "```\"><script>\n", "~~~", "`", "``", "*",
    "**", "_", "~~", "> ", "- ", "3. ", "# ", "    ", "\t", "| a | b |\n|:-:|--:|\n", "|", "\\", "&lt;", "&#x202e;", "&#0;",
    "===\n", "---\n", "$", "$$", "\\(", "\\)", "\\[", "\\begin{a}", "\\end{a}", "<http://x.example/?a=1&b=2>", "![", "](", ")",
    "\x1b[31m", "\u202e", "\u200b", "\0", "\r", "\ud800", "\U000e0041", "http://x.example", '"', "'", " ", "\n\n", "\n",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec=None), max_size=12)), max_size=30).map("".join)


def assert_safe(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag in ALLOWED and set(attributes) <= ALLOWED[tag], (tag, attributes)
    for link in page.all("a"):
        assert re.match(r"(https?://|mailto:)[!-~]+$", link["href"], re.IGNORECASE)
        assert link["rel"] == "noreferrer noopener"
    assert not UNSEEN.search(page.text)
    page.text.encode()


@given(texts, st.sampled_from([0, 1, 40]))
def test_any_text_is_rendered_with_known_elements_only_and_no_unseen_character(text, fold_lines):
    assert_safe(Page(rendered(text, fold_lines)))


@given(texts, st.sampled_from(sorted(LANGUAGES)), st.sampled_from([0, 1, 40]))
def test_any_code_in_any_language_is_shown_whole(code, language, fold_lines):
    page = Page(code_block(code, language, fold_lines))
    assert_safe(page)
    lines = visible(code.replace("\r\n", "\n"))
    without_summary = re.sub(r"Show [\d,]+ more lines", "", page.text)
    assert without_summary == lines + "\n"


# Signs of markdown between words: what is markup may vanish, words may not.
SIGNS = [sign for sign in HOSTILE if "&" not in sign and "3" not in sign]


@given(
    st.lists(st.one_of(st.sampled_from(SIGNS), st.integers(0, 9).map("word{}".format)), max_size=40), st.sampled_from([0, 2])
)
def test_no_word_is_hidden_by_markup(parts, fold_lines):
    text = " ".join(parts)
    found = re.findall(r"word\d", Page(rendered(text, fold_lines)).text)
    assert sorted(found) == sorted(re.findall(r"word\d", text))


def test_markdown_is_rendered_below_the_headings_of_the_page():
    page = Page(rendered("# Title\n\nSub\n---\n\n#### Deep\n\n*a* **b** ~~c~~\n\n1. x\n2. y\n\n|a|b|\n|-|-:|\n|1|2|", 40))
    assert [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)] == ["h3", "h4", "h6"]
    assert {"em", "strong", "s", "ol", "li", "table"} <= {tag for tag, _ in page.elements}
    assert page.all("td")[1] == {"class": "align-right"}


@pytest.mark.parametrize("latex", [r"\(a_1 * b_2 * c\)", "$x_1*y_1*z$", "$$\na_b\n*c*\n$$", r"\[ \frac{1}{2} \\ x_1 \]",
                                   "\\begin{align}\na_1 &= *b* \\\\\n\\end{align}"])  # fmt: skip
def test_latex_stays_as_written(latex):
    assert latex in Page(rendered(f"Let {latex} hold.", 40)).text


def test_amounts_of_money_are_not_latex():
    assert len(Page(rendered("It costs $5 *or* $6.", 40)).all("em")) == 1


@pytest.mark.parametrize("address, leads", [
    ("http://a.example/x?y=1&z=2", True), ("https://a.example", True), ("mailto:a@b.example", True),
    ("javascript:alert(1)", False), ("JAVASCRIPT:alert(1)", False), ("data:text/html,x", False), ("//a.example", False),
    ("&#106;avascript:alert(1)", False), ("/settings", False), ("vbscript:x", False), ("file:///etc/passwd", False),
])  # fmt: skip
def test_a_link_shows_its_address_and_leads_to_the_web_and_mail_only(address, leads):
    page = Page(rendered(f"[the manual]({address} 'a title')", 40))
    assert bool(page.all("a")) == leads
    assert "the manual" in page.text and "a title" in page.text
    assert ("javascript" if "&#" in address else address.split("&")[0]) in page.text


def test_an_address_in_angle_brackets_is_shown_once():
    assert Page(rendered("<http://a.example>", 40)).text.count("a.example") == 1


def test_an_image_is_its_text_and_address_and_is_not_loaded():
    page = Page(rendered("![a *cat*](http://a.example/cat.png)", 40))
    assert not page.all("img") and "Image: a cat (http://a.example/cat.png)" in page.text


def test_definitions_of_references_are_not_hidden():
    assert "http://a.example" in Page(rendered("See.\n\n[1]: http://a.example 'why'", 40)).text


@pytest.mark.parametrize("text, seen", [
    ("\x1b[31mred", "U+001B[31mred"), ("a\u202eb", "aU+202Eb"), ("a\u200bb", "aU+200Bb"), ("\ud800", "U+D800"),
    ("\U000e0041", "U+E0041"), ("a\rb", "aU+000Db"), ("&#x202e;", "U+202E"), ("a\0b", "aU+0000b"),
])  # fmt: skip
def test_characters_that_are_not_seen_are_named(text, seen):
    assert Page(rendered(text, 40)).text.strip() == seen
    if "\r" not in text and "&" not in text:
        assert Page(shown(text)).text == seen


@pytest.mark.parametrize("text", ["👩‍👩‍👧 क्‍ष", "שלום", "tab\there"])
def test_joiners_of_scripts_and_emoji_stay(text):
    assert shown(text) == text


def test_code_is_highlighted_with_classes_and_keeps_every_character():
    page = Page(rendered("```python\ndef f(x):\n    return 'a'  # why\n```", 40))
    assert {"k", "n", "s", "c"} <= {attributes.get("class") for attributes in page.all("span")}
    assert "python" in page.text and "    return 'a'  # why" in page.text


def test_an_unknown_language_is_plain():
    assert highlighted_lines("a < b", "brainmelt") == ["a &lt; b"]


# ---- folding and limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["line\n" * 10, "```\n" + "code\n" * 8 + "```"], ids=["prose", "code"])
def test_a_short_text_is_not_folded(text):
    assert "<details" not in rendered(text, 10)


@pytest.mark.parametrize("text, tag", [
    ("\n\n".join(f"word{i}" for i in range(60)), "p"),
    ("```python\n" + "\n".join(f"word{i} = {i}" for i in range(60)) + "\n```", "pre"),
    ("\n".join(f"- word{i}" for i in range(60)), "li"),
    ("\n".join(f"{i + 1}. word{i}" for i in range(60)), "li"),
    ("> " + "\n>\n> ".join(f"word{i}" for i in range(60)), "p"),
    ("| a |\n|---|\n" + "\n".join(f"| word{i} |" for i in range(60)), "td"),
])  # fmt: skip
def test_a_long_text_is_folded_after_the_given_lines_whatever_it_consists_of(text, tag):
    before, fold, after = rendered(text, 20).partition('<details class="fold"><summary>')
    assert fold and before.count("word") in (10, 20), "paragraphs take a line and an empty one"
    assert before.count("word") + after.count("word") == 60
    assert after.startswith("Show ") and f"<{tag}" in after


def test_a_list_goes_on_counting_behind_the_fold():
    page = Page(rendered("\n".join(f"{i + 5}. item" for i in range(60)), 20))
    assert [element["start"] for element in page.all("ol")] == ["5", "25"]


def test_lines_that_wrap_count_as_several():
    assert "<details" in rendered("word " * 100 + "\n\n" + "word " * 100 + "\n\nend", 7)


def test_a_line_of_a_megabyte_is_shown_as_written_and_folded():
    text = "<b>x</b>" * 50_000
    page = Page(rendered(text, 40))
    folds = [element["class"] for element in page.all("details")]
    assert folds == ["fold", "rest"] and f"Show {len(text) - RENDERED:,} more characters as plain text" in page.text
    assert page.text.count("<b>x</b>") >= 49_999 and not page.all("b")


def test_what_a_page_cannot_hold_is_counted_and_has_an_address():
    page = Page(rendered("line\n" * 210_000, 40, "/text/c/0"))
    assert f"{1_050_000 - SENT:,} of 1,050,000 characters are not on this page." in page.text
    assert page.all("a")[0]["href"] == "/text/c/0"


@pytest.mark.parametrize("text", [
    ">" * 10_000 + "end", "[" * 10_000 + "end", "- " * 10_000 + "end", "![a](" * 5_000 + "end", "*a **b " * 5_000 + "end",
    "\n".join(" " * 2 * depth + "- item" for depth in range(200)) + "end", "`" * 9_000 + "end", "\\(a" * 9_000 + "end",
    "|a" * 300 + "\n" + "|-" * 300 + "\n" + "x\n" * 20_000 + "end", "|a|\n|-|\n" + "x\n" * (MOST_CELLS + 1) + "end",
    "\n".join(f"\\begin{{a{i}}}" for i in range(2_000)) + "end", "- a\n" * 4_000 + "end",
], ids=lambda text: text[:9])  # fmt: skip
def test_nesting_bombs_end_and_hide_nothing(text):
    page = Page(rendered(text, 40))
    assert_safe(page)
    assert "end" in page.text


def test_cells_beyond_the_head_of_a_table_are_not_hidden():
    assert "secret" in Page(rendered("|a|\n|-|\n|b|secret|", 40)).text
