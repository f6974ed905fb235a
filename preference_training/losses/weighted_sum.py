"""A weighted sum of losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preference_training.configuration.composition import default_values, group_keys
from preference_training.configuration.keys import check_section, is_number
from preference_training.configuration.sections import LossConfig
from preference_training.core.errors import UserError, nearest
from preference_training.losses.base import BatchStatistics, Examples, Loss, LossOutput
from preference_training.losses.registry import build_loss, register_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A loss of a mix and its weight in the sum."""

    loss: Loss
    weight: float


def build_mix(parts: Any, seed: int = 0) -> MixedLoss:
    """The mix of `loss.parts`, each `{name: ..., weight: ..., KEY: ...}`; keys not given have their file's defaults."""
    if not isinstance(parts, list) or not parts:
        example = "[{name: dpo}, {name: sft, weight: 0.2}]"
        raise UserError(f"loss.parts: found {parts!r}, expected a list that is not empty, as in {example}.")
    return MixedLoss([_build_part(part, f"loss.parts[{number}]", seed) for number, part in enumerate(parts)])


def _build_part(part: Any, where: str, seed: int) -> Part:
    known = {name: keys for name, keys in group_keys("loss").items() if name not in ("mix", "own")}
    if not isinstance(part, dict) or "name" not in part:
        raise UserError(f"{where}: found {part!r}, expected {{name: LOSS, weight: NUMBER}} and keys of that loss.")
    name, weight = part["name"], part.get("weight", 1.0)
    if name not in known:
        raise UserError(f"{where}.name: no loss {name!r} that can be a part; {nearest(str(name), known)}")
    if not is_number(weight) or weight <= 0:
        raise UserError(f"{where}.weight: found {weight!r}, expected a number above 0.")
    given = {key: value for key, value in part.items() if key != "weight"}
    if unknown := sorted(given.keys() - known[name]):
        raise UserError(f"{where}.{unknown[0]}: loss={name} has no such key; {nearest(unknown[0], known[name])}")
    keys = default_values(loss=name)["loss"] | given
    check_section(LossConfig, keys, where)
    try:
        loss = build_loss(**keys, seed=seed)
    except UserError as error:
        # It names keys as those of the only loss.
        raise UserError(f"{where}{str(error).removeprefix('loss')}") from error
    if loss.examples not in ("pairs", "targets") or loss.reference_update is not None or loss.model_head == "value":
        raise UserError(f"{where}.name: found {name}, expected a loss of pairs with a frozen reference, or sft.")
    return Part(loss, float(weight))


@dataclass(frozen=True)
class MixStatistics(BatchStatistics):
    """The batch statistics of each part; None for one that needs none."""

    parts: Sequence[BatchStatistics | None]

    def at(self, places: Tensor) -> MixStatistics:
        """The parts for the micro-batch's examples at the indices `places`."""
        return MixStatistics([None if part is None else part.at(places) for part in self.parts])


@register_loss("mix", "a weighted sum of losses", make=build_mix)
class MixedLoss(Loss):
    """The weighted sum of several losses of pairs. A loss of single responses is that of the chosen one.

    The rewards that are logged are those of the first part that has any.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        losses = [part.loss for part in parts]
        if all(loss.examples == "targets" for loss in losses):
            raise UserError("loss.parts: found no loss of pairs, expected at least one. Use loss=sft for single responses.")
        self.needs_reference = any(loss.needs_reference for loss in losses)
        self.needs_batch_statistics = any(loss.needs_batch_statistics for loss in losses)
        self.needs_margins = any(loss.needs_margins for loss in losses)
        self.needs_positive_margins = any(loss.needs_positive_margins for loss in losses)
        self.reads_margins = any(loss.reads_margins for loss in losses)
        self.reads_tokens = any(loss.reads_tokens for loss in losses)
        self.reads_collision = any(loss.reads_collision for loss in losses)
        self.has_likelihood = any(loss.has_likelihood or loss.examples == "targets" for loss in losses)
        self.can_be_negative = any(loss.can_be_negative for loss in losses)
        self.evaluation_depends_on = next((loss.evaluation_depends_on for loss in losses if loss.evaluation_depends_on), None)

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> MixStatistics:
        """The statistics of each part."""
        losses = [part.loss for part in self.parts]
        return MixStatistics([loss.batch_statistics(policy, reference, examples) for loss in losses])

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: MixStatistics | None = None
    ) -> LossOutput:
        statistics = batch_statistics.parts if batch_statistics else [None] * len(self.parts)
        chosen_only = replace(examples, members=examples.members[:, :1])
        outputs = [
            part.loss(policy, reference, chosen_only if part.loss.examples == "targets" else examples, found)
            for part, found in zip(self.parts, statistics, strict=True)
        ]
        paired = next(output for output in outputs if output.chosen_rewards is not None)
        weighted = [part.weight * output.losses for part, output in zip(self.parts, outputs, strict=True)]
        logged = {name: value for output in outputs for name, value in output.statistics.items()}
        return replace(paired, losses=sum(weighted[1:], weighted[0]), statistics=logged)

    @classmethod
    def state_shape(cls) -> dict[str, Any]:
        """The state of each part."""
        return {"parts": [dict]}

    def state_dict(self) -> dict[str, Any]:
        """The state of each part; empty where none has any."""
        states = [part.loss.state_dict() for part in self.parts]
        return {"parts": states} if any(states) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of each part."""
        for part, saved in zip(self.parts, state.get("parts", [{}] * len(self.parts)), strict=True):
            part.loss.load_state_dict(saved)
