"""Data preparation: speed relative to plain tokenizer calls, the second start, mixtures, and memory with millions of pairs.

    python benchmarks/data.py speed --file hh.jsonl.gz --tokenizer DIRECTORY     # pairs per second, in paired rounds
    python benchmarks/data.py start --file hh.jsonl.gz --tokenizer DIRECTORY     # seconds to the first batch
    python benchmarks/data.py stream --pairs 5000000                             # memory and time per pair, generated pairs
    python benchmarks/data.py memory                                             # a dry run's estimate and the run's peak

Each prints a JSON object with raw values. Without --file the pairs are generated; rows of a file are repeated `--copies` times
with distinct prompts.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

STREAM_LOADER = """
import random
from preference_datasets import register

WORDS = "rain stone birds lunch mat cat dawn bridges paper window river garden music winter letter".split()

@register("generated")
def generated(split, silent=False, cache_dir=None):
    draw = random.Random(split)
    for number in range({pairs} if split == "train" else 1000):
        text = lambda count: " ".join(draw.choices(WORDS, k=count))
        answers = [" " + text(8), " " + text(9) + "."]
        yield f"\\n\\nHuman: {{number}} {{text(10)}}?\\n\\nAssistant:", {{
            "responses": answers, "pairs": [(0, 1)], "sft_target": answers[0],
        }}
"""


def load(args):
    """The tokenizer given on the command line."""
    from preference_training.configuration.saved import model_config
    from preference_training.modeling.tokenizer import load_tokenizer

    return load_tokenizer(model_config({"tokenizer_name_or_path": args.tokenizer}))


def settings_of(_entry):
    """Settings with HH's usual lengths."""
    from preference_training.data.rendering.settings import TokenSettings

    return TokenSettings("pairs", 512, 256, "keep_end")


def write_rows(args, folder: Path) -> Path:
    """Write a file of dialogues: repeated rows of the given file, or generated ones."""
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as out:
        if not args.file:
            for n in range(1000 * args.copies):
                prompt = f"\n\nHuman: {n} " + "how do I clean a garden window in the rain " * (1 + n % 12) + "\n\nAssistant:"
                row = {
                    "chosen": f"{prompt} Take your time, and {n % 7} of them.",
                    "rejected": f"{prompt} Ask somebody else {n}.",
                }
                out.write(json.dumps(row) + "\n")
            return path
        opened = gzip.open if args.file.endswith(".gz") else open
        with opened(args.file, "rt", encoding="utf-8") as rows:
            lines = [json.loads(line) for line in rows]
        for copy in range(args.copies):
            for row in lines:
                named = {key: text.replace("Human:", f"Human: {copy}", 1) for key, text in row.items()}
                out.write(json.dumps(named) + "\n")
    return path


