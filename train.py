"""The command line: compose a configuration, check it, put a run together, train.

    python train.py loss=dpo loss.beta=0.1                   # one run
    python train.py -m loss=dpo loss.beta=0.05,0.1,0.5       # a sweep

Heavy libraries are imported once the configuration has been found sound, so that a slip of the hand costs a second.
"""

import copy
import gc
import os
import sys
import uuid
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from traceback import extract_tb

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sweeps
from configuration import (
    CONFIG_DIR,
    LONGEST_NAME,
    caches_reference,
    check_config,
    check_objective,
    check_sizes,
    dashboard_names,
    defer_keys_of_swept_groups,
    explain_composition_error,
    force_open_sections,
    is_sharded,
    lines_of_precision,
    moves_reference,
    read_entries,
    sharded_dtype,
    task_names,
    times_beside_weights,
    two_models_asked_for,
)
from stopping import STOPPED, StoppedError
from utils import UserError, first_existing, first_to_speak, in_worker


def remove_empty(run_dir: Path) -> None:
    """Remove the directory that Hydra has made for a run which then never began, and its parent if that is empty too."""
    for directory in (run_dir, run_dir.parent):
        # Not looked at before: another rank may do the same at this moment. What is not empty stays.
        with suppress(OSError):
            directory.rmdir()


def new_run_dir(local_dirs, exp_name: str) -> str:
    """A directory name that no other run has: experiment and moment, below the first of `local_dirs` that exists."""
    moment = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    # Hydra makes the directory before the configuration is checked; a name that leads elsewhere is refused there.
    name = str(exp_name).replace("/", "_").encode()[:LONGEST_NAME].decode(errors="ignore")
    return str(first_existing(folders_of(local_dirs)) / f"{name}_{moment}")


def folders_of(local_dirs) -> list[str]:
    """`local_dirs` as a list: brackets may be left out for one."""
    return [local_dirs] if isinstance(local_dirs, str) else list(local_dirs)


OmegaConf.register_new_resolver("new_run_dir", new_run_dir, use_cache=True, replace=True)
OmegaConf.register_new_resolver("either", lambda wanted, otherwise: wanted or otherwise, replace=True)
OmegaConf.register_new_resolver("jobs_at_once", sweeps.jobs_at_once, replace=True)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def main(config: DictConfig) -> float | None:
    """One run, or one job of a sweep. Returns its `objective`, for a sweeper to make small or large."""
    composed = HydraConfig.get()
    run_dir, overrides = Path(composed.runtime.output_dir), list(composed.overrides.task)
    in_sweep = composed.mode == RunMode.MULTIRUN
    checked_start = partial(check_and_start, overrides=overrides, choices=dict(composed.runtime.choices), in_sweep=in_sweep)
    config.sweep_dir = str(Path(composed.sweep.dir).absolute()) if in_sweep else None
    try:
        # Workers that torchrun has started go through the jobs together; what becomes of one becomes of all.
        if in_sweep and not config.dry_run and not in_worker():
            return sweeps.run_job(checked_start, config, run_dir, overrides)
        return checked_start(config, run_dir)
    except UserError as error:
        # Not raised further: Hydra would add lines of its own to the message.
        sys.exit(_refuse(str(error)))
    except StoppedError as stopped:
        advice = "" if in_sweep else "; resume=auto or resume=RUN_DIRECTORY goes on from there"
        print(f"{stopped}{advice}", flush=True)
        sys.exit(STOPPED)
    finally:
        remove_empty(run_dir)
        release_memory()


def check_and_start(
    config: DictConfig, run_dir: Path, overrides: list[str], choices: dict[str, str], in_sweep: bool
) -> float | None:
    """`start`, once the configuration has been found sound. overrides and choices are Hydra's. Raises UserError."""
    check_config(config, overrides, choices)
    if config.pruner and not in_sweep:
        raise UserError("pruner: found one, and this run has no others to be compared with. Add -m, or pruner=null.")
    config.local_run_dir = str(run_dir)
    sweeps.take_gpus(config.gpus_per_job)
    return start(config, run_dir, in_sweep)


