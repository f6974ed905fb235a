"""A loss of the user's: what a file of theirs makes, tried before any data is read."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

from preference_training.core.errors import UserError, nearest
from preference_training.core.files import run_file
from preference_training.losses.base import Loss, LossOutput
from preference_training.losses.registry import register_loss


def own_loss(function: str, options: dict[str, Any], seed: int = 0) -> Loss:
    """What NAME of `function`, which is FILE.py:NAME, makes of `options`: a `Loss`. `seed` is given to it if it asks for one.

    It is tried on numbers of no meaning. Raises UserError for a file, name or options that are not there, and for what is no
    loss; what the file itself raises is raised on.
    """
    file, _, name = function.rpartition(":")
    made = vars(run_file(Path(file).absolute(), "loss"))
    if name not in made:
        raise UserError(f"loss.function: {file} has no {name!r}; {nearest(name, _makers(made))}")
    if not callable(made[name]):
        raise UserError(f"loss.function: {file}: {name!r} cannot be called. Expected a class or a function that makes a Loss.")
    parameters = inspect.signature(made[name]).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key in options:
        if key not in parameters and not takes_any:
            raise UserError(f"loss.options.{key}: {name} has no such option; {nearest(str(key), parameters)}")
    drawn = {"seed": seed} if "seed" in parameters and "seed" not in options else {}
    for key, each in parameters.items():
        needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        if needed and key not in options and key not in drawn:
            raise UserError(f"loss.options.{key}: not given, and {name} has no default for it.")
    try:
        loss = made[name](**options, **drawn)
    except ValueError as error:
        raise UserError(f"loss.options: {name} refuses them: {error}") from error
    fault = _fault_of(loss)
    if fault:
        raise UserError(f"loss.function: {function} {fault}. Expected a Loss, as the classes in losses/objectives.py are.")
    assert isinstance(loss, Loss)
    return loss


register_loss("own", "a user-defined loss", make=own_loss)(Loss)


def _makers(made: dict[str, Any]) -> list[str]:
    """Of a module's names those that may make a loss: classes and functions of its own."""
    return [name for name, value in made.items() if getattr(value, "__module__", None) == made["__name__"]]


def _fault_of(loss: object) -> str | None:
    """What a loss of the user's does that the trainer cannot use, seen on three responses with two pairs; None if nothing."""
    import torch

    if not isinstance(loss, Loss):
        return f"makes {type(loss).__name__}"
    if loss.reference_update is not None:
        return "moves the reference, which only loss=tr_dpo can"
    if old := [name for name in ("survey", "surveys") if hasattr(loss, name)]:
        return f"has {old[0]}, which is called {'needs_' * (old[0] == 'surveys')}batch_statistics now"
    policy = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    reference = torch.tensor([-3.5, -4.0, -4.5]) if loss.needs_reference else None
    pairs = torch.tensor([[0, 1], [0, 2]] if loss.paired else []).reshape(-1, 2)
    # A copy: what it remembers is to come from the data.
    output = copy.deepcopy(loss)(policy, reference, pairs, torch.tensor([2, 3, 4]))
    if not isinstance(output, LossOutput):
        return f"gives {type(output).__name__} when it is called, not a LossOutput"
    wanted = (2,) if loss.paired else (3,)
    if tuple(output.losses.shape) != wanted or not output.losses.requires_grad:
        what = "pairs" if loss.paired else "responses"
        return f"gives losses of shape {list(output.losses.shape)} for {wanted[0]} {what}, expected one with gradient for each"
    rewards = output.chosen_rewards, output.rejected_rewards
    for each in rewards if loss.paired else ():
        if each is None or tuple(each.shape) != wanted or each.requires_grad:
            return "gives no chosen_rewards and rejected_rewards with one value a pair, without gradient"
    return None
