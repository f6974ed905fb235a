"""Values in words."""

import pytest

from preference_training.core.values import size_of_model


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
