"""Which comparisons a training run calls into question: what its halves or its ledger say, matched with what was judged.

The run's data is tokenized by the training package, in a process of its own: scripts/flip_probabilities.py.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from preference_collection.exchange.judged_rows import as_written, response_in
from preference_collection.store.store import Store
from preference_training.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "flip_probabilities.py"
# From here on a label is more likely wrong than right.
QUESTIONED = 0.5


def check_run(run: Path) -> None:
    """Raise UserError for a directory that is no run with a ledger, or with halves that have judged each other's labels."""
    if not (run / "label_weights.jsonl").is_file() and not any((run / "ledger").glob("*.parquet")):
        raise UserError(f"score: {run}: no ledger. Expected the directory of a run of a preference loss with ledger=true.")


def add_ledger(store: Store, run: Path) -> str:
    """Save the probability that the label of each comparison is wrong, as a run says; returns it in words.

    A comparison is matched by the token ids of its prompt and of two of its answers; of several pairs the likeliest counts.
    Raises UserError for a run that cannot be read, or whose data has changed.
    """
    total = len(store.comparison_ids())
    with TemporaryDirectory() as folder:
        given, found = Path(folder) / "pairs.jsonl", Path(folder) / "found.jsonl"
        with given.open("w", encoding="utf-8") as file:
            for comparison in store.comparisons():
                answers = comparison.answers
                prompts = {answer.prompt for answer in answers}
                prompt = answers[0].prompt if len(prompts) == 1 else store.task(comparison.task).prompt
                row = {"id": comparison.id, "prompt": prompt, "responses": [response_in(answer) for answer in answers]}
                row |= dict.fromkeys(("sft_target", "chosen", "rejected"))
                file.write(json.dumps(as_written(row, as_text=False), ensure_ascii=False) + "\n")
        line = [sys.executable, str(SCRIPT), str(run.absolute()), str(given), str(found)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            raise UserError(f"score: {done.stderr.strip().splitlines()[-1]}")
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr}")
        rows = [json.loads(text) for text in found.read_text(encoding="utf-8").splitlines()]
    probabilities = [(row["id"], row["probability"]) for row in rows]
    store.add_flip_probabilities(str(run), probabilities)
    questioned = sum(value > QUESTIONED for _, value in probabilities)
    return (
        f"{len(probabilities)} of {total} comparisons are among the pairs of {run}, {total - len(probabilities)} are not; "
        f"{questioned} of the labels are probably wrong"
    )
