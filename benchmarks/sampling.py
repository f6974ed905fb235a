"""Sampling speed in tokens per second: this project's sampling, and its earlier single padded batch of all prompts.

python benchmarks/sampling.py [CHECKPOINT] [--prompts 384] [--rounds 3]

Without a checkpoint, the model is the untrained embedded one, and every response has the maximum length.
"""

import argparse
import json
import statistics
import time

import torch
from measure import hardware, versions

from preference_training.configuration.validation import configured
from preference_training.core.machine import pick_device, quiet_libraries
from preference_training.core.random_streams import seed_everything
from preference_training.data.toy_preferences import toy_records
from preference_training.generation.sampling import Sampler
from preference_training.modeling.loading import load_model
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.state import move_to_devices
from preference_training.modeling.tokenizer import load_tokenizer


def all_in_one_batch(model, tokenizer, prompts: list[list[int]], max_length: int, seed: int) -> list[list[int]]:
    """The earlier implementation: all prompts padded to the longest, one random stream, one length limit."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(seed)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    how = {"max_new_tokens": max_length - width, "do_sample": True, "top_k": 0}
    output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **how, **ends)
    rows = output[:, width:].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def sample_batches(model, tokenizer, prompts: list[list[int]], max_length: int, seed: int) -> list[list[int]]:
    """As a run samples now."""
    return Sampler(tokenizer, max_length, seed).responses(model, prompts)


def main() -> None:
    """Time both alternately, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="weights of the embedded model")
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet_libraries()
    config = configured(*[f"model.archive={options.checkpoint}"] * bool(options.checkpoint))
    seed_everything(config.seed)
    tokenizer = load_tokenizer(config.model)
    model = move_to_devices(load_model(config.model, tokenizer), pick_device()).eval()
    share_prefixes(model, config.prefix_sharing)
    prompts = [tokenizer(text).input_ids for text in toy_records("test")][: options.prompts]
    rates: dict[str, list[float]] = {"before": [], "now": []}
    for _ in range(options.rounds):
        for name, sample in (("before", all_in_one_batch), ("now", sample_batches)):
            started = time.perf_counter()
            responses = sample(model, tokenizer, prompts, config.max_length, config.seed)
            rates[name].append(sum(map(len, responses)) / (time.perf_counter() - started))
    medians = {name: round(statistics.median(found)) for name, found in rates.items()}
    print(json.dumps({"tokens_per_second": medians, "rounds": rates, "prompts": len(prompts), **hardware(), **versions()}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
