"""What only a GPU can show: whether runs there compute what they are to compute, and how fast.

    python benchmarks/gpu_check.py                     on one NVIDIA GPU, about ten minutes
    python benchmarks/gpu_check.py --only llama,speed  checks whose name contains one of these
    python benchmarks/gpu_check.py --cpu               does it run: small sizes, under a minute

Every check is a few runs of train.py on generated rows and random weights; it needs no network. A run that is compared with
another does the same by other means: without prefix sharing, without compiling, on one device, without a break. A result is
printed and written as soon as it is there, to benchmarks/results/<date>_gpu_check_<device>.json. Exit status 1 where one fails.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
# A run that takes longer has failed. Unit: seconds.
PATIENCE = 240
COMMON = (
    "model=tiny", "loss=dpo", "datasets=[toy]", "n_epochs=null", "wandb.enabled=false", "sample_during_eval=false",
    "minimum_log_interval_secs=0", "save_policy_pt=false", "eval_every=100000", "n_eval_examples=32", "warmup_steps=2",
)  # fmt: skip
COMPARED = ("loss/train", "logps_train/chosen", "logps_train/rejected")


def shape(**values) -> tuple[str, ...]:
    """Overrides that give the model another architecture or size."""
    return tuple(f"++model.from_config.{key}={json.dumps(value)}" for key, value in values.items())


GPT_NEOX = shape(model_type="gpt_neox")
QWEN3 = shape(model_type="qwen3", num_key_value_heads=2, head_dim=64)
# Layers with a window and without, scores with a soft limit.
GEMMA2 = shape(model_type="gemma2", num_key_value_heads=2, head_dim=64, sliding_window=24, query_pre_attn_scalar=64)
# As Pythia 2.8b has it.
HEADS_OF_80 = shape(model_type="gpt_neox", hidden_size=320)
BILLION = shape(
    model_type="gpt_neox", hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192,
    max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
# Enough tokens a step to keep a GPU busy.
LARGE = (*BILLION, "batch_size=256")
SHARING, PADDED = ("prefix_sharing=on",), ("prefix_sharing=off",)
BFLOAT16, EXACT = ("model.policy_dtype=bfloat16",), ("tf32=false",)
SHARDED = ("trainer=FSDPTrainer", "trainer.nproc_per_node=1")


@dataclass(frozen=True)
class Comparison:
    """A run, and one that has to log the same: the largest relative difference may be the tolerance.

    setting belongs to both; own and other are what sets them apart. broken: the run is stopped half-way, and resumed.
    """

    name: str
    setting: tuple[str, ...]
    own: tuple[str, ...] = SHARING
    other: tuple[str, ...] = PADDED
    tolerance: float = 1e-4
    broken: bool = False


@dataclass(frozen=True)
class Speed:
    """A run whose speed and memory are measured, over the second half of its steps."""

    name: str
    setting: tuple[str, ...]


EXAMPLES = {Comparison: 192, Speed: 3072}
CHECKS = [
    Comparison("llama float32", EXACT),
    Comparison("llama TF32", (), tolerance=5e-3),
    Comparison("llama bfloat16", BFLOAT16, tolerance=2e-2),
    Comparison("gpt_neox bfloat16", (*GPT_NEOX, *BFLOAT16), tolerance=2e-2),
    Comparison("qwen3 bfloat16", (*QWEN3, *BFLOAT16), tolerance=2e-2),
    Comparison("gemma2 float32", (*GEMMA2, *EXACT)),
    Comparison("heads of 80 bfloat16", (*HEADS_OF_80, *BFLOAT16), tolerance=2e-2),
    Comparison("LoRA", ("+adapter=lora", *EXACT)),
    Comparison("activation checkpointing", EXACT, ("activation_checkpointing=true",), ()),
    Comparison("compiled", EXACT, ("compile=true",), ()),
    Comparison("FSDP on one GPU", EXACT, SHARDED, ()),
    Comparison("FSDP in bfloat16", (*SHARDED, "trainer.param_dtype=bfloat16"), tolerance=2e-2),
    Comparison("resumed", EXACT, (), (), tolerance=1e-6, broken=True),
    Speed("speed, 1.2B", (*LARGE, *BFLOAT16)),
    Speed("speed, 1.2B padded", (*LARGE, *BFLOAT16, *PADDED)),
    Speed("speed, 1.2B compiled", (*LARGE, *BFLOAT16, "compile=true")),
]
ON_CPU = [Comparison("llama float32", ()), Comparison("resumed", (), (), (), tolerance=1e-6, broken=True), Speed("speed", ())]
EXAMPLES_ON_CPU = {Comparison: 64, Speed: 64}


def start(overrides: tuple[str, ...]) -> tuple[int, str]:
    """Run train.py: its exit status, and the end of its output."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"no end after {PATIENCE} s"
    return done.returncode, (done.stdout + done.stderr)[-1500:]


