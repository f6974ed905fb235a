"""The effect of each option on memory and time of a training step, each against its absence, for two models in float32.

    python benchmarks/memory_options.py               both models, every setting: about ten minutes on two cores
    python benchmarks/memory_options.py --model smollm2 --settings LoRA QLoRA        the settings whose names begin so
    python benchmarks/memory_options.py --held        what a pack holds between its passes, by kind of activation checkpointing

DPO with a live reference on the embedded data, 8 pairs a step in packs of at most 512 tokens. Each setting runs in its own
process, in turn. One that fails or takes too long is a result: its message stands in its place, and the others run; what they
print is in runs/memory_options.log. Results are on the disk as they come, in benchmarks/results/.
`python scripts/options_page.py` writes them into docs/options-that-pay.md.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent

MODEL = (
    "model=blank_model", "model.tokenizer_name_or_path=byte_level",
    "++model.from_config={model_type: llama, hidden_size: 640, intermediate_size: 1792, num_hidden_layers: 12, "
    "num_attention_heads: 10, num_key_value_heads: 10, max_position_embeddings: 512}",
)  # fmt: skip
RUN = (
    "loss=dpo", "batch_size=8", "lr=1e-6", "warmup_steps=0", "max_tokens_per_microbatch=512", "wandb.enabled=false",
    "reference_logps=live", "prefix_sharing=on",
)  # fmt: skip
MODELS = {"llama-62m": MODEL, "smollm2": ("model=smollm2-135m", "optimizer=RMSprop", "bf16=false")}
SETTINGS = {
    "all weights, RMSprop": [],
    "all weights, AdamW": ["optimizer=AdamW"],
    "all weights, AdamW8bit": ["optimizer=AdamW8bit"],
    "all weights, Muon": ["optimizer=Muon"],
    "all weights, Adafactor": ["optimizer=Adafactor", "lr=3e-5"],
    "all weights, AdamWScheduleFree": ["optimizer=AdamWScheduleFree", "lr_schedule=constant"],
    "all weights, GaLore of rank 64": ["optimizer=GaLore", "++optimizer_kwargs.rank=64"],
    "all weights, AdamW, averaged": ["optimizer=AdamW", "ema_decay=0.99"],
    "all weights, RMSprop, activation checkpointing": ["activation_checkpointing=true"],
    "all weights, RMSprop, selective checkpointing": ["activation_checkpointing=selective"],
    "all weights, RMSprop, compiled": ["compile=true"],
    "LoRA, RMSprop": ["+adapter=lora"],
    "DoRA, RMSprop": ["+adapter=dora"],
    "rsLoRA of rank 64, RMSprop": ["+adapter=rslora"],
    "PiSSA, RMSprop": ["+adapter=pissa"],
    "half of the matrices (Spectrum), RMSprop": ["model.spectrum_share=0.5"],
    "QLoRA, RMSprop": ["+adapter=qlora"],
    "QLoRA, RMSprop, activation checkpointing": ["+adapter=qlora", "activation_checkpointing=true"],
    "SFT of all weights, RMSprop": ["loss=sft"],
    "SFT of all weights, RMSprop, NEFTune": ["loss=sft", "model.neftune_alpha=5"],
}
# The setting that another one is compared with, where that is not the one that has its overrides but for the last.
AGAINST = {
    "all weights, AdamW8bit": "all weights, AdamW",
    "all weights, Muon": "all weights, AdamW",
    "all weights, Adafactor": "all weights, AdamW",
    "all weights, AdamWScheduleFree": "all weights, AdamW",
    "all weights, GaLore of rank 64": "all weights, AdamW",
    "DoRA, RMSprop": "LoRA, RMSprop",
    "rsLoRA of rank 64, RMSprop": "LoRA, RMSprop",
    "PiSSA, RMSprop": "LoRA, RMSprop",
    "QLoRA, RMSprop": "LoRA, RMSprop",
    "SFT of all weights, RMSprop": None,
}
# The first one is a warm-up. Slow settings take no more than two.
STEPS = 3
SLOW = 20.0
# What every setting imports; a setting's process is a fork of one that has.
HEAVY = (
    "train",
    "trainers",
    "preference_training.training.assembly",
    "peft",
    "bitsandbytes",
    "schedulefree",
    "pytorch_optimizer",
)


def against(name: str, settings: dict[str, list[str]]) -> str | None:
    """The setting that another one is compared with: itself without its option. None for the one that has no option."""
    if name in AGAINST:
        return AGAINST[name]
    without = settings[name][:-1]
    return next((other for other, overrides in settings.items() if overrides == without and other != name), None)


def last_ones(*overrides: str) -> tuple[str, ...]:
    """Overrides without those whose key has another one behind them."""
    return tuple({text.lstrip("+").partition("=")[0]: text for text in overrides}.values())


def status(name: str) -> int:
    """A field of this process's memory status, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def one(overrides: Iterable[str], run_dir: Path) -> dict:
    """Run steps with these overrides in this process; returns the seconds of each, and the peak memory above that before."""

    from preference_training.configuration.validation import configured
    from preference_training.core.machine import tune_malloc
    from preference_training.tracking.tracker import NoTracker
    from preference_training.training import assembly, preparation
    from preference_training.training.parts import Observers
    from trainers import BasicTrainer, placement_for

    prepared = preparation.prepare_run(configured(*overrides), run_dir)
    placement = placement_for(prepared.config).start(prepared.config, prepared.tokenizer)
    # Return freed memory to the system, so that the peak is memory in use.
    tune_malloc(keep_freed=False)
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    models, batches = assembly.assemble(prepared, placement)
    trainer = BasicTrainer(placement, models, batches, Observers(NoTracker()))
    held = status("VmRSS") - before
    # Loading holds the full weights briefly, whatever is trained.
    Path("/proc/self/clear_refs").write_text("5")
    seconds, cpu_seconds, metrics = [], [], {}
    for batch in batches.train:
        started, cpu_started = time.perf_counter(), time.process_time()
        metrics = trainer.train_step(batch)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        if len(seconds) == STEPS or (len(seconds) > 1 and sum(seconds) > SLOW):
            break
    trained = sum(weight.numel() for weight in models.policy.parameters() if weight.requires_grad)
    return {
        "held_before_steps": held,
        "peak_in_steps": status("VmHWM") - before,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "trained": trained,
        "loss": metrics["loss/train"],
    }


