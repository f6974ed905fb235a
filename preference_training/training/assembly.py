"""The parts of a run, assembled: models, batches, reference, trainer."""

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from preference_training.configuration.precision import lines_of_precision
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.validation import check_objective
from preference_training.core.errors import UserError
from preference_training.core.files import first_existing
from preference_training.training.preparation import check_same_data, data_version, prepare_data
from preference_training.training.run_directory import (
    begin_in,
    describe_run,
    describe_start,
    folders_of,
    open_run_dir,
    used_by_this_run,
    writable,
)


@dataclass(frozen=True)
class PreparedRun:
    """A validated run before any model is loaded. pruner: Optuna's, None in most runs."""

    config: RunConfig
    loss: object
    tokenizer: object
    data: tuple
    pruner: object = None


def prepare_run(config: RunConfig, run_dir: Path) -> PreparedRun:
    """Set this process up for a run, and prepare its loss, tokenizer and data. Raises UserError for what cannot work."""
    from preference_training.core.devices import allow_tf32
    from preference_training.core.libraries import quiet_libraries
    from preference_training.core.memory import tune_malloc
    from preference_training.core.random_streams import seed_everything
    from preference_training.evaluation.task_suites import check_harness
    from preference_training.losses.registry import build_loss
    from preference_training.modeling.limits import check_limits, check_rows, model_limits
    from preference_training.modeling.loading import check_model
    from preference_training.modeling.tokenizer import load_tokenizer
    from preference_training.training.optimization import check_optimizer
    from preference_training.training.pruning import build_pruner

    quiet_libraries()
    tune_malloc(keep_freed=not config.trainer.is_sharded)
    allow_tf32(config.tf32)
    seed_everything(config.seed)
    check_optimizer(config)
    pruner = build_pruner(config.pruner, config.pruner_kwargs) if config.pruner else None
    if config.eval_only and config.evaluation.tasks:
        check_harness()
    loss = build_loss(**config.loss.given(), seed=config.seed)
    check_objective(config.objective, config.loss.name, loss.paired)
    for line in [] if config.eval_only else lines_of_precision(config):
        print(line, flush=True)
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    for line in check_model(config.model, tokenizer, config.cache_dir):
        print(line, flush=True)
    limits = model_limits(config, tokenizer)
    check_limits(config, tokenizer, limits)
    # Before the processes join: those that do not prepare it wait for it without a time-out.
    splits = ("test",) if config.eval_only and not config.dry_run else ("train", "test")
    data = prepare_data(config, tokenizer, loss.paired, splits, data_version(config, run_dir))
    check_rows(config, tokenizer, limits, [split.table for split in data])
    return PreparedRun(config, loss, tokenizer, data, pruner)


def train_or_evaluate(prepared: PreparedRun, trainer_class, run_dir: Path, in_sweep: bool, report_writer) -> float | None:
    """Train into `run_dir`, or evaluate only. Returns the held-out metric named by `objective`.

    Under a trainer of several processes this is one of them. report_writer: makes the function that writes the run's report.
    """
    config, loss, data = prepared.config, prepared.loss, prepared.data
    placement = trainer_class.placement(config, prepared.tokenizer)
    try:
        if config.eval_only:
            return evaluate(config, trainer_class, placement, loss, data, run_dir)
        return train(config, trainer_class, placement, loss, data, run_dir, in_sweep, prepared.pruner, report_writer)
    finally:
        placement.end()


