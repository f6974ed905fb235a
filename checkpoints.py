"""Checkpoints: what is on disk, and how it gets there whole.

    RUN/step-<examples>/   weights, configuration and tokenizer in Hugging Face format, training_state.pt
    RUN/LATEST             a link to the newest of them
    RUN/LATEST/policy.pt   the weights as one file, at the end of a run

A checkpoint is written beside its place and renamed when it is complete.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import replace_symlink

PARTIAL = ".partial"


def save_checkpoint(
    run_dir: Path, examples: int, policy: nn.Module, weights: dict[str, Tensor], tokenizer, training_state: dict
) -> Path:
    """Write `step-<examples>/` and point LATEST at it. `weights` are all of the policy's, which may hold only a part of them.

    `training_state` holds tensors and plain values only.
    """
    place = run_dir / f"step-{examples}"
    partial = place.with_name(place.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial, state_dict=dict(weights))
    tokenizer.save_pretrained(partial)
    torch.save(training_state, partial / "training_state.pt")
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    replace_symlink(run_dir / "LATEST", place.name)
    return place


def save_policy_pt(checkpoint: Path, weights: dict[str, Tensor], step_idx: int, metrics: dict[str, float]) -> None:
    """Write `policy.pt` into a checkpoint: `{"step_idx", "state", "metrics"}`, loadable with `weights_only=True`.

    `step_idx` counts training examples, as in the original code.
    """
    partial = checkpoint / f"policy.pt{PARTIAL}"
    torch.save({"step_idx": step_idx, "state": weights, "metrics": metrics}, partial)
    os.replace(partial, checkpoint / "policy.pt")