def start(config: DictConfig, run_dir: Path, in_sweep: bool) -> float | None:
    """Run in this process, or in several that are started here where the trainer wants them."""
    from launching import launch, number_of_workers, silence_others

    settle_batch_size(config)
    if config.dry_run or not is_sharded(config):
        return run(config, run_dir, in_sweep)
    if config.trainer.name == "TensorParallelTrainer":
        from layer_splitting import splits_in_one_process

        if splits_in_one_process(config):
            return run(config, run_dir, in_sweep, "LayerSplittingTrainer")
    if in_worker():
        # torchrun has started it, or Slurm. The directory of the run is the main rank's, which makes it when all have joined:
        # a worker that is ended before leaves none.
        with suppress(OSError):
            run_dir.rmdir()
        silence_others()
        return run(config, run_dir, in_sweep)
    settings = OmegaConf.to_container(config, resolve=True)
    return launch(run_as_worker, (settings, str(run_dir), in_sweep), number_of_workers(config.trainer), config.fsdp_port)


def settle_batch_size(config: DictConfig) -> None:
    """Set `batch_size` from `per_device_batch_size`, where that is given. Raises UserError where it does not fit."""
    from launching import number_of_data_ranks

    if config.per_device_batch_size is not None:
        per_step = config.per_device_batch_size * config.gradient_accumulation_steps
        config.batch_size = per_step * number_of_data_ranks(config)
        check_sizes(config)


def run_as_worker(settings: dict, run_dir: str, in_sweep: bool) -> float | None:
    """`run` in a process that `start` has started."""
    from launching import silence_others

    silence_others()
    return run(OmegaConf.create(settings), Path(run_dir), in_sweep)


def run(config: DictConfig, run_dir: Path, in_sweep: bool = False, trainer: str | None = None) -> float | None:
    """Train what a checked configuration describes, into `run_dir`. Returns the held-out metric named by `objective`.

    Under a trainer of several processes this is one of them. `trainer` is the class that `start` has chosen in place of
    `trainer.name`.
    """
    from dry_run import look
    from losses import build_loss
    from model_limits import check_limits, check_rows, limits_of
    from models import check_model, load_tokenizer
    from optimization import check_optimizer
    from pruning import build_pruner
    from task_suites import check_harness
    from trainers import TRAINERS
    from utils import allow_tf32, quiet_libraries, seed_everything, settle_memory

    quiet_libraries()
    settle_memory(keep_freed=not is_sharded(config))
    allow_tf32(config.tf32)
    seed_everything(config.seed)
    check_optimizer(config)
    pruner = build_pruner(config) if config.pruner else None
    if config.eval_only and task_names(config):
        check_harness()
    loss = build_loss(**OmegaConf.to_container(config.loss, resolve=True), seed=config.seed)
    check_objective(config, loss.paired)
    for line in [] if config.eval_only else lines_of_precision(config):
        print(line, flush=True)
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    for line in check_model(config.model, tokenizer, config.cache_dir):
        print(line, flush=True)
    limits = limits_of(config, tokenizer)
    check_limits(config, tokenizer, limits)
    # Before the processes join: those that do not prepare it wait for it without a time-out.
    splits = ("test",) if config.eval_only and not config.dry_run else ("train", "test")
    data = prepare_data(config, tokenizer, loss.paired, splits, data_version(config, run_dir))
    check_rows(config, tokenizer, limits, [split.table for split in data])
    if config.dry_run:
        say_what_is_set_aside(config, run_dir)
        return look(config, tokenizer, loss, data, partial(build_batches, config, data[0].table))
    trainer_class = TRAINERS[trainer or config.trainer.name]
    placement = trainer_class.placement(config, tokenizer)
    try:
        if config.eval_only:
            return evaluate(config, trainer_class, placement, loss, data, run_dir)
        return train(config, trainer_class, placement, loss, data, run_dir, in_sweep, pruner)
    finally:
        placement.end()


