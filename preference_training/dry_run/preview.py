"""A preview of a run: its data, the tokens that the model will see, the number of steps, and the memory of one.

    prepared data, batches -> statistics, estimates -> lines of text

Trains nothing, and writes nothing but the prepared data, which the run will reuse, and data_report.html.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest

import numpy
import psutil
import torch

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import MicroBatch, prepared
from preference_training.batching.packing import UNLIMITED, PackedBatch, TokenBudget, build_packs, iterate_examples
from preference_training.batching.schedule import Schedule
from preference_training.configuration.keys import listed
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError, visible
from preference_training.core.files import first_existing
from preference_training.core.machine import pick_device
from preference_training.core.process_group import Ranks
from preference_training.core.values import counted
from preference_training.data.prompt_table import Selection
from preference_training.data.quality.checks import check_data
from preference_training.data.quality.facts import Facts, collect_facts
from preference_training.data.records.report import DataReport
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.placement import Placement, Sharded
from preference_training.dry_run.forecast import STEPS_OF_ALL_RANKS, RankTokens, describe_duration
from preference_training.dry_run.memory_estimate import step_memory
from preference_training.dry_run.scaling import (
    GIB,
    describe_traffic,
    fake_placement,
    fake_processes,
    in_device_memory,
    rank_budget,
    step_costs,
    world_size,
)
from preference_training.losses.base import ExampleKind, Loss
from preference_training.modeling.token_budget import untrained_budget
from preference_training.reporting.data_report import assess, write_data_report
from preference_training.training.monitors import warmup_warning
from preference_training.training.optimizers.schedules import warmup_steps
from preference_training.training.preparation import PreparedRun

# Steps whose batches are built to find the largest.
STEPS_INSPECTED = 100


def preview(prepared: PreparedRun, placement_class: type[Placement], batches_within: Callable) -> None:
    """Print what a run would do. `batches_within` returns the run's BatchIterator for a TokenBudget and `Ranks`.

    Raises UserError where the run could not work.
    """
    config, tokenizer, loss, data = prepared.config, prepared.tokenizer, prepared.loss, prepared.data
    names = [entry.name for entry in prepared.entries]
    facts = tuple(collect_facts(split.table) for split in data)
    paired = loss.examples == "pairs"
    print("\ntrain", *describe_data(names, data[0].reports, facts[0], paired, held_out_lines(prepared)), sep="\n")
    print("\nheld out", *describe_data(names, data[1].reports, facts[1], paired), sep="\n")
    common = numpy.intersect1d(*(found.prompt_hashes for found in facts))
    # If there are any, preparation has said so, with an example.
    print(*["\nprompts in both splits: 0"] * (len(common) == 0), "\nquality", sep="\n")
    failed = check_quality(prepared, facts)
    print("\nexamples", "  the first ones to train on; rows that are skipped or held out are not among them", sep="\n")
    train = data[0].table
    print(*describe_examples([train[k] for k in range(min(3, len(train)))], loss.examples, tokenizer, wants_color()), sep="\n")
    if loss.needs_reference and (two_models_notice := config.two_models_notice):
        print(f"\n{two_models_notice}")
    preview_steps = preview_ranks if issubclass(placement_class, Sharded) else preview_one_process
    preview_steps(prepared, placement_class, batches_within)
    if failed and config.dry_run == "strict":
        raise UserError("\n".join(["dry_run=strict: the data does not pass:", *(f"  {line}" for line in failed)]))


def check_quality(prepared: PreparedRun, facts: tuple[Facts, ...]) -> list[str]:
    """Check the data, print what was found, and write data_report.html. Returns what strict runs do not accept."""
    config = prepared.config
    train, held_out = (split.table for split in prepared.data)
    files = listed(config.contamination_files)
    quality = check_data(train, held_out, prepared.tokenizer, config.quality, files, facts)
    findings = assess(quality, config.quality)
    names = [entry.name for entry in prepared.entries]
    path = write_data_report(first_existing(config.local_dirs), names, quality, findings, prepared.tokenizer)
    print(*(f"  {finding.line}" for finding in findings), f"  data report: {path}", sep="\n", flush=True)
    return [f"{finding.key}: {finding.line}" for finding in findings if finding.failed]


def preview_one_process(prepared: PreparedRun, placement_class: type[Placement], batches_within: Callable) -> None:
    """Print steps and memory of a run in one process. Raises UserError where there is not enough memory."""
    config, loss = prepared.config, prepared.loss
    placement = placement_class(config, prepared.tokenizer)
    device = placement.device
    budget = untrained_budget(config, prepared.tokenizer, device)
    batches = batches_within(budget)
    first = first_steps(batches, budget)
    live = _has_live_reference(config, loss, batches.schedule)
    tokens = first.tokens_per_step * batches.schedule.total_steps
    devices = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
    duration = f"  {describe_duration(config, prepared.tokenizer, tokens, live, devices, device)}"
    print("\nsteps", *describe_steps(batches.schedule, first), duration, *describe_warmup(config, batches.schedule), sep="\n")
    kinds = step_memory(placement, loss, live, first.packs)
    used = used_memory(device)
    print("\nmemory", *describe_memory(kinds, first.packs, used, device.type), sep="\n", flush=True)
    check_memory(sum(kinds.values()) + used, total_memory(device), device.type)


def _has_live_reference(config: RunConfig, loss: Loss, schedule: Schedule) -> bool:
    """Whether a run computes the reference's log-probs as it needs them, as `assembly.make_reference` decides."""
    return loss.needs_reference and not config.caches_reference(schedule.visits_again and not loss.reads_tokens)


