"""Check that training on two hosts equals training in one process, and ends when one of the hosts fails.

python scripts/two_hosts.py [--where-possible]      # make two-hosts; about two minutes on two CPU cores

The hosts are Linux namespaces: each has its own network, host name, /etc/hosts and processes; a virtual switch connects them,
and they share the file system, as in a cluster. Root is not needed where users may create namespaces. Nothing is visible
outside, and the kernel removes everything when this script ends.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from preference_training.core.metric_names import MEASURED

ROOT = Path(__file__).resolve().parent.parent

# A PID namespace kills all its processes when its first one ends, which --kill-child ensures.
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
SWITCH = ("ip", "link", "add", "switch", "type", "bridge")

TRAIN = (
    str(ROOT / "train.py"), "loss=dpo", "n_eval_examples=16", "wandb.enabled=false", "sample_during_eval=false",
    # Steps large enough to move the weights visibly: by about 1e-3, a hundred times the tolerance.
    "batch_size=8", "lr=1e-4", "warmup_steps=2",
)  # fmt: skip
SHORT, ENDLESS = ("n_examples=32",), ("n_epochs=1000", "debug=true")
# The allowed relative difference; numbers below FLOOR count as FLOOR.
TOLERANCE, FLOOR = 1e-4, 0.1
# How long a host waits for one that no longer responds. Unit: seconds.
PEER_TIMEOUT = 15


class Host:
    """One of the two hosts. Its namespaces live as long as its first process, `init`."""

    def __init__(self, number: int):
        self.name = f"host{number}"
        boot = f"hostname {self.name} && mount --bind hosts /etc/hosts && ip link set lo up && echo booted && read"
        self.init = subprocess.Popen(
            [*NAMESPACES, "--uts", "bash", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.init.stdout.readline() != "booted\n":
            sys.exit(f"{self.name} did not start")
        pid, port = str(self.init.pid), f"port{number}"
        # The kernel may not have removed the port of an earlier host yet.
        subprocess.run(["ip", "link", "delete", port], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "add", port, "type", "veth", "peer", "name", "cable", "netns", pid], check=True)
        subprocess.run(["ip", "link", "set", port, "master", "switch", "up"], check=True)
        self.do("ip", "address", "add", f"10.0.0.{number + 1}/24", "dev", "cable")
        self.do("ip", "link", "set", "cable", "up")

    def inside(self, *command: str) -> list[str]:
        """Wrap a command to run it on this host."""
        pid = self.init.pid
        enter = ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children"]
        return [*enter, "env", f"--chdir={Path.cwd()}", *command]

    def do(self, *command: str) -> str:
        """Run a command on this host; returns its output."""
        return subprocess.run(self.inside(*command), check=True, stdout=subprocess.PIPE, text=True).stdout

    def pull_cable(self) -> None:
        """Disconnect this host without notice to the other one."""
        self.do("ip", "link", "set", "cable", "down")

    def start(self, processes: int, *overrides: str) -> subprocess.Popen:
        """Start torchrun with so many workers on this host, for its half of a run."""
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(processes))
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400", "--rdzv-id", "run")
        return start(*self.inside(sys.executable, *torchrun, *rendezvous, *TRAIN, *overrides))

    def processes(self) -> list[str]:
        """The command lines of the processes on this host, except for init and ps."""
        return self.do("ps", "--no-headers", "-e", "-o", "args").splitlines()[1:-1]

    def power_off(self) -> None:
        """Kill all processes of this host at once."""
        self.init.kill()
        self.init.wait()


# ---- comparison ---------------------------------------------------------------------------------------------------------


def difference(found: float, expected: float) -> float:
    """The relative difference of a number from the expected one; infinite where one of them is NaN."""
    share = abs(found - expected) / max(abs(expected), FLOOR)
    return math.inf if math.isnan(share) else share


def compare_metrics(found: Path, expected: Path) -> dict[str, float]:
    """The largest difference of each metric over all lines of two metrics.jsonl, except for speed.

    Raises ValueError where the lines or the names of their metrics differ.
    """
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (found, expected)]
    worst: dict[str, float] = {}
    for one, other in zip(*lines, strict=True):
        if one.keys() != other.keys():
            raise ValueError(f"{found}: found {sorted(one)}, expected {sorted(other)}")
        for name in one.keys() - set(MEASURED):
            worst[name] = max(worst.get(name, 0.0), difference(one[name], other[name]))
    return worst


def compare_weights(found: Path, expected: Path) -> dict[str, float]:
    """The largest difference within each weight of two policy.pt. Raises ValueError where their names differ."""
    from preference_training.core.files import load_tensors

    states = [load_tensors(path)["state"] for path in (found, expected)]
    if states[0].keys() != states[1].keys():
        raise ValueError(f"{found}: found {sorted(states[0])}, expected {sorted(states[1])}")
    return {
        name: max(
            difference(*numbers) for numbers in zip(one.flatten().tolist(), states[1][name].flatten().tolist(), strict=True)
        )
        for name, one in states[0].items()
    }


def same(what: str, differences: dict[str, float]) -> bool:
    """Print what was compared and the largest difference; returns whether it is within the tolerance."""
    name, largest = max(differences.items(), key=lambda item: item[1])
    ok = largest <= TOLERANCE
    print(
        f"{'same' if ok else 'NOT THE SAME'}: {what}: {len(differences)} compared, at most {largest:.1e} ({name})", flush=True
    )
    return ok


# ---- checks -------------------------------------------------------------------------------------------------------------


def start(*command: str) -> subprocess.Popen:
    """Start a command whose output can be read from its stdout."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run to end; a failure ends this script with the run's output."""
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} ended with status {process.returncode}:\n{output}")


