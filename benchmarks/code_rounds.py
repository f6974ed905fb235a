"""Code that passes its unit tests: SFT, then rounds with tests as the only judge; pass@1 on held-out problems.

    python benchmarks/code_rounds.py runs/code_rounds

A model of 0.7 million parameters learns the language of code_problems.py from a short SFT. Then one `train.py +rounds=default`
samples responses to further problems, runs their tests, pairs responses that pass them all with those that do not, trains on
the pairs, and does it again. The 50 held-out problems of examples/code_problems.jsonl are composed otherwise than every problem
that is trained on. All numbers are read from the files of the loop.

Prints pass@1 after SFT and after each round, with 95% intervals over problems, and writes them to benchmarks/results/. What is
done already in the folder is not repeated. `--loop NAME` is another loop from the same SFT, for other settings.
"""

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent

from code_problems import DIFFICULTIES, Problem, read_problems, tests_of, training_problems, wrong_solution  # noqa: E402
from measure import cpu_seconds  # noqa: E402

from preference_training.evaluation.intervals import estimate, mean_interval, share_interval  # noqa: E402
from preference_training.rounds.loop import PROMPTS  # noqa: E402
from preference_training.rounds.prompts import read_stored  # noqa: E402
from preference_training.rounds.tables import read_table  # noqa: E402


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on.

    sft_wrong: the share of SFT's solutions that are wrong in one part. prompts: problems for all rounds, of which each takes
    the next round_prompts. samples: responses to a prompt.
    """

    seed: int = 0
    hidden_size: int = 128
    num_layers: int = 3
    vocab_size: int = 512
    sft_prompts: int = 2400
    sft_wrong: float = 0.5
    sft_epochs: int = 4
    sft_lr: float = 2e-3
    prompts: int = 900
    rounds: int = 3
    round_prompts: int = 300
    samples: int = 8
    loss: str = "rpo"
    beta: float = 0.1
    alpha: float = 10.0
    lr: float = 2e-4
    epochs: int = 2
    eval_samples: int = 8


# ---- what is trained on --------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    """A byte-level BPE tokenizer of the problems' own language, as a directory that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def prompt_of(problem: Problem) -> dict:
    """A row of rounds.prompts."""
    return {"prompt": problem.prompt + "\n", "tests": tests_of(problem)}


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, settings: Settings) -> None:
    """Write the tokenizer and all data: sft.jsonl, prompts.jsonl, held_out.jsonl."""
    if (folder / "held_out.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for_sft = training_problems(settings.sft_prompts, settings.seed)
    # Rounds ask other problems than SFT showed, but where they are drawn twice.
    for_rounds = training_problems(settings.prompts, settings.seed + 1000)
    make_tokenizer(folder / "tokenizer", [f"{each.prompt}\n{each.solution}" for each in for_sft], settings.vocab_size)
    draw = random.Random(settings.seed)
    answers = [wrong_solution(each, draw) if draw.random() < settings.sft_wrong else each.solution for each in for_sft]
    rows = [{"prompt": each.prompt + "\n", "response": answer} for each, answer in zip(for_sft, answers, strict=True)]
    write_rows(folder / "sft.jsonl", rows)
    write_rows(folder / "prompts.jsonl", [prompt_of(each) for each in for_rounds])
    write_rows(folder / "held_out.jsonl", [row | {"prompt": row["prompt"] + "\n"} for row in read_problems("held_out")])


# ---- training ------------------------------------------------------------------------------------------------------------


def common_keys(folder: Path, settings: Settings) -> list[str]:
    """Of SFT and rounds alike."""
    return [
        f"model.tokenizer_name_or_path={folder / 'tokenizer'}", f"model.from_config.hidden_size={settings.hidden_size}",
        f"model.from_config.intermediate_size={3 * settings.hidden_size}", "max_length=160", "max_prompt_length=96",
        f"model.from_config.num_hidden_layers={settings.num_layers}", f"seed={settings.seed}", "eval_every=1000000",
        "do_first_eval=false", "n_eval_examples=16", "batch_size=16", "wandb.enabled=false", "sample_during_eval=false",
    ]  # fmt: skip


def sft_keys(folder: Path, settings: Settings) -> list[str]:
    """The command line of SFT."""
    return [
        *common_keys(folder, settings), "loss=sft", f"datasets=[{folder / 'sft.jsonl'}]", f"n_epochs={settings.sft_epochs}",
        f"lr={settings.sft_lr}", "warmup_steps=20", f"local_run_dir={folder / 'sft'}",
    ]  # fmt: skip


def rounds_keys(folder: Path, loop: Path, settings: Settings) -> list[str]:
    """The command line of the rounds: chosen responses pass all tests, rejected ones do not."""
    keys = [
        *common_keys(folder, settings), "+rounds=default", f"model.archive={folder / 'sft' / 'LATEST'}", "rounds.judge=tests",
        "rounds.judging.tests_seconds=2", "rounds.judging.tests_workers=4", "rounds.pairs=all", "rounds.threshold=1",
        f"rounds.prompts={folder / 'prompts.jsonl'}", f"rounds.held_out={folder / 'held_out.jsonl'}",
        f"rounds.n_held_out_samples={settings.eval_samples}",
        f"rounds.rounds={settings.rounds}", f"rounds.prompts_per_round={settings.round_prompts}", "rounds.max_new_tokens=96",
        f"rounds.n_samples={settings.samples}", f"loss={settings.loss}", f"loss.beta={settings.beta}", f"lr={settings.lr}",
        f"n_epochs={settings.epochs}", "warmup_steps=5", f"local_run_dir={loop}",
    ]  # fmt: skip
    keys += [f"loss.alpha={settings.alpha}"] * (settings.loss == "rpo")
    return keys + [f"resume={loop}"] * (loop / "rounds.json").exists()


def train(keys: Sequence[str]) -> dict:
    """One run of train.py, or one loop; its seconds and those of CPU time, with its children's. Exits where it fails."""
    before, started = cpu_seconds(), time.monotonic()
    done = subprocess.run([sys.executable, "train.py", *keys], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return {"seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds() - before, "load": os.getloadavg()[0]}


def timed(path: Path, keys: Sequence[str]) -> None:
    """Train, and add to a file how long it took: a line for each time that it was begun or continued."""
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*earlier, train(keys)]))