def train(
    config: RunConfig, trainer_class, placement, loss, data, run_dir: Path, in_sweep: bool, pruner=None, report_writer=None
) -> float | None:
    """Train on a placement, from the beginning or from a checkpoint of the same run. pruner: Optuna's, None in most runs."""
    from preference_training.checkpointing.resume import checkpoint_to_resume
    from preference_training.core.signals import StopRequests
    from preference_training.modeling.adapters import BASE_DIR
    from preference_training.tracking.ledger import Ledger
    from preference_training.tracking.tracker import NoTracker
    from preference_training.training.pruning import Pruning

    ranks = placement.ranks
    check_same_data(data, ranks)
    # The main process looks, and all go where it goes.
    found = checkpoint_to_resume(config.resume, run_dir, config.exp_name) if ranks.is_main else None
    checkpoint, run_dir = ranks.from_main((found, found.path.parent if found else run_dir))
    with ExitStack() as opened:
        if ranks.is_main:
            opened.enter_context(used_by_this_run(run_dir))
            # Before the model is loaded: what it is made of is read from the run directory, or kept there.
            aside = begin_in(config, run_dir, checkpoint)
        placement.base_dir = None if config.debug else run_dir / BASE_DIR
        parts = put_together(config, placement, loss, data, checkpoint, in_sweep)
        total = parts["train_batches"].schedule.total_examples
        # Until all that follows is closed: a signal that comes too late to stop the run disturbs its last lines no more.
        stop = opened.enter_context(StopRequests(config.max_wall_time))
        if ranks.is_main:
            about = describe_run(config, placement, data, checkpoint)
            report = report_writer and report_writer(config, run_dir, loss, placement.tokenizer, data)
            tracker = open_run_dir(config, run_dir, about, checkpoint, total, report, aside)
            with writable(run_dir):
                describe_start(config, run_dir, data, total, placement.device)
            opened.enter_context(tracker)
        else:
            about, tracker = {}, opened.enter_context(NoTracker())
        writer = None
        if not config.debug:
            made = make_writer(config, run_dir, placement, parts["policy"], data, about, tracker.say)
            writer = opened.enter_context(made)
        ledger = Ledger(run_dir, ranks, tracker.say) if config.ledger and loss.paired else None
        pruning = Pruning(Path(config.sweep_dir), run_dir, config.objective, config.eval_every, pruner) if pruner else None
        followed = {"tracker": tracker, "writer": writer, "stop": stop, "ledger": ledger, "pruning": pruning}
        trainer = trainer_class(config, **parts, **followed, ranks=ranks)
        if checkpoint:
            trainer.continue_from(checkpoint)
        if trainer.finished:
            tracker.say("resume: that run is complete; a larger n_epochs, n_examples or n_steps would continue it")
        else:
            trainer.train()
        if writer and writer.failed:
            raise UserError(
                f"local_dirs: the last checkpoint of {run_dir} could not be written. Make room, then resume={run_dir}."
            )
    print(f"run directory: {run_dir}", flush=True)
    return trainer.held_out_means[config.objective] if trainer.held_out_means else None


def make_writer(config: RunConfig, run_dir: Path, placement, policy, data, about: dict, say):
    """The writer of a run's checkpoints. about: `describe_run`; say prints a line."""
    from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions

    tokenizer, end_tokens = served_tokenizer(config, placement.tokenizer, data[0].table)
    options = SaveOptions(
        run=about,
        background=config.save_async,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        metric=config.objective,
        timeout_minutes=config.trainer.distributed_timeout_minutes,
        end_tokens=tuple(end_tokens),
    )
    return CheckpointWriter(run_dir, policy, tokenizer, placement.ranks, options, say)


def evaluate(config: RunConfig, trainer_class, placement, loss, data: tuple, run_dir: Path) -> float | None:
    """Evaluate on a placement, and train nothing: the model as configured in a run directory of its own, or a run's checkpoint.

    Of another run's directory everything stays as it is but for the results. data: the held-out split.
    """
    from preference_training.checkpointing.resume import checkpoint_to_resume
    from preference_training.evaluation.runs import EvaluationRun
    from preference_training.modeling.adapters import saved_base
    from preference_training.tracking.tracker import NoTracker

    ranks = placement.ranks
    found = checkpoint_to_resume(config.resume, run_dir, config.exp_name) if ranks.is_main else None
    checkpoint = ranks.from_main(found)
    placement.base_dir = saved_base(checkpoint.path) if checkpoint else None
    if config.resume and checkpoint is None:
        raise UserError(f"resume: {config.resume} has found no checkpoint of {config.exp_name}. Expected one to evaluate.")
    with ExitStack() as opened:
        tracker = NoTracker()
        if checkpoint is None and ranks.is_main:
            opened.enter_context(used_by_this_run(run_dir))
            aside = begin_in(config, run_dir, None)
            about = describe_run(config, placement, data, None)
            tracker = open_run_dir(config, run_dir, about, None, aside=aside)
        opened.enter_context(tracker)
        run = EvaluationRun(config, trainer_class, placement, loss, data[0].table, checkpoint, tracker)
        run.evaluate(checkpoint.path.parent if checkpoint else run_dir)
    return run.trainer.held_out_means[config.objective]


def put_together(config: RunConfig, placement, loss, data, checkpoint, in_sweep: bool) -> dict:
    """The parts of a trainer by their names: models as at the run's beginning, and batches."""
    from preference_training.batching.micro_batches import evaluation_batches
    from preference_training.modeling.reference_cache import ReferencePlan
    from preference_training.training.same_start import SameStart

    ranks = placement.ranks
    train_prompts, eval_prompts = (split.table for split in data)
    policy = placement.policy()
    budget, first_budget = budgets_of(config, policy, ranks, checkpoint)
    train_batches = build_batches(config, train_prompts, budget, ranks, first_budget)
    eval_sizes = config.eval_batch_size, config.n_eval_examples, config.seed, first_budget, ranks
    reference = same_start = None
    if loss.needs_reference:
        plan = ReferencePlan.for_run(train_batches, eval_prompts, *eval_sizes)
        reference = make_reference(config, placement, policy, plan, in_sweep or train_batches.schedule.visits_again)
        if two_models := config.two_models:
            print(two_models, flush=True)
        else:
            same_start = SameStart(policy, reference)
    num_samples = min(len(eval_prompts), config.n_eval_model_samples * placement.samples(config.sample_during_eval))
    return {
        "policy": policy,
        "reference": reference,
        "loss": loss,
        "tokenizer": placement.tokenizer,
        "train_batches": train_batches,
        "eval_batches": evaluation_batches(eval_prompts, *eval_sizes),
        "sample_prompts": [eval_prompts[k].prompt_ids for k in range(num_samples)],
        "same_start": same_start,
    }


