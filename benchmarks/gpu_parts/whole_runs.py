"""Runs of train.py: from start to end, repeated, resumed, by other means that must log the same, and sharded."""

import json
import math
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from gpu_parts.found import Found, Settings
from gpu_parts.making import shape

ROOT = Path(__file__).resolve().parents[2]
# A run that takes longer has failed. Unit: seconds.
PATIENCE = 150
COMMON = (
    "model=tiny", "datasets=[toy]", "n_epochs=null", "wandb.enabled=false", "sample_during_eval=false", "warmup_steps=2",
    "minimum_log_interval_secs=0", "save_policy_pt=false", "eval_every=100000", "n_eval_examples=32", "do_first_eval=false",
)  # fmt: skip
COMPARED = ("loss/train", "logps_train/chosen", "logps_train/rejected")
EXACT, BFLOAT16 = ("tf32=false",), ("model.policy_dtype=bfloat16",)
SHARDED = ("trainer=FSDPTrainer", "trainer.nproc_per_node=1")
# What two runs have in common, what only one has, and the largest relative difference of what they log.
OPTIONS = {
    "sharing": (EXACT, ("prefix_sharing=off",), 1e-4),
    "sharing with LoRA": ((*EXACT, "+adapter=lora"), ("prefix_sharing=off",), 1e-4),
    "sharing in bfloat16": (BFLOAT16, ("prefix_sharing=off",), 2e-2),
    "activation checkpointing": (EXACT, ("activation_checkpointing=true",), 1e-4),
    "selective checkpointing": (EXACT, ("activation_checkpointing=selective",), 1e-4),
    "compiled, selective": (EXACT, ("compile=true", "activation_checkpointing=selective"), 1e-4),
    "compiled": (EXACT, ("compile=true",), 1e-4),
    "autocast": ((), ("model.autocast_dtype=bfloat16",), 2e-2),
    "float16 with a loss scaler": (EXACT, ("model.autocast_dtype=float16",), 2e-2),
    "flash attention": (BFLOAT16, ("prefix_attention=varlen",), 2e-2),
    # Eight bits beside sixteen: that it trains at all, begins at ln 2, and goes the same way.
    **({"FP8": (BFLOAT16, ("model.fp8=true",), 2e-1)} if find_spec("torchao") else {}),
}
FSDP = {
    "float32": EXACT,
    "TF32": (),
    "bfloat16": BFLOAT16,
    "mixed": (*EXACT, "trainer.param_dtype=bfloat16"),
    "mixed, checkpointing": (*EXACT, "trainer.param_dtype=bfloat16", "activation_checkpointing=true"),
    "offload": (*BFLOAT16, "trainer.cpu_offload=true"),
    "float16 with a loss scaler": (*EXACT, "trainer.param_dtype=float16"),
    "flash attention": (*BFLOAT16, "prefix_attention=varlen"),
    "QLoRA": (*EXACT, "+adapter=qlora"),
    "QLoRA, mixed, offload": (*EXACT, "+adapter=qlora", "trainer.param_dtype=bfloat16", "trainer.cpu_offload=true"),
}
# Of those, the ones that must log what one device logs, and how closely.
LIKE_ONE_DEVICE = {"float32": 1e-4, "bfloat16": 2e-2, "QLoRA": 1e-4}
SEVERAL = {
    "layers over devices": (),
    "FSDP": ("trainer=FSDPTrainer",),
    "hybrid": ("trainer=FSDPTrainer", "trainer.sharding=hybrid"),
    "tensor parallel": ("trainer=TensorParallelTrainer", "trainer.tensor_parallel_size=2"),
}


class FailedRunError(Exception):
    """A run of train.py that failed, and the end of its output."""


