"""One optimizer step: forward and backward over micro-batches, clipping, the update; or a skipped step.

micro-batches  ->  packs of at most token_budget tokens  ->  summed gradient  ->  clipped  ->  new weights
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import PackedBatch
from preference_training.core.metric_names import GRAD_NORM, TOKENS_SAVED, TRAIN, TRAIN_LOSS
from preference_training.core.process_group import is_distributed
from preference_training.distributed.placement import Placement
from preference_training.losses.base import (
    MISSING_NUMBERS,
    BatchStatistics,
    ExampleKind,
    Examples,
    Loss,
    LossOutput,
    TokenLogps,
    example_metrics,
    with_margins,
)
from preference_training.modeling.logprobs import policy_scores, reference_logps, shares_prefixes
from preference_training.modeling.state import compute_device
from preference_training.tracking.tracker import Metrics
from preference_training.training.parts import Models, RunState
from preference_training.training.updates import Updater


@dataclass(frozen=True)
class PackResult:
    """A step's results for this rank's E examples of one pack, without gradient.

    losses: [E]. pairs: [E, 2] int64, the rows of their responses in the run's data, and margins: [E], of rewards; None where
    examples are no pairs. is_filler: they count for nothing.
    """

    losses: Tensor
    sources: tuple[str, ...]
    pairs: Tensor | None
    margins: Tensor | None
    is_filler: bool

    @classmethod
    def of(cls, pack: PackedBatch, output: LossOutput, kind: ExampleKind) -> "PackResult":
        """From a pack and its losses."""
        paired = kind == "pairs"
        margins = output.chosen_rewards - output.rejected_rewards if paired else None
        pairs = pack.response_rows[pack.examples.members] if paired else None
        return cls(output.losses.detach(), pack.sources, pairs, margins, pack.is_filler)


@dataclass
class BatchResult:
    """The results of `backward`: sums of metrics over this rank's examples, the loss's statistics, and each pack's result.

    sums: [2], of a metric's values, and how many examples have one. statistics: those of the last micro-batch, since some are
    running means. micro_batches: those that were computed.
    """

    micro_batches: Sequence[MicroBatch]
    sums: dict[str, Tensor] = field(default_factory=dict)
    statistics: Metrics = field(default_factory=dict)
    packs: list[PackResult] = field(default_factory=list)

    def add(self, loss: Loss, pack: PackedBatch, output: LossOutput, policy: Tensor) -> None:
        """Add a pack's results; those of a filler count for nothing."""
        for name, values in example_metrics(loss, output, policy, pack.examples, TRAIN).items():
            exist = ~values.isnan() | (name == TRAIN_LOSS)
            added = torch.stack([values.where(exist, 0.0).sum(), exist.sum()]) * (not pack.is_filler)
            self.sums[name] = self.sums.get(name, 0.0) + added
        self.statistics = output.statistics
        self.packs.append(PackResult.of(pack, output, loss.examples))


@dataclass(frozen=True)
class StepResult:
    """A step's metrics over all ranks, empty where it was skipped, and this rank's packs.

    share_changed: the share of the sampled weights that the update changed; None where that was not checked. stops: whether any
    rank is to stop.
    """

    metrics: Metrics
    packs: list[PackResult]
    stops: bool
    share_changed: float | None = None


