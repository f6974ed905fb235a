"""Where the models of a merge lie: checked by their names alone, before any library of models is imported."""

from pathlib import Path

from preference_training.configuration.model_names import HUB_ID
from preference_training.core.errors import UserError

EXPECTED = "Expected a run directory, a checkpoint (step-N), an adapter, a model directory with safetensors, or a hub id."


def check_place(name: str) -> None:
    """Raise UserError where a name is neither a directory nor may be a hub id."""
    path = Path(name).expanduser()
    # A model of the hub without an owner has no slash.
    is_hub_id = HUB_ID.fullmatch(f"owner/{name}" if "/" not in name else name) and not name.startswith(".")
    # runs/NAME where there is a folder runs: an owner of the hub would not be called so.
    is_hub_id = is_hub_id and not ("/" in name and path.parent.is_dir())
    if not path.is_dir() and (not is_hub_id or path.exists()):
        raise UserError(f"{name}: no such directory. {EXPECTED}")
