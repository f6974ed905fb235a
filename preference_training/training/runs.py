"""A run from its prepared data to its last checkpoint, or one that evaluates only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import evaluation_prompts
from preference_training.batching.packing import iterate_examples
from preference_training.batching.schedule import Schedule
from preference_training.checkpointing.best import best_checkpoint
from preference_training.checkpointing.resume import checkpoint_to_resume
from preference_training.configuration.run_dirs import remove_empty, writable
from preference_training.core.errors import UserError, first_line
from preference_training.core.metric_names import EVAL_MARGIN
from preference_training.core.process_group import progress
from preference_training.core.processes import is_step
from preference_training.core.signals import StoppedError, StopRequests
from preference_training.data.prompt_table import PromptTable
from preference_training.distributed.placement import Placement
from preference_training.modeling.adapters.files import BASE_DIR, saved_base
from preference_training.modeling.adapters.weights import has_adapter
from preference_training.modeling.quantization import weight_numels
from preference_training.tracking.about import write_about
from preference_training.tracking.callbacks import Callbacks
from preference_training.tracking.half_margins import write_half_data, write_half_margins
from preference_training.tracking.tracker import NoTracker, Tracker
from preference_training.training.assembly import assemble, checkpoint_writer, observe
from preference_training.training.budget_trial import REMEDIES
from preference_training.training.defaults import usual_lr
from preference_training.training.evaluator import Evaluator
from preference_training.training.parts import Batches, Models, Observers, RunState
from preference_training.training.preparation import PreparedRun, check_same_data
from preference_training.training.run_directory import describe_run, lock_run_dir, open_run_dir, prepare_run_dir


@dataclass(frozen=True)
class Readers:
    """Who reads a run: packages below this one, which it is handed by, and a user's callbacks.

    report_writer: builds the function that writes the run's report. conclude: makes of a finished run's directory its findings
    and last lines. None for neither.
    """

    report_writer: Callable | None = None
    conclude: Callable | None = None
    callbacks: Sequence[object] = ()


def train_or_evaluate(prepared: PreparedRun, trainer_class, placement: Placement, readers: Readers) -> float | None:
    """Train, or evaluate only. Returns the held-out metric named by `objective`.

    With several processes this is one of them. Raises UserError where memory is too small for what smaller packs do not help.
    """
    try:
        if prepared.config.eval_only:
            return evaluate(prepared, placement)
        return train(prepared, trainer_class, placement, readers)
    except torch.OutOfMemoryError as error:
        during = f" in {progress.phase}" if progress.phase else ""
        raise UserError(f"memory: out of memory{during}. {REMEDIES} Found: {first_line(error)}.") from error


def train(prepared: PreparedRun, trainer_class, placement: Placement, readers: Readers | None = None) -> float | None:
    """Train on a placement, from the beginning or from a checkpoint of the same run."""
    config, run_dir, data, ranks = prepared.config, prepared.run_dir, prepared.data, placement.ranks
    readers = readers or Readers()
    callbacks = Callbacks(readers.callbacks, ranks.is_rank_zero)
    check_same_data(data, ranks)
    # Rank 0 looks for a checkpoint, and all ranks follow it.
    found = checkpoint_to_resume(config.resume, run_dir, config.exp_name) if ranks.is_rank_zero else None
    checkpoint, run_dir = ranks.broadcast((found, found.path.parent if found else run_dir))
    if run_dir != prepared.run_dir:
        # Made for a new run: while it lay there, it would be the newest of its name.
        remove_empty(prepared.run_dir)
    last_lines: Sequence[str] = ()
    with ExitStack() as opened:
        # Left last: everything is written then.
        opened.enter_context(_end_of_run(callbacks, run_dir))
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
            report = readers.report_writer and readers.report_writer(config, run_dir, prepared.loss, placement.tokenizer, data)
            tracker = open_run_dir(config, run_dir, about, checkpoint, total, report)
            if notice:
                tracker.log_message(notice)
            _write_about(prepared, placement, run_dir, total, _sizes(models, batches, prepared) | {"usual": about["usual"]})
            opened.enter_context(tracker)
        else:
            about, tracker = {}, opened.enter_context(NoTracker())
        observers = observe(prepared, placement, run_dir, tracker, stop)
        observers.callbacks = callbacks
        if not config.debug:
            writer = checkpoint_writer(prepared, placement, models.policy, run_dir, about, tracker.log_message)
            observers.writer = opened.enter_context(writer)
        trainer = trainer_class(placement, models, batches, observers)
        if checkpoint:
            trainer.continue_from(checkpoint)
        if trainer.finished:
            tracker.log_message("resume: that run is complete; a larger n_epochs, n_examples or n_steps would continue it")
            observers.load_best(config, ranks)
        else:
            trainer.train()
            if readers.conclude and ranks.is_rank_zero:
                last_lines = _conclude(partial(readers.conclude, run_dir, not (prepared.in_sweep or is_step())), tracker)
        if config.data.half is not None:
            _write_margins(trainer, [split.table for split in data], run_dir)
        if observers.writer and observers.writer.failed:
            raise UserError(
                f"local_dirs: the last checkpoint of {run_dir} could not be written. Make room, then resume={run_dir}."
            )
    print(*last_lines, *([] if is_step() else [f"run directory: {run_dir}"]), sep="\n", flush=True)
    if config.load_best and (best := best_checkpoint(run_dir, config.objective)) is not None:
        return best.held_out(config.objective)
    return trainer.state.held_out[config.objective] if trainer.state.held_out else None


def _write_margins(trainer, tables: Sequence[PromptTable], run_dir: Path) -> None:
    """Write the margins of the half that a run has not trained on, of its last evaluation. tables: its own half, the other."""
    config, evaluator = trainer.config, trainer.evaluator
    if evaluator.held_out is None:
        # Of a run that was complete but for these.
        trainer.models.start_check, trainer.state.evaluated_at = None, None
        with trainer.step.updater.averages_in_place():
            evaluator.evaluate(may_stop=False)
    if trainer.placement.ranks.is_rank_zero:
        prompts = evaluation_prompts(tables[1], config.n_eval_examples, config.seed)
        examples = islice(iterate_examples(prompts), config.n_eval_examples)
        with writable(run_dir):
            write_half_data(run_dir, tables)
            write_half_margins(
                run_dir, examples, evaluator.held_out.examples[EVAL_MARGIN].tolist(), trainer.placement.tokenizer
            )


@contextmanager
def _end_of_run(callbacks: Callbacks, run_dir: Path) -> Iterator[None]:
    """Tell callbacks when what is inside has ended or was stopped; not of a mistake or a bug."""
    try:
        yield
    except StoppedError:
        callbacks.call("on_end", run_dir)
        raise
    callbacks.call("on_end", run_dir)


def _write_about(prepared: PreparedRun, placement: Placement, run_dir: Path, total: int, more: dict) -> None:
    """Write about.json, for a run over `total` examples. Raises UserError."""
    names, reports = [entry.name for entry in prepared.entries], [split.reports for split in prepared.data]
    with writable(run_dir):
        write_about(run_dir, names, reports, total, placement.device, more | {"chosen": prepared.config.chosen})


def _sizes(models: Models, batches: Batches, prepared: PreparedRun) -> dict:
    """How many optimizer steps a run has, its model's size and usual learning rate, and what its splits hold."""
    tables = {name: split.table for name, split in zip(("train", "held out"), prepared.data, strict=True)}
    sizes = {
        name: {"examples": int(table.num_examples.sum()), "responses": table.num_responses} for name, table in tables.items()
    }
    parameters = sum(weight_numels(models.policy).values())
    usual = usual_lr(models.loss.learns, parameters, has_adapter(models.policy), prepared.config.optimizer)
    return {"steps": batches.train.schedule.total_steps, "parameters": parameters, "usual_lr": usual, **sizes}


def _conclude(conclude: Callable, tracker: Tracker) -> Sequence[str]:
    """Record what a run has found out about itself; the lines in which it ends."""
    tracker.flush()
    try:
        conclusion = conclude()
    except Exception as error:  # whatever is wrong with what it reads, the run has ended well
        tracker.log_message(f"warning: the findings of the run could not be made: {first_line(error)}")
        return ()
    for finding in conclusion.findings:
        if finding.severity != "note":
            tracker.record_finding(finding.kind, finding.line)
    return conclusion.lines


def evaluate(prepared: PreparedRun, placement: Placement) -> float | None:
    """Evaluate on a placement, and train nothing: the model as configured in a run directory of its own, or a run's checkpoint.

    Of another run's directory everything stays as it is but for the results.
    """
    from preference_training.evaluation.runs import EvaluationRun

    config, run_dir, data, ranks = prepared.config, prepared.run_dir, prepared.data, placement.ranks
    found = checkpoint_to_resume(config.resume, run_dir, config.exp_name, "evaluating") if ranks.is_rank_zero else None
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