def check_training(processes: int, sharding: str) -> bool:
    """Whether a run on two hosts has the metrics and weights of the run in `alone`."""
    hosts, run_dir = (Host(0), Host(1)), Path(f"hosts_{sharding}")
    overrides = "trainer=FSDPTrainer", f"trainer.sharding={sharding}", f"local_run_dir={run_dir}", *SHORT
    for process in [host.start(processes, *overrides) for host in hosts]:
        finish(process)
    for host in hosts:
        host.power_off()
    what = f"one process and 2 hosts x {processes}, sharding={sharding}"
    files = (compare_metrics, "metrics.jsonl"), (compare_weights, "LATEST/policy.pt")
    return all([same(f"{what}: {name}", compare(run_dir / name, Path("alone") / name)) for compare, name in files])


def check_failure(how: str, fail: Callable[[Host], None], seconds: float) -> bool:
    """Whether host 0 ends in time, with an error and without leftover processes, when host 1 fails during a run."""
    hosts = Host(0), Host(1)
    timeout = f"trainer.distributed_timeout_minutes={PEER_TIMEOUT / 60}"
    first, _ = (host.start(1, "trainer=FSDPTrainer", timeout, *ENDLESS) for host in hosts)
    for line in first.stdout:
        if re.match(r"\d+/\d+ loss", line):
            break
    else:
        sys.exit(f"host 0 ended before it trained, with status {first.wait()}")
    started = time.monotonic()
    fail(hosts[1])
    output, _ = first.communicate(timeout=300)
    took = time.monotonic() - started
    left = hosts[0].processes()
    for host in hosts:
        host.power_off()
    ok = first.returncode != 0 and took <= seconds and not left
    result = (
        f"host 0 ended after {took:.1f} s (at most {seconds}) with status {first.returncode}, {len(left)} leftover processes"
    )
    print(f"{'passed' if ok else 'FAILED'}: {how}: {result}", flush=True)
    if not ok:
        print(output, *left, sep="\n")
    return ok


def check() -> bool:
    """Run all checks in the current directory, from within namespaces of their own."""
    Path("hosts").write_text("127.0.0.1 localhost\n10.0.0.1 host0\n10.0.0.2 host1\n")
    subprocess.run(SWITCH, check=True)
    subprocess.run(["ip", "link", "set", "switch", "up"], check=True)
    finish(start(sys.executable, *TRAIN, *SHORT, "local_run_dir=alone"))
    return all(
        [
            check_training(1, "full"),
            check_training(2, "hybrid"),
            # The kernel closes the connections of killed processes, which their peers notice at once.
            check_failure("all processes of host 1 are killed", Host.power_off, PEER_TIMEOUT - 1),
            # Only the timeout of the process group notices that host 1 is gone.
            check_failure("the cable of host 1 is pulled", Host.pull_cable, PEER_TIMEOUT + 45),
        ]
    )


def main() -> int:
    """Run the checks in namespaces of their own and in a temporary directory; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where-possible", action="store_true", help="succeed where namespaces cannot be created")
    options = parser.parse_args()
    # An unprivileged user becomes root within the namespaces only.
    into = [*NAMESPACES, *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]
    try:
        tried = subprocess.run([*into, *SWITCH], capture_output=True, text=True, check=False)
        problem = tried.stderr.strip().replace("\n", "; ") if tried.returncode else None
    except FileNotFoundError as error:
        problem = str(error)
    if problem:
        print(f"two hosts: skipped, because network namespaces cannot be created here: {problem}")
        return 0 if options.where_possible else 1
    # Clean up when this process is terminated.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with TemporaryDirectory(prefix="two_hosts_") as folder:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import two_hosts; sys.exit(not two_hosts.check())"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run([*into, sys.executable, "-c", code], cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