def preview_ranks(prepared: PreparedRun, placement_class: type[Sharded], batches_within: Callable) -> None:
    """Print steps, memory and communication of rank 0 of a sharded run.

    Raises UserError where batches are too small for the number of ranks, or a device is known to have too little memory.
    """
    config, loss = prepared.config, prepared.loss
    trainer, size = config.trainer, world_size(config.trainer)
    device = pick_device()
    with fake_processes(size):
        placement = fake_placement(placement_class, config, prepared.tokenizer)
        budget = rank_budget(placement)
        batches = batches_within(budget, placement.ranks)
        live = _has_live_reference(config, loss, batches.schedule)
        first = first_steps(batches, budget)
        costs = step_costs(placement, loss, live, first.packs, first.step)
    number = sum(len(micro_batch.packs) for micro_batch in first.step)
    here = trainer.world_size is None and trainer.device_memory is None
    # The first steps are whole; the last of an epoch may not be.
    tokens = first.tokens_per_step * batches.schedule.total_examples / config.batch_size
    # Of simulated devices only `peak_tflops` can be known.
    like = device if here else torch.device("cpu")
    duration = f"  {describe_duration(config, prepared.tokenizer, tokens, live, size, like)}"
    described = [*describe_steps(batches.schedule, first), duration, *describe_warmup(config, batches.schedule)]
    print("\nsteps", *described, *describe_rank(first, size, placement.ranks, budget), sep="\n")
    used = used_memory(device) if here else 0
    where = f"rank 0 of {size:,}" + (f" on {device.type}" if here else "")
    print("\nmemory", *describe_memory(costs.memory, first.packs, used, where), sep="\n")
    if trainer.cpu_offload:
        print("  parameters, reference, gradients and optimizer are in CPU memory (trainer.cpu_offload)")
    print("\ncommunication", *describe_traffic(costs.traffic, number), sep="\n", flush=True)
    if trainer.device_memory:
        check_memory(in_device_memory(config, costs.memory), int(trainer.device_memory * GIB), "each device")
    elif here and device.type == "cuda":
        check_memory(in_device_memory(config, costs.memory), total_memory(device) // torch.cuda.device_count(), "each GPU")
    elif here:
        check_memory((sum(costs.memory.values()) + used) * size, total_memory(device), f"{size} processes of this machine")


# ---- data -----------------------------------------------------------------------------------------------------------------


def describe_data(
    names: Sequence[str], reports: Sequence[DataReport], facts: Facts, paired: bool, held_out: Sequence[str] = ()
) -> list[str]:
    """Lines about one split: rows read, prompts kept, and lengths. held_out: a line, or "", on what each entry holds out."""
    lines = []
    for name, report, apart in zip_longest(names, reports, held_out, fillvalue=""):
        rows = f"{counted(report.rows_read, 'row')} read, " if report.rows_read else ""
        lines.append(f"  {name}: {rows}{counted(report.num_prompts, 'prompt')} kept")
        lines += [f"    {apart}"] * bool(apart)
        lines += [f"    {count:,} {what}" for count, what in report.counts()]
        lines += [f"    {message}" for message in (*report.remarks(), *report.bad_row_lines())]
    counts = {"prompt": facts.prompts, "response": facts.responses, "pair" if paired else "example": facts.examples}
    counts["token"] = facts.tokens
    lines.append("  " + ", ".join(counted(count, what) for what, count in counts.items()))
    if not facts.prompts:
        return lines
    for label, lengths in (("prompts", facts.prompt_lengths), ("responses", facts.response_lengths)):
        median, most, longest = numpy.percentile(lengths, [50, 95, 100]).round().astype(int)
        lines.append(f"  {label}: median {median:,} tokens, 95% up to {most:,}, longest {longest:,}")
    lines.append("  prompt with its longest response, tokens:")
    lines += [f"    {line}" for line in histogram(facts.example_lengths)]
    if paired:
        lines.append(f"  duplicate pairs: {facts.votes.duplicates:,}; pairs in both directions: {facts.votes.contradictory:,}")
    return lines


def held_out_lines(prepared: PreparedRun) -> list[str]:
    """A line on what each entry of `datasets` holds out of the rows that it trains on; "" where nothing."""
    pairs = zip(prepared.entries, prepared.data[-1].reports, strict=True)
    return [
        f"{counted(report.num_prompts, 'more prompt')} held out (held_out_share={entry.held_out_share:g})"
        if entry.uses_held_out_share
        else ""
        for entry, report in pairs
    ]


def histogram(values: numpy.ndarray, rows: int = 8, width: int = 40) -> list[str]:
    """A histogram as lines: bounds, bar, count."""
    counts, edges = numpy.histogram(values, bins=rows, range=(0, int(values.max()) + 1))
    bounds = [(int(numpy.ceil(low)), int(numpy.ceil(high)) - 1) for low, high in pairwise(edges)]
    digits = len(str(bounds[-1][1]))
    return [
        f"{low:>{digits}}-{high:<{digits}} {'█' * round(width * count / counts.max())}{'▏' * bool(count)} {count:,}"
        for (low, high), count in zip(bounds, counts, strict=True)
    ]


# ---- examples, token by token ---------------------------------------------------------------------------------------------


def describe_examples(prompts: Iterable[TokenizedPrompt], kind: ExampleKind, tokenizer, color: bool) -> list[str]:
    """Examples token by token as the model sees them; scored tokens are green, or between « and » without color.

    Special tokens are shown by name, spaces as ▁, line ends as ⏎.
    """
    lines = [
        f"  tokens are separated by |, spaces are ▁, line ends ⏎; scored tokens are {'green' if color else 'between « and »'}"
    ]
    for prompt in prompts:
        shown = tokens_shown(prompt.prompt_ids, tokenizer, False, color)
        lines.append(f"  {visible(prompt.source)}\n    prompt    {shown}")
        names = response_names(prompt, kind)
        for index, name in enumerate(names):
            lines.append(f"    {name:9} {response_shown(prompt, index, tokenizer, color)}")
        for name in ("weights", "margins"):
            if values := getattr(prompt, name):
                lines.append(f"    {name}: {', '.join(f'{value:g}' for value in values)}")
    return lines


def response_names(prompt: TokenizedPrompt, kind: ExampleKind) -> list[str]:
    """What each response of a prompt is in its examples, which are of a kind."""
    names = ["response" if not prompt.examples else "other"] * len(prompt.responses)
    for k, (first, *others) in enumerate(prompt.examples):
        if prompt.labels:
            names[first] = "desirable" if prompt.labels[k] else "undesirable"
            for index in others:
                names[index] = "mismatched"
        elif kind == "pairs":
            names[first] = "preferred"
        else:
            for place, index in enumerate((first, *others), start=1):
                names[index] = f"rank {place}"
    return names


def response_shown(prompt: TokenizedPrompt, index: int, tokenizer, color: bool) -> str:
    """A response token by token, with its scored spans marked."""
    response = prompt.responses[index]
    cuts = [0, *(cut for span in prompt.scored_spans(index) for cut in span), len(response)]
    parts = [(response[start:end], k % 2 == 1) for k, (start, end) in enumerate(pairwise(cuts)) if start < end]
    return "|".join(tokens_shown(ids, tokenizer, scored, color) for ids, scored in parts)


def tokens_shown(ids: Sequence[int], tokenizer, scored: bool, color: bool) -> str:
    """Token ids as text, one by one."""
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.convert_ids_to_tokens(token) if token in special else visible_text(token, tokenizer) for token in ids]
    # What is in the data never acts on a terminal.
    texts = [visible(text) for text in texts]
    if not color:
        return f"«{'|'.join(texts)}»" if scored else "|".join(texts)
    start = "\033[32m" if scored else "\033[2m"
    return "|".join(
        f"\033[{'1;7' if token in special else ''}m{start}{text}\033[0m" for token, text in zip(ids, texts, strict=True)
    )