class FailedRunError(Exception):
    """A run of train.py that failed, and its output."""


def read_rows(folder: Path, examples: int, *overrides: str) -> list[dict]:
    """Train on so many examples in a folder; the lines of metrics.jsonl."""
    status, output = start((*COMMON, *overrides, f"n_examples={examples}", f"local_run_dir={folder}"))
    if status:
        raise FailedRunError(f"exit status {status}: {output}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(rows: list[dict], others: list[dict]) -> float:
    """The largest relative difference of what two runs logged at the same steps. Raises where their steps differ."""
    first, second = ({row["counters/examples"]: row for row in each if COMPARED[0] in row} for each in (rows, others))
    if not first or first.keys() != second.keys():
        raise FailedRunError(f"steps at {sorted(first)} and at {sorted(second)} examples")
    pairs = [(first[step][key], second[step][key]) for step in first for key in COMPARED]
    # A value that is no number differs from everything.
    return max(abs(a - b) / max(abs(b), 1e-6) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs)


def starts_at_ln_2(rows: list[dict]) -> bool:
    """Whether policy and reference were bit-identical before the first update."""
    return rows[0]["rewards_eval/margins"] == 0 and abs(rows[0]["loss/eval"] - math.log(2)) < 1e-6


def compare(check: Comparison, folder: Path, examples: int) -> dict:
    """Both runs of a comparison, and what came of it."""
    if check.broken:
        read_rows(folder / "own", examples // 2, *check.setting, *check.own)
    resume = ("resume=auto",) if check.broken else ()
    own = read_rows(folder / "own", examples, *check.setting, *check.own, *resume)
    difference = largest_difference(own, read_rows(folder / "other", examples, *check.setting, *check.other))
    passed = difference <= check.tolerance and starts_at_ln_2(own)
    return {"passed": passed, "difference": difference, "starts_at_ln_2": starts_at_ln_2(own)}


def speed(check: Speed, folder: Path, examples: int) -> dict:
    """Tokens per second, memory and MFU of a run."""
    rows = [row for row in read_rows(folder / "own", examples, *check.setting) if "tokens_per_second" in row]
    later = rows[len(rows) // 2 :]
    known = [key for key in ("tokens_per_second", "examples_per_second", "mfu", "memory_gib") if key in later[-1]]
    return {"passed": True, "steps": len(rows)} | {key: median(row[key] for row in later) for key in known}


def build_result(check: Comparison | Speed, examples: int) -> dict:
    """Run a check; never raises, so that the others still run."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = (compare if isinstance(check, Comparison) else speed)(check, Path(folder), examples)
        except FailedRunError as error:
            found = {"passed": False, "error": str(error)}
    return {"name": check.name, **found, "seconds": round(time.perf_counter() - started, 1), "check": asdict(check)}


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small sizes on a CPU: does it run")
    parser.add_argument("--only", default="", help="parts of names of checks, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the results go")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Do the checks one after another; returns the exit status."""
    from measure import hardware, versions

    args = arguments(given)
    machine = hardware()
    if not args.cpu and "gpu" not in machine:
        print("No NVIDIA GPU that torch can use was found. Does it run at all: --cpu", file=sys.stderr)
        return 2
    checks, examples = (ON_CPU, EXAMPLES_ON_CPU) if args.cpu else (CHECKS, EXAMPLES)
    chosen = [check for check in checks if any(part in check.name for part in args.only.split(","))]
    path = args.out / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_gpu_check_{'cpu' if args.cpu else 'cuda'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for check in chosen:
        results.append(build_result(check, examples[type(check)]))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "check"}), flush=True)
        facts = {"command": sys.argv, "hardware": machine, "versions": versions(), "results": results}
        path.write_text(json.dumps(facts, indent=1) + "\n")
    print(path)
    return int(not results or not all(result["passed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
