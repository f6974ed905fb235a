"""Sampling speed in tokens per second.

    python benchmarks/sampling.py [CHECKPOINT] [--prompts 384] [--rounds 3]
    python benchmarks/sampling.py --samples 8 [--prompts 1] [--rounds 3] [--threads 2]

One response to each prompt: this project's sampling, and its earlier single padded batch of all prompts. Without a checkpoint,
the model is the untrained embedded one, and every response has the maximum length.

Several samples of each prompt (--samples): prompts of 400 tokens, responses of at most 64, a random Llama with 58M parameters.
This project, which computes a prompt once for its samples; the same with the prompt repeated; transformers' own `generate` with
num_return_sequences. CPU seconds are given beside wall time: they depend less on what else the machine does.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from measure import hardware, versions
from transformers import LlamaConfig, LlamaForCausalLM

from preference_training.configuration.validation import configured
from preference_training.core.machine import pick_device, quiet_libraries
from preference_training.core.random_streams import seed_everything
from preference_training.data.toy_preferences import toy_records
from preference_training.generation import sampling
from preference_training.generation.sampling import Sampler
from preference_training.modeling.loading import load_model
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.state import move_to_devices
from preference_training.modeling.tokenizer import byte_level_tokenizer, load_tokenizer

PROMPT_LENGTH, RESPONSE_LENGTH = 400, 64


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


def one_response_each(options) -> dict:
    """Time responses to many prompts, now and before."""
    # No run writes anything.
    config = configured("local_run_dir=unused", *[f"model.archive={options.checkpoint}"] * bool(options.checkpoint))
    seed_everything(config.seed)
    tokenizer = load_tokenizer(config.model)
    model = move_to_devices(load_model(config.model, tokenizer), pick_device()).eval()
    share_prefixes(model, config.prefix_sharing)
    prompts = [tokenizer(text).input_ids for text in toy_records("test")][: options.prompts or 384]
    arguments = model, tokenizer, prompts, config.max_length, config.seed
    contenders = {"before": lambda: all_in_one_batch(*arguments), "now": lambda: sample_batches(*arguments)}
    return timed(contenders, options.rounds) | {"prompts": len(prompts)}


def several_samples(options) -> dict:
    """Time several samples of each prompt."""
    seed_everything(0)
    tokenizer, widths = byte_level_tokenizer(), {"hidden_size": 640, "intermediate_size": 1792}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=12, num_attention_heads=10, **widths)
    model = move_to_devices(LlamaForCausalLM(config), pick_device()).eval()
    prompts = torch.randint(40, 200, (options.prompts or 1, PROMPT_LENGTH))
    end, sampler = tokenizer.eos_token_id, Sampler(tokenizer, PROMPT_LENGTH + RESPONSE_LENGTH, 0)

    def shared() -> list[list[int]]:
        found = sampler.samples(model, prompts.tolist(), options.samples)
        return [response.token_ids for responses in found for response in responses]

    def repeated() -> list[list[int]]:
        with mock.patch.object(sampling, "repeats_prompts", lambda *_: False):
            return shared()

    def transformers() -> list[list[int]]:
        ids = prompts.to(model.device)
        how = {"max_new_tokens": RESPONSE_LENGTH, "num_return_sequences": options.samples, "do_sample": True, "top_k": 0}
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end}
        rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how, **ends)[:, PROMPT_LENGTH:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    # The proof that the model can is made once.
    sampler.samples(model, [[40]], 2)
    found = timed({"transformers": transformers, "repeated": repeated, "shared": shared}, options.rounds)
    return found | {"prompts": len(prompts), "samples": options.samples, "parameters": model.num_parameters()}


def timed(contenders: dict[str, Callable[[], list[list[int]]]], rounds: int) -> dict:
    """Tokens per second of contenders that take turns: medians and every round, in wall time and in CPU time."""
    wall, cpu = {name: [] for name in contenders}, {name: [] for name in contenders}
    for _ in range(rounds):
        for name, sample in contenders.items():
            started, used = time.perf_counter(), time.process_time()
            tokens = sum(map(len, sample()))
            wall[name].append(tokens / (time.perf_counter() - started))
            cpu[name].append(tokens / (time.process_time() - used))
    medians = [{name: round(statistics.median(found), 1) for name, found in rates.items()} for rates in (wall, cpu)]
    return {"tokens_per_second": medians[0], "tokens_per_cpu_second": medians[1], "rounds": wall, "cpu_rounds": cpu}


def main() -> None:
    """Time what the options say, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="weights of the embedded model")
    parser.add_argument("--samples", type=int, help="samples of each prompt")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    found = several_samples(options) if options.samples else one_response_each(options)
    print(json.dumps(found | hardware() | versions()))


if __name__ == "__main__":
    with torch.no_grad():
        main()
