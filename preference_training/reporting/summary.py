"""A run in words: what was trained on what, for how long and to what end, in one line; and the last lines of a run.

What a damaged or older run directory does not say is left out.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from preference_training.configuration.rerun import RERUN
from preference_training.configuration.sections import BASE_MODEL
from preference_training.core.files import is_locked
from preference_training.core.metric_names import (
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_MARGIN,
    EXAMPLES,
    HELD_OUT_PROMPTS,
    TIME,
)
from preference_training.core.values import format_number, size_of_model
from preference_training.data.files import is_data_file
from preference_training.data.registry import dataset_entries
from preference_training.evaluation.phrasing import metric_text
from preference_training.losses.registry import find_loss, model_head, parts_of
from preference_training.reporting.findings import FEW_PROMPTS, Finding, findings
from preference_training.reporting.observations import finite_values
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import CHECKPOINT, JOB, LATEST, LOCK, PRUNED, REPORT, json_object

# What the examples of a loss are called, one and several.
NOUNS = {
    "targets": ("example", "examples"),
    "pairs": ("pair", "pairs"),
    "rankings": ("ranking", "rankings"),
    "labels": ("labeled response", "labeled responses"),
}
MAX_NAMES = 3
# Held-out metrics, and their titles.
SHOWN = {EVAL_LOSS: "held-out loss", EVAL_ACCURACY: "held-out reward accuracy", EVAL_MARGIN: "held-out reward margin"}


@dataclass(frozen=True)
class Conclusion:
    """What a finished run says of itself: its findings, and the lines in which it ends, these among them."""

    findings: Sequence[Finding]
    lines: Sequence[str]


def conclude(run_dir: Path, with_next_steps: bool = True) -> Conclusion:
    """The conclusion of a run. with_next_steps: with the commands that one would run next."""
    run = RunRecord.read(run_dir)
    found = findings(run)
    done = " · ".join(part for part in (*trained(run), duration_text(seconds(run))) if part)
    # Said when the data was prepared.
    new = [finding.line for finding in found if finding.kind != FEW_PROMPTS]
    lines = ["", f"{done}: {run.progress}", *held_out_lines(run), *new]
    return Conclusion(found, [*lines, *(next_steps(run) if with_next_steps else ())])


def held_out_lines(run: RunRecord) -> list[str]:
    """Each held-out metric before training and now, with its interval."""
    first, last, lines = run.evaluations[0] if run.evaluations else {}, run.last_evaluation, []
    for metric, title in SHOWN.items():
        if not isinstance(last.get(metric), int | float):
            continue
        before = first.get(metric) if first is not last else None
        begins = f"{format_number(before)} -> " if isinstance(before, int | float) else ""
        lines.append(f"  {title}: {begins}{metric_text(last, metric, digits=4)}")
    prompts = last.get(HELD_OUT_PROMPTS)
    if lines and isinstance(prompts, int | float):
        lines[0] += f" ({prompts:,.0f} prompt{'s' * (prompts != 1)}; 95% intervals)"
    return lines


def next_steps(run: RunRecord) -> list[str]:
    """The commands that one would run next, on what the run has left."""
    directory, lines = run.directory, []
    if directory.is_relative_to(Path.cwd()):
        directory = directory.relative_to(Path.cwd())
    name = shlex.quote(str(directory))
    loss = run.config.get("loss")
    if (run.directory / LATEST).exists() and isinstance(loss, dict) and model_head(loss.get("name")) == "lm":
        lines.append(f"talk to it: python scripts/chat.py {name}")
    if (run.directory / REPORT).exists():
        lines.append(f"report: {directory / REPORT}")
    return lines


# ---- in one line ------------------------------------------------------------------------------------------------------------


def name_of(run: RunRecord) -> str:
    """The name of the run's experiment, and the number of its job where it is one of a sweep."""
    job = f", job {run.directory.name}" if (run.directory / JOB).is_file() else ""
    return f"{run.config.get('exp_name', run.directory.name)}{job}"


def summary(run: RunRecord) -> str:
    """The run in one line: DPO (beta 0.1) on 285 pairs of mine.jsonl · Qwen3-0.6B + LoRA r=16 · 4 min · finished."""
    return " · ".join(part for part in (*trained(run), duration_text(seconds(run)), status(run)) if part)


