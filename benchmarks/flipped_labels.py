"""How many flipped labels a run's ledger finds: DPO on the embedded data with 5% of the labels flipped.

    python benchmarks/flipped_labels.py --seeds 3

Prints recall and precision of flagged_pairs.jsonl over pairs, and writes them with the counts to benchmarks/results/. This file
is also the loader of the flipped data.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

from preference_training.data.registry import register  # noqa: E402
from preference_training.data.toy_preferences import response_kind, toy_records  # noqa: E402

SHARE = 0.05
SEED = "SEED_OF_FLIPPED_LABELS"
# The settings of `make demo`, starting from its SFT model.
SFT = ("loss=sft",)
DPO = ("loss=dpo", "loss.beta=0.5", "n_epochs=1", "optimizer=SGD", "lr=0.01", "datasets=[benchmarks/flipped_labels.py:flipped]")


@register("flipped")
def get_flipped(split: str, silent: bool = False, cache_dir: str | None = None) -> dict:
    """The toy data with a share of the training labels flipped."""
    draw = random.Random(os.environ.get(SEED, "0"))
    records = toy_records(split)
    for record in records.values() if split == "train" else ():
        record["pairs"] = [pair[::-1] if draw.random() < SHARE else pair for pair in record["pairs"]]
    return records


def train(run_dir: Path, *overrides: str, **environment: str) -> None:
    """Run one training; its output is shown only if it fails."""
    command = [
        sys.executable,
        "train.py",
        *overrides,
        "wandb.enabled=false",
        "sample_during_eval=false",
        f"local_run_dir={run_dir}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def found_by(run_dir: Path, seed: str) -> dict:
    """Counts for one run: pairs flipped, flagged, and both; each pair counts once, whatever it is flagged for."""
    os.environ[SEED] = seed
    turned = sum(
        response_kind(record["responses"][better]) != "preferred"
        for record in get_flipped("train").values()
        for better, _ in record["pairs"]
    )
    rows = [json.loads(line) for line in (run_dir / "flagged_pairs.jsonl").read_text().splitlines()]
    kinds: dict[tuple, set] = {}
    for row in rows:
        kinds.setdefault((row["prompt"], row["preferred"], row["other"]), set()).add(row["kind"])
    right = [pair for pair in kinds if response_kind(pair[1]) != "preferred"]
    both = {"recall": len(right) / turned, "precision": len(right) / max(1, len(kinds))}
    return {"seed": seed, "turned": turned, "flagged": len(kinds), "turned and flagged": len(right), **both}


def main() -> None:
    """Train once per seed, and report."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of different sets of flipped labels")
    seeds = [str(seed) for seed in range(parser.parse_args().seeds)]
    with tempfile.TemporaryDirectory() as folder:
        train(sft := Path(folder) / "sft", *SFT)
        runs = []
        for seed in seeds:
            train(Path(folder) / seed, *DPO, f"model.archive={sft}/LATEST", **{SEED: seed})
            runs.append(found_by(Path(folder) / seed, seed))
    means = {name: statistics.median(run[name] for run in runs) for name in ("recall", "precision")}
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "medians": means, "runs": runs}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_flipped_labels_cpu.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
