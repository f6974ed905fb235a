"""Training over two machines leaves what training in one process leaves, and ends when one of the machines goes away.

python scripts/two_hosts.py [--where-possible]      # make two-hosts; about two minutes on two CPU cores

The machines are made of Linux namespaces: each has its own network, host name, /etc/hosts and processes, and a virtual switch
joins them; they share the file system, as the machines of a cluster do. Root is not needed where users may make namespaces.
Nothing of this is seen outside, and the kernel removes all of it when this script ends, however it ends.
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

# A namespace of processes takes all its processes with it when its first one ends, which --kill-child sees to.
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
SWITCH = ("ip", "link", "add", "switch", "type", "bridge")

TRAIN = (
    str(ROOT / "train.py"), "loss=dpo", "n_eval_examples=16", "wandb.enabled=false", "sample_during_eval=false",
    # Steps large enough to see the weights move: by 1e-3 or so, a hundred times what may differ.
    "batch_size=8", "lr=1e-4", "warmup_steps=2",
)  # fmt: skip
SHORT, ENDLESS = ("n_examples=32",), ("n_epochs=1000", "debug=true")
# How much a number may differ, as a share of it; numbers below FLOOR count as FLOOR.
TOLERANCE, FLOOR = 1e-4, 0.1
# How long a machine waits for one that no longer answers. Unit: seconds.
SILENCE = 15


class Machine:
    """One of the two: its namespaces live as long as `init`, its first process."""

    def __init__(self, number: int):
        self.name = f"host{number}"
        boot = f"hostname {self.name} && mount --bind hosts /etc/hosts && ip link set lo up && echo booted && read"
        self.init = subprocess.Popen(
            [*NAMESPACES, "--uts", "bash", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.init.stdout.readline() != "booted\n":
            sys.exit(f"{self.name} did not start")
        pid, port = str(self.init.pid), f"port{number}"
        # That of an earlier machine, which the kernel removes in its own time.
        subprocess.run(["ip", "link", "delete", port], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "add", port, "type", "veth", "peer", "name", "cable", "netns", pid], check=True)
        subprocess.run(["ip", "link", "set", port, "master", "switch", "up"], check=True)
        self.do("ip", "address", "add", f"10.0.0.{number + 1}/24", "dev", "cable")
        self.do("ip", "link", "set", "cable", "up")

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one on this machine."""
        pid = self.init.pid
        enter = ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children"]
        return [*enter, "env", f"--chdir={Path.cwd()}", *command]

    def do(self, *command: str) -> str:
        """Run a command on this machine; what it printed."""
        return subprocess.run(self.inside(*command), check=True, stdout=subprocess.PIPE, text=True).stdout

    def pull_cable(self) -> None:
        """Cut this machine off, without a word to the other one."""
        self.do("ip", "link", "set", "cable", "down")

    def start(self, processes: int, *overrides: str) -> subprocess.Popen:
        """Start torchrun with so many workers on this machine, for its half of a run."""
        torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(processes))
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400", "--rdzv-id", "run")
        return start(*self.inside(sys.executable, *torchrun, *rendezvous, *TRAIN, *overrides))

    def processes(self) -> list[str]:
        """Command lines of what runs on this machine, besides its first process and the question itself."""
        return self.do("ps", "--no-headers", "-e", "-o", "args").splitlines()[1:-1]

    def power_off(self) -> None:
        """Kill all that runs on this machine at once."""
        self.init.kill()
        self.init.wait()


# ---- comparison ---------------------------------------------------------------------------------------------------------


def difference(found: float, expected: float) -> float:
    """How far a number is from what was expected, as a share of it; infinitely far where one is none."""
    share = abs(found - expected) / max(abs(expected), FLOOR)
    return math.inf if math.isnan(share) else share


def compare_metrics(found: Path, expected: Path) -> dict[str, float]:
    """The largest difference of each metric over all lines of two metrics.jsonl, speed aside.

    Raises ValueError where lines or their metrics are not the same ones.
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
    """The largest difference within each weight of two policy.pt. Raises ValueError where their names are not the same."""
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
    """Say what was compared and where it differs most; whether that is little enough."""
    name, largest = max(differences.items(), key=lambda item: item[1])
    ok = largest <= TOLERANCE
    print(
        f"{'same' if ok else 'NOT THE SAME'}: {what}: {len(differences)} compared, at most {largest:.1e} ({name})", flush=True
    )
    return ok


# ---- what is proved -----------------------------------------------------------------------------------------------------


def start(*command: str) -> subprocess.Popen:
    """Start a command; all that it prints can be read from its stdout."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run's end; a bad one ends this script, with what the run said."""
    said, _ = process.communicate(timeout=300)
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} ended with status {process.returncode}:\n{said}")


