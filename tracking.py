"""Where a run's numbers go: metrics.jsonl always, the console as a progress bar or as lines, wandb if it can be had.

A step hands over tensors; they are read, which makes the device wait, only when a line is due. No step is lost: what was
kept back is written with the next line, and at the end.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from utils import first_line

Metrics = dict[str, float | Tensor]

# metrics.jsonl name -> the short form on the console
SHORT_NAMES = {
    "loss/train": "loss",
    "rewards_train/accuracies": "accuracy",
    "rewards_train/margins": "margin",
    "beta_DPO/beta_used": "beta",
    "examples_per_second": "examples/s",
}


class Tracker:
    """The sinks of one run. Use as a context manager; `total` is the number of training examples, for the time left.

    write_report makes a page of what the run directory holds; None for none.
    """

    def __init__(
        self,
        run_dir: Path,
        total: int | None,
        min_interval: float = 1.0,
        wandb_run=None,
        write_report: Callable[[], None] | None = None,
    ):
        self.run_dir = run_dir
        self.write_report = write_report
        # Whether something has happened that the report does not know.
        self.report_is_old = True
        # Raises where nothing can be written at the start.
        (run_dir / "metrics.jsonl").touch()
        # Rows that could not be written yet, by the names of their files.
        self.unwritten: dict[str, bytes] = {}
        self.min_interval = min_interval
        self.wandb = wandb_run
        self.waiting: list[Metrics] = []
        self.last_line = float("-inf")
        self.console = _ProgressBar(total) if sys.stdout.isatty() else _Lines(total)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception) -> None:
        self.flush()
        if self.report_is_old:
            self.report()
        self.console.close()
        if self.wandb:
            self.wandb.finish()

    def log_step(self, metrics: Metrics) -> None:
        """Take a training step's metrics; they are written when `min_interval` seconds have passed since the last line."""
        self.waiting.append(metrics)
        self.report_is_old = True
        if time.monotonic() - self.last_line >= self.min_interval:
            self.flush()

    def flush(self) -> None:
        """Write every step that is waiting; the console and wandb get the last of them."""
        if not self.waiting:
            return
        rows = [_numbers(metrics) for metrics in self.waiting]
        self.waiting = []
        self._write("metrics.jsonl", rows)
        self.last_line = time.monotonic()
        self.console.step(rows[-1])
        if self.wandb:
            self.wandb.log(rows[-1])

    def log_evaluation(self, metrics: Metrics) -> None:
        """Write an evaluation's metrics to all sinks, at once."""
        self.flush()
        row = _numbers(metrics)
        self._write("metrics.jsonl", [row])
        shown = ", ".join(f"{name} {row[name]:.4g}" for name in row if name.endswith(("loss/eval", "accuracies", "margins")))
        self.say(f"held out, after {row['counters/examples']:.0f} examples: {shown}")
        if self.wandb:
            self.wandb.log(row)

    def log_samples(self, samples: list[dict], examples: int) -> None:
        """Add sampled answers to `samples.jsonl`, and show them to wandb as a table."""
        self._write("samples.jsonl", samples)
        if self.wandb:
            self.wandb.log_table("samples", samples, examples)

    def log_bad_step(self, row: dict) -> None:
        """Add a step that was not taken to `bad_batches.jsonl`, and say so."""
        self._write("bad_batches.jsonl", [row])
        shown = ", ".join(row["pairs"][:3]) + (", ..." if len(row["pairs"]) > 3 else "")
        self.say(
            f"warning: the step after {row['counters/examples']} examples was not taken: its {row['not_finite']} is not "
            f"finite. bad_batches.jsonl names the examples: {shown}"
        )

    def report(self) -> None:
        """Bring the run's report up to date, if it has one."""
        if self.write_report is None:
            return
        self.flush()
        self.report_is_old = False
        try:
            self.write_report()
        except Exception as error:  # whatever is wrong with a page, the run goes on
            self.write_report = None
            again = f"python scripts/report.py {self.run_dir} tries it again"
            self.say(f"warning: report.html could not be written, and is left as it is: {first_line(error)}. {again}")

    def say(self, text: str) -> None:
        """One line on the console, above the progress bar."""
        self.console.say(text)

    def _write(self, name: str, rows: list[dict]) -> None:
        """Add rows to a file. Those for which a full disk has no room are written with the next ones: the run goes on."""
        late = self.unwritten.pop(name, b"")
        left = late + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            with (self.run_dir / name).open("ab", buffering=0) as file:
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            self.unwritten[name] = left
            if not late:
                self.say(f"warning: {name} cannot be written to, its rows are kept for later: {error.strerror}")