def trained(run: RunRecord) -> tuple[str, str]:
    """What the run has trained on what, and from which model."""
    return " on ".join(part for part in (method(run), data(run)) if part), model(run)


# ---- what was trained -----------------------------------------------------------------------------------------------------


def method(run: RunRecord) -> str:
    """The loss and its beta: DPO (beta 0.1)."""
    name, parts = run.loss
    if name == "mix":
        return "a mix of " + _listed([_loss_text(part) for part in parts_of(name, parts)], len(parts or ()))
    return _loss_text(run.config.get("loss"))


def _loss_text(keys: object) -> str:
    if not isinstance(keys, dict):
        return ""
    found = find_loss(keys.get("name"), keys.get("mode_loss"))
    if found is None:
        return str(keys.get("name", ""))
    beta = keys.get("beta")
    own = f" {keys['function']}" if found.name == "own" and "function" in keys else ""
    return short_title(found.name, found.title) + own + (f" (beta {beta:g})" if isinstance(beta, int | float) else "")


def short_title(name: str, title: str) -> str:
    """A loss's abbreviation where that is its name, as of direct preference optimization (DPO), else its title."""
    plain = lambda text: re.sub("[^a-z]", "", text.lower())  # noqa: E731
    short = re.search(r"\((.+)\)$", title)
    return short[1] if short and plain(short[1]) == plain(name) else title[0].upper() + title[1:]


def noun(run: RunRecord, number: float) -> str:
    """What so many examples of the run's loss are called."""
    found = find_loss(*run.loss[:1])
    one, several = NOUNS["pairs" if found is None else found.objective.examples]
    return one if number == 1 else several


def data(run: RunRecord) -> str:
    """How much of which data sets: 285 pairs of mine.jsonl, 3 epochs."""
    names = _listed(data_names(run), MAX_NAMES)
    number, total = num_examples(run, "train"), run.about.get("examples")
    if number is None:
        return names
    shown, passes = f"{number:,}", ""
    if isinstance(total, int) and number and total < 0.995 * number:
        shown = f"{total:,} of {number:,}"
    elif isinstance(total, int) and number and total > 1.005 * number:
        passes = f", {total / number:.3g} epochs"
    return f"{shown} {noun(run, number)}" + f" of {names}" * bool(names) + passes


def data_names(run: RunRecord) -> list[str]:
    """The names of the data sets; of files without their folders."""
    entries = dataset_entries(run.config) if "datasets" in run.config else []
    names = [str(entry.get("name") or entry.get("path")) for entry in entries]
    return [Path(name).name if is_data_file(name) or Path(name).is_absolute() else name for name in names]


def num_examples(run: RunRecord, split: str) -> int | None:
    """The number of examples of a split, "train" or "held out"; None where the run did not record it."""
    sizes = run.about.get(split)
    number = sizes.get("examples") if isinstance(sizes, dict) else None
    return number if isinstance(number, int) and number >= 0 else None


def _listed(names: list[str], most: int) -> str:
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), *shown[-1:]) if part)


# ---- from which model -----------------------------------------------------------------------------------------------------


def model(run: RunRecord) -> str:
    """The model and its adapter: Qwen3-0.6B + LoRA r=16."""
    settings = run.settings
    name, archive = settings.get("model.name_or_path"), settings.get("model.archive")
    kind = settings.get("model.from_config.model_type")
    text = short_path(str(name)) if name else f"{kind}{_size(run)} built from scratch" if kind else ""
    if archive:
        text = f"{text} from {short_path(str(archive))}" if name else short_path(str(archive))
    rank, quantized = settings.get("model.lora.r"), settings.get("model.quantization")
    if rank:
        return f"{text} + {'Q' * bool(quantized)}LoRA r={rank}" + f" ({quantized})" * bool(quantized)
    return text


def _size(run: RunRecord) -> str:
    """How many parameters a model has, in words."""
    number = run.about.get("parameters")
    if not isinstance(number, int):
        return ""
    return f" of {size_of_model(number)} parameters"


def short_path(name: str) -> str:
    """The name of a model, a run or a checkpoint without the folders it lies in: Qwen3-0.6B, my_run/step-640."""
    parts = Path(name).parts
    telling = 2 if len(parts) > 1 and (parts[-1].startswith(CHECKPOINT) or parts[-1] in (LATEST, "model", "policy.pt")) else 1
    return "/".join(part for part in parts[-telling:] if part not in (LATEST, "/"))