class TrainingStep:
    """Takes the optimizer steps of a run, and counts them in `state`."""

    def __init__(self, placement: Placement, models: Models, state: RunState, total_steps: int):
        self.placement, self.models, self.state = placement, models, state
        self.device = compute_device(models.policy)
        self.updater = Updater(placement, models.policy, state, total_steps)

    def take(
        self,
        micro_batches: Sequence[MicroBatch],
        halve: Callable[[Sequence[MicroBatch]], list[MicroBatch]],
        is_to_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Take one step on one batch. halve: cuts a batch into smaller packs; is_to_stop: whether this rank is to stop by now.

        The gradient is that of the mean loss over the whole batch, however it was cut and distributed over ranks. The step is
        skipped where a loss or the gradient is not finite. Raises UserError where policy and reference have not been the same.
        """
        remembered = self.models.loss.state_dict()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        batch = self._backward_within_memory(micro_batches, halve, remembered)
        if self.models.start_check is not None:
            self.models.start_check.check(self.placement.ranks)
            self.models.start_check = None
        grad_norm = self.updater.clip_gradient()
        # Read at once, before the weights change: one wait for the device.
        packs = [pack for micro_batch in batch.micro_batches for pack in micro_batch.packs]
        counts = sum(pack.num_tokens for pack in packs), sum(pack.num_row_tokens for pack in packs)
        *values, tokens, row_tokens, stops, norm = self.reduce(batch.sums, grad_norm, counts, is_to_stop()).tolist()
        sums = zip(batch.sums, values[::2], values[1::2], strict=True)
        metrics = with_margins({name: total / count for name, total, count in sums if count}, TRAIN)
        if shares_prefixes(self.models.policy):
            metrics[TOKENS_SAVED] = 1 - tokens / row_tokens
        self.state.examples += num_examples
        self.state.tokens += int(tokens)
        # Where gradients are scaled, the scaler itself skips a step whose gradient has overflowed.
        if math.isfinite(metrics[TRAIN_LOSS]) and (math.isfinite(norm) or self.updater.scaler.is_enabled()):
            share = self._update(is_finite=math.isfinite(norm))
            return StepResult(metrics | batch.statistics | {GRAD_NORM: norm}, batch.packs, stops > 0, share)
        self.updater.skip_step()
        self.state.bad_steps += 1
        self.models.loss.load_state_dict(remembered)
        return StepResult({}, batch.packs, stops > 0)

    # ---- forward and backward -------------------------------------------------------------------------------------------

    def _backward_within_memory(self, micro_batches: Sequence[MicroBatch], halve: Callable, remembered: dict) -> BatchResult:
        """`backward`; out of memory, once more in packs half as large."""
        try:
            return self.backward(micro_batches)
        except torch.OutOfMemoryError:
            # Other ranks would wait for this one in their collectives.
            if is_distributed():
                raise
        # Outside the handler: the exception keeps the step's tensors alive.
        self.updater.optimizer.zero_grad(set_to_none=True)
        self.models.loss.load_state_dict(remembered)
        # A cached reference saw other packs, and its last bits may differ.
        self.models.start_check = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.backward(halve(micro_batches))

    def backward(self, micro_batches: Sequence[MicroBatch]) -> BatchResult:
        """Accumulate the gradient of a batch."""
        self.models.policy.train()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        mean_length = sum(micro_batch.first_tokens for micro_batch in micro_batches) / num_examples
        result = BatchResult(micro_batches)
        packs_left = sum(len(micro_batch.packs) for micro_batch in micro_batches)
        self.updater.expect_gradients(packs_left)
        for micro_batch in micro_batches:
            for output, policy, pack in self.pack_losses(micro_batch, mean_length):
                packs_left -= 1
                self.placement.before_backward(self.models.policy, is_last=packs_left == 0)
                # Sharded gradients are means over the ranks; this makes them sums.
                share = 0.0 if pack.is_filler else self.placement.ranks.size / num_examples
                self.updater.scaler.scale(output.losses.sum() * share).backward()
                result.add(self.models.loss, pack, output, policy)
        return result

    def pack_losses(self, micro_batch: MicroBatch, mean_length: float) -> Iterator[tuple[LossOutput, Tensor, PackedBatch]]:
        """Loss and policy log-probs [R] of each pack; the caller takes each pack's gradient before the next."""
        loss, start_check = self.models.loss, self.models.start_check
        packs = [pack.to(self.device) for pack in micro_batch.packs]
        survey = partial(self._batch_statistics, micro_batch, mean_length, packs)
        known = [reference_logps(self.models.reference, pack, loss) for pack in packs]
        references = [logps for logps, _ in known]
        statistics = None
        if loss.needs_batch_statistics and len(packs) > 1:
            # It depends on all packs, and only one of them fits into memory with its gradient.
            with torch.no_grad():
                statistics = survey([self.logps(pack)[0] for pack in packs], references)
        for pack, (reference, reference_tokens) in zip(packs, known, strict=True):
            policy, policy_tokens = self.logps(pack)
            if start_check is not None:
                start_check.compare(pack, policy, reference)
            if loss.needs_batch_statistics and statistics is None:
                statistics = survey([policy.detach()], references)
            found = None if statistics is None else statistics.at(pack.places)
            tokens = {"policy_tokens": policy_tokens, "reference_tokens": reference_tokens}
            examples = replace(pack.examples, mean_length=mean_length, **tokens)
            yield loss(policy, reference, examples, found).weighted(examples.weights), policy, pack

    def _batch_statistics(
        self, micro_batch: MicroBatch, mean_length: float, packs: Sequence[PackedBatch], policies, references
    ) -> BatchStatistics | None:
        """The loss's statistics over all examples of a micro-batch on all ranks, from log-probs [R] of this rank's packs."""
        # A pack, and a rank, is only as wide as its own examples.
        width = micro_batch.most_members
        columns = torch.zeros(micro_batch.num_examples, 3 * width + 3, device=self.device)
        for pack, policy, reference in zip(packs, policies, references, strict=True):
            if not pack.is_filler:
                columns[pack.places] = _columns(pack.examples, policy, reference, width)
        parts = self.placement.ranks.all_reduce_sum(columns).split([width, width, width, 1, 1, 1], dim=1)
        policy, reference, lengths, weights, margins, labels = parts
        numbers = torch.arange(lengths.numel(), device=self.device).view_as(lengths)
        examples = Examples(
            members=numbers.where(lengths > 0, -1),
            lengths=lengths.flatten(),
            mean_length=mean_length,
            weights=weights[:, 0],
            margins=margins[:, 0],
            labels=labels[:, 0] > 0,
        )
        known = reference if self.models.loss.needs_reference else None
        return self.models.loss.batch_statistics(policy, known, examples)

    def logps(self, pack: PackedBatch) -> tuple[Tensor, TokenLogps | None]:
        """The policy's log-probs [R] of a pack, and what its loss reads of tokens."""
        return policy_scores(self.models.policy, pack, self.models.loss)

    def reduce(self, sums: dict[str, Tensor], grad_norm: Tensor, counts: tuple[int, int], stop: bool = False) -> Tensor:
        """A step's numbers over all ranks: `sums`, `counts`, how many processes are to stop, the gradient's norm."""
        # Filled on the device: values copied there from ordinary memory would make the host wait.
        others = torch.stack([torch.full((), float(number), device=self.device) for number in (*counts, stop)])
        ranks = self.placement.ranks
        totals = ranks.all_reduce_sum(torch.cat([*sums.values(), others]))
        return torch.cat([totals[:-1], ranks.any_process(totals[-1:]), grad_norm.detach().to(totals).reshape(1)])

    # ---- the update -----------------------------------------------------------------------------------------------------

    def _update(self, is_finite: bool) -> float | None:
        """Update the weights and a reference that follows; the share of sampled weights that changed, if that is checked."""
        share = None
        if is_finite:
            share = self.updater.update_and_check()
        else:
            self.updater.update()
        self._move_reference()
        self.state.bad_steps = 0
        return share

    def _move_reference(self) -> None:
        update = self.models.loss.reference_update
        if update is not None and self.state.updates % update.every == 0:
            self.models.reference.move_towards(self.models.policy, update.share)
            # It would respond differently now.
            self.state.reference_answers = None


def _columns(examples: Examples, policy: Tensor, reference: Tensor | None, width: int) -> Tensor:
    """What statistics of a micro-batch read of a pack's examples of at most `width` members, a row for each: [E, 3 width + 3].

    Log-probs of policy and reference and the length of each member, 0 where there is none; weight, margin, label.
    """
    members = pad(examples.members, (0, width - examples.members.shape[1]), value=-1)
    values = policy, torch.zeros_like(policy) if reference is None else reference, examples.lengths.to(policy.dtype)
    of_members = [each[members].where(members >= 0, 0.0) for each in values]
    numbers = ((getattr(examples, name), missing) for name, missing in MISSING_NUMBERS.items())
    single = [
        policy.new_full((len(members), 1), missing) if values is None else values[:, None].to(policy.dtype)
        for values, missing in numbers
    ]
    return torch.cat([*of_members, *single], dim=1)
