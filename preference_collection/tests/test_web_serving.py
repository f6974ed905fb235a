"""The command `serve` as a process: its address, its end, what it says instead of starting, and its time for a judgment."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_task
from preference_collection.tests.test_web import a_choice, signed_in
from preference_collection.web.serving import address_of, for_others, listen
from preference_training.core.errors import UserError

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def serving(*settings: str, **environment: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "preference_collection", "serve", "samples=false", *settings]
    environment = {**os.environ, **environment}
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_says_its_address_once_and_stops_cleanly(tmp_path, how):
    import httpx2 as httpx

    port = free_port()
    process = serving(f"store={tmp_path / 'a.duckdb'}", f"port={port}")
    try:
        first = process.stdout.readline()
        assert first.startswith(f"http://localhost:{port}  store {tmp_path / 'a.duckdb'}")
        with httpx.Client(base_url=f"http://localhost:{port}", headers={"Origin": f"http://localhost:{port}"}) as client:
            assert client.post("/sign-in", data={"name": "Ada"}).headers["location"] == "/label"
            assert "Nothing to judge yet" in client.get("/label").text
            process.send_signal(how)
            out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "") and f":{port}" not in out
    open_store(str(tmp_path / "a.duckdb"), read_only=True).close()


def test_what_keeps_it_from_serving_is_said_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        out, errors = serving(f"store={tmp_path / 'a.duckdb'}", f"port={port}").communicate(timeout=60)
    said = f"address, port: localhost:{port} cannot be served: Address already in use. Choose another port.\n"
    assert (out, errors) == ("", said)
    (tmp_path / "b").write_text("no store")
    out, errors = serving(f"store={tmp_path / 'b'}", f"port={free_port()}").communicate(timeout=60)
    assert out == "" and errors.startswith("store: ") and errors.count("\n") == 1


def test_addresses_are_shown_as_a_browser_takes_them():
    assert address_of("0.0.0.0", 1) == address_of("::", 1) == address_of("localhost", 1) == "http://localhost:1"
    assert address_of("::1", 2) == "http://[::1]:2"
    with pytest.raises(UserError, match=r"address, port: no\.such\.invalid:1 cannot be served"):
        listen("no.such.invalid", 1)


def test_other_machines_are_told_an_address_of_this_one_and_that_nothing_is_encrypted():
    said = for_others("0.0.0.0", 8000)
    assert f"http://{socket.gethostname()}:8000. The connection is not encrypted" in said
    assert "http://[fe80::1]:8000." in for_others("fe80::1", 8000)


def test_a_judgment_with_10_000_comparisons_takes_a_part_of_a_second(store):
    """The server's time from a judgment to the next comparison, without the network. The bound is wide; the time is printed."""
    store.add_tasks([a_task(f"t{n}") for n in range(10_000)])
    store.add_comparisons([a_comparison(f"t{n}", id=f"c{n}") for n in range(10_000)])
    client = signed_in(store)
    [found] = [client.post("/api/next", json={}).json()["next"]["id"]]
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        answer = client.post("/api/judge", json=a_choice(found)).json()
        times.append(time.perf_counter() - begun)
        found = answer["next"]["id"]
    times.sort()
    print(f"judge and next: median {statistics.median(times) * 1000:.0f} ms, 95 % {times[28] * 1000:.0f} ms")
    assert statistics.median(times) < 1.0
