"""What lies in a run directory, for those who look at it: metrics, samples, results, configuration, and facts of its start.

Read leniently, since the run may be going on, or a kill or a full disk has ended it: what cannot be read is left out.
"""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path

from preference_training.core.metric_names import EVAL_LOSS, EXAMPLES, UPDATES
from preference_training.core.processes import usable_cores
from preference_training.core.values import UNREADABLE, misfit
from preference_training.data.rows.records import DataReport

METRICS, SAMPLES, BAD_STEPS, EVENTS = "metrics.jsonl", "samples.jsonl", "bad_batches.jsonl", "events.jsonl"
RESULTS_FILE, ABOUT, FLAGGED = "results.json", "about.json", "flagged_pairs.jsonl"
# Of a sweep's jobs: what became of the job; that it ended before its time, since others did better.
JOB, PRUNED = "job.json", "pruned.json"
CONFIG, REPORT = "config.yaml", "report.html"
# Of an evaluation: the sampled answers, and the verdicts on them.
ANSWERS, JUDGEMENTS = "answers.jsonl", "judgements.jsonl"
# Directories of dashboards.
TENSORBOARD, WANDB = "tensorboard", "wandb"
# Of its checkpoints: what their names begin with, a link to the newest, and what is in each beside the model's own files.
CHECKPOINT, LATEST = "step-", "LATEST"
STATE, CHECKSUMS, POLICY_PT = "state.json", "checksums.json", "policy.pt"
OPTIMIZER_DIR, REFERENCE_DIR = "optimizer", "reference"
# A folder in a run directory that has all of a run that was there before begins so.
ASIDE = "set_aside_"
# Libraries that numbers may depend on.
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "peft")


# ---- rows -------------------------------------------------------------------------------------------------------------------


def json_lines(file: Path) -> Iterator[dict]:
    """The rows of a file of JSON objects; lines that are none are passed over, and there may be no file."""
    return rows_in(file.read_bytes() if file.is_file() else b"")


def rows_in(lines: bytes) -> Iterator[dict]:
    """The JSON objects among some lines."""
    # Bytes: a text may hold what Python takes for the end of a line, and half a row may end within a letter.
    for line in lines.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def metric_rows(file: Path, examples: float = inf) -> list[dict]:
    """The rows of a metrics.jsonl up to so many examples."""
    return counted(json_lines(file), examples)


def counted(rows: Iterable[dict], examples: float = inf) -> list[dict]:
    """Those rows that say after how many examples they are, up to so many."""
    found = ((row.get(EXAMPLES), row) for row in rows)
    return [row for at, row in found if isinstance(at, int | float) and at <= examples]


def split_rows(rows: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of training steps, and rows of evaluations."""
    rows = list(rows)
    return [row for row in rows if EVAL_LOSS not in row], [row for row in rows if EVAL_LOSS in row]


def progress(rows: list[dict], about: dict) -> str:
    """How far the run is, in words."""
    if not rows:
        return "no step yet"
    done, total = rows[-1][EXAMPLES], about.get("examples")
    of = f" of {total:,}" if isinstance(total, int) else ""
    return f"{done:,.0f}{of} examples, {rows[-1].get(UPDATES, 0):,.0f} updates"


# Losses whose evaluations depend on what their run has seen, as losses.py says of them.
OF_THEIR_RUN = ("tr_dpo", "bco")


# What an evaluation of a run leaves: how many examples and prompts it is over, and each metric with its interval.
INTERVAL = dict.fromkeys(("mean", "low", "high"), (float, int, None))
RESULTS = {"examples_trained": int, "held_out": {"all": {"examples": int, "prompts": int, ...: INTERVAL}}}


def results_of(file: Path) -> dict:
    """What an evaluation of a run has left in its results.json; nothing where there is none, or it is damaged."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except UNREADABLE:
        return {}
    return results if misfit(results, RESULTS, "results") is None else {}


def json_object(file: Path) -> dict:
    """The object in a file of JSON; empty where there is none, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except UNREADABLE:
        return {}
    return found if isinstance(found, dict) else {}


def run_of(checkpoint: Path) -> dict:
    """What a checkpoint says that its run is made of; empty where it cannot be read, as of one that no run here has written."""
    run = json_object(checkpoint / STATE).get("run")
    return run if isinstance(run, dict) else {}


def config_in(run_dir: Path) -> dict:
    """The configuration that a run has left in its directory, in plain values; empty where it cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        found = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG), resolve=True)
    except (*UNREADABLE, OmegaConfBaseException, YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- facts of a start -------------------------------------------------------------------------------------------------------


def write_about(run_dir: Path, reports: dict[str, Iterable[tuple[str, DataReport]]], examples: int | None, device) -> None:
    """Write about.json: the data and what was left out of it, the machine, the versions, and the state of this code.

    reports: of each split, every data set's name and report; examples: how many the run has in all; device: where it
    computes. Raises OSError.
    """
    about = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "examples": examples,
        "data": {split: [{"name": name, **report.as_dict()} for name, report in of] for split, of in reports.items()},
        "machine": machine(device),
        "versions": {"python": platform.python_version(), **versions()},
        "code": code_state(Path(__file__).parents[2]),
    }
    (run_dir / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def machine(device) -> dict[str, str]:
    """What a run computes on, in words: the system, and the processor or the GPUs. device is a `torch.device`."""
    import psutil
    import torch

    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    facts = {"system": platform.platform(), "CPU cores": str(usable_cores()), "memory": memory, "computes on": device.type}
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        facts["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return facts


def versions() -> dict[str, str]:
    """The versions of the libraries that numbers may depend on, of those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_state(folder: Path) -> dict:
    """The commit of this code, and whether files differ from it; empty where it is under no version control."""
    try:
        commit, changed = (
            subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.strip(), "changed_files": len(changed.splitlines())}
