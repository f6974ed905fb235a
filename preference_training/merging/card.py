"""What is known of a merged model: its model card, and the lines that are printed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, EVAL_MARGIN
from preference_training.core.values import aligned
from preference_training.data.rendering.chat_templates import PLAIN_PROMPT
from preference_training.evaluation.phrasing import with_interval
from preference_training.export.source import base_license
from preference_training.merging.ingredients import Ingredient, listed_base
from preference_training.merging.recipe import METHODS, Recipe
from preference_training.reporting.model_card import CardFacts, is_hub_id, model_card

SHOWN = {EVAL_LOSS: "held-out loss", EVAL_ACCURACY: "accuracy", EVAL_MARGIN: "margin"}


@dataclass
class MergeFacts:
    """The content of a merged model's card.

    held_out: name of an ingredient, or MERGED, -> metric -> {mean, low, high}, where they were measured on the same rows.
    measured_on: the run that the rows are of. notes: what the user should know.
    """

    MERGED: ClassVar[str] = "the merged model"

    recipe: Recipe
    models: Sequence[Ingredient]
    base: Ingredient | None
    architecture: str
    parameters: int
    dtype: str
    prompt: str = PLAIN_PROMPT
    name: str = ""
    held_out: dict[str, dict] = field(default_factory=dict)
    measured_on: str | None = None
    notes: list[str] = field(default_factory=list)

    def summary(self, directory: Path) -> str:
        """One line on the model in a directory."""
        of = f"{self.recipe.method} of {len(self.models)} models"
        return f"{directory}: {self.architecture}, {self.parameters:,} parameters, {self.dtype}, {of}"

    def table(self) -> list[str]:
        """The held-out metrics as lines of text: of each ingredient, and of the merged model; none where none were measured."""
        if not self.held_out:
            return []
        metrics = self._metrics()
        rows = [["held out", "weight", *(SHOWN[name] for name in metrics)]]
        rows += [[name, weight, *values] for name, weight, *values in self._rows(metrics)]
        return aligned(rows)

    def _metrics(self) -> list[str]:
        return [name for name in SHOWN if any(name in found for found in self.held_out.values())]

    def _weights(self) -> dict[str, str]:
        t = self.recipe.t
        weights = (1 - t, t) if self.recipe.method == "slerp" else self.recipe.weights
        return {each.name: f"{weight:.4g}" for each, weight in zip(self.models, weights, strict=True)}

    def _rows(self, metrics: Sequence[str]) -> list[list[str]]:
        """Name, weight and metrics of the ingredients and of the merged model, those that were measured."""
        weights = self._weights()
        names = [each.name for each in self.models]
        names = ([self.base.name] if self.base else []) + names + [self.MERGED]
        rest = [name for name in self.held_out if name not in names]
        rows = []
        for name in [*names, *rest]:
            found = self.held_out.get(name, {})
            cells = [_cell(found.get(metric)) for metric in metrics]
            rows.append([name, weights.get(name, "base" if self.base and name == self.base.name else ""), *cells])
        return rows

    def ingredients_table(self) -> str:
        """The ingredients with weights and metrics as a table of Markdown."""
        metrics = self._metrics()
        shown = {each.name: f"`{listed_base(each)}`" for each in (*self.models, *([self.base] if self.base else []))}
        head = ["model", "weight", *(SHOWN[name] for name in metrics)]
        rows = [[shown.get(name, name), *cells] for name, *cells in self._rows(metrics)]
        if not self.held_out:
            rows = rows[:-1]
        return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])


def _cell(value: dict | None) -> str:
    return "" if value is None or value["mean"] is None else with_interval(value["mean"], value["low"], value["high"])


def merge_card(facts: MergeFacts) -> str:
    """The text of the README.md."""
    method = METHODS[facts.recipe.method]
    settings = "".join(f", {name} {value:g}" for name, value in facts.recipe.settings.items())
    text = f"Merged by {method.title} ({facts.recipe.method}{settings}), computed in float32 and rounded once to {facts.dtype}."
    notes = [text, facts.ingredients_table()]
    if facts.held_out:
        notes.append(
            f"Held-out metrics on the rows of the run `{facts.measured_on}`, means with 95% intervals over prompts; lower "
            "losses and higher accuracies are better."
        )
    notes += [_without_paths(f"{note[0].upper()}{note[1:]}.", facts) for note in facts.notes]
    ids = [name for each in (facts.base, *facts.models) if each is not None and (name := _hub_id(each))]
    leading = facts.models[0]
    card = CardFacts(
        name=facts.name,
        architecture=facts.architecture,
        dtype=facts.dtype,
        parameters=facts.parameters,
        config=None,
        base=None,
        license=base_license(facts.base.location if facts.base else leading.location, leading.cache_dir),
        prompt=facts.prompt,
        notes=notes,
        head=leading.head,
        merged_from=list(dict.fromkeys(ids)),
        is_merged=True,
    )
    return model_card(card)


def _without_paths(text: str, facts: MergeFacts) -> str:
    """A note with models as the card's table names them."""
    ingredients = [*facts.models, *([facts.base] if facts.base else [])]
    shown = {name: listed_base(each) for each in ingredients for name in (each.name, each.location)}
    # A path may be the beginning of another one.
    for name in sorted(shown, key=len, reverse=True):
        text = text.replace(name, shown[name])
    return text


def _hub_id(ingredient: Ingredient) -> str | None:
    """The hub id of a model, or of the one that its run started from."""
    name = ingredient.source.base if ingredient.source is not None else ingredient.name
    return name if name and is_hub_id(name) and "/" in name else None
