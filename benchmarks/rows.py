"""The input of every contender: one tokenizer, one set of weights, and for each work the same rows in the same order.

Rows are token ids, truncated so that a dialogue's prompt and response fit `max_length`; no contender truncates further. They
are stored in `<folder>/<work>.json`: `prompts`, a list of {"prompt", "responses", "pairs"}, and `order`, the index of each
step's prompts as this project's own iterator returns them.
"""

import json
import random
from itertools import islice
from pathlib import Path

import torch
from project_contender import prompt_order
from works import VOCABULARY, WORKS, Length, Work

SEED = 0
# (mean, standard deviation) of the log of lengths in tokens, as in HH's harmless dialogues with a tokenizer of 21,000 entries:
# prompt mean 119, 95th percentile 335; chosen mean 39, rejected mean 50, without the end-of-sequence token.
PROMPT_LENGTH, CHOSEN_LENGTH, REJECTED_LENGTH = (4.42, 0.85), (3.26, 0.90), (3.51, 0.90)
LONGEST = 804
# At most 8 turns of a generated conversation fit the model's positions.
LONGEST_TURN = 120


def prepare(job: dict) -> dict:
    """Write tokenizer, weights and rows into `job["folder"]`. Returns the numbers of weights in body and head."""
    folder = Path(job["folder"])
    tokenizer = _load_tokenizer(job["tokenizer"]) if job["tokenizer"] else word_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    counts = _write_model(job, tokenizer, folder / "model")
    needed = max(job["sweep_examples"], job["steps"] * max(work.prompts_per_step for work in WORKS.values()))
    texts = _dialogues(Path(job["data"]), needed) if job["data"] else _generated_texts(needed, job["shrink"])
    with (folder / "sweep.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in texts[: job["sweep_examples"]])
    for name in job["works"]:
        prompts = _prompts(WORKS[name], texts, tokenizer, job)
        order = prompt_order(prompts, WORKS[name])
        assert sorted(order) == list(range(len(prompts))), "the iterator left prompts out"
        (folder / f"{name}.json").write_text(json.dumps({"prompts": prompts, "order": order}))
    return counts


# ---- tokenizer and weights ------------------------------------------------------------------------------------------------


def word_tokenizer():
    """A word-level tokenizer with the words w0, w1, ...: a text has as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<eos>", "<pad>", "<unk>"])}
    words |= {f"w{number}": len(words) + number for number in range(VOCABULARY - len(words))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def _load_tokenizer(path: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _write_model(job: dict, tokenizer, folder: Path) -> dict:
    """Seeded random weights, in the dtype that all contenders train in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    assert len(tokenizer) <= job["model"]["vocab_size"], f"the model has fewer entries than the tokenizer's {len(tokenizer)}"
    tokens = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["model"], **tokens), dtype=getattr(torch, job["dtype"]))
    model.save_pretrained(folder)
    head = model.get_output_embeddings().weight.numel()
    body = sum(weight.numel() for weight in model.parameters()) - head - model.get_input_embeddings().weight.numel()
    return {"body_weights": body, "head_weights": head}


# ---- texts ----------------------------------------------------------------------------------------------------------------


def _dialogues(path: Path, count: int) -> list[dict]:
    """The first pair of each of the first `count` prompts in the file."""
    from preference_training.data.entries import load_records, read_entry

    records = list(islice(load_records(read_entry(str(path), {"held_out_share": 0.0, "on_bad_row": "skip"}), "train"), count))
    assert len(records) == count, f"{path} has {len(records)} prompts, {count} are needed"
    texts = []
    for record in records:
        chosen, rejected = (record.responses[index] for index in record.pairs[0])
        texts.append({"prompt": record.prompt, "chosen": chosen, "rejected": rejected})
    return texts


def _generated_texts(count: int, shrink: int) -> list[dict]:
    """Random words with the length distribution of HH's dialogues."""
    source = random.Random(SEED)

    def text(length: tuple[float, float]) -> str:
        words = min(LONGEST, max(1, round(source.lognormvariate(*length) / shrink)))
        # The first three entries are special tokens.
        return " ".join(f"w{source.randrange(VOCABULARY - 3)}" for _ in range(words))

    lengths = {"prompt": PROMPT_LENGTH, "chosen": CHOSEN_LENGTH, "rejected": REJECTED_LENGTH}
    return [{name: text(length) for name, length in lengths.items()} for _ in range(count)]


# ---- token ids ------------------------------------------------------------------------------------------------------------


def _prompts(work: Work, texts: list[dict], tokenizer, job: dict) -> list[dict]:
    count = job["steps"] * work.prompts_per_step
    if work.prompt:
        return _generated_prompts(work, count, tokenizer, job["shrink"])
    system = random.Random(SEED).choices(_ordinary_ids(tokenizer), k=work.system // job["shrink"])
    prompts = []
    for text in texts[:count]:
        responses = [tokenizer(text[name], add_special_tokens=False).input_ids for name in ("chosen", "rejected")]
        responses = [[*ids, tokenizer.eos_token_id] for ids in responses[: 1 if work.loss == "sft" else 2]]
        row = _fitted(tokenizer(text["prompt"], add_special_tokens=False).input_ids, responses, job["max_length"])
        prompts.append(row | {"prompt": system + row["prompt"], "pairs": work.pairs})
    return prompts


def _fitted(prompt: list[int], responses: list[list[int]], max_length: int) -> dict:
    """Truncate a long prompt at its start, and a response that leaves no room for the prompt at its end."""
    responses = [ids[: max_length - 1] for ids in responses]
    prompt = prompt[-(max_length - max(map(len, responses))) :]
    return {"prompt": prompt, "responses": responses}


def _ordinary_ids(tokenizer) -> list[int]:
    return [number for number in range(len(tokenizer)) if number not in tokenizer.all_special_ids]


def _generated_prompts(work: Work, count: int, tokenizer, shrink: int) -> list[dict]:
    """Prompts of random tokens, each continued level by level."""
    source, known = random.Random(SEED), _ordinary_ids(tokenizer)

    def draw(length: Length) -> list[int]:
        drawn = length if isinstance(length, int) else min(LONGEST_TURN, round(source.lognormvariate(*length)))
        return source.choices(known, k=max(2, drawn // shrink))

    def continuations(levels: tuple[tuple[int, Length], ...]) -> list[list[int]]:
        (number, length), *rest = levels
        if not rest:
            return [[*draw(length)[:-1], tokenizer.eos_token_id] for _ in range(number)]
        return [begun + end for begun in [draw(length) for _ in range(number)] for end in continuations(rest)]

    return [{"prompt": draw(work.prompt), "responses": continuations(work.levels), "pairs": work.pairs} for _ in range(count)]
