"""A look before training: what the data holds, what a model will read of it, how long it takes and how much memory.

    prepared data, batches -> facts, as lines of text

Nothing is trained and nothing written but the prepared data, which the run will find.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy
import psutil
import torch
import xxhash

from preference_training.batching.batches import (
    UNLIMITED,
    BatchIterator,
    MicroBatch,
    PackedBatch,
    TokenBudget,
    examples_of,
    pieces_of,
)
from preference_training.configuration.validation import caches_reference, is_sharded, two_models_asked_for
from preference_training.core.devices import pick_device
from preference_training.core.errors import UserError
from preference_training.core.ranks import Ranks
from preference_training.data.entries import read_entries
from preference_training.data.preparation import Prepared
from preference_training.data.prompt_table import PromptTable
from preference_training.data.rows.records import DataReport
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.dry_run.memory_estimate import step_memory
from preference_training.dry_run.scaling import (
    GIB,
    budget_of,
    fake_processes,
    in_device_memory,
    laid_out,
    lines_of_traffic,
    step_costs,
    world_size,
)
from preference_training.modeling.token_budget import untrained_budget

# Steps whose batches are made to see how long they are.
STEPS_LOOKED_AT = 100


def look(config, tokenizer, loss, data: tuple[Prepared, Prepared], batches_within: Callable) -> None:
    """Print what a run would do. `batches_within` gives the run's BatchIterator for a TokenBudget and `Ranks`.

    Raises UserError where the run could not work.
    """
    names = [entry.name for entry in read_entries(config)]
    facts = [facts_of(split.table) for split in data]
    for title, split, found in zip(("train", "held out"), data, facts, strict=True):
        print(f"\n{title}", *lines_of_data(names, split.reports, found, loss.paired), sep="\n")
    both = numpy.intersect1d(*(found.prompt_hashes for found in facts))
    print(f"\nprompts that are in both: {len(both):,}", "\nexamples", sep="\n")
    train = data[0].table
    print(*lines_of_examples([train[k] for k in range(min(3, len(train)))], tokenizer, wants_colour()), sep="\n")
    if loss.needs_reference and (two_models := two_models_asked_for(config)):
        print(f"\n{two_models}")
    look_at_steps = look_at_ranks if is_sharded(config) else look_at_one_process
    look_at_steps(config, tokenizer, loss, facts[0], batches_within)


def look_at_one_process(config, tokenizer, loss, facts: "Facts", batches_within: Callable) -> None:
    """Print steps and memory of a run in this process alone. Raises UserError where there is too little memory."""
    device = pick_device()
    budget = untrained_budget(config, tokenizer, device)
    batches = batches_within(budget)
    print("\nsteps", *lines_of_steps(batches, facts), sep="\n")
    live = loss.needs_reference and not caches_reference(config, batches.visits_again)
    pieces, _ = largest_pieces(batches, budget)
    kinds = step_memory(config, tokenizer, loss, live, pieces)
    taken = memory_taken(device)
    print("\nmemory", *lines_of_memory(kinds, pieces, taken, device.type), sep="\n", flush=True)
    check_memory(sum(kinds.values()) + taken, memory_of(device), device.type)


def look_at_ranks(config, tokenizer, loss, facts: "Facts", batches_within: Callable) -> None:
    """Print steps, memory and communication of one of the processes of a sharded run.

    Raises UserError where batches are too small for so many, or where a device has too little memory, if that is known.
    """
    trainer, size = config.trainer, world_size(config.trainer)
    device = pick_device()
    with fake_processes(size):
        ranks, layout = laid_out(config)
        budget = budget_of(config, tokenizer, layout)
        batches = batches_within(budget, ranks)
        live = loss.needs_reference and not caches_reference(config, batches.visits_again)
        pieces, step = largest_pieces(batches, budget)
        costs = step_costs(config, tokenizer, loss, live, pieces, step, ranks, layout)
    number = sum(len(micro_batch.pieces) for micro_batch in step)
    print("\nsteps", *lines_of_steps(batches, facts), *lines_of_rank(step, size, ranks, budget), sep="\n")
    here = trainer.world_size is None and trainer.device_memory is None
    taken = memory_taken(device) if here else 0
    where = f"rank 0 of {size:,}" + (f" on {device.type}" if here else "")
    print("\nmemory", *lines_of_memory(costs.memory, pieces, taken, where), sep="\n")
    if trainer.cpu_offload:
        print("  parameters, reference, gradients and optimizer are in the machine's memory (trainer.cpu_offload)")
    print("\ncommunication", *lines_of_traffic(costs.traffic, number), sep="\n", flush=True)
    if trainer.device_memory:
        check_memory(in_device_memory(config, costs.memory), int(trainer.device_memory * GIB), "each device")
    elif here and device.type == "cuda":
        check_memory(in_device_memory(config, costs.memory), memory_of(device) // torch.cuda.device_count(), "each GPU")
    elif here:
        check_memory((sum(costs.memory.values()) + taken) * size, memory_of(device), f"{size} processes of this machine")


# ---- facts of the data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What one split holds. Lengths are tokens; hashes stand for prompts (sorted, each once), [N] uint64.

    packed_tokens counts every prompt and response once; repeated_tokens a prompt for each response of each pair, as where
    pairs are computed row by row. duplicate_pairs are seen more than once; contradictory ones also the other way round.
    """

    prompts: int
    examples: int
    responses: int
    prompt_lengths: numpy.ndarray
    response_lengths: numpy.ndarray
    example_lengths: numpy.ndarray
    packed_tokens: int
    repeated_tokens: int
    duplicate_pairs: int
    contradictory_pairs: int
    prompt_hashes: numpy.ndarray


