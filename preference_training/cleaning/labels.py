"""What the halves say of each other's labels, as files of the run.

label_weights.jsonl   a row a pair, with its texts: margin, probability that its label is flipped, weight
label_queue.jsonl     the pairs in the order in which checking their labels pays, as the labeling app imports them
label_noise.json      what was fitted
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy

from preference_training.cleaning.probabilities import (
    LabelNoise,
    fit_label_noise,
    gains,
    label_weights,
    normalized,
    order_of_checks,
)
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.values import counted
from preference_training.reporting.flagged_pairs import labeling_rows
from preference_training.tracking.half_margins import is_same_data
from preference_training.tracking.run_files import (
    HALF_MARGINS,
    HALVES,
    LABEL_NOISE,
    LABEL_QUEUE,
    LABEL_WEIGHTS,
    json_lines,
    write_json_lines,
)

# From here on a label is more likely wrong than right.
QUESTIONED = 0.5


def judge_labels(run_dir: Path) -> list[str]:
    """Write what the margins of both halves say of the labels; returns it in lines of text. Raises OSError and UserError."""
    check_same_data(run_dir)
    rows = [row for half in (1, 2) for row in json_lines(run_dir / HALVES / str(half) / HALF_MARGINS)]
    # A margin that is no number says nothing.
    margins = numpy.nan_to_num(numpy.array([row["margin"] for row in rows], numpy.float64))
    noise = fit_label_noise(margins)
    probabilities = noise.probabilities(margins)
    raw = label_weights(probabilities)
    weights = normalized(raw)
    questioned = int((probabilities > QUESTIONED).sum())
    found = asdict(noise) | {"mean_weight": float(raw.mean()), "questioned": questioned, "tells": noise.tells}
    # NaN is no JSON.
    found = {name: None if math.isnan(value) else value for name, value in found.items()}
    order = order_of_checks(margins)
    write_json_lines(run_dir / LABEL_QUEUE, queue_rows([rows[k] for k in order], probabilities[order]))
    write_atomically(run_dir / LABEL_NOISE, json.dumps(found, indent=1) + "\n")
    numbers = zip(rows, probabilities.tolist(), weights.tolist(), strict=True)
    # Last: where it is, all are.
    write_json_lines(run_dir / LABEL_WEIGHTS, (_with_numbers(row, probability, weight) for row, probability, weight in numbers))
    return [f"data.weights: {line}" for line in lines(noise, float(raw.mean()), questioned, run_dir)]


def check_same_data(run_dir: Path) -> None:
    """Raise UserError where the data has changed between the runs on halves."""
    if not is_same_data(run_dir / HALVES / "1", run_dir / HALVES / "2"):
        raise UserError(
            f"data.weights: the training data has changed between the runs on halves in {run_dir / HALVES}. Expected the same "
            f"rows for both. Restore them and remove {run_dir / HALVES / '2'}, or start a new run."
        )


def _with_numbers(row: dict, probability: float, weight: float) -> dict:
    texts = {name: row[name] for name in ("prompt", "preferred", "other")}
    numbers = {"margin": row["margin"], "probability": round(probability, 6), "weight": round(weight, 6)}
    return {"pair": row["pair"], "source": row["source"], **numbers, **texts}


def queue_rows(rows: Iterable[dict], probabilities: numpy.ndarray) -> Iterable[dict]:
    """Rows of the labeling app, in the same order; pairs of the same texts once, the first."""
    known = set()
    for row, probability, gain in zip(rows, probabilities.tolist(), gains(probabilities).tolist(), strict=True):
        [judged] = labeling_rows([row | {"kind": "mislabelled" if probability > QUESTIONED else "uncertain"}])
        texts = judged["description"], judged["version1"], judged["version2"]
        if texts not in known:
            known.add(texts)
            yield judged | {"flip_probability": round(probability, 6), "gain": round(gain, 6)}


def lines(noise: LabelNoise, mean_weight: float, questioned: int, run_dir: Path) -> list[str]:
    """What was found, in lines of text."""
    agreement = f"models of one half agree with {noise.agreement:.1%} of {counted(noise.pairs, 'label')} of the other"
    if not noise.tells:
        return [f"{agreement}: the halves tell nothing about labels, and all pairs count the same"]
    share = f"{noise.flipped_share:.1%} of the labels are flipped"
    error = "" if math.isnan(noise.flipped_share_error) else f" (standard error {noise.flipped_share_error:.1%})"
    return [
        f"{agreement}; by estimate {share}{error}",
        f"{questioned:,} labels are more likely wrong than right; the mean weight was {mean_weight:.3f}, and is set to 1",
        f"{run_dir / LABEL_WEIGHTS} has all pairs, {LABEL_QUEUE} beside it those to check first",
    ]
