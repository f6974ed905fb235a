"""Training on two processes compared with one, on the same cores: speed, memory, checkpoints, sampling.

    python benchmarks/sharded.py speed        # pairs per second: two processes with one thread each, and one with two
    python benchmarks/sharded.py memory       # peak memory per process for weights, gradients and optimizer states
    python benchmarks/sharded.py checkpoint   # time and peak memory of saving and loading, per process
    python benchmarks/sharded.py sampling     # seconds to sample responses to held-out prompts

Prints a JSON object with raw values. The model is a random Llama with 58M parameters, 500M for memory and checkpoints.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Workers import pickled objects by module name.
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'benchmarks'}"

WIDTHS = {
    "58M": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 10},
    "500M": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 16},
}


def overrides(size: str, trainer: str) -> list[str]:
    """The command line of a run with a given model."""
    model = WIDTHS[size] | {"num_key_value_heads": WIDTHS[size]["num_attention_heads"], "tie_word_embeddings": False}
    return [
        *(f"++model.from_config.{key}={value}" for key, value in model.items()),
        f"trainer={trainer}", "wandb.enabled=false", "optimizer=AdamW", "lr=1e-5", "save_async=false",
        "n_eval_model_samples=4",
    ]  # fmt: skip


def work(what: str, given: list[str]) -> list:
    """The work of one process; returns the results of all processes."""
    import torch

    from preference_training.configuration.validation import configured
    from preference_training.core.machine import quiet_libraries, tune_malloc
    from preference_training.data.entries import read_entries
    from preference_training.losses.registry import build_loss
    from preference_training.modeling.tokenizer import load_tokenizer
    from preference_training.tracking.tracker import NoTracker
    from preference_training.training import assembly, preparation
    from preference_training.training.parts import Observers
    from trainers import TRAINERS, placement_for

    # Standard output is reserved for the report.
    sys.stdout = sys.stderr
    quiet_libraries()
    config = configured(*given)
    tune_malloc(keep_freed=not config.trainer.is_sharded)
    tokenizer = load_tokenizer(config.model)
    loss = build_loss(**config.loss.given())
    data = preparation.prepare_data(config, read_entries(config), tokenizer, loss)
    placement = placement_for(config).start(config, tokenizer)
    before = resident_bytes(reset_peak=True)
    prepared = preparation.PreparedRun(config, Path(), False, loss, tokenizer, data)
    models, batches = assembly.assemble(prepared, placement)
    trainer = TRAINERS[config.trainer.name](placement, models, batches, Observers(NoTracker()))
    result = {
        "parameters": sum(weight.numel() for weight in trainer.models.policy.parameters()),
        "threads": torch.get_num_threads(),
    }
    result |= MEASURES[what](trainer, before)
    result = placement.ranks.all_gather_object(result)
    placement.end()
    return result


def resident_bytes(reset_peak: bool = False) -> int:
    """The current memory of this process; optionally resets the peak."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The peak memory of this process since the last reset."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure_speed(trainer, _before: int) -> dict:
    """Seconds of each step, after two warm-up steps."""
    seconds = []
    for number, batch in enumerate(trainer.batches.train):
        started = time.perf_counter()
        trainer.train_step(batch)
        seconds.append(time.perf_counter() - started)
        if number == 5:
            break
    return {"seconds": seconds[2:], "pairs": trainer.config.batch_size}


def measure_memory(trainer, before: int) -> dict:
    """Peak memory of a few steps on a tiny batch, above the memory before loading the model."""
    loaded = peak_bytes() - before
    resident_bytes(reset_peak=True)
    for number, batch in enumerate(trainer.batches.train):
        trainer.train_step(batch)
        if number == 2:
            break
    state = [value for values in trainer.step.updater.optimizer.state.values() for value in values.values()]
    held = [*trainer.models.policy.parameters(), *state]
    from preference_training.core.process_group import to_local

    return {
        "peak_while_loading": loaded,
        "peak_in_steps": peak_bytes() - before,
        "weights_and_optimizer": sum(to_local(tensor).numel() * tensor.element_size() for tensor in held),
    }


