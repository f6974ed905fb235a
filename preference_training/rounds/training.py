"""The step that trains: the configuration of a round's run, of what the loop was started with, and the command for it."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preference_training.configuration.keys import listed
from preference_training.configuration.model_names import ADAPTER_CONFIG
from preference_training.configuration.rerun import keep_presets
from preference_training.core.errors import UserError
from preference_training.core.files import replace_symlink
from preference_training.core.metric_names import ROUNDS, UPDATES
from preference_training.core.values import counted
from preference_training.rounds.loop import Loop, RoundFiles
from preference_training.rounds.tables import can_be_written, read_table, save_text
from preference_training.tracking.run_files import LATEST, METRICS, json_object, metric_rows

# The program that trains, beside the package.
TRAIN = Path(__file__).parents[2] / "train.py"
# Keys of a loop that its trainings do not have. The loop holds its GPUs for them.
OF_THE_LOOP = ("rounds", "gpus_per_job", "pruner")
HEAD = """# The training of {name}. To run it by itself:
#   python train.py --config-name train --config-dir {directory}
"""


def training_values(loop: Loop, number: int) -> dict[str, Any]:
    """The configuration of a round's training, as the keys of a command line."""
    files, archive = loop.round(number), loop.archive_before(number)
    values = {key: value for key, value in loop.values.items() if key.partition(".")[0] not in OF_THE_LOOP}
    if loop.config.objective.startswith(ROUNDS):
        # Of the loop; a training has the usual one.
        values.pop("objective", None)
    values |= {
        "datasets": _datasets(loop, number),
        "exp_name": f"{loop.config.exp_name}-{files.name}",
        "local_run_dir": str(files.run),
        "resume": "auto",
    }
    if archive is not None:
        values["model.archive"] = str(archive)
    if template := json_object(files.sampling).get("template"):
        values["template"] = template
    # The loop reads checkpoints only.
    values.setdefault("save_policy_pt", False)
    if loop.config.rounds.reference == "first" and number > 1:
        values["model.reference_archive"] = first_archive(loop)
    return values


def first_archive(loop: Loop) -> str:
    """What model.reference_archive is for the model before the first round."""
    model, archive = loop.config.model, loop.config.model.archive
    # Under a new adapter the model itself is the first one.
    return archive if archive and (model.lora.r is None or (Path(archive) / ADAPTER_CONFIG).is_file()) else "base"


def _datasets(loop: Loop, number: int) -> list[Any]:
    """The round's pairs, those of earlier rounds with the weight that replay_share takes, and data sets of the user's own."""
    entries: list[Any] = [{"path": str(loop.round(number).pairs)}]
    share = loop.config.rounds.replay_share
    if share and number > 1:
        now = len(read_table(loop.round(number).pairs, ["sft_target"]))
        earlier = {path: len(read_table(path, ["sft_target"])) for path in (loop.round(k).pairs for k in range(1, number))}
        # share = weight * earlier / (now + weight * earlier)
        weight = min(1.0, share * now / ((1 - share) * sum(earlier.values())))
        entries += [{"path": str(path), "weight": round(weight, 6)} for path in earlier]
    return entries + (listed(loop.values["datasets"]) if "datasets" in loop.values else [])


def write_training(loop: Loop, number: int) -> list[str]:
    """Write the configuration of a round's training; the command that trains."""
    files = loop.round(number)
    with can_be_written(files.training):
        keep_presets(loop.directory, files.directory)
    text = OmegaConf.to_yaml(OmegaConf.create(training_values(loop, number)))
    save_text(files.training, HEAD.format(name=files.name, directory=files.directory) + text)
    return [sys.executable, str(TRAIN), "--config-name", files.training.stem, "--config-dir", str(files.directory)]


def reference_moves(files: RoundFiles, every: int) -> str:
    """How often the reference of a round's training has moved towards the policy, every so many updates, in words."""
    updates = int(next(reversed(metric_rows(files.run / METRICS)), {}).get(UPDATES, 0))
    if updates < every:
        return (
            f"its reference never moved: the training took {counted(updates, 'update')}, and loss.reference_update_every is "
            f"{every}. Lower it"
        )
    return f"its reference moved {counted(updates // every, 'time')} towards the policy, every {counted(every, 'update')}"


def finish_training(files: RoundFiles) -> None:
    """Note the checkpoint that a round's training has ended with. Raises UserError where it has left none."""
    newest = files.run / LATEST
    if not newest.is_dir():
        raise UserError(
            f"{files.run}: its training has left no checkpoint. Expected debug=false and a save_strategy that writes one."
        )
    with can_be_written(files.policy):
        replace_symlink(files.policy, str(newest.resolve().relative_to(files.directory.resolve())))
