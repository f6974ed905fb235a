"""Train SFT, then DPO, on the embedded model and data, and compare the results. No network; a minute or two.

python scripts/demo.py [DIRECTORY]      # make demo
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves

ROOT = Path(__file__).resolve().parent.parent

SFT = ["loss=sft", "exp_name=demo_sft"]
# SGD, because its steps shrink with the gradient: on pairs this easy the loss is soon near 0, where the full-sized steps of
# AdamW would destroy what SFT taught such a small model. For the same reason beta is 0.5: the gradient vanishes at a fifth of
# the distance from SFT that beta 0.1 would require.
BETA = 0.5
DPO = ["loss=dpo", f"loss.beta={BETA}", "exp_name=demo_dpo", "n_epochs=1", "optimizer=SGD", "lr=0.01"]
# Rows that compare a model with SFT, from which DPO started; they are meaningless for the untrained model.
REWARD_ROWS = ("DPO loss", "reward accuracy", "reward margin")


def train(directory: Path, overrides: list[str]) -> Path:
    """Run one command line, as a user would, into `directory`; returns its LATEST."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides, "wandb.enabled=false", f"local_run_dir={directory}"]
    shown = " ".join(["python train.py", *command[2:]])
    print(f"\n$ {shown}", flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"the demo stopped because this command failed: {shown}")
    return directory / "LATEST"


def main() -> None:
    """Train SFT and DPO, then compare the untrained model, SFT and DPO on held-out prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "runs" / f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    parser.add_argument("directory", nargs="?", type=Path, default=default, metavar="DIRECTORY")
    directory = parser.parse_args().directory
    started = time.monotonic()
    sft = train(directory / "sft", SFT)
    dpo = train(directory / "dpo", [*DPO, f"model.archive={sft}"])
    seconds = time.monotonic() - started
    report(directory, sft, dpo)
    print(f"\nTraining took {seconds:.0f} s. Output in {directory}:")
    print("  sft/LATEST, dpo/LATEST   the models, for AutoModelForCausalLM.from_pretrained(...)")
    print("  */metrics.jsonl          the metrics of all steps and evaluations")
    print("  */samples.jsonl          sampled responses at each evaluation")
    print("  results.json             the numbers of the table")


def report(directory: Path, sft: Path, dpo: Path) -> None:
    """Print the table, and three prompts with their responses."""
    import torch

    from preference_training.configuration.saved import read_config
    from preference_training.configuration.schema import RunConfig
    from preference_training.core.machine import quiet_libraries
    from preference_training.core.random_streams import seed_everything
    from preference_training.modeling.loading import load_model
    from preference_training.modeling.logprobs import LiveReference
    from preference_training.modeling.tokenizer import load_tokenizer

    quiet_libraries()
    config = RunConfig.of(read_config(directory / "sft"))
    tokenizer = load_tokenizer(config.model)
    seed_everything(config.seed)
    models = {"untrained": load_model(config.model, tokenizer)}
    for name, archive in (("SFT", sft), ("DPO", dpo)):
        models[name] = load_model(replace(config.model, archive=str(archive)), tokenizer)
    with torch.no_grad():
        columns = {name: describe(model, LiveReference(models["SFT"]), tokenizer, config) for name, model in models.items()}
    numbers = {name: column["means"] for name, column in columns.items()}
    (directory / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    for row in REWARD_ROWS:
        columns["untrained"]["table"][row] = "-"
    prompts = held_out_prompts(tokenizer, config, paired=True)
    print(f"\n{len(prompts)} held-out prompts; [95% interval]; rewards are relative to SFT\n")
    print(f"{'':42}" + "".join(f"{name:>26}" for name in columns))
    for row in columns["SFT"]["table"]:
        print(f"{row:42}" + "".join(f"{column['table'][row]:>26}" for column in columns.values()))
    for index, prompt in enumerate(islice(prompts, 3)):
        print(f"\n{tokenizer.decode(prompt.prompt_ids).strip()}")
        for name, column in columns.items():
            print(f"  {name:10}{column['responses'][index]!r}")


def held_out_prompts(tokenizer, config, paired: bool):
    """The tokenized test split of the toy data."""
    from preference_training.data.entries import load_records, read_entry
    from preference_training.data.prompt_table import PromptTable
    from preference_training.data.rendering.settings import TokenSettings
    from preference_training.data.tokenization import tokenize_records

    settings = TokenSettings("pairs" if paired else "targets", config.max_length, config.max_prompt_length)
    return PromptTable.of(tokenize_records(load_records(read_entry("toy"), "test"), tokenizer, settings))


def describe(model, reference, tokenizer, config) -> dict:
    """A model's column of the table, and its response to every held-out prompt."""
    import torch

    from preference_training.batching.micro_batches import evaluation_batches
    from preference_training.data.toy_preferences import response_kind
    from preference_training.evaluation.held_out import evaluate_held_out
    from preference_training.evaluation.intervals import mean_interval, share_interval
    from preference_training.evaluation.phrasing import with_interval
    from preference_training.generation.sampling import Sampler
    from preference_training.losses.registry import build_loss

    pairs, targets = (held_out_prompts(tokenizer, config, paired) for paired in (True, False))
    dpo = evaluate_held_out(
        model, reference, build_loss("dpo", beta=BETA), evaluation_batches(pairs, 64, None, config.seed)
    ).examples
    sft = evaluate_held_out(model, None, build_loss("sft"), evaluation_batches(targets, 64, None, config.seed)).examples
    sampler = Sampler(tokenizer, config.max_length, config.seed)
    responses = sampler.texts(model, [prompt.prompt_ids for prompt in pairs])
    preferred = torch.tensor([float(response_kind(response) == "preferred") for response in responses])
    rows = {
        "SFT loss (nats per response)": (sft["loss/eval"], mean_interval),
        REWARD_ROWS[0]: (dpo["loss/eval"], mean_interval),
        REWARD_ROWS[1]: (dpo["rewards_eval/accuracies"], share_interval),
        REWARD_ROWS[2]: (dpo["rewards_eval/margins"], mean_interval),
        "sampled responses of the preferred kind": (preferred, share_interval),
    }
    means = {name: values.mean().item() for name, (values, _) in rows.items()}
    table = {name: with_interval(means[name], *interval(values)) for name, (values, interval) in rows.items()}
    return {"means": means, "table": table, "responses": responses}


if __name__ == "__main__":
    main()
