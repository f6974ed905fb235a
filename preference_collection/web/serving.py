"""The command `serve`: opens what the page needs, listens, and stops cleanly."""

import contextlib
import errno
import signal
import socket
from collections.abc import Sequence

import uvicorn
from omegaconf import DictConfig

from preference_collection.exchange.importing import add_samples
from preference_collection.generation.ahead import Ahead
from preference_collection.generation.sources import sources_of
from preference_collection.running import TestRunner
from preference_collection.settings import limits_of
from preference_collection.store.queue import Queue
from preference_collection.store.store import Store, open_store
from preference_collection.web.security import is_local
from preference_collection.web.server import build_app
from preference_collection.web.shared import Shared
from preference_collection.web.team import guidelines_of
from preference_training.core.errors import UserError
from preference_training.sandbox.sandbox import open_sandbox

# How long requests may go on after Ctrl-C. Unit: seconds.
PATIENCE_SECONDS = 3
# Connections that may wait to be accepted.
BACKLOG = 2048
_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def serve(settings: DictConfig, password: str) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and print its address once it can be opened.

    Raises UserError if the port cannot be had or the store cannot be opened, before anything is served.
    """
    sockets = listen(settings.address, settings.port)
    with contextlib.ExitStack() as closing:
        for each in sockets:
            closing.callback(each.close)
        store = closing.enter_context(contextlib.closing(open_store(settings.store, settings.read_only)))
        shared = open_shared(settings, store, password)
        closing.callback(shared.runner.close)
        shared.ahead = Ahead(store, shared.queue, shared.runner, settings)
        for each in sockets:
            each.listen(BACKLOG)
        port = sockets[0].getsockname()[1]
        print(f"{address_of(settings.address, port)}  store {settings.store}; Ctrl-C stops", flush=True)
        if not is_local(settings.address):
            print(for_others(settings.address, port), flush=True)
        print(shared.runner.sandbox.isolation.line(), flush=True)
        closing.callback(shared.ahead.start().stop)
        closing.callback(shared.close)
        run(shared, sockets)


def open_shared(settings: DictConfig, store: Store, password: str) -> Shared:
    """What all requests share, with the samples in an empty store."""
    if settings.samples and not store.read_only and not store.progress().tasks:
        add_samples(store)
    queue = Queue(store, settings.overlap, settings.order, settings.lease_minutes * 60)
    runner = TestRunner(open_sandbox(limits_of(settings)), store, settings.run_unisolated)
    return Shared(settings, store, queue, runner, sources_of(settings), password, guidelines_of(settings))


def address_of(address: str, port: int) -> str:
    """The page's address for a browser."""
    name = "localhost" if address in ("0.0.0.0", "::") else f"[{address}]" if ":" in address else address
    return f"http://{name}:{port}"


def for_others(address: str, port: int) -> str:
    """The line about other machines: what they open, and that anyone between them and this one can read along."""
    name = socket.gethostname() if address in ("0.0.0.0", "::") else address
    return f"From other machines: {address_of(name, port)}. The connection is not encrypted: others on the way can read it."


def listen(address: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of a name, of which some may be missing (IPv6), but not in use.

    Raises UserError if there is none, or one is in use.
    """
    sockets: list[socket.socket] = []
    try:
        for family, kind, _, _, where in dict.fromkeys(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)):
            opened = _listen_at(family, kind, where)
            sockets += [opened] if opened else []
    except OSError as error:
        for each in sockets:
            each.close()
        raise UserError(f"address, port: {address}:{port} cannot be served: {error.strerror}. Choose another port.") from error
    if not sockets:
        raise UserError(f"address: {address} is no address of this machine.")
    return sockets


def _listen_at(family: int, kind: int, where: Sequence) -> socket.socket | None:
    opened = None
    try:
        opened = socket.socket(family, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(tuple(where))
        return opened
    except OSError as error:
        if opened:
            opened.close()
        # This machine has no such address or no such family.
        if error.errno in _MISSING:
            return None
        raise


def run(shared: Shared, sockets: list[socket.socket]) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        build_app(shared), log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=PATIENCE_SECONDS, timeout_keep_alive=65,
    )  # fmt: skip
    # uvicorn finishes what is in progress, and then raises the signal again: SIGTERM too must let the store close.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets)
