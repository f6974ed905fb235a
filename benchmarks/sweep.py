"""A sweep compared with separate runs: wall time of `train.py` over several betas. Standard library only.

Both train on the same file with the same options. The sweep is one `train.py -m`, as a user starts it, without earlier caches.
Each separate run starts without the caches of the others.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BETAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
EXAMPLES_A_STEP = 8


def race(folder: Path, count: int, options: dict) -> dict[str, dict]:
    """Wall seconds and the losses of each beta, as one sweep and as separate runs. `folder` is new and keeps their files."""
    betas = BETAS[:count]
    # Flags come before the overrides, which argparse accepts only as one contiguous block.
    program, script, *overrides = _command(folder, options)
    sweep = [program, script, "-m", *overrides, f"loss.beta={','.join(map(str, betas))}"]
    together = _timed([sweep], folder / "together")
    commands = [[*_command(folder, options), f"loss.beta={beta}"] for beta in betas]
    return {"sweep": together, "separate": _timed(commands, folder / "separate")}


def _command(folder: Path, options: dict) -> list[str]:
    """The command line shared by sweep and separate runs, with little overhead besides training."""
    overrides = {
        "model": "blank_model",
        "model.name_or_path": folder.parent / "model",
        "datasets": f"[{folder.parent / 'sweep.jsonl'}]",
        "loss": "dpo",
        "batch_size": EXAMPLES_A_STEP,
        "eval_batch_size": EXAMPLES_A_STEP,
        "n_eval_examples": EXAMPLES_A_STEP,
        "max_length": options["max_length"],
        "n_epochs": 1,
        "optimizer": "AdamW",
        "lr": "1e-6",
        "warmup_steps": 0,
        "eval_every": 1_000_000,
        "do_first_eval": "false",
        "sample_during_eval": "false",
        "wandb.enabled": "false",
        # No checkpoints: their cost is the same on both sides.
        "debug": "true",
    }
    return [sys.executable, str(ROOT / "train.py"), *(f"{key}={value}" for key, value in overrides.items())]


def _timed(commands: list[list[str]], folder: Path) -> dict:
    """Run the commands one after another, each in its own directory, and read their results afterwards."""
    started = time.perf_counter()
    for number, command in enumerate(commands):
        home = folder / str(number)
        home.mkdir(parents=True)
        places = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hub")}
        own = [f"cache_dir={home / 'cache'}", f"local_dirs=[{home / 'runs'}]", f"hydra.sweep.dir={home / 'multirun'}"]
        done = subprocess.run(
            [*command, *own], cwd=home, env=os.environ | places, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {"seconds": time.perf_counter() - started, "losses": _losses(folder)}


def _losses(folder: Path) -> dict[str, list[float]]:
    """The training losses of each run, by its beta as text."""
    losses = {}
    for file in folder.rglob("metrics.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        config = (file.parent / "config.yaml").read_text()
        beta = next(line.split(":")[1].strip() for line in config.splitlines() if line.strip().startswith("beta:"))
        losses[beta] = [row["loss/train"] for row in rows if "loss/train" in row]
    return losses