def budgets_of(config: RunConfig, policy, ranks, checkpoint) -> tuple:
    """How many tokens are computed at once, from now on and when the run began.

    As before, where a run goes on with as many processes, bit for bit.
    """
    from preference_training.batching.packing import TokenBudget
    from preference_training.modeling.token_budget import common_budget, token_budget

    if checkpoint:
        before = checkpoint.state["train_batches"]
        if before["ranks"] == ranks.size and config.max_tokens_per_microbatch is None:
            now, first = before["budget"][:2], before["budget"][-2:]
            return TokenBudget(*now), TokenBudget(*first)
    budget = token_budget(policy, config.max_tokens_per_microbatch, weight_copies=config.times_beside_weights)
    budget = common_budget(budget, ranks)
    return budget, budget


def served_tokenizer(config: RunConfig, tokenizer, prompts) -> tuple:
    """The tokenizer that checkpoints hold, whose chat template writes the prompts of training, and the tokens that end answers.

    The run's own stays as it is. prompts are those of the training data.
    """
    from preference_training.data.chat_templates import end_tokens, format_of_prompts, serve_as_trained

    name = format_of_prompts(config.as_dict(), prompts, tokenizer)
    saved = copy.copy(tokenizer)
    serve_as_trained(name, saved)
    return saved, end_tokens(name, saved)


def build_batches(config: RunConfig, prompts, budget, ranks=None, first_budget=None):
    """The steps of a run over prepared prompts. Raises UserError for batches too small for so many ranks.

    first_budget: what the run began with, where it has another now.
    """
    from preference_training.batching.iterator import BatchIterator, Packing
    from preference_training.batching.schedule import RunLength, Schedule
    from preference_training.core.ranks import ALONE

    ranks = ranks or ALONE
    size, parts = config.batch_size, config.gradient_accumulation_steps
    if size // parts < ranks.size:
        raise UserError(
            f"batch_size: found {size}, which in {parts} micro-batches gives {size // parts} examples to {ranks.size} "
            f"processes. Expected at least {parts * ranks.size}, or fewer processes or gradient_accumulation_steps."
        )
    length = RunLength(config.n_epochs, config.n_examples, config.n_steps)
    return BatchIterator(Schedule(prompts, size, config.seed, length), parts, Packing(budget, ranks, first_budget))


def make_reference(config: RunConfig, placement, policy, plan, read_again: bool):
    """The reference: a frozen copy of the policy that scores each batch, or its log-probs of what is read, computed before.

    Computed before, by its own choice, where they are read more than once: in several epochs or the jobs of a sweep
    (`read_again`), or because an earlier run has left them; never where the reference follows the policy.
    """
    from preference_training.modeling.adapters import has_adapter
    from preference_training.modeling.logprobs import LiveReference
    from preference_training.modeling.reference_cache import cache_path, cached_reference

    directory = first_existing(folders_of(config.local_dirs)) / "reference_logps"
    # In the policy's dtype it says now what a copy of it would say.
    is_copy = config.model.reference_dtype == config.model.policy_dtype and not has_adapter(policy)
    reference = LiveReference(policy) if is_copy else placement.reference(policy)
    ranks = placement.ranks
    cached = config.caches_reference(read_again)
    may_be_there = config.reference_logps is None and not config.loss.moves_reference
    if cached or (may_be_there and ranks.from_main(directory.is_dir())):
        path = cache_path(directory, reference.model, plan, computing_settings(config), ranks)
        if cached or ranks.from_main(path.exists()):
            return cached_reference(reference, plan, path, ranks)
    return placement.reference(policy) if is_copy else reference


def computing_settings(config: RunConfig) -> dict:
    """The keys on which the last bits of a model's log-probs depend, beside those that the model itself shows."""
    model, trainer = config.model, config.trainer
    return {
        "trainer": [trainer.name, trainer.tensor_parallel_size],
        "dtypes": [config.sharded_dtype, trainer.output_dtype, model.quantized_compute_dtype],
        "kernels": [config.compile, config.tf32, model.liger_kernels],
    }
