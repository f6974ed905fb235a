"""Several processes for one run: started here, one for each device, or found, where torchrun or Slurm has started them.

The launcher watches over its workers. When one dies all are ended within seconds, and what the first of them said is said.
"""

import logging
import os
import resource
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ranks import in_worker, local_rank, local_world_size
from stopping import SIGNALS, STOPPED, StoppedError
from utils import UserError

# How what the launcher hears of a worker begins where the mistake was the user's.
MISTAKE = "UserError: "


def number_of_workers(trainer) -> int:
    """Processes on this machine: `trainer.nproc_per_node`, else one for each GPU, else two."""
    return trainer.nproc_per_node or torch.cuda.device_count() or 2


def launch(function: Callable, arguments: tuple, workers: int, port: int | None, patience_minutes: float = 30):
    """Run `function(*arguments)` in so many processes on this machine; returns what the first of them returns.

    function and arguments are pickled. A signal of SIGNALS is passed on to the workers, which have `patience_minutes` to end;
    then, and where they have stopped by themselves, StoppedError is raised. Raises UserError where a worker raised one, and
    WorkerDiedError for any other end.
    """
    if port is not None:
        _check_port(port)
    raise_file_limit()
    # Each worker has its own share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
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
        # Asked to stop, the workers finish a step and write a checkpoint, for which they have as long as they wait for others.
        shutdown_timeout=int(60 * patience_minutes),
    )
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in (*SIGNALS, signal.SIGHUP, signal.SIGQUIT))
    try:
        return elastic_launch(config, _in_worker)(function, arguments)[0]
    except SignalException as received:
        raise StoppedError(f"stopped by {received.sigval.name}") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == STOPPED:
            raise StoppedError("all processes of the run have stopped") from None
        told = failure.message if isinstance(failure.message, dict) else {"message": failure.message}
        heard = told.get("message", "")
        if heard.startswith(MISTAKE):
            raise UserError(heard.removeprefix(MISTAKE)) from None
        name = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        trace = told.get("extraInfo", {}).get("py_callstack") or heard
        raise WorkerDiedError(f"rank {rank} of {workers} died ({name}); the others were ended. It said:\n{trace}") from None


class WorkerDiedError(Exception):
    """A worker's end that nobody wanted; the message names its rank."""


@record
def _in_worker(function: Callable, arguments: tuple):
    try:
        return function(*arguments)
    except StoppedError as stopped:
        print(stopped, flush=True)
        sys.exit(STOPPED)


def start_group(timeout_minutes: float) -> torch.device:
    """Join the other processes, whose number and place the environment says; returns this one's device."""
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
        "nccl" if device.type == "cuda" else "gloo",
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