def facts_of(table: PromptTable) -> Facts:
    """One pass over a table."""
    forward, backward = [], []
    prompt_lengths, response_lengths, example_lengths = [], [], []
    repeated = 0
    hashes = table.prompt_hashes
    for prompt, key in zip(table, hashes.tolist(), strict=True):
        keys = [xxhash.xxh3_64_intdigest(repr((key, response)).encode()) for response in prompt.responses]
        forward += [hash((keys[i], keys[j])) for i, j in prompt.pairs]
        backward += [hash((keys[j], keys[i])) for i, j in prompt.pairs]
        lengths = [len(response) for response in prompt.responses]
        prompt_lengths.append(len(prompt.prompt_ids))
        response_lengths += lengths
        example_lengths.append(len(prompt.prompt_ids) + max(lengths))
        used = [index for pair in prompt.pairs for index in pair] or range(len(lengths))
        repeated += sum(len(prompt.prompt_ids) + lengths[index] for index in used)
    pairs = numpy.array(forward, numpy.int64)
    return Facts(
        prompts=len(table),
        examples=int(table.num_examples.sum()),
        responses=table.num_responses,
        prompt_lengths=numpy.array(prompt_lengths),
        response_lengths=numpy.array(response_lengths),
        example_lengths=numpy.array(example_lengths),
        packed_tokens=int(table.num_tokens.sum()),
        repeated_tokens=repeated,
        duplicate_pairs=len(pairs) - len(numpy.unique(pairs)),
        contradictory_pairs=len(numpy.intersect1d(pairs, numpy.array(backward, numpy.int64))) // 2,
        prompt_hashes=numpy.unique(hashes),
    )


def lines_of_data(names: Sequence[str], reports: Sequence[DataReport], facts: Facts, paired: bool) -> list[str]:
    """What was read, what is left of it, and how long it is."""
    lines = []
    for name, report in zip(names, reports, strict=True):
        rows = f"{report.rows_read:,} rows read, " if report.rows_read else ""
        lines.append(f"  {name}: {rows}{report.num_prompts:,} prompts kept")
        lines += [f"    {count:,} {what}" for count, what in report.counts()]
        lines += [f"    {message}" for message in (*report.remarks(), *report.bad_rows)]
    what = "pairs" if paired else "examples"
    lines.append(
        f"  {facts.prompts:,} prompts, {facts.responses:,} responses, {facts.examples:,} {what}, {facts.packed_tokens:,} tokens"
    )
    if not facts.prompts:
        return lines
    for label, lengths in (("prompts", facts.prompt_lengths), ("responses", facts.response_lengths)):
        half, most, longest = numpy.percentile(lengths, [50, 95, 100]).round().astype(int)
        lines.append(f"  {label}: median {half:,} tokens, 95% up to {most:,}, longest {longest:,}")
    lines.append("  prompt with its longest response, tokens:")
    lines += [f"    {line}" for line in histogram(facts.example_lengths)]
    if paired:
        lines.append(f"  pairs seen before: {facts.duplicate_pairs:,}; pairs in both directions: {facts.contradictory_pairs:,}")
    return lines


