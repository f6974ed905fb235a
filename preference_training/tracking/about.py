"""about.json: the data, the machine, the versions and the code of a run's start."""

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from preference_training.core.processes import usable_cores
from preference_training.data.records.report import DataReport
from preference_training.tracking.run_files import ABOUT

# Libraries that numbers may depend on.
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "peft")


def write_about(
    run_dir: Path,
    names: Sequence[str],
    splits: Sequence[Sequence[DataReport]],
    examples: int | None,
    device,
    sizes: dict | None = None,
) -> None:
    """Write about.json: the data and what was skipped of it, the machine, the versions, and the state of this code.

    splits: the reports of the training data and, if there is one, of the held-out split, for the data sets of these names.
    examples: how many the run trains on in all. device: where it computes. sizes: further facts. Raises OSError.
    """
    data = {
        split: [{"name": name, **report.as_dict()} for name, report in zip(names, reports, strict=True)]
        for split, reports in zip(("train", "held out"), splits, strict=False)
    }
    about = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "examples": examples,
        **(sizes or {}),
        "data": data,
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
