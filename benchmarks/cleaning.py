"""Wrong labels, and what cross-fitted weights and checked labels win back: DPO of SmolLM2 with LoRA on pairs of your own.

    python benchmarks/cleaning.py runs/cleaning --data PAIRS.jsonl.gz --labels shorter

PAIRS has rows of `chosen` and `rejected`, dialogues as HH has them. A third of the prompts is held out by a hash and keeps the
true labels; of the others a fifth of the labels is flipped. `--labels shorter` first replaces every label by a rule that a
model can learn: the shorter response is preferred. The arms:

clean       the true labels
noisy       a fifth of the labels flipped
weighted    noisy, with data.weights=ledger
checked     noisy, with the tenth of the labels corrected that the queue of `weighted` puts first
random      noisy, with a tenth of the labels corrected at random

Prints accuracy, loss and margin on held-out pairs with 95% intervals, and the share that each arm recovers of the held-out loss
that flipped labels cost, and writes them to benchmarks/results/. The same command goes on where it was stopped; `--report`
trains nothing. Further arguments are keys of train.py.
"""

import argparse
import datetime
import gzip
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy
from measure import cpu_seconds, hardware, run, versions

ROOT = Path(__file__).parent.parent
FLIPPED, CHECKED = 0.2, 0.1
ARMS = ("clean", "noisy", "weighted", "checked", "random")
COMMON = (
    "model=smollm2-135m", "+adapter=lora", "loss=dpo", "loss.beta=0.1", "lr=1e-4", "n_epochs=1", "batch_size=16",
    "gradient_accumulation_steps=1", "max_length=192", "max_prompt_length=96", "sample_during_eval=false",
    "do_first_eval=false", "save_policy_pt=false", "wandb.enabled=false", "n_eval_examples=null", "eval_every=10_000_000",
    "save_every=160", "keep_last=1", "resume=auto",
)  # fmt: skip
# What begins each response of a dialogue.
ASSISTANT = "\n\nAssistant:"
BOOTSTRAPS = 2000


