"""`make demo-chat`'s program on SmolLM2: shortened, since its minutes of training are for two idle cores."""

import json
import subprocess
import sys

import pytest

from scripts.demo_chat import is_short
from tests.support.files import ROOT


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        ("Grind fresh beans just before brewing.", True),
        ("It is 3.5 kilometers away. Take the bus!", True),
        ('He said "no." Then he left.', True),
        ("One. Two. Three.", False),
        ("Here are some tips:\n1. Sleep.", False),
        ("- Sleep.", False),
        ("An answer that was cut in the mid", False),
        ("", False),
    ],
)
def test_a_short_answer_is_whole_has_at_most_two_sentences_and_is_no_list(answer, short):
    assert is_short(answer) == short


@pytest.mark.long
def test_the_demo_trains_answers_before_and_after_and_shows_both(tmp_path):
    directory = tmp_path / "demo"
    shortened = ["n_examples=8", "n_eval_examples=2", "sample_during_eval=false", "max_length=64"]
    command = [sys.executable, str(ROOT / "scripts" / "demo_chat.py"), str(directory), "--longest", "8", *shortened]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and all(row["before"] for row in rows)
    results = json.loads((directory / "demo_results.json").read_text())
    assert results["answers of at most two sentences"]["before"] <= 1
    for told in ("answers of at most two sentences", "reward accuracy", "report.html", "scripts/chat.py"):
        assert told in done.stdout
