"""The effect of each option that saves memory or time on a training step, for a Llama with 62M parameters in float32.

    python benchmarks/memory_options.py --rounds 2
    python benchmarks/memory_options.py --held        what a pack holds between its passes, by kind of activation checkpointing

DPO with a live reference on the embedded data, in packs of at most 512 tokens; each setting runs in its own process, in turn.
Prints a JSON object with raw values, and writes it to benchmarks/results/.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

MODEL = (
    "model=blank_model", "model.tokenizer_name_or_path=byte_level",
    "++model.from_config={model_type: llama, hidden_size: 640, intermediate_size: 1792, num_hidden_layers: 12, "
    "num_attention_heads: 10, num_key_value_heads: 10, max_position_embeddings: 512}",
)  # fmt: skip
RUN = (
    "loss=dpo", "batch_size=16", "lr=1e-6", "warmup_steps=0", "max_tokens_per_microbatch=512", "wandb.enabled=false",
    "reference_logps=live", "prefix_sharing=on",
)  # fmt: skip
SETTINGS = {
    "all weights, RMSprop": [],
    "all weights, AdamW": ["optimizer=AdamW"],
    "all weights, AdamW8bit": ["optimizer=AdamW8bit"],
    "all weights, Muon": ["optimizer=Muon"],
    "all weights, Adafactor": ["optimizer=Adafactor", "lr=3e-5"],
    "all weights, AdamWScheduleFree": ["optimizer=AdamWScheduleFree"],
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
}
STEPS = 4


def status(name: str) -> int:
    """A field of this process's memory status, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def one(overrides: list[str]) -> dict:
    """Run steps with a setting in this process; returns the seconds of each, and the peak memory above that before."""

    from preference_training.configuration.validation import configured
    from preference_training.core.machine import quiet_libraries, tune_malloc
    from preference_training.core.random_streams import seed_everything
    from preference_training.data.entries import read_entries
    from preference_training.losses.registry import build_loss
    from preference_training.modeling.tokenizer import load_tokenizer
    from preference_training.tracking.tracker import NoTracker
    from preference_training.training import assembly, preparation
    from preference_training.training.parts import Observers
    from trainers import BasicTrainer, placement_for

    config = configured(*MODEL, *RUN, *overrides)
    quiet_libraries()
    # Return freed memory to the system, so that the peak is memory in use.
    tune_malloc(keep_freed=False)
    seed_everything(0)
    tokenizer, loss = load_tokenizer(config.model), build_loss(**config.loss.given())
    data = preparation.prepare_data(config, read_entries(config), tokenizer, loss)
    placement = placement_for(config).start(config, tokenizer)
    import_libraries(config)
    before = status("VmRSS")
    prepared = preparation.PreparedRun(config, Path(), False, loss, tokenizer, data)
    models, batches = assembly.assemble(prepared, placement)
    trainer = BasicTrainer(placement, models, batches, Observers(NoTracker()))
    held = status("VmRSS") - before
    # Loading holds the full weights briefly, whatever is trained.
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for batch in batches.train:
        started = time.perf_counter()
        metrics = trainer.train_step(batch)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == STEPS:
            break
    trained = sum(weight.numel() for weight in models.policy.parameters() if weight.requires_grad)
    return {
        "held_before_steps": held,
        "peak_in_steps": status("VmHWM") - before,
        "seconds": seconds,
        "trained": trained,
        "loss": metrics["loss/train"],
    }


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


def import_libraries(config) -> None:
    """Import the libraries that a setting needs, so that they are not measured."""

    if config.model.lora.r is not None:
        import peft  # noqa: F401
    package = config.optimizer_facts.package
    importlib.import_module("bitsandbytes" if config.model.quantization else package)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--held", action="store_true", help="count what a pack holds between its passes, instead")
    args = parser.parse_args()
    if args.held:
        from measure import hardware, versions

        facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "held": held_between_passes()}
        path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_held_activations_cpu.json"
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps(facts["held"], indent=1), path, sep="\n")
        return
    if args.one is not None:
        with contextlib.redirect_stdout(sys.stderr):
            found = one(SETTINGS[args.one])
        print(json.dumps(found))
        return
    from measure import hardware, versions

    runs: dict[str, list[dict]] = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, listed in runs.items():
            done = subprocess.run([sys.executable, __file__, "--one", name], check=True, stdout=subprocess.PIPE, text=True)
            listed.append(json.loads(done.stdout.splitlines()[-1]))
    whole = runs["all weights, RMSprop"]
    summary = {
        name: {
            "peak MiB": [round(run["peak_in_steps"] / 2**20) for run in listed],
            "peak / all weights": [
                run["peak_in_steps"] / other["peak_in_steps"] for run, other in zip(listed, whole, strict=True)
            ],
            "seconds of a step": [round(statistics.median(run["seconds"][1:]), 2) for run in listed],
        }
        for name, listed in runs.items()
    }
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "load_average": os.getloadavg()}
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_memory_options_cpu.json"
    path.write_text(json.dumps(facts | {"summary": summary, "runs": runs}, indent=1) + "\n")
    print(json.dumps(summary, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
