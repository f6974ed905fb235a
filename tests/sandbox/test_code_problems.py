"""The 150 problems of examples/code_problems.jsonl: right solutions pass, wrong ones fail, held-out ones stay held out."""

import json
import random
import re
import sys
from collections import Counter

import pytest

from preference_training.sandbox.assertions import read_tests
from preference_training.sandbox.pass_rates import run_tests
from preference_training.sandbox.sandbox import Limits, same
from tests.support.files import ROOT

LIMITS = Limits(cpu_seconds=60, wall_seconds=60, memory_mb=256, files_mb=4, output_kb=64)
ROWS = [json.loads(line) for line in (ROOT / "examples" / "code_problems.jsonl").read_text().splitlines()]
HELD_OUT = [row for row in ROWS if row["split"] == "held_out"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="isolation needs Linux")


@pytest.fixture
def problems(monkeypatch):
    """benchmarks/code_problems.py, which composes them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import code_problems

    return code_problems


def test_there_are_a_hundred_to_train_and_fifty_held_out_of_every_difficulty():
    assert Counter((row["split"], row["difficulty"]) for row in ROWS) == {
        ("train", "easy"): 33, ("train", "medium"): 33, ("train", "hard"): 34,
        ("held_out", "easy"): 17, ("held_out", "medium"): 17, ("held_out", "hard"): 16,
    }  # fmt: skip
    assert len({row["id"] for row in ROWS}) == len({row["prompt"] for row in ROWS}) == 150


@pytest.mark.long
def test_the_file_is_what_the_vocabulary_composes(problems):
    assert json.loads(json.dumps(problems.benchmark())) == ROWS


@on_linux
@pytest.mark.parametrize("step", [15, pytest.param(1, marks=pytest.mark.long)])
def test_every_solution_passes_its_tests_in_the_sandbox(step):
    some = ROWS[::step]
    found = run_tests([row["solution"] for row in some], [row["tests"] for row in some], 2, LIMITS)
    assert [(row["id"], each.reason) for row, each in zip(some, found, strict=True) if each.reason] == []


def passes(code: str, row: dict) -> bool:
    """Whether code of our own passes the tests of a row, in this process."""
    scope: dict = {}
    exec(code, scope)
    name, tests = read_tests(row["tests"])
    return all(same(json.loads(json.dumps(scope[name](*test["args"]))), test["expected"]) for test in tests)


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.long)])
def test_solutions_that_are_wrong_in_one_part_or_constant_fail(step, problems):
    """Those with one condition, map or reduction exchanged or missing, or with other constants, that do not mean the same."""
    made = problems.benchmark_problems()
    assert [each.prompt for each, _ in made] == [row["prompt"] for row in ROWS]
    num_wrong = 0
    for row, (problem, _) in list(zip(ROWS, made, strict=True))[::step]:
        right = problems.behavior(problem.solution, problem.composition.collection.name)
        assert passes(problem.solution, row)
        for code in set(problems.variants(problem)):
            if problems.behavior(code, problem.composition.collection.name) != right:
                num_wrong += 1
                assert not passes(code, row), (row["prompt"], code)
    assert num_wrong > 10 * 150 / step


def test_tests_do_not_leak_into_prompts():
    for row in ROWS:
        _, tests = read_tests(row["tests"])
        assert "assert" not in row["prompt"] and "==" not in row["prompt"] and row["solution"] not in row["prompt"]
        for test in tests:
            shown = [
                repr(value) for value in (*test["args"], test["expected"]) if isinstance(value, list | str) and len(value) > 1
            ]
            assert not [text for text in shown if text in row["prompt"]], row["id"]


def without_constants(prompt: str) -> str:
    return re.sub(r"\d+|'\w'", "_", prompt)


def test_held_out_problems_are_other_compositions_of_the_words_that_are_trained():
    train = [row for row in ROWS if row["split"] == "train"]
    assert not {row["composition"] for row in train} & {row["composition"] for row in HELD_OUT}
    assert not {without_constants(row["prompt"]) for row in train} & {without_constants(row["prompt"]) for row in HELD_OUT}
    trained, held = ({part for row in rows for part in re.split(r" \| |, ", row["composition"])} for rows in (train, HELD_OUT))
    assert held <= trained


def test_further_training_problems_leave_held_out_ones_out(problems):
    more = problems.training_problems(60, seed=1)
    assert [each.prompt for each in more] == [each.prompt for each in problems.training_problems(60, seed=1)]
    assert Counter(each.composition.difficulty for each in more) == {"easy": 20, "medium": 20, "hard": 20}
    assert not {each.composition.key for each in more} & {row["composition"] for row in HELD_OUT}
    by_collection = {row["composition"].partition(" | ")[0]: [] for row in ROWS}
    for row in HELD_OUT:
        collection = row["composition"].partition(" | ")[0]
        by_collection[collection].append(problems.behavior(row["solution"], collection))
    for each in more:
        collection = each.composition.collection.name
        assert problems.behavior(each.solution, collection) not in by_collection[collection]


def test_a_wrong_solution_behaves_otherwise(problems):
    draw = random.Random(0)
    for each in problems.training_problems(12, seed=2):
        wrong, collection = problems.wrong_solution(each, draw), each.composition.collection.name
        assert problems.behavior(wrong, collection) != problems.behavior(each.solution, collection)


def test_the_labeling_app_imports_them(tmp_path):
    from preference_collection.exchange.importing import import_into
    from preference_collection.store.store import open_store

    store = open_store(str(tmp_path / "problems.duckdb"))
    try:
        assert import_into(store, ROOT / "examples" / "code_problems.jsonl").line() == "150 tasks added"
        task = store.task(ROWS[0]["id"])
        assert (task.prompt, task.difficulty, task.function_name) == (ROWS[0]["prompt"], "easy", "solve")
        assert task.tests == read_tests(ROWS[0]["tests"])[1]
    finally:
        store.close()
