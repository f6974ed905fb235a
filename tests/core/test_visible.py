"""Text from data never acts on a terminal: control characters in messages are shown as escapes."""

import pickle
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.core.errors import UserError, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x07\x08\x00\r", r"\x07\x08\x00\r"),
        ("a\u202eb\ud800", r"a\u202eb\ud800"),
        ("two\n\tlines", "two\n\tlines"),
        ("é 日本\u3000語", "é 日本\u3000語"),
    ],
)
def test_control_characters_are_escapes_and_text_stays(text, shown):
    assert visible(text) == shown
    assert str(UserError(text)) == shown and str(pickle.loads(pickle.dumps(UserError(text)))) == shown


@given(st.text())
def test_nothing_that_acts_is_left(text):
    shown = visible(text)
    assert not any(category(letter) in ("Cc", "Cf", "Cs") for letter in shown if letter not in "\n\t")
    assert visible(shown) == shown
