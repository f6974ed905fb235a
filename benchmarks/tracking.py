"""The cost of logging and reporting: the report of 100,000 logged steps, and the share of tracking in a step.

    python benchmarks/tracking.py --rounds 5

Prints a JSON object, and writes it with the raw values to benchmarks/results/. Needs Chromium, its driver, and
preference_collection/requirements-test.txt.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The embedded model on the embedded data is the worst case: for larger models the share of tracking is smaller.
RUN = (
    "loss=dpo", "batch_size=8", "n_examples=1536", "n_epochs=null", "optimizer=SGD", "lr=0.01", "warmup_steps=0",
    "eval_every=512", "sample_during_eval=false", "wandb.enabled=false", "save_policy_pt=false", "save_strategy=no",
)  # fmt: skip
# Functions called in each step, and at evaluations only.
IN_STEPS, AT_EVALUATIONS = ("memory_held", "observe", "log_step"), ("report", "log_evaluation", "write")


def pages(rounds: int, folder: Path) -> dict:
    """Seconds to write and to open the report of 100,000 steps, and its size."""
    from preference_training.reporting.run_report import write_report
    from tests_apart.browser.browser import chromium, open_page, show
    from tests_apart.browser.example_runs import long_run

    run_dir = long_run(folder / "long")
    written, computed, opened = [], [], []
    for _ in range(rounds):
        started, computing = time.perf_counter(), time.process_time()
        path = write_report(run_dir)
        written.append(time.perf_counter() - started)
        computed.append(time.process_time() - computing)
    with chromium() as browser:
        for _ in range(rounds):
            show(browser, 1280)
            opened.append(open_page(browser, path))
    size = {name: (run_dir / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl", "report.html")}
    return {"seconds to write": written, "processor seconds to write": computed, "seconds to open": opened, "bytes": size}


def training(folder: Path) -> dict[str, list[float]]:
    """Train, and time each step and each tracking call; returns the seconds of each call."""
    from measure import clocked

    import train
    import trainers
    from preference_training.configuration.validation import configured
    from preference_training.tracking.ledger import Ledger
    from preference_training.tracking.tracker import Tracker

    clocks: dict[str, list[float]] = {name: [] for name in ("train_step", *IN_STEPS, *AT_EVALUATIONS)}
    for owner, names in {
        trainers.Trainer: ["train_step"],
        trainers: ["memory_held"],
        Tracker: ["log_step", "report", "log_evaluation"],
        Ledger: ["record", "write"],
    }.items():
        for name in names:
            clocked(owner, name, clocks[name])
    config = configured(*RUN, f"local_run_dir={folder / 'run'}")
    with contextlib.redirect_stdout(sys.stderr):
        train.run(config, folder / "run")
    return clocks


def summary(long: dict, clocks: dict[str, list[float]]) -> dict:
    """Medians for the report, and shares of the step time."""
    opened = {name: statistics.median(each[name] for each in long["seconds to open"]) for name in ("loaded", "seen")}
    # The ledger works within a step; the others run after it.
    steps = sum(clocks["train_step"]) + sum(clocks["memory_held"]) + sum(clocks["log_step"])
    return {
        "100,000 steps: seconds to write report.html": statistics.median(long["seconds to write"]),
        "100,000 steps: processor seconds of that": statistics.median(long["processor seconds to write"]),
        "100,000 steps: seconds until it is loaded, and until it is seen": opened,
        "100,000 steps: bytes of report.html": long["bytes"]["report.html"],
        "seconds of a step, median": statistics.median(clocks["train_step"]),
        "tracking / step": sum(sum(clocks[name]) for name in IN_STEPS) / steps,
        "tracking and the ledger's files / step": sum(sum(clocks[name]) for name in (*IN_STEPS, "write")) / steps,
        "seconds of a report at an evaluation": clocks["report"],
    }


def main() -> None:
    """Measure, print and save."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        long, clocks = pages(args.rounds, Path(folder)), training(Path(folder))
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "load_average": load}
    facts |= {"summary": summary(long, clocks), "pages": long, "seconds": clocks}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_tracking_cpu.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["summary"], indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
