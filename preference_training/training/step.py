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
from preference_training.core.errors import UserError
from preference_training.core.metric_names import GRAD_NORM, TOKENS_SAVED, TRAIN, TRAIN_LOSS
from preference_training.core.process_group import is_distributed, progress
from preference_training.distributed.out_of_memory import free_cache
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
from preference_training.modeling.experts.balance import ExpertBalance
from preference_training.modeling.logprobs import policy_scores, reference_logps, shares_prefixes, zero_scores
from preference_training.modeling.state import compute_device
from preference_training.modeling.tuning.embedding_noise import EmbeddingNoise
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

    names: of the metrics. totals: [metrics, 2], the sum of a metric's values, and how many examples have one; None before the
    first pack. statistics: those of the last micro-batch, since some are running means. micro_batches: those computed.
    """

    micro_batches: Sequence[MicroBatch]
    names: tuple[str, ...] = ()
    totals: Tensor | None = None
    statistics: Metrics = field(default_factory=dict)
    packs: list[PackResult] = field(default_factory=list)

    @property
    def sums(self) -> dict[str, Tensor]:
        """By the metric's name [2], the sum of its values, and how many examples have one."""
        return {} if self.totals is None else dict(zip(self.names, self.totals, strict=True))

    def add(self, loss: Loss, pack: PackedBatch, output: LossOutput, policy: Tensor) -> None:
        """Add a pack's results; those of a filler count for nothing."""
        metrics = example_metrics(loss, output, policy, pack.examples, TRAIN)
        self.names = tuple(metrics)
        # All at once: a few kernels, not ten for each metric.
        values = torch.stack(list(metrics.values()))
        exist = ~values.isnan()
        # A loss that is no number is to be seen.
        exist[self.names.index(TRAIN_LOSS)] = True
        added = torch.stack([values.where(exist, 0.0).sum(1), exist.sum(1)], dim=1) * (not pack.is_filler)
        self.totals = added if self.totals is None else self.totals + added
        self.statistics = output.statistics
        self.packs.append(PackResult.of(pack, output, loss.examples))


@dataclass(frozen=True)
class StepResult:
    """A step's metrics over all ranks, empty where it was skipped, and this rank's packs.

    share_changed: the share of the sampled weights that the update changed; None where that was not checked. stops: whether any
    rank is to stop. overflowed_at: the loss scale at which the gradient overflowed, so that no weight was updated; else None.
    """

    metrics: Metrics
    packs: list[PackResult]
    stops: bool
    share_changed: float | None = None
    overflowed_at: float | None = None


@dataclass(frozen=True)
class Shortage:
    """The ranks on which memory ran out in a step, and the tokens of the smallest of their largest packs.

    No ranks where a single process has no others.
    """

    ranks: tuple[int, ...]
    largest: int

    @classmethod
    def of(cls, found: Sequence[tuple[int, int, str] | None]) -> "Shortage":
        """From tokens, examples and source of each rank's largest pack. Raises UserError where that is a single example."""
        failed = {rank: pack for rank, pack in enumerate(found) if pack is not None}
        for rank, (tokens, examples, source) in failed.items():
            if examples == 1:
                memory = f"the memory of rank {rank}" if len(found) > 1 else "memory"
                raise UserError(
                    f"max_length: a single example of {tokens} tokens does not fit into {memory} ({source}), so smaller packs "
                    "do not help. Lower max_length, set activation_checkpointing=true, or shard over more processes."
                )
        return cls(tuple(failed) if len(found) > 1 else (), min(tokens for tokens, _, _ in failed.values()))

    def __str__(self) -> str:
        """What has happened, and on which ranks."""
        where = f" on rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"out of memory{where}"


