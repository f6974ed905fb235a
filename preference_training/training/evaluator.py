"""A run's evaluations: held-out metrics, samples, the best value so far, early stopping and pruning."""

import math
import time
from collections.abc import Iterator, Sequence

from torch import nn

from preference_training.batching.packing import PackedBatch
from preference_training.core.machine import said_while_slow
from preference_training.core.metric_names import EVAL_LOSS, loss_is_at_beta_used, smaller_is_better
from preference_training.core.process_group import is_distributed, progress
from preference_training.distributed.placement import Placement
from preference_training.evaluation.breakdown import change_metrics, interval_metrics, values_by_example
from preference_training.evaluation.held_out import HeldOut, evaluate_held_out
from preference_training.generation.likelihood import improbability
from preference_training.generation.repetition import repetition
from preference_training.generation.sampling import Sampler
from preference_training.modeling.adapters.weights import has_adapter
from preference_training.modeling.logprobs import LiveReference, RememberedReference
from preference_training.modeling.state import compute_device
from preference_training.training.parts import Batches, Models, Observers, RunState

# Kinds of findings.
SAMPLES_REPEAT, SAMPLES_IMPROBABLE = "samples repeat", "samples improbable"
# Between two lines that say how far a first evaluation is.
SECONDS_BETWEEN_LINES = 10.0


class EvaluationStoppedError(Exception):
    """An evaluation was ended at one of its batches by a signal."""


