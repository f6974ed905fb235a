"""A loop of rounds in numbers that are made up, as its steps would leave it: three policies on twelve held-out prompts."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from preference_training.configuration.saved import save_config
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.validation import configured
from preference_training.rounds.loop import PROMPTS, ROUNDS, RoundFiles, all_files
from preference_training.rounds.prompts import LoopPrompt, store
from preference_training.rounds.tables import SAMPLES, SCORES, write_table

HELD_OUT = 12
# Of the policies in their order: mean score, win rate against the first, length, KL.
POLICIES = ((0.2, None, 20.0, 0.0), (0.4, 0.75, 24.0, 5.0), (0.6, 0.9, 26.0, 9.0))
EXCLUDED = {"pairs of responses with equal scores": 3, "responses without text": 40}


def made_up_loop(folder: Path, policies: Sequence[tuple] = POLICIES, exp_name: str = "letters") -> Path:
    """Write the directory of a loop with a round less than there are policies; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(_config(len(policies) - 1).changed({"exp_name": exp_name, "local_run_dir": str(folder)}), folder)
    (folder / ROUNDS).write_text(json.dumps({"rounds": len(policies) - 1}))
    store([LoopPrompt(k, f"\n\nHuman: Question {k}?\n\nAssistant:", {}, k < HELD_OUT) for k in range(40)], folder / PROMPTS)
    for place, (files, numbers) in enumerate(zip(all_files(folder), policies, strict=True)):
        _write_round(files, place, numbers)
    return folder


@cache
def _config(rounds: int) -> RunConfig:
    given = ("rounds.prompts=prompts.jsonl", "rounds.judge=toy", f"rounds.rounds={rounds}", "local_run_dir=unused")
    model = ("model=blank_model", "model.name_or_path=some/model")
    return configured("+rounds=default", *given, *model, "loss=dpo")


def _write_round(files: RoundFiles, place: int, numbers: tuple) -> None:
    rows = [_sample(prompt, place) for prompt in range(HELD_OUT)]
    write_table(files.held_out_samples, rows, SAMPLES)
    scores = [
        {"prompt_id": row["prompt_id"], "number": 0, "score": numbers[0], "reason": f"reason <{place}>", "judge": "toy"}
        for row in rows
    ]
    write_table(files.held_out_scores, scores, SCORES)
    summary = {"round": files.number, "held_out": _held_out(*numbers)}
    if files.number is not None:
        counts = {"prompts": 28, "responses": 224, "records": 27, "pairs": 300}
        samples = {"mean_score": numbers[0], "mean_length": 21.0, "distinct_2": 0.9, "similarity": 0.1}
        summary |= {"samples": samples, "counts": counts, "excluded": EXCLUDED}
        files.run.mkdir(parents=True)
        (files.run / "report.html").write_text("the report of a training")
        (files.run / "metrics.jsonl").write_text('{"counters/examples": 300, "counters/updates": 10}\n')
    files.summary.write_text(json.dumps(summary))


def _sample(prompt: int, place: int) -> dict:
    text = f"It is <b>{'even' if prompt % 2 else 'odd'}</b>, says policy {place}"
    return {"prompt_id": prompt, "number": 0, "text": text, "n_tokens": 9, "ended": place > 0}


def _held_out(score: float, rate: float | None, length: float, kl: float) -> dict:
    found = {"prompts": HELD_OUT, "responses": HELD_OUT, "unjudged": 0, "truncated": 2}
    found["win_rate"] = rate and _estimate(rate, 0.05)
    return found | {"score": _estimate(score, 0.05), "length": _estimate(length, 1.0), "kl": _estimate(kl, 0.5)}


def _estimate(mean: float, half: float) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half}
