"""SmolLM2-135M on real dialogues: SFT, then six preference losses, by the recipes in config/experiment/dialogues_*.yaml.

    python benchmarks/dialogues.py runs/dialogues --data dialogues.jsonl

Each method starts from the SFT model, and is evaluated on all held-out pairs and on responses that it samples: accuracy of the
implicit reward, its difference to DPO's paired by prompt, win rate against the SFT model by `safety_rule.py`, KL divergence
from it, length.
Run again, it goes on from where it stopped. Without --data the dialogues are those of the Hub (datasets=hh).

Prints a row for each method, and writes numbers with 95% intervals to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
from measure import hardware, versions
from safety_rule import objects

from preference_training.core.metric_names import EVAL_ACCURACY
from preference_training.evaluation.intervals import estimate, mean_interval, share_interval
from preference_training.tracking.run_files import ANSWERS, HELD_OUT_EXAMPLES, METRICS, RESULTS_FILE, json_lines

ROOT = Path(__file__).parent.parent
ENDS = {"mean": "", "low": "/low", "high": "/high"}
METHODS = ("dpo", "ipo", "beta_dpo", "simpo", "orpo", "kto")
# A fifth of the dialogues is held out; a few have an empty response.
DATA = ("held_out_share=0.2", "on_bad_row=skip")
RUN = ("resume=auto", "wandb.enabled=false", "save_policy_pt=false")
RULE = ROOT / "benchmarks" / "safety_rule.py"
# As a policy of DPO, whatever the loss: rewards are log-ratios to the SFT model.
MEASURE = ("loss=dpo", "evaluation.n_prompts=128", "evaluation.max_sample_length=64", "do_first_eval=true")


def run(*command: str) -> dict:
    """Run a command; the time that it took."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - began), "cpu_seconds": round(cpu)}


def train(folder: Path, method: str, *overrides: str) -> dict:
    """Train by a recipe, and evaluate what comes out; the times of both, kept in the folder."""
    kept = folder / f"{method}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    directory = folder / method
    times = {
        "training": run("train.py", f"+experiment=dialogues_{method}", *DATA, *RUN, *overrides, f"local_run_dir={directory}")
    }
    if method != "sft":
        judge = f"{RULE}:{objects.__name__}"
        times["evaluation"] = run("scripts/evaluate.py", str(directory), "--judge", judge, *MEASURE)
    kept.write_text(json.dumps(times) + "\n")
    return times


def outcomes(directory: Path) -> dict[str, float]:
    """1 for each held-out prompt whose chosen response has the higher reward, 0 for others, 0.5 for equal rewards."""
    return {row["prompt"]: row[EVAL_ACCURACY] for row in json_lines(directory / HELD_OUT_EXAMPLES)}


def found(directory: Path, dpo: Path) -> dict:
    """What the evaluation of a run says, each with its interval; dpo: the run that accuracies are compared with."""
    results = json.loads((directory / RESULTS_FILE).read_text())
    right, right_by_dpo = outcomes(directory), outcomes(dpo)
    differences = numpy.array([right[prompt] - right_by_dpo[prompt] for prompt in right if prompt in right_by_dpo])
    responses = list(json_lines(directory / ANSWERS))
    # That of the training, by its loss.
    last = [row for row in json_lines(directory / METRICS) if EVAL_ACCURACY in row][-1]
    return {
        "accuracy": share(list(right.values())),
        "accuracy of its own reward": {end: last.get(f"{EVAL_ACCURACY}{of}") for end, of in ENDS.items()},
        "accuracy minus DPO's": estimate(differences.mean(), mean_interval(differences)) if len(differences) else None,
        "win rate": results["win_rate"],
        "kl": results.get("kl"),
        "objects": {name: share([objects(row["prompt"], row[name]) for row in responses]) for name in ("policy", "other")},
        "words": {name: mean([len(row[name].split()) for row in responses]) for name in ("policy", "other")},
    }


def share(values: Sequence[float]) -> dict:
    """A share with its interval."""
    return estimate(sum(values) / len(values), share_interval([float(value) for value in values]))


def mean(values: list[int]) -> dict:
    """A mean with its interval."""
    numbers = numpy.array(values, dtype=float)
    return estimate(numbers.mean(), mean_interval(numbers))


def main() -> None:
    """Train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--data", type=Path, help="a file of pairs; by default the Hub's HH dialogues")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    options, more = parser.parse_known_args()
    data = [f"datasets={options.data.resolve()}"] if options.data else []
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = options.results or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_dialogues_cpu.json"
    times = {"sft": train(folder, "sft", *data, *more)}
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "overrides": [*DATA, *MEASURE, *more]}
    facts |= {"methods": {}, "times": times}
    for method in options.methods:
        times[method] = train(folder, method, *data, *more, f"model.archive={folder / 'sft' / 'LATEST'}")
        times[method]["load"] = os.getloadavg()[0]
        facts["methods"][method] = found(folder / method, folder / "dpo")
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(method, json.dumps(facts["methods"][method]), json.dumps(times[method]), flush=True)
    print(path)


if __name__ == "__main__":
    main()
