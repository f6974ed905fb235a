"""Code that passes its unit tests: SFT, then rounds of sampling, judging by tests, and DPO; pass@1 on held-out problems.

    python benchmarks/code_rounds.py runs/code_rounds

A model of a few million parameters learns the language of code_problems.py from a short SFT. Each round samples responses to
training problems, runs their tests in the sandbox, pairs responses that pass with those that do not, and trains DPO on them.
The 50 held-out problems of examples/code_problems.jsonl are composed otherwise than every problem that is trained on.

Prints pass@1 after SFT and after each round, with 95% intervals over problems, and writes them to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent

from code_problems import DIFFICULTIES, Problem, read_problems, tests_of, training_problems  # noqa: E402

from preference_training.core.processes import usable_cores  # noqa: E402
from preference_training.sandbox.pass_rates import Outcome, run_tests  # noqa: E402
from preference_training.sandbox.sandbox import Limits  # noqa: E402

# Of all tests of a program. They are one line each: what runs longer will not end.
LIMITS = Limits(cpu_seconds=1, wall_seconds=4, memory_mb=256, files_mb=1, output_kb=64)


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on. Prompts are numbers of problems; samples, of responses to a prompt."""

    seed: int = 0
    hidden_size: int = 128
    num_layers: int = 3
    vocab_size: int = 512
    sft_prompts: int = 1200
    sft_epochs: int = 4
    sft_lr: float = 2e-3
    rounds: int = 3
    round_prompts: int = 300
    samples: int = 8
    pairs_per_prompt: int = 8
    temperature: float = 1.0
    loss: str = "rpo"
    beta: float = 0.1
    alpha: float = 10.0
    dpo_lr: float = 5e-4
    dpo_epochs: int = 4
    eval_samples: int = 8


