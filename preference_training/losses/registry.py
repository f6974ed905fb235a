"""The registry of losses: everything that a loss declares is at its registration, next to its class.

A loss is two files: a module in this folder that registers its class, and config/loss/NAME.yaml with its keys. Modules are
discovered automatically.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import preference_training.losses as package
from preference_training.configuration.keys import is_number
from preference_training.core.errors import UserError
from preference_training.losses.base import ExampleKind, Loss, ModelHead

AnyLoss = TypeVar("AnyLoss", bound=type[Loss])


@dataclass(frozen=True)
class Registration:
    """A loss, under the name of its file in config/loss/.

    make: builds the loss from the other keys of the file. objective: its class, which declares the rest, see `Loss`. title: its
    name in cards and reports. arxiv: the number of its paper.
    """

    name: str
    make: Callable[..., Loss]
    objective: type[Loss]
    title: str
    arxiv: str | None = None

    @property
    def link(self) -> str:
        """The title with its paper, in Markdown."""
        return f"{self.title} ([arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv}))" if self.arxiv else self.title


_REGISTERED: dict[str, Registration] = {}


def register_loss(
    name: str, title: str, arxiv: str | None = None, make: Callable[..., Loss] | None = None
) -> Callable[[AnyLoss], AnyLoss]:
    """Register a class as the loss `name`. make: builds it, if its constructor does not take the keys of its file unchanged."""

    def decorator(objective: AnyLoss) -> AnyLoss:
        _REGISTERED[name] = Registration(name, make or objective, objective, title, arxiv)
        return objective

    return decorator


@cache
def losses() -> Mapping[str, Registration]:
    """All losses by their names."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return _REGISTERED


def find_loss(name: object, mode: object = None) -> Registration | None:
    """The loss of a configuration's `loss.mode_loss` if there is one of that name, else of `loss.name`; None if unknown."""
    known = losses()
    return known.get(str(mode)) or known.get(str(name))


def example_kind(name: object) -> ExampleKind:
    """What the examples of a loss are."""
    found = find_loss(name)
    return "pairs" if found is None else found.objective.examples


def model_head(name: object) -> ModelHead:
    """What the policy of a loss gives of each response."""
    found = find_loss(name)
    return "lm" if found is None else found.objective.model_head


def parts_of(name: object, parts: object = None) -> list[Mapping[str, Any]]:
    """The losses that a configuration's `loss.name` and `loss.parts` consist of, by their keys: of a mix its parts."""
    found = parts if name == "mix" and isinstance(parts, Sequence) else [{"name": name}]
    return [part for part in found if isinstance(part, Mapping)]


def evaluation_depends_on_run(name: object, parts: object = None) -> bool:
    """Whether the held-out loss depends on the run's history, so that it cannot be compared between runs."""
    found = [find_loss(part.get("name")) for part in parts_of(name, parts)]
    return any(each is not None and each.objective.evaluation_depends_on is not None for each in found)


@cache
def training_keys() -> frozenset[str]:
    """Keys such as `loss.mode_weight` that change training but not the definition of the held-out loss."""
    return frozenset(f"loss.{key}" for found in losses().values() for key in found.objective.training_keys)


def build_loss(name: str, seed: int = 0, **keys: Any) -> Loss:
    """Build a loss from the keys of its file in `config/loss/`; `seed` seeds its sampling.

    Raises ValueError for an unknown name or mode, UserError for values that the constructor rejects with a ValueError, and for
    a user-defined loss what `own_loss` raises.
    """
    found = find_loss(name, keys.get("mode_loss"))
    if found is None:
        raise ValueError(f"no loss {name!r}; known are {', '.join(losses())}")
    parameters = inspect.signature(found.make).parameters
    _check_numbers(parameters, keys)
    if "seed" in parameters:
        keys |= {"seed": seed}
    if found.make is not found.objective:
        return found.make(**keys)
    try:
        return found.make(**keys)
    except ValueError as error:
        if str(error).partition(": ")[0] in parameters:
            raise UserError(f"loss.{error}.") from error
        raise UserError(f"loss: {name} rejects its keys: {error}") from error


def _check_numbers(parameters: Mapping[str, inspect.Parameter], keys: Mapping[str, Any]) -> None:
    """Raise UserError for a key whose parameter is annotated as a number, and that is none."""
    for key, parameter in parameters.items():
        if parameter.annotation in (float, "float") and key in keys and not is_number(keys[key]):
            raise UserError(f"loss.{key}: found {keys[key]!r}, expected a number.")
