"""User-defined losses: built from a Python file, and tried before any data is read."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preference_training.core.errors import UserError, nearest
from preference_training.core.files import run_file
from preference_training.losses.base import BatchStatistics, ExampleKind, Examples, Loss, LossOutput
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


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
    # Nobody knows; set so, since its class may be a frozen one.
    object.__setattr__(loss, "can_be_negative", True)
    return loss


register_loss("own", "a user-defined loss", make=own_loss)(Loss)


def _loss_makers(defined: dict[str, Any]) -> list[str]:
    """The names in a module that may make a loss: classes and functions that it defines."""
    return [name for name, value in defined.items() if getattr(value, "__module__", None) == defined["__name__"]]


# What the examples of each kind are in a trial on responses 0, 1 and 2.
TRIALS: dict[ExampleKind, list[list[int]]] = {
    "targets": [[0], [1], [2]],
    "pairs": [[0, 1], [0, 2]],
    "rankings": [[0, 1, 2], [2, 1, -1]],
    "labels": [[0, 1], [2, 1]],
}


def _find_problem(loss: object) -> str | None:
    """Why the trainer cannot use a user-defined loss, from a trial on three responses; None if it can."""
    import torch

    if not isinstance(loss, Loss):
        return f"makes {type(loss).__name__}"
    if loss.reference_update is not None:
        return "moves the reference, which only loss=tr_dpo can"
    if loss.reads_tokens or loss.reads_collision:
        return "reads log-probs of single tokens, which only losses of the framework can"
    if loss.examples not in TRIALS:
        return f"has examples {loss.examples!r}; {nearest(str(loss.examples), TRIALS)}"
    if problem := _find_old_interface(loss):
        return problem
    policy = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    reference = torch.tensor([-3.5, -4.0, -4.5]) if loss.needs_reference else None
    members = torch.tensor(TRIALS[loss.examples])
    labels = torch.tensor([True, False]) if loss.examples == "labels" else None
    margins = torch.ones(len(members)) if loss.needs_margins else None
    examples = Examples(members, torch.tensor([2, 3, 4]), 3.0, margins=margins, labels=labels)
    # A copy: its state must come only from the data.
    tried = copy.deepcopy(loss)
    if problem := _find_problem_of(tried(policy, reference, examples), loss, len(members)):
        return problem
    if loss.needs_batch_statistics:
        statistics = tried.batch_statistics(*_of_micro_batch(policy, reference, examples))
        if not isinstance(statistics, BatchStatistics):
            return f"gives {type(statistics).__name__} when batch_statistics is called, not BatchStatistics"
        output = tried(policy, reference, examples, statistics.at(torch.arange(len(members))))
        if problem := _find_problem_of(output, loss, len(members)):
            return f"{problem}, when it is called with batch_statistics"
    state = loss.state_dict()
    if state and not (state.keys() == {"own"} and isinstance(state["own"], dict)):
        return (
            f"gives the state_dict {state!r}, which no checkpoint takes; expected {{}}, or {{'own': {{...}}}} of plain values"
        )
    return None


def _of_micro_batch(policy: Tensor, reference: Tensor | None, examples: Examples) -> tuple[Tensor, Tensor | None, Examples]:
    """What `batch_statistics` gets of a micro-batch: log-probs [E, M], and the examples that refer to them."""
    import torch

    members = examples.members
    exist = members >= 0
    own, known = (None if each is None else each.detach()[members].where(exist, 0) for each in (policy, reference))
    assert own is not None
    numbers = torch.arange(members.numel()).view_as(members).where(exist, -1)
    lengths = examples.lengths[members].where(exist, 0).flatten()
    return own, known, replace(examples, members=numbers, lengths=lengths)


def _find_problem_of(output: object, loss: Loss, number: int) -> str | None:
    """Why the trainer cannot use what a loss gives for a number of examples; None if it can."""
    if not isinstance(output, LossOutput):
        return f"gives {type(output).__name__} when it is called, not a LossOutput"
    expected = (number,)
    if tuple(output.losses.shape) != expected or not output.losses.requires_grad:
        return (
            f"gives losses of shape {list(output.losses.shape)} for {number} {loss.examples}, expected one with gradient "
            "for each"
        )
    rewards = output.chosen_rewards, output.rejected_rewards
    for each in rewards if loss.examples != "targets" else ():
        if each is None or tuple(each.shape) != expected or each.requires_grad:
            return "gives no chosen_rewards and rejected_rewards with one value an example, without gradient"
    return None


def _find_old_interface(loss: Loss) -> str | None:
    """What of a loss is written for an earlier version, and what to write now; None if nothing is."""
    if old := [name for name in ("survey", "surveys") if hasattr(loss, name)]:
        return f"has {old[0]}, which is called {'needs_' * (old[0] == 'surveys')}batch_statistics now"
    if hasattr(loss, "paired"):
        return 'has paired, in place of which it declares examples now: "pairs", or "targets" where paired was False'
    if {"pairs", "lengths"} & inspect.signature(loss).parameters.keys():
        return (
            "is called with pairs and lengths, which are examples.pairs and examples.lengths now: write "
            "def __call__(self, policy, reference, examples, batch_statistics=None)"
        )
    parameters = inspect.signature(loss.batch_statistics).parameters.values()
    if len(parameters) < 3 and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return "has batch_statistics of log-ratios: write def batch_statistics(self, policy, reference, examples), all [E, M]"
    return None