def measure_checkpoint(trainer, before: int) -> dict:
    """Seconds and memory growth of a synchronous save, a background save, and a load."""
    from preference_training.checkpointing.checkpoint import Checkpoint
    from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions

    trainer.train_step(next(iter(trainer.batches.train)))
    result = {}
    folder = Path(trainer.placement.ranks.broadcast(tempfile.mkdtemp(dir=os.environ.get("CHECKPOINTS"))))
    for name, background in (("save", False), ("save_async", True)):
        with CheckpointWriter(
            folder,
            trainer.models.policy,
            trainer.placement.tokenizer,
            trainer.placement.ranks,
            SaveOptions(background=background, keep_last=1),
        ) as writer:
            trainer.placement.ranks.barrier()
            held = resident_bytes(reset_peak=True)
            started = time.perf_counter()
            writer.write(trainer.snapshot())
            stalled = time.perf_counter() - started
            writer.wait()
            trainer.placement.ranks.barrier()
            seconds = time.perf_counter() - started
            result[name] = {"stalled": stalled, "seconds": seconds, "growth": peak_bytes() - held}
            trainer.state.examples += 1
    trainer.placement.ranks.barrier()
    held = resident_bytes(reset_peak=True)
    started = time.perf_counter()
    trainer.continue_from(Checkpoint.read(folder / "LATEST"))
    result["load"] = {"seconds": time.perf_counter() - started, "growth": peak_bytes() - held}
    trainer.placement.ranks.barrier()
    result["held"] = resident_bytes() - before
    if trainer.placement.ranks.is_rank_zero:
        import shutil

        result["bytes"] = sum(file.stat().st_size for file in (folder / "LATEST").resolve().rglob("*") if file.is_file())
        shutil.rmtree(folder)
    return result


def measure_sampling(trainer, _before: int) -> dict:
    """Seconds to sample responses to four prompts."""
    started = time.perf_counter()
    answers = trainer.evaluator.responses()
    return {"seconds": time.perf_counter() - started, "characters": sum(map(len, answers)), "prompts": len(answers)}


MEASURES = {"speed": measure_speed, "memory": measure_memory, "checkpoint": measure_checkpoint, "sampling": measure_sampling}


def measure(what: str, processes: int, more: list[str]) -> list:
    """Run all processes once; returns their results."""
    from preference_training.distributed.launching import launch

    size = "500M" if what in ("memory", "checkpoint") else "58M"
    trainer = "BasicTrainer" if processes == 1 else "FSDPTrainer"
    return launch(work, (what, [*overrides(size, trainer), *SETTINGS[what], *more]), processes, None)


SETTINGS = {
    "speed": ["loss=dpo", "batch_size=16", "n_epochs=1"],
    "memory": ["loss=sft", "batch_size=2", "n_examples=16"],
    "checkpoint": ["loss=sft", "batch_size=2", "n_examples=16"],
    "sampling": ["loss=sft", "sample_during_eval=true", "n_eval_model_samples=4", "max_length=160"],
}


def main() -> None:
    """Alternate between one process and two, and print the results and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, such as trainer.sharding=grad_op")
    args = parser.parse_intermixed_args()
    from measure import hardware, versions

    results = {1: [], 2: []}
    for _ in range(args.rounds):
        for processes in results:
            # BasicTrainer does not have the keys of the sharded trainers.
            more = [text for text in args.overrides if processes > 1 or not text.startswith("trainer.")]
            os.environ.pop("OMP_NUM_THREADS", None)
            results[processes].append(measure(args.what, processes, more))
    report = {
        "what": args.what,
        "overrides": args.overrides,
        "hardware": hardware(),
        "versions": versions(),
        "one": results[1],
        "two": results[2],
    }
    if args.what == "speed":
        rates = {count: [statistics.median(run[0]["seconds"]) for run in runs] for count, runs in results.items()}
        report["ratios"] = [one / two for one, two in zip(rates[1], rates[2], strict=True)]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