# ---- rows -----------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path, labels: str) -> tuple[list[dict], Counter]:
    """The rows of a file with their true labels, one of each prompt; and how many were skipped for what."""
    opened = gzip.open if path.suffix == ".gz" else open
    rows, skipped, prompts = [], Counter(), set()
    with opened(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            (prompt, chosen), (other, rejected) = (_split(row[name]) for name in ("chosen", "rejected"))
            if reason := _unusable(prompt, other, chosen, rejected, prompts, labels):
                skipped[reason] += 1
                continue
            prompts.add(prompt)
            pair = {"chosen": row["chosen"], "rejected": row["rejected"]}
            rows.append(_swapped(pair) if labels == "shorter" and len(chosen.strip()) > len(rejected.strip()) else pair)
    return rows, skipped


def _split(dialogue: str) -> tuple[str, str]:
    """A dialogue's prompt and its last response."""
    prompt, mark, response = dialogue.rpartition(ASSISTANT)
    return prompt + mark, response


def _unusable(prompt: str, other: str, chosen: str, rejected: str, known: set[str], labels: str) -> str | None:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        return "empty response"
    if chosen == rejected:
        return "equal responses"
    if prompt != other:
        return "responses to different prompts"
    if prompt in known:
        return "another pair of the same prompt"
    return "responses of equal length" if labels == "shorter" and len(chosen) == len(rejected) else None


def _swapped(pair: dict) -> dict:
    return {"chosen": pair["rejected"], "rejected": pair["chosen"]}


def split_rows(rows: list[dict], train: int, held_out: int) -> tuple[list[dict], list[dict]]:
    """The first training rows and held-out rows in the order of a hash; every third hash is held out."""

    def place(row: dict) -> int:
        return int(hashlib.sha256(_split(row["chosen"])[0].encode()).hexdigest(), 16)

    ordered = sorted(rows, key=place)
    return [row for row in ordered if place(row) % 3][:train], [row for row in ordered if not place(row) % 3][:held_out]


def flipped_rows(count: int, seed: int) -> list[int]:
    """Which of so many rows have their labels flipped: exactly FLIPPED of them."""
    return sorted(random.Random(f"flipped {seed}").sample(range(count), round(FLIPPED * count)))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines, unless the file has them already: runs name their data by its content."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


class Experiment:
    """The files of an experiment in a folder: rows, runs, and what is known of each arm."""

    def __init__(self, folder: Path, rows: tuple[list[dict], list[dict]], seed: int, more: list[str]):
        self.folder, self.seed, self.more = folder, seed, more
        self.train, self.held_out = rows
        self.flipped = flipped_rows(len(self.train), seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "held_out.jsonl", self.held_out)

    def corrected(self, arm: str) -> set[int]:
        """The rows whose labels have been checked."""
        count = round(CHECKED * len(self.train))
        if arm == "checked":
            return set(self._rows_of("label_queue.jsonl")[:count])
        return set(random.Random(f"checked {self.seed}").sample(range(len(self.train)), count)) if arm == "random" else set()

    def rows(self, arm: str) -> list[dict]:
        """The training rows of an arm."""
        wrong = set() if arm == "clean" else set(self.flipped) - self.corrected(arm)
        return [_swapped(row) if number in wrong else row for number, row in enumerate(self.train)]

    def _rows_of(self, name: str) -> list[int]:
        """The row numbers, from 0, of a file of the weighted run. A source ends with the number of its row, from 1."""
        path = self.folder / "weighted" / name
        if not path.is_file():
            sys.exit(f"{path}: missing. Run the arm `weighted` first.")
        return [int(json.loads(line)["source"].rsplit(" ", 1)[1]) - 1 for line in path.read_text().splitlines()]

    def run(self, arm: str) -> dict:
        """Train an arm, or what is missing of it; its held-out metrics, and the time that this took."""
        found = self.folder / f"{arm}.json"
        if found.is_file():
            return json.loads(found.read_text())
        file = self.folder / f"{'noisy' if arm == 'weighted' else arm}.jsonl"
        write_rows(file, self.rows(arm))
        overrides = [f"datasets=[{{path: {file}, test_path: {self.folder / 'held_out.jsonl'}}}]", f"seed={self.seed}"]
        overrides += ["data.weights=ledger"] if arm == "weighted" else []
        run_dir = self.folder / arm
        began, before, known = time.monotonic(), cpu_seconds(), run_dir.exists()
        run("train.py", *COMMON, *overrides, *self.more, f"local_run_dir={run_dir}")
        facts = self.metrics(run_dir) | {
            "overrides": overrides,
            "wrong_labels": sum(row != other for row, other in zip(self.rows(arm), self.train, strict=True)),
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(cpu_seconds() - before, 1),
            "load": os.getloadavg()[0],
            # Of a run that was stopped the times are those of its last part.
            "resumed": known,
        }
        found.write_text(json.dumps(facts, indent=1) + "\n")
        return facts

    def metrics(self, run_dir: Path) -> dict:
        """The last held-out metrics of a run, with their intervals."""
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "loss/eval" in row][-1]
        names = {"accuracy": "rewards_eval/accuracies", "margin": "rewards_eval/margins", "loss": "loss/eval"}
        found = {name: [last[key], last[f"{key}/low"], last[f"{key}/high"]] for name, key in names.items()}
        return found | {"held_out_prompts": last["counters/held_out_prompts"], "examples": last["counters/examples"]}

    def labels(self) -> dict:
        """What the weighted run has found out about the labels, beside the truth."""
        path = self.folder / "weighted" / "label_weights.jsonl"
        if not path.is_file():
            return {}
        numbers = numpy.array(self._rows_of(path.name))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Probabilities fall with the margin, and may be 1 or 0 to the last digit.
        values = -numpy.array([row["margin"] for row in rows])
        wrong = numpy.isin(numbers, self.flipped)
        draw, drawn = numpy.random.default_rng(0), []
        for _ in range(BOOTSTRAPS):
            some = draw.integers(len(wrong), size=len(wrong))
            drawn.append(auroc(values[some], wrong[some]))
        first = set(self._rows_of("label_queue.jsonl")[: round(CHECKED * len(self.train))])
        return {
            "pairs": len(wrong),
            "flipped": int(wrong.sum()),
            "mean_probability": {
                name: float(numpy.mean([row["probability"] for row, is_in in zip(rows, some, strict=True) if is_in]))
                for name, some in (("flipped", wrong), ("right", ~wrong))
            },
            "auroc": [auroc(values, wrong), *numpy.nanquantile(drawn, (0.025, 0.975)).tolist()],
            "fit": json.loads((path.parent / "label_noise.json").read_text()),
            "flipped_among_the_first": [len(first & set(self.flipped)), len(first)],
        }


