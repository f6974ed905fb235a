"""rerun.yaml: the overrides of a run as a file that repeats it.

    python train.py --config-name rerun --config-dir RUN

Its keys are those of the command line (`model`, `loss.beta`, `adapter`); its paths are absolute.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preference_training.configuration.composition import group_choices
from preference_training.configuration.schema import RunConfig

RERUN = "rerun.yaml"
HEAD = """# What this run was started with. To repeat it:
#   python train.py --config-name rerun --config-dir {directory}
"""
# Of one start, not of what is run.
OF_THE_START = ("resume", "dry_run", "local_run_dir", "sweep_dir", "hydra")
# Keys whose values may be paths.
PATHS = (
    "model", "model.name_or_path", "model.tokenizer_name_or_path", "model.archive", "model.reference_archive",
    "model.chat_template", "datasets",
    "contamination_files", "loss.function", "evaluation.to", "evaluation.against", "evaluation.task_path", "cache_dir",
    "local_dirs", "rounds.prompts", "rounds.judge", "rounds.second_judge",
    "rounds.judging.rubric", "rounds.held_out",
)  # fmt: skip

# A judge whose name may be a path.
MODEL_JUDGE = "reward_model:"


def write_rerun(config: RunConfig, run_dir: Path) -> None:
    """Write rerun.yaml. Raises OSError."""
    values = OmegaConf.to_yaml(OmegaConf.create(rerun_values(config.origin.overrides)))
    (run_dir / RERUN).write_text(HEAD.format(directory=normal(run_dir)) + values, encoding="utf-8")


def rerun_values(overrides: Iterable[str]) -> dict[str, Any]:
    """The overrides that repeat a run: key → value, the later of two."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    values: dict[str, Any] = {}
    for text in overrides:
        [override] = OverridesParser.create().parse_overrides([text])
        key = override.key_or_group
        if key.partition("/")[0].partition(".")[0] in OF_THE_START:
            continue
        values.pop(key, None)
        if not override.is_delete():
            value = override.value()
            values[key] = _absolute(value, key) if key in PATHS else value
    return values


def _absolute(value: Any, key: str) -> Any:
    """A value with the paths in it absolute; names of presets, data sets and models of the hub stay."""
    if isinstance(value, list):
        return [_absolute(each, key) for each in value]
    if isinstance(value, dict):
        paths = ("path", "test_path", "data_dir", "name", "judge", "rubric")
        return {name: _absolute(each, key) if name in paths else each for name, each in value.items()}
    if not isinstance(value, str) or "://" in value or (key == "model" and value in group_choices("model")):
        return value
    if value.startswith(MODEL_JUDGE):
        return MODEL_JUDGE + _absolute(value.removeprefix(MODEL_JUDGE), key)
    file, colon, name = value.rpartition(":") if ".py:" in value else (value, "", "")
    path = Path(file).expanduser()
    found = path.exists() or ("*" in file and path.parent.exists())
    return f"{normal(path)}{colon}{name}" if found or key == "local_dirs" else value


def normal(path: Path) -> Path:
    """A path as an absolute one without `..` and doubled slashes; links stay, unless `..` follows one."""
    plain = Path(os.path.normpath(path.absolute()))
    return plain if not path.exists() or (plain.exists() and plain.samefile(path)) else path.resolve()