def histogram(values: numpy.ndarray, rows: int = 8, width: int = 40) -> list[str]:
    """A line for each range of values: bounds, bar, count."""
    counts, edges = numpy.histogram(values, bins=rows, range=(0, int(values.max()) + 1))
    bounds = [(int(numpy.ceil(low)), int(numpy.ceil(high)) - 1) for low, high in pairwise(edges)]
    digits = len(str(bounds[-1][1]))
    return [
        f"{low:>{digits}}-{high:<{digits}} {'█' * round(width * count / counts.max())}{'▏' * bool(count)} {count:,}"
        for (low, high), count in zip(bounds, counts, strict=True)
    ]


# ---- examples, token by token ---------------------------------------------------------------------------------------------


def lines_of_examples(prompts: Iterable[TokenizedPrompt], tokenizer, colour: bool) -> list[str]:
    """Examples as a model reads them: tokens apart, what is scored in green, or between « and » without colour.

    Special tokens are shown by their names, blanks as ▁, line ends as ⏎.
    """
    lines = [
        f"  tokens are separated by |, blanks are ▁, line ends ⏎; scored ones are {'green' if colour else 'between « and »'}"
    ]
    for prompt in prompts:
        shown = tokens_shown(prompt.prompt_ids, tokenizer, False, colour)
        lines.append(f"  {prompt.source}\n    prompt    {shown}")
        chosen = {i for i, _ in prompt.pairs}
        for index, response in enumerate(prompt.responses):
            label = "response " if not prompt.pairs else "preferred" if index in chosen else "other    "
            lines.append(f"    {label} {tokens_shown(response, tokenizer, True, colour)}")
    return lines


def tokens_shown(ids: Sequence[int], tokenizer, scored: bool, colour: bool) -> str:
    """Tokens one by one."""
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.convert_ids_to_tokens(token) if token in special else visible_text(token, tokenizer) for token in ids]
    if not colour:
        return f"«{'|'.join(texts)}»" if scored else "|".join(texts)
    start = "\033[32m" if scored else "\033[2m"
    return "|".join(
        f"\033[{'1;7' if token in special else ''}m{start}{text}\033[0m" for token, text in zip(ids, texts, strict=True)
    )


# What would not be seen between two tokens, or would break the line.
VISIBLE = str.maketrans({" ": "▁", "\n": "⏎", "\r": "␍", "\t": "⇥"})


def visible_text(token: int, tokenizer) -> str:
    """A token's text with visible blanks, including those that a tokenizer drops when it decodes a token alone."""
    name, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if "\ufffd" in text:
        # A part of a letter's bytes.
        return name
    # SentencePiece writes blanks so, and takes the first one for its own.
    missing = (len(name) - len(name.lstrip("▁"))) - (len(text) - len(text.lstrip(" ")))
    return (" " * missing + text).translate(VISIBLE)


def wants_colour() -> bool:
    """Whether standard output shows colours: a terminal, unless NO_COLOR says otherwise; or FORCE_COLOR."""
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


# ---- steps and memory -------------------------------------------------------------------------------------------------------


