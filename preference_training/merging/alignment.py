"""Stored weights by the names of one architecture: of each ingredient of a merge, and of the model that is written.

A head may be the embedding in one model and its own weights in another, such as one whose adapter trained it: the merged model
has both then, and a model that ties them counts with its embedding as both.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preference_training.merging.ingredients import Ingredient
from preference_training.merging.weights import StoredWeights, TensorInfo
from preference_training.modeling.value_head import auto_class


class Aligned:
    """Stored weights by the names of a model's own: files of some models lack, or add, the prefix of the body.

    ties: of the model's configuration: a weight's name -> the name of the weight that it is.
    """

    def __init__(self, stored: StoredWeights, model: nn.Module, ties: Mapping[str, str]):
        self.stored, own, prefix = stored, model.state_dict().keys(), f"{model.base_model_prefix}."
        self.names = {}
        for name in stored.infos:
            others = (name, f"{prefix}{name}", name.removeprefix(prefix))
            self.names[next((each for each in others if each in own), name)] = name
        # Tables that older versions stored, and compute anew.
        self.extra = {name for name in self.names if name not in own}
        # As transformers loads them: what a file has twice with other values is not tied, whatever the configuration says.
        self.ties = {name: other for name, other in ties.items() if not self._differ(name, other)}

    def _differ(self, name: str, other: str) -> bool:
        if not {name, other} <= self.names.keys():
            return False
        return self.info(name) != self.info(other) or not torch.equal(self.read(name), self.read(other))

    def resolve_ties(self, untied: Collection[str]) -> None:
        """Have each tied weight under one name, those of `untied` under both."""
        for name, other in self.ties.items():
            stored = self.names.get(other, self.names.get(name))
            self.names.pop(name, None)
            if stored is not None:
                self.names |= {other: stored} | ({name: stored} if name in untied else {})

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor."""
        return self.stored.infos[self.names[name]]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self.stored.read(self.names[name])


@dataclass(frozen=True)
class Alignment:
    """The weights of each ingredient, and the merged model without weights, whose configuration is the one to write."""

    model: nn.Module
    weights: list[Aligned]
    notes: list[str]

    @property
    def config(self):
        """The transformers configuration of the merged model."""
        return self.model.config

    @classmethod
    def of(cls, on_disk: Sequence[Ingredient], leading: Ingredient, opened: ExitStack) -> "Alignment":
        """That of ingredients whose weights are on disk; their files are open until `opened` is closed.

        leading: the one whose configuration the merged model has.
        """
        config = copy.deepcopy(leading.config)
        model, ties = empty_model(leading, config), {}
        weights = []
        for each in on_disk:
            # The same for all that tie: they are of one architecture.
            is_tied = ties_embeddings(each.config)
            if is_tied and not ties:
                ties = _ties(empty_model(each, each.config))
            stored = opened.enter_context(StoredWeights(each.weights, each.name))
            weights.append(Aligned(stored, model, ties if is_tied else {}))
        separate = [each for each, own in zip(on_disk, weights, strict=True) if not ties.keys() <= own.ties.keys()]
        untied = set(ties) if separate else set()
        for found in weights:
            found.resolve_ties(untied)
        notes = []
        if separate:
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
            model = empty_model(leading, config)
        if 0 < len(separate) < len(on_disk):
            names = ", ".join(each.name for each in separate)
            notes.append(f"head and embedding are one in some of the models, not in {names}; the merged model has both")
        return cls(model, weights, notes)


def empty_model(ingredient: Ingredient, config) -> nn.Module:
    """The model of a configuration without weights, of the class that an ingredient has."""
    with torch.device("meta"):
        return auto_class(ingredient.head).from_config(copy.deepcopy(config), trust_remote_code=ingredient.trust_remote_code)


def ties_embeddings(config) -> bool:
    """Whether a configuration has the head be the embedding."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _ties(model: nn.Module) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
