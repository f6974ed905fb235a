"""benchmarks/code_rounds.py: code that passes its tests by rounds, on a language so small that it is learned in seconds."""

import json
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import pytest
from scipy.stats import binomtest

from preference_training.configuration.validation import configured
from preference_training.rounds import start
from preference_training.rounds.loop import PROMPTS
from preference_training.rounds.prompts import LoopPrompt, store
from preference_training.rounds.tables import SCORES, read_table, write_table
from tests.rounds import loops
from tests.support.files import ROOT
from utils import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tests run isolated, which needs Linux")


@pytest.fixture
def code_rounds(monkeypatch):
    """The module, whose runs are in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import code_rounds

    def in_this_process(keys):
        config = configured(*keys)
        if config.rounds is None:
            train(config, quiet=True)
        else:
            Path(config.local_run_dir).mkdir()
            start.start_loop(config, Path(config.local_run_dir))
        return {}

    monkeypatch.setattr(start, "run_loop", lambda loop, report: loops.run(loop))
    monkeypatch.setattr(code_rounds, "train", in_this_process)
    return code_rounds


class Task(NamedTuple):
    """What stands for a problem: whatever the prompt, solve() is to return 1."""

    prompt: str
    solution: str


TESTS = ["assert solve() == 1"]
# SFT learns right and wrong programs in equal parts.
TASKS = [
    Task(f"Write solve({letter}).", f"def solve():\n    return {1 + k % 2}") for k, letter in enumerate(ascii_lowercase[:16])
]
DIFFICULTY = dict(zip([task.prompt for task in TASKS[12:]], ["easy", "easy", "medium", "hard"], strict=True))


def test_a_round_learns_from_tests_alone(code_rounds, tmp_path, monkeypatch):
    held_out = [{"id": name, "prompt": name, "tests": TESTS, "difficulty": of} for name, of in DIFFICULTY.items()]
    monkeypatch.setattr(code_rounds, "training_problems", lambda count, seed: TASKS[:count])
    monkeypatch.setattr(code_rounds, "tests_of", lambda task: TESTS)
    monkeypatch.setattr(code_rounds, "read_problems", lambda split: held_out)
    settings = code_rounds.Settings(
        hidden_size=32, num_layers=2, sft_prompts=16, sft_wrong=0.0, sft_epochs=50, sft_lr=1e-2,
        prompts=12, rounds=1, round_prompts=12, samples=4, epochs=20, lr=2e-3,
    )  # fmt: skip
    code_rounds.prepare(tmp_path, settings)
    code_rounds.train(code_rounds.sft_keys(tmp_path, settings))
    code_rounds.train(code_rounds.rounds_keys(tmp_path, tmp_path / "loop", settings))
    [before, after] = code_rounds.policies(tmp_path / "loop", rounds=1)
    assert 0.2 < before["pass@1"] < 0.8 and after["pass@1"] > 0.9
    assert [before["after"], after["after"]] == ["sft", "round 1"] and "gain" not in before
    # Chosen responses are what passes, rejected ones what does not.
    for row in read_table(tmp_path / "loop" / "round-1" / "pairs.parquet"):
        assert [(row["responses"][one][-1], row["responses"][other][-1] == "1") for one, other in row["pairs"]] == [
            ("1", False)
        ]
    # As computed from the texts alone.
    texts = [row["text"] for row in read_table(tmp_path / "loop" / "final" / "held_out_samples.parquet")]
    assert after["pass@1"] == sum(text == TASKS[0].solution for text in texts) / len(texts)


@pytest.mark.campaign
def test_pass_at_1_rises_on_held_out_problems(tmp_path):
    """SFT as it is published, and a round of half the problems, by the command itself."""
    results = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "code_rounds.py"), str(tmp_path / "runs"), "--rounds", "1"]
    fewer = "--round-prompts", "150", "--samples", "6", "--eval-samples", "4"
    subprocess.run([*command, *fewer, "--results", str(results)], check=True, timeout=1800)
    [before, after] = json.loads(results.read_text())["rows"]
    assert 0.1 < before["pass@1"] < after["pass@1"] and after["gain"]["low"] > 0


# ---- pass@1 ----------------------------------------------------------------------------------------------------------------


def write_policy(directory: Path, scores: dict[int, list[float | None]]) -> None:
    rows = [
        {"prompt_id": problem, "number": number, "score": score, "reason": None, "judge": "tests", "second_score": None}
        for problem, some in scores.items()
        for number, score in enumerate(some)
    ]
    write_table(directory / "held_out_scores.parquet", rows, SCORES)


def test_pass_at_1_is_the_share_of_samples_that_pass_all_tests_of_each_problem(code_rounds, tmp_path):
    prompts = [LoopPrompt(0, "trained", {}, False)]
    prompts += [
        LoopPrompt(k, f"p{k}", {"id": f"p{k}", "difficulty": of}, True) for k, of in ((1, "easy"), (2, "medium"), (3, "hard"))
    ]
    store(prompts, tmp_path / PROMPTS)
    # 7 of 8 tests are not all; what cannot be judged has not passed.
    write_policy(tmp_path / "round-1", {1: [1, 7 / 8, 0, 1], 2: [0, 0, 0, 0], 3: [0, None, 0, 1]})
    write_policy(tmp_path / "final", {1: [1, 1, 1, 1], 2: [0, 0, 1, 1], 3: [0, 0, 0, 1]})
    [before, after] = code_rounds.policies(tmp_path, rounds=1)
    assert before["shares"] == {"p1": 2 / 4, "p2": 0, "p3": 1 / 4} and before["pass@1"] == 3 / 12
    assert before["by_difficulty"] == {"easy": 0.5, "medium": 0, "hard": 0.25}
    assert after["pass@1"] == 7 / 12
    # The rises are 1/2, 1/2 and 0.
    assert after["gain"]["mean"] == pytest.approx(1 / 3) and after["gain"] == after["gain_of_round"]
    assert after["gain"]["low"] < 1 / 3 < after["gain"]["high"]


def test_more_samples_of_the_same_problems_do_not_narrow_the_interval(code_rounds):
    """Ten problems are always solved, ten never: as precise as twenty coin tosses, however often each is asked."""
    [few, many] = [code_rounds.pass_at_1({k: [float(k % 2)] * samples for k in range(20)}) for samples in (2, 50)]
    assert few["pass@1"] == many["pass@1"] == 0.5
    exact = binomtest(10, 20).proportion_ci()
    for found in (few, many):
        assert found["low"] == pytest.approx(exact.low, abs=0.03) and found["high"] == pytest.approx(exact.high, abs=0.03)


def test_a_loop_that_is_there_is_continued(code_rounds, tmp_path):
    loop, settings = tmp_path / "loop", code_rounds.Settings()
    assert f"resume={loop}" not in code_rounds.rounds_keys(tmp_path, loop, settings)
    loop.mkdir()
    (loop / "rounds.json").touch()
    assert f"resume={loop}" in code_rounds.rounds_keys(tmp_path, loop, settings)