def start(overrides: tuple[str, ...]) -> tuple[int, str]:
    """Run train.py: its exit status, and its output."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"no end after {PATIENCE} s"
    return done.returncode, done.stdout + done.stderr


def run(folder: Path, *overrides: str) -> dict:
    """Run in a folder; its losses, and lines that tell of trouble. Raises FailedRunError."""
    began = time.perf_counter()
    status, output = start((*COMMON, *overrides, f"local_run_dir={folder}"))
    if status:
        raise FailedRunError(f"exit status {status}: {output[-1500:]}")
    words = ("warning", "prefix sharing: off", "branch by branch", "recompile", "Traceback")
    said = [line[:200] for line in output.splitlines() if any(word in line for word in words)]
    losses = [round(row[COMPARED[0]], 6) for row in logged(folder)]
    return {"seconds": round(time.perf_counter() - began, 1), "losses": losses[:10], "said": said[:6]}


def logged(folder: Path) -> list[dict]:
    """The steps in a run's metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if COMPARED[0] in row]


def largest_difference(rows: list[dict], others: list[dict]) -> float:
    """The largest relative difference of what two runs logged. Raises FailedRunError where their steps differ."""
    first, second = ({row["counters/examples"]: row for row in each} for each in (rows, others))
    if not first or first.keys() != second.keys():
        raise FailedRunError(f"steps at {sorted(first)} and at {sorted(second)} examples")
    pairs = [(first[step][key], second[step][key]) for step in first for key in COMPARED if key in first[step]]
    # A value that is no number differs from everything.
    return max(abs(a - b) / max(abs(b), 1e-6) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs)


# ---- from start to end ----------------------------------------------------------------------------------------------------


def runs(found: Found, settings: Settings) -> None:
    """SFT, DPO from it, the same DPO again, in two parts, and one step of it from warm caches."""
    root, steps = settings.work / "runs", settings.choose(8, 4)
    dtype = settings.choose("bfloat16", "float32")
    found.attempt("sft", run, root / "sft", "loss=sft", f"model.policy_dtype={dtype}", f"n_steps={steps}")
    dpo = ("loss=dpo", f"model.policy_dtype={dtype}", f"model.archive={root / 'sft' / 'LATEST'}", "lr=1e-4")
    found.attempt("dpo", run, root / "dpo", *dpo, "lr_schedule=constant", f"n_steps={steps}", must=begins_at_ln_2)
    if not settings.is_cpu:
        found.attempt("dpo_again", run, root / "again", *dpo, "lr_schedule=constant", f"n_steps={steps}")
        found.attempt("repeated", weights_differ, root / "dpo", root / "again", must=lambda each: each["bits_equal"])
        for name in ("varlen", "varlen_again"):
            found.attempt(name, run, root / name, *dpo, "prefix_attention=varlen", f"n_steps={steps}", must=begins_at_ln_2)
        found.attempt(
            "varlen_repeated", weights_differ, root / "varlen", root / "varlen_again", must=lambda each: each["bits_equal"]
        )
    found.attempt("first_half", run, root / "halves", *dpo, "lr_schedule=constant", f"n_steps={steps // 2}")
    halves = f"resume={root / 'halves'}"
    found.attempt("second_half", run, root / "halves", *dpo, "lr_schedule=constant", f"n_steps={steps}", halves)
    found.attempt("resumed", weights_differ, root / "dpo", root / "halves", must=lambda each: each["bits_equal"])
    if not settings.is_cpu:
        limit = lambda each: each["seconds"] < 30  # noqa: E731
        found.attempt("start_and_one_step_warm", run, root / "one", *dpo, "n_steps=1", "save_strategy=no", must=limit)


def begins_at_ln_2(result: dict) -> bool:
    """Whether policy and reference were bit-identical before the first update."""
    return abs(result["losses"][0] - math.log(2)) < 1e-6