def train(config: DictConfig, trainer_class, placement, loss, data, run_dir: Path, in_sweep: bool, pruner=None) -> float | None:
    """Train on a placement, from the beginning or from a checkpoint of the same run. pruner: Optuna's, None in most runs."""
    from adapters import BASE_DIR
    from checkpoints import CheckpointWriter
    from ledger import Ledger
    from pruning import Pruning
    from resuming import checkpoint_to_continue
    from stopping import StopRequests
    from tracking import NoTracker

    ranks = placement.ranks
    check_same_data(data, ranks)
    # The main process looks, and all go where it goes.
    found = checkpoint_to_continue(config.resume, run_dir, config.exp_name) if ranks.is_main else None
    checkpoint, run_dir = ranks.from_main((found, found.parent if found else run_dir))
    with ExitStack() as opened:
        if ranks.is_main:
            opened.enter_context(used_by_this_run(run_dir))
            # Before the model is loaded: what it is made of is read from the run directory, or kept there.
            aside = begin_in(config, run_dir, checkpoint)
        placement.base_dir = None if config.debug else run_dir / BASE_DIR
        parts = put_together(config, placement, loss, data, checkpoint, in_sweep)
        total = parts["train_batches"].total_examples
        # Until all that follows is closed: a signal that comes too late to stop the run disturbs its last lines no more.
        stop = opened.enter_context(StopRequests(config.max_wall_time))
        if ranks.is_main:
            about = describe_run(config, placement, data, checkpoint)
            report = reporter(config, run_dir, loss, placement.tokenizer, data)
            tracker = open_run_dir(config, run_dir, about, checkpoint, total, report, aside)
            with writable(run_dir):
                describe_start(config, run_dir, data, total, placement.device)
            opened.enter_context(tracker)
        else:
            about, tracker = {}, opened.enter_context(NoTracker())
        writer = None
        if not config.debug:
            kept = config.keep_last, config.keep_best, config.objective
            saved, ends = served_tokenizer(config, placement.tokenizer, data[0].table)
            made = run_dir, parts["policy"], saved, ranks, config.save_async, *kept, about, tracker.say
            more = {"patience_minutes": config.trainer.get("distributed_timeout_minutes"), "end_tokens": ends}
            writer = opened.enter_context(CheckpointWriter(*made, **more))
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


def evaluate(config: DictConfig, trainer_class, placement, loss, data: tuple, run_dir: Path) -> float | None:
    """Evaluate on a placement, and train nothing: the model as configured in a run directory of its own, or a run's checkpoint.

    Of another run's directory everything stays as it is but for the results. data: the held-out split.
    """
    from adapters import kept_base
    from evaluation_runs import EvaluationRun
    from resuming import checkpoint_to_continue
    from tracking import NoTracker

    ranks = placement.ranks
    found = checkpoint_to_continue(config.resume, run_dir, config.exp_name) if ranks.is_main else None
    checkpoint = ranks.from_main(found)
    placement.base_dir = kept_base(checkpoint) if checkpoint else None
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
        run.evaluate(checkpoint.parent if checkpoint else run_dir)
    return run.trainer.held_out_means[config.objective]


def put_together(config: DictConfig, placement, loss, data, checkpoint: Path | None, in_sweep: bool) -> dict:
    """The parts of a trainer by their names: models as at the run's beginning, and batches."""
    from batches import evaluation_batches
    from reference_cache import Reads
    from same_start import SameStart

    ranks = placement.ranks
    train_prompts, eval_prompts = (split.table for split in data)
    policy = placement.policy()
    budget, first_budget = budgets_of(config, policy, ranks, checkpoint)
    train_batches = build_batches(config, train_prompts, budget, ranks, first_budget)
    eval_sizes = config.eval_batch_size, config.n_eval_examples, config.seed, first_budget, ranks
    reference = same_start = None
    if loss.needs_reference:
        reads = Reads.of_run(train_batches, eval_prompts, *eval_sizes)
        reference = make_reference(config, placement, policy, reads, in_sweep or train_batches.visits_again)
        if two_models := two_models_asked_for(config):
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


def budgets_of(config: DictConfig, policy, ranks, checkpoint: Path | None) -> tuple:
    """How many tokens are computed at once, from now on and when the run began.

    As before, where a run goes on with as many processes, bit for bit.
    """
    from batches import TokenBudget
    from checkpoints import read_state
    from models import shared_budget, token_budget

    if checkpoint:
        before = read_state(checkpoint)["train_batches"]
        if before["ranks"] == ranks.size and config.max_tokens_per_microbatch is None:
            now, first = before["budget"][:2], before["budget"][-2:]
            return TokenBudget(*now), TokenBudget(*first)
    budget = token_budget(policy, config.max_tokens_per_microbatch, beside_weights=times_beside_weights(config))
    budget = shared_budget(budget, ranks)
    return budget, budget


