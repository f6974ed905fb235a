"""From how many common tokens on sharing between rows pays: `OMP_NUM_THREADS=1 python benchmarks/tries.py`.

Rows of different prompts begin with the same few tokens. Each step is computed as one trie, and as if different prompts shared
nothing. Printed is the time of the first relative to the second: the median over interleaved steps of CPU time, which a busy
machine disturbs little. Raw numbers go to `benchmarks/results/`.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from measure import hardware, versions
from rows import CHOSEN_LENGTH, PROMPT_LENGTH, SEED
from transformers import AutoConfig, AutoModelForCausalLM
from works import CPU, VOCABULARY

from preference_training.batching import tries
from preference_training.batching.packing import PackedBatch, iterate_examples, pack_examples
from preference_training.core.machine import tune_malloc
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries

COMMON = (1, 4, 8, 16, 32, 64)
PAIRS = 8
# (mean, standard deviation) of the log of the lengths of prompts and responses.
ROWS = {"short": (PROMPT_LENGTH, CHOSEN_LENGTH), "long": ((6.9, 0.2), (4.6, 0.2))}
LONGEST = 1800


def main() -> None:
    """Measure all lengths on all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="steps of each length; default: 8")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    tune_malloc(keep_freed=True)
    torch.manual_seed(SEED)
    sizes = CPU.model | {"max_position_embeddings": 2 * LONGEST}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.float32)
    attend_over_tries(model)
    results = {"command": ["tries.py", *sys.argv[1:]], "hardware": hardware(), "load": os.getloadavg(), "versions": versions()}
    results |= {
        "model": sizes,
        "rows": [measure(model, name, common, options.rounds) for name in options.rows for common in COMMON],
    }
    path = Path(__file__).parent / "results" / f"{datetime.now():%Y-%m-%d}_tries_cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


def measure(model: torch.nn.Module, rows: str, common: int, rounds: int) -> dict:
    """Times of steps on rows with `common` tokens in common, shared and not."""
    source = random.Random(SEED)
    found = {"rows": rows, "common": common, "tokens": [], "shared": [], "apart": []}
    for number in range(rounds + 1):
        prompts = draw(source, rows, common)
        packs = {"shared": pack(prompts, 1), "apart": pack(prompts, 10**9)}
        seconds = {name: step_time(model, batch) for name, batch in packs.items()}
        if number:
            found["tokens"].append([packs[name].num_tokens for name in ("shared", "apart")])
            for name, value in seconds.items():
                found[name].append(value)
    times = median(a / b for a, b in zip(found["shared"], found["apart"], strict=True))
    tokens = median(a / b for a, b in found["tokens"])
    print(f"{rows} rows, {common} common tokens: {times:.3f} of the time, {tokens:.3f} of the tokens", flush=True)
    return found


def draw(source: random.Random, rows: str, common: int) -> list[TokenizedPrompt]:
    """Pairs of random tokens whose prompts begin with the same `common` ones and then part."""
    beginning = source.choices(range(VOCABULARY), k=common)

    def text(length: tuple[float, float]) -> list[int]:
        return source.choices(range(VOCABULARY), k=min(LONGEST, max(2, round(source.lognormvariate(*length)))))

    prompt, response = ROWS[rows]
    return [TokenizedPrompt(beginning + text(prompt), [text(response), text(response)], [(0, 1)]) for _ in range(PAIRS)]


def pack(prompts: Sequence[TokenizedPrompt], least: int) -> PackedBatch:
    """The rows as one pack, with `least` as the shortest run of tokens that different prompts share."""
    with patch.object(tries, "MIN_SHARED", least):
        return pack_examples(list(iterate_examples(prompts)))


def step_time(model: torch.nn.Module, batch: PackedBatch) -> float:
    """CPU seconds of a forward and backward pass."""
    started = time.process_time()
    response_scores(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - started


if __name__ == "__main__":
    main()