def weights_of(folder: Path) -> dict:
    """The weights of a run's newest checkpoint."""
    from safetensors.torch import load_file

    files = sorted((folder / "LATEST").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights_differ(one: Path, other: Path) -> dict:
    """Whether two runs have the same weights, and by how much they differ at most."""
    first, second = weights_of(one), weights_of(other)
    if not first or first.keys() != second.keys():
        raise FailedRunError(f"{len(first)} and {len(second)} tensors")
    largest = max((first[name].float() - second[name].float()).abs().max().item() for name in first)
    return {"bits_equal": all(torch.equal(first[name], second[name]) for name in first), "largest_difference": largest}


# ---- by other means ---------------------------------------------------------------------------------------------------------


def options(found: Found, settings: Settings) -> None:
    """Pairs of runs that differ in what must not change what is computed."""
    root, plain = settings.work / "options", {}
    for name, (common, other, tolerance) in settings.choose(OPTIONS, {"sharing": OPTIONS["sharing"]}).items():
        if common not in plain:
            plain[common] = root / f"plain_{len(plain)}"
            if found.attempt(f"plain {' '.join(common)}", run, plain[common], "loss=dpo", "n_steps=4", *common) is None:
                continue
        compare_runs(found, name, plain[common], root / name.replace(" ", "_"), (*common, *other), tolerance)


def compare_runs(found: Found, name: str, known: Path, folder: Path, overrides: tuple[str, ...], tolerance: float) -> None:
    """Run once more, and keep by how much what it logs differs from a run that is there."""

    def compare() -> dict:
        result = run(folder, "loss=dpo", "n_steps=4", *overrides)
        return result | {"difference": largest_difference(logged(folder), logged(known)), "tolerance": tolerance}

    found.attempt(name, compare, must=lambda each: each["difference"] <= tolerance)


# ---- sharded ----------------------------------------------------------------------------------------------------------------


def fsdp(found: Found, settings: Settings) -> None:
    """FSDP with one process, over NCCL on a GPU, in every precision."""
    root = settings.work / "fsdp"
    cases = settings.choose(FSDP, {"float32": EXACT})
    if find_spec("bitsandbytes") is None:
        found.put("left out", "QLoRA: the package bitsandbytes is not installed")
        cases = {name: overrides for name, overrides in cases.items() if "QLoRA" not in name}
    for name, overrides in cases.items():
        folder = root / name.replace(", ", "_").replace(" ", "_")
        found.attempt(name, run, folder, "loss=dpo", "n_steps=4", *SHARDED, *overrides)
        if name in LIKE_ONE_DEVICE and not settings.is_cpu:
            compare_runs(found, f"{name}, one device", folder, root / f"one_{folder.name}", overrides, LIKE_ONE_DEVICE[name])


def several_gpus(found: Found, settings: Settings) -> None:
    """Whatever takes several GPUs, if there are several."""
    number = 0 if settings.is_cpu else torch.cuda.device_count()
    found.put("gpus", number)
    for name, overrides in SEVERAL.items() if number > 1 else ():
        folder = settings.work / "several" / name.replace(" ", "_")
        found.attempt(name, run, folder, "loss=dpo", "n_steps=3", *BFLOAT16, *overrides)


def speed_fsdp(found: Found, settings: Settings) -> None:
    """Tokens per second of FSDP with one process, over those without."""
    size = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16}
    size |= {"intermediate_size": 2816, "tie_word_embeddings": False}
    sizes = settings.choose((*shape(**size), "batch_size=256", "n_steps=20"), ("batch_size=16", "n_steps=4"))
    rates = {}
    for name, overrides in {"one": (), "sharded": SHARDED}.items():
        folder = settings.work / "speed_fsdp" / name
        dtype = settings.choose(BFLOAT16, ())
        if found.attempt(name, run, folder, "loss=dpo", *sizes, *dtype, *overrides, "save_strategy=no") is None:
            return
        steps = logged(folder)
        rates[name] = median(row["tokens_per_second"] for row in steps[len(steps) // 2 :])
    share = rates["sharded"] / rates["one"]
    found.put("tokens_per_second", rates | {"ratio": share}, passed=settings.is_cpu or share >= 0.95)
