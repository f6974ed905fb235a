"""The sample problems: their tests expect what a simple solution returns."""

import json

import pytest

from preference_collection.exchange.importing import SAMPLES
from preference_collection.tests.reference_solutions import SOLUTIONS
from preference_training.sandbox.sandbox import same


@pytest.mark.parametrize("row", map(json.loads, SAMPLES.read_text().splitlines()), ids=lambda row: row["id"])
def test_the_samples_expect_the_right_answers(row):
    solution = SOLUTIONS[row["function_name"]]
    for test in row["tests"]:
        assert same(json.loads(json.dumps(solution(*test["args"]))), test["expected"], test.get("compare", "equal")), test