class Evaluator:
    """Evaluates the policy of a run, and keeps in `state` what it finds.

    held_out: the newest result, None before the first. stopped: whether a signal ended the newest evaluation, or its sampling.
    """

    def __init__(self, placement: Placement, models: Models, batches: Batches, state: RunState, observers: Observers):
        self.config, self.ranks, self.tokenizer = placement.config, placement.ranks, placement.tokenizer
        self.models, self.batches, self.state, self.observers = models, batches, state, observers
        self.held_out: HeldOut | None = None
        self.pruned = self.stopped = False
        self.may_stop = True
        # What this process has said that it begins: the first evaluation, sampling.
        self.announced: set[str] = set()
        self.reference = models.reference
        stays = models.loss.reference_update is None and not models.loss.reads_tokens
        if isinstance(models.reference, LiveReference) and stays:
            self.reference = RememberedReference(models.reference)

    @property
    def ends_run(self) -> bool:
        """Whether `objective` has not improved for long enough, or the run was pruned."""
        patience = self.config.early_stopping_patience
        return self.pruned or (patience is not None and self.state.evaluations_since_best >= patience)

    def evaluate(self, may_stop: bool = True) -> None:
        """Score the held-out examples and sample responses, into the tracker; once for each number of examples.

        may_stop: whether a signal ends it at the next batch, or the next token of a sample. If batches are left, nothing is
        recorded, and `state.evaluation_due` is set; else only the samples are missing.
        """
        self.may_stop = may_stop
        models, state, tracker = self.models, self.state, self.observers.tracker
        state.evaluation_due = False
        if not self.batches.held_out or state.evaluated_at == state.examples:
            return
        before = state.evaluated_at
        compare = models.start_check and models.start_check.compare
        if isinstance(self.reference, RememberedReference):
            self.reference.restart()
        try:
            batches = self._until_stopped()
            self.held_out = evaluate_held_out(models.policy, self.reference, models.loss, batches, self.ranks, compare)
        except EvaluationStoppedError:
            state.evaluation_due = self.stopped = True
            return
        if models.start_check is not None:
            models.start_check.check(self.ranks)
        depends = models.loss.evaluation_depends_on if state.held_out is None else None
        state.held_out = self.held_out.means()
        state.evaluated_at = state.examples
        changes = self._changes()
        self._compare_with_best()
        self.observers.log_evaluation(state.held_out | interval_metrics(self.held_out) | changes | state.counters())
        if depends:
            tracker.log_message(
                f"warning: loss/eval depends on {depends}: it is not comparable across runs, nor exactly between evaluations "
                "of this one"
            )
        if self.batches.sample_prompts and self._is_time_to_sample(before):
            self._log_samples()
        if self.observers.ledger is not None:
            self.observers.ledger.write()
        self._prune()
        tracker.report()

    def _until_stopped(self) -> Iterator[PackedBatch]:
        """The held-out batches, with a line now and then in the run's first evaluation. Raises EvaluationStoppedError."""
        batches, is_first = self.batches.held_out, "evaluation" not in self.announced
        if is_first:
            prompts = set().union(*self.ranks.all_gather_object({name for batch in batches for name in batch.sources}))
            self._announce("evaluation", f"evaluating: {len(prompts):,} held-out prompt{'s' * (len(prompts) != 1)}")
        began = said = time.monotonic()
        for number, batch in enumerate(batches):
            progress.at(f"batch {number + 1} of {len(batches)} of an evaluation")
            if self.may_stop and self.ranks.broadcast(self.ranks.all_reduce_min(self.observers.stop.signal is None) == 0):
                raise EvaluationStoppedError
            if is_first and number and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said, share = time.monotonic(), number / len(batches)
                left = (said - began) * (1 - share) / share
                self.observers.tracker.log_message(f"evaluating: {share:.0%} of the held-out examples, left {left:.0f} s")
            yield batch
        progress.at(None)

    def _announce(self, what: str, text: str) -> None:
        """Log what begins and may take minutes, the first time."""
        if what not in self.announced:
            self.announced.add(what)
            self.observers.tracker.log_message(text)

    def _changes(self) -> dict[str, float]:
        """How far loss and accuracy have changed since before training; what they are then is remembered."""
        if self.state.examples == 0:
            comparable = self.models.loss.evaluation_depends_on is None
            self.state.held_out_before = values_by_example(self.held_out, comparable)
            return {}
        return change_metrics(self.held_out, self.state.held_out_before)

    def _compare_with_best(self) -> None:
        """Count the evaluations since `objective` was best; log it when that ends the run."""
        objective, state = self.config.objective, self.state
        value = state.held_out[objective]
        if math.isnan(value) and state.best is None:
            # Nothing is worse than no number: it ends no run, and is no best value that all later ones would be compared with.
            return
        if state.best is None or (value < state.best if smaller_is_better(objective) else value > state.best):
            state.best, state.evaluations_since_best = value, 0
            return
        state.evaluations_since_best += 1
        since = state.evaluations_since_best
        if since == self.config.early_stopping_patience and not self.batches.train.finished:
            self.observers.tracker.log_message(
                f"early stopping: {objective} was not better than {state.best:.4g} in {since} evaluations"
            )

    def _prune(self) -> None:
        """End the run and log it where other jobs of the sweep do much better; never before its first step."""
        pruning, state = self.observers.pruning, self.state
        if pruning is None or self.ends_run or self.batches.train.finished or not state.examples:
            return
        judged = pruning.verdict(state.examples, state.held_out[self.config.objective]) if self.ranks.is_rank_zero else None
        verdict = self.ranks.broadcast(judged)
        self.pruned = verdict is not None
        if self.pruned:
            self.observers.tracker.log_message(f"pruned: {verdict}")

    # ---- samples --------------------------------------------------------------------------------------------------------

    def _is_time_to_sample(self, before: int | None) -> bool:
        """Whether responses are sampled at this evaluation, by `sample_every`. before: examples at the previous one, if any."""
        every, examples = self.config.sample_every, self.state.examples
        if every is None or before is None or self.batches.train.finished or self.ends_run:
            return True
        return examples // every > before // every

    def responses(self, model: nn.Module | None = None) -> list[str]:
        """A model's responses to the sample prompts; the policy's, unless another is given."""
        config, prompts = self.config, self.batches.sample_prompts
        longest = max(map(len, prompts), default=0) + (config.max_sample_length or config.max_length)
        room = min(config.max_length, longest)
        if prompts:
            number = len(prompts)
            which = f"sampling: responses to {number:,} held-out prompt{'s' * (number != 1)}"
            self._announce("sampling", f"{which}, up to {room:,} tokens with the prompt")

        def interrupt() -> None:
            # Several ranks sample in lockstep: none may leave.
            if self.may_stop and not is_distributed() and self.observers.stop.signal is not None:
                self.stopped = True
                raise EvaluationStoppedError

        sampler = Sampler(self.tokenizer, room, config.seed, self.ranks, interrupt=interrupt)
        with said_while_slow("still sampling"):
            return sampler.texts(self.models.policy if model is None else model, prompts)

    def reference_responses(self, known: str = "the reference is another model than the policy") -> list[str] | None:
        """The reference's responses to the sample prompts: the policy's before the first step, where it is the reference.

        None, said in a line, where only log-probs of the reference are kept. known: what that line says of it.
        """
        if policy_is_reference(self.config, self.state):
            return self.responses()
        if (reference := model_of_reference(self.models)) is not None:
            with reference.as_reference(reference.model):
                return self.responses(reference.model)
        if self.batches.sample_prompts:
            self.observers.tracker.log_message(
                f"samples: {known} and only its log-probs are kept: from here on samples are the policy's alone "
                "(reference_logps=live would give the reference's too)"
            )
        return None

    def _log_samples(self) -> None:
        """Sample responses, into the tracker, unless a signal asks the run to stop."""
        state = self.state
        try:
            samples = self.sample()
        except EvaluationStoppedError:
            self.observers.tracker.log_message("sampling was stopped: this evaluation has no samples")
            return
        self.observers.tracker.log_samples(samples, state.examples)
        if not state.updates:
            return
        batching = self.config.eval_batch_size, self.batches.train.budget
        for what, text in faults_of(samples, self.batches.sample_prompts, self.models, self.tokenizer, batching).items():
            if what not in state.findings:
                state.findings.append(what)
                self.observers.tracker.log_finding(
                    what,
                    f"warning: after {state.examples} examples {text}: the model may be broken. Look at samples.jsonl; "
                    "lower lr, raise loss.beta, or use an earlier checkpoint.",
                )

    def sample(self) -> list[dict]:
        """Responses of the policy, and of the reference where there is one, to the sample prompts.

        Both are drawn from the same noise, so that a reader sees what has changed.
        """
        state = self.state
        if state.reference_answers is None and self.models.loss.reference_update is not None:
            state.reference_answers = self.responses(self.models.reference.model)
        known = state.reference_answers
        # They need not be sampled twice.
        responses = {"policy": known if known is not None and policy_is_reference(self.config, state) else self.responses()}
        if known is not None:
            responses["reference"] = known
        prompts = self.tokenizer.batch_decode(self.batches.sample_prompts)
        rows = zip(prompts, *responses.values(), strict=True)
        return [{"examples": state.examples, **dict(zip(["prompt", *responses], row, strict=True))} for row in rows]

    # ---- resuming -------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Adapt what `state` has from a checkpoint to this run; log what is lost."""
        self._resume_reference_responses()
        if self.config.objective == EVAL_LOSS and loss_is_at_beta_used(self.state.held_out):
            # Old and new losses are not comparable.
            self.state.best, self.state.evaluations_since_best = None, 0
            self.observers.tracker.log_message(
                "warning: evaluations before this checkpoint have loss/eval at beta-DPO's beta in force, those from here on at "
                "loss.beta: the best value so far is discarded, and keep_best starts over"
            )

    def _resume_reference_responses(self) -> None:
        """Take the reference's responses of a checkpoint, whose run may have had fewer sample prompts, or more."""
        kept, needed = self.state.reference_answers, len(self.batches.sample_prompts)
        # Sample prompts are the first held-out ones, however many.
        self.state.reference_answers = kept[:needed] if kept is not None else None
        if kept is None or len(kept) >= needed:
            return
        answered = f"the reference has answered {len(kept)} of the {needed} sample prompts"
        self.state.reference_answers = self.reference_responses(answered)


