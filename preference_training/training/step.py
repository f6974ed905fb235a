"""One optimizer step: forward and backward over micro-batches, clipping, the update; or a skipped step.

micro-batches  ->  packs of at most token_budget tokens  ->  summed gradient  ->  clipped  ->  new weights
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import PackedBatch
from preference_training.core.metric_names import GRAD_NORM, TRAIN_LOSS
from preference_training.core.process_group import is_distributed
from preference_training.distributed.placement import Placement
from preference_training.losses.base import BatchStatistics, LossOutput, example_metrics
from preference_training.modeling.logprobs import response_logps
from preference_training.modeling.state import compute_device
from preference_training.tracking.tracker import Metrics
from preference_training.training.parts import Models, RunState
from preference_training.training.updates import Updater


@dataclass(frozen=True)
class PackResult:
    """A step's results for this rank's E examples of one pack, without gradient.

    losses: [E]. pairs: [E, 2] int64, the rows of their responses in the run's data, and margins: [E], of rewards; None for SFT.
    is_filler: they count for nothing.
    """

    losses: Tensor
    sources: tuple[str, ...]
    pairs: Tensor | None
    margins: Tensor | None
    is_filler: bool

    @classmethod
    def of(cls, pack: PackedBatch, output: LossOutput) -> "PackResult":
        """From a pack and its losses."""
        paired = output.chosen_rewards is not None
        margins = output.chosen_rewards - output.rejected_rewards if paired else None
        pairs = pack.response_rows[pack.pairs] if paired else None
        return cls(output.losses.detach(), pack.sources, pairs, margins, pack.is_filler)


@dataclass
class BatchResult:
    """The results of `backward`: sums of metrics over this rank's examples, the loss's statistics, and each pack's result."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    statistics: Metrics = field(default_factory=dict)
    packs: list[PackResult] = field(default_factory=list)


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
        stop: bool = False,
    ) -> StepResult:
        """Take one step on one batch. halve: cuts a batch into smaller packs; stop: whether this rank is to stop.

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
        tokens = sum(pack.num_tokens for micro_batch in micro_batches for pack in micro_batch.packs)
        *values, tokens, stops, norm = self.reduce(batch.sums, grad_norm, num_examples, tokens, stop).tolist()
        metrics = dict(zip(batch.sums, values, strict=True))
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
        result = BatchResult()
        packs_left = sum(len(micro_batch.packs) for micro_batch in micro_batches)
        for micro_batch in micro_batches:
            for output, policy, pack in self.pack_losses(micro_batch):
                packs_left -= 1
                self.placement.before_backward(self.models.policy, is_last=packs_left == 0)
                # Sharded gradients are means over the ranks; this makes them sums.
                share = 0.0 if pack.is_filler else self.placement.ranks.size / num_examples
                self.updater.scaler.scale(output.losses.sum() * share).backward()
                for name, values in example_metrics(output, policy, pack.pairs, "train").items():
                    result.sums[name] = result.sums.get(name, 0.0) + values.sum() * (not pack.is_filler)
                result.statistics = output.statistics
                result.packs.append(PackResult.of(pack, output))
        return result

    def pack_losses(self, micro_batch: MicroBatch) -> Iterator[tuple[LossOutput, Tensor, PackedBatch]]:
        """Loss and policy log-probs [R] of each pack; the caller takes each pack's gradient before the next."""
        loss, start_check = self.models.loss, self.models.start_check
        packs = [pack.to(self.device) for pack in micro_batch.packs]
        references = [None if self.models.reference is None else self.models.reference(pack) for pack in packs]
        statistics = None
        if loss.needs_batch_statistics and len(packs) > 1:
            # It depends on all packs, and only one of them fits into memory with its gradient.
            with torch.no_grad():
                statistics = self._batch_statistics(micro_batch, packs, [self.logps(pack) for pack in packs], references)
        for pack, reference in zip(packs, references, strict=True):
            policy = self.logps(pack)
            if start_check is not None:
                start_check.compare(pack, policy, reference)
            if loss.needs_batch_statistics and statistics is None:
                statistics = self._batch_statistics(micro_batch, packs, [policy.detach()], references)
            found = None if statistics is None else statistics.at(pack.places)
            yield loss(policy, reference, pack.pairs, pack.response_lengths, found), policy, pack

    def _batch_statistics(self, micro_batch: MicroBatch, packs, policies, references) -> BatchStatistics:
        """The loss's statistics over all pairs of a micro-batch on all ranks, from log-probs [R] of this rank's packs."""
        log_ratios = torch.zeros(micro_batch.num_examples, 2, device=self.device)
        for pack, policy, reference in zip(packs, policies, references, strict=True):
            if not pack.is_filler:
                log_ratios[pack.places] = (policy - reference)[pack.pairs]
        return self.models.loss.batch_statistics(self.placement.ranks.all_reduce_sum(log_ratios))

    def logps(self, pack: PackedBatch) -> Tensor:
        """The policy's log-probs [R] of a pack."""
        return response_logps(self.models.policy, pack)

    def reduce(self, sums: dict[str, Tensor], grad_norm: Tensor, num_examples: int, tokens: int, stop: bool = False) -> Tensor:
        """A step's numbers over all ranks: means of `sums`, tokens, how many ranks are to stop, the gradient's norm."""
        others = torch.tensor([float(tokens), float(stop)], device=self.device)
        means = torch.stack([value / num_examples for value in sums.values()])
        totals = self.placement.ranks.all_reduce_sum(torch.cat([means, others]))
        return torch.cat([totals, grad_norm.detach().to(totals).reshape(1)])

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