class TrainingStep:
    """Takes the optimizer steps of a run, and counts them in `state`."""

    def __init__(self, placement: Placement, models: Models, state: RunState, total_steps: int):
        self.placement, self.models, self.state = placement, models, state
        self.device, self.lockstep = compute_device(models.policy), placement.lockstep()
        self.updater = Updater(placement, models.policy, state, total_steps)
        self.balance = ExpertBalance(models.policy, placement.ranks, placement.config.model.router_aux_loss)
        self.noise = EmbeddingNoise(models.policy, placement.config.model.neftune_alpha, placement.config.seed)

    def take(
        self,
        micro_batches: Sequence[MicroBatch],
        halve: Callable[[Sequence[MicroBatch], Shortage], list[MicroBatch]],
        is_to_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Take one step on one batch. is_to_stop: whether this rank is to stop by now.

        halve: cuts a batch that has met a Shortage into smaller packs, on all ranks alike.

        The gradient is that of the mean loss over the whole batch, however it was cut and distributed over ranks. The step is
        skipped where a loss or the gradient is not finite. Raises UserError where policy and reference have not been the same.
        """
        remembered = self.models.loss.state_dict()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        while True:
            with self.noise.on(self.state.updates, micro_batches, self.placement.ranks):
                batch = self._backward_within_memory(micro_batches, halve, remembered)
            grad_norm = self.updater.clip_gradient()
            # Read at once, before the weights change: one wait for the device.
            packs = [pack for micro_batch in batch.micro_batches for pack in micro_batch.packs]
            counts = sum(pack.num_tokens for pack in packs), sum(pack.num_row_tokens for pack in packs)
            numbers = self.reduce(batch.sums, grad_norm, counts, (is_to_stop(), self.lockstep.failed))
            progress.at(f"the end of step {self.state.updates + 1}")
            *values, tokens, row_tokens, stops, failed, norm = numbers.tolist()
            if not failed:
                break
            micro_batches = self._smaller_packs(micro_batches, halve, remembered, self.lockstep.failed)
        if self.models.start_check is not None:
            self.models.start_check.check(self.placement.ranks)
            self.models.start_check = None
        sums = zip(batch.sums, values[::2], values[1::2], strict=True)
        metrics = with_margins({name: total / count for name, total, count in sums if count}, TRAIN)
        if shares_prefixes(self.models.policy):
            metrics[TOKENS_SAVED] = 1 - tokens / row_tokens
        metrics |= self.balance.metrics()
        self.state.examples += num_examples
        self.state.tokens += int(tokens)
        if math.isfinite(metrics[TRAIN_LOSS]) and math.isfinite(norm):
            share = self._update(is_finite=True)
            return StepResult(metrics | batch.statistics | {GRAD_NORM: norm}, batch.packs, stops > 0, share)
        if math.isfinite(metrics[TRAIN_LOSS]) and (scale := self.updater.scaler.get_scale()) > 1:
            # The scaler itself takes no step with a gradient that has overflowed, and halves its scale.
            self._update(is_finite=False)
            return StepResult(metrics | batch.statistics, batch.packs, stops > 0, overflowed_at=scale)
        self.updater.skip_step()
        self.state.bad_steps += 1
        self.models.loss.load_state_dict(remembered)
        return StepResult({}, batch.packs, stops > 0)

    # ---- forward and backward -------------------------------------------------------------------------------------------

    def _backward_within_memory(self, micro_batches: Sequence[MicroBatch], halve: Callable, remembered: dict) -> BatchResult:
        """`backward`; in one process that runs out of memory, again and again in smaller packs. Raises UserError."""
        while True:
            try:
                return self.backward(micro_batches)
            except torch.OutOfMemoryError:
                # Other ranks would wait for this one in their collectives.
                if is_distributed():
                    raise
            # Outside the handler: the exception keeps the step's tensors alive.
            micro_batches = self._smaller_packs(micro_batches, halve, remembered, failed=True)

    def _forget(self, remembered: dict) -> None:
        """Forget a backward pass that is to be repeated. remembered: the state of the loss before it."""
        self.updater.forget_gradient()
        self.models.loss.load_state_dict(remembered)
        # A cached reference saw other packs, and its last bits may differ.
        self.models.start_check = None
        free_cache(self.models.policy)

    def _smaller_packs(
        self, micro_batches: Sequence[MicroBatch], halve: Callable, remembered: dict, failed: bool
    ) -> list[MicroBatch]:
        """The batch in smaller packs, since a rank has run out of memory. Raises UserError where there are none.

        failed: whether this one has.
        """
        self._forget(remembered)
        packs = [pack for micro_batch in micro_batches for pack in micro_batch.packs]
        own = max(packs, key=lambda pack: (len(pack.places) > 1, len(pack.input_ids)))
        found = (len(own.input_ids), len(own.places), own.sources[0]) if failed else None
        return halve(micro_batches, Shortage.of(self.placement.ranks.all_gather_object(found)))

    def backward(self, micro_batches: Sequence[MicroBatch]) -> BatchResult:
        """Accumulate the gradient of a batch."""
        self.models.policy.train()
        self.lockstep.begin()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        mean_length = sum(micro_batch.first_tokens for micro_batch in micro_batches) / num_examples
        result = BatchResult(micro_batches)
        packs_left = sum(len(micro_batch.packs) for micro_batch in micro_batches)
        self.updater.expect_gradients(packs_left)
        number, num_packs = self.state.updates + 1, packs_left
        progress.at(f"step {number}, pack 1 of {num_packs}")
        self.balance.begin([pack for micro_batch in micro_batches for pack in micro_batch.packs], self.logps)
        for micro_batch in micro_batches:
            for output, policy, pack in self.pack_losses(micro_batch, mean_length):
                packs_left -= 1
                self.placement.before_backward(self.models.policy, is_last=packs_left == 0)
                # Sharded gradients are means over the ranks; this makes them sums.
                share = 0.0 if pack.is_filler else self.placement.ranks.size / num_examples
                total = output.losses.sum() * share
                total = total if output.auxiliary is None else total + output.auxiliary
                # Nothing else keeps the pass's tensors: out of memory, they are freed at once.
                output = replace(output, losses=output.losses.detach(), auxiliary=None)
                self.lockstep.backward(self.models.policy, total, self.updater.scaler.scale)
                result.add(self.models.loss, pack, output, policy)
                progress.at(f"step {number}, pack {min(num_packs - packs_left + 1, num_packs)} of {num_packs}")
        return result

    def pack_losses(self, micro_batch: MicroBatch, mean_length: float) -> Iterator[tuple[LossOutput, Tensor, PackedBatch]]:
        """Loss and policy log-probs [R] of each pack; the caller takes each pack's gradient before the next."""
        loss = self.models.loss
        packs = [pack.to(self.device) for pack in micro_batch.packs]
        survey = partial(self._batch_statistics, micro_batch, mean_length, packs)
        known = [self._reference_logps(pack) for pack in packs]
        references = [logps for logps, _ in known]
        statistics = None
        if loss.needs_batch_statistics and len(packs) > 1:
            # It depends on all packs, and only one of them fits into memory with its gradient.
            with torch.no_grad():
                statistics = survey([self.logps(pack)[0] for pack in packs], references)
        for pack, reference in zip(packs, known, strict=True):
            yield *self._pack_loss(pack, reference, mean_length, statistics, survey), pack

    def _pack_loss(
        self, pack: PackedBatch, known: tuple, mean_length: float, statistics: BatchStatistics | None, survey: Callable
    ) -> tuple[LossOutput, Tensor]:
        """Loss and policy log-probs [R] of a pack, these without gradient.

        known: what the loss reads of the reference. survey: makes the statistics of a micro-batch of this pack alone.
        """
        model, loss, (reference, reference_tokens) = self.models.policy, self.models.loss, known
        scores = [self.logps(pack)]
        policy = scores[0][0].detach()
        self.balance.observe(pack)
        self._check_start(pack, policy, reference)
        if loss.needs_batch_statistics and statistics is None:
            statistics = survey([policy], [reference])
        found = None if statistics is None else statistics.at(pack.places)

        def compute(logps: Tensor, policy_tokens: TokenLogps | None) -> LossOutput:
            tokens = {"policy_tokens": policy_tokens, "reference_tokens": reference_tokens}
            examples = replace(pack.examples, mean_length=mean_length, **tokens)
            output = loss(logps, reference, examples, found).weighted(examples.weights)
            return replace(output, auxiliary=self.balance.loss_of_pack())

        instead = lambda zero: compute(*zero_scores(pack, loss, zero))  # noqa: E731
        # Out of memory, nothing keeps the pack's tensors.
        return self.lockstep.after_forward(model, lambda: compute(*scores.pop()), instead), policy

    def _check_start(self, pack: PackedBatch, policy: Tensor, reference: Tensor | None) -> None:
        """Compare both before the first update, for which the policy may have to be computed again."""
        if self.models.start_check is not None:
            compare = partial(self.models.start_check.compare, pack, policy, reference)
            recomputed = self.models.policy if self.models.start_check.recomputes else None
            with torch.no_grad():
                self.lockstep.forward(recomputed, compare, lambda zero: None)

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
        policy, loss = self.models.policy, self.models.loss
        compute = self.balance.recorder.recorded(partial(policy_scores, policy, pack, loss))
        return self.lockstep.forward(policy, compute, partial(zero_scores, pack, loss))

    def _reference_logps(self, pack: PackedBatch) -> tuple[Tensor | None, TokenLogps | None]:
        """The same of the reference; None for what the loss does not read."""
        reference, loss = self.models.reference, self.models.loss
        model, compute = getattr(reference, "model", None), partial(reference_logps, reference, pack, loss)
        with torch.no_grad():
            return self.lockstep.forward(model, compute, partial(zero_scores, pack, loss))

    def reduce(
        self, sums: dict[str, Tensor], grad_norm: Tensor, counts: tuple[int, int], flags: tuple[bool, bool] = (False, False)
    ) -> Tensor:
        """A step's numbers over all ranks: `sums`, `counts`, how many processes have each flag, the gradient's norm."""
        # Filled on the device: values copied there from ordinary memory would make the host wait.
        others = torch.stack([torch.full((), float(number), device=self.device) for number in (*counts, *flags)])
        ranks = self.placement.ranks
        totals = ranks.all_reduce_sum(torch.cat([*sums.values(), others]))
        summed, flagged = totals.split([len(totals) - len(flags), len(flags)])
        return torch.cat([summed, ranks.any_process(flagged), grad_norm.detach().to(totals).reshape(1)])

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