def _run_in_fork(results, overrides: tuple[str, ...], log: Path) -> None:
    """In a process of its own: `one`, or the first line of its error."""
    with (
        log.open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        TemporaryDirectory() as folder,
    ):
        try:
            results.send(one(overrides, Path(folder)))
        except BaseException as error:  # whatever it is, it is this setting's result
            import traceback

            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            results.send({"error": f"{type(error).__name__}: {lines[0]}"[:300]})


def measure(overrides: tuple[str, ...], limit: float, log: Path) -> dict:
    """`one` in a process of its own, for at most so many seconds; {"error": why} where it gives no numbers."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_in_fork, args=(sender, overrides, log))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"error": f"took longer than {limit:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"its process died, exit status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def held_between_passes() -> dict:
    """Bytes of the tensors that a pack's forward pass leaves for its backward pass, weights aside.

    By kind of activation checkpointing and dtype, for one pack of four prompts with two responses each.
    """
    import train  # noqa: F401  registers the resolver that the configuration uses
    from preference_training.batching.packing import iterate_examples, pack_examples
    from preference_training.configuration.validation import configured
    from preference_training.core.random_streams import seed_everything
    from preference_training.data.tokenization import TokenizedPrompt
    from preference_training.dry_run.memory_estimate import StorageCounter
    from preference_training.modeling.kernels import enable_activation_checkpointing
    from preference_training.modeling.loading import build_untrained
    from preference_training.modeling.logprobs import response_scores
    from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
    from preference_training.modeling.tokenizer import load_tokenizer

    responses = [[7] * 30, [8] * 30]
    prompts = [TokenizedPrompt([number] * 60, responses, [(0, 1)]) for number in range(10, 14)]
    pack = pack_examples(list(iterate_examples(prompts)))
    found: dict = {"tokens": len(pack.input_ids)}
    for dtype in ("float32", "bfloat16"):
        for kind in (False, "selective", True):
            seed_everything(0)
            config = configured(*MODEL, f"model.policy_dtype={dtype}")
            model = build_untrained(config.model, load_tokenizer(config.model))
            attend_over_tries(model)
            if kind:
                enable_activation_checkpointing(model, kind)
            with StorageCounter(vocabulary=0) as counter:
                for weight in model.parameters():
                    weight.view(-1)
                counter.kind = "activations"
                logps = response_scores(model, pack)
                counter.restart()
                held = counter.most()["activations"]
            logps.sum().backward()
            found[f"{dtype}, activation_checkpointing={str(kind).lower()}"] = held
    return found


def measure_all(models: Iterable[str], settings: dict[str, list[str]], args: argparse.Namespace, path: Path) -> dict:
    """Measure every setting of every model in turn, in each round; the raw results, on the disk as they come."""
    from measure import hardware, versions

    facts = {
        "command": sys.argv,
        "hardware": hardware(),
        "versions": versions(),
        "load_average": [os.getloadavg()],
        "models": {},
    }
    for model in models:
        entries = {name: {"overrides": own, "against": against(name, SETTINGS), "runs": []} for name, own in settings.items()}
        facts["models"][model] = {"overrides": [*MODELS[model], *RUN], "settings": entries}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in HEAVY if _is_there(name)])
    log = ROOT / "runs" / "memory_options.log"
    log.parent.mkdir(exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    for _ in range(args.rounds):
        for model in models:
            for name, entry in facts["models"][model]["settings"].items():
                limit = min(args.seconds, ends - time.monotonic())
                overrides = last_ones(*RUN, *MODELS[model], *entry["overrides"])
                found = measure(overrides, limit, log) if limit > 0 else {"error": f"the {args.minutes:g} minutes were over"}
                entry["runs"].append(found)
                facts["load_average"].append(os.getloadavg())
                path.write_text(json.dumps(facts, indent=1) + "\n")
                print(f"{model}: {name}: {_said(found)}", flush=True)
    return facts


def _is_there(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _said(found: dict) -> str:
    if "error" in found:
        return f"failed: {found['error']}"
    return f"{found['peak_in_steps'] / 2**20:.0f} MiB, {min(found['cpu_seconds'][1:]):.2f} s of processor time a step"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--settings", nargs="+", default=[""], help="only those whose names begin with one of these")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=90, help="how long a setting may take before it has failed")
    parser.add_argument("--minutes", type=float, default=10, help="how long all may take; settings that are left have failed")
    parser.add_argument("--results", type=Path, help="the file for raw results; by default one in benchmarks/results/")
    parser.add_argument("--held", action="store_true", help="count what a pack holds between its passes, instead")
    args = parser.parse_args()
    # Here and in the processes that are started.
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    results = ROOT / "benchmarks" / "results"
    if args.held:
        from measure import hardware, versions

        facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "held": held_between_passes()}
        path = results / f"{datetime.date.today()}_held_activations_cpu.json"
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps(facts["held"], indent=1), path, sep="\n")
        return
    settings = {name: own for name, own in SETTINGS.items() if name.startswith(tuple(args.settings))}
    path = args.results or results / f"{datetime.date.today()}_memory_options_cpu.json"
    measure_all(args.model, settings, args, path)
    print(path)


if __name__ == "__main__":
    main()
