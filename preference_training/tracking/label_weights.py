"""What a run has found out about its labels, by pairs: RUN/label_weights.jsonl. A row a pair, with its texts:

{"pair": key of `pair_key`, "source", "margin", "probability", "weight", "prompt", "preferred", "other"}
"""

from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.tracking.run_files import LABEL_WEIGHTS, json_lines


def read_label_numbers(run_dir: Path, name: str) -> dict[str, float]:
    """A number of each of a run's pairs, by the pair's key: `weight` or `probability`; empty where the run has none."""
    rows = json_lines(run_dir / LABEL_WEIGHTS)
    return {row["pair"]: float(row[name]) for row in rows if isinstance(row.get("pair"), str) and name in row}


def read_label_weights(run_dir: Path) -> dict[str, float]:
    """The weights of a run's pairs, by key. Raises UserError where there are none."""
    if found := read_label_numbers(run_dir, "weight"):
        return found
    raise UserError(
        f"data.weights: {run_dir} has no {LABEL_WEIGHTS} with weights. Expected the directory of a run that was started with "
        "data.weights=ledger, or ledger."
    )
