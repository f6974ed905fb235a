"""Several processes for one run: started here, one for each device, or joined, where torchrun or Slurm has started them.

The launcher watches its workers. When one dies, it ends the others within seconds and reports the first one's error.
"""

import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from glob import escape
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from preference_training.configuration.checks.run import check_sizes
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.labeled_output import label_output
from preference_training.core.process_group import local_rank, local_world_size
from preference_training.core.processes import in_worker, usable_cores
from preference_training.core.signals import (
    ENDED_AT_ONCE,
    SIGNALS,
    STOPPED,
    StoppedError,
    StopRequests,
    restore_handlers,
)
from preference_training.distributed.heartbeats import explain, start_heartbeats, stop_heartbeats
from preference_training.tracking.run_files import LATEST

# The prefix of a worker's error where the mistake was the user's.
MISTAKE = "UserError: "


def needs_processes(config) -> bool:
    """Whether a run is one of several processes. Raises UserError where its trainer cannot train its model."""
    if not config.trainer.splits_layers:
        return config.trainer.is_sharded
    from preference_training.distributed.layer_splitting import splits_in_one_process

    return not splits_in_one_process(config)


def number_of_workers(trainer) -> int:
    """Processes on this machine: `trainer.nproc_per_node`, else one for each GPU, else two."""
    return trainer.nproc_per_node or torch.cuda.device_count() or 2


def number_of_processes(config) -> int:
    """The number of processes of a sharded run, over all machines; in a dry run of those that it simulates."""
    world = config.trainer.world_size if config.dry_run else None
    return world or (int(os.environ["WORLD_SIZE"]) if in_worker() else number_of_workers(config.trainer))


def check_context_size(size: int, processes: int) -> None:
    """Raise UserError where processes cannot be divided into context groups of a size."""
    if processes % size:
        raise UserError(
            f"trainer.context_parallel_size: found {size}, expected a divisor of the number of processes, {processes}."
        )


