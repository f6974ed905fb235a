"""One step under the profiler: the kernels that take its time, what the host waits for, and copies."""

import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recorded

from gpu_parts.found import Found, Settings
from gpu_parts.making import BILLION, build_config, dialogues, make_trainer, small_of, wait
from preference_training.batching.micro_batches import MicroBatch
from trainers import Trainer

# A step waits once, to read its numbers.
MOST_WAITS = 1


def profile(found: Found, settings: Settings) -> None:
    """Steps that warm up, one whose waits are counted, one that is recorded."""
    size, warm = settings.choose((64, 8), (4, 1))
    model = settings.choose(BILLION, small_of(BILLION))
    config = build_config(model, settings.choose("bfloat16", "float32"), f"batch_size={size}", "max_length=2048")
    trainer = make_trainer(config, settings, dialogues(size * (warm + 2), model["vocab_size"], shrink=settings.choose(1, 8)))
    batches = iter(trainer.batches.train)
    for _ in range(warm):
        trainer.train_step(next(batches))
    # Weights are compared before and after some steps, ever fewer; not in these.
    trainer.step.updater.first_full_step = -1 - (1 << 20)
    found.attempt("waits", waits, trainer, next(batches), settings, must=lambda each: sum(each["lines"].values()) <= MOST_WAITS)
    found.attempt("step", step, trainer, next(batches), settings)
    batches.close()


def waits(trainer: Trainer, batch: list[MicroBatch], settings: Settings) -> dict:
    """The lines that wait for the device in a step, as CUDA reports them."""
    if settings.is_cpu:
        trainer.train_step(batch)
        return {"lines": {}}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.train_step(batch)
    torch.cuda.set_sync_debug_mode("default")
    found = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in warned if "synchroniz" in str(each.message))
    return {"lines": dict(found)}


def step(trainer: Trainer, batch: list[MicroBatch], settings: Settings) -> dict:
    """The largest kernels of a step with their number and milliseconds, and the calls of the runtime."""
    activities = [ProfilerActivity.CPU, *settings.choose([ProfilerActivity.CUDA], [])]
    with recorded(activities=activities) as result:
        began = time.perf_counter()
        trainer.train_step(batch)
        wait(settings)
        seconds = time.perf_counter() - began
    events = result.key_averages()
    if settings.is_cpu:
        largest = sorted(events, key=lambda each: -each.self_cpu_time_total)[:8]
        times = [(each.key[:60], each.count, round(each.self_cpu_time_total / 1e3, 2)) for each in largest]
        return {"seconds": seconds, "largest": times}
    calls = [each for each in events if each.key.startswith(("cuda", "cuLaunch"))]
    kernels = [each for each in events if each not in calls and each.self_device_time_total > 0]
    largest = sorted(kernels, key=lambda each: -each.self_device_time_total)[:25]
    busy = sum(each.self_device_time_total for each in kernels) / 1e6
    return {
        "seconds": seconds,
        "device_busy": busy / seconds,
        "largest": [(each.key[:90], each.count, round(each.self_device_time_total / 1e3, 2)) for each in largest],
        "calls": {each.key: each.count for each in calls},
    }
