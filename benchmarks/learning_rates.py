"""Learning rates of SmolLM2-135M on real dialogues: held-out loss, accuracy and margin, with LoRA and of all weights.

    python benchmarks/learning_rates.py runs/learning_rates --data PAIRS.jsonl.gz

PAIRS has rows of `chosen` and `rejected`, dialogues as HH has them. Only those of at most 450 characters are used; a third of
the prompts is held out by a hash. The shorter response is preferred, which a model can learn from 200 pairs; labels are those
of the file with `--labels human`. Everything else is the default of train.py for such a model.

Each sweep is a command of its own, `train.py -m`. Prints a line for each of its runs, and writes all numbers with 95% intervals
to benchmarks/results/ and a picture of them into the folder. The same command goes on where it was stopped.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cleaning import ASSISTANT, read_pairs, split_rows, write_rows
from measure import cpu_seconds, hardware, versions
from omegaconf import OmegaConf
from science_parts.learning_rates_pictures import pictures

from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, EVAL_MARGIN, HIGH, LOW
from preference_training.tracking.run_files import JOB, METRICS, json_object, metric_rows

ROOT = Path(__file__).resolve().parent.parent
# Of a dialogue with both responses. Unit: characters.
LONGEST = 450
COMMON = (
    "model=smollm2-135m", "n_epochs=1", "batch_size=8", "gradient_accumulation_steps=1", "max_length=192",
    "max_prompt_length=128", "sample_during_eval=false", "do_first_eval=false", "eval_every=1000000", "n_eval_examples=null",
    "save_strategy=no", "wandb.enabled=false", "ledger=false",
)  # fmt: skip
LORA = "+adapter=lora"
# What is swept; the learning rates that docs/defaults.md has are among them.
SWEEPS = {
    "DPO, LoRA": ("loss=dpo", LORA, "lr=1e-5,5e-5,2e-4,5e-4,2e-3"),
    "DPO, all weights": ("loss=dpo", "lr=1e-6,5e-6,2e-5,1e-4"),
    "SFT, LoRA": ("loss=sft", LORA, "lr=1e-4,5e-4,2e-3,1e-2"),
    "SFT, all weights": ("loss=sft", "lr=3e-5,1e-4,3e-4,1e-3"),
}
SHOWN = {"loss": EVAL_LOSS, "accuracy": EVAL_ACCURACY, "margin": EVAL_MARGIN}


def write_data(folder: Path, source: Path, labels: str) -> dict[str, int]:
    """Write training and held-out rows; how many they are."""
    rows, _ = read_pairs(source, labels)
    short = [row for row in rows if len(row["chosen"]) + _length_of_response(row["rejected"]) <= LONGEST]
    train, held_out = split_rows(short, len(short), len(short))
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "held_out.jsonl", held_out)
    return {"train": len(train), "held out": len(held_out)}


def _length_of_response(dialogue: str) -> int:
    return len(dialogue.rpartition(ASSISTANT)[2])


def command(folder: Path, name: str) -> list[str]:
    """The command of a sweep."""
    data = f"datasets=[{{path: {folder}/train.jsonl, test_path: {folder}/held_out.jsonl}}]"
    return [sys.executable, "train.py", "-m", *COMMON, *SWEEPS[name], data, f"sweep_dir={directory(folder, name)}"]


def directory(folder: Path, name: str) -> Path:
    """Where a sweep runs."""
    return folder / name.replace(", ", "_").replace(" ", "_").lower()


def runs_of(sweep: Path) -> Iterable[dict]:
    """The numbers of the complete runs of a sweep."""
    for path in sorted(sweep.glob(f"*/{JOB}")):
        if json_object(path).get("state") != "complete":
            continue
        config = OmegaConf.load(path.parent / "config.yaml")
        last = [row for row in metric_rows(path.parent / METRICS) if EVAL_LOSS in row][-1]
        metrics = {
            name: [last[key], last.get(f"{key}{LOW}"), last.get(f"{key}{HIGH}")] for name, key in SHOWN.items() if key in last
        }
        yield {"lr": config.lr, "beta": config.loss.get("beta"), **metrics}


def main() -> None:
    """Run the sweeps, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows and runs go")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of chosen and rejected, also .gz")
    parser.add_argument("--labels", choices=("human", "shorter"), default="shorter")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="which ones to run; by default all")
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today()}_learning_rates_cpu.json"
    path = options.results or ROOT / "benchmarks" / "results" / name
    facts = {"command": "benchmarks/learning_rates.py", "hardware": hardware(), "versions": versions(), "overrides": COMMON}
    facts["rows"] = write_data(folder, options.data, options.labels)
    times_file = folder / "times.json"
    for sweep in options.sweeps:
        began = cpu_seconds()
        subprocess.run(command(folder, sweep), cwd=ROOT, check=True)
        times = json_object(times_file)
        times[sweep] = round(times.get(sweep, 0) + cpu_seconds() - began)
        times_file.write_text(json.dumps(times) + "\n")
    found = {sweep: list(runs_of(directory(folder, sweep))) for sweep in SWEEPS}
    facts["sweeps"] = {
        sweep: {"given": SWEEPS[sweep], "cpu_seconds": json_object(times_file).get(sweep), "runs": runs}
        for sweep, runs in found.items()
        if runs
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
    for file, drawn in pictures(facts).items():
        (folder / file).write_text(drawn)
    for sweep in options.sweeps:
        for run in found[sweep]:
            print(sweep, json.dumps(run))
    print(path)


if __name__ == "__main__":
    main()
