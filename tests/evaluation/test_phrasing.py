"""Results in words."""

import pytest

from preference_training.evaluation.phrasing import metric_text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"loss/eval": 0.69314, "loss/eval/low": 0.61239, "loss/eval/high": 0.7}, "0.693 [0.612, 0.7]"),
        ({"loss/eval": 0.69314, "loss/eval/low": 0.61239}, "0.6931"),
        ({"loss/eval": 12800}, "12,800"),
        ({"loss/eval": None, "loss/eval/low": 0.5, "loss/eval/high": 0.7}, "-"),
        ({}, "-"),
    ],
)
def test_a_metric_of_a_row_has_its_interval_if_there_is_a_whole_one(row, text):
    assert metric_text(row, "loss/eval") == text


def test_a_metric_may_have_more_digits():
    row = {"loss/eval": 0.69314, "loss/eval/low": 0.61239, "loss/eval/high": 0.70001}
    assert metric_text(row, "loss/eval", digits=4) == "0.6931 [0.6124, 0.7]"
