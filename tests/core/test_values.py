"""Values in words."""

import pytest

from preference_training.core.values import format_number, size_of_model


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (7_000_000_000, "7B"),
        (7_240_000_000, "7.2B"),
        (134_515_008, "135M"),
        (1_240_000, "1.2M"),
        (230_000, "0.23M"),
        (99_999, "99,999"),
    ],
)
def test_a_models_size_is_never_none(parameters, words):
    assert size_of_model(parameters) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.69314, "0.6931"), (12800, "12,800"), (-1500.4, "-1,500"), (1.234e-7, "1.23e-07"), (2.5e8, "2.5e+08")],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text