def reference(run: RunRecord) -> str:
    """What the policy is compared with, in words."""
    found = find_loss(*run.loss[:1])
    if found is None or run.loss[0] == "mix":
        return ""
    if not found.objective.needs_reference:
        return "" if found.objective.examples == "targets" else "none: this loss compares the policy with no other model"
    if run.settings.get("loss.reference_free"):
        return "none: loss.reference_free=true"
    follows = ", which follows the policy" if run.settings.get("loss.reference_update_every") else ""
    if other := other_model(run):
        return other + follows
    if follows:
        return f"a copy of the model before training{follows}"
    # An archive may be an adapter, with which training starts.
    if run.settings.get("model.lora.r") and not run.settings.get("model.archive"):
        return "the same model without its adapter, as before training"
    return "the model as before training"


def other_model(run: RunRecord) -> str:
    """What the reference is where training does not start from it, in words; else an empty text."""
    archive = run.settings.get("model.reference_archive")
    if not archive:
        return ""
    return f"another model: {'that without model.archive' if archive == BASE_MODEL else short_path(archive)}"


# ---- how long, and to what end --------------------------------------------------------------------------------------------


def seconds(run: RunRecord) -> float | None:
    """How long the run has taken so far, without the time between a stop and its resumption; None where it is unknown."""
    total, begun, before = 0.0, None, None
    for moment, text in _moments(run):
        if text in ("begins", "goes on"):
            total += (before - begun).total_seconds() if begun and before else 0.0
            begun = moment
        before = moment
    if begun and before:
        return total + (before - begun).total_seconds()
    # An earlier version logged the seconds since 1970.
    times = finite_values(run.steps[-1:], TIME)
    return times[0] if times and times[0] < 1e9 else None


def _moments(run: RunRecord) -> Iterator[tuple[datetime, str]]:
    for event in run.events:
        try:
            moment = datetime.fromisoformat(event["time"])
        except (LookupError, TypeError, ValueError):
            continue
        if moment.tzinfo is not None:
            yield moment, str(event.get("text"))


def last_moment(run: RunRecord) -> str:
    """When the run's last event was; empty where that is not known."""
    moments = [moment for moment, _ in _moments(run)]
    return f"{moments[-1]:%Y-%m-%d %H:%M}" if moments else ""


def duration_text(time: float | None) -> str:
    """A duration in words: 40 s, 4 min, 2 h 10 min; empty for None."""
    if time is None or time < 0:
        return ""
    if time < 90:
        return f"{time:.0f} s"
    minutes = round(time / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(time / 3600) if minutes >= 2880 else minutes // 60
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min"


def status(run: RunRecord) -> str:
    """Whether the run is running, has finished, or was stopped, and where."""
    last = str(run.events[-1].get("text")) if run.events else ""
    if (run.directory / PRUNED).exists():
        return f"pruned at {_share(run)}"
    if last == "ends":
        early = any(str(event.get("text")).startswith("early stopping") for event in run.events)
        return f"stopped early at {_share(run)}" if early else "finished"
    if last.startswith("ends: stopped"):
        return f"stopped at {_share(run)}"
    if last.startswith("ends: ") or json_object(run.directory / JOB).get("state") == "failed":
        return f"failed at {_share(run)}" + (f": {last.removeprefix('ends: ')}" if last.startswith("ends: ") else "")
    if not run.rows:
        return "no step yet"
    return f"{'running, ' if is_locked(run.directory / LOCK) else ''}at {_share(run)}"


def _share(run: RunRecord) -> str:
    """How far the run is."""
    done, total = run.rows[-1][EXAMPLES] if run.rows else 0, run.about.get("examples")
    return f"{done / total:.0%}" if isinstance(total, int) and total > 0 else f"{done:,.0f} examples"


def command(run: RunRecord) -> str:
    """The command line that repeats the run; empty where the run recorded none."""
    if (run.directory / RERUN).is_file():
        return f"python train.py --config-name {Path(RERUN).stem} --config-dir {shlex.quote(_from_here(run.directory))}"
    overrides = json_object(run.directory / JOB).get("overrides")
    if isinstance(overrides, list):
        own = [
            text for text in map(str, overrides) if not text.lstrip("+").startswith(("sweep_dir=", "hydra", "local_run_dir="))
        ]
        return shlex.join(["python", "train.py", *own])
    return ""


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path)