def auroc(values: numpy.ndarray, positive: numpy.ndarray) -> float:
    """The share of (positive, negative) pairs in which the positive one has the larger value; ties count half."""
    order, counts = numpy.unique(values, return_inverse=True, return_counts=True)[1:]
    ranks = (numpy.cumsum(counts) - (counts - 1) / 2)[order]
    ones, zeros = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)) if ones and zeros else float("nan")


def recovered(arms: dict[str, dict], name: str) -> dict[str, float | None]:
    """The share that each other arm recovers of what flips cost in `accuracy` or `loss`; None where they cost nothing."""
    if not {"clean", "noisy"} <= arms.keys():
        return {}
    clean, noisy = (arms[arm][name][0] for arm in ("clean", "noisy"))
    cost = noisy - clean if name == "loss" else clean - noisy
    others = {arm: facts[name][0] - noisy for arm, facts in arms.items() if arm not in ("clean", "noisy")}
    return {arm: change / (clean - noisy) if cost > 0 else None for arm, change in others.items()}


def table(facts: dict) -> str:
    """The results as text."""
    lines = [f"{'arm':<10}{'wrong labels':>14}{'accuracy':>24}{'loss':>24}{'margin':>24}{'recovered':>12}{'CPU s':>8}"]
    for arm, found in facts["arms"].items():
        intervals = ("{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for name in ("accuracy", "loss", "margin"))
        share = facts["recovered"]["loss"].get(arm)
        end = f"{'' if share is None else f'{share:.0%}':>12}{found['cpu_seconds']:>8.0f}"
        lines.append("{:<10}{:>14}{:>24}{:>24}{:>24}".format(arm, found["wrong_labels"], *intervals) + end)
    if labels := facts["labels"]:
        lines.append(
            "AUROC of the probabilities: {:.3f} [{:.3f}, {:.3f}]; ".format(*labels["auroc"])
            + "estimated share of flipped labels {:.3f}, ".format(labels["fit"]["flipped_share"])
            + "true {:.3f}; ".format(labels["flipped"] / labels["pairs"])
            + "flipped among the first tenth of the queue: {} of {}".format(*labels["flipped_among_the_first"])
        )
    return "\n".join(lines)


def report(work: Experiment, facts: dict, path: Path) -> str:
    """Write what is known of the arms in a folder, those of earlier commands among them; the table of it."""
    known = {arm: work.run(arm) for arm in ARMS if (work.folder / f"{arm}.json").is_file()}
    shares = {name: recovered(known, name) for name in ("accuracy", "loss")}
    facts |= {"arms": known, "recovered": shares, "labels": work.labels()}
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return table(facts)


def main() -> None:
    """Train the arms, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows and runs go")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of chosen and rejected, also .gz")
    parser.add_argument("--labels", choices=("human", "shorter"), default="shorter")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="train nothing: report on what is in the folder")
    parser.add_argument("--train", type=int, default=560, help="rows to train on, at most; %(default)s if not given")
    parser.add_argument("--held-out", type=int, default=300, help="rows to evaluate on, at most; %(default)s if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the flipped and checked labels, and of the runs")
    parser.add_argument("--results", type=Path, help="file of the results; by default one in benchmarks/results")
    options, more = parser.parse_known_args()
    if not options.data.is_file():
        parser.error(f"--data: {options.data} is no file. Expected rows with `chosen` and `rejected`, such as .jsonl")
    name = f"{datetime.date.today()}_cleaning_{options.labels}_cpu.json"
    path = options.results or ROOT / "benchmarks" / "results" / name
    rows, skipped = read_pairs(options.data, options.labels)
    work = Experiment(options.folder.resolve(), split_rows(rows, options.train, options.held_out), options.seed, more)
    facts = {"command": sys.argv, "overrides": [*COMMON, *more], "hardware": hardware(), "versions": versions()}
    facts["rows"] = {"usable": len(rows), "skipped": skipped, "train": len(work.train), "held_out": len(work.held_out)}
    print(json.dumps(facts["rows"]), flush=True)
    for arm in (arm for arm in ARMS if arm in options.arms and not options.report):
        work.run(arm)
        report(work, facts, path)
    print(report(work, facts, path), path, sep="\n")


if __name__ == "__main__":
    main()
