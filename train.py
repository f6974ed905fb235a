"""The command line: compose a configuration, validate it, assemble a run, train.

    python train.py loss=dpo loss.beta=0.1                   # one run
    python train.py -m loss=dpo loss.beta=0.05,0.1,0.5       # a sweep
    python train.py --config-name my_run                     # a run as a file, my_run.yaml

Heavy libraries are imported after the configuration has been validated, so that a typing error costs a second.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.configuration.command_line import mistakes_as_messages, prepare_arguments, refuse
from preference_training.configuration.composition import CONFIG_DIR, own_folder
from preference_training.configuration.keys import at_home
from preference_training.configuration.run_dirs import check_resume, new_run_dir, remove_empty
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import FROM_HALVES
from preference_training.configuration.validation import validate
from preference_training.core.errors import UserError
from preference_training.core.machine import release_memory
from preference_training.core.processes import in_worker, is_step
from preference_training.core.signals import STOPPED, StoppedError, StopRequests, stoppable_start
from preference_training.data.checks import check_run
from preference_training.sweeps.gpus import jobs_at_once, take_gpus
from preference_training.sweeps.jobs import Request
from preference_training.sweeps.running import run_job
from preference_training.sweeps.summary import run_to_end

OmegaConf.register_new_resolver("new_run_dir", new_run_dir, use_cache=True, replace=True)
for _name, _of in {"either": lambda value, other: value or other, "at_home": at_home, "jobs_at_once": jobs_at_once}.items():
    OmegaConf.register_new_resolver(_name, _of, replace=True)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def main(composed: DictConfig) -> float | None:
    """One run, or one job of a sweep. Returns its `objective`, for a sweeper to minimize or maximize."""
    settings = HydraConfig.get()
    run_dir, in_sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
    StopRequests.ends_process = not in_sweep
    composed.sweep_dir = str(Path(settings.sweep.dir).absolute()) if in_sweep else None
    start_in = partial(validate_and_start, composed, in_sweep)
    try:
        # Workers that torchrun has started go through the jobs together; what becomes of one becomes of all.
        if in_sweep and not composed.dry_run and not in_worker():
            values = OmegaConf.to_container(composed, resolve=False)
            return run_job(start_in, Request(Path(composed.sweep_dir), run_dir, list(settings.overrides.task), values))
        return start_in(run_dir)
    except UserError as error:
        sys.exit(refuse(str(error)))  # not raised further: Hydra would add lines of its own
    except StoppedError as stopped:
        # A sweep, and a command that this run is a step of, say themselves how they go on.
        advises = stopped.resumable and not in_sweep and not is_step()
        print(stopped.with_advice(composed.resume) if advises else stopped, flush=True)
        sys.exit(STOPPED)
    finally:
        remove_empty(run_dir)
        release_memory()


def validate_and_start(composed: DictConfig, in_sweep: bool, run_dir: Path, resume: str | None = None) -> float | None:
    """Validate what was composed, then `start` it. Raises UserError."""
    composed.local_run_dir = str(run_dir)
    composed.resume = resume or composed.resume
    overrides, runtime = list(HydraConfig.get().overrides.task), HydraConfig.get().runtime
    config = validate(composed, overrides, dict(runtime.choices), own_folder(runtime.config_sources))
    check_run(config)
    check_resume(config.resume)
    if config.pruner and not in_sweep:
        raise UserError(f"pruner: found {config.pruner}, and this run has no others to be compared with. Add -m.")
    take_gpus(config.gpus_per_job)
    return start(config, run_dir, in_sweep)


def start(config: RunConfig, run_dir: Path, in_sweep: bool, callbacks: Sequence[object] = ()) -> float | None:
    """Run in this process, or launch several where the trainer needs them; rounds and halves of data are runs by themselves."""
    if config.rounds is not None:
        from preference_training.reporting.loops.page import write_loop_report
        from preference_training.rounds.start import start_loop

        return start_loop(config, run_dir, in_sweep, write_loop_report)
    if config.data.weights == FROM_HALVES and not (config.dry_run or config.eval_only):
        from preference_training.cleaning.halves import train_halves

        config, run_dir = train_halves(config, run_dir, in_sweep)
    from preference_training.distributed.launching import run_or_launch
    from preference_training.training.defaults import settle_dtypes

    return run_or_launch(partial(run, callbacks=callbacks), settle_dtypes(config, run_dir), run_dir, in_sweep)


def run(config: RunConfig, run_dir: Path, in_sweep: bool = False, callbacks: Sequence[object] = ()) -> float | None:
    """Train what a checked configuration describes, into `run_dir`. Returns the held-out metric named by `objective`.

    With several processes this is one of them. callbacks: see docs/python.md.
    """
    from preference_training.dry_run.preview import preview
    from preference_training.reporting.run_report import report_writer
    from preference_training.reporting.summary import conclude
    from preference_training.training.assembly import build_batches
    from preference_training.training.preparation import prepare_run, run_schedule
    from preference_training.training.run_directory import report_earlier_run
    from preference_training.training.runs import Readers, train_or_evaluate
    from trainers import TRAINERS, placement_for

    prepared = prepare_run(config, run_dir, in_sweep)
    config = prepared.config
    placement_class = placement_for(config)
    if config.dry_run:
        report_earlier_run(config, run_dir)
        preview(prepared, placement_class, partial(build_batches, config, run_schedule(config, prepared.data[0].table)))
        return None
    placement = placement_class.start(config, prepared.tokenizer)
    try:
        readers = Readers(report_writer, conclude, callbacks)
        return train_or_evaluate(prepared, TRAINERS[config.trainer.name], placement, readers)
    finally:
        placement.end()


def command_line() -> None:
    """Run `main`; a mistake of the user's becomes one message and exit status 2, a bug keeps its traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors itself, and exits with status 1
    with mistakes_as_messages(__file__):
        sys.argv[1:] = prepare_arguments(sys.argv[1:])
        # A worker that waits for the others would not see a signal.
        with nullcontext() if in_worker() else stoppable_start():
            run_to_end(main)


if __name__ == "__main__":
    # As a module, under the name by which the processes of a sweep's jobs find its functions.
    from train import command_line as run_command_line

    run_command_line()
