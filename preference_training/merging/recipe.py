"""What a merge computes: the method, its numbers, and the checks that need no model, and so import no library of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from preference_training.core.errors import UserError
from preference_training.core.values import hash_values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# How far weights of a mean may be from a sum of 1.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Recipe:
    """How models are merged: a method of METHODS, a weight for each model, and its numbers. Build it with `read_recipe`."""

    method: str
    weights: tuple[float, ...]
    t: float = 0.5
    density: float = 1.0
    scale: float = 1.0
    seed: int = 0

    def merge(self, name: str, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
        """One tensor of several of the same name and shape, all float32. base: that of the base model, if there is one."""
        return METHODS[self.method].merge(self, name, base, models)

    def generators(self, name: str) -> list[torch.Generator]:
        """A random stream for each model's tensor of a name: what is drawn depends on no other tensor, and on no file."""
        import torch

        numbers = [int(hash_values([self.seed, number, name])[:15], 16) for number in range(len(self.weights))]
        return [torch.Generator().manual_seed(number) for number in numbers]

    @property
    def settings(self) -> dict[str, float]:
        """The numbers that the method reads, besides weights."""
        return {name: getattr(self, name) for name in METHODS[self.method].reads if name != "weights"}


class Method(NamedTuple):
    """A method. merge: of a recipe, a tensor's name, the base's tensor and the models'. reads: the options that it reads."""

    title: str
    merge: Callable[[Recipe, str, Tensor | None, Sequence[Tensor]], Tensor]
    reads: tuple[str, ...]
    needs_base: bool = True


def _formulas() -> ModuleType:
    from preference_training.merging import formulas

    return formulas


def _linear(recipe: Recipe, _name: str, _base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    return _formulas().linear(models, recipe.weights)


def _slerp(recipe: Recipe, _name: str, _base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    return _formulas().slerp(models[0], models[1], recipe.t)


def _task_arithmetic(recipe: Recipe, _name: str, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    return _formulas().task_arithmetic(base, models, recipe.weights, recipe.scale)


def _ties(recipe: Recipe, _name: str, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    return _formulas().ties(base, models, recipe.weights, recipe.density, recipe.scale)


def _dare_ties(recipe: Recipe, name: str, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    return _formulas().dare_ties(base, models, recipe.weights, recipe.density, recipe.scale, recipe.generators(name))


METHODS = {
    "linear": Method("the weighted mean", _linear, ("weights",), needs_base=False),
    "slerp": Method("[SLERP](https://doi.org/10.1145/325165.325242)", _slerp, ("t",), needs_base=False),
    "task_arithmetic": Method(
        "[task arithmetic](https://arxiv.org/abs/2212.04089)", _task_arithmetic, ("weights", "scale")
    ),
    "ties": Method("[TIES](https://arxiv.org/abs/2306.01708)", _ties, ("weights", "density", "scale")),
    "dare_ties": Method(
        "[DARE](https://arxiv.org/abs/2311.03099) with [TIES](https://arxiv.org/abs/2306.01708)",
        _dare_ties,
        ("weights", "density", "scale", "seed"),
    ),
}  # fmt: skip
NUMBERS = ("t", "density", "scale", "seed")


def read_recipe(method: str, count: int, has_base: bool, **given) -> Recipe:
    """The recipe for `count` models from the options of a command line, None where one is not given. Raises UserError."""
    chosen = METHODS[method]
    if count < 2 and not chosen.needs_base:
        raise UserError(f"merge: found {count} model, expected at least 2. {method} is of several.")
    if method == "slerp" and count != 2:
        raise UserError(f"--method: slerp is of 2 models, found {count}. Use linear for more, or merge them two by two.")
    for option in ("weights", *NUMBERS):
        if given.get(option) is not None and option not in chosen.reads:
            readers = [name for name, each in METHODS.items() if option in each.reads]
            raise UserError(f"--{option}: {method} does not read it. Drop it, or use --method {' or '.join(readers)}.")
    if chosen.needs_base and not has_base:
        raise UserError(
            f"--base: {method} merges what models have learned since their base model, and none is given. Name the model that "
            "all of them were fine-tuned from: --base MODEL."
        )
    if has_base and not chosen.needs_base:
        raise UserError(f"--base: {method} has no base model. Drop it, or use --method ties.")
    weights = _weights(method, count, given.get("weights"))
    numbers = {name: given[name] for name in NUMBERS if given.get(name) is not None}
    if "density" not in numbers and "density" in chosen.reads:
        numbers["density"] = 0.5
    _check_numbers(numbers)
    return Recipe(method, weights, **numbers)


def _weights(method: str, count: int, given: Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return (1 / count,) * count if method == "linear" else (1.0,) * count
    if len(given) != count:
        raise UserError(f"--weights: found {len(given)}, expected {count}: one for each model, in their order.")
    if not all(map(math.isfinite, given)):
        raise UserError(f"--weights: found {shown(given)}, expected finite numbers.")
    if method == "linear" and abs(sum(given) - 1) > ROUNDING:
        total = sum(given)
        advice = f" In the same proportions: --weights {' '.join(f'{each / total:.6g}' for each in given)}." if total else ""
        raise UserError(f"--weights: {shown(given)} sum to {total:.6g}, and those of a mean sum to 1.{advice}")
    if method in ("ties", "dare_ties") and min(given) <= 0:
        raise UserError(
            f"--weights: found {shown(given)}, expected positive numbers: {method} averages what agrees in sign. With "
            "--method task_arithmetic a negative weight has a meaning."
        )
    return tuple(given)


def shown(weights: Sequence[float]) -> str:
    """Weights in words."""
    return ", ".join(f"{weight:.4g}" for weight in weights)


def _check_numbers(numbers: dict) -> None:
    if not 0 < numbers.get("density", 1) <= 1:
        raise UserError(f"--density: found {numbers['density']:g}, expected the share to keep: more than 0, and at most 1.")
    if not 0 <= numbers.get("t", 0) <= 1:
        raise UserError(f"--t: found {numbers['t']:g}, expected a number from 0 (the first model) to 1 (the second).")
    if not math.isfinite(numbers.get("scale", 1)):
        raise UserError(f"--scale: found {numbers['scale']}, expected a finite number.")
