"""Samples that repeat themselves are told from those that do not, and from what is usual."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.generation.repetition import FEWEST, repeated_share, repetition

PLAIN = list(range(100))


def test_the_share_of_repeated_runs_of_four_tokens():
    # 40 tokens have 37 runs of four; of a single token all are the same one.
    assert repeated_share([[7] * 40]) == pytest.approx(36 / 37)
    assert repeated_share([PLAIN]) == 0
    # 97 different runs, and 36 of 37 repeated ones.
    assert repeated_share([PLAIN, [7] * 40]) == pytest.approx(36 / (97 + 37))
    # The same answer to two prompts repeats nothing within either.
    assert repeated_share([PLAIN, PLAIN]) == 0


def test_samples_that_are_too_short_say_nothing():
    assert repeated_share([]) is None and repeated_share([[], [1, 1, 1]]) is None
    assert repeated_share([[7] * (FEWEST + 2)]) is None and repeated_share([[7] * (FEWEST + 3)]) is not None
    assert repetition([[7] * 10], None) is None


@pytest.mark.parametrize(
    ("policy", "reference", "told"),
    [
        ([7] * 100, PLAIN, "99% of all runs of 4 tokens in the policy's samples are repetitions, and 0% of the reference's"),
        ([7] * 100, None, "99% of all runs of 4 tokens in the policy's samples are repetitions"),
        (PLAIN, PLAIN, None),
        # The reference does so too.
        ([7] * 100, [7] * 90 + PLAIN[:10], None),
        # A third: a refrain, which is no broken model.
        (PLAIN + PLAIN[:50], PLAIN, None),
    ],
)
def test_only_what_the_reference_does_not_do_is_told(policy, reference, told):
    assert repetition([policy], None if reference is None else [reference]) == told


@given(st.lists(st.lists(st.integers(0, 3), max_size=80), max_size=5))
def test_the_share_is_one_and_does_not_depend_on_the_order_of_the_samples(samples):
    share = repeated_share(samples)
    assert share is None or 0 <= share < 1
    assert share == repeated_share(samples[::-1])