# ---- the reference's samples ------------------------------------------------------------------------------------------------


def policy_is_reference(config, state: RunState) -> bool:
    """Whether the policy of a run is still the model that it is compared with."""
    return not state.updates and config.model.reference_archive is None


def model_of_reference(models: Models) -> LiveReference | None:
    """The reference with its model; None where only its log-probs are kept, and it is not the policy under its adapter."""
    if isinstance(models.reference, LiveReference):
        return models.reference
    return LiveReference(models.policy) if has_adapter(models.policy) else None


def faults_of(samples: list[dict], prompts: Sequence[list[int]], models: Models, tokenizer, batching) -> dict[str, str]:
    """Kinds of findings, and how samples repeat themselves or are improbable, other than those of the reference.

    batching: of the log-probs, as for `improbability`.
    """
    ids = {
        name: [tokenizer(row[name], add_special_tokens=False).input_ids for row in samples]
        for name in ("policy", "reference")
        if name in samples[0]
    }
    found = {SAMPLES_REPEAT: repetition(ids["policy"], ids.get("reference"))}
    if isinstance(models.reference, LiveReference) and "reference" in ids:
        device = compute_device(models.policy)
        score = lambda batch: models.reference(batch.to(device))  # noqa: E731
        found[SAMPLES_IMPROBABLE] = improbability(score, prompts, ids["policy"], ids["reference"], batching)
    return {what: text for what, text in found.items() if text}
