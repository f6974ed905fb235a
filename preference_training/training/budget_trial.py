"""The token budget by measurement: forward and backward on trial, before the first step, in packs of growing size.

    rows of the data's lengths, random ids -> the run's step -> peak memory -> bytes = fixed + per token * tokens -> the budget

Weights, optimizer, random streams and the loss's statistics are afterwards what they were before.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Protocol

import numpy
import torch
from torch import nn

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import Example, TokenBudget, iterate_examples
from preference_training.core.errors import UserError
from preference_training.core.process_group import SINGLE_PROCESS, Ranks, is_distributed, reshard, to_local
from preference_training.core.random_streams import random_streams, restore_random_streams
from preference_training.data.prompt_table import PromptTable, shuffled
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.placement import Placement
from preference_training.losses.base import Loss
from preference_training.modeling.state import compute_device
from preference_training.modeling.token_budget import round_to_two_bits
from preference_training.training.optimizers.building import build_optimizer
from preference_training.training.parts import Models, RunState
from preference_training.training.step import TrainingStep

# The share of the memory that stays free: real packs differ from those on trial, and the allocator cannot use every gap.
RESERVE = 0.1
# Tokens of the first pack on trial. The next ones have at most so many times as many tokens as one that was measured.
FIRST, GROWTH = 1024, 4
# The line is not followed below this: most rows would exceed such a budget alone.
SMALLEST = 256


class MemoryMeter(Protocol):
    """Measures the memory of the devices that a model computes on, in bytes, in the order of `devices`."""

    devices: Sequence[torch.device]

    def room(self) -> list[int]:
        """What this process could take of each device: what it holds now, and what is free."""

    def peaks(self, work: Callable[[], object]) -> list[int]:
        """The most that this process takes of each device while it does some work. Raises torch.OutOfMemoryError."""


class CudaMeter:
    """The memory of GPUs as torch reserves it, gaps of its allocator included."""

    def __init__(self, devices: Sequence[torch.device]):
        self.devices = devices

    def room(self) -> list[int]:
        """What is free, and what torch has reserved."""
        return [torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) for device in self.devices]

    def peaks(self, work: Callable[[], object]) -> list[int]:
        """The most that torch has reserved of each device during some work."""
        torch.cuda.empty_cache()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        work()
        return [torch.cuda.max_memory_reserved(device) for device in self.devices]


def memory_meter(policy: nn.Module) -> MemoryMeter | None:
    """The meter of the devices that a model computes on; None where nothing measures them, as on a CPU."""
    device = compute_device(policy)
    if device.type != "cuda":
        return None
    others = {weight.device for weight in policy.parameters() if weight.device.type == "cuda"} - {device}
    return CudaMeter([device, *sorted(others, key=str)])


# ---- the size ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A pack on trial: its tokens, and the bytes that a step with it needs of each device."""

    tokens: int
    needed: Sequence[int]


@dataclass(frozen=True)
class Choice:
    """The budget that was chosen, and the pack that was measured at it."""

    limit: int
    measured: Measured


def largest_limit(measure: Callable[[int], Measured | None], room: Sequence[int], most: int, ranks: Ranks) -> Choice:
    """The largest budget, of two leading bits, whose packs need no more than the `room` in bytes of each device.

    measure: computes a pack of at most so many tokens; None where it runs out of memory, and the size is halved. Sizes grow
    along a line through the last two packs until the line says that no more fits; the last pack verifies the budget. most:
    tokens of the largest micro-batch, more than which no pack can have. All ranks choose the same. Raises UserError where not
    even the smallest pack can be computed.
    """
    limit, ceiling = min(FIRST, most), most
    before: Measured | None = None
    while True:
        found = measure(limit)
        if found is None:
            if limit <= SMALLEST // 4:
                raise UserError(_too_little(limit))
            before, ceiling = None, limit // 2
            limit = ceiling
            continue
        fitting = ranks.all_reduce_min(tokens_that_fit(before, found, room, limit))
        wanted = min(fitting, ceiling)
        wanted = wanted if wanted == most else max(SMALLEST, round_to_two_bits(wanted))
        wanted = min(wanted, ceiling, GROWTH * limit)
        if wanted == limit:
            return Choice(limit, found)
        if wanted < limit:
            ceiling = wanted
        before, limit = found, wanted