def speed(args) -> dict:
    """Pairs per second of the whole preparation, and of three tokenizer calls per pair alone."""
    from preference_training.data.entries import load_records, read_entry
    from preference_training.data.preparation import prepare

    tokenizer = load(args)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(args, Path(folder))
        entry = read_entry({"path": str(path), "on_bad_row": "skip", "held_out_share": 0})
        texts = [(r.prompt, r.responses[i], r.responses[j]) for r in load_records(entry, "train") for i, j in r.pairs]
        # Single calls come first: after preparing data they run a fifth slower, which would inflate the ratio.
        for _ in range(args.rounds):
            started = time.perf_counter()
            for pair in texts:
                for text in pair:
                    tokenizer(text, add_special_tokens=False)
            rounds.append({"one_call_a_text": len(texts) / (time.perf_counter() - started)})
        # The first preparation imports modules that the others reuse.
        for number in range(-1, args.rounds):
            started = time.perf_counter()
            table = prepare([entry], "train", tokenizer, settings_of, Path(folder) / f"cache{number}").table
            prepared = time.perf_counter() - started
            assert int(table.num_examples.sum()) == len(texts)
            if number >= 0:
                rounds[number]["prepared"] = len(texts) / prepared
    ratios = [r["prepared"] / r["one_call_a_text"] for r in rounds]
    return {"pairs": len(texts), "pairs_per_second": rounds, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def first_batch(paths: list[str], directory: str, tokenizer: str) -> float:
    """Seconds from the end of the imports to the first packed batch, in this process."""
    from preference_training.batching.iterator import BatchIterator
    from preference_training.batching.schedule import Schedule
    from preference_training.data.entries import read_entry
    from preference_training.data.preparation import prepare

    loaded = load(argparse.Namespace(tokenizer=tokenizer))
    started = time.perf_counter()
    entries = [read_entry({"path": path, "on_bad_row": "skip"}) for path in paths]
    table = prepare(entries, "train", loaded, settings_of, Path(directory)).table
    next(iter(BatchIterator(Schedule(table, 64))))
    return time.perf_counter() - started


def start(args) -> dict:
    """Seconds to the first batch of a second start, with one data set, and with the same data split into eight."""
    with tempfile.TemporaryDirectory() as folder:
        whole = write_rows(args, Path(folder))
        lines = whole.read_text().splitlines(keepends=True)
        parts = []
        for k in range(8):
            parts.append(str(Path(folder) / f"part{k}.jsonl"))
            Path(parts[-1]).write_text("".join(lines[k::8]))
        seconds: dict[str, list[float]] = {"one set": [], "eight sets": []}
        for _ in range(args.rounds + 1):
            for name, paths in (("one set", [str(whole)]), ("eight sets", parts)):
                command = [sys.executable, __file__, "first_batch", *paths, "--tokenizer", args.tokenizer, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds[name].append(float(done.stdout.splitlines()[-1]))
    return {
        "pairs": len(lines),
        "first_start": {name: values[0] for name, values in seconds.items()},
        "second_starts": {name: values[1:] for name, values in seconds.items()},
        "medians": {name: statistics.median(values[1:]) for name, values in seconds.items()},
    }


def stream(args) -> dict:
    """Peak memory and time per pair for generated pairs: loading, caching, shuffling and batching."""
    from preference_training.batching.iterator import BatchIterator
    from preference_training.batching.schedule import Schedule
    from preference_training.data.entries import read_entry
    from preference_training.data.preparation import prepare

    tokenizer = load(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        Path(folder, "own.py").write_text(STREAM_LOADER.format(pairs=args.pairs))
        entry = read_entry(f"{folder}/own.py:generated")
        before = peak_mib()
        started = time.perf_counter()
        table = prepare([entry], "train", tokenizer, settings_of, Path(folder) / "cache").table
        prepared, after_preparing = time.perf_counter() - started, peak_mib()
        started = time.perf_counter()
        pairs = sum(pack.num_examples for step in BatchIterator(Schedule(table, 64)) for micro in step for pack in micro.packs)
        batched = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder, "cache").iterdir())
    assert pairs == args.pairs
    return {
        "pairs": pairs,
        "peak_mib": {"after imports": before, "after preparing": after_preparing, "after an epoch": peak_mib()},
        "microseconds_a_pair": {"preparing": 1e6 * prepared / pairs, "shuffled and packed": 1e6 * batched / pairs},
        "cache_mib": size / 2**20,
    }


MEMORY_MODEL = {
    "model": "blank_model",
    "model.name_or_path": "null",
    "model.from_config.model_type": "llama",
    "model.from_config.hidden_size": 512,
    "model.from_config.intermediate_size": 1408,
    "model.from_config.num_hidden_layers": 8,
    "model.from_config.num_attention_heads": 8,
    "on_bad_row": "skip",
    "batch_size": 8,
    "eval_every": 8,
    "n_examples": 40,
    "n_eval_examples": 8,
    "sample_during_eval": "false",
    "do_first_eval": "false",
    "debug": "true",
}
MEMORY_RUNS = (
    "loss=dpo optimizer=AdamW",
    "loss=dpo optimizer=RMSprop gradient_accumulation_steps=2",
    "loss=dpo optimizer=SGD activation_checkpointing=true",
    "loss=sft optimizer=AdamW",
)


def memory(args) -> dict:
    """The memory estimate of a dry run and the peak memory of the run, in GB."""
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        data = {"datasets": f"[{write_rows(args, Path(folder))}]", "model.tokenizer_name_or_path": args.tokenizer}
        overrides = [f"{key}={value}" for key, value in (MEMORY_MODEL | data).items()]
        for run in MEMORY_RUNS:
            command = [sys.executable, str(ROOT / "train.py"), *overrides, *run.split()]
            done = subprocess.run([*command, "dry_run=true"], cwd=folder, capture_output=True, text=True, check=True)
            estimate = float(done.stdout.rsplit("together", 1)[1].split()[0])
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            assert status == 0
            rounds.append({"run": run, "estimate_gb": estimate, "peak_gb": used.ru_maxrss / 2**20})
            rounds[-1]["ratio"] = rounds[-1]["estimate_gb"] / rounds[-1]["peak_gb"]
    return {"runs": rounds}


def peak_mib() -> float:
    """The peak memory of this process, including mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Run the benchmark given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["speed", "start", "stream", "memory", "first_batch"])
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--file")
    parser.add_argument("--tokenizer", default="byte_level")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    from preference_training.core.machine import quiet_libraries, tune_malloc

    quiet_libraries()
    tune_malloc(keep_freed=True)
    if args.work == "first_batch":
        print(first_batch(args.paths, args.folder, args.tokenizer))
        return
    result = {"speed": speed, "start": start, "stream": stream, "memory": memory}[args.work](args)
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps({"command": sys.argv, **machine, **result}, indent=2))


if __name__ == "__main__":
    main()
