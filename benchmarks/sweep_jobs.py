"""What the jobs of a sweep share already, and what sharing the loaded model under their adapters would add.

    python benchmarks/sweep_jobs.py

Eight LoRA jobs that differ in beta, on a Llama of 62M parameters in float32 and the embedded data, three ways: each as a
command of its own; as `train.py -m`, one after the other in a process; and so with one model in memory that each job gives
another adapter, by a few lines that stand only here. Of every job: processor seconds by what they went into, and the
process's peak memory up to its end. Results are on the disk as they come, in benchmarks/results/.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import hardware, peak_bytes, versions

ROOT = Path(__file__).resolve().parent.parent
BETAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
OPTIONS = (
    "datasets=toy", "loss=dpo", "+adapter=lora", "lr=1e-4", "n_eval_examples=8", "eval_every=1000000", "n_eval_model_samples=0",
    "wandb.enabled=false",
)  # fmt: skip
SHARES = "SWEEP_JOBS_SHARE_ONE_MODEL"


def save_model(folder: Path) -> None:
    """A Llama with random weights as a directory, so that jobs load it as they load any."""
    from memory_options import MODEL

    import train  # noqa: F401  registers the resolvers that the configuration uses
    from preference_training.configuration.validation import configured
    from preference_training.modeling import loading
    from preference_training.modeling.tokenizer import load_tokenizer

    config = configured(*MODEL)
    tokenizer = load_tokenizer(config.model)
    loading.save_model(loading.build_untrained(config.model, tokenizer), folder)
    tokenizer.save_pretrained(folder)


def timed(owner, name: str, phases: dict[str, float], phase: str) -> None:
    """Wrap a function to add the processor seconds of each call to those of a phase."""
    usual = getattr(owner, name)

    def function(*args, **kwargs):
        began = time.process_time()
        try:
            return usual(*args, **kwargs)
        finally:
            phases[phase] = phases.get(phase, 0.0) + time.process_time() - began

    setattr(owner, name, function)


def share_one_model() -> None:
    """Have a process's jobs train adapters of one model: each takes the one before out of it, and adds its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from preference_training.distributed import placement
    from preference_training.modeling.adapters.adding import add_adapter

    usual, kept = placement.OneProcess.load_policy, {}

    def load_policy(self):
        if not kept:
            kept["policy"], kept["began_with"] = usual(self), self.began_with
            return kept["policy"]
        policy, self.began_with = kept["policy"], kept["began_with"]
        for name, module in list(policy.named_modules()):
            if isinstance(module, BaseTunerLayer):
                path, _, leaf = name.rpartition(".")
                setattr(policy.get_submodule(path), leaf, module.get_base_layer())
        del policy.peft_config
        policy._hf_peft_config_loaded = False
        add_adapter(policy, self.config.model)
        return policy.train()

    placement.OneProcess.load_policy = load_policy


def run_jobs(arguments: list[str], results: Path) -> None:
    """`train.py` with these arguments in this process; a line of results for each job."""
    import peft  # noqa: F401

    import train
    import trainers
    from preference_training.distributed import placement
    from preference_training.training import assembly, preparation

    started = time.process_time()
    if SHARES in os.environ:
        share_one_model()
    phases: dict[str, float] = {}
    timed(preparation, "prepare_run", phases, "preparing data")
    timed(placement.OneProcess, "load_policy", phases, "the model: loading, hashing, proof of prefix sharing")
    timed(assembly, "make_reference", phases, "the reference's log-probs")
    timed(trainers.Trainer, "train", phases, "training, evaluations, checkpoints")
    usual = train.start

    def start(config, run_dir, *args, **kwargs):
        nonlocal started
        value = usual(config, run_dir, *args, **kwargs)
        found = {"beta": config.loss.beta, "cpu_seconds": time.process_time() - started, "phases": dict(phases)}
        losses = [json.loads(line).get("loss/train") for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        found |= {"peak_bytes": peak_bytes()["process"], "losses": [loss for loss in losses if loss is not None]}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        started = time.process_time()
        phases.clear()
        return value

    train.start = start
    with results.open("a") as file:
        file.write(json.dumps({"starting_cpu_seconds": started}) + "\n")
    sys.argv[1:] = arguments
    train.command_line()


def command(way: str, betas: tuple[float, ...], folder: Path, options: list[str]) -> list[dict]:
    """Run jobs as one command; its rows of results."""
    folder.mkdir()
    results, values = folder / "results.jsonl", ",".join(map(str, betas))
    places = [f"local_dirs=[{folder / 'runs'}]", f"cache_dir={folder / 'cache'}"]
    sweeps = [] if way == "separate" else ["-m", f"sweep_dir={folder / 'sweep'}"]
    environment = os.environ | ({SHARES: "1"} if way == "one model" else {})
    arguments = [*sweeps[:1], *options, f"loss.beta={values}", *places, *sweeps[1:]]
    # The folder's own data and reference: no way finds what another one has left.
    with (folder / "log").open("w") as log:
        subprocess.run([sys.executable, __file__, "--one", str(results), *arguments], env=environment, stdout=log, stderr=log)
    return [json.loads(line) for line in results.read_text().splitlines()]


def main() -> None:
    """Measure, print and save."""
    sys.path[:0] = [str(ROOT)]
    if "--one" in sys.argv:
        run_jobs(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=len(BETAS))
    parser.add_argument(
        "--separate", type=int, default=len(BETAS), help="how many of them are run as commands of their own too"
    )
    parser.add_argument("--examples", type=int, default=32)
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_sweep_jobs_cpu.json"
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "load_average": [os.getloadavg()], "ways": {}}
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        save_model(Path(folder) / "model")
        options = [
            "model=blank_model",
            f"model.name_or_path={folder}/model",
            "batch_size=8",
            f"n_examples={args.examples}",
            *OPTIONS,
        ]
        betas = BETAS[: args.jobs]
        commands = [("sweep", betas), ("one model", betas), *(("separate", (beta,)) for beta in betas[: args.separate])]
        for number, (way, own) in enumerate(commands):
            facts["ways"].setdefault(way, []).append(command(way, own, Path(folder) / str(number), options))
            facts["load_average"].append(os.getloadavg())
            path.write_text(json.dumps(facts, indent=1) + "\n")
            print(way, facts["ways"][way][-1], sep="\n", flush=True)
    print(path)


if __name__ == "__main__":
    main()
