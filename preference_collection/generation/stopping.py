"""Stopping a request, from any thread, also one that waits for a silent server."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import requests
from requests.adapters import HTTPAdapter


class Stop:
    """A request to stop: a flag, and actions that interrupt waiting. It also takes effect if it comes early."""

    def __init__(self):
        """Not stopped yet."""
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []
        self._event = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def ask(self) -> None:
        """Stop, from any thread."""
        with self._lock:
            self._event.set()
            actions, self._actions = self._actions, []
        for action in actions:
            action()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until stopped, or for some seconds. Returns whether it is."""
        return self._event.wait(seconds)

    def also(self, action: Callable[[], None]) -> None:
        """Call `action` when stopped, immediately if already stopped."""
        with self._lock:
            if not self._event.is_set():
                self._actions.append(action)
                return
        action()

    def forget(self, action: Callable[[], None]) -> None:
        """Do not call `action` any more."""
        with self._lock, suppress(ValueError):
            self._actions.remove(action)


@contextmanager
def severable_session(stop: Stop) -> Iterator[requests.Session]:
    """A session of requests whose connections are closed when stopped, while another thread waits for a response."""
    adapter = _SeverableAdapter(stop)
    with requests.Session() as session:
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        try:
            yield session
        finally:
            for action in adapter.actions:
                stop.forget(action)


class _SeverableAdapter(HTTPAdapter):
    """Registers each new connection to be closed by a stop."""

    def __init__(self, stop: Stop):
        super().__init__()
        self._stop = stop
        self.actions: list[Callable[[], None]] = []

    def get_connection_with_tls_context(self, *args, **options):
        """The pool of connections, which make themselves known."""
        pool = super().get_connection_with_tls_context(*args, **options)
        adapter, kind = self, pool.ConnectionCls

        class Severable(kind):
            def connect(self):
                super().connect()
                adapter.register(self.sock)

        pool.ConnectionCls = Severable
        return pool

    def register(self, connected: socket.socket) -> None:
        """Close a socket when stopped."""
        action = partial(_sever, connected)
        self.actions.append(action)
        self._stop.also(action)


def _sever(connected: socket.socket) -> None:
    # close() alone would not wake a thread that waits for data.
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
