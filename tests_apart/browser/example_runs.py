"""Runs whose pages are looked at: short real ones, and one of 100,000 logged steps that is made up."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
# The embedded model learns the embedded data in a minute, with a curve that has some steps.
COMMON = (
    "n_eval_examples=128",
    "wandb.enabled=false",
    "save_policy_pt=false",
    "save_async=false",
    "warmup_steps=10",
    "minimum_log_interval_secs=30",
)
# Beta is small for a model this small: preferred responses become unlikely too, which the report then says.
DPO = ("batch_size=8", "optimizer=AdamW", "lr=5e-5", "n_examples=640", "eval_every=64", "n_eval_model_samples=6")
SWEEP = ("batch_size=8", "optimizer=SGD", "lr=0.01", "n_examples=320", "eval_every=80", "sample_during_eval=false")


def train(*overrides: str) -> None:
    """Run a command line of train.py to its end."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides, *COMMON]
    # The model is so small that a second thread costs more than it brings, above all beside other processes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def short_runs(folder: Path) -> dict[str, Path]:
    """SFT, DPO, beta-DPO, and DPO with three betas and two seeds: their directories, and that of the sweep.

    What lies in the folder already is taken as it is.
    """
    found = {name: folder / name for name in ("sft", "dpo", "beta_dpo", "sweep")}
    start = f"model.archive={found['sft'] / 'LATEST'}"
    commands = {
        "sft": ["loss=sft", "batch_size=16", "n_examples=1024", "eval_every=256", "n_eval_model_samples=6"],
        "dpo": ["loss=dpo", "loss.beta=0.05", start, *DPO],
        "beta_dpo": ["loss=beta_DPO", start, *DPO],
        "sweep": ["-m", "loss=dpo", "loss.beta=0.05,0.1,0.5", "seed=0,1", start, *SWEEP],
    }
    for name, command in commands.items():
        place = "hydra.sweep.dir" if name == "sweep" else "local_run_dir"
        if not found[name].exists():
            train(*command, f"exp_name=toy_{name}", f"{place}={found[name]}")
    return found


def many_runs(folder: Path, number: int = 20) -> Path:
    """Runs with as many values of beta, in numbers that are made up; their folder."""
    for k in range(number):
        run_dir = folder / str(k)
        if not run_dir.exists():
            long_run(run_dir, steps=60, seed=k)
            config = OmegaConf.load(run_dir / "config.yaml")
            config.loss.beta = round(0.05 * (k + 1), 2)
            OmegaConf.save(config, run_dir / "config.yaml")
    return folder


def data_report(folder: Path) -> Path:
    """The data report of rows with leaks, near-duplicates, long preferred responses and a row of a benchmark; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    nouns = ("river", "coffee", "window", "planet", "winter", "island", "engine", "castle", "camera", "farmer", "guitar")
    some = lambda number: " ".join(draw.choices(nouns, k=number))  # noqa: E731
    rows = [{"prompt": f"What is {some(12)}?", "chosen": some(20), "rejected": some(9)} for _ in range(300)]
    rows += [row | {"prompt": f"And {row['prompt']}"} for row in rows[:30]]
    rows += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[40:70]]
    bench = [{"question": rows[5]["prompt"]}, {"question": f"Why is {some(15)}?"}]
    for name, content in {"rows.jsonl": rows, "test.jsonl": rows[:40], "benchmark.jsonl": bench}.items():
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in content))
    entry = f"{{path: {folder / 'rows.jsonl'}, test_path: {folder / 'test.jsonl'}}}"
    files = f"contamination_files={folder / 'benchmark.jsonl'}"
    train("loss=dpo", f"datasets=[{entry}]", files, f"local_dirs={folder}", "dry_run=true")
    return folder / "data_report.html"


# ---- a long run -------------------------------------------------------------------------------------------------------------


def long_run(run_dir: Path, steps: int = 100_000, batch_size: int = 64, seed: int = 0) -> Path:
    """Write what a beta-DPO run of so many steps leaves behind, in numbers that are made up; returns its directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    draw = numpy.random.default_rng(seed)
    columns = _training(numpy.arange(1, steps + 1) / steps, draw)
    columns["counters/examples"] = numpy.arange(1, steps + 1) * batch_size
    columns["counters/updates"] = numpy.arange(1, steps + 1)
    every = max(1, steps // 100)
    with (run_dir / "metrics.jsonl").open("w") as metrics, (run_dir / "samples.jsonl").open("w") as samples:
        for step, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True), start=1):
            metrics.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")
            if step % every == 0:
                counters = {"counters/examples": step * batch_size, "counters/updates": step}
                metrics.write(json.dumps(_evaluation(step / steps, draw) | counters) + "\n")
                samples.writelines(json.dumps(row) + "\n" for row in _samples(step * batch_size, draw))
    loss = {"name": "beta_DPO", "beta": 0.1, "mode_loss": "beta_DPO", "mode_weight": 0.2, "a": 0.6}
    config = {"exp_name": "a_long_run", "max_grad_norm": 10.0, "loss": loss, "trainer": {"name": "BasicTrainer"}}
    OmegaConf.save(config, run_dir / "config.yaml")
    (run_dir / "about.json").write_text(json.dumps({"examples": steps * batch_size}))
    return run_dir


