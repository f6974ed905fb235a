"""The app as a process of its own, for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Server:
    """A server of the app on a store in `folder`; url is its address."""

    def __init__(self, folder: Path, *overrides: str, **environment: str):
        self.folder, self.port = folder, free_port()
        self.url = f"http://localhost:{self.port}"
        self.command = [
            sys.executable,
            "-m",
            "preference_collection",
            "serve",
            f"store={folder / 'collection.duckdb'}",
            "samples=true",
        ]
        self.command += [f"port={self.port}", f"export={folder / 'export'}", *overrides]
        self.environment = {**os.environ, **environment}
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, env=self.environment)
        for _ in range(600):
            try:
                urlopen(self.url).read()
                return
            except OSError:
                assert self.process.poll() is None, self.said()
                time.sleep(0.1)
        raise AssertionError(f"the server does not answer: {self.said()}")

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.terminate()
        assert self.process.wait(30) == 0, self.said()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def cpu_seconds(self) -> float:
        """CPU time that it has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def said(self) -> str:
        """What it has printed."""
        return (self.folder / "server.log").read_text()


@contextmanager
def app(folder: Path, *overrides: str, **environment: str) -> Iterator[Server]:
    """A running server, which must not print a traceback."""
    server = Server(folder, *overrides, **environment)
    try:
        yield server
        server.stop()
        assert "Traceback" not in server.said(), server.said()
    finally:
        server.kill()


def command(*arguments: str) -> str:
    """Run a command of the app; returns what it prints."""
    line = [sys.executable, "-m", "preference_collection", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
