"""A run from its prepared data to its last checkpoint, or one that evaluates only."""

from contextlib import ExitStack

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.schedule import Schedule
from preference_training.checkpointing.resume import checkpoint_to_resume
from preference_training.configuration.run_dirs import writable
from preference_training.core.errors import UserError
from preference_training.core.signals import StopRequests
from preference_training.data.prompt_table import PromptTable
from preference_training.distributed.placement import Placement
from preference_training.modeling.adapters import BASE_DIR, saved_base
from preference_training.tracking.about import write_about
from preference_training.tracking.tracker import NoTracker
from preference_training.training.assembly import assemble, checkpoint_writer, observe
from preference_training.training.evaluator import Evaluator
from preference_training.training.parts import Batches, Models, Observers, RunState
from preference_training.training.preparation import PreparedRun, check_same_data
from preference_training.training.run_directory import describe_run, lock_run_dir, open_run_dir, prepare_run_dir


def train_or_evaluate(prepared: PreparedRun, trainer_class, placement: Placement, report_writer) -> float | None:
    """Train, or evaluate only. Returns the held-out metric named by `objective`.

    With several processes this is one of them. report_writer: builds the function that writes the run's report.
    """
    if prepared.config.eval_only:
        return evaluate(prepared, placement)
    return train(prepared, trainer_class, placement, report_writer)


def train(prepared: PreparedRun, trainer_class, placement: Placement, report_writer=None) -> float | None:
    """Train on a placement, from the beginning or from a checkpoint of the same run."""
    config, run_dir, data, ranks = prepared.config, prepared.run_dir, prepared.data, placement.ranks
    check_same_data(data, ranks)
    # Rank 0 looks for a checkpoint, and all ranks follow it.
    found = checkpoint_to_resume(config.resume, run_dir, config.exp_name) if ranks.is_rank_zero else None
    checkpoint, run_dir = ranks.broadcast((found, found.path.parent if found else run_dir))
    with ExitStack() as opened:
        if ranks.is_rank_zero:
            opened.enter_context(lock_run_dir(run_dir))
            # Before the model is loaded: what it is made of is read from the run directory, or kept there.
            notice = prepare_run_dir(config, run_dir, checkpoint)
        placement.base_dir = None if config.debug else run_dir / BASE_DIR
        models, batches = assemble(prepared, placement, checkpoint)
        # Stays installed during shutdown, so that a late signal cannot interrupt the final output.
        stop = opened.enter_context(StopRequests(config.max_wall_time))
        if ranks.is_rank_zero:
            total = batches.train.schedule.total_examples
            about = describe_run(prepared, placement, checkpoint)
            report = report_writer and report_writer(config, run_dir, prepared.loss, placement.tokenizer, data)
            tracker = open_run_dir(config, run_dir, about, checkpoint, total, report)
            if notice:
                tracker.log_message(notice)
            with writable(run_dir):
                write_about(
                    run_dir,
                    [entry.name for entry in prepared.entries],
                    [split.reports for split in data],
                    total,
                    placement.device,
                    {"usual": about["usual"], "chosen": config.chosen},
                )
            opened.enter_context(tracker)
        else:
            about, tracker = {}, opened.enter_context(NoTracker())
        observers = observe(prepared, placement, run_dir, tracker, stop)
        if not config.debug:
            writer = checkpoint_writer(prepared, placement, models.policy, run_dir, about, tracker.log_message)
            observers.writer = opened.enter_context(writer)
        trainer = trainer_class(placement, models, batches, observers)
        if checkpoint:
            trainer.continue_from(checkpoint)
        if trainer.finished:
            tracker.log_message("resume: that run is complete; a larger n_epochs, n_examples or n_steps would continue it")
        else:
            trainer.train()
        if observers.writer and observers.writer.failed:
            raise UserError(
                f"local_dirs: the last checkpoint of {run_dir} could not be written. Make room, then resume={run_dir}."
            )
    print(f"run directory: {run_dir}", flush=True)
    return trainer.state.held_out[config.objective] if trainer.state.held_out else None


def evaluate(prepared: PreparedRun, placement: Placement) -> float | None:
    """Evaluate on a placement, and train nothing: the model as configured in a run directory of its own, or a run's checkpoint.

    Of another run's directory everything stays as it is but for the results.
    """
    from preference_training.evaluation.runs import EvaluationRun

    config, run_dir, data, ranks = prepared.config, prepared.run_dir, prepared.data, placement.ranks
    found = checkpoint_to_resume(config.resume, run_dir, config.exp_name) if ranks.is_rank_zero else None
    checkpoint = ranks.broadcast(found)
    placement.base_dir = saved_base(checkpoint.path) if checkpoint else None
    if config.resume and checkpoint is None:
        raise UserError(f"resume: {config.resume} has found no checkpoint of {config.exp_name}. Expected one to evaluate.")
    with ExitStack() as opened:
        tracker = NoTracker()
        if checkpoint is None and ranks.is_rank_zero:
            opened.enter_context(lock_run_dir(run_dir))
            notice = prepare_run_dir(config, run_dir, None)
            about = describe_run(prepared, placement, None)
            tracker = open_run_dir(config, run_dir, about, None)
            if notice:
                tracker.log_message(notice)
        opened.enter_context(tracker)

        def build_evaluator(policy, reference, held_out, sample_prompts) -> Evaluator:
            models = Models(policy, reference, prepared.loss)
            batches = Batches(BatchIterator(Schedule(PromptTable.of([]), config.batch_size)), held_out, sample_prompts)
            return Evaluator(placement, models, batches, RunState(), Observers(tracker))

        run = EvaluationRun(placement, data[0].table, checkpoint, prepared.loss.needs_reference, build_evaluator)
        run.evaluate(checkpoint.path.parent if checkpoint else run_dir)
    return run.evaluator.state.held_out[config.objective]