def make_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    """A byte-level BPE tokenizer of the problems' own language, as a directory that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def train(run_dir: Path, *overrides: str) -> None:
    """One run of train.py; its output is shown only if it fails."""
    command = [sys.executable, "train.py", *overrides, "wandb.enabled=false", "sample_during_eval=false"]
    done = subprocess.run([*command, f"local_run_dir={run_dir}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])


def rows_file(path: Path, rows: list[dict]) -> Path:
    """Write rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampled(checkpoint: Path, prompts: list[str], number: int, seed: int, temperature: float) -> list[list[str]]:
    """Responses of a checkpoint to each prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from preference_training.generation.sampling import Sampler
    from preference_training.generation.settings import GenerationSettings

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    settings = None if temperature == 1 else GenerationSettings(max_new_tokens=96, temperature=temperature)
    sampler = Sampler(tokenizer, 160, seed, settings=settings)
    found = sampler.samples(model, [tokenizer(prompt)["input_ids"] for prompt in prompts], number)
    return [[tokenizer.decode(each, skip_special_tokens=True) for each in some] for some in found]


def judged(responses: list[list[str]], tests: list[list[str]]) -> list[list[Outcome]]:
    """The outcome of each response."""
    flat = [response for some in responses for response in some]
    of_each = [of for of, some in zip(tests, responses, strict=True) for _ in some]
    outcomes = iter(run_tests(flat, of_each, usable_cores(), LIMITS))
    return [[next(outcomes) for _ in some] for some in responses]


def pairs_of(prompts: list[str], responses: list[list[str]], outcomes: list[list[Outcome]], most: int, seed: int) -> list[dict]:
    """Pairs of a response that passes all tests and one that does not."""
    draw, rows = random.Random(seed), []
    for prompt, some, results in zip(prompts, responses, outcomes, strict=True):
        good = sorted({text for text, result in zip(some, results, strict=True) if result.passed == result.total})
        bad = sorted({text for text, result in zip(some, results, strict=True) if result.passed < result.total})
        both = [(chosen, rejected) for chosen in good for rejected in bad]
        rows += [{"prompt": prompt, "chosen": c, "rejected": r} for c, r in draw.sample(both, min(most, len(both)))]
    return rows


def pass_at_1(outcomes: list[list[Outcome]], seed: int = 0) -> dict:
    """The mean over problems of the share of samples that pass, and its 95% interval by a bootstrap over problems."""
    shares = [sum(each.passed == each.total for each in some) / len(some) for some in outcomes]
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(shares, k=len(shares))) / len(shares) for _ in range(10_000))
    return {"pass@1": sum(shares) / len(shares), "low": means[250], "high": means[9749], "shares": shares}


def evaluated(checkpoint: Path, problems: list[dict], settings: Settings) -> dict:
    """pass@1 on held-out problems, in all and by difficulty."""
    prompts = [row["prompt"] + "\n" for row in problems]
    responses = sampled(checkpoint, prompts, settings.eval_samples, 10_000 + settings.seed, 1.0)
    outcomes = judged(responses, [row["tests"] for row in problems])
    by = {
        name: pass_at_1([some for some, row in zip(outcomes, problems, strict=True) if row["difficulty"] == name])["pass@1"]
        for name in DIFFICULTIES
    }
    return pass_at_1(outcomes) | {"by_difficulty": by}


def run(folder: Path, settings: Settings) -> Iterator[dict]:
    """SFT and all rounds: a row each. An SFT that the folder has already is not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    for_sft = training_problems(settings.sft_prompts, settings.seed)
    # Rounds ask other problems than SFT showed, but where they are drawn twice.
    rest = training_problems(settings.rounds * settings.round_prompts, settings.seed + 1000)
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        make_tokenizer(tokenizer, [f"{each.prompt}\n{each.solution}" for each in for_sft], settings.vocab_size)
    held_out = read_problems("held_out")
    common = (
        f"model.tokenizer_name_or_path={tokenizer}", f"model.from_config.hidden_size={settings.hidden_size}",
        f"model.from_config.intermediate_size={3 * settings.hidden_size}", "max_length=160", "max_prompt_length=96",
        f"model.from_config.num_hidden_layers={settings.num_layers}", f"seed={settings.seed}", "eval_every=1000000",
        "do_first_eval=false", "n_eval_examples=16", "batch_size=16",
    )  # fmt: skip
    started = time.monotonic()

    def row(name: str, checkpoint: Path, **more) -> dict:
        return {"after": name, **evaluated(checkpoint, held_out, settings), "seconds": time.monotonic() - started, **more}

    sft = rows_file(folder / "sft.jsonl", [{"prompt": each.prompt + "\n", "response": each.solution} for each in for_sft])
    if not (folder / "sft" / "LATEST").exists():
        options = ("loss=sft", f"n_epochs={settings.sft_epochs}", f"lr={settings.sft_lr}", "warmup_steps=20")
        train(folder / "sft", *common, f"datasets=[{sft}]", *options)
    checkpoint = folder / "sft" / "LATEST"
    yield row("sft", checkpoint)
    for number in range(1, settings.rounds + 1):
        some = rest[(number - 1) * settings.round_prompts : number * settings.round_prompts]
        pairs, facts = one_round(checkpoint, some, settings, number)
        file = rows_file(folder / f"pairs_{number}.jsonl", pairs)
        options = (f"loss={settings.loss}", f"loss.beta={settings.beta}", f"lr={settings.dpo_lr}", "warmup_steps=5")
        options += (f"n_epochs={settings.dpo_epochs}", f"model.archive={checkpoint}")
        options += (f"loss.alpha={settings.alpha}",) * (settings.loss == "rpo")
        train(folder / f"round_{number}", *common, f"datasets=[{file}]", *options)
        checkpoint = folder / f"round_{number}" / "LATEST"
        yield row(f"round {number}", checkpoint, **facts)


def one_round(checkpoint: Path, problems: list[Problem], settings: Settings, number: int) -> tuple[list[dict], dict]:
    """Pairs of one round, and its facts."""
    prompts = [each.prompt + "\n" for each in problems]
    begun = time.monotonic()
    responses = sampled(checkpoint, prompts, settings.samples, settings.seed + number, settings.temperature)
    sampled_at = time.monotonic()
    outcomes = judged(responses, [tests_of(each) for each in problems])
    pairs = pairs_of(prompts, responses, outcomes, settings.pairs_per_prompt, number)
    facts = {"train_pass@1": pass_at_1(outcomes)["pass@1"], "pairs": len(pairs)}
    return pairs, facts | {"sampling_seconds": sampled_at - begun, "judging_seconds": time.monotonic() - sampled_at}


def main() -> None:
    """Run, and report."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    folder, results = given.pop("folder").resolve(), given.pop("results")
    settings = Settings(**given)
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "settings": asdict(settings), "rows": []}
    path = results or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_code_rounds_cpu.json"
    for row in run(folder, settings):
        print(json.dumps({key: value for key, value in row.items() if key != "shares"}), flush=True)
        facts["rows"].append(row | {"load": os.getloadavg()[0]})
        path.write_text(json.dumps(facts, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
