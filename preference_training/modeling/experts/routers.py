"""The routers of a mixture-of-experts model, and what they gave in a forward.

transformers says of most models which modules are their routers (`_can_record_outputs`), with the place of the logits in what
they return; of others they are known by the names of their classes. The outputs are taken by forward hooks, only in what
`RouterRecorder.recorded` computes: what activation checkpointing computes again in the backward pass is not counted twice.

Shapes: N computed tokens of one forward, E experts of a layer, K experts a token is sent to.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from preference_training.core.process_group import full_tensor

Computed = TypeVar("Computed")
# What the classes of routers are called in transformers; a router also knows how many experts it chooses, or of how many.
ROUTER_CLASS = re.compile(r"(Router|Gate|Gating)$")
# Attributes of a router or of its layer: a bias of each expert that its choice, but not its weight, depends on. Such routers
# score by a sigmoid.
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")
# Of those that score by a sigmoid without one: model_type.
SIGMOID_WITHOUT_BIAS = ("llama4_text",)
# What configurations call the number of experts of a layer, and the number that a token is sent to.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NUM_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k")


@dataclass(frozen=True)
class Router:
    """One router of a model. name: that of the module. logits_at: where its output has the logits.

    chosen: K. scores_by_sigmoid: whether its scores are sigmoids of its logits, not their softmax.
    """

    name: str
    module: nn.Module
    logits_at: int
    chosen: int
    scores_by_sigmoid: bool

    def read(self, output: Any) -> "Routed":
        """The logits and choices in what the module has returned."""
        found = output if isinstance(output, tuple) else (output,)
        logits = full_tensor(found[self.logits_at]).flatten(0, -2)
        return Routed(logits, self._choices(found, logits))

    def _choices(self, output: tuple, logits: Tensor) -> Tensor:
        """The experts that each token is sent to: [N, K]; those of the largest logits where the output does not say."""
        for value in output:
            is_index = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
            if is_index and value.dim() > 1 and value.shape[-1] == self.chosen and value.numel() == len(logits) * self.chosen:
                return value.detach().flatten(0, -2).long()
        return logits.detach().topk(self.chosen, dim=-1).indices


@dataclass(frozen=True)
class Routed:
    """What a router gave in one forward. logits: [N, E], with gradient. experts: [N, K] int64, the experts chosen."""

    logits: Tensor
    experts: Tensor


def num_experts(config) -> int | None:
    """The number of experts of a layer, by a model's configuration; None for a model without."""
    found = _values(config, NUM_EXPERTS)
    return found[0] if found and found[0] > 1 else None


def num_chosen(config) -> int | None:
    """How many experts a token is sent to, by a model's configuration."""
    found = _values(config, NUM_CHOSEN)
    # Some have one number for each layer.
    return (max(found[0]) if isinstance(found[0], list | tuple) else int(found[0])) if found else None


def _values(config, names: tuple[str, ...]) -> list:
    """What a model's configuration has under any of these names."""
    text = config.get_text_config()
    parts = (text, getattr(text, "ffn_config", None))
    return [value for part in parts for name in names if (value := getattr(part, name, None))]


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a model in the order of its layers; empty where it has none, or none that is known."""
    if num_experts(model.config) is None:
        return []
    places = _declared(model)
    found: dict[str, Router] = {}
    for name, module in model.named_modules():
        if ".original_module" in name:
            # What is trained is a copy of it.
            continue
        place = next((at for kind, at in places if isinstance(module, kind)), None)
        if place is None and _looks_like_router(module):
            place = 0
        if place is not None:
            found[name] = _router(model, name, module, place)
    # Of modules that contain a router the router alone: JetMoE's attention returns what its own router has said.
    outer = {name for name in found for other in found if other.startswith(f"{name}.")}
    return [router for name, router in found.items() if name not in outer]


def _declared(model: nn.Module) -> list[tuple[type, int]]:
    """The classes of routers that a model declares, and where their outputs have the logits."""
    for module in model.modules():
        declared = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")
        if declared is not None:
            recorders = declared if isinstance(declared, list | tuple) else [declared]
            pairs = [(getattr(each, "target_class", each), getattr(each, "index", 0)) for each in recorders]
            return [pair for pair in pairs if isinstance(pair[0], type)]
    return []


def _looks_like_router(module: nn.Module) -> bool:
    """By its class; a gate of another kind knows of no experts."""
    named = ROUTER_CLASS.search(type(module).__name__) is not None
    return named and any(hasattr(module, name) for name in ("num_experts", "n_routed_experts", "top_k"))


def _router(model: nn.Module, name: str, module: nn.Module, place: int) -> Router:
    layer = model.get_submodule(name.partition(".modules_to_save.")[0].rpartition(".")[0])
    biased = any(hasattr(each, bias) for each in (module, layer) for bias in SELECTION_BIASES)
    by_sigmoid = biased or model.config.get_text_config().model_type in SIGMOID_WITHOUT_BIAS
    own = getattr(module, "top_k", None)
    chosen = own if isinstance(own, int) else num_chosen(model.config)
    return Router(name, module, place, chosen or 1, by_sigmoid)


@dataclass
class RouterRecorder:
    """Records what a model's routers give. forwards: of each router, in the order of the layers, its outputs in order."""

    routers: list[Router]
    forwards: list[list[Routed]] = field(default_factory=list)
    is_on: bool = False

    def __post_init__(self) -> None:
        self.forget()
        self.hooks = [
            router.module.register_forward_hook(self._hook(number, router)) for number, router in enumerate(self.routers)
        ]

    def _hook(self, number: int, router: Router):
        # Not a part of compiled code, which would differ between a forward and its repetition.
        @torch.compiler.disable
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.is_on:
                self.forwards[number].append(router.read(output))

        return note

    def recorded(self, compute: Callable[[], Computed]) -> Callable[[], Computed]:
        """A function that computes the same, and records the forwards made by it alone; what fails leaves nothing."""

        def record() -> Computed:
            self.forget()
            self.is_on = True
            try:
                return compute()
            except BaseException:
                self.forget()
                raise
            finally:
                self.is_on = False

        return record

    def take(self) -> list[list[Routed]]:
        """What was recorded, which is forgotten here: it holds the tensors of a pass."""
        found = self.forwards
        self.forget()
        return found

    def remove(self) -> None:
        """Leave the routers as they were."""
        self.forget()
        for hook in self.hooks:
            hook.remove()

    def forget(self) -> None:
        """Forget what was recorded."""
        self.forwards = [[] for _ in self.routers]
