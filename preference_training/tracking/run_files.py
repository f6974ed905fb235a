"""The files of a run directory: their names, and reading metrics, samples, results and configuration.

Reading is lenient, since the run may be going on, or a kill or a full disk has ended it: what cannot be read is skipped.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import inf
from pathlib import Path

from preference_training.core.files import atomic_file
from preference_training.core.metric_names import EVAL_LOSS, EXAMPLES, ROUND, UPDATES
from preference_training.core.values import UNREADABLE, find_mismatch

METRICS, SAMPLES, BAD_STEPS, EVENTS = "metrics.jsonl", "samples.jsonl", "bad_batches.jsonl", "events.jsonl"
RESULTS_FILE, ABOUT, FLAGGED = "results.json", "about.json", "flagged_pairs.jsonl"
# The lock of the process that runs it.
LOCK = ".lock"
# Of a sweep's jobs: what became of the job; that it was pruned.
JOB, PRUNED = "job.json", "pruned.json"
REPORT = "report.html"
# Of a loop of rounds: what it was started with.
ROUNDS_FILE = "rounds.json"
# Of an evaluation: the metrics of each held-out example, the sampled answers, and the verdicts on them.
HELD_OUT_EXAMPLES, ANSWERS, JUDGEMENTS = "held_out_examples.jsonl", "answers.jsonl", "judgements.jsonl"
# Directories of dashboards.
TENSORBOARD, WANDB = "tensorboard", "wandb"
# Of its checkpoints: what their names begin with, a link to the newest, and what is in each beside the model's own files.
CHECKPOINT, LATEST = "step-", "LATEST"
STATE, CHECKSUMS, POLICY_PT = "state.json", "checksums.json", "policy.pt"
OPTIMIZER_DIR, REFERENCE_DIR = "optimizer", "reference"
# Of data.weights=ledger: the runs on halves of the data, what each pair weighs, what was fitted, and the pairs to check first.
HALVES, LABEL_WEIGHTS, LABEL_NOISE, LABEL_QUEUE = "halves", "label_weights.jsonl", "label_noise.json", "label_queue.jsonl"
OF_LABELS = (HALVES, LABEL_WEIGHTS, LABEL_NOISE, LABEL_QUEUE)
# Of a run on one half: the margins of the pairs of the other; what both contain.
HALF_MARGINS, HALF_DATA = "margins.jsonl", "half.json"
# The prefix of a directory that holds an earlier run, set aside.
ASIDE = "set_aside_"


def is_of_loop(run_dir: Path) -> bool:
    """Whether a run directory is that of a round's training in a loop: LOOP/round-N/run."""
    return (run_dir.absolute().parent.parent / ROUNDS_FILE).is_file()


# ---- rows -----------------------------------------------------------------------------------------------------------------


def write_json_lines(file: Path, rows: Iterable[dict]) -> None:
    """Write rows to a file of JSON objects, atomically. Raises OSError."""
    with atomic_file(file, encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_lines(file: Path) -> Iterator[dict]:
    """The rows of a file of JSON objects; other lines are skipped, and there may be no file."""
    return rows_in(file.read_bytes() if file.is_file() else b"")


def rows_in(lines: bytes) -> Iterator[dict]:
    """The JSON objects among lines."""
    # Bytes: a text may hold what Python takes for the end of a line, and half a row may end within a letter.
    listed = [line for line in lines.split(b"\n") if line]
    with suppress(ValueError, RecursionError):
        # Much faster than line by line.
        rows = json.loads(b"[%s]" % b",".join(listed))
        if len(rows) == len(listed):
            yield from (row for row in rows if isinstance(row, dict))
            return
    for line in listed:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def metric_rows(file: Path, examples: float = inf) -> list[dict]:
    """The rows of a metrics.jsonl up to so many examples."""
    return rows_up_to(json_lines(file), examples)


def rows_up_to(rows: Iterable[dict], examples: float = inf) -> list[dict]:
    """The rows with a count of examples, up to so many."""
    found = ((row.get(EXAMPLES), row) for row in rows)
    return [row for at, row in found if isinstance(at, int | float) and at <= examples]


def split_rows(rows: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of training steps, and rows of evaluations: of a loop of rounds, those of its policies."""
    steps, evaluations = [], []
    for row in rows:
        (evaluations if EVAL_LOSS in row or ROUND in row else steps).append(row)
    return steps, evaluations


def progress(rows: list[dict], about: dict) -> str:
    """How far the run is, in words."""
    if not rows:
        return "no step yet"
    done, total = rows[-1][EXAMPLES], about.get("examples")
    of = f" of {total:,}" if isinstance(total, int) else ""
    return f"{done:,.0f}{of} examples, {rows[-1].get(UPDATES, 0):,.0f} updates"


# The shape of results.json: how many examples and prompts it is over, and each metric with its interval.
INTERVAL = dict.fromkeys(("mean", "low", "high"), (float, int, None))
RESULTS = {"examples_trained": int, "held_out": {"all": {"examples": int, "prompts": int, ...: INTERVAL}}}


def read_results(file: Path) -> dict:
    """The results.json of a run's evaluation; empty where there is none, or it is damaged."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except UNREADABLE:
        return {}
    return results if find_mismatch(results, RESULTS, "results") is None else {}


def json_object(file: Path) -> dict:
    """The object in a JSON file; empty where there is no such file, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except UNREADABLE:
        return {}
    return found if isinstance(found, dict) else {}


def read_run_info(checkpoint: Path) -> dict:
    """What a checkpoint's state says of its run; empty where it has no state, or a damaged one."""
    run = json_object(checkpoint / STATE).get("run")
    return run if isinstance(run, dict) else {}
