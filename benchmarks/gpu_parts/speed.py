"""Training steps: tokens and pairs per second, memory, and the share of the device's arithmetic that is useful.

The first half of a run's steps warms up: kernels are compiled for new lengths there.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import measure
import torch

from gpu_parts.found import Found, Settings
from gpu_parts.making import (
    BILLION,
    EIGHT_BILLION,
    build_config,
    dialogues,
    make_trainer,
    peak_memory,
    random_prompts,
    small_of,
)
from preference_training.batching import micro_batches, tries
from preference_training.batching.tries import TrieLayout
from preference_training.core.gpu_peaks import peak_tflops
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.utilization import step_flops
from preference_training.modeling.logprobs import CachedReference

HERE = Path(__file__).resolve().parents[1]
# What must be reached on a GPU; see docs/memory-and-speed.md.
USEFUL_MFU, LARGE_MFU, SYSTEM_SPEEDUP, PREPARATION_SHARE = 0.45, 0.42, 2.0, 0.01
BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Job:
    """What is trained: a model, its rows and further overrides. size: pairs of a step."""

    model: dict
    prompts: Sequence[TokenizedPrompt]
    size: int
    overrides: tuple[str, ...] = ()


def job(settings: Settings, model: dict, prompts: Sequence[TokenizedPrompt], size: int, *overrides: str) -> Job:
    """A job in the size of this machine."""
    return Job(settings.choose(model, small_of(model)), prompts, size, overrides)


def speed_hh(found: Found, settings: Settings) -> None:
    """DPO with the lengths of HH's dialogues, 1.4B GPT-NeoX: as a trie, and padded."""
    size, steps = settings.choose((64, 14), (4, 3))
    prompts = dialogues(size * steps, vocabulary(settings, BILLION), shrink=settings.choose(1, 8))
    each = job(settings, BILLION, prompts, size)
    reached = lambda result: settings.is_cpu or is_right(result, USEFUL_MFU)  # noqa: E731
    trie = found.attempt("trie", train, each, settings, must=reached)
    padded = found.attempt("padded", train, job(settings, BILLION, prompts, size, "prefix_sharing=off"), settings)
    compare(found, trie, padded)