# Characters that would be invisible, or break the line.
VISIBLE = str.maketrans({" ": "▁", "\n": "⏎", "\r": "␍", "\t": "⇥"})


def visible_text(token: int, tokenizer) -> str:
    """A token's text with visible spaces, including those that a tokenizer drops when it decodes a single token."""
    name, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if "\ufffd" in text:
        # Some of the bytes of one character.
        return name
    # SentencePiece writes spaces as ▁, and drops the first one when decoding.
    missing = (len(name) - len(name.lstrip("▁"))) - (len(text) - len(text.lstrip(" ")))
    return (" " * missing + text).translate(VISIBLE)


def wants_color() -> bool:
    """Whether to print colors: to a terminal unless NO_COLOR is set, and wherever FORCE_COLOR is."""
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


# ---- steps and memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstSteps:
    """This rank's packs of the first steps of a run.

    packs: the two largest, or only the largest if no step has several. step: in which this rank has most tokens. tokens: packed
    ones of all these steps; row_tokens: those of a row for each member of each example. ranks: the tokens of every rank in the
    first of these steps, None where there is only this one.
    """

    packs: list[PackedBatch]
    step: list[MicroBatch]
    number: int
    tokens: int
    row_tokens: int
    ranks: RankTokens | None = None

    @property
    def tokens_per_step(self) -> float:
        """The packed tokens of a step on all ranks, on average."""
        return self.tokens / self.number if self.ranks is None else self.ranks.per_step