def lines_of_steps(batches: BatchIterator, facts: Facts) -> list[str]:
    """How many steps there are, how long they are, and what sharing prompts saves."""
    examples = batches.total_examples
    steps = batches.total_steps
    saved = 1 - facts.packed_tokens / facts.repeated_tokens
    tokens = facts.packed_tokens * batches.batch_size / facts.examples
    return [
        f"  {steps:,} steps of {batches.batch_size} examples, {examples:,} in all; {tokens:,.0f} tokens a step on average",
        f"  prompts computed once for all their responses: {facts.packed_tokens:,} tokens an epoch in place of "
        f"{facts.repeated_tokens:,}, {saved:.0%} less (where the model proves that it can, when its weights are loaded)",
    ]


def lines_of_rank(step: Sequence[MicroBatch], processes: int, ranks: Ranks, budget: TokenBudget) -> list[str]:
    """What one rank of several computes of a step."""
    pieces = [piece for micro_batch in step for piece in micro_batch.pieces]
    examples = sum(piece.num_examples for piece in pieces if not piece.is_filler)
    tokens = sum(len(piece.input_ids) for piece in pieces)
    lines = [
        f"  {processes:,} processes, {ranks.size:,} of which differ in their data",
        f"  rank 0 in the largest of the first {STEPS_LOOKED_AT} steps: {tokens:,} tokens in {len(pieces):,} pieces; examples: "
        f"{examples:,}",
    ]
    assumed = "  a micro-batch is taken to be computed at once; trainer.device_memory or max_tokens_per_microbatch say when not"
    return [*lines, assumed] if budget == UNLIMITED else lines


def largest_pieces(batches: BatchIterator, budget: TokenBudget) -> tuple[list[PackedBatch], list[MicroBatch]]:
    """Two pieces that a step computes one after the other, as large as they come; one where steps have one piece only.

    Also the step in which this rank has most tokens. Looked at are the first steps, and for pieces the longest prompt of all.
    """
    longest = batches.prompts.select(numpy.array([int(batches.prompts.num_tokens.argmax())]))
    pieces = pieces_of(list(examples_of(longest)), budget)
    several, most, largest = False, 0, []
    for step in islice(batches, STEPS_LOOKED_AT):
        found = [piece for micro_batch in step for piece in micro_batch.pieces]
        several |= len(found) > 1
        tokens = sum(len(piece.input_ids) for piece in found)
        if tokens > most:
            most, largest = tokens, step
        pieces = sorted([*pieces, *found], key=lambda piece: len(piece.input_ids))[-2:]
    return (pieces if several else pieces[-1:]), largest


def memory_taken(device: torch.device) -> int:
    """What libraries and data take of a device's memory, in bytes; to be asked when what a step imports is there."""
    return psutil.Process().memory_info().rss if device.type != "cuda" else 0


def lines_of_memory(kinds: dict[str, int], pieces: Sequence[PackedBatch], taken: int, device: str) -> list[str]:
    """The memory of a step by kind. `taken` is what libraries and data take already, in bytes."""
    names = {"data": "libraries and data"}
    kinds = {name: size for name, size in kinds.items() if size} | ({"data": taken} if taken else {})
    lines = [f"  {names.get(kind, kind):20}{size / GIB:8.3f} GB" for kind, size in kinds.items()]
    tokens = max(len(piece.input_ids) for piece in pieces)
    return [
        f"  on {device}, when most is held; {tokens:,} tokens are computed at once:",
        *lines,
        f"  {'together':20}{sum(kinds.values()) / GIB:8.3f} GB",
    ]


def memory_of(device: torch.device) -> int:
    """All memory of a device, used or not; of all GPUs together, over which a model's layers are laid. Unit: bytes."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    return sum(torch.cuda.mem_get_info(number)[1] for number in range(torch.cuda.device_count()))


def check_memory(needed: int, available: int, device: str) -> None:
    """Raise UserError where a step needs more memory than there is, both in bytes."""
    if needed > available:
        raise UserError(
            f"memory: a step would hold {needed / GIB:.1f} GB on {device}, which has {available / GIB:.1f} GB. Lower "
            "max_tokens_per_microbatch or max_length, set activation_checkpointing=true, model.policy_dtype=bfloat16, "
            "master_weights=false or reference_logps=cached, or choose a smaller model."
        )
