"""What the margins of a run call into question is matched with what was judged, by the token ids of training."""

import subprocess
from dataclasses import replace

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from preference_collection.exchange import ledger
from preference_collection.exchange.importing import text_answer
from preference_collection.exchange.ledger import add_ledger, check_run
from preference_collection.store.model import Comparison, Task
from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import tokenize_records
from preference_training.modeling.tokenizer import byte_level_tokenizer
from preference_training.tracking.ledger import SCHEMA
from scripts import flip_probabilities

SETTINGS = TokenSettings("pairs", 64, 32)
# Of each prompt the first response is labeled as preferred.
PROMPTS = {f"q{n}": ("a", "b") for n in range(40)} | {"wrong": ("a", "b"), (Turn("user", "code"),): ("c", "d")}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that has seen each pair twice, and prefers the other response of one of them."""
    tokenizer = byte_level_tokenizer()
    records = [PreferenceRecord(p, list(two), [(0, 1)], two[0], n, "r") for n, (p, two) in enumerate(PROMPTS.items())]
    table = PromptTable.of(tokenize_records(records, tokenizer, SETTINGS))
    rows = numpy.tile(numpy.arange(len(PROMPTS)) * 2, 2)
    margins = numpy.where(rows == 2 * list(PROMPTS).index("wrong"), -2.0, 2.0) + numpy.linspace(-0.5, 0.5, len(rows))
    columns = (numpy.arange(len(rows)) + 1, rows, rows + 1, margins.astype(numpy.float32))
    (tmp_path / "run" / "ledger").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(list(columns), SCHEMA), tmp_path / "run" / "ledger" / f"{len(rows)}.parquet")
    monkeypatch.setattr(flip_probabilities, "load_run", lambda run: (tokenizer, table, [replace(SETTINGS)]))

    def in_this_process(line, **_):
        monkeypatch.setattr("sys.argv", line[1:])
        flip_probabilities.main()
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(ledger.subprocess, "run", in_this_process)
    return tmp_path / "run"


def compared(store, prompt, *texts) -> str:
    """The id of a new comparison."""
    task = Task(str(prompt), "t", "", prompt)
    comparison = Comparison(f"c {prompt}", task.id, tuple(text_answer(task, text) for text in texts))
    store.add_tasks([task])
    store.add_comparisons([comparison])
    return comparison.id


def test_a_comparison_has_the_probability_of_its_pair_in_either_order(store, run):
    right, wrong = compared(store, "q7", "a", "b"), compared(store, "wrong", "b", "a")
    compared(store, "unknown", "a", "b")
    # `lc` reads the texts of problems as conversations, without the space around them; of three answers two are a known pair.
    code = compared(store, "code", "x", " d\n", "c")
    said = add_ledger(store, run)
    assert said == f"3 of 4 comparisons are among the pairs of {run}, 1 are not; 1 of the labels are probably wrong"
    found = dict(store.connection.execute("SELECT comparison, probability FROM flip_probabilities").fetchall())
    assert found.keys() == {right, wrong, code}
    assert found[wrong] > 0.9 > 0.1 > found[right] and found[code] < 0.1


def test_a_directory_without_a_ledger_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="no ledger. Expected the directory of a run of a preference loss with ledger=true"):
        check_run(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "q1", "responses": ["a", "b"]}', "row 1: no id. Expected an id, a prompt and a list of responses."),
        ('{"id": "1", "responses": ["a", "b"]}', "row 1: no prompt. Expected"),
        ('{"id": "1", "prompt": "q1"}', "row 1: no responses. Expected"),
        ('{"id": ["1"], "prompt": "q1", "responses": ["a", "b"]}', "row 1: field 'id' is ['1'], expected a text"),
        ('{"id": "1", "prompt": " ", "responses": ["a", "b"]}', "row 1: field 'prompt' is empty"),
        ('{"id": "1", "prompt": "q1", "responses": "a"}', "row 1: field 'responses' is 'a', expected a list"),
        ('{"id": "1", "prompt": "q1", "responses": ["a", ""]}', "row 1: field 'responses': response 1 is empty"),
        ('{"id": "1", "prom', "row 1: not JSON"),
        (None, ": no such data file."),
    ],
)
def test_a_faulty_file_of_pairs_is_named_before_the_run_is_loaded(run, tmp_path, monkeypatch, capsys, line, told):
    monkeypatch.setattr(flip_probabilities, "load_run", lambda run: pytest.fail("the run was loaded"))
    if line is not None:
        (tmp_path / "pairs.jsonl").write_text(line + "\n")
    monkeypatch.setattr("sys.argv", ["x", str(run), str(tmp_path / "pairs.jsonl"), str(tmp_path / "to.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        flip_probabilities.main()
    said = capsys.readouterr().err
    assert said.startswith(f"PAIRS: {tmp_path / 'pairs.jsonl'}") and told in said and "on_bad_row" not in said


def test_a_file_that_cannot_be_written_is_named(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"id": "1", "prompt": "q1", "responses": ["a", "b"]}\n')
    (tmp_path / "folder").mkdir()
    for to in ("gone/to.jsonl", "folder"):
        monkeypatch.setattr("sys.argv", ["x", str(run), str(tmp_path / "pairs.jsonl"), str(tmp_path / to)])
        with pytest.raises(SystemExit, match="2"):
            flip_probabilities.main()
        assert capsys.readouterr().err.startswith(f"TO: cannot write {tmp_path / to}")