def first_steps(batches: BatchIterator, budget: TokenBudget) -> FirstSteps:
    """Inspect the first STEPS_INSPECTED steps, and for the largest packs also the longest prompt of all."""
    longest = Selection(batches.schedule.prompts, numpy.array([int(batches.schedule.prompts.num_tokens.argmax())]))
    packs = [prepared(pack, batches.ranks) for pack in build_packs(list(iterate_examples(longest)), budget)]
    several, most, largest, row_tokens, tokens, begun = False, 0, [], 0, [], []
    for step in islice(batches, STEPS_INSPECTED):
        found = [pack for micro_batch in step for pack in micro_batch.packs]
        begun += [step] * (len(begun) < STEPS_OF_ALL_RANKS)
        several |= len(found) > 1
        row_tokens += sum(pack.num_row_tokens for pack in found)
        tokens.append(sum(pack.num_tokens for pack in found))
        # Fillers are computed as well.
        computed = sum(len(pack.input_ids) for pack in found)
        if computed > most:
            most, largest = computed, step
        packs = sorted([*packs, *found], key=lambda pack: len(pack.input_ids))[-2:]
    size = batches.ranks.size
    ranks = RankTokens.of(begun, batches.budget, size) if size > 1 else None
    return FirstSteps(packs if several else packs[-1:], largest, len(tokens), sum(tokens), row_tokens, ranks)


