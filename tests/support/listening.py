"""Runs the stand-ins of servers."""

import threading
from contextlib import contextmanager


@contextmanager
def listening(server):
    """A server that runs in a thread, ended behind it. server.over: the event that ends what it is in the middle of."""
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
