"""rerun.yaml: the overrides of a run as a file that repeats it.

    python train.py --config-name rerun --config-dir RUN

Its keys are those of the command line (`model`, `loss.beta`, `adapter`); its paths are absolute. Presets of the user's own
(--config-dir) are copied beside it, each in the folder of its group, where --config-dir finds them.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preference_training.configuration.composition import GROUPS, OPTIONAL_GROUPS, group_choices
from preference_training.configuration.keys import PATH
from preference_training.configuration.schema import RunConfig, keys_with
from preference_training.configuration.sections import FROM_HALVES

RERUN = "rerun.yaml"
HEAD = """# What this run was started with. To repeat it:
#   python train.py --config-name rerun --config-dir {directory}
"""
# Of one start, not of what is run.
OF_THE_START = ("resume", "dry_run", "local_run_dir", "sweep_dir", "hydra")
# Keys whose values may be paths.
PATHS = frozenset({"model"}) | keys_with(PATH)

# Judges are functions in files, models, or names such as tests, which a folder may have too.
JUDGES = ("rounds.judge", "rounds.second_judge", "evaluation.judge")
MODEL_JUDGE = "reward_model:"


def write_rerun(config: RunConfig, run_dir: Path) -> None:
    """Write rerun.yaml, and the presets of the user's own beside it. Raises OSError."""
    keep_presets(config.origin.folder, run_dir)
    values = OmegaConf.to_yaml(OmegaConf.create(rerun_values(config.origin.overrides)))
    (run_dir / RERUN).write_text(HEAD.format(directory=normal(run_dir)) + values, encoding="utf-8")


def keep_presets(folder: Path | None, place: Path) -> None:
    """Copy the presets of a folder to another place, those of each group into a folder of its name. Raises OSError."""
    if folder is None or folder.absolute() == place.absolute():
        return
    for group in (*GROUPS, *OPTIONAL_GROUPS):
        for file in sorted((folder / group).glob("*.yaml")):
            (place / group).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place / group / file.name)


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
        keys = {name: "rounds.judging.rubric" if name == "rubric" else key for name in paths}
        return {name: _absolute(each, keys[name]) if name in paths else each for name, each in value.items()}
    if (
        not isinstance(value, str)
        or "://" in value
        or (key, value) == ("data.weights", FROM_HALVES)
        or (key == "model" and value in group_choices("model"))
    ):
        return value
    if value.startswith(MODEL_JUDGE):
        return MODEL_JUDGE + _absolute(value.removeprefix(MODEL_JUDGE), "model.name_or_path")
    if key in JUDGES and ".py:" not in value:
        return value
    file, colon, name = value.rpartition(":") if ".py:" in value else (value, "", "")
    path = Path(file).expanduser()
    found = path.exists() or ("*" in file and path.parent.exists())
    return f"{normal(path)}{colon}{name}" if found or key == "local_dirs" else value


def normal(path: Path) -> Path:
    """A path as an absolute one without `..` and doubled slashes; links stay, unless `..` follows one."""
    plain = Path(os.path.normpath(path.absolute()))
    return plain if not path.exists() or (plain.exists() and plain.samefile(path)) else path.resolve()