def tokens_that_fit(before: Measured | None, found: Measured, room: Sequence[int], limit: int) -> int:
    """How many tokens fit, by the line through two packs on the device that has room for the fewest.

    Without a line, half as many as `limit` where the pack does not fit, else more.
    """
    answers = []
    for number, (needed, most) in enumerate(zip(found.needed, room, strict=True)):
        more = 0 if before is None else found.tokens - before.tokens
        per_token = (needed - before.needed[number]) / more if before is not None and more else 0.0
        if per_token > 0:
            answers.append(int(found.tokens + (most - needed) / per_token))
        else:
            answers.append(GROWTH * limit if needed <= most else limit // 2)
    return max(1, min(answers))


# What to do about too little memory.
REMEDIES = (
    "Set activation_checkpointing=true, model.policy_dtype=bfloat16 or reference_logps=cached, shard the weights "
    "(trainer=FSDPTrainer), or choose an adapter or a smaller model."
)


def _too_little(limit: int) -> str:
    return f"memory: forward and backward ran out of memory with {limit} tokens at once. {REMEDIES}"


# ---- the packs on trial -----------------------------------------------------------------------------------------------------


def rows_on_trial(prompts: PromptTable) -> Iterator[TokenizedPrompt]:
    """Prompts with the lengths, examples and scored spans of the data, in an order of their own, without end.

    Their token ids are drawn from the row's own, so that they are ids of text and share as good as nothing.
    """
    stream = numpy.random.default_rng(0)
    for index in cycle(shuffled(len(prompts), "token budget").tolist()):
        prompt = prompts[index]
        known = numpy.array(prompt.prompt_ids + prompt.responses[0])
        drawn = [stream.choice(known, len(ids)).tolist() for ids in (prompt.prompt_ids, *prompt.responses)]
        yield replace(prompt, prompt_ids=drawn[0], responses=drawn[1:])


def examples_on_trial(prompts: PromptTable, limit: int) -> list[Example]:
    """As many examples as `limit` tokens hold, at least one."""
    examples: list[Example] = []
    tokens = 0
    for prompt in rows_on_trial(prompts):
        tokens += len(prompt.prompt_ids) + sum(map(len, prompt.responses))
        if examples and tokens > limit:
            return examples
        examples += iterate_examples([prompt])
        if tokens >= limit:
            return examples
    return examples


def largest_micro_batch(prompts: PromptTable, examples: int, ranks: int = 1) -> int:
    """At least as many tokens as a rank gets of any micro-batch of so many examples, in two leading bits.

    The longest first, each to the rank with the fewest tokens: none has more than the mean and one prompt (Graham 1969).
    """
    longest = numpy.partition(prompts.num_tokens, -min(examples, len(prompts)))[-examples:]
    total, most = int(longest.sum()), int(longest.max())
    largest = min(total, total // ranks + most)
    rounded = round_to_two_bits(largest)
    return rounded if rounded == largest else round_to_two_bits(largest + (1 << (largest.bit_length() - 2)))


# ---- the trial --------------------------------------------------------------------------------------------------------------


class Trial:
    """Computes packs as a run's steps do, and measures them."""

    def __init__(self, placement: Placement, models: Models, prompts: PromptTable, meter: MemoryMeter):
        self.placement, self.prompts, self.meter = placement, prompts, meter
        self.step = TrainingStep(placement, models, RunState(), total_steps=0)
        self.to_come = optimizer_bytes(models.policy, placement.config, meter.devices)

    def measure(self, limit: int) -> Measured | None:
        """Forward and backward of two packs of at most `limit` tokens, the second with the gradient of the first in memory.

        Returns None where that runs out of memory, in one process; the others would wait for this one.
        """
        # Every rank computes all of it, those of a context group together.
        ranks = replace(SINGLE_PROCESS, context=self.placement.ranks.context)
        whole = MicroBatch.of(examples_on_trial(self.prompts, limit * ranks.context.size), ranks=ranks)
        batch = [replace(whole, packs=whole.packs * 2)]
        try:
            peaks = self.meter.peaks(lambda: self.step.backward(batch))
        except torch.OutOfMemoryError as error:
            if is_distributed():
                raise UserError(
                    f"max_tokens_per_microbatch: out of memory on trial with {limit} tokens. Set it to {limit // 2}."
                ) from error
            peaks = []
        self._clear()
        needed = [peak + more for peak, more in zip(peaks, self.to_come, strict=False)]
        return Measured(whole.packs[0].num_computed, needed) if peaks else None

    def remove_hooks(self) -> None:
        """Leave the policy as it was: the run's own step adds hooks again."""
        self.step.balance.recorder.remove()
        self.step.noise.remove()

    def _clear(self) -> None:
        self.step.updater.optimizer.zero_grad(set_to_none=True)
        gc.collect()


def optimizer_bytes(policy: nn.Module, config, devices: Sequence[torch.device]) -> list[int]:
    """The bytes that the optimizer's states, and its float32 copies of weights, will take of each device."""
    numbers: Counter = Counter()
    for weight in policy.parameters():
        if weight.requires_grad:
            shard = to_local(weight)
            numbers[shard.device, shard.dtype] += shard.numel()
    return [
        round(sum(number * _state_bytes(config, *key) for key, number in numbers.items() if key[0] == device))
        for device in devices
    ]


def _state_bytes(config, device: torch.device, dtype: torch.dtype) -> float:
    """The bytes that the configured optimizer keeps for each weight of a dtype, as a step on some weights shows."""
    module = nn.Module()
    # As many as 8-bit optimizers need to keep 8 bits, and their shared code books take little of.
    module.weight = nn.Parameter(torch.zeros(1024, 1024, dtype=dtype, device=device))
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer = build_optimizer(module, config)
    optimizer.step()
    kept = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept) / module.weight.numel()


def measured_budget(
    placement: Placement, policy: nn.Module, loss: Loss, prompts: PromptTable, live_reference: bool
) -> TokenBudget | None:
    """The largest token budget whose packs fit into memory, as packs on trial show; None where nothing measures memory.

    live_reference: whether the run's reference is in memory. Raises UserError where not even a small pack can be computed.
    """
    meter = memory_meter(policy)
    if meter is None:
        return None
    streams, remembered, was_training = random_streams(), loss.state_dict(), policy.training
    config, ranks = placement.config, placement.ranks
    most = largest_micro_batch(prompts, config.batch_size // config.gradient_accumulation_steps, ranks.size)
    most = -(-most // ranks.context.size)
    trial = None
    try:
        reference = placement.reference(policy) if live_reference else _no_reference if loss.needs_reference else None
        room = [round(size * (1 - RESERVE)) for size in meter.room()]
        trial = Trial(placement, Models(policy, reference, loss), prompts, meter)
        # What compiling and the libraries' own buffers take for the first time is no pack's.
        trial.measure(min(FIRST, most))
        choice = largest_limit(trial.measure, room, most, ranks)
        trial.step.updater.expect_gradients(1)
        del reference
    finally:
        if trial is not None:
            trial.remove_hooks()
        del trial
        loss.load_state_dict(remembered)
        restore_random_streams(streams)
        policy.train(was_training)
        reshard(policy)
        gc.collect()
    if ranks.is_rank_zero:
        print(describe(choice, room, most), flush=True)
    return TokenBudget(choice.limit, choice.limit)


def _no_reference(pack) -> torch.Tensor:
    """Log-probs [R] in place of those that the run looks up."""
    return torch.zeros(len(pack.response_lengths), device=pack.input_ids.device)


def describe(choice: Choice, room: Sequence[int], most: int) -> str:
    """The line on the budget that was chosen: `room` bytes of each device, `most` tokens of the largest micro-batch."""
    needed, of = max(zip(choice.measured.needed, room, strict=True), key=lambda pair: pair[0] / pair[1])
    line = (
        f"token budget: {choice.limit:,} tokens, measured: a step with {choice.measured.tokens:,} needs {needed / 2**30:.2f} GB"
        f" of {of / (1 - RESERVE) / 2**30:.2f} GB, of which {RESERVE:.0%} stay free"
    )
    if needed > of:
        return f"warning: {line}; that is more than fits, and less than {SMALLEST} tokens at once are not tried"
    return f"{line}; no micro-batch is larger" if choice.limit == most else line
