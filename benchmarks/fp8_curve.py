"""What model.fp8 does to a loss: DPO on the toy data with a small Llama in float32, in bfloat16, and with FP8 products.

    python benchmarks/fp8_curve.py --steps 50

The same 50 batches of 8 pairs for each; FP8 is emulated on a CPU. Prints the summary, and writes it with the losses to
benchmarks/results/.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

from measure import hardware, versions

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "float32": ["model.policy_dtype=float32"],
    "bfloat16": ["model.policy_dtype=bfloat16"],
    "FP8": ["model.policy_dtype=bfloat16", "model.fp8=true"],
}
COMMON = (
    "model=tiny", "datasets=[toy]", "loss=dpo", "batch_size=8", "n_epochs=null", "do_first_eval=false", "seed=0",
    "sample_during_eval=false",
    "n_eval_examples=8", "eval_every=100000", "save_strategy=no", "save_policy_pt=false", "wandb.enabled=false",
    "++model.from_config.hidden_size=64", "++model.from_config.intermediate_size=192",
    "++model.from_config.num_hidden_layers=2", "max_length=96", "max_prompt_length=48",
)  # fmt: skip


def losses(folder: Path, steps: int, overrides: list[str]) -> list[float]:
    """The loss of each step of a run."""
    import subprocess

    command = [sys.executable, str(ROOT / "train.py"), *COMMON, *overrides, f"n_steps={steps}", f"local_run_dir={folder}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/train"] for row in rows if "loss/train" in row]


def main() -> None:
    """Train, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(Path(folder) / name, steps, overrides) for name, overrides in SETTINGS.items()}
    tenth = max(1, steps // 5)
    summary = {
        name: {
            "first": each[0],
            f"mean of the last {tenth}": sum(each[-tenth:]) / tenth,
            "mean distance to float32": sum(abs(a - b) for a, b in zip(each, found["float32"], strict=True)) / steps,
        }
        for name, each in found.items()
    }
    facts = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "hardware": hardware(), "versions": versions()}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_fp8_curve_cpu.json"
    path.write_text(json.dumps(facts | {"summary": summary, "losses": found}, indent=1) + "\n")
    print(json.dumps(summary, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