def _training(share: numpy.ndarray, draw) -> dict[str, numpy.ndarray]:
    """The metrics of each step, all [N]; share is how much of the run each has behind it."""
    n, learnt = len(share), 1 - numpy.exp(-5 * share)
    chosen = -3 * learnt + draw.normal(0, 0.5, n)
    rejected = chosen - 2.4 * learnt - draw.normal(0, 0.6, n)
    memory = 41.0 + (share > 0.3) * 1.5
    return {
        "loss/train": 0.693 - 0.3 * learnt + draw.gamma(2, 0.03, n),
        "rewards_train/chosen": chosen,
        "rewards_train/rejected": rejected,
        "rewards_train/accuracies": (0.5 + 0.25 * learnt + draw.normal(0, 0.06, n)).clip(0, 1),
        "rewards_train/margins": chosen - rejected,
        "logps_train/chosen": -120 + 10 * chosen,
        "logps_train/rejected": -130 + 10 * rejected,
        "beta_DPO/beta_used": 0.1 * (1 + 0.6 * draw.normal(0, 0.3, n)),
        "beta_DPO/gap_mean": 2.4 * learnt + draw.normal(0, 0.1, n),
        "beta_DPO/gap_std": 1 + learnt + draw.normal(0, 0.05, n),
        "beta_DPO/kept_fraction": numpy.full(n, 0.8),
        "grad_norm": draw.lognormal(1.5, 0.4, n),
        "examples_per_second": 210 + draw.normal(0, 8, n),
        "memory_gib": memory,
    }


def _evaluation(share: float, draw) -> dict[str, float]:
    """A row of held-out metrics with their intervals."""
    learnt = 1 - numpy.exp(-5 * share)
    middles = {
        "loss/eval": (0.693 - 0.22 * learnt + 0.05 * share, 0.02),
        "rewards_eval/chosen": (-3 * learnt, 0.2),
        "rewards_eval/rejected": (-4.4 * learnt, 0.2),
        "rewards_eval/accuracies": (0.5 + 0.2 * learnt, 0.03),
        "rewards_eval/margins": (1.4 * learnt, 0.15),
        "logps_eval/chosen": (-125 - 30 * learnt, 4),
        "logps_eval/rejected": (-135 - 44 * learnt, 4),
    }
    row = {}
    for name, (middle, half) in middles.items():
        value = float(middle + draw.normal(0, half / 4))
        row |= {name: value, f"{name}/low": value - half, f"{name}/high": value + half}
    return row


WORDS = "the of a to be in that it for was on are as with his they at this from have or by one had not but what all"


def _samples(examples: int, draw) -> list[dict]:
    def answer() -> str:
        return " ".join(draw.choice(WORDS.split(), 200))

    prompts = [f"Human: What is the way of number {number}?\n\nAssistant:" for number in range(16)]
    return [{"examples": examples, "prompt": prompt, "policy": answer(), "reference": answer()} for prompt in prompts]
