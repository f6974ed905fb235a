"""Several processes for one run: started here, one for each device, or found, where torchrun or Slurm has started them.

The launcher watches over its workers. When one dies all are ended within seconds, and what the first of them said is said.
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
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from preference_training.core.errors import UserError
from preference_training.core.processes import in_worker, usable_cores
from preference_training.core.ranks import local_rank, local_world_size
from preference_training.core.signals import ENDED_AT_ONCE, SIGNALS, STOPPED, StoppedError

# How what the launcher hears of a worker begins where the mistake was the user's.
MISTAKE = "UserError: "


def number_of_workers(trainer) -> int:
    """Processes on this machine: `trainer.nproc_per_node`, else one for each GPU, else two."""
    return trainer.nproc_per_node or torch.cuda.device_count() or 2


def number_of_data_ranks(config) -> int:
    """How many processes of a run train on different data."""
    trainer = config.trainer
    if not trainer.is_sharded:
        return 1
    world = trainer.world_size if config.dry_run else None
    world = world or (int(os.environ["WORLD_SIZE"]) if in_worker() else number_of_workers(trainer))
    # None under a trainer that splits layers is over all of them.
    together = (trainer.tensor_parallel_size or world) if trainer.splits_layers else 1
    return max(1, world // together)


def launch(function: Callable, arguments: tuple, workers: int, port: int | None):
    """Run `function(*arguments)` in so many processes on this machine; returns what the first of them returns.

    function and arguments are pickled. Signals of SIGNALS are passed on to the workers, which may take their time. Raises
    StoppedError where they have stopped, UserError where one of them raised one, and WorkerDiedError for any other end.
    """
    if port is not None:
        _check_port(port)
    raise_file_limit()
    # Each worker has its own share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // workers)))
    # What went wrong is said once, below; the library would print its own account of it too.
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
        with _signals_passed_on() as passed_on:
            return elastic_launch(config, _in_worker)(function, arguments)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == ENDED_AT_ONCE:
            sys.exit(ENDED_AT_ONCE)
        if failure.exitcode == STOPPED or passed_on:
            raise StoppedError("all processes of the run have ended") from None
        told = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
        heard = told.get("message", "")
        if heard.startswith(MISTAKE):
            raise UserError(heard.removeprefix(MISTAKE)) from None
        name = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        trace = told.get("extraInfo", {}).get("py_callstack") or heard
        raise WorkerDiedError(f"rank {rank} of {workers} died ({name}); the others were ended. It said:\n{trace}") from None


@contextmanager
def _signals_passed_on():
    """Inside, the signals that stop a run go to the workers too; gives a list of those that came."""
    came: list[int] = []

    def pass_on(number: int, _frame) -> None:
        came.append(number)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)

    usual = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class WorkerDiedError(Exception):
    """A worker's end that nobody wanted; the message names its rank."""


@record
def _in_worker(function: Callable, arguments: tuple):
    launcher = os.getppid()
    try:
        value = function(*arguments)
        for number in SIGNALS:
            # Too late for this run.
            signal.signal(number, signal.SIG_IGN)
        # The library waits until the launcher has read the value: for ever, if it is dead.
        threading.Thread(target=_leave_behind, args=(launcher,), daemon=True).start()
        return value
    except StoppedError as stopped:
        print(stopped, flush=True)
        sys.exit(STOPPED)


def _leave_behind(launcher: int) -> None:
    """End this process when its launcher has ended."""
    while os.getppid() == launcher:
        time.sleep(0.2)
    os._exit(STOPPED)


def backend_of(device: torch.device, offloads: bool) -> str:
    """What processes speak by: on GPUs NCCL, and Gloo beside it where weights and gradients are in the machine's memory."""
    if device.type != "cuda":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offloads else "nccl"


def start_group(timeout_minutes: float, offloads: bool = False) -> torch.device:
    """Join the other processes, whose number and place the environment says; returns this one's device.

    offloads: whether weights are kept in the machine's memory.
    """
    raise_file_limit()
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if local_world_size() == size:
        # Workers that torchrun has started again find the store of those before them, with addresses at which nobody is any
        # more. Over several machines each counts its own restarts; there the README has an environment variable.
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    torch.distributed.init_process_group(
        backend_of(device, offloads),
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def end_group() -> None:
    """Leave the other processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def silence_others() -> None:
    """Only the first process prints; what others raise is still said."""
    if in_worker() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  open as long as the process lives


def raise_file_limit() -> None:
    """Allow as many open files as the system lets this user have: workers share tensors through them."""
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
