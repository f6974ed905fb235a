"""Servers of other projects on exported directories: started on a free port, asked over HTTP, ended."""

import json
import os
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-servers"
SECONDS = 600


@dataclass(frozen=True)
class Server:
    """A running server, and the command that started it."""

    address: str
    command: str

    def post(self, path: str, **values) -> dict:
        """The answer to a request."""
        request = urllib.request.Request(self.address + path, json.dumps(values).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()[:500]}") from error


def llama_cpp(file: Path, log: Path):
    """llama.cpp's server on a GGUF file."""
    port = _free_port()
    program = ENVIRONMENTS / "llama_cpp" / "bin" / "python"
    return _running([program, ROOT / "tests_apart" / "servers" / "llama_cpp_server.py", file, port], port, log, {})


def vllm(line: str, log: Path, more: dict[str, str] | None = None):
    """vLLM by the line that an export printed, with what a small machine needs besides. more: of its environment."""
    port = _free_port()
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"], line
    small = ["--max-model-len", "512", "--enforce-eager", "--port", str(port)]
    environment = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return _running([ENVIRONMENTS / "vllm" / "bin" / "vllm", *words[1:], *small], port, log, environment | (more or {}))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def _running(command: Sequence, port: int, log: Path, environment: dict) -> Iterator[Server]:
    words = [str(word) for word in command]
    with log.open("w") as file:
        # A group of its own: vLLM has processes of its own, which end with it.
        process = subprocess.Popen(
            words, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, log)
        yield Server(address, shlex.join(words))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(60)


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"not up after {SECONDS} s: {log.read_text()[-3000:]}")
