"""Differences of answers: nothing is lost, changes are marked by more than color, and any two texts end in time."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_collection.tests.pages import Page
from preference_collection.web.characters import visible
from preference_collection.web.differences import MOST_CHARACTERS, changes_of, compare, differences

PARTS = ["a ", "b ", "word ", "\n", "\n\n", "<ins>", "</pre>", "é", "\u202e", "字", "  ", "x = 1\n"]
texts = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


def without(html: str, tag: str) -> str:
    """The visible text without the parts in one kind of element."""
    return Page(re.sub(f"<{tag}>.*?</{tag}>", "", html.partition("</p>")[2], flags=re.DOTALL)).text


@given(texts, texts)
def test_without_its_insertions_a_comparison_of_prose_is_the_first_text_and_without_its_removals_the_second(first, second):
    html = compare(first, second, code=False)
    if first == second:
        assert "identical" in html
    elif "share too little" not in html:
        assert without(html, "ins") == visible(first) and without(html, "del") == visible(second)


def lines_of(html: str, kind: str) -> list[str]:
    """The lines of a comparison of code that are equal or of one kind, without their signs."""
    found = re.findall(r'<span class="line (same|removed|added)">(.*?)\n</span>', html, re.DOTALL)
    return [Page(line).text[2:] for name, line in found if name in ("same", kind)]


@given(texts, texts)
def test_a_comparison_of_code_has_every_line_of_both(first, second):
    if first != second:
        html = compare(first, second, code=True)
        assert lines_of(html, "removed") == visible(first).split("\n")
        assert lines_of(html, "added") == visible(second).split("\n")


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_changes_give_back_both_sequences(first, second):
    changes = changes_of(first, second)
    assert [item for change in changes for item in change.before] == first
    assert [item for change in changes for item in change.after] == second
    assert all((list(change.before) == list(change.after)) == change.same for change in changes)


def test_a_changed_word_is_marked_and_spoken():
    html = compare("The quick fox runs.", "The slow fox runs.", code=False)
    assert re.search(r"The <del>.*removed:.*quick .*</del><ins>.*added:.*slow .*</ins>fox runs\.", html)
    assert "1 difference: 1 word removed and 1 word added." in html


def test_a_changed_line_of_code_shows_which_name_changed():
    html = compare("def f(x):\n    return x", "def f(y):\n    return x", code=True)
    assert "def f(<del>x</del>):" in html and "def f(<ins>y</ins>):" in html
    assert "return <del>" not in html and "1 line removed and 1 line added" in html


def test_equal_lines_far_from_a_change_are_folded_but_there():
    code = "\n".join(f"line {number}" for number in range(40))
    html = compare(code, code + "\nlast", code=True)
    assert "<summary>37 equal lines</summary>" in html and "line 5" in html


def test_a_line_is_compared_with_the_one_that_it_became():
    html = compare("a = 1\nreturn a + b", "a = 1\nif a > 3:\n    print(a)\nreturn a - b", code=True)
    assert "return a <del>+</del> b" in html and "return a <ins>-</ins> b" in html


def test_answers_that_share_no_words_are_not_struck_out():
    html = compare("Yes, of course.", "I would rather not", code=False)
    assert "share too little" in html and "<del>" not in html


def test_each_of_several_answers_is_compared_with_the_first():
    two, three = differences(["one word", "one word", "two word"], code=False)
    assert "identical" in two and "<ins>" in three


def test_answers_that_differ_in_line_ends_only_are_identical():
    assert "identical" in compare("a\r\nb", "a\nb", code=True)


@pytest.mark.parametrize("code", [True, False])
@pytest.mark.parametrize("first, second", [
    ("a b\n" * 30_000, "b a\n" * 25_000), ("x" * 10**6, "y" * 10**6), ("字" * 30_000, "符字" * 15_000),
    (" ".join(f"w{i % 97}" for i in range(30_000)), " ".join(f"w{i % 89}" for i in range(30_000))),
], ids=["lines", "one word", "no spaces", "few words"])  # fmt: skip
def test_long_texts_are_compared_up_to_a_limit_that_is_said(first, second, code):
    html = compare(first, second, code)
    assert "share too little, or are too long" in html or ("up to character" in html) == (len(first) > MOST_CHARACTERS)