def data_version(config: DictConfig, run_dir: Path) -> int:
    """The version of the rules by which data is prepared: that of the run that goes on, the newest for a new one."""
    from tokenization import VERSION, VERSIONS

    found = None
    if config.resume:
        from resuming import version_of_data

        found = version_of_data(config.resume, run_dir, config.exp_name)
    if found is not None and found not in VERSIONS:
        raise UserError(
            f"resume: the data of that run was prepared by version {found} of the rules, and this code knows those up to "
            f"{VERSION}. Expected code at least as new as the run's."
        )
    if found not in (None, VERSION):
        print(f"resume: the data stays as the run began, by version {found} of the rules: {VERSIONS[found]}", flush=True)
    return found or VERSION


def check_same_data(data, ranks) -> None:
    """Raise UserError, on all ranks, where some have prepared other data than others: they would train on a mixture."""
    found = ranks.gather([split.table.fingerprint for split in data])
    if any(other != found[0] for other in found):
        ranks_apart = ", ".join(str(rank) for rank, other in enumerate(found) if other != found[0])
        raise UserError(
            f"datasets: ranks {ranks_apart} have prepared other data than rank 0. Expected the same files on all machines, and "
            "where a run goes on, its directory too."
        )


def describe_run(config: DictConfig, placement, data, checkpoint: Path | None) -> dict:
    """What a run is made of, in plain values, as every checkpoint of it says."""
    import torch
    import transformers

    from checkpoints import read_state
    from served_prompts import format_of_prompts

    return {
        "config": OmegaConf.to_container(config, resolve=True),
        "data": [split.fingerprint for split in data],
        "data_version": data[0].version,
        "began_with": placement.began_with,
        "prompt_format": format_of_prompts(OmegaConf.to_container(config, resolve=True), data[0].table, placement.tokenizer),
        "wandb_id": read_state(checkpoint)["run"]["wandb_id"] if checkpoint else uuid.uuid4().hex,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def served_tokenizer(config: DictConfig, tokenizer, prompts) -> tuple:
    """The tokenizer that checkpoints hold, whose chat template writes the prompts of training, and the tokens that end answers.

    The run's own stays as it is. prompts are those of the training data.
    """
    from served_prompts import end_tokens, format_of_prompts, serve_as_trained

    name = format_of_prompts(OmegaConf.to_container(config, resolve=True), prompts, tokenizer)
    saved = copy.copy(tokenizer)
    serve_as_trained(name, saved)
    return saved, end_tokens(name, saved)


def describe_start(config: DictConfig, run_dir: Path, data, total: int | None, device) -> None:
    """Leave in a run's directory what its report says of data, machine and code, as they are at this start."""
    from run_files import write_about

    names = [entry.name for entry in read_entries(config)]
    reports = {name: zip(names, split.reports, strict=True) for name, split in zip(("train", "held out"), data, strict=True)}
    write_about(run_dir, reports, total, device)


def reporter(config: DictConfig, run_dir: Path, loss, tokenizer, data):
    """A function that writes a run's report.html and returns its path; before it, if there is a ledger, flagged_pairs.jsonl."""
    from flagged_pairs import PairFinder
    from run_report import write_report

    finder = PairFinder(run_dir, data[0].table, tokenizer) if config.ledger and loss.paired else None

    def write() -> Path:
        if finder is not None:
            finder.write()
        return write_report(run_dir)

    return write


def begin_in(config: DictConfig, run_dir: Path, checkpoint: Path | None) -> Path | None:
    """Make room for a run that begins in a directory: move an earlier run aside and return where it lies now, or None.

    Raises UserError where the earlier run is needed where it is.
    """
    from resuming import check_beginning, forget_base, set_aside

    with writable(run_dir):
        if config.resume:
            if checkpoint is None:
                forget_base(run_dir)
            return None
        check_beginning(run_dir, config.model.archive, config.eval_only)
        return set_aside(run_dir)


def open_run_dir(
    config: DictConfig,
    run_dir: Path,
    about: dict,
    checkpoint: Path | None,
    total: int | None = None,
    report=None,
    aside: Path | None = None,
):
    """Make a run's directory ready for its files, as they were at the checkpoint; returns its tracker.

    total, report: the number of training examples, and what writes the run's page; None where there is none. aside: where an
    earlier run lies that was found in the directory. Raises UserError where the checkpoint is another run's.
    """
    from checkpoints import read_state
    from dashboards import start_dashboards
    from resuming import check_same_run, cut_back
    from tracking import Tracker

    seen = read_state(checkpoint)["examples"] if checkpoint else 0
    with writable(run_dir):
        if checkpoint:
            check_same_run(checkpoint, about)
        if config.resume:
            cut_back(run_dir, checkpoint)
        OmegaConf.save(config, run_dir / "config.yaml")
        dashboards = start_dashboards(dashboard_names(config), about["config"], run_dir, about["wandb_id"], seen)
        tracker = Tracker(run_dir, total, config.minimum_log_interval_secs, dashboards, report, seen)
    if aside:
        tracker.say(f"local_run_dir: {run_dir} held an earlier run, which is now in {aside.name}/")
    return tracker


def say_what_is_set_aside(config: DictConfig, run_dir: Path) -> None:
    """Of a dry run: print what would become of an earlier run in its directory. Raises UserError where that cannot be."""
    from resuming import check_beginning, parts_of_a_run

    if config.resume or not parts_of_a_run(run_dir):
        return
    check_beginning(run_dir, config.model.archive, config.eval_only)
    print(f"local_run_dir: {run_dir} holds an earlier run, which a run would set aside in it; resume={run_dir} goes on with it")


@contextmanager
def writable(run_dir: Path):
    """Inside, what the system does not let be written is the user's mistake: UserError."""
    try:
        yield
    except TimeoutError:
        # A lock that is held.
        raise
    except OSError as error:
        raise UserError(unwritable(run_dir, error)) from None


def unwritable(place, error: OSError) -> str:
    """What to say of a run directory, or a folder above it, that the system does not let be written."""
    return (
        f"local_run_dir: {place} cannot be written to: {error.strerror}. Expected a folder of yours, with room; set local_dirs "
        "or local_run_dir."
    )


@contextmanager
def used_by_this_run(run_dir: Path):
    """Inside, no other run may use the directory. Raises UserError where one does, or where nothing can be written."""
    from filelock import FileLock, Timeout

    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise UserError(f"local_run_dir: {run_dir} is in use by another run. Wait for it, stop it, or name another.") from None
    try:
        yield
    finally:
        # Before it is released: who comes now finds no lock, or one that is held.
        (run_dir / ".lock").unlink(missing_ok=True)
        lock.release()


def build_batches(config: DictConfig, prompts, budget, ranks=None, first_budget=None):
    """The steps of a run over prepared prompts. Raises UserError for batches too small for so many ranks.

    first_budget: what the run began with, where it has another now.
    """
    from batches import BatchIterator
    from ranks import ALONE

    ranks = ranks or ALONE
    size, pieces = config.batch_size, config.gradient_accumulation_steps
    if size // pieces < ranks.size:
        raise UserError(
            f"batch_size: found {size}, which in {pieces} micro-batches gives {size // pieces} examples to {ranks.size} "
            f"processes. Expected at least {pieces * ranks.size}, or fewer processes or gradient_accumulation_steps."
        )
    limits = config.n_epochs, config.n_examples
    return BatchIterator(prompts, size, pieces, config.seed, *limits, budget, ranks, config.n_steps, first_budget)


def make_reference(config: DictConfig, placement, policy, reads, read_again: bool):
    """The reference: a frozen copy of the policy that scores each batch, or its log-probs of what is read, computed before.

    Computed before, by its own choice, where they are read more than once: in several epochs or the jobs of a sweep
    (`read_again`), or because an earlier run has left them; never where the reference follows the policy.
    """
    from adapters import has_adapter
    from logprobs import LiveReference
    from reference_cache import cache_path, cached_reference

    directory = first_existing(folders_of(config.local_dirs)) / "reference_logps"
    # In the policy's dtype it says now what a copy of it would say.
    is_copy = config.model.reference_dtype == config.model.policy_dtype and not has_adapter(policy)
    reference = LiveReference(policy) if is_copy else placement.reference(policy)
    ranks = placement.ranks
    cached = caches_reference(config, read_again)
    may_be_there = config.reference_logps is None and not moves_reference(config)
    if cached or (may_be_there and ranks.from_main(directory.is_dir())):
        path = cache_path(directory, reference.model, reads, computing_settings(config), ranks)
        if cached or ranks.from_main(path.exists()):
            return cached_reference(reference, reads, path, ranks)
    return placement.reference(policy) if is_copy else reference


def computing_settings(config: DictConfig) -> dict:
    """The keys on which the last bits of a model's log-probs depend, beside those that the model itself shows."""
    model, trainer = config.model, config.trainer
    return {
        "trainer": [trainer.name, trainer.get("tensor_parallel_size")],
        "dtypes": [sharded_dtype(config), trainer.get("output_dtype"), model.quantized_compute_dtype],
        "kernels": [config.compile, config.tf32, model.liger_kernels],
    }


def prepare_data(
    config: DictConfig, tokenizer, paired: bool, names: tuple[str, ...] = ("train", "test"), version: int | None = None
) -> tuple:
    """The tokenised prompts of the named splits, and a line or more that says what they hold: a `Prepared` for each.

    version: `data_version`, None for the newest. Responses of the held-out split are numbered behind those of the training
    split. Raises UserError where the first of the splits has no example.
    """
    from data_preparation import overlap, prepare, same_ids, without_held_out

    entries = read_entries(config)
    directory = first_existing(folders_of(config.local_dirs)) / "prepared_data"
    settings = token_settings(config, paired, version)
    splits = [prepare(entries, split, tokenizer, settings, directory, config.cache_dir) for split in names]
    if len(splits) == 2 and splits[0].version > 1:
        splits[0] = without_held_out(*splits, entries, directory)
    for split, data in zip(names, splits, strict=True):
        say_what_is_there(data, entries, split, "pairs" if paired else "responses", needed=split == names[0])
        if data.version == 1 and (count := same_ids(data.table)):
            print(f"  pairs of equal token ids, which a new run would leave out: {count}", flush=True)
    if len(splits) == 2:
        train_split, held_out = splits
        splits[1] = held_out.numbered_from(train_split.table.num_responses)
        if found := overlap(train_split.table, held_out.table):
            print(found.line(tokenizer), flush=True)
    return tuple(splits)


def say_what_is_there(prepared, entries: list, split: str, what: str, needed: bool) -> None:
    """Print what one split holds, and of each data set what was left out or changed.

    Raises UserError where a split that is needed has no example.
    """
    examples = int(prepared.table.num_examples.sum())
    lines = [
        f"  {entry.name}: {line}" for entry, report in zip(entries, prepared.reports, strict=True) for line in report.lines()
    ]
    if not examples and needed:
        names = ", ".join(entry.name for entry in entries)
        found = "; ".join(line.strip() for line in lines) or "the data is empty"
        kind = {"train": "training", "test": "held-out"}[split]
        raise UserError(f"datasets: {names}: no {kind} example is left ({found}). Expected at least one.")
    print(f"{split}: {len(prepared.table)} prompts, {examples} {what}", *lines, sep="\n", flush=True)


def token_settings(config: DictConfig, paired: bool, version: int | None = None):
    """A function that says of an entry what its token ids depend on: the entry's own wishes, then the configuration's."""
    from tokenization import VERSION, TokenSettings

    def settings(entry) -> TokenSettings:
        mode = entry.truncation_mode or entry.dataset.truncation_mode
        lengths = config.max_length, config.max_prompt_length
        return TokenSettings(paired, *lengths, mode, entry.template, entry.system_prompt, version or VERSION)

    return settings


def release_memory() -> None:
    """Give a finished job's memory back, so that the next job of a sweep starts with all of it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _refuse(message: str) -> int:
    """Print what the user got wrong, once on each machine; the exit status for it."""
    if first_to_speak():
        print(message, file=sys.stderr, flush=True)
    return 2


def command_line() -> None:
    """Run `main`; a mistake of the user's becomes one message and exit status 2, a bug keeps its traceback."""
    # Hydra would otherwise print errors itself, and exit with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = defer_keys_of_swept_groups(force_open_sections(sys.argv[1:]))
    try:
        sweeps.run_through(main)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_refuse(explain_composition_error(error)))
    except OSError as error:
        # Hydra makes the run directory before `main` begins.
        if any(frame.name == "main" and frame.filename == __file__ for frame in extract_tb(error.__traceback__)):
            raise
        sys.exit(_refuse(unwritable(error.filename, error)))
    except ValueError as error:
        # What Hydra raises for loss=5.
        if not str(error).startswith("Config group override"):
            raise
        sys.exit(_refuse(str(error)))


if __name__ == "__main__":
    # As a module, under the name by which the processes of a sweep's jobs find its functions.
    from train import command_line as run_command_line

    run_command_line()
