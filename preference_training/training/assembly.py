"""Assembles the parts of a run: models, batches, observers, evaluator."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.packing import TokenBudget
from preference_training.batching.schedule import Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.files import first_existing
from preference_training.core.process_group import SINGLE_PROCESS, Ranks
from preference_training.data.rendering.chat_templates import detect_format, end_tokens, serve_as_trained
from preference_training.distributed.placement import Placement
from preference_training.evaluation.pruning import Pruning
from preference_training.modeling.adapters.weights import has_adapter
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.reference_cache import ReferencePlan, cache_path, cached_reference
from preference_training.modeling.token_budget import common_budget, token_budget
from preference_training.tracking.ledger import Ledger
from preference_training.training.budget_trial import measured_budget
from preference_training.training.parts import Batches, Models, Observers
from preference_training.training.preparation import PreparedRun, run_schedule
from preference_training.training.start_check import StartCheck


def observe(prepared: PreparedRun, placement: Placement, run_dir: Path, tracker, stop) -> Observers:
    """The observers of a run, as yet without a writer of checkpoints."""
    config, pruner = prepared.config, prepared.pruner
    ledger = (
        Ledger(run_dir, placement.ranks, tracker.log_message) if config.ledger and prepared.loss.examples == "pairs" else None
    )
    pruning = Pruning(Path(config.sweep_dir), run_dir, config.objective, config.eval_every, pruner) if pruner else None
    return Observers(tracker, ledger=ledger, pruning=pruning, stop=stop)


def checkpoint_writer(
    prepared: PreparedRun, placement: Placement, policy, run_dir: Path, about: dict, log_message: Callable[[str], None]
) -> CheckpointWriter:
    """The writer of a run's checkpoints. about: what the run is made of, as checkpoints store it."""
    config = prepared.config
    # A copy whose chat template writes prompts as in training.
    tokenizer = copy.copy(placement.tokenizer)
    prompt_format = detect_format(config.as_dict(), prepared.data[0].table, tokenizer)
    serve_as_trained(prompt_format, tokenizer, config.as_dict())
    options = SaveOptions(
        run=about,
        background=config.save_async,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        metric=config.objective,
        timeout_minutes=config.trainer.distributed_timeout_minutes,
        end_tokens=tuple(end_tokens(prompt_format, tokenizer)),
    )
    return CheckpointWriter(run_dir, policy, tokenizer, placement.ranks, options, log_message)


def assemble(prepared: PreparedRun, placement: Placement, checkpoint: Checkpoint | None = None) -> tuple[Models, Batches]:
    """Load the models as at the run's beginning, and make its batches."""
    config, ranks = prepared.config, placement.ranks
    train_prompts, held_out = (split.table for split in prepared.data)
    models = Models(placement.load_policy(), None, prepared.loss)
    schedule = run_schedule(config, train_prompts)
    again = prepared.in_sweep or schedule.visits_again
    reads_tokens = prepared.loss.reads_tokens
    budgets = token_budgets(prepared, placement, models.policy, checkpoint, config.caches_reference(again and not reads_tokens))
    steps = build_batches(config, schedule, budgets.now, ranks, budgets.at_start)
    sizes = {
        "batch_size": config.eval_batch_size,
        "n_examples": config.n_eval_examples,
        "seed": config.seed,
        "budget": budgets.at_start,
        "ranks": ranks,
    }
    if prepared.loss.needs_reference:
        reads = ReferencePlan.for_run(steps, held_out, **sizes)
        models.reference = make_reference(config, placement, models.policy, reads, again, reads_tokens)
        if two_models_notice := config.two_models_notice:
            print(two_models_notice, flush=True)
        else:
            models.start_check = StartCheck(models.policy, models.reference)
    num_samples = min(len(held_out), config.n_eval_model_samples * placement.samples(config.sample_during_eval))
    samples = [held_out[k].prompt_ids for k in range(num_samples)]
    return models, Batches(steps, evaluation_batches(held_out, **sizes), samples)


@dataclass(frozen=True)
class Budgets:
    """How many tokens are computed at once, from now on and when the run began."""

    now: TokenBudget
    at_start: TokenBudget


