"""SmolLM2-135M-Instruct learns to answer in at most two sentences, from 200 pairs: make demo-chat. Minutes, no hub, no GPU.

The pairs are its own answers: what is rejected goes on, what is preferred ends after two sentences. What it says is as true as
before; what it learns is when to stop.

python scripts/demo_chat.py [DIRECTORY] [KEY=VALUE ...]      # keys of the training run
"""

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT / "examples" / "short_answers.jsonl"
# DPO alone makes the long endings unlikely, and with them, in a model this small, all else: it answers with its system
# prompt. The likelihood of the chosen answers (RPO) holds it.
TRAINING = [
    "model=smollm2-135m",
    f"datasets={PAIRS}",
    "loss=rpo",
    "+adapter=lora",
    "lr=1e-4",
    "eval_every=88",
    "exp_name=demo_chat",
    "wandb.enabled=false",
]
SENTENCES = 2
LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", flags=re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?](?=\s|[\"')\]]|$)")


def main() -> None:
    """Train, answer the held-out questions before and after, print both and a table, and open a chat in a terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="DIRECTORY or KEY=VALUE")
    parser.add_argument("--longest", type=int, default=120, help="tokens at which an answer is cut (default: 120)")
    options = parser.parse_intermixed_args()
    overrides = [word for word in options.words if "=" in word]
    named = [word for word in options.words if "=" not in word]
    directory = Path(named[0]) if named else ROOT / "runs" / f"demo_chat_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    started = time.monotonic()
    train(directory, overrides)
    rows = answers(directory, options.longest)
    show(directory, rows, options.longest)
    print(f"\nThis took {time.monotonic() - started:.0f} s. Output in {directory}:")
    print("  report.html     what was trained, and how it went: open it in a browser")
    print("  answers.jsonl   all held-out questions with both answers")
    print("  LATEST          the adapter; python scripts/export.py DIRECTORY --to DIR --merge writes a whole model")
    chat = [sys.executable, str(ROOT / "scripts" / "chat.py"), str(directory), "--against", "reference"]
    print(f"\n$ {shown(chat)}", flush=True)
    if sys.stdin.isatty() and sys.stdout.isatty():
        subprocess.run(chat, check=False)


def train(directory: Path, overrides: list[str]) -> None:
    """Run one command line, as a user would."""
    command = [sys.executable, str(ROOT / "train.py"), *TRAINING, f"local_run_dir={directory}", *overrides]
    print(f"\n$ {shown(command)}", flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"the demo stopped because this command failed: {shown(command)}")


def shown(command: list[str]) -> str:
    """A command as a user types it in this folder."""
    return " ".join(["python", *(word.removeprefix(f"{ROOT}/").replace(f"={ROOT}/", "=") for word in command[1:])])


def answers(directory: Path, longest: int) -> list[dict]:
    """The held-out questions with the answers before and after training, which are also written to answers.jsonl."""
    from preference_training.configuration.saved import read_config
    from preference_training.core.machine import quiet_libraries
    from preference_training.data.entries import load_records, read_entry
    from preference_training.data.rendering.settings import TokenSettings
    from preference_training.data.tokenization import text_reader
    from preference_training.generation.chat import load_before_training, load_for_chat

    quiet_libraries()
    after = load_for_chat(str(directory))
    # Held out is what the model reads: the split is that of the run only with its template.
    reads = text_reader(after.tokenizer, TokenSettings("pairs", 2048, 1024, template=after.format.name))
    entry = read_entry({"path": str(PAIRS), "held_out_share": read_config(directory)["held_out_share"]})
    questions = [record.prompt for record in load_records(entry, "test", text_of=reads)]
    before = load_before_training(after)
    print(f"\nAnswering {len(questions)} held-out questions, before and after training ...", flush=True)
    both = (model.responses(questions, {"temperature": 0.0, "max_new_tokens": longest}) for model in (before, after))
    rows = [{"prompt": question, "before": old, "after": new} for question, old, new in zip(questions, *both, strict=True)]
    with (directory / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return rows


def is_short(answer: str) -> bool:
    """Whether an answer is whole, has at most two sentences, and is no list."""
    ends = SENTENCE_END.findall(answer)
    is_whole = bool(ends) and answer.rstrip().endswith((".", "!", "?", '"', ")"))
    return is_whole and len(ends) <= SENTENCES and not LIST_ITEM.search(answer)


def show(directory: Path, rows: list[dict], longest: int) -> None:
    """Print some answers side by side, and the table with intervals."""
    import torch

    from preference_training.evaluation.intervals import mean_interval, share_interval
    from preference_training.evaluation.phrasing import with_interval
    from preference_training.tracking.run_files import METRICS, metric_rows

    for row in rows[:4]:
        print(f"\n{row['prompt']}")
        for name in ("before", "after"):
            print(f"  {name:8}{row[name].strip()}")
    measures = {
        "answers of at most two sentences": (lambda text: float(is_short(text)), share_interval),
        "words of an answer": (lambda text: float(len(text.split())), mean_interval),
    }
    print(f"\n{len(rows)} held-out questions, answers of at most {longest} tokens; [95% interval]\n")
    print(f"{'':36}{'before':>22}{'after':>22}")
    results: dict[str, dict[str, float]] = {}
    for measure, (value, interval) in measures.items():
        columns = {name: torch.tensor([value(row[name]) for row in rows]) for name in ("before", "after")}
        results[measure] = {name: values.mean().item() for name, values in columns.items()}
        cells = [with_interval(values.mean().item(), *interval(values)) for values in columns.values()]
        print(f"{measure:36}" + "".join(f"{cell:>22}" for cell in cells))
    last = [row for row in metric_rows(directory / METRICS) if "rewards_eval/accuracies" in row][-1]
    accuracy = [last[f"rewards_eval/accuracies{end}"] for end in ("", "/low", "/high")]
    results["reward accuracy"] = {"before": 0.5, "after": accuracy[0]}
    print(f"{'reward accuracy':36}{'0.5 (by definition)':>22}{with_interval(*accuracy):>22}")
    (directory / "demo_results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
