"""How evenly packs are divided over ranks: tokens of the largest rank over the mean, and packs that are padding.

    python benchmarks/balance.py [--steps 20] [--out benchmarks/results/NAME.json]

Rows have HH's lengths (`rows.py`): prompts, chosen and rejected responses of log-normal lengths, at most 804 tokens a row.
Ranks of a sharded model compute their first packs together, then their second ones, and so on; so a step takes the sum over k
of the largest k-th pack. Printed for each number of ranks, pairs per rank and token budget:

    rank       tokens of the rank with most of them, over the mean of the ranks; of each step, then the mean
    in step    the sum of the largest k-th packs, fillers included, over the mean tokens of a rank
    squares    the same as `in step` with the cost of attention in a model of width 1,024: tokens plus the tokens that each
               attends to over 6 times the width
    fillers    packs that are computed as padding only, over all packs

No model is needed, so that no GPU is either.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean

from preference_training.batching import packing
from preference_training.batching.packing import Example, TokenBudget, iterate_examples
from preference_training.data.tokenization import TokenizedPrompt

# (mean, standard deviation) of the log of lengths in tokens, and the longest row: those of `rows.py`.
PROMPT, CHOSEN, REJECTED, LONGEST = (4.42, 0.85), (3.26, 0.90), (3.51, 0.90), 804
WIDTH = 1024


def rows(number: int, seed: int = 0) -> list[TokenizedPrompt]:
    """Pairs of HH's lengths; no two share a token at their beginning."""
    stream = random.Random(seed)
    found = []
    for place in range(number):
        lengths = [max(1, round(stream.lognormvariate(*part))) for part in (PROMPT, CHOSEN, REJECTED)]
        prompt = min(lengths[0], LONGEST // 2)
        chosen, rejected = (min(length, LONGEST - prompt) for length in lengths[1:])
        ids = [place] * prompt, [1, *[2] * (chosen - 1)], [3, *[4] * (rejected - 1)]
        found.append(TokenizedPrompt(ids[0], list(ids[1:]), [(0, 1)], number=place))
    return found


def tokens_of(examples: list[Example], places: list[int]) -> tuple[int, float]:
    """The tokens of a pack, and its cost with attention, in tokens."""
    tokens, squares = 0, 0
    for place in places:
        prompt, _ = examples[place]
        first, *others = len(prompt.prompt_ids), *map(len, prompt.responses)
        tokens += first + sum(others)
        squares += first**2 / 2 + sum(other * first + other**2 / 2 for other in others)
    return tokens, tokens + squares / (6 * WIDTH)


def step(examples: list[Example], budget: TokenBudget, ranks: int) -> dict[str, float]:
    """The measures of one step whose micro-batch is `examples`."""
    packs = [[tokens_of(examples, places) for places in cuts] for cuts in packing.divide(examples, budget, ranks)]
    number = max(map(len, packs))
    shortest = min(tokens_of(examples, [place]) for place in range(len(examples)))
    lockstep = [[(cuts + [shortest] * number)[k] for cuts in packs] for k in range(number)]
    totals = [[sum(pack[kind] for pack in cuts) for cuts in packs] for kind in (0, 1)]
    return {
        "rank": max(totals[0]) / mean(totals[0]),
        "in step": sum(max(pack[0] for pack in together) for together in lockstep) / mean(totals[0]),
        "squares": sum(max(pack[1] for pack in together) for together in lockstep) / mean(totals[1]),
        "fillers": 1 - sum(map(len, packs)) / (number * ranks),
        "packs": number,
    }


def main() -> None:
    """Measure every combination, print a table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = []
    print("ranks  pairs a rank  budget     rank  in step  squares  fillers  packs")
    for ranks in (2, 8, 64, 512):
        for pairs in (2, 8, 32):
            number = max(1, min(arguments.steps, 8 * arguments.steps // (ranks * pairs)))
            examples = list(iterate_examples(rows(number * ranks * pairs)))
            parts = list(packing.cut(examples, ranks * pairs))
            for limit in (1024, 2048, 4096):
                steps = [step(part, TokenBudget(limit, limit), ranks) for part in parts]
                means = {name: mean(each[name] for each in steps) for name in steps[0]}
                found.append({"ranks": ranks, "pairs_a_rank": pairs, "budget": limit, "steps": number} | means)
                values = "".join(f"{means[name]:9.3f}" for name in ("rank", "in step", "squares", "fillers"))
                print(f"{ranks:5}{pairs:14}{limit:8}{values}{means['packs']:7.2f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