def token_budgets(
    prepared: PreparedRun, placement: Placement, policy, checkpoint: Checkpoint | None, caches_reference: bool
) -> Budgets:
    """The token budgets of a run: as configured, else those of its checkpoint, bit for bit, if as many processes resume it.

    Else a GPU's by packs on trial, and a CPU's by an estimate. caches_reference: whether the reference's log-probs are computed
    before training; a reference whose log-probs may be there, from an earlier run, is on trial too.
    """
    config, ranks = prepared.config, placement.ranks
    if checkpoint:
        before = checkpoint.state["train_batches"]
        then = before["ranks"], before.get("context", 1)
        if then == (ranks.size, ranks.context.size) and config.max_tokens_per_microbatch is None:
            # Early checkpoints hold one budget.
            return Budgets(TokenBudget(*before["budget"][:2]), TokenBudget(*before["budget"][-2:]))
    budget = None
    if config.max_tokens_per_microbatch is None:
        is_live = prepared.loss.needs_reference and not caches_reference
        budget = measured_budget(placement, policy, prepared.loss, prepared.data[0].table, is_live)
    if budget is None:
        estimated = token_budget(policy, config.max_tokens_per_microbatch, weight_copies=config.weight_copies)
        budget = common_budget(estimated, ranks)
    return Budgets(budget, budget)


def build_batches(
    config: RunConfig,
    schedule: Schedule,
    budget: TokenBudget,
    ranks: Ranks = SINGLE_PROCESS,
    first_budget: TokenBudget | None = None,
) -> BatchIterator:
    """The steps of a run's schedule, packed. Raises UserError for batches too small for so many ranks.

    first_budget: what the run began with, where it has another now.
    """
    size, number = config.batch_size, config.gradient_accumulation_steps
    if size // number < ranks.size:
        raise UserError(
            f"batch_size: found {size}, which in {number} micro-batches gives {size // number} examples to {ranks.size} "
            f"processes. Expected at least {number * ranks.size}, or fewer processes or gradient_accumulation_steps."
        )
    return BatchIterator(
        schedule,
        number,
        Packing(budget=budget, ranks=ranks, first_budget=first_budget),
    )


def make_reference(config: RunConfig, placement: Placement, policy, reads, read_again: bool, reads_tokens: bool = False):
    """The reference: a frozen copy of the policy that scores each batch, or its log-probs of what is read, computed before.

    Computed before, by its own choice, where they are read more than once: in several epochs or the jobs of a sweep
    (`read_again`), or because an earlier run has left them; never where the reference follows the policy or gives tokens.
    """
    directory = first_existing(config.local_dirs) / "reference_logps"
    # In the policy's dtype it now gives the log-probs that a copy would give.
    is_copy = config.model.reference_dtype == config.model.policy_dtype and not has_adapter(policy)
    is_copy = is_copy and config.model.reference_archive is None
    reference = LiveReference(policy) if is_copy else placement.reference(policy)
    ranks = placement.ranks
    if reads_tokens:
        print("reference: live, since the loss reads log-probs of its tokens", flush=True)
    cached = config.caches_reference(read_again and not reads_tokens)
    may_be_there = config.reference_logps is None and not (config.loss.moves_reference or reads_tokens)
    if cached or (may_be_there and ranks.broadcast(directory.is_dir())):
        path = cache_path(directory, reference.model, reads, computing_settings(config), ranks)
        if cached or ranks.broadcast(path.exists()):
            return cached_reference(reference, reads, path, ranks)
    return placement.reference(policy) if is_copy else reference


def computing_settings(config: RunConfig) -> dict:
    """The keys on which the last bits of a model's log-probs depend, besides those that the model itself has."""
    model, trainer = config.model, config.trainer
    size = trainer.context_parallel_size or 1
    # Nothing for one, so that what was computed before there was more stays known.
    context = [size] * (size > 1)
    return {
        "trainer": [trainer.name, trainer.tensor_parallel_size, *context],
        "dtypes": [config.sharded_dtype, trainer.output_dtype, model.quantized_compute_dtype],
        "kernels": [config.compile, config.tf32, model.liger_kernels],
    }
