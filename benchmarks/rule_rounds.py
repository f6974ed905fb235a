"""SmolLM2 learns a rule that judges its own samples: two sentences, no list. In rounds, and offline on as many samples.

    python benchmarks/rule_rounds.py runs/rule_rounds

The rounds sample 4 responses to each of 24 prompts, pair them by three rules, train DPO with LoRA, and again from
the trained policy. Offline, the first model samples as many responses in one round. Both are compared with the first model on
held-out prompts, by the rule.

Prints score, win rate, length and KL after each round, with 95% intervals and CPU time, and writes them to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from measure import cpu_seconds, hardware, versions

ROOT = Path(__file__).parent.parent
# Two sentences, the last of which ends, and no list.
RULES = r"['sentences<=2','sentences>=2','matches [.!?]\W*$','not matches (?m)^\s*([-*]|\d+[.])\s']"
COMMON = (
    "+rounds=default", "model=smollm2-135m", "+adapter=lora", "loss=dpo", "lr=3e-4", "n_epochs=2", "batch_size=16",
    "warmup_share=0.1",
    "rounds.prompts=examples/short_answers.jsonl", "rounds.judge=rules", f"rounds.judging.rules={RULES}",
    "rounds.max_new_tokens=96", "rounds.held_out=0.15", "rounds.n_held_out_samples=1", "rounds.pairs=all", "resume=auto",
    "wandb.enabled=false", "sample_during_eval=false", "do_first_eval=false", "n_eval_examples=1", "save_policy_pt=false",
)  # fmt: skip
ROUNDS, SAMPLES, PROMPTS = 3, 4, 24
ARMS = {
    "rounds": (f"rounds.rounds={ROUNDS}", f"rounds.n_samples={SAMPLES}", f"rounds.prompts_per_round={PROMPTS}"),
    "offline": ("rounds.rounds=1", f"rounds.n_samples={SAMPLES}", f"rounds.prompts_per_round={ROUNDS * PROMPTS}"),
}


def run(folder: Path, *overrides: str) -> dict:
    """Run a loop, or what is missing of it; its policies on held-out prompts, and the time that this took."""
    began, before = time.monotonic(), cpu_seconds()
    subprocess.run([sys.executable, "train.py", *COMMON, *overrides, f"local_run_dir={folder}"], cwd=ROOT, check=True)
    summaries = [*sorted(folder.glob("round-*/summary.json")), folder / "final" / "summary.json"]
    return {
        "policies": [json.loads(path.read_text()) for path in summaries],
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(cpu_seconds() - before),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Run both, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the loops go")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    options, more = parser.parse_known_args()
    path = options.results or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_rule_rounds_cpu.json"
    facts = {"command": sys.argv, "overrides": COMMON, "hardware": hardware(), "versions": versions(), "arms": {}}
    for arm in options.arms:
        facts["arms"][arm] = {"overrides": (*ARMS[arm], *more)} | run(options.folder.resolve() / arm, *ARMS[arm], *more)
        path.write_text(json.dumps(facts, indent=1) + "\n")
    for arm, found in facts["arms"].items():
        for policy in found["policies"]:
            held_out = policy["held_out"]
            numbers = {name: held_out[name] and held_out[name]["mean"] for name in ("score", "win_rate", "length", "kl")}
            print(arm, policy["round"] or "after the last round", json.dumps(numbers), flush=True)
        print(arm, f"{found['seconds']} s, {found['cpu_seconds']} s of CPU time", flush=True)
    print(path)


if __name__ == "__main__":
    main()
