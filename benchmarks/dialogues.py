"""SmolLM2-135M on real dialogues: SFT, then six preference losses, by the recipes in config/experiment/dialogues_*.yaml.

    python benchmarks/dialogues.py runs/dialogues --data dialogues.jsonl
    python benchmarks/dialogues.py runs/dialogues --report          the numbers of the runs that are there, nothing is trained

Each method starts from the SFT model. It is evaluated as a policy of DPO, whatever its loss, on all held-out pairs and on
responses that it samples: accuracy of the implicit reward, its difference from DPO's paired by prompt, win rate against the SFT
model by `safety_rule.py`, KL divergence from it, length. KEY=VALUE, as on train.py's command line, holds for all runs. Without
--data the dialogues are the Hub's 160,000 (datasets=hh); n_examples=900 trains on a part of them. The same command again runs
what is missing.

Prints a row for each method, and writes numbers with 95% intervals to benchmarks/results/; `python scripts/dialogues_page.py`
writes them into docs/recipes.md.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
from measure import cpu_seconds, hardware, run, versions
from safety_rule import objects

from preference_training.core.errors import UserError
from preference_training.core.metric_names import EVAL_ACCURACY
from preference_training.evaluation.intervals import estimate, mean_interval, share_interval
from preference_training.tracking.run_files import ANSWERS, HELD_OUT_EXAMPLES, LATEST, METRICS, RESULTS_FILE, json_lines

ROOT = Path(__file__).parent.parent
ENDS = {"mean": "", "low": "/low", "high": "/high"}
SFT, DPO = "sft", "dpo"
METHODS = (DPO, "ipo", "beta_dpo", "simpo", "orpo", "kto")
# A fifth of the dialogues is held out; a few have an empty response.
DATA = ("held_out_share=0.2", "on_bad_row=skip")
RUN = ("resume=auto", "wandb.enabled=false", "save_policy_pt=false")
RULE = ROOT / "benchmarks" / "safety_rule.py"
# As a policy of DPO, whatever the loss: rewards are log-ratios to the SFT model.
MEASURE = ("loss=dpo", "evaluation.n_prompts=128", "evaluation.max_sample_length=64", "do_first_eval=true")


# ---- training and evaluating ------------------------------------------------------------------------------------------------


class Times:
    """The times of a method's stages, kept in a file: a stage that is complete is not run again.

    overrides: what the method is run with. Raises UserError where the file is of other ones.
    """

    def __init__(self, file: Path, overrides: Sequence[str]):
        self.file = file
        self.kept = json.loads(file.read_text()) if file.is_file() else {"overrides": list(overrides)}
        before = self.kept.setdefault("overrides", list(overrides))
        if before != list(overrides):
            raise UserError(
                f"{file}: this method was run with {' '.join(before)}. Found {' '.join(overrides)}. Use another folder for "
                f"other settings, or delete {file} and {file.with_suffix('')} to run it again."
            )

    def run(self, stage: str, *command: str) -> None:
        """Run the command of a stage, unless it is complete; its time includes that of interrupted attempts."""
        if stage in self.kept:
            return
        unfinished = self.kept.pop(f"unfinished {stage}", {"seconds": 0, "cpu_seconds": 0})
        began, before, name = time.monotonic(), cpu_seconds(), f"unfinished {stage}"
        try:
            run(*command)
            name = stage
        finally:
            spent = {"seconds": time.monotonic() - began, "cpu_seconds": cpu_seconds() - before}
            self.kept[name] = {key: unfinished[key] + round(value) for key, value in spent.items()}
            self.kept["load"] = os.getloadavg()[0]
            self.file.write_text(json.dumps(self.kept) + "\n")


def train(folder: Path, method: str, *overrides: str) -> None:
    """Train by a recipe, and evaluate what comes out of a preference loss."""
    directory, times = folder / method, Times(folder / f"{method}.json", overrides)
    recipe = f"+experiment=dialogues_{method}", *DATA, *RUN, *overrides, f"local_run_dir={directory}"
    times.run("training", "train.py", *recipe)
    if method != SFT:
        judge = f"{RULE}:{objects.__name__}"
        times.run("evaluation", "scripts/evaluate.py", str(directory), "--judge", judge, *MEASURE)


# ---- what came out ----------------------------------------------------------------------------------------------------------


def outcomes(directory: Path) -> dict[tuple[str, int], float]:
    """1 for each held-out pair whose chosen response has the higher reward, 0 for others, 0.5 for equal rewards.

    A pair is the name of its prompt, and its number among the pairs of this prompt.
    """
    seen: Counter[str] = Counter()
    found = {}
    for row in json_lines(directory / HELD_OUT_EXAMPLES):
        prompt = row["prompt"]
        found[prompt, seen[prompt]] = row[EVAL_ACCURACY]
        seen[prompt] += 1
    return found


def measured(directory: Path, dpo: Path) -> dict:
    """What the evaluation of a run says, each with its interval; dpo: the run that accuracies are compared with."""
    results = json.loads((directory / RESULTS_FILE).read_text())
    responses, right = list(json_lines(directory / ANSWERS)), outcomes(directory)
    # That of the training, by its loss.
    last = [row for row in json_lines(directory / METRICS) if EVAL_ACCURACY in row][-1]
    facts = {
        "accuracy": share(list(right.values()), [prompt for prompt, _ in right]),
        "accuracy of its own reward": {end: last.get(f"{EVAL_ACCURACY}{of}") for end, of in ENDS.items()},
        "accuracy minus DPO's": difference(right, outcomes(dpo)),
        "win rate": results["win_rate"],
        "kl": results["kl"],
    }
    length = tokenizer_of(directory)
    for name, of in {"tokens": length, "words": lambda text: len(text.split())}.items():
        facts[name] = {model: mean([of(row[model]) for row in responses]) for model in ("policy", "other")}
    facts["objects"] = {
        model: share([objects(row["prompt"], row[model]) for row in responses]) for model in ("policy", "other")
    }
    return facts


def tokenizer_of(directory: Path) -> Callable[[str], int]:
    """A function that counts the tokens of a response, without the one that ends it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory / LATEST)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def difference(right: dict, other: dict) -> dict | None:
    """The mean difference of outcomes on the same pairs; None without the other's. Raises UserError for other pairs."""
    if not other:
        return None
    if right.keys() != other.keys():
        raise UserError(f"held-out pairs differ: {len(right)}, and {len(other)} of DPO's. Expected runs on the same data.")
    differences = numpy.array([right[pair] - other[pair] for pair in right])
    return estimate(differences.mean(), mean_interval(differences, [prompt for prompt, _ in right]))


