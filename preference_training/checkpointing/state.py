"""state.json of a checkpoint: what resumes a run besides weights and optimizer, as JSON, and the shape that it must have."""

import base64
import json
import re

import torch
from torch import Tensor

from preference_training.losses.registry import losses

# ---- JSON -----------------------------------------------------------------------------------------------------------------


def to_json(state: dict) -> str:
    """A state of plain values and uint8 tensors as JSON. Raises TypeError for anything else."""
    return json.dumps(state, default=_encode)


def from_json(text: str) -> dict:
    """The state of a JSON text. Raises one of UNREADABLE where it is damaged."""
    return json.loads(text, object_hook=_decode)


def _encode(value):
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return {"base64": base64.b64encode(value.cpu().numpy().tobytes()).decode()}
    raise TypeError(f"{type(value).__name__} does not go into a checkpoint's state")


def _decode(value: dict):
    return torch.tensor(list(base64.b64decode(value["base64"])), dtype=torch.uint8) if value.keys() == {"base64"} else value


# ---- the shape of a state from which a run can resume, for `find_mismatch` --------------------------------------------------


def _count(value) -> bool:
    return type(value) is int and value >= 0


def _number(value) -> bool:
    return type(value) in (int, float)


def _run_id(value) -> bool:
    return type(value) is str and re.fullmatch("[0-9a-f]{32}", value) is not None


SETTING = (_number, bool, None, [_number])
STREAMS = {
    "python": [_count, [_count], (_number, None)],
    "numpy": [[_count], _count, _count, _number],
    "torch": Tensor,
    "cuda": (Tensor, None),
}
STATE_SHAPE = {
    "examples": _count,
    "updates": _count,
    "bad_steps": _count,
    "evaluated_at": (_count, None),
    "held_out": ({...: _number}, None),
    "best": (_number, None),
    "evaluations_since_best": _count,
    "reference_answers": ([str], None),
    "scheduler": {"last_epoch": _count, "base_lrs": [_number], "lr_lambdas": [None], ...: SETTING},
    "scaler": {...: _number},
    "loss": (
        *(shape for loss in losses().values() if (shape := loss.objective.state_shape()) is not None),
        # Of a user's loss.
        {"own": dict},
        {...: None},
    ),
    "train_batches": {
        "position": {"epoch": _count, "examples_in_epoch": _count, "examples": _count},
        # Followed by the budget at the start of the run; not in checkpoints of older versions.
        "budget": ([_count, _count], [_count, _count, _count, _count]),
        "ranks": _count,
        # The processes of a rank; not in checkpoints of older versions.
        ...: _count,
    },
    # Further numbers are not in checkpoints of older versions.
    "watch": {"newest": {...: [_number]}, "chosen_at_start": (_number, None), "said": [str], ...: _number},
    # Of each rank.
    "random": [STREAMS],
    "optimizer_numbers": {...: {...: (_number, bool, None)}},
    "optimizer_groups": [{"params": [str], "lr": _number, ...: (*SETTING, str, [(_number, None)])}],
    "run": {"config": dict, "data": [str], "began_with": (str, None), "wandb_id": _run_id},
}
# Parts that older versions did not write.
NEWER_STATE_SHAPE = {
    "tokens": _count,
    "seconds": _number,
    "held_out_before": {...: [_number]},
    "master_weights": bool,
    "evaluation_due": bool,
    "findings": [str],
}