def trains_alike(processes: int, sharding: str) -> bool:
    """Whether a run over two machines leaves the numbers and weights of the run in `alone`."""
    machines, run_dir = (Machine(0), Machine(1)), Path(f"hosts_{sharding}")
    overrides = "trainer=FSDPTrainer", f"trainer.sharding={sharding}", f"local_run_dir={run_dir}", *SHORT
    for process in [machine.start(processes, *overrides) for machine in machines]:
        finish(process)
    for machine in machines:
        machine.power_off()
    what = f"one process and 2 hosts x {processes}, sharding={sharding}"
    files = (compare_metrics, "metrics.jsonl"), (compare_weights, "LATEST/policy.pt")
    return all([same(f"{what}: {name}", compare(run_dir / name, Path("alone") / name)) for compare, name in files])


def ends(how: str, go_away: Callable[[Machine], None], seconds: float) -> bool:
    """Whether host 0 ends in time, with an error and without leaving a process, when `go_away` takes host 1 in mid-run."""
    machines = Machine(0), Machine(1)
    silence = f"trainer.distributed_timeout_minutes={SILENCE / 60}"
    first, _ = (machine.start(1, "trainer=FSDPTrainer", silence, *ENDLESS) for machine in machines)
    for line in first.stdout:
        if re.match(r"\d+/\d+ loss", line):
            break
    else:
        sys.exit(f"host 0 ended before it trained, with status {first.wait()}")
    started = time.monotonic()
    go_away(machines[1])
    said, _ = first.communicate(timeout=300)
    took = time.monotonic() - started
    left = machines[0].processes()
    for machine in machines:
        machine.power_off()
    ok = first.returncode != 0 and took <= seconds and not left
    result = f"host 0 ended after {took:.1f} s (at most {seconds}) with status {first.returncode}, {len(left)} processes left"
    print(f"{'as it should' if ok else 'NOT AS IT SHOULD'}: {how}: {result}", flush=True)
    if not ok:
        print(said, *left, sep="\n")
    return ok


def prove() -> bool:
    """Everything, in the current directory, from within namespaces of its own."""
    Path("hosts").write_text("127.0.0.1 localhost\n10.0.0.1 host0\n10.0.0.2 host1\n")
    subprocess.run(SWITCH, check=True)
    subprocess.run(["ip", "link", "set", "switch", "up"], check=True)
    finish(start(sys.executable, *TRAIN, *SHORT, "local_run_dir=alone"))
    return all(
        [
            trains_alike(1, "full"),
            trains_alike(2, "hybrid"),
            # The kernel closes the connections of processes that are killed, which the others see at once.
            ends("all of host 1 is killed", Machine.power_off, SILENCE - 1),
            # Nothing says that host 1 is gone; the time-out of the process group does.
            ends("the cable of host 1 is pulled", Machine.pull_cable, SILENCE + 45),
        ]
    )


def main() -> int:
    """Prove it in namespaces of its own, and in a directory that is removed; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where-possible", action="store_true", help="not an error where namespaces cannot be made")
    options = parser.parse_args()
    # A user who is not root becomes root of the namespaces, and of nothing else.
    into = [*NAMESPACES, *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]
    try:
        tried = subprocess.run([*into, *SWITCH], capture_output=True, text=True, check=False)
        fault = tried.stderr.strip().replace("\n", "; ") if tried.returncode else None
    except FileNotFoundError as error:
        fault = str(error)
    if fault:
        print(f"two hosts: not tried, since network namespaces cannot be made here: {fault}")
        return 0 if options.where_possible else 1
    # What stops this process lets it clean up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with TemporaryDirectory(prefix="two_hosts_") as folder:
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import two_hosts; sys.exit(not two_hosts.prove())"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run([*into, sys.executable, "-c", code], cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