class NoTracker:
    """A tracker that keeps nothing, for the processes that do not write."""

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, *exception) -> None:
        """Nothing was opened."""

    def log_step(self, metrics: Metrics) -> None:
        """As Tracker's."""

    def log_evaluation(self, metrics: Metrics) -> None:
        """As Tracker's."""

    def log_samples(self, samples: list[dict], examples: int) -> None:
        """As Tracker's."""

    def log_bad_step(self, row: dict) -> None:
        """As Tracker's."""

    def report(self) -> None:
        """As Tracker's."""

    def flush(self) -> None:
        """As Tracker's."""

    def say(self, text: str) -> None:
        """As Tracker's."""


def _numbers(metrics: Metrics) -> dict[str, float]:
    """Metrics as floats. Tensors are gathered first, so that a step costs one wait for the device, not one a metric."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([value.double().cpu() for value in tensors.values()]).tolist() if tensors else []
    read = dict(zip(tensors, values, strict=True))
    return {name: read.get(name, value) for name, value in metrics.items()}


# ---- console ------------------------------------------------------------------------------------------------------------


def _short(row: dict[str, float]) -> dict[str, str]:
    return {short: f"{row[name]:.4g}" for name, short in SHORT_NAMES.items() if name in row}


class _ProgressBar:
    """One bar over the training examples, for a terminal."""

    def __init__(self, total: int | None):
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="ex", dynamic_ncols=True, file=sys.stdout)

    def step(self, row: dict[str, float]) -> None:
        self.bar.set_postfix(_short(row), refresh=False)
        self.bar.update(row["counters/examples"] - self.bar.n)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()


class _Lines:
    """Plain lines, for a file or a pipe."""

    def __init__(self, total: int | None):
        self.total = total

    def step(self, row: dict[str, float]) -> None:
        done = f"{row['counters/examples']:.0f}" + (f"/{self.total}" if self.total else "")
        left = (self.total - row["counters/examples"]) / max(row["examples_per_second"], 1e-9) if self.total else None
        self.say(f"{done} " + " ".join(f"{k} {v}" for k, v in _short(row).items()) + (f" left {left:.0f} s" if left else ""))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


# ---- wandb --------------------------------------------------------------------------------------------------------------


class WandbRun:
    """A wandb run that can never end the training run: its first failure is said in one line, and then it is left alone."""

    def __init__(self, wandb, run):
        self.wandb = wandb
        self.run = run

    def log(self, row: dict[str, float]) -> None:
        """Log one row of metrics."""
        self._guarded(lambda: self.run.log(row))

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """Log rows of text as a table."""
        columns = list(rows[0]) if rows else []
        data = [list(row.values()) for row in rows]
        table = lambda: self.wandb.Table(columns=columns, data=data)  # noqa: E731
        self._guarded(lambda: self.run.log({name: table(), "counters/examples": examples}))

    def finish(self) -> None:
        """Close the run."""
        self._guarded(lambda: self.run.finish())

    def _guarded(self, action) -> None:
        if self.run is None:
            return
        try:
            action()
        except Exception as error:  # whatever wandb does, the run goes on
            print(f"wandb: switched off for the rest of this run: {_said(error)}", flush=True)
            self.run = None


def start_wandb(config: dict, run_dir: Path, run_id: str | None = None) -> WandbRun | None:
    """Start wandb for a run whose whole configuration is `config`; None, said in one line, where it cannot start.

    A run that was started under `run_id` before is continued.

    Offline without a key (WANDB_API_KEY or a netrc entry) or where its server does not answer; WANDB_MODE decides if set.
    """
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
        if mode == "offline":
            print(f"wandb: offline, as there is no key; files in {run_dir / 'wandb'}, `wandb sync` uploads them.", flush=True)
        arguments = {
            "project": config["wandb"]["project"],
            "entity": config["wandb"]["entity"],
            "name": config["exp_name"],
            "dir": str(run_dir),
            "id": run_id,
            "resume": "allow",
            "config": config,
        }
        settings = wandb.Settings(init_timeout=30, silent=True)
        try:
            run = wandb.init(**arguments, mode=mode, settings=settings)
        except Exception as error:  # no network, a refused key, a server that does not answer
            if mode != "online":
                raise
            print(f"wandb: offline, as its server could not be used: {_said(error)}", flush=True)
            run = wandb.init(**arguments, mode="offline", settings=settings)
        return WandbRun(wandb, run)
    except Exception as error:  # whatever wandb does, the run goes on
        print(f"wandb: not used: {_said(error)}", flush=True)
        return None


def _said(error: Exception) -> str:
    """What an error says, in one line and without the key: it may have been refused by quoting it."""
    text, key = first_line(error), _wandb_key()
    return text.replace(key, "(the key)") if key else text


def _wandb_key() -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import netrc

    try:
        entry = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None
