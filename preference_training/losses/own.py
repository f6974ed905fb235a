"""User-defined losses: built from a Python file, and tried before any data is read."""

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
    """Build a `Loss` with `function`, FILE.py:NAME, from `options` (and `seed` if it takes one), and try it on made-up numbers.

    Raises UserError for a file, name or option that does not exist, and for results that are not a loss; exceptions of the file
    itself pass through.
    """
    file, _, name = function.rpartition(":")
    defined = vars(run_file(Path(file).absolute(), "loss"))
    if name not in defined:
        raise UserError(f"loss.function: {file} has no {name!r}; {nearest(name, _loss_makers(defined))}")
    if not callable(defined[name]):
        raise UserError(f"loss.function: {file}: {name!r} cannot be called. Expected a class or a function that makes a Loss.")
    parameters = inspect.signature(defined[name]).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key in options:
        if key not in parameters and not takes_any:
            raise UserError(f"loss.options.{key}: {name} has no such option; {nearest(str(key), parameters)}")
    seeded = {"seed": seed} if "seed" in parameters and "seed" not in options else {}
    for key, each in parameters.items():
        needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        if needed and key not in options and key not in seeded:
            raise UserError(f"loss.options.{key}: not given, and {name} has no default for it.")
    try:
        loss = defined[name](**options, **seeded)
    except ValueError as error:
        raise UserError(f"loss.options: {name} rejects them: {error}") from error
    if problem := _find_problem(loss):
        raise UserError(
            f"loss.function: {function} {problem}. Expected a Loss, as in preference_training/losses/objectives.py."
        )
    assert isinstance(loss, Loss)
    return loss


register_loss("own", "a user-defined loss", make=own_loss)(Loss)


def _loss_makers(defined: dict[str, Any]) -> list[str]:
    """The names in a module that may make a loss: classes and functions that it defines."""
    return [name for name, value in defined.items() if getattr(value, "__module__", None) == defined["__name__"]]


def _find_problem(loss: object) -> str | None:
    """Why the trainer cannot use a user-defined loss, from a trial on three responses with two pairs; None if it can."""
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
    # A copy: its state must come only from the data.
    output = copy.deepcopy(loss)(policy, reference, pairs, torch.tensor([2, 3, 4]))
    if not isinstance(output, LossOutput):
        return f"gives {type(output).__name__} when it is called, not a LossOutput"
    expected, what = ((2,), "pairs") if loss.paired else ((3,), "responses")
    if tuple(output.losses.shape) != expected or not output.losses.requires_grad:
        return (
            f"gives losses of shape {list(output.losses.shape)} for {expected[0]} {what}, expected one with gradient for each"
        )
    rewards = output.chosen_rewards, output.rejected_rewards
    for each in rewards if loss.paired else ():
        if each is None or tuple(each.shape) != expected or each.requires_grad:
            return "gives no chosen_rewards and rejected_rewards with one value a pair, without gradient"
    state = loss.state_dict()
    if state and not (state.keys() == {"own"} and isinstance(state["own"], dict)):
        return (
            f"gives the state_dict {state!r}, which no checkpoint takes; expected {{}}, or {{'own': {{...}}}} of plain values"
        )
    return None