def number_of_data_ranks(config) -> int:
    """The number of data-parallel ranks."""
    trainer = config.trainer
    if not trainer.is_sharded:
        return 1
    world = number_of_processes(config)
    # Null splits layers over all of them.
    together = (trainer.tensor_parallel_size or world) if trainer.splits_layers else trainer.context_parallel_size or 1
    return max(1, world // together)


def settle_batch_size(config: RunConfig) -> RunConfig:
    """The configuration with `batch_size` from `per_device_batch_size`, if given. Raises UserError if the sizes do not fit."""
    if config.per_device_batch_size is None:
        return config
    per_step = config.per_device_batch_size * config.gradient_accumulation_steps
    settled = config.changed({"batch_size": per_step * number_of_data_ranks(config)})
    check_sizes(settled)
    return settled


def run_or_launch(run: Callable, config: RunConfig, run_dir: Path, in_sweep: bool):
    """`run(config, run_dir, in_sweep)`, in several processes where the trainer needs them. Returns what rank 0 returns.

    `run` is pickled by its name.
    """
    if config.trainer.is_sharded:
        check_context_size(config.trainer.context_parallel_size or 1, number_of_processes(config))
    config = settle_batch_size(config)
    if config.dry_run or not needs_processes(config):
        return run(config, run_dir, in_sweep)
    if in_worker():
        # Started by torchrun or Slurm. Rank 0 makes the run directory once all have joined, so that a worker that ends before
        # leaves none.
        with suppress(OSError):
            run_dir.rmdir()
        return _run_silenced(run, config, run_dir, in_sweep)
    # References between keys are resolved here.
    config = replace(config, as_composed=config.as_dict())
    try:
        return launch(_run_silenced, (run, config, run_dir, in_sweep), number_of_workers(config.trainer), config.fsdp_port)
    except StoppedError as stopped:
        stopped.resumable = _has_checkpoint(config, run_dir)
        raise


def _has_checkpoint(config: RunConfig, run_dir: Path) -> bool:
    """Whether there is a checkpoint from which a run that has stopped would be resumed."""
    if config.resume not in (None, "auto"):
        return True
    # A run that is resumed lies beside the directory of this start.
    beside = run_dir.parent.glob(f"{escape(config.exp_name)}_*") if config.resume else ()
    return any((place / LATEST).exists() for place in (run_dir, *beside))


def _run_silenced(run: Callable, *arguments):
    """`run` in a worker, of which only rank 0 prints."""
    label_output()
    silence_others()
    try:
        return run(*arguments)
    except RuntimeError as error:
        # Of a collective that has timed out, which names no rank.
        explain(error)
        raise


def launch(function: Callable, arguments: tuple, workers: int, port: int | None):
    """Run `function(*arguments)` in so many processes on this machine; returns what the first of them returns.

    function and arguments are pickled. SIGNALS are forwarded to the workers, which may take their time. Raises StoppedError
    where they have stopped, UserError where one of them raised one, and WorkerDiedError for any other end.
    """
    if port is not None:
        _check_port(port)
    raise_file_limit()
    # Each worker has its own share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // workers)))
    # The error is reported once, below; the library would print its own report too.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port or 0}",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="spawn",
        # Those that stop a run are handled here: the library would give its workers no time to write.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    # How long the others have when one has died; then they are killed. Unit: seconds.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "10"
    try:
        with _signals_forwarded() as forwarded:
            return elastic_launch(config, _in_worker)(function, arguments)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == ENDED_AT_ONCE:
            sys.exit(ENDED_AT_ONCE)
        if failure.exitcode == STOPPED or forwarded:
            raise StoppedError("all processes of the run have ended") from None
        for mistake in (_report(each)["message"] for each in error.failures.values()):
            # A rank that has lost its connection to the one with the mistake may have died in the same second.
            if mistake.startswith(MISTAKE):
                raise UserError(mistake.removeprefix(MISTAKE)) from None
        report = _report(failure)
        message = report["message"]
        name = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        trace = report.get("extraInfo", {}).get("py_callstack") or message
        raise WorkerDiedError(f"rank {rank} of {workers} died ({name}); the others were ended. It said:\n{trace}") from None


def _report(failure: ProcessFailure) -> dict:
    """What a worker has written of its error; of one that was killed only that."""
    report = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
    return {"message": ""} | report


@contextmanager
def _signals_forwarded():
    """Forward the signals that stop a run to the workers; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, _frame) -> None:
        received.append(number)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)

    usual = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        restore_handlers(usual)


class WorkerDiedError(Exception):
    """A worker died; the message names its rank."""


@record
def _in_worker(function: Callable, arguments: tuple):
    launcher = os.getppid()
    StopRequests.ends_process = True
    try:
        value = function(*arguments)
        # Too late for this run.
        restore_handlers(dict.fromkeys(SIGNALS))
        # The library waits until the launcher has read the value: forever if the launcher has died.
        threading.Thread(target=_exit_after_launcher, args=(launcher,), daemon=True).start()
        return value
    except StoppedError as stopped:
        print(stopped, flush=True)
        sys.exit(STOPPED)


def _exit_after_launcher(launcher: int) -> None:
    """Exit when the launcher has exited."""
    while os.getppid() == launcher:
        time.sleep(0.2)
    os._exit(STOPPED)


def collective_backend(device: torch.device, offloads: bool) -> str:
    """The backend of collectives: on GPUs NCCL, and Gloo besides where weights and gradients are offloaded to the CPU."""
    if device.type != "cuda":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offloads else "nccl"


def start_group(timeout_minutes: float, offloads: bool = False) -> torch.device:
    """Join the process group that the environment describes; returns this process's device.

    offloads: whether weights are offloaded to the CPU.
    """
    raise_file_limit()
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if local_world_size() == size:
        # Workers that torchrun has restarted find the store of those before them, with stale addresses. Over several machines
        # each counts its own restarts; there the README has an environment variable.
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    torch.distributed.init_process_group(
        collective_backend(device, offloads),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    start_heartbeats(store, rank, size, timeout.total_seconds())
    return device


def end_group() -> None:
    """Leave the process group."""
    stop_heartbeats()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def silence_others() -> None:
    """Let only rank 0 print; errors of others are still reported."""
    if in_worker() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  open as long as the process lives


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard limit: workers share tensors through them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"fsdp_port: {port} cannot be used: {error.strerror}. Choose another, or null for a free one."
            ) from None