def describe_warmup(config: RunConfig, schedule: Schedule) -> list[str]:
    """A warning where the learning rate would not have risen at the end of the run."""
    steps = schedule.total_steps
    text = warmup_warning(warmup_steps(config, steps), steps, config.lr)
    return [f"  warning: {text}"] if text else []


def describe_steps(schedule: Schedule, first: FirstSteps) -> list[str]:
    """Lines about the number of steps, their tokens, and what prefix sharing saves."""
    saved = 1 - first.tokens / first.row_tokens
    size, which = schedule.batch_size, "the first step" if first.number == 1 else f"the first {first.number} steps"
    mean = f"{first.tokens_per_step:,.0f} tokens per step on average"
    whose = "" if first.ranks is None else " of rank 0"
    return [
        f"  {schedule.total_steps:,} steps of {size} examples, {schedule.total_examples:,} in total; {mean}",
        f"  {first.tokens:,} tokens{whose} in {which} instead of {first.row_tokens:,} in rows: {saved:.0%} less with prefix "
        "sharing (if the model passes its proof)",
    ]


def describe_rank(first: FirstSteps, processes: int, ranks: Ranks, budget: TokenBudget) -> list[str]:
    """Lines about what ranks compute in a step."""
    packs = [pack for micro_batch in first.step for pack in micro_batch.packs]
    examples = sum(pack.num_examples for pack in packs if not pack.is_filler)
    tokens = sum(len(pack.input_ids) for pack in packs)
    together = processes // ranks.size
    whose = "rank 0" if together == 1 else f"the group of rank 0, {together} processes,"
    lines = [
        f"  {processes:,} processes, {ranks.size:,} of them with different data{_together(ranks)}",
        f"  {whose} in the largest of the first {STEPS_INSPECTED} steps: {tokens:,} tokens in {counted(len(packs), 'pack')}; "
        f"examples: {examples:,}",
        *([f"  {first.ranks.line(together)}"] if first.ranks else []),
    ]
    assumed = (
        "  assumes that a micro-batch is computed in one pack; set trainer.device_memory or max_tokens_per_microbatch otherwise"
    )
    return [*lines, assumed] if budget == UNLIMITED else lines


def _together(ranks: Ranks) -> str:
    """Which processes compute a pack together, if any do."""
    return f"; each pack is computed by {ranks.context.size} processes together" if ranks.context.size > 1 else ""


def used_memory(device: torch.device) -> int:
    """Bytes of a device's memory that libraries and data take already; call it once a step's imports are done."""
    return psutil.Process().memory_info().rss if device.type != "cuda" else 0


def describe_memory(kinds: dict[str, int], packs: Sequence[PackedBatch], used: int, device: str) -> list[str]:
    """Lines about the peak memory of a step by kind; `used` is what libraries and data take already, in bytes."""
    names = {"data": "libraries and data"}
    kinds = {name: size for name, size in kinds.items() if size} | ({"data": used} if used else {})
    total = sum(kinds.values())
    unit, name = (GIB, "GB") if total >= GIB / 10 else (GIB / 1024, "MB")
    lines = [f"  {names.get(kind, kind):20}{size / unit:8.3f} {name}" for kind, size in kinds.items()]
    tokens = max(pack.num_computed for pack in packs)
    return [
        f"  peak on {device}, with {tokens:,} tokens computed at once:",
        *lines,
        f"  {'total':20}{total / unit:8.3f} {name}",
    ]


def total_memory(device: torch.device) -> int:
    """The total memory of a device in bytes, used or not; of all GPUs together, since a model may span them."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    return sum(torch.cuda.mem_get_info(number)[1] for number in range(torch.cuda.device_count()))


def check_memory(needed: int, available: int, device: str) -> None:
    """Raise UserError where a step needs more memory than is available, both in bytes."""
    if needed > available:
        raise UserError(
            f"memory: a step would need {needed / GIB:.1f} GB on {device}, which has {available / GIB:.1f} GB. Lower "
            "max_tokens_per_microbatch or max_length, set activation_checkpointing=true, model.policy_dtype=bfloat16, "
            "master_weights=false or reference_logps=cached, or choose a smaller model."
        )
