"""The cost of checkpoints, of resuming and of monitoring, for a Llama with 59M parameters and AdamW.

    python benchmarks/checkpoints.py --rounds 3

Prints a JSON object with raw values, and writes it to benchmarks/results/. Contenders run in their own processes, interleaved.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

MODEL = (
    "model=blank_model", "model.tokenizer_name_or_path=byte_level",
    "++model.from_config={model_type: llama, hidden_size: 640, intermediate_size: 1720, num_hidden_layers: 12, "
    "num_attention_heads: 10, num_key_value_heads: 10, max_position_embeddings: 512}",
    "loss=dpo", "optimizer=AdamW", "lr=1e-6", "warmup_steps=0", "batch_size=4", "max_length=128", "max_prompt_length=64",
    "do_first_eval=false", "n_eval_examples=8", "sample_during_eval=false", "wandb.enabled=false", "save_policy_pt=false",
    "minimum_log_interval_secs=0", "keep_last=1", "n_epochs=null",
)  # fmt: skip
# Steps between two checkpoints; writing one takes less time than this.
STEPS_BETWEEN, CHECKPOINTS = 3, 3
MODES = {"none": ["debug=true"], "synchronous": ["save_async=false"], "background": ["save_async=true"]}


def settings(folder: Path, *overrides: str) -> list[str]:
    """The command line of a run in `folder`."""
    return [*MODEL, f"local_dirs=[{folder}]", f"local_run_dir={folder}/run", *overrides]


# ---- one run in this process, with a clock at the places of interest ---------------------------------------------------


def one_run(mode: str, folder: Path) -> dict:
    """Train with checkpoints; returns the seconds of each call and the peak memory."""
    from measure import clocked, peak_bytes

    import train
    from preference_training.checkpointing.writer import CheckpointWriter
    from preference_training.configuration.validation import configured
    from preference_training.training.monitors import TrainingMonitor, UnchangedWeights
    from trainers import Trainer

    clocks: dict[str, list[float]] = {name: [] for name in ("save", "write", "step", "see", "still", "same")}
    for owner, method, clock in [
        (Trainer, "save", "save"), (CheckpointWriter, "_write", "write"), (Trainer, "train_step", "step"),
        (TrainingMonitor, "observe", "see"), (UnchangedWeights, "__init__", "still"),
        (UnchangedWeights, "share_changed", "same"),
    ]:  # fmt: skip
        clocked(owner, method, clocks[clock])
    steps = STEPS_BETWEEN * (CHECKPOINTS + 1)
    overrides = f"n_examples={4 * steps}", f"save_every={4 * STEPS_BETWEEN}", "eval_every=100000", *MODES[mode]
    config = configured(*settings(folder, *overrides))
    with contextlib.redirect_stdout(sys.stderr):
        train.run(config, folder / "run")
    # The last save is synchronous in either mode.
    clocks["save"], clocks["write"] = clocks["save"][:CHECKPOINTS], clocks["write"][:CHECKPOINTS]
    return clocks | {"peak_bytes": peak_bytes()["process"], "read": reading(), "reason": asking()}


def per_call(function, calls: int = 2000) -> float:
    """Mean seconds per call of a function."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def reading() -> float:
    """Seconds that `train_step` takes to gather and read ten metrics and the gradient norm."""
    import torch

    sums, norm = [torch.rand(()) for _ in range(10)], torch.rand(())
    return per_call(lambda: torch.cat([torch.stack(sums) / 8, norm.detach().reshape(1)]).tolist())


def asking() -> float:
    """Seconds that `StopRequests.reason` takes."""
    from preference_training.core.signals import StopRequests

    stop = StopRequests(60.0)
    return per_call(lambda: stop.reason)


# ---- starts ------------------------------------------------------------------------------------------------------------


def seconds_to_first_step(folder: Path, *overrides: str) -> float:
    """Seconds from the start of a process to the log line of its first step; the process is then killed."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), *settings(folder, "save_strategy=no", "n_examples=800", *overrides)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    for line in process.stdout:
        if re.match(r"\d+/\d+ loss", line):
            break
    seconds = time.perf_counter() - started
    process.kill()
    process.communicate()
    return seconds


def starts(rounds: int, folder: Path) -> dict:
    """Time fresh and resumed starts alternately, with prepared data."""
    train = [sys.executable, str(ROOT / "train.py")]
    subprocess.run([*train, *settings(folder, "n_examples=16")], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    seconds: dict[str, list[float]] = {"fresh": [], "resumed": []}
    for number in range(rounds):
        seconds["fresh"].append(seconds_to_first_step(folder, f"local_run_dir={folder}/fresh{number}"))
        seconds["resumed"].append(seconds_to_first_step(folder, f"resume={folder}/run"))
    return seconds


# ---- the whole -----------------------------------------------------------------------------------------------------------


def summary(runs: dict[str, list[dict]], seconds: dict) -> dict:
    """Medians, and ratios within rounds."""
    median = statistics.median
    each = list(zip(runs["none"], runs["synchronous"], runs["background"], strict=True))
    sync, background = (median(run["save"]) for run in (runs["synchronous"][0], runs["background"][0]))
    guards = [
        (median(run["see"]) + run["read"] + run["reason"] + (sum(run["still"]) + sum(run["same"])) / len(run["step"]))
        / median(run["step"])
        for run, _, _ in each
    ]
    return {
        "seconds of a synchronous save, of the stall in the background": [sync, background],
        "stall in the background / synchronous save": [median(b["save"]) / median(s["save"]) for _, s, b in each],
        "wall time of all steps and saves / without checkpoints": {
            name: [
                (sum(run["step"]) + sum(run["save"])) / sum(none["step"])
                for run, (none, _, _) in zip(runs[name], each, strict=True)
            ]
            for name in ("synchronous", "background")
        },
        "seconds to write in the background": [median(b["write"]) for _, _, b in each],
        "peak MiB": {name: median(run["peak_bytes"] for run in listed) / 2**20 for name, listed in runs.items()},
        "seconds of a step": [median(run["step"]) for run, _, _ in each],
        "guards and bookkeeping / step": guards,
        "resumed / fresh start": [r / f for f, r in zip(seconds["fresh"], seconds["resumed"], strict=True)],
    }


def main() -> None:
    """Measure, print and save."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_run:
        print(json.dumps(one_run(args.one_run[0], Path(args.one_run[1]))))
        return
    runs: dict[str, list[dict]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        seconds = starts(args.rounds, Path(folder))
        for _ in range(args.rounds):
            for mode, listed in runs.items():
                with tempfile.TemporaryDirectory() as own:
                    done = subprocess.run(
                        [sys.executable, __file__, "--one-run", mode, own], check=True, stdout=subprocess.PIPE, text=True
                    )
                listed.append(json.loads(done.stdout))
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "load_average": os.getloadavg()}
    facts |= {"summary": summary(runs, seconds), "starts": seconds, "runs": runs}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_checkpoints_cpu.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts["summary"], indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
