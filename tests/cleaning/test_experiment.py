"""benchmarks/cleaning.py: its rows, its flips, and what it makes of results."""

import json
import sys
from itertools import islice

import numpy
import pytest

import utils
from preference_training.cleaning import halves
from preference_training.data.toy_preferences import toy_records
from tests.rounds.loops import in_this_process
from tests.support.files import ROOT


@pytest.fixture(scope="module")
def cleaning():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import cleaning

    yield cleaning
    sys.path.remove(str(ROOT / "benchmarks"))


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    begun = f"\n\nHuman: {prompt}\n\nAssistant:"
    return {"chosen": f"{begun} {chosen}", "rejected": f"{begun} {rejected}"}


@pytest.fixture
def file(tmp_path):
    rows = [pair(f"q{k}", "long answer", "short") for k in range(30)]
    rows += [pair("same", "a", "a "), pair("empty", "", "b"), pair("q1", "c", "dd"), pair("ties", "abc", "abd")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_that_say_nothing_are_skipped_and_counted(cleaning, file):
    rows, skipped = cleaning.read_pairs(file, "human")
    assert len(rows) == 31 and rows[0]["chosen"].endswith("long answer")
    assert skipped == {"equal responses": 1, "empty response": 1, "another pair of the same prompt": 1}
    rows, skipped = cleaning.read_pairs(file, "shorter")
    assert len(rows) == 30 and all(row["chosen"].endswith("short") for row in rows)
    assert skipped["responses of equal length"] == 1


def test_held_out_prompts_do_not_depend_on_how_many_rows_there_are(cleaning, file):
    rows, _ = cleaning.read_pairs(file, "human")
    train, held_out = cleaning.split_rows(rows, 1000, 1000)
    assert len(train) + len(held_out) == len(rows)
    some, few = cleaning.split_rows(rows[:15], 5, 3)
    assert len(some) == 5 and all(row in train for row in some) and all(row in held_out for row in few)


def test_a_fifth_of_the_labels_is_flipped_and_a_tenth_corrected(cleaning, file, tmp_path):
    rows, _ = cleaning.read_pairs(file, "shorter")
    work = cleaning.Experiment(tmp_path / "work", (rows, rows[:2]), 0, [])
    assert work.rows("clean") == rows
    wrong = [k for k, row in enumerate(work.rows("noisy")) if row != rows[k]]
    assert wrong == work.flipped and len(wrong) == 6
    # The queue begins with two of them, and a right one.
    (tmp_path / "work" / "weighted").mkdir()
    first = [wrong[0], wrong[3], min(set(range(30)) - set(wrong)), wrong[1]]
    queue = "".join(json.dumps({"source": f"noisy.jsonl, row {k + 1}"}) + "\n" for k in first)
    (tmp_path / "work" / "weighted" / "label_queue.jsonl").write_text(queue)
    left = [k for k, row in enumerate(work.rows("checked")) if row != rows[k]]
    assert left == sorted(set(wrong) - {wrong[0], wrong[3]})
    at_random = [k for k, row in enumerate(work.rows("random")) if row != rows[k]]
    assert set(at_random) == set(wrong) - work.corrected("random") and len(work.corrected("random")) == 3


def test_auroc_counts_pairs_of_a_flipped_and_a_right_label(cleaning):
    draw = numpy.random.default_rng(0)
    values, wrong = draw.integers(5, size=40), draw.random(40) < 0.3
    pairs = [(one > other) + 0.5 * (one == other) for one in values[wrong] for other in values[~wrong]]
    assert cleaning.auroc(values, wrong) == pytest.approx(numpy.mean(pairs))


def test_what_is_recovered_is_a_share_of_what_the_flips_cost(cleaning):
    values = {"clean": (0.9, 0.4), "noisy": (0.7, 0.6), "weighted": (0.85, 0.35)}
    arms = {arm: {"accuracy": [accuracy, 0, 1], "loss": [loss, 0, 1]} for arm, (accuracy, loss) in values.items()}
    assert cleaning.recovered(arms, "accuracy") == {"weighted": pytest.approx(0.75)}
    # Below the loss of clean labels: more than all of it.
    assert cleaning.recovered(arms, "loss") == {"weighted": pytest.approx(1.25)}
    assert cleaning.recovered(arms | {"clean": {"accuracy": [0.6, 0, 1]}}, "accuracy") == {"weighted": None}


@pytest.mark.long
def test_all_arms_run_on_the_tiny_model_and_the_flips_are_found(cleaning, tmp_path, monkeypatch):
    toy = islice(toy_records("train").items(), 90)
    dialogues = [pair(prompt, *(record["responses"][k] for k in record["pairs"][0])) for prompt, record in toy]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    command = ["cleaning.py", str(tmp_path / "work"), "--labels", "shorter", "--data", str(tmp_path / "pairs.jsonl")]
    command += ["--results", str(tmp_path / "results.json"), "--train", "50", "model=tiny", "lr=5e-3", "n_epochs=4"]
    # Without an import for each.
    monkeypatch.setattr(cleaning, "run", lambda _, *given: utils.train(utils.compose(*given), quiet=True))
    monkeypatch.setattr(halves, "run_step", in_this_process)
    monkeypatch.setattr("sys.argv", command)
    cleaning.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["arms"].keys() == {"clean", "noisy", "weighted", "checked", "random"}
    assert found["labels"]["pairs"] == 50 and found["labels"]["flipped"] == 10
    assert found["labels"]["auroc"][0] > 0.7
    assert found["arms"]["checked"]["wrong_labels"] < found["arms"]["noisy"]["wrong_labels"] == 10