def share(values: Sequence[float], prompts: Sequence[str] | None = None) -> dict:
    """A share with its interval. prompts: of each value, if several may be of one."""
    return estimate(sum(values) / len(values), share_interval([float(value) for value in values], prompts))


def mean(values: list[int]) -> dict:
    """A mean with its interval."""
    numbers = numpy.array(values, dtype=float)
    return estimate(numbers.mean(), mean_interval(numbers))


def report(folder: Path, path: Path, overrides: Sequence[str]) -> None:
    """Write the numbers of all methods that have been evaluated in a folder, and print a row for each."""
    times = {name: json.loads(file.read_text()) for name in (SFT, *METHODS) if (file := folder / f"{name}.json").is_file()}
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "overrides": [*DATA, *MEASURE, *overrides]}
    done = [name for name in METHODS if "evaluation" in times.get(name, ())]
    facts["methods"] = {name: measured(folder / name, folder / DPO) for name in done}
    path.write_text(json.dumps(facts | {"times": times}, indent=1) + "\n")
    for name in done:
        print(name, json.dumps(facts["methods"][name]), json.dumps(times[name]), flush=True)
    print(path, flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line; what cannot be read or written is refused before anything is trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all runs, as on train.py's command line")
    parser.add_argument("--data", type=Path, help="a file of pairs; by default the Hub's HH dialogues")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to train, by default all")
    parser.add_argument("--report", action="store_true", help="train nothing: report on what is in the folder")
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    options = parser.parse_intermixed_args()
    options.results = options.results or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_dialogues_cpu.json"
    if options.data and not options.data.is_file():
        parser.error(f"--data: {options.data} is no file. Expected rows with `chosen` and `rejected`, such as .jsonl")
    if not options.results.parent.is_dir():
        parser.error(f"--results: {options.results.parent} is no folder")
    if not options.report:
        return options
    if not (options.folder / f"{SFT}.json").is_file():
        parser.error(f"--report: no runs in {options.folder}")
    return options


def main() -> None:
    """Train what is missing, and report after each method."""
    options = arguments()
    data = [f"datasets={options.data.resolve()}"] if options.data else []
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.report:
            return report(folder, options.results, options.overrides)
        train(folder, SFT, *data, *options.overrides)
        for method in options.methods:
            train(folder, method, *data, *options.overrides, f"model.archive={folder / SFT / LATEST}")
            report(folder, options.results, options.overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        # The command has said what is wrong.
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