def speed_answers(found: Found, settings: Settings) -> None:
    """DPO with 7 responses and 21 pairs a prompt."""
    size, steps = settings.choose((168, 10), (21, 3))
    long, short = {"prompt": (100, 100), "response": (150, 150)}, {"prompt": (12, 12), "response": (9, 9)}
    lengths = settings.choose(long, short)
    drawn = random_prompts(0, size // 21 * steps, vocabulary(settings, BILLION), responses=7, **lengths)
    pairs = [(one, other) for one in range(7) for other in range(one + 1, 7)]
    prompts = [TokenizedPrompt(each.prompt_ids, each.responses, pairs, number=place) for place, each in enumerate(drawn)]
    trie = found.attempt("trie", train, job(settings, BILLION, prompts, size), settings)
    padded = found.attempt("padded", train, job(settings, BILLION, prompts, size, "prefix_sharing=off"), settings)
    compare(found, trie, padded)


def speed_system(found: Found, settings: Settings) -> None:
    """DPO behind a system prompt of 300 tokens that all rows share; and the same where only pairs share their prompts."""
    size, steps = settings.choose((64, 10), (4, 3))
    prompts = dialogues(size * steps, vocabulary(settings, BILLION), system=300, shrink=settings.choose(1, 8))
    each = job(settings, BILLION, prompts, size)
    trie = found.attempt("trie", train, each, settings)
    usual, tries.MIN_SHARED = tries.MIN_SHARED, sys.maxsize
    try:
        apart = found.attempt("prompts apart", train, each, settings)
    finally:
        tries.MIN_SHARED = usual
    compare(found, trie, apart, settings.choose(SYSTEM_SPEEDUP, None))


def speed_large(found: Found, settings: Settings) -> None:
    """DPO with LoRA on a model of the shape of Llama 3.1 8B; packs of about 4,096 tokens."""
    # At about 208 tokens a pair.
    size, steps = settings.choose((36, 8), (4, 3))
    prompts = dialogues(size * steps, vocabulary(settings, EIGHT_BILLION), shrink=settings.choose(1, 8))
    overrides = ("+adapter=lora", "max_tokens_per_microbatch=4096")
    reached = lambda result: settings.is_cpu or is_right(result, LARGE_MFU)  # noqa: E731
    trie = found.attempt("trie", train, job(settings, EIGHT_BILLION, prompts, size, *overrides), settings, must=reached)
    if settings.is_cpu:
        return
    short = job(settings, EIGHT_BILLION, prompts[: size * 4], size, *overrides, "prefix_sharing=off")
    compare(found, trie, found.attempt("padded", train, short, settings))


def speed_trl(found: Found, settings: Settings) -> None:
    """`gpu.py`, one round of a few steps, against TRL where it is installed."""
    if find_spec("trl") is None or settings.is_cpu:
        found.put("left_out", "on a CPU it is bench.py's" if settings.is_cpu else "trl is not installed")
        return
    works = ["dpo_hh_live", "dpo_21_pairs", "dpo_system"]
    command = [sys.executable, str(HERE / "gpu.py"), "--rounds", "1", "--steps", "6", "--results", str(settings.work / "trl")]
    done = subprocess.run([*command, "--work", *works], capture_output=True, text=True, check=False)
    found.put("output", done.stdout[-6000:], passed=done.returncode == 0)


def vocabulary(settings: Settings, model: dict) -> int:
    """The entries of a model's vocabulary on this machine."""
    return settings.choose(model, small_of(model))["vocab_size"]


def train(each: Job, settings: Settings) -> dict:
    """Train on all prompts of a job; what a step takes."""
    preparing: list[float] = []
    masks: list[float] = []
    unwrapped = micro_batches.build_packs, TrieLayout._block_mask
    try:
        # Packs are built in a thread of their own, beside the step before.
        measure.clocked(micro_batches, "build_packs", preparing, time.thread_time)
        measure.clocked(TrieLayout, "_block_mask", masks)
        with peak_memory(settings) as memory:
            result = steps_of(each, settings)
    finally:
        micro_batches.build_packs, TrieLayout._block_mask = unwrapped
        gc.collect()
    half = len(result["seconds"]) // 2
    usual = median(result["seconds"][half:])
    result["preparation_share"] = median(preparing[half:]) / usual
    # Of all packs of a step.
    result["mask_share"] = median(masks) * len(masks) / len(result["seconds"]) / usual if masks else 0.0
    return result | {name: round(value, 2) for name, value in memory.items()}


def steps_of(each: Job, settings: Settings) -> dict:
    """The steps of a job: losses, seconds, rates over their second half."""
    dtype = settings.choose(BFLOAT16, "float32")
    config = build_config(each.model, dtype, f"batch_size={each.size}", "max_length=2048", *each.overrides)
    trainer = make_trainer(config, settings, each.prompts)
    clock, losses, tokens = measure.Clock(), [], []
    clock.start()
    for batch in trainer.batches.train:
        before = trainer.state.tokens
        losses.append(round(trainer.train_step(batch)["loss/train"], 5))
        clock.tick()
        tokens.append(trainer.state.tokens - before)
    half = len(tokens) // 2
    seconds = sum(clock.seconds[half:])
    rate = sum(tokens[half:]) / seconds
    flops = step_flops(trainer.models.policy, not isinstance(trainer.models.reference, CachedReference)) * rate
    return {
        "losses": losses[:4],
        "seconds": [round(value, 3) for value in clock.seconds],
        "tokens_a_step": round(sum(tokens) / len(tokens)),
        "tokens_per_second": round(rate),
        "pairs_per_second": round(each.size * (len(tokens) - half) / seconds, 2),
        "useful_tflops": round(flops / 1e12, 2),
        **shares(flops, settings),
    }


def shares(flops: float, settings: Settings) -> dict:
    """Useful arithmetic over the peak of the device, and over what a large matrix product reaches."""
    if settings.is_cpu:
        return {}
    peak = peak_tflops(torch.cuda.get_device_name(), BFLOAT16, True)
    return {"mfu": peak and flops / peak / 1e12, "of_matrix_product": flops / measure.gemm_flops(8192, BFLOAT16)}


def is_right(result: dict, mfu: float) -> bool:
    """Whether a run begins at ln 2, is as fast as it must be, and prepares its batches in next to no time."""
    prepared = result["preparation_share"] < PREPARATION_SHARE and result["mask_share"] < PREPARATION_SHARE
    return abs(result["losses"][0] - 0.69315) < 1e-4 and (result["mfu"] is None or result["mfu"] >= mfu) and prepared


def compare(found: Found, one: dict | None, other: dict | None, least: float | None = None) -> None:
    """The first run over the second: pairs per second, and memory where it is measured. least: what must be reached."""
    if one is None or other is None:
        return
    ratios = {"pairs_per_second": one["pairs_per_second"] / other["pairs_per_second"]}
    if "peak_gb" in one:
        ratios["peak_memory"] = one["peak_gb"] / other["peak_gb"]
    difference = max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))
    reached = least is None or ratios["pairs_per_second"] >= least
    found.put("ratio", ratios | {"loss_difference": difference}, passed=reached and difference < 2e-2)