# ---- pass@1 --------------------------------------------------------------------------------------------------------------


def pass_at_1(scores: dict[int, list[float]]) -> dict:
    """The share of samples that pass all tests (score 1), and its 95% interval, in which those of a problem belong together.

    scores: of the samples of each problem, as many for each. shares: of each problem.
    """
    passed = {problem: [float(score == 1) for score in some] for problem, some in scores.items()}
    values = [value for some in passed.values() for value in some]
    low, high = share_interval(values, [problem for problem, some in passed.items() for _ in some])
    shares = {problem: mean(some) for problem, some in passed.items()}
    return {"pass@1": mean(values), "low": low, "high": high, "shares": shares}


def gain(shares: dict, before: dict) -> dict:
    """The mean over problems by which the share of passing samples has risen, and its 95% interval: problems are compared with
    themselves, so that it says more than two intervals of pass@1."""
    rises = [shares[problem] - before[problem] for problem in shares]
    return estimate(mean(rises), mean_interval(rises))


def policies(loop: Path, rounds: int) -> list[dict]:
    """A row for each policy of a loop, from its files: SFT's, and that of each round."""
    problems = {prompt.prompt_id: prompt.row for prompt in read_stored(loop / PROMPTS) if prompt.held_out}
    rows = []
    for number, name in enumerate([*(f"round-{number + 1}" for number in range(rounds)), "final"]):
        scores: dict[int, list[float]] = {}
        for row in read_table(loop / name / "held_out_scores.parquet"):
            # What the judge cannot judge has not passed.
            scores.setdefault(row["prompt_id"], []).append(row["score"] or 0.0)
        by = {
            difficulty: pass_at_1({key: some for key, some in scores.items() if problems[key]["difficulty"] == difficulty})
            for difficulty in DIFFICULTIES
        }
        whole = pass_at_1(scores)
        whole["shares"] = {problems[key]["id"]: share for key, share in whole["shares"].items()}
        row = {"after": f"round {number}" if number else "sft", **whole}
        if rows:
            row |= {"gain": gain(row["shares"], rows[0]["shares"]), "gain_of_round": gain(row["shares"], rows[-1]["shares"])}
        row["by_difficulty"] = {difficulty: found["pass@1"] for difficulty, found in by.items()}
        rows.append(row | facts_of_training(loop / f"round-{number}"))
    return rows


def facts_of_training(directory: Path) -> dict:
    """What the round trained on that a policy comes from; nothing of SFT's."""
    if not (directory / "summary.json").exists():
        return {}
    summary = json.loads((directory / "summary.json").read_text())
    scores = [row["score"] for row in read_table(directory / "scores.parquet")]
    passed = {"train_pass@1": mean(score == 1 for score in scores), "mean_score": summary["samples"]["mean_score"]}
    return passed | {"counts": summary["counts"], "excluded": summary["excluded"]}


def line(row: dict) -> str:
    """A row of the report."""
    text = f"{row['after']}: pass@1 {row['pass@1']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    for name, since in (("gain", "since sft"), ("gain_of_round", "in this round")):
        if name in row:
            text += f", {row[name]['mean']:+.3f} [{row[name]['low']:+.3f}, {row[name]['high']:+.3f}] {since}"
    return text


def main() -> None:
    """Run, and report."""
    from measure import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--loop", default="loop", help="name of the loop, in the folder")
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    folder, name, results = given.pop("folder").resolve(), given.pop("loop"), given.pop("results")
    settings, loop = Settings(**given), folder / name
    prepare(folder, settings)
    if not (folder / "sft" / "LATEST").exists():
        timed(folder / "sft_times.json", sft_keys(folder, settings))
    timed(folder / f"{name}_times.json", rounds_keys(folder, loop, settings))
    times = {key: json.loads(path.read_text()) for key in ("sft", name) if (path := folder / f"{key}_times.json").exists()}
    rows = policies(loop, settings.rounds)
    for row in rows:
        print(line(row))
    facts = {"command": sys.argv, "hardware": hardware(), "versions": versions(), "settings": asdict(settings)}
    path = results or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}_code_rounds_cpu.json"
    path.write_text(json.dumps(facts | {"times": times, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
